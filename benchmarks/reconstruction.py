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

import numpy as np
import torch

from fqdiff.configs import CalibrateConfig, CompareConfig, PlanConfig, QuantizeConfig, ReconstructConfig
from fqdiff.context import Context
from fqdiff.pipeline import Runner, Step
from fqdiff.sensitivity.curves import noise_error
from fqdiff.sensitivity.ledger import Ledger
from fqdiff.store.manifest import Manifest
from fqdiff.store.store import Store
from fqdiff.values import Model

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
    given = checkpoint.input("dataset")
    assert given is not None
    dataset = store.find("dataset", given.id)
    assert dataset is not None
    calibration = runner.run(Step("calibrate", {"checkpoint": checkpoint}, CalibrateConfig()))
    plan = runner.run(Step("plan", {"checkpoint": checkpoint}, PlanConfig("uniform", low=options.low)))
    start = runner.run(Step("quantize", {"checkpoint": checkpoint, "plan": plan}, QuantizeConfig()))
    made: dict[int, Manifest] = {0: start}
    for iterations in (int(n) for n in options.iterations.split(",")):
        inputs = {"checkpoint": checkpoint, "model": start, "calibration": calibration}
        made[iterations] = runner.run(Step("reconstruct", inputs, ReconstructConfig(iterations=iterations)))

    models: dict[str, Model] = {str(n): runner.load(manifest) for n, manifest in made.items()}
    config = CompareConfig(error_inputs=INPUTS)
    with context.soft_stop() as stop_requested:
        held_out, ledger = runner.load(dataset).reference, Ledger(context, stop_requested)
        found, means = noise_error(runner.load(checkpoint), models, held_out, config, 0, context, ledger)
    curves = {curve.of: curve for curve in found}
    last = means[str(max(made))]
    print(f"checkpoint {checkpoint.id}, plan {plan.id}, calibration {calibration.id}, {options.device}\n")
    print("| steps of a block | noise error [95 %] | of the longest [95 %] | minutes | model |\n|---|---|---|---|---|")
    for iterations, manifest in made.items():
        curve, minutes = curves[str(iterations)], manifest.seconds / 60 if iterations else 0.0
        interval = f"{curve.mean:.4g} [{curve.low:.4g}, {curve.high:.4g}]"
        paired = means[str(iterations)].draws / last.draws  # resample b drew the same inputs for all
        low, high = np.quantile(paired.numpy(), (0.025, 0.975))
        ratio = f"{curve.mean / last.value:.3f} [{low:.3f}, {high:.3f}]"
        print(f"| {iterations or 'none'} | {interval} | {ratio} | {minutes:.1f} | {manifest.id} |")


if __name__ == "__main__":
    main()
