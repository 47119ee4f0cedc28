"""Plans for a byte budget against every control, on one model: bytes, noise error, image error.

    fqdiff import pretrained:mnist-small --name mnist-small
    fqdiff fisher mnist-small --kind true --timesteps 200 --granularity weight --bins 10 --name loss
    fqdiff fisher mnist-small --kind trajectory --samples 64 --granularity weight --bins 1 --name runs
    python benchmarks/budget.py mnist-small --loss loss --runs runs

Everything is counted in bits per weight: the size of the file, over the weights of the network. All models start from the same
noise. Noise error: 1/2 |eps_q - eps|^2, summed over pixels, mean over held-out inputs, and over timesteps. Image error: squared
difference of pixels in [-1, 1] to the full-precision model's image from the same noise, with a 95 % bootstrap interval over
images; the paired difference to the first strategy of the same budget has one of its own.
"""

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor

from fqdiff.configs import RIVALS, ClassifierConfig, FidConfig, PlanConfig, QuantizeConfig, SampleConfig
from fqdiff.context import Context, MemoryParts
from fqdiff.errors import ConfigError
from fqdiff.evidence.features import to_unit_range
from fqdiff.pipeline import Runner, Step
from fqdiff.rng import generator
from fqdiff.sensitivity.inputs import Inputs, draw_inputs, graded_timesteps
from fqdiff.sensitivity.measure import outputs, residual, rises
from fqdiff.stages.fid import fid
from fqdiff.stages.sample import sample
from fqdiff.store.manifest import Manifest
from fqdiff.store.store import Store
from fqdiff.values import Checkpoint, ClassifierWeights, Dataset, SampleSet

TIMESTEPS, SAMPLES = 20, 5  # held-out inputs of the noise error
RESAMPLES = 1000
GRAINS = "tensor,channel,group-near:64"
INTEGERS = ("float32", "float16", "int8", "int6", "int5", "int4", "int3", "int2", "ternary")
WHOLE: dict[str, Any] = {"granularity": GRAINS, "scale": "float16"}  # one format a tensor
FREE: dict[str, Any] = {"granularity": f"{GRAINS},output", "scale": "float16"}
TINY = ("float32", "float16", "int8", "int4", "int3", "codebook4", "codebook3", "codebook2", "ternary", "codebook1")
TINY_BELOW = 1.75  # bits per weight, for which no plan without one-bit codes is small enough
SCORES: dict[str, tuple[str, dict[str, Any]]] = {  # name -> (which table, settings of the plan)
    "trajectory": ("runs", {"score": "trajectory", **FREE}),
    "fisher by sampler": ("loss", {"score": "fisher", "timestep_weights": "sampler", **FREE}),
    "fisher": ("loss", {"score": "fisher", **FREE}),
    "fisher, one format a tensor": ("loss", {"score": "fisher", **WHOLE}),
    "fisher, gram": ("loss", {"score": "fisher", "predictor": "gram", **WHOLE}),
    "fisher, kept elements": ("loss", {"score": "fisher", "granularity": "channel,element", "scale": "float16"}),
    "fisher, int by channel": (
        "loss",
        {"score": "fisher", "scale": "float16", "formats": INTEGERS, "ranges": ("min-max",)},
    ),
    "hawq": ("loss", {"score": "hawq", **FREE}),
    "modelopt": ("loss", {"score": "modelopt", **WHOLE}),
    "autoround": ("loss", {"score": "autoround", **WHOLE}),
    "weight error": ("loss", {"score": "weight-mse", **FREE}),
    "random": ("loss", {"score": "random", **FREE}),
    "reverse": ("loss", {"score": "reverse", **FREE}),
    "one width": ("loss", {"score": "uniform", "scale": "float16", "formats": INTEGERS}),
}
DISTILLED, LONGER = ", distilled", ", distilled longer"  # kept elements cannot be
STEPS = {LONGER: 8000, DISTILLED: 1000}
STRATEGIES = [*SCORES, *(f"{name}{DISTILLED}" for name in SCORES if "elements" not in name), f"trajectory{LONGER}"]


@dataclass(frozen=True)
class Made:
    """A model with the ids of its plan and of itself; ``seed`` of its samples."""

    plan: str
    model: str
    file_bytes: int
    value: Any
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """One model of the table. ``errors``: of each image; ``fid``: digits, of them all, and its difference to full precision's."""

    budget: float | None
    label: str
    plan: str
    model: str
    file_bytes: int
    noise_error: float
    errors: list[float]
    mean_shift: float
    fid: float
    fid_difference: float
    fid_interval: tuple[float, float]


class Judge:
    """Compares networks with the full-precision one on the same inputs and from the same noise."""

    def __init__(self, checkpoint: Checkpoint, held_out: Tensor, images: int, steps: int, context: Context) -> None:
        self.checkpoint, self.steps, self.images, self.context = checkpoint, steps, images, context
        timesteps, self.weights = graded_timesteps(checkpoint.spec.noise_schedule().num_train_timesteps, TIMESTEPS)
        self.inputs: Inputs = draw_inputs(held_out, checkpoint.spec, timesteps, self.weights, SAMPLES, 0, "budget")
        self.reference = self.outputs(checkpoint)
        self.residual = residual(self.inputs, self.reference)

    def alone(self) -> Context:
        """The context with partial results of its own: those of one model are not another's."""
        return replace(self.context, parts=MemoryParts())

    def outputs(self, model: Any) -> Tensor:
        """What ``model`` predicts for the held-out inputs, float64."""
        return outputs(model.network().to(self.context.device), self.inputs, self.context.device)

    @cached_property
    def baseline_samples(self) -> SampleSet:
        """What all others are compared with."""
        return self.samples(self.checkpoint, 0)

    @cached_property
    def baseline(self) -> Tensor:
        """The full-precision model's images in [-1, 1], float64."""
        return to_unit_range(self.baseline_samples.images).double()

    def samples(self, model: Any, seed: int) -> SampleSet:
        """Images from the noise of ``seed``."""
        return sample(model, SampleConfig(steps=self.steps, count=self.images), seed, self.alone())

    def sampled(self, model: Any, seed: int) -> Tensor:
        """The same in [-1, 1], float64."""
        return to_unit_range(self.samples(model, seed).images).double()

    def noise_error(self, model: Any) -> float:
        """1/2 |eps_q - eps|^2, summed over pixels, mean over held-out inputs and timesteps."""
        delta = self.outputs(model) - self.reference
        error, _, _ = rises(delta, self.residual, SAMPLES)
        return float((error * self.weights).sum())

    def image_errors(self, images: Tensor) -> Tensor:
        """Mean squared difference of each of ``images`` to the full-precision one of the same noise, float64 [N]."""
        return (images - self.baseline).square().flatten(1).mean(dim=1)

    def fid(
        self, samples: SampleSet, dataset: Dataset, features: ClassifierWeights
    ) -> tuple[float, float, tuple[float, float]]:
        """FID of ``samples``, its difference to full precision's of the same noise, and the interval of that."""
        found = fid(samples, dataset, features, self.baseline_samples, FidConfig(), 0, self.alone())
        assert found.difference is not None
        assert found.interval is not None
        return found.fid, found.difference, found.interval

    def row(self, budget: float | None, label: str, made: Made, dataset: Dataset, features: ClassifierWeights) -> Row:
        """Everything measured of a model."""
        samples = self.samples(made.value, made.seed)
        images = to_unit_range(samples.images).double()
        return Row(
            budget,
            label,
            made.plan,
            made.model,
            made.file_bytes,
            self.noise_error(made.value),
            self.image_errors(images).tolist(),
            float((images - self.baseline).mean()),
            *self.fid(samples, dataset, features),
        )


def mean_and_interval(values: Tensor) -> tuple[float, float, float]:
    """Mean over images, and its 95 % bootstrap interval."""
    draw = generator(0, "budget bootstrap")
    means = values[torch.randint(len(values), (RESAMPLES, len(values)), generator=draw)].mean(dim=1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(values.mean()), low, high


def ours(
    runner: Runner, checkpoint: Manifest, tables: dict[str, Manifest], target: dict[str, Any], name: str
) -> Made | None:
    """The model of one strategy for ``target``, such as target_bpw=2.5; None where nothing fits."""
    suffix = next((one for one in STEPS if name.endswith(one)), "")
    role, settings = SCORES[name.removesuffix(suffix)]
    steps = STEPS.get(suffix, 0)
    if "formats" not in settings and target.get("target_bpw", TINY_BELOW) < TINY_BELOW:
        settings = {**settings, "formats": TINY}
    table, config = tables[role], PlanConfig("budget", **target, **settings)
    inputs = {"checkpoint": checkpoint, "fisher": table}
    if settings["score"] in RIVALS or settings.get("predictor") == "gram":
        given = table.input("dataset")
        assert given is not None
        dataset = runner.store.find("dataset", given.id)
        assert dataset is not None
        inputs["dataset"] = dataset
    try:
        plan = runner.run(Step("plan", inputs, config))
    except ConfigError:
        return None
    inputs = {"checkpoint": checkpoint, "plan": plan}
    if table.recipe.config["granularity"] == "weight":
        inputs["fisher"] = table
    made = runner.run(Step("quantize", inputs, QuantizeConfig(distill=steps)))
    return Made(plan.id, made.id, made.file("model.safetensors").bytes, runner.load(made))


HEAD = (
    "| model | bits | bytes | noise error | image error [95 %] | above the first [95 %] | shift | FID digits | plan | model |",
    "|---|---|---|---|---|---|---|---|---|---|",
)


def line(row: Row, parameters: int, first: Row | None) -> str:
    """``row`` as one line of the table; ``first``: of the same budget."""
    errors, more = torch.tensor(row.errors, dtype=torch.float64), ""
    mean, low, high = mean_and_interval(errors)
    if first is not None and first is not row:
        above = errors - torch.tensor(first.errors, dtype=torch.float64)
        more = "{:+.4f} [{:+.4f}, {:+.4f}]".format(*mean_and_interval(above))
    a, b = row.fid_interval
    name = row.label if row.budget is None else f"{row.label}, {row.budget:g}"
    return (
        f"| {name} | {8 * row.file_bytes / parameters:.3f} | {row.file_bytes:,} | {row.noise_error:.3g}"
        f" | {mean:.5f} [{low:.5f}, {high:.5f}] | {more} | {row.mean_shift:+.3f}"
        f" | {row.fid:.1f}, {row.fid_difference:+.1f} [{a:+.1f}, {b:+.1f}] | {row.plan} | {row.model} |"
    )


def main() -> None:
    """Parse the command line, measure, print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--store", type=Path, default=Path(os.environ.get("FQDIFF_STORE", "fqdiff-store")))
    parser.add_argument("--loss", required=True, help="Fisher table of the loss, with single weights")
    parser.add_argument("--runs", required=True, help="Fisher table of sampler runs")
    parser.add_argument("--budgets", default="1.5,2,2.5,3,4")
    parser.add_argument("--strategies", default="/".join(STRATEGIES), help="separated by slashes; empty for none")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps")
    parser.add_argument(
        "--output", type=Path, default=Path("budget.json"), help="keep rows here, and measure none twice"
    )
    options = parser.parse_args()

    store = Store(options.store)
    context = Context(torch.device(options.device))
    runner = Runner(store, context)
    manifest = store.resolve(options.checkpoint, ("checkpoint",))
    checkpoint: Checkpoint = runner.load(manifest)
    tables = {
        "loss": store.resolve(options.loss, ("fisher",)),
        "runs": store.resolve(options.runs, ("fisher",)),
    }
    given = manifest.input("dataset")
    assert given is not None
    found = store.find("dataset", given.id)
    assert found is not None
    dataset: Dataset = runner.load(found)
    network = runner.run(Step("classifier", {"dataset": found}, ClassifierConfig()))
    features: ClassifierWeights = runner.load(network)
    judge = Judge(checkpoint, dataset.reference, options.images, options.steps, context)
    parameters = sum(t.numel() for t in checkpoint.tensors.values())
    facts = {
        "checkpoint": manifest.id,
        "tables": {role: table.id for role, table in tables.items()},
        "dataset": found.id,
        "features": network.id,
        "images": options.images,
        "steps": options.steps,
    }
    rows: list[Row] = []
    if options.output.exists():
        kept = json.loads(options.output.read_text())
        if kept["facts"] != facts:
            raise SystemExit(f"{options.output} holds rows of other settings: {kept['facts']}")
        rows = [Row(**row) for row in kept["rows"]]

    def measured(budget: float | None, label: str, make: Callable[[], Made | None]) -> Row | None:
        for row in rows:
            if (row.budget, row.label) == (budget, label):
                return row
        made = make()
        if made is None:
            return None
        rows.append(judge.row(budget, label, made, dataset, features))
        options.output.write_text(json.dumps({"facts": facts, "rows": [vars(r) for r in rows]}))
        return rows[-1]

    print(f"{facts}\n\n" + "\n".join(HEAD))
    full = manifest.file("model.safetensors").bytes
    other = measured(None, "float32, other noise", lambda: Made("", manifest.id, full, checkpoint, seed=1))
    assert other is not None
    print(line(other, parameters, None), flush=True)
    for budget in (float(b) for b in options.budgets.split(",") if b):
        first = None
        for name in (s for s in options.strategies.split("/") if s):
            target = {"target_bpw": budget}
            row = measured(budget, name, lambda n=name, t=target: ours(runner, manifest, tables, t, n))
            if row is None:
                print(f"| {name}, {budget:g} | nothing fits |" + " |" * 8)
            else:
                first = first or row
                print(line(row, parameters, first), flush=True)


if __name__ == "__main__":
    main()
