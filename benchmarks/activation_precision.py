"""What int8 for some activations brings where the others are in int4: sites chosen by Fisher information, and by other orders.

    fqdiff import pretrained:mnist-small --name mnist-small
    fqdiff fisher mnist-small --timesteps 200 --samples 16 --name outputs
    python benchmarks/activation_precision.py outputs --images 256

Weights in int8, per channel by min-max; activations in scales of their own for 20 intervals of timesteps, of least squared
error, joined skips split, on the set that ``fqdiff calibrate`` takes. *fisher*: sites whose layers have the highest Fisher
information of outputs (``fqdiff plan --wide-activations int8``); *reverse*: the lowest; *random*: drawn with the seed. Noise
error: 1/2 |eps_q - eps|^2, summed over pixels, on held-out images at 20 timesteps (5 each), averaged over all timesteps. Image
error: mean squared difference of pixels (in [-1, 1]) to full precision's DDIM-20 images of the same noise, with a 95 % interval;
*above fisher*: the paired difference to the first order of the same share.
"""

import argparse
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor

from fqdiff.configs import ActivationConfig, CalibrateConfig, PlanConfig, QuantizeConfig
from fqdiff.context import Context
from fqdiff.models.registry import first_layer
from fqdiff.pipeline import Runner, Step
from fqdiff.planning.activations import site_scores
from fqdiff.quant.activation_sites import OUTPUT, activation_sites
from fqdiff.sensitivity.inputs import draw_inputs, graded_timesteps
from fqdiff.sensitivity.measure import final_images, outputs
from fqdiff.stages.activations import quantize_activations
from fqdiff.store.store import Store
from fqdiff.values import FisherTable, Model

STEPS, SAMPLES, TIMESTEPS, INTERVALS = 20, 5, 20, 20
COLUMNS = ("sites in int8", "chosen by", "noise error", "image error", "above fisher")


def orders(sites: Sequence[str], fisher: FisherTable, seed: int) -> dict[str, list[str]]:
    """The sites, those first that are to be wide first, by the name of the order."""
    scores = site_scores(list(sites), fisher)
    by_fisher = sorted(sites, key=lambda site: (-scores[site], site))
    shuffled = sorted(sites)
    random.Random(seed).shuffle(shuffled)
    return {"fisher": by_fisher, "reverse": by_fisher[::-1], "random": shuffled}


def between(values: Tensor, form: str) -> str:
    """Mean of ``values`` [N] with a normal 95 % interval."""
    mean, half = float(values.mean()), 1.96 * float(values.std()) / len(values) ** 0.5
    return f"{mean:{form}} [{mean - half:{form}}, {mean + half:{form}}]"


def rows(runner: Runner, table: str, shares: Sequence[float], images: int, seed: int) -> Iterator[list[str]]:
    """One line of the table after the other, what they rest on first."""
    fisher = runner.store.resolve(table, ("fisher",))
    given = fisher.input("checkpoint")
    checkpoint = runner.store.find("checkpoint", given.id) if given else None
    assert checkpoint is not None, f"the checkpoint of {table} is gone"
    used = checkpoint.input("dataset")
    dataset = runner.store.find("dataset", used.id) if used else None
    assert dataset is not None, f"the data set of {checkpoint.id} is gone"
    calibration = runner.run(Step("calibrate", {"checkpoint": checkpoint}, CalibrateConfig()))
    plan = runner.run(Step("plan", {"checkpoint": checkpoint}, PlanConfig("uniform", low="int8")))
    weights = runner.run(Step("quantize", {"checkpoint": checkpoint, "plan": plan}, QuantizeConfig()))
    print(f"checkpoint {checkpoint.id}, Fisher table {fisher.id}, calibration {calibration.id}, weights {weights.id}\n")
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS), flush=True)

    full, device = runner.load(checkpoint), runner.context.device
    timesteps, weights_of_t = graded_timesteps(full.spec.noise_schedule().num_train_timesteps, TIMESTEPS)
    held_out = runner.load(dataset).reference
    inputs = draw_inputs(held_out, full.spec, timesteps, weights_of_t, SAMPLES, seed, "activation benchmark")

    def run(model: Model) -> tuple[Tensor, Tensor]:
        network = model.network().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return outputs(network, inputs, device), final_images(network, full.spec, images, STEPS, seed, device)

    noise, final = run(full)
    sites = [s for s in activation_sites(full.network()) if s not in (first_layer(full.network()), OUTPUT)]
    chosen = orders(sites, runner.load(fisher), seed)
    config, start, recorded = (
        ActivationConfig("int4", intervals=INTERVALS),
        runner.load(weights),
        runner.load(calibration),
    )
    for share in shares:
        first: Tensor | None = None
        for name, order in chosen.items() if 0 < share < 1 else [("all" if share else "none", sites)]:
            wide = dict.fromkeys(order[: round(share * len(sites))], "int8")
            model = quantize_activations(full, start, recorded, config, seed, runner.context, wide)
            predicted, drawn = run(model)
            errors = (predicted - noise).flatten(1).square().sum(1).reshape(len(timesteps), SAMPLES).mean(1) / 2
            squares = (drawn - final).square().mean(dim=(1, 2, 3))
            above = "" if first is None else between(squares - first, "+.4f")
            first = squares if first is None else first
            yield [f"{len(wide)}", name, f"{float(errors @ weights_of_t):.4g}", between(squares, ".4f"), above]


def main() -> None:
    """Print the table as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fisher", help="a table with Fisher values of layer outputs")
    parser.add_argument("--store", type=Path, default=Path(os.environ.get("FQDIFF_STORE", "fqdiff-store")))
    parser.add_argument("--shares", default="0,0.125,0.25,0.5,1", help="of sites in int8")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    runner = Runner(Store(arguments.store), Context(torch.device(arguments.device)))
    shares = [float(share) for share in arguments.shares.split(",")]
    for row in rows(runner, arguments.fisher, shares, arguments.images, arguments.seed):
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
