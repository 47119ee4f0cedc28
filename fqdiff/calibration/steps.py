"""Learn the steps of activation quantizers, so that what each block puts out stays what full precision puts out.

The second stage of Q-Diffusion (Li et al. 2023, arXiv:2302.04304), after the rounding of weights. Block by block in the order of
computing, as in :mod:`fqdiff.calibration.reconstruct`: a block's inputs are those that the network with all steps before it
already learned gives it, its targets what full precision computes, and all its steps are learned together, by
:mod:`fqdiff.quant.learned_steps`, to make the mean squared error of its output small. One input in HELD_OUT is never trained on:
on these the error is measured now and then, and the best steps met are kept, those it began with included.

Shapes: N inputs, K intervals of timesteps, G scales of a site at one timestep.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from fqdiff.calibration.inputs import CHUNK, CalibrationInputs
from fqdiff.calibration.reconstruct import CHECKS, HELD_OUT, BlockData, capture, share_done, spread, that_fit
from fqdiff.calibration.requirements import check_enough
from fqdiff.configs import StepsConfig
from fqdiff.context import Bar, Context, Part
from fqdiff.errors import ConfigError, NumericalError
from fqdiff.models.registry import reconstruction_blocks, skip_boundaries, temporal_layers
from fqdiff.quant.activation_sites import OUTPUT, is_operand, last_layer
from fqdiff.quant.activations import (
    Activation,
    ActivationQuantizer,
    add_quantizers,
    check_activations,
    interval_count,
    site_shapes,
)
from fqdiff.quant.learned_steps import FixedSteps, LearnedSteps, can_learn_steps
from fqdiff.quant.packed import unpack_tensor
from fqdiff.quant.timestep_bias import add_timestep_bias
from fqdiff.rng import generator
from fqdiff.values import Checkpoint, QuantizedCheckpoint

Note = Callable[[Tensor], None]


@dataclass(frozen=True)
class LearnedBlock:
    """``steps`` [K, G] of every site of a block. ``errors``: held-out error at each check, relative to that of the start."""

    steps: Mapping[str, Tensor]
    errors: tuple[float, ...]


def learn_steps(
    checkpoint: Checkpoint,
    model: QuantizedCheckpoint,
    inputs: CalibrationInputs,
    config: StepsConfig,
    seed: int,
    context: Context,
) -> dict[str, Activation]:
    """The activations of ``model`` with their scales learned, but those of logarithmic codes. A stopped run goes on.

    Of several intervals those of layers that depend on t alone stay as well: they hold for timesteps that ``inputs`` lack.
    So do those of blocks that come when ``config.minutes`` are over.
    Raises NumericalError where outputs are no numbers.
    """
    device = context.device
    full = checkpoint.network().to(device)
    network, quantizers, note = trainable_network(model, device)
    kept = temporal_layers(full) if interval_count(model.activations) > 1 else set()
    learned = {site: q for site, q in quantizers.items() if isinstance(q, LearnedSteps) and site not in kept}
    blocks = {
        block: sites for block in reconstruction_blocks(network) if (sites := sites_within(network, block, learned))
    }
    chosen, spent = spread(inputs, config.inputs), 0.0
    with context.progress(len(blocks) * config.iterations, "activation steps", "step") as bar:
        for done, (block, sites) in enumerate(blocks.items()):
            started = time.monotonic()
            own = {site: learned[site] for site in sites}
            part = context.parts.load(block)
            if part is None and config.minutes and spent >= 60 * config.minutes:
                _tell(bar, block, config.iterations, "no time left")
                continue
            if part is not None:
                found, seconds = restore(part, own)
                bar.update(config.iterations)
            else:
                fewer = that_fit(full, network, block, chosen, device)
                data = capture(full, network, block, fewer, device)
                share = (60 * config.minutes - spent) / (len(blocks) - done) if config.minutes else math.inf
                draw = generator(seed, "activation steps", block)
                tell = partial(_tell, bar, block)
                module = network.get_submodule(block)
                found = learn_block(module, own, data, fewer.t, note, config, draw, started + share, tell).steps
                seconds = time.monotonic() - started
                context.parts.save(block, Part({site: s.cpu() for site, s in found.items()}, {"seconds": seconds}))
            spent += seconds
            for site, quantizer in own.items():
                quantizer.settle(found[site])
    return {
        site: replace(a, scale=learned[site].get_buffer("scale").cpu()) if site in learned else a
        for site, a in model.activations.items()
    }


def _tell(bar: Bar, block: str, steps: int, text: str) -> None:
    bar.update(steps)
    bar.show(f"{block}: {text}")


def restore(part: Part, quantizers: Mapping[str, LearnedSteps]) -> tuple[Mapping[str, Tensor], float]:
    """The steps of a block that is done, and the seconds that they took. Raises ConfigError where they do not fit."""
    shapes = {site: (q.ratio.dtype, q.ratio.shape) for site, q in quantizers.items()}
    seconds = part.data.get("seconds", 0.0)
    found = {site: (steps.dtype, steps.shape) for site, steps in part.tensors.items()}
    if found != shapes or not isinstance(seconds, float):
        raise ConfigError("the saved activation steps are of another recipe", "start over with --force")
    return part.tensors, seconds


def trainable_network(
    model: QuantizedCheckpoint, device: torch.device
) -> tuple[nn.Module, dict[str, ActivationQuantizer], Note]:
    """The network of ``model`` whose quantizers pass gradients on, these by site, and what tells it a batch's timesteps.

    To the bit it computes what the network of ``model`` computes.
    """
    total = model.spec.noise_schedule().num_train_timesteps
    network = model.spec.network({name: unpack_tensor(p) for name, p in model.packed.items()})
    boundaries = skip_boundaries(network)
    check_activations(network, model.activations, total, boundaries)
    note_bias = add_timestep_bias(network, model.timestep_bias, total)
    shapes = site_shapes(network, model.activations, boundaries)
    quantizers: dict[str, ActivationQuantizer] = {
        site: (LearnedSteps if can_learn_steps(a) else FixedSteps)(a, *shapes[site])
        for site, a in model.activations.items()
    }
    note_steps = add_quantizers(network, quantizers, interval_count(model.activations), total)

    def note(t: Tensor) -> None:
        note_bias(t)
        note_steps(t)

    return network.to(device), quantizers, note


def sites_within(network: nn.Module, block: str, sites: Mapping[str, object]) -> list[str]:
    """Those of ``sites`` whose tensors are computed within ``block``, or given to it."""

    def owner(site: str) -> str:
        if site == OUTPUT:
            return last_layer(network)
        return site.rpartition(".")[0] if is_operand(site) else site

    return [site for site in sites if f"{owner(site)}.".startswith(f"{block}.")]


def learn_block(
    block: nn.Module,
    quantizers: Mapping[str, LearnedSteps],
    data: BlockData,
    t: Tensor,
    note: Note,
    config: StepsConfig,
    draw: torch.Generator,
    deadline: float = math.inf,
    tell: Callable[[int, str], object] = lambda n, text: None,
) -> LearnedBlock:
    """Steps for the ``quantizers`` within ``block``, which is given ``data`` at timesteps ``t`` [N].

    Adam, its rate falling to 0 by half a cosine. With a ``deadline`` (of time.monotonic) before the end of the schedule it goes
    by the clock, and is complete by then. ``tell`` is told how many steps of the schedule are done, and how it stands.
    Raises ConfigError for a single input, NumericalError on NaN.
    """
    held = torch.arange(len(t)) % HELD_OUT == 0
    trained, held_out = (~held).nonzero().flatten(), held.nonzero().flatten()
    check_enough(len(held), "learn steps")
    best = {site: q.steps().detach().clone() for site, q in quantizers.items()}
    first = output_error(block, data, t, note, held_out)
    if not math.isfinite(first):
        raise NumericalError("outputs of a block hold NaN or infinity", "check the checkpoint and its calibration set")
    if first == 0:
        tell(config.iterations, "exact")
        return LearnedBlock(best, (0.0,))
    optimizer = torch.optim.Adam([q.ratio for q in quantizers.values()], lr=config.rate)
    every, started = math.ceil(config.iterations / CHECKS), time.monotonic()
    errors, lowest = [1.0], 1.0
    step, progress = 0, 0.0
    while progress < 1:
        optimizer.param_groups[0]["lr"] = config.rate * (1 + math.cos(math.pi * progress)) / 2
        rows = trained[torch.randint(len(trained), (config.batch,), generator=draw)]
        arguments, target = data.rows(rows)
        note(t[rows].to(data.target.device))
        with torch.enable_grad():
            loss = (block(*arguments) - target).square().mean() / first
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
        optimizer.step()
        step += 1
        tell(1, f"error x {lowest:.3f}")
        progress = share_done(step, config.iterations, started, deadline)
        if step % every and progress < 1:
            continue
        errors.append(output_error(block, data, t, note, held_out) / first)
        if errors[-1] < lowest:
            best, lowest = {site: q.steps().detach().clone() for site, q in quantizers.items()}, errors[-1]
    tell(config.iterations - step, f"error x {lowest:.3f}")
    return LearnedBlock(best, tuple(errors))


@torch.no_grad()
def output_error(block: nn.Module, data: BlockData, t: Tensor, note: Note, index: Tensor) -> float:
    """Mean squared error of what ``block`` puts out over the inputs of ``index``."""
    total = 0.0
    for rows in index.split(CHUNK):
        arguments, target = data.rows(rows)
        note(t[rows].to(data.target.device))
        total += float((block(*arguments) - target).double().square().sum())
    return total / (len(index) * data.target[0].numel())
