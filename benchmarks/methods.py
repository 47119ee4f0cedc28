"""The field's table: every published method on one model, from a sweep, as Markdown.

    python benchmarks/methods.py                    # makes what is missing: minutes on a GPU, a day on two cores
    python benchmarks/methods.py --sweep examples/sweeps/calibration.toml

Runs ``fqdiff sweep`` on the file (FQDIFF_STORE; what is there is not made again) and prints a table for each precision of
weights and activations, then the noise error by tenths of the timesteps. Intervals are those of comparisons, verdicts those of
the sweep: Holm's correction over all of its cells. The noise floor, full precision with other noise, is the second row of each
table, after full precision. The models of one precision are compared with each other too: the column "above fisher" (or above
the first) is a paired difference in image error, with a star where it is told from chance after Holm's correction over all
pairs.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pyarrow.parquet as pq
import torch

from fqdiff.chains import comparison_step
from fqdiff.configs import CompareConfig
from fqdiff.context import Context
from fqdiff.evidence.comparison import BASELINE, FLOOR
from fqdiff.pipeline import Runner
from fqdiff.report.words import interval
from fqdiff.store.manifest import Manifest
from fqdiff.store.store import Store

Row = dict[str, Any]
SWEEP = Path(__file__).parent.parent / "examples" / "sweeps" / "methods.toml"
HEAD = (
    "| method | bytes | bits | FID digits, above full precision's | verdict | image error | above {} | noise error | minutes"
    " | model |",
    "|---|---|---|---|---|---|---|---|---|---|",
)
UNSAID = (
    "method",
    "calibration",
    "activations",
    "activations_format",
    "activations_split_skips",
    "plans",
    "name",
)  # what a heading or a word says
TENTHS = [f"noise_error_decile{k}" for k in range(1, 11)]


def swept(file: Path, device: str, jobs: int) -> list[Row]:
    """The rows of the sweep's table. Cells that fail are in it, with their reason."""
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "table.parquet"
        command = [sys.executable, "-m", "fqdiff", "sweep", str(file), "--device", device, "--jobs", str(jobs)]
        subprocess.run([*command, "--output", str(table)], stdout=subprocess.DEVNULL, check=False)
        return pq.read_table(table).to_pylist()


def device_called(name: str) -> torch.device:
    """The device that the sweep takes for ``name``."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def weight_bits(row: Row) -> float:
    """The bits of a row's weights: those of its uniform plan, or of its budget in whole bits."""
    uniform = row.get("plan_uniform")
    bits = float(uniform.removeprefix("int") if uniform else row["plan_target_bpw"])
    return round(bits)


def activation_bits(row: Row) -> str:
    """The format of a row's activations, empty for float32."""
    return row.get("quantize_activations") or row.get("quantize_activations_format") or ""


def precision(row: Row) -> tuple[float, str]:
    """What rows of one table have in common."""
    return weight_bits(row), activation_bits(row)


def words(row: Row) -> str:
    """The method, and what the sweep's file says beyond its name."""
    named = row.get("quantize_method") or ""
    more = []
    for key, value in row.items():
        name = key.removeprefix("quantize_")
        if name == key or name in UNSAID or value in (None, ""):
            continue
        said = name.removeprefix("activations_").replace("_", " ")
        more.append(said if value is True else f"without {said}" if value is False else f"{said} {value}")
    if row.get("quantize_calibration") and not named:
        more.insert(0, f"calibration {row['quantize_calibration']}")
    if row.get("quantize_activations_split_skips") is False:
        more.append("skips joined")
    return ", ".join(filter(None, [named, *more]))


def between(row: Row, name: str, form: str) -> str:
    """A number with its interval."""
    low, value, high = (row[f"{name}{end}"] for end in ("_low", "", "_high"))
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


def reference(rows: list[Row]) -> Row | None:
    """The row that those of its precision are compared with: this project's own method, else the first one done."""
    done = [row for row in rows if row["error"] is None]
    return next((row for row in done if words(row) == "fisher"), done[0] if done else None)


def above(runner: Runner, rows: list[Row]) -> dict[str, str]:
    """By samples' id the paired difference in image error to the reference's, and its verdict, Holm's over all of ``rows``."""
    base = reference(rows)
    made = list(dict.fromkeys(row["samples_id"] for row in rows if row["error"] is None))
    if base is None or len(made) < 2:
        return {}
    first = next(row for row in rows if row["error"] is None)

    def stored(kind: str, id_: str) -> Manifest:
        found = runner.store.find(kind, id_)
        assert found is not None
        return found

    samples = [stored("samples", id_) for id_ in made]
    config = CompareConfig(error_inputs=0, trajectories=0, full_precision_of=tuple(range(1, len(made) + 1)))
    inputs = (stored("dataset", first["dataset_id"]), stored("features", first["features_id"]))
    full = stored("samples", first["full_samples_id"])
    value = runner.load(runner.run(comparison_step(*inputs, full, samples, None, [], config)))
    mine = made.index(base["samples_id"]) + 1
    found = {}
    for d in value.differences:
        if d.metric == "image_mse" and f"model{mine}" in (d.of, d.against):
            sign = -1 if d.of == f"model{mine}" else 1
            other = d.against if sign < 0 else d.of
            low, high = sorted((sign * d.low, sign * d.high))
            told = "" if d.adjusted_p > 1 - value.level else " *"
            found[made[int(other.removeprefix("model")) - 1]] = (
                f"{sign * d.difference:+.2e} [{low:+.2e}, {high:+.2e}]{told}"
            )
    return found


def table(rows: list[Row], runner: Runner) -> Iterator[str]:
    """All rows of one precision, those of the least image error first, then those that failed."""
    base, differences = reference(rows), above(runner, rows)
    yield HEAD[0].format(words(base) if base is not None else "")
    yield HEAD[1]
    first = next((row for row in rows if row["error"] is None), None)
    if first is not None:
        compared = runner.store.find("comparison", first["comparison_id"])
        assert compared is not None
        floor = interval(runner.load(compared).pair("fid", FLOOR, BASELINE), "+.2f")
        error, own = first["image_mse_floor"], first["checkpoint_id"]
        yield f"| float32 | | 32 | {first['fid_full']:.1f} | | 0 | | 0 | | {own} |"
        yield f"| float32, other noise | | 32 | {first['fid_floor']:.1f}, {floor} | | {error:.4f} | | 0 | | {own} |"
    for row in sorted((row for row in rows if row["error"] is None), key=lambda row: float(row["image_mse"])):
        yield (
            f"| {words(row)} | {row['bytes']:,} | {row['bits_per_weight']:.2f}"
            f" | {row['fid']:.1f}, {between(row, 'fid_difference', '+.2f')}"
            f" | {row['verdict']} | {between(row, 'image_mse', '.2e')}"
            f" | {differences.get(row['samples_id'], '')} | {between(row, 'noise_error', '.2e')}"
            f" | {row['making_seconds'] / 60:.1f} | {row['quantized_id']} |"
        )
    for row in rows:
        if row["error"] is not None:
            yield f"| {words(row)} | {row['error']} |" + " |" * 8


def tenths(rows: list[Row]) -> Iterator[str]:
    """Noise errors by tenth of the timesteps, the one next to the image first."""
    yield "| method | " + " | ".join(f"t < {k}0 %" if k < 10 else "to the noise" for k in range(1, 11)) + " |"
    yield "|---|" + "---|" * 10
    for row in sorted((row for row in rows if row["error"] is None), key=lambda row: float(row["image_mse"])):
        yield f"| {words(row)} | " + " | ".join(f"{row[name]:.1e}" for name in TENTHS) + " |"


def title(bits: float, activations: str) -> str:
    """``W4A8``, say."""
    return f"W{bits:g}A{activations.removeprefix('int') or '32'}"


def main() -> None:
    """Run the sweep and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", type=Path, default=SWEEP)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    os.environ.setdefault("FQDIFF_STORE", "fqdiff-store")
    rows = swept(options.sweep, options.device, options.jobs)
    runner = Runner(Store(Path(os.environ["FQDIFF_STORE"])), Context(device_called(options.device)))
    done = next(row for row in rows if row["error"] is None)
    print(
        f"Checkpoint {done['checkpoint_id']}, data set {done['dataset_id']}, features {done['features_id']}; {done['n']:,} images"
        f" of each; full precision has FID {done['fid_full']:.2f}, with other noise {done['fid_floor']:.2f}."
    )
    for shared in sorted({precision(row) for row in rows}, key=lambda one: (one[1] != "", -one[0], one[1])):
        mine = [row for row in rows if precision(row) == shared]
        print(f"\n### {title(*shared)}\n\n" + "\n".join(table(mine, runner)))
    print("\n## Noise error by timestep")
    for shared in sorted({precision(row) for row in rows}, key=lambda one: (one[1] != "", -one[0], one[1])):
        mine = [row for row in rows if precision(row) == shared]
        print(f"\n### {title(*shared)}, noise error by tenth of the timesteps\n\n" + "\n".join(tenths(mine)))


if __name__ == "__main__":
    main()
