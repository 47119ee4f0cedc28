"""optimum-quanto and SDNQ against a Fisher budget plan of the same bytes, on one model: noise error, image error, FID.

    pip install -c constraints.txt 'fqdiff[bench]'
    fqdiff import pretrained:mnist-small --name mnist-small
    fqdiff fisher mnist-small --kind true --timesteps 200 --granularity weight --bins 10 --name loss
    fqdiff fisher mnist-small --kind trajectory --samples 64 --granularity weight --bins 1 --name runs
    python benchmarks/rivals.py --images 64

Every setting of either library is quantized, its file's bytes are counted and its noise error is measured. For each budget of
bits per weight each library then enters with its setting of least noise error that fits; the setting's file size is the target
of our plans. Those are sampled, all from the same noise. Errors as in budget.py. What is measured is kept beside the store, one
JSON object a line, and not measured again.

Each library's weights, as it dequantizes them, are run by one and the same network: only its weights are judged, not its speed.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from budget import SAMPLES, TIMESTEPS, Judge, ours
from rival_libraries import Setting, quantized, quanto_settings, sdnq_settings

from fqdiff.configs import ClassifierConfig
from fqdiff.context import Context
from fqdiff.evidence.features import to_unit_range
from fqdiff.pipeline import Runner, Step
from fqdiff.store.manifest import Manifest
from fqdiff.store.store import Store
from fqdiff.values import Checkpoint, ClassifierWeights, Dataset

LIBRARIES = ("optimum-quanto", "sdnq")
BEGIN, END = "<!-- measured by benchmarks/rivals.py -->", "<!-- end of what was measured -->"
Record = dict[str, Any]


class Ledger:
    """Records by key, one JSON object a line; a line cut off by an interruption is measured again."""

    def __init__(self, path: Path) -> None:
        self.path, self.found = path, {}
        lines = path.read_text().splitlines() if path.exists() else []
        for line in lines:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            self.found[self._name(record["key"])] = record["value"]

    @staticmethod
    def _name(key: Record) -> str:
        return json.dumps(key, sort_keys=True)

    def get(self, key: Record, measure: Callable[[], Record]) -> Record:
        """What was recorded for ``key``, or else what ``measure`` returns, recorded."""
        name = self._name(key)
        if name not in self.found:
            self.found[name] = measure()
            with self.path.open("a") as file:
                # A line of its own, also after one that was cut off.
                file.write("\n" + json.dumps({"key": key, "value": self.found[name]}) + "\n")
        return self.found[name]


@dataclass(frozen=True)
class Row:
    """One model: ``source`` is a plan's id, or empty; ``noise`` its noise error; ``images`` the error of each image.

    ``fid``: FID digits, its difference to full precision's, and the ends of that one's interval; empty before there are images.
    """

    label: str
    source: str
    file_bytes: int
    noise: float
    images: tuple[float, ...] = ()
    fid: tuple[float, ...] = ()

    def bits(self, parameters: int) -> float:
        """Bits per weight, the whole file counted."""
        return 8 * self.file_bytes / parameters


@dataclass
class Bench:
    """All that measuring takes; ``key`` names what every record depends on."""

    runner: Runner
    manifest: Manifest
    checkpoint: Checkpoint
    tables: dict[str, Manifest]
    judge: Judge
    dataset: Dataset
    features: ClassifierWeights
    ledger: Ledger
    key: Record

    def rival_key(self, setting: Setting) -> Record:
        options = dict(setting.options)
        return {**self.key, "library": setting.library, "version": version(setting.library), "options": options}

    def rival_model(self, setting: Setting) -> tuple[int, Checkpoint]:
        """File size and weights of ``setting``."""
        made = quantized(self.checkpoint.network(), setting)
        return len(made.content), replace(self.checkpoint, tensors=made.weights)

    def rival(self, setting: Setting) -> Row | str:
        """The row of ``setting`` without images, or the error its library ends with."""

        def measure() -> Record:
            try:
                size, model = self.rival_model(setting)
                return {"bytes": size, "noise": self.judge.noise_error(model)}
            except Exception as error:  # whatever a library raises is its result
                return {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}

        got = self.ledger.get({**self.rival_key(setting), "measure": "noise"}, measure)
        if "error" in got:
            return str(got["error"])
        return Row(f"{setting.library}: {setting.label}", "", got["bytes"], got["noise"])

    def with_images(self, row: Row, key: Record, model: Callable[[], Any]) -> Row:
        """``row`` with the error of each image of ``model``, and with FID."""
        key = {**key, "measure": "images and FID", "images": self.judge.images, "steps": self.judge.steps}

        def measure() -> Record:
            samples = self.judge.samples(model(), 0)
            errors = self.judge.image_errors(to_unit_range(samples.images).double()).tolist()
            value, difference, interval = self.judge.fid(samples, self.dataset, self.features)
            return {"errors": errors, "fid": [value, difference, *interval]}

        found = self.ledger.get(key, measure)
        return replace(row, images=tuple(found["errors"]), fid=tuple(found["fid"]))

    def rival_with_images(self, setting: Setting, row: Row) -> Row:
        return self.with_images(row, self.rival_key(setting), lambda: self.rival_model(setting)[1])

    def plan(self, name: str, target_bytes: int) -> Row | None:
        """Our plan of strategy ``name`` in at most ``target_bytes``; None if nothing fits."""
        made = ours(self.runner, self.manifest, self.tables, {"target_bytes": target_bytes}, name)
        if made is None:
            return None
        key = {**self.key, "plan": made.plan, "model": made.model}
        found = self.ledger.get({**key, "measure": "noise"}, lambda: {"noise": self.judge.noise_error(made.value)})
        row = Row(f"fqdiff: {name}", made.plan, made.file_bytes, found["noise"])
        return self.with_images(row, key, lambda: made.value)


def entrants(rows: Iterable[tuple[Setting, Row]], budgets: list[float], parameters: int) -> list[tuple[Setting, Row]]:
    """For each budget and library the row of least noise error that fits; each row once, from the smallest file up."""
    rows = list(rows)
    chosen: dict[str, tuple[Setting, Row]] = {}
    for budget in budgets:
        for library in LIBRARIES:
            fitting = [(s, r) for s, r in rows if s.library == library and r.bits(parameters) <= budget]
            if fitting:
                best = min(fitting, key=lambda pair: (pair[1].noise, pair[1].file_bytes))
                chosen[best[1].label] = best
    return sorted(chosen.values(), key=lambda pair: pair[1].file_bytes)


def mean_and_error(values: Iterable[float]) -> tuple[float, float]:
    """Mean of ``values`` and its standard error."""
    each = torch.tensor(list(values), dtype=torch.float64)
    return float(each.mean()), float(each.std() / len(each) ** 0.5)


def compared(groups: list[tuple[Row, list[Row]]], parameters: int) -> list[str]:
    """The table of rivals, each above our plans of its bytes; Markdown lines."""
    lines = [
        "| model | bytes | bits | noise error | image error | median | theirs - ours | FID digits | plan |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for rival, plans in groups:
        for row in (rival, *plans):
            mean, error = mean_and_error(row.images)
            median = float(torch.tensor(row.images, dtype=torch.float64).quantile(0.5))
            difference = ""
            if row is not rival:
                gain = mean_and_error(a - b for a, b in zip(rival.images, row.images, strict=True))
                difference = f"{gain[0]:+.5f} ± {gain[1]:.5f}"
            label = f"**{row.label}**" if row is rival else row.label
            value, above, low, high = row.fid
            lines.append(
                f"| {label} | {row.file_bytes:,} | {row.bits(parameters):.3f} | {row.noise:.3g}"
                f" | {mean:.5f} ± {error:.5f} | {median:.5f} | {difference}"
                f" | {value:.1f}, {above:+.1f} [{low:+.1f}, {high:+.1f}] | {row.source} |"
            )
    return lines


def listed(rows: list[Row], failed: list[tuple[Setting, str]], parameters: int) -> list[str]:
    """Every setting with its bytes and noise error, from the smallest file up, then those that failed; Markdown lines."""
    lines = ["| setting | bytes | bits | noise error |", "|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: row.file_bytes):
        lines.append(f"| {row.label} | {row.file_bytes:,} | {row.bits(parameters):.3f} | {row.noise:.3g} |")
    if failed:
        lines += ["", "Settings that failed, with the first line of the error:", ""]
    lines += [f"- {setting.library}: {setting.label}: `{error}`" for setting, error in failed]
    return lines


def write_between(path: Path, lines: list[str]) -> None:
    """Put ``lines`` between the marks in the page at ``path``, and leave what people wrote around them."""
    page = path.read_text()
    before, after = page.index(BEGIN) + len(BEGIN), page.index(END)
    path.write_text(page[:before] + "\n\n" + "\n".join(lines) + "\n\n" + page[after:])


def main() -> None:
    """Parse the command line, measure what is missing, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default="mnist-small")
    parser.add_argument("--store", type=Path, default=Path(os.environ.get("FQDIFF_STORE", "fqdiff-store")))
    parser.add_argument("--loss", default="loss", help="Fisher table of the loss, with single weights")
    parser.add_argument("--runs", default="runs", help="Fisher table of sampler runs")
    parser.add_argument("--budgets", default="2.5,3,4,5,6.5", help="bits per weight; each library enters once for each")
    parser.add_argument("--plans", default="trajectory", help="our strategies, of those of budget.py, with slashes")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20, help="of DDIM")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", type=Path, help="where measurements are kept (default: STORE-rivals.jsonl)")
    parser.add_argument("--markdown", type=Path, help="also put the tables into this page, between its marks")
    options = parser.parse_args()

    store = Store(options.store)
    context = Context(torch.device(options.device))
    runner = Runner(store, context)
    manifest = store.resolve(options.checkpoint, ("checkpoint",))
    checkpoint: Checkpoint = runner.load(manifest)
    tables = {"loss": store.resolve(options.loss, ("fisher",)), "runs": store.resolve(options.runs, ("fisher",))}
    given = manifest.input("dataset")
    assert given is not None
    dataset = store.find("dataset", given.id)
    assert dataset is not None
    images: Dataset = runner.load(dataset)
    features = runner.run(Step("classifier", {"dataset": dataset}, ClassifierConfig()))
    judge = Judge(checkpoint, images.reference, options.images, options.steps, context)
    results = options.results or options.store.with_name(f"{options.store.resolve().name}-rivals.jsonl")
    key = {
        "checkpoint": manifest.id,
        "dataset": dataset.id,
        "features": features.id,
        "inputs": [TIMESTEPS, SAMPLES],
        "torch": torch.__version__,
    }
    bench = Bench(runner, manifest, checkpoint, tables, judge, images, runner.load(features), Ledger(results), key)
    parameters = sum(t.numel() for t in checkpoint.tensors.values())

    works: list[tuple[Setting, Row]] = []
    failed: list[tuple[Setting, str]] = []
    for setting in (*quanto_settings(), *sdnq_settings()):
        found = bench.rival(setting)
        if isinstance(found, str):
            failed.append((setting, found))
            print(f"{setting.library}: {setting.label}: {found}", flush=True)
        else:
            works.append((setting, found))
            print(f"{found.label}: {found.file_bytes:,} bytes, noise error {found.noise:.4g}", flush=True)

    groups: list[tuple[Row, list[Row]]] = []
    for setting, plain in entrants(works, [float(b) for b in options.budgets.split(",")], parameters):
        rival = bench.rival_with_images(setting, plain)
        made = [bench.plan(name, rival.file_bytes) for name in options.plans.split("/") if name]
        groups.append((rival, [row for row in made if row is not None]))
        print("\n".join(compared(groups[-1:], parameters)[2:]), flush=True)

    versions = ", ".join(f"{name} {version(name)}" for name in (*LIBRARIES, "torch"))
    lines = [
        f"Checkpoint {manifest.id} ({parameters:,} parameters), Fisher tables {tables['loss'].id} and"
        f" {tables['runs'].id}, features {features.id}; {versions}; {options.images} images, DDIM-{options.steps}, seed 0.",
        "",
        *compared(groups, parameters),
        "",
        "All settings, by size:",
        "",
        *listed([row for _, row in works], failed, parameters),
    ]
    if options.markdown is None:
        print("\n".join(lines))
    else:
        write_between(options.markdown, lines)


if __name__ == "__main__":
    main()
