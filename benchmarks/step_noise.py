"""What PTQD's parts bring where a sampler draws noise of its own: slope and bias undone, and residual variance absorbed.

    fqdiff import pretrained:mnist-small --name mnist-small
    python benchmarks/step_noise.py mnist-small --images 1000

Weights per channel by min-max, activations in full precision; the correction by intervals of timesteps from 256 runs of DDIM-50,
as ``fqdiff quantize --method ptqd`` makes it. With eta 0 nothing is drawn that could absorb the variance, so that its part does
nothing there. Image error: mean squared difference of pixels in [-1, 1] to full precision's image of the same initial and step
noise, with a 95 % bootstrap interval; *above as rounded* is the paired difference to the first row of the same width and eta.
FID: digits, and its difference to full precision's own of the same noise, with a paired 95 % interval.
"""

import argparse
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from budget import mean_and_interval
from torch import Tensor

from fqdiff.configs import (
    CalibrateConfig,
    ClassifierConfig,
    FidConfig,
    NoiseCorrectionConfig,
    PlanConfig,
    QuantizeConfig,
    SampleConfig,
)
from fqdiff.context import Context, MemoryParts
from fqdiff.evidence.features import to_unit_range
from fqdiff.pipeline import Runner, Step
from fqdiff.stages.fid import fid
from fqdiff.stages.sample import sample
from fqdiff.store.manifest import Manifest
from fqdiff.store.store import Store
from fqdiff.values import Model, QuantizedCheckpoint, SampleSet

COLUMNS = (
    "weights",
    "eta",
    "corrected",
    "image error [95 %]",
    "above as rounded [95 %]",
    "mean shift",
    "FID digits",
    "model",
)


def without_variance(model: QuantizedCheckpoint) -> QuantizedCheckpoint:
    """``model``, of whose correction the sampler is told no variance."""
    correction = model.noise_correction
    assert correction is not None
    return replace(model, noise_correction=replace(correction, variance=torch.zeros_like(correction.variance)))


def models(runner: Runner, checkpoint: Manifest, low: str) -> Iterator[tuple[str, QuantizedCheckpoint, str]]:
    """What is corrected, the model, and the id of what is stored of it."""
    plan = runner.run(Step("plan", {"checkpoint": checkpoint}, PlanConfig("uniform", low=low)))
    rounded = runner.run(Step("quantize", {"checkpoint": checkpoint, "plan": plan}, QuantizeConfig()))
    calibration = runner.run(Step("calibrate", {"checkpoint": checkpoint}, CalibrateConfig()))
    inputs = {"checkpoint": checkpoint, "model": rounded, "calibration": calibration}
    corrected = runner.run(Step("noise-correction", inputs, NoiseCorrectionConfig()))
    yield "nothing", runner.load(rounded), rounded.id
    yield "slope and bias", without_variance(runner.load(corrected)), f"{corrected.id} less its variance"
    yield "slope, bias and variance", runner.load(corrected), corrected.id


def main() -> None:
    """Print the table as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--store", type=Path, default=Path(os.environ.get("FQDIFF_STORE", "fqdiff-store")))
    parser.add_argument("--weights", default="int8,int4,int3")
    parser.add_argument("--etas", default="0,1")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    runner = Runner(Store(options.store), Context(torch.device(options.device)))
    checkpoint = runner.store.resolve(options.checkpoint, ("checkpoint",))
    given = checkpoint.input("dataset")
    found = runner.store.find("dataset", given.id) if given else None
    assert found is not None, f"the data set of {checkpoint.id} is gone"
    network = runner.run(Step("classifier", {"dataset": found}, ClassifierConfig()))
    dataset, features, full = runner.load(found), runner.load(network), runner.load(checkpoint)

    def drawn(model: Model, eta: float) -> SampleSet:
        context = replace(runner.context, parts=MemoryParts())
        return sample(model, SampleConfig("ddim", options.steps, eta, options.images), 0, context)

    what = f"checkpoint {checkpoint.id}, data set {found.id}, features {network.id}"
    print(f"{what}, {options.images} images of DDIM-{options.steps}\n")
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS), flush=True)
    for eta in (float(eta) for eta in options.etas.split(",")):
        base = drawn(full, eta)
        exact = to_unit_range(base.images).double()
        for low in options.weights.split(","):
            first: Tensor | None = None
            for corrected, model, named in models(runner, checkpoint, low):
                samples = drawn(model, eta)
                images = to_unit_range(samples.images).double()
                errors = (images - exact).square().flatten(1).mean(dim=1)
                context = replace(runner.context, parts=MemoryParts())
                of = fid(samples, dataset, features, base, FidConfig(), 0, context)
                assert of.difference is not None
                assert of.interval is not None
                above = "" if first is None else "{:+.2e} [{:+.2e}, {:+.2e}]".format(*mean_and_interval(errors - first))
                first = errors if first is None else first
                cells = (
                    low,
                    f"{eta:g}",
                    corrected,
                    "{:.2e} [{:.2e}, {:.2e}]".format(*mean_and_interval(errors)),
                    above,
                    f"{float((images - exact).mean()):+.4f}",
                    "{:.1f}, {:+.2f} [{:+.2f}, {:+.2f}]".format(of.fid, of.difference, *of.interval),
                    named,
                )
                print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
