"""How many steps block reconstruction needs: the noise error after schedules of different lengths.

    fqdiff import pretrained:mnist-small --name mnist-small
    python benchmarks/reconstruction.py mnist-small --iterations 125,250,500,1000,2000,5000,20000

Weights of one width, per channel by min-max; 20 timesteps of 256 runs of DDIM-50 to learn on, as ``fqdiff calibrate`` takes them.
Noise error: 1/2 |eps_q - eps|^2, summed over pixels, on 64 held-out images at each of 20 timesteps, mean over all timesteps, the
same inputs for all; "of the longest" is paired. What is in the store is not made again: long schedules can run beside each other,
and be printed together.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from noise_ratio import errors_and_ratios

from fqdiff.configs import CalibrateConfig, PlanConfig, QuantizeConfig, ReconstructConfig
from fqdiff.context import Context
from fqdiff.pipeline import Runner, Step
from fqdiff.store.manifest import Manifest
from fqdiff.store.store import Store

INPUTS = 64


def main() -> None:
    """Make what is missing, and print a line for each schedule."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--store", type=Path, default=Path(os.environ.get("FQDIFF_STORE", "fqdiff-store")))
    parser.add_argument("--low", default="int4")
    parser.add_argument(
        "--iterations", default="125,250,500,1000,2000,5000,20000", help="the last one is the reference"
    )
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    store, context = Store(options.store), Context(torch.device(options.device))
    runner = Runner(store, context, command="benchmarks/reconstruction.py")
    checkpoint = store.resolve(options.checkpoint, ("checkpoint",))
    calibration = runner.run(Step("calibrate", {"checkpoint": checkpoint}, CalibrateConfig()))
    plan = runner.run(Step("plan", {"checkpoint": checkpoint}, PlanConfig("uniform", low=options.low)))
    start = runner.run(Step("quantize", {"checkpoint": checkpoint, "plan": plan}, QuantizeConfig()))
    made: dict[int, Manifest] = {0: start}
    for iterations in (int(n) for n in options.iterations.split(",")):
        inputs = {"checkpoint": checkpoint, "model": start, "calibration": calibration}
        made[iterations] = runner.run(Step("reconstruct", inputs, ReconstructConfig(iterations=iterations)))

    named = {str(n): manifest for n, manifest in made.items()}
    lines = errors_and_ratios(runner, checkpoint, named, str(max(made)), INPUTS)
    print(f"checkpoint {checkpoint.id}, plan {plan.id}, calibration {calibration.id}, {options.device}\n")
    print("| steps of a block | noise error [95 %] | of the longest [95 %] | minutes | model |\n|---|---|---|---|---|")
    for steps, error, ratio in lines:
        manifest = named[steps]
        minutes = manifest.seconds / 60 if int(steps) else 0.0
        print(f"| {steps if int(steps) else 'none'} | {error} | {ratio} | {minutes:.1f} | {manifest.id} |")


if __name__ == "__main__":
    main()
