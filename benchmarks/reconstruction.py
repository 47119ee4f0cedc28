"""How many steps block reconstruction needs: the noise error after schedules of different lengths.

    fqdiff import pretrained:mnist-small --name mnist-small
    python benchmarks/reconstruction.py mnist-small --iterations 125,250,500,1000,20000
    python benchmarks/reconstruction.py mnist-small --iterations 250,500,1000 --seeds 0,1,2     # what chance does

Weights of one width, per channel by min-max; 20 timesteps of 256 runs of DDIM-50 to learn on, as ``fqdiff calibrate`` takes them.
Noise error: 1/2 |eps_q - eps|^2, summed over pixels, on 64 held-out images at each of 20 timesteps, mean over all timesteps, the
same inputs for all; "of the longest", of the first seed, is paired. Seeds are of the inputs that each step draws. What is in the
store is not made again: long schedules can run beside each other, and be printed together.
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
        "--iterations", default="125,250,500,1000,20000", help="the longest, by the first seed, is the reference"
    )
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    store, context = Store(options.store), Context(torch.device(options.device))
    runner = Runner(store, context, command="benchmarks/reconstruction.py")
    checkpoint = store.resolve(options.checkpoint, ("checkpoint",))
    calibration = runner.run(Step("calibrate", {"checkpoint": checkpoint}, CalibrateConfig()))
    plan = runner.run(Step("plan", {"checkpoint": checkpoint}, PlanConfig("uniform", low=options.low)))
    start = runner.run(Step("quantize", {"checkpoint": checkpoint, "plan": plan}, QuantizeConfig()))
    inputs = {"checkpoint": checkpoint, "model": start, "calibration": calibration}
    schedules = [int(n) for n in options.iterations.split(",")]
    made: dict[str, tuple[int, int, Manifest]] = {"none": (0, 0, start)}
    for seed in (int(n) for n in options.seeds.split(",")):
        for iterations in schedules:
            found = runner.run(Step("reconstruct", inputs, ReconstructConfig(iterations=iterations), seed))
            made[f"{iterations}, seed {seed}"] = iterations, seed, found
    longest = max(made, key=lambda name: made[name][0])

    models = {name: manifest for name, (_, _, manifest) in made.items()}
    lines = errors_and_ratios(runner, checkpoint, models, longest, INPUTS)
    print(f"checkpoint {checkpoint.id}, plan {plan.id}, calibration {calibration.id}, {options.device}\n")
    print("| steps of a block | seed | noise error [95 %] | of the longest [95 %] | minutes | model |")
    print("|---|---|---|---|---|---|")
    for name, error, ratio in lines:
        steps, seed, manifest = made[name]
        print(f"| {steps or 'none'} | {seed} | {error} | {ratio} | {manifest.seconds / 60:.1f} | {manifest.id} |")


if __name__ == "__main__":
    main()
