"""Noise errors of models over that of the first, on the same inputs: what one change does, with a paired interval.

    python benchmarks/noise_ratio.py MODEL MODEL...        # quantized models of one checkpoint

Noise error: 1/2 |eps_q - eps|^2, summed over pixels, on held-out images at each of 20 timesteps, mean over all timesteps.
"""

import argparse
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

from fqdiff.configs import CompareConfig
from fqdiff.context import Context
from fqdiff.pipeline import Runner
from fqdiff.sensitivity.curves import noise_error
from fqdiff.sensitivity.ledger import Ledger
from fqdiff.store.manifest import Manifest
from fqdiff.store.store import Store
from fqdiff.values import Model

INPUTS = 32  # at each timestep, as many as a comparison takes


def source(runner: Runner, manifest: Manifest, kind: str) -> Manifest:
    """What of ``kind`` ``manifest`` was made from."""
    given = manifest.input(kind)
    found = runner.store.find(kind, given.id) if given is not None else None
    assert found is not None, f"the {kind} of {manifest.id} is gone"
    return found


def errors_and_ratios(
    runner: Runner, checkpoint: Manifest, models: Mapping[str, Manifest], over: str, inputs: int
) -> Iterator[tuple[str, str, str]]:
    """Name, noise error [95 %] and its ratio [95 %] to that of the model called ``over``.

    Resample b draws the same inputs for all.
    """
    held_out = runner.load(source(runner, checkpoint, "dataset")).reference
    values: dict[str, Model] = {name: runner.load(manifest) for name, manifest in models.items()}
    config = CompareConfig(error_inputs=inputs)
    with runner.context.soft_stop() as stop_requested:
        ledger = Ledger(runner.context, stop_requested)
        curves, means = noise_error(runner.load(checkpoint), values, held_out, config, 0, runner.context, ledger)
    base = means[over]
    for curve in curves:
        low, high = np.quantile((means[curve.of].draws / base.draws).numpy(), (0.025, 0.975))
        ratio = f"{curve.mean / base.value:.3f} [{low:.3f}, {high:.3f}]"
        yield curve.of, f"{curve.mean:.4g} [{curve.low:.4g}, {curve.high:.4g}]", ratio


def main() -> None:
    """Print a line for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="names or ids; the first is what the others are held against")
    parser.add_argument("--store", type=Path, default=Path(os.environ.get("FQDIFF_STORE", "fqdiff-store")))
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    runner = Runner(Store(options.store), Context(torch.device(options.device)))
    models = {name: runner.store.resolve(name, ("quantized",)) for name in options.models}
    checkpoint = source(runner, models[options.models[0]], "checkpoint")
    print("| model | noise error [95 %] | of the first [95 %] |\n|---|---|---|")
    for cells in errors_and_ratios(runner, checkpoint, models, options.models[0], INPUTS):
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
