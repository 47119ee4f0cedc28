"""What bias correction brings: models of the same plan with none, static and by timestep, against full precision.

    fqdiff import pretrained:mnist-small --name mnist-small
    fqdiff fisher mnist-small --kind trajectory --samples 64 --granularity weight --bins 1 --name runs
    fqdiff plan mnist-small --uniform int4 --name int4      # likewise int3 and int2
    fqdiff plan runs --target-bpw 3 --name budget3          # likewise 2.5
    python benchmarks/bias_correction.py int4 int3 int2 budget3 budget2.5 --images 128

Names are those of plans in the store; budgets' plans were fitted to single weights. The noise error is 1/2 mean
|eps_q - eps|^2, summed over pixels, on held-out images at 20 timesteps (5 each), averaged over all timesteps; the
noise shift is the root of the mean square, over timesteps, of the mean of eps_q - eps. The image error is the mean
squared difference between pixels (in [-1, 1]) of final images of DDIM-25 from the same noise, with the standard error
of its paired difference to no correction; the image shift is the mean difference.
"""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor

from fqdiff.configs import BIAS_CORRECTIONS, QuantizeConfig
from fqdiff.context import Context
from fqdiff.pipeline import Runner, Step
from fqdiff.sensitivity.inputs import draw_inputs, graded_timesteps
from fqdiff.sensitivity.measure import final_images, outputs, residual, rises
from fqdiff.store.manifest import Manifest
from fqdiff.store.store import Store
from fqdiff.values import Model

STEPS, SAMPLES, TIMESTEPS = 25, 5, 20
COLUMNS = ("plan", "correction", "file bytes", "noise error", "noise shift", "image error", "change", "image shift")


class Bench:
    """A full-precision model with held-out inputs and final images, to hold others against."""

    def __init__(self, runner: Runner, checkpoint: Manifest, images: int, seed: int) -> None:
        dataset = runner.store.find("dataset", next(i.id for i in checkpoint.recipe.inputs if i.role == "dataset"))
        assert dataset is not None
        self.images, self.seed, self.device = images, seed, runner.context.device
        model = runner.load(checkpoint)
        total = model.spec.noise_schedule().num_train_timesteps
        timesteps, self.weights = graded_timesteps(total, TIMESTEPS)
        held_out = runner.load(dataset).reference
        self.inputs = draw_inputs(held_out, model.spec, timesteps, self.weights, SAMPLES, seed, "bias benchmark")
        self.outputs, self.final = self._run(model)
        self.residual = residual(self.inputs, self.outputs)

    def _run(self, model: Model) -> tuple[Tensor, Tensor]:
        network = model.network().to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        final = final_images(network, model.spec, self.images, STEPS, self.seed, self.device)
        return outputs(network, self.inputs, self.device), final

    def measure(self, model: Model) -> tuple[float, float, Tensor, float]:
        """Noise error, noise shift, squared error of each image, image shift."""
        found, final = self._run(model)
        error, _, shift = rises(found - self.outputs, self.residual, SAMPLES)
        change = final - self.final
        squares = change.square().mean(dim=(1, 2, 3))
        return float(error @ self.weights), float(shift.square() @ self.weights) ** 0.5, squares, float(change.mean())


def rows(runner: Runner, plans: list[str], images: int, seed: int) -> Iterator[list[str]]:
    """One line of the table after the other."""
    benches: dict[str, Bench] = {}
    for name in plans:
        plan = runner.store.resolve(name, ("plan",))
        found = plan.input("checkpoint")
        checkpoint = runner.store.find("checkpoint", found.id) if found else None
        assert checkpoint is not None, f"the checkpoint of {name} is gone"
        bench = benches.get(checkpoint.id) or Bench(runner, checkpoint, images, seed)
        benches[checkpoint.id] = bench
        plain = torch.zeros(images)
        given = plan.input("fisher")
        table = None if given is None else runner.store.find("fisher", given.id)
        fitted = {} if table is None else {"fisher": table}
        for correction in BIAS_CORRECTIONS:
            config = QuantizeConfig(correction)
            made = runner.run(Step("quantize", {"checkpoint": checkpoint, "plan": plan, **fitted}, config))
            error, shift, squares, image_shift = bench.measure(runner.load(made))
            plain = squares if correction == "none" else plain
            change = squares - plain
            yield [
                name,
                correction,
                f"{made.file('model.safetensors').bytes:,}",
                f"{error:.4g}",
                f"{shift:.4f}",
                f"{float(squares.mean()):.5f}",
                f"{float(change.mean()):+.5f} ± {float(change.std()) / images**0.5:.5f}",
                f"{image_shift:+.4f}",
            ]


def main() -> None:
    """Print the table as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", nargs="+")
    parser.add_argument("--store", type=Path, default=Path(os.environ.get("FQDIFF_STORE", "fqdiff-store")))
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS), flush=True)
    runner = Runner(Store(arguments.store), Context(torch.device(arguments.device)))
    for row in rows(runner, arguments.plans, arguments.images, arguments.seed):
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
