"""Plans for a byte budget against every control, on one model: bytes, noise error, image error.

    fqdiff import pretrained:mnist-small --name mnist-small
    fqdiff fisher mnist-small --kind true --timesteps 200 --granularity weight --bins 10 --name loss
    fqdiff fisher mnist-small --kind trajectory --samples 64 --granularity weight --bins 1 --name runs
    python benchmarks/budget.py mnist-small --loss loss --runs runs

Everything is counted in bits per weight: the size of the file, over the weights of the network. All models start from the same
noise. Noise error: 1/2 |eps_q - eps|^2, summed over pixels, mean over held-out inputs, and over timesteps, with a 95 % bootstrap
interval over inputs. Image error: squared difference of pixels in [-1, 1] to the full-precision model's image from the same
noise, with a 95 % bootstrap interval over images. Noise error over that of the first strategy of the same budget, and image
error less that one's, are paired, with intervals of their own.
"""

import argparse
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from torch import Tensor

from fqdiff.configs import RIVALS, ClassifierConfig, FidConfig, PlanConfig, QuantizeConfig, SampleConfig
from fqdiff.context import Context, MemoryParts
from fqdiff.errors import ConfigError
from fqdiff.evidence.features import to_unit_range
from fqdiff.evidence.resampling import draw_counts, mean_draws, widened
from fqdiff.pipeline import Runner, Step
from fqdiff.rng import generator
from fqdiff.sensitivity.inputs import Inputs, draw_inputs, graded_timesteps
from fqdiff.sensitivity.measure import outputs
from fqdiff.stages.fid import fid
from fqdiff.stages.plan import plan
from fqdiff.stages.sample import sample
from fqdiff.store.manifest import Manifest
from fqdiff.store.store import Store
from fqdiff.values import Checkpoint, ClassifierWeights, Dataset, FisherTable, SampleSet

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
    "trajectory, refined": ("runs", {"score": "trajectory", "refine": 8, **FREE}),
    "fisher by sampler": ("loss", {"score": "fisher", "timestep_weights": "sampler", **FREE}),
    "fisher": ("loss", {"score": "fisher", **FREE}),
    "fisher, one format a tensor": ("loss", {"score": "fisher", **WHOLE}),
    "fisher, gram": ("loss", {"score": "fisher", "predictor": "gram", **WHOLE}),
    "fisher, refined": ("loss", {"score": "fisher", "refine": 8, **FREE}),
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
LADDER = ("int8", "int6", "int5", "int4", "int3", "int2")
RULE: dict[str, Any] = {"strategy": "threshold", "at": "mean", "ladder": LADDER, "ladder_step": 4.0, "scale": "float16"}
LADDERS = "ladder"  # a rule, its first threshold the least that fits
DISTILLED, LONGER = ", distilled", ", distilled longer"  # kept elements cannot be
STEPS = {LONGER: 4000, DISTILLED: 1000}
STRATEGIES = [
    *SCORES,
    LADDERS,
    *(f"{name}{DISTILLED}" for name in SCORES if "elements" not in name),
    f"trajectory{LONGER}",
]


@dataclass(frozen=True)
class Made:
    """A model with the ids of its plan and of itself; ``other_noise``: than all others' images are made of."""

    plan: str
    model: str
    file_bytes: int
    value: Any
    other_noise: bool = False


@dataclass(frozen=True)
class Row:
    """One model of the table. ``noise_draws``: the noise error of each resample, the same ones for all models.

    ``errors``: of each image; ``fid``: digits, of them all, and its difference to full precision's.
    """

    budget: float | None
    label: str
    plan: str
    model: str
    file_bytes: int
    noise_error: float
    noise_draws: list[float]
    errors: list[float]
    mean_shift: float
    fid: float
    fid_difference: float
    fid_interval: tuple[float, float]


class Judge:
    """Compares networks with the full-precision one on the same inputs and from the same noise."""

    def __init__(
        self, checkpoint: Checkpoint, held_out: Tensor, images: int, steps: int, context: Context, seed: int = 0
    ) -> None:
        self.checkpoint, self.steps, self.images, self.context, self.seed = checkpoint, steps, images, context, seed
        timesteps, self.weights = graded_timesteps(checkpoint.spec.noise_schedule().num_train_timesteps, TIMESTEPS)
        self.inputs: Inputs = draw_inputs(held_out, checkpoint.spec, timesteps, self.weights, SAMPLES, 0, "budget")
        self.reference = self.outputs(checkpoint)
        draws = [generator(0, "budget noise error", t) for t in timesteps.tolist()]
        self.counts = [draw_counts(SAMPLES, RESAMPLES, draw) for draw in draws]

    def alone(self) -> Context:
        """The context with partial results of its own: those of one model are not another's."""
        return replace(self.context, parts=MemoryParts())

    def outputs(self, model: Any) -> Tensor:
        """What ``model`` predicts for the held-out inputs, float64."""
        return outputs(model.network().to(self.context.device), self.inputs, self.context.device)

    @cached_property
    def baseline_samples(self) -> SampleSet:
        """What all others are compared with."""
        return self.samples(self.checkpoint, self.seed)

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

    def noise(self, model: Any) -> tuple[float, Tensor]:
        """1/2 |eps_q - eps|^2, summed over pixels, mean over held-out inputs and timesteps; and its draws, float64 [RESAMPLES].

        Each resample draws inputs anew at every timestep.
        """
        errors = 0.5 * (self.outputs(model) - self.reference).square().flatten(1).sum(dim=1).view(-1, SAMPLES)
        drawn = torch.stack([mean_draws(row, n) for row, n in zip(errors, self.counts, strict=True)], dim=1)
        means = errors.mean(dim=1)
        return float(means @ self.weights), widened(drawn, means, SAMPLES) @ self.weights

    def noise_error(self, model: Any) -> float:
        """:meth:`noise` without draws."""
        return self.noise(model)[0]

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
        samples = self.samples(made.value, self.seed + made.other_noise)
        images = to_unit_range(samples.images).double()
        noise_error, draws = self.noise(made.value)
        return Row(
            budget,
            label,
            made.plan,
            made.model,
            made.file_bytes,
            noise_error,
            draws.tolist(),
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


def ladder(checkpoint: Checkpoint, table: FisherTable, target_bytes: int, context: Context) -> PlanConfig | None:
    """The rule with the least first threshold whose file fits, to a thousandth; None where no threshold's does.

    A bit less is four times the squared error, so that thresholds are that far apart.
    """

    def at(exponent: float) -> PlanConfig:
        return PlanConfig(threshold=10.0**exponent, **RULE)

    def fits(exponent: float) -> bool:
        return plan(checkpoint, table, None, at(exponent), 0, context).file_bytes <= target_bytes

    low, high = -30.0, 20.0  # all in the widest format, all but stem and head in the narrowest
    if not fits(high):
        return None
    while high - low > 4e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return at(high)


def settings_for(target: dict[str, Any], settings: dict[str, Any]) -> PlanConfig:
    """The settings of a plan for ``target``, such as target_bpw=2.5."""
    if "formats" not in settings and target.get("target_bpw", TINY_BELOW) < TINY_BELOW:
        settings = {**settings, "formats": TINY}
    return PlanConfig("budget", **target, **settings)


def ours(
    runner: Runner, checkpoint: Manifest, tables: dict[str, Manifest], target: dict[str, Any], name: str
) -> Made | None:
    """The model of one strategy for ``target``; None where nothing fits."""
    suffix = next((one for one in STEPS if name.endswith(one)), "")
    strategy = name.removesuffix(suffix)
    role, settings = SCORES.get(strategy, ("loss", RULE))
    table = tables[role]
    if strategy == LADDERS:
        model = runner.load(checkpoint)
        parameters = sum(t.numel() for t in model.tensors.values())
        size = target.get("target_bytes") or math.floor(target["target_bpw"] * parameters / 8)
        config = ladder(model, runner.load(table), size, runner.context)
    else:
        config = settings_for(target, settings)
    if config is None:
        return None
    inputs = {"checkpoint": checkpoint, "fisher": table}
    if config.score in RIVALS or config.is_measured:
        given = table.input("dataset")
        assert given is not None
        dataset = runner.store.find("dataset", given.id)
        assert dataset is not None
        inputs["dataset"] = dataset
    try:
        made_plan = runner.run(Step("plan", inputs, config))
    except ConfigError:
        return None
    inputs = {"checkpoint": checkpoint, "plan": made_plan}
    if table.recipe.config["granularity"] == "weight" and strategy != LADDERS:
        inputs["fisher"] = table
    made = runner.run(Step("quantize", inputs, QuantizeConfig(distill=STEPS.get(suffix, 0))))
    return Made(made_plan.id, made.id, made.file("model.safetensors").bytes, runner.load(made))


HEAD = (
    "| model | bits | bytes | noise error [95 %] | times the first's [95 %] | image error [95 %] | above the first's [95 %]"
    " | shift | FID digits | plan | model |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
)


def ends(values: Tensor) -> str:
    """The middle 95 % of ``values``."""
    low, high = np.quantile(values.numpy(), (0.025, 0.975))
    return f"[{low:.3g}, {high:.3g}]"


def line(row: Row, parameters: int, first: Row | None) -> str:
    """``row`` as one line of the table; ``first``: of the same budget."""
    errors = torch.tensor(row.errors, dtype=torch.float64)
    mean, low, high = mean_and_interval(errors)
    draws, times, above = torch.tensor(row.noise_draws, dtype=torch.float64), "", ""
    if first is not None and first is not row:
        ratios = draws / torch.tensor(first.noise_draws, dtype=torch.float64)
        times = f"{row.noise_error / first.noise_error:.3g} {ends(ratios)}"
        more = errors - torch.tensor(first.errors, dtype=torch.float64)
        above = "{:+.4f} [{:+.4f}, {:+.4f}]".format(*mean_and_interval(more))
    a, b = row.fid_interval
    name = row.label if row.budget is None else f"{row.label}, {row.budget:g}"
    return (
        f"| {name} | {8 * row.file_bytes / parameters:.3f} | {row.file_bytes:,} | {row.noise_error:.3g} {ends(draws)} | {times}"
        f" | {mean:.5f} [{low:.5f}, {high:.5f}] | {above} | {row.mean_shift:+.3f}"
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
    parser.add_argument("--seed", type=int, default=0, help="of the noise that images are made of")
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
    judge = Judge(checkpoint, dataset.reference, options.images, options.steps, context, options.seed)
    parameters = sum(t.numel() for t in checkpoint.tensors.values())
    facts = {
        "checkpoint": manifest.id,
        "tables": {role: table.id for role, table in tables.items()},
        "dataset": found.id,
        "features": network.id,
        "images": options.images,
        "steps": options.steps,
        "seed": options.seed,
        "resamples": RESAMPLES,
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
    other = measured(None, "float32, other noise", lambda: Made("", manifest.id, full, checkpoint, other_noise=True))
    assert other is not None
    print(line(other, parameters, None), flush=True)
    for budget in (float(b) for b in options.budgets.split(",") if b):
        first = None
        for name in (s for s in options.strategies.split("/") if s):
            target = {"target_bpw": budget}
            row = measured(budget, name, lambda n=name, t=target: ours(runner, manifest, tables, t, n))
            if row is None:
                print(f"| {name}, {budget:g} | nothing fits |" + " |" * 9)
            else:
                first = first or row
                print(line(row, parameters, first), flush=True)


if __name__ == "__main__":
    main()
