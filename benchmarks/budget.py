"""Plans for a byte budget against every control, on one model: bytes, noise error, image error.

    fqdiff import pretrained:mnist-small --name mnist-small
    fqdiff fisher mnist-small --kind true --timesteps 100 --granularity weight --name loss
    fqdiff fisher mnist-small --kind trajectory --samples 64 --name runs
    python benchmarks/budget.py mnist-small --loss loss --runs runs --budgets 2,2.5,3,4 --images 128

Everything is counted in bits per weight: the size of the file, over the weights of the network. All models start from the same
noise. Noise error: 1/2 |eps_q - eps|^2, summed over pixels, mean over held-out inputs, and over timesteps. Image error: squared
difference of pixels in [-1, 1] to the full-precision model's image from the same noise, with a 95 % bootstrap interval over
images.
"""

import argparse
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor

from fqdiff.configs import PlanConfig, QuantizeConfig, SampleConfig
from fqdiff.context import Context
from fqdiff.errors import ConfigError
from fqdiff.evidence.features import to_unit_range
from fqdiff.pipeline import Runner, Step
from fqdiff.rng import generator
from fqdiff.sensitivity.inputs import Inputs, draw_inputs, graded_timesteps
from fqdiff.sensitivity.measure import outputs, residual, rises
from fqdiff.stages.sample import sample
from fqdiff.store.manifest import Manifest
from fqdiff.store.store import Store
from fqdiff.values import Checkpoint, SampleSet

CPU = torch.device("cpu")
TIMESTEPS, SAMPLES = 20, 5  # held-out inputs of the noise error
RESAMPLES = 1000
GRAINS = "tensor,channel,group-near:64"
INTEGERS = ("float32", "float16", "int8", "int6", "int5", "int4", "int3", "int2", "ternary")
# name -> (which table, settings)
STRATEGIES: dict[str, tuple[str, dict[str, Any]]] = {
    "fisher": ("loss", {"score": "fisher", "granularity": GRAINS, "scale": "float16"}),
    "trajectory": ("runs", {"score": "trajectory", "granularity": GRAINS, "scale": "float16"}),
    "fisher, no codebooks": (
        "loss",
        {"score": "fisher", "granularity": GRAINS, "scale": "float16", "formats": INTEGERS},
    ),
    "fisher, int by channel": (
        "loss",
        {"score": "fisher", "scale": "float16", "formats": INTEGERS, "ranges": ("min-max",)},
    ),
    "weight error": ("loss", {"score": "weight-mse", "granularity": GRAINS, "scale": "float16"}),
    "random": ("loss", {"score": "random", "granularity": GRAINS, "scale": "float16"}),
    "reverse": ("loss", {"score": "reverse", "granularity": GRAINS, "scale": "float16"}),
    "uniform": ("loss", {"score": "uniform", "scale": "float16", "formats": INTEGERS}),
}


@dataclass(frozen=True)
class Row:
    """One model of the table; ``source``: the id of its plan, or of the checkpoint."""

    budget: float | None
    label: str
    source: str
    file_bytes: int
    noise_error: float
    image_error: float
    interval: tuple[float, float]
    mean_shift: float


class Judge:
    """Compares networks with the full-precision one on the same inputs and from the same noise."""

    def __init__(self, checkpoint: Checkpoint, held_out: Tensor, images: int, steps: int) -> None:
        self.checkpoint, self.steps, self.images = checkpoint, steps, images
        timesteps, self.weights = graded_timesteps(checkpoint.spec.noise_schedule().num_train_timesteps, TIMESTEPS)
        self.inputs: Inputs = draw_inputs(held_out, checkpoint.spec, timesteps, self.weights, SAMPLES, 0, "budget")
        network = checkpoint.network()
        self.reference = outputs(network, self.inputs, CPU)
        self.residual = residual(self.inputs, self.reference)

    @cached_property
    def baseline(self) -> Tensor:
        """The full-precision model's images, which all others are compared with."""
        return self.sampled(self.checkpoint, 0)

    def sampled(self, model: Any, seed: int) -> Tensor:
        """Images in [-1, 1] from the noise of ``seed``."""
        made: SampleSet = sample(model, SampleConfig(steps=self.steps, count=self.images), seed, Context())
        return to_unit_range(made.images).double()

    def noise_error(self, model: Any) -> float:
        """1/2 |eps_q - eps|^2, summed over pixels, mean over held-out inputs and timesteps."""
        delta = outputs(model.network(), self.inputs, CPU) - self.reference
        error, _, _ = rises(delta, self.residual, SAMPLES)
        return float((error * self.weights).sum())

    def image_errors(self, images: Tensor) -> Tensor:
        """Mean squared difference of each of ``images`` to the full-precision one of the same noise, float64 [N]."""
        return (images - self.baseline).square().flatten(1).mean(dim=1)

    def row(self, budget: float | None, label: str, source: str, file_bytes: int, model: Any, seed: int = 0) -> Row:
        """Everything measured of ``model``."""
        images = self.sampled(model, seed)
        each = self.image_errors(images)
        draw = generator(0, "budget bootstrap")
        means = each[torch.randint(len(each), (RESAMPLES, len(each)), generator=draw)].mean(dim=1)
        low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        shift = float((images - self.baseline).mean())
        return Row(
            budget,
            label,
            source,
            file_bytes,
            self.noise_error(model),
            float(each.mean()),
            (low, high),
            shift,
        )


def ours(
    runner: Runner, checkpoint: Manifest, tables: dict[str, Manifest], target: dict[str, Any], name: str
) -> tuple[str, int, Any] | None:
    """Plan id, file size and model of one strategy for ``target``, such as target_bpw=2.5; None where nothing fits."""
    table, settings = STRATEGIES[name]
    config = PlanConfig("budget", **target, **settings)
    step = Step("plan", {"checkpoint": checkpoint, "fisher": tables[table]}, config)
    try:
        plan = runner.run(step)
    except ConfigError:
        return None
    inputs = {"checkpoint": checkpoint, "plan": plan}
    if tables[table].recipe.config["granularity"] == "weight":
        inputs["fisher"] = tables[table]
    made = runner.run(Step("quantize", inputs, QuantizeConfig()))
    return plan.id, made.file("model.safetensors").bytes, runner.load(made)


def line(row: Row, parameters: int) -> str:
    """``row`` as one line of the table."""
    bits = 8 * row.file_bytes / parameters
    low, high = row.interval
    return (
        f"{row.label:30} {bits:6.3f} {row.file_bytes:10,} {row.noise_error:11.4g}"
        f" {row.image_error:9.5f} [{low:.5f}, {high:.5f}] {row.mean_shift:+8.4f}  {row.source}"
    )


def main() -> None:
    """Parse the command line, measure, print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--store", type=Path, default=Path(os.environ.get("FQDIFF_STORE", "fqdiff-store")))
    parser.add_argument("--loss", required=True, help="Fisher table of the loss, with single weights")
    parser.add_argument("--runs", required=True, help="Fisher table of sampler runs")
    parser.add_argument("--budgets", default="2,2.5,3,4")
    parser.add_argument("--strategies", default="/".join(STRATEGIES), help="separated by slashes; empty for none")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--output", type=Path, help="also write the rows here, as JSON")
    options = parser.parse_args()

    store = Store(options.store)
    runner = Runner(store, Context())
    manifest = store.resolve(options.checkpoint, ("checkpoint",))
    checkpoint: Checkpoint = runner.load(manifest)
    tables = {
        "loss": store.resolve(options.loss, ("fisher",)),
        "runs": store.resolve(options.runs, ("fisher",)),
    }
    given = manifest.input("dataset")
    assert given is not None
    dataset = store.find("dataset", given.id)
    assert dataset is not None
    judge = Judge(checkpoint, runner.load(dataset).reference, options.images, options.steps)
    parameters = sum(t.numel() for t in checkpoint.tensors.values())
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        print(line(row, parameters), flush=True)
        if options.output is not None:
            options.output.write_text(json.dumps([vars(r) for r in rows], indent=1))

    print(f"checkpoint {manifest.id}, tables {tables['loss'].id} and {tables['runs'].id}, data set {dataset.id}")
    print(f"{options.images} images, DDIM-{options.steps}, seed 0")
    print(f"{'model':30} {'bits':>6} {'bytes':>10} {'noise error':>11} {'image error [95 %]':>30} {'mean':>8}  source")
    full = manifest.file("model.safetensors").bytes
    add(judge.row(None, "float32, other noise", manifest.id, full, checkpoint, seed=1))
    for budget in (float(b) for b in options.budgets.split(",") if b):
        for name in (s for s in options.strategies.split("/") if s):
            made = ours(runner, manifest, tables, {"target_bpw": budget}, name)
            if made is None:
                print(f"{name:30} nothing fits {budget:g} bits per weight")
            else:
                add(judge.row(budget, f"{name}, {budget:g}", *made))


if __name__ == "__main__":
    main()
