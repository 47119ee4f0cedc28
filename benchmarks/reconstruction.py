"""How many steps block reconstruction needs: the noise error after schedules of different lengths.

    fqdiff import pretrained:mnist-small --name mnist-small
    python benchmarks/reconstruction.py mnist-small                                        # the curve; 20,000 steps take hours
    python benchmarks/reconstruction.py mnist-small --schedules 250,250+500 --seeds 0,1   # what chance does

A schedule is the steps of each block, + those of all blocks together that follow, none unless given. Weights of one width, per
channel by min-max; 20 timesteps of 256 runs of DDIM-50 to learn on, as ``fqdiff calibrate`` takes them. Noise error:
1/2 |eps_q - eps|^2, summed over pixels, on 64 held-out images at each of 20 timesteps, mean over all timesteps, the same inputs
for all; "of the longest", the one with most steps of a block, by the first seed, is paired. Seeds are of the inputs that each
step draws. What is in the store is not made again: long schedules can run beside each other, and be printed together.
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
    parser.add_argument("--schedules", default="125,250,500,1000,20000,250+250,250+500")
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
    made: dict[str, tuple[int, int, int, Manifest]] = {"none": (0, 0, 0, start)}
    for seed in (int(n) for n in options.seeds.split(",")):
        for schedule in options.schedules.split(","):
            blocks, together = (int(n) for n in (schedule if "+" in schedule else f"{schedule}+0").split("+"))
            config = ReconstructConfig(iterations=blocks, network_iterations=together)
            made[f"{schedule}, seed {seed}"] = (
                blocks,
                together,
                seed,
                runner.run(Step("reconstruct", inputs, config, seed)),
            )
    longest = max(made, key=lambda name: made[name][0])

    models = {name: found[-1] for name, found in made.items()}
    lines = errors_and_ratios(runner, checkpoint, models, longest, INPUTS)
    print(f"checkpoint {checkpoint.id}, plan {plan.id}, calibration {calibration.id}, {options.device}\n")
    print(
        "| steps of a block | of all together | seed | noise error [95 %] | of the longest [95 %] | minutes | model |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, error, ratio in lines:
        blocks, together, seed, manifest = made[name]
        minutes = f"{manifest.seconds / 60:.1f}"
        print(f"| {blocks or 'none'} | {together or 'none'} | {seed} | {error} | {ratio} | {minutes} | {manifest.id} |")


if __name__ == "__main__":
    main()
