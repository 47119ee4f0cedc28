"""Block reconstruction: learn the rounding of weights so that what each block puts out stays what full precision puts out.

Block by block in the order of computing, as in BRECQ (Li et al. 2021, arXiv:2102.05426) and Q-Diffusion (Li et al. 2023,
arXiv:2302.04304): residual blocks and attention as a whole, other layers one at a time. A block's inputs are those that the
network with all blocks before it already rounded gives it, its targets what full precision computes. Rounding is AdaRound's
(:mod:`fqdiff.quant.adaround`). For a block of n weights, with e(h) the mean squared error of its output,

    minimise  n e(h) / e(stored) + PENALTY sum_i 1 - |2 h_i - 1|^beta

so that what balances the two terms depends neither on the block's size nor on the range of its output. One input in
HELD_OUT is never trained on: on these the hard rounding is measured now and then, and the best one met is what is kept, the
stored one included.

Shapes: N inputs.
"""

import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fqdiff.calibration.inputs import CHUNK, CalibrationInputs
from fqdiff.calibration.repeated import Repeated
from fqdiff.calibration.requirements import check_enough
from fqdiff.configs import ReconstructConfig
from fqdiff.context import Bar, Context, Part
from fqdiff.errors import ConfigError, NumericalError
from fqdiff.models.registry import reconstruction_blocks
from fqdiff.quant.adaround import LearnedRounding, annealed_beta, can_learn_rounding, rounding_penalty
from fqdiff.quant.packed import PackedTensor, unpack_tensor
from fqdiff.rng import generator
from fqdiff.values import Checkpoint, QuantizedCheckpoint

PENALTY = 10.0
HELD_OUT = 8
MEMORY = 2**30  # bytes of inputs and targets held for one block; a block with larger ones gets fewer, evenly spread
CHECKS = 20  # how often the schedule measures the hard rounding
DECIDED = 0.001  # the share of undecided weights below which the error can fall no further, and the block is done


@dataclass(frozen=True)
class BlockData:
    """``arguments`` of the block, each [N, ...], and the output of full precision, ``target`` [N, ...], where it computes."""

    arguments: tuple[Tensor, ...]
    target: Tensor

    def rows(self, index: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Arguments and target of some inputs."""
        index = index.to(self.target.device)
        return tuple(a[index] for a in self.arguments), self.target[index]


@dataclass(frozen=True)
class Learned:
    """``codes`` of every tensor of a block. ``errors``: held-out error at each check, relative to the stored rounding's."""

    codes: Mapping[str, Tensor]
    errors: tuple[float, ...]


def reconstruct(
    checkpoint: Checkpoint,
    model: QuantizedCheckpoint,
    inputs: CalibrationInputs,
    config: ReconstructConfig,
    seed: int,
    context: Context,
    apart: Collection[str] = (),
) -> tuple[dict[str, PackedTensor], float]:
    """The packed tensors of ``model`` with the rounding of its integers learned, all else as it is, and the seconds it took.

    A stopped run goes on, and counts what it took before.

    ``apart``: parameters whose rounding stays, since it was learned before. Blocks that come when ``config.minutes`` are over
    keep their rounding too: a block's inputs alone take seconds.
    Raises LineageError where codes are not ``checkpoint``'s weights rounded, NumericalError where outputs are no numbers.
    """
    device = context.device

    def rounding(name: str) -> LearnedRounding:
        return LearnedRounding(name, checkpoint.tensors[name], model.packed[name])

    learnable = [
        name for name, p in model.packed.items() if can_learn_rounding(p.format, p.granularity) and name not in apart
    ]
    for name in learnable:
        rounding(name)  # what is to be refused is refused before the work begins; kept are those of one block at a time
    full = checkpoint.network().to(device)
    network = model.spec.network({name: unpack_tensor(p) for name, p in model.packed.items()}).to(device)
    packed = dict(model.packed)
    blocks = {
        block: names
        for block in reconstruction_blocks(network)
        if (names := [name for name in learnable if name.startswith(f"{block}.")])
    }
    chosen, spent = spread(inputs, config.inputs), 0.0
    with context.progress(len(blocks) * config.iterations, "reconstruct", "step") as bar:
        for done, (block, names) in enumerate(blocks.items()):
            started = time.monotonic()
            own = {name.removeprefix(f"{block}."): rounding(name).to(device) for name in names}
            part = context.parts.load(block)
            if part is None and config.minutes and spent >= 60 * config.minutes:
                _tell(bar, block, config.iterations, "no time left")
                continue
            if part is not None:
                codes, seconds = restore(part, own)
                bar.update(config.iterations)
            else:
                data = capture(full, network, block, chosen, device)
                share = (60 * config.minutes - spent) / (len(blocks) - done) if config.minutes else math.inf
                draw = generator(seed, "reconstruct", block)
                tell = partial(_tell, bar, block)
                module = network.get_submodule(block)
                codes = learn_block(module, own, data, config, draw, started + share, tell).codes
                seconds = time.monotonic() - started
                streams = {name: r.packed(codes[name]).parts["codes"] for name, r in own.items()}
                context.parts.save(block, Part(streams, {"seconds": seconds}))
            spent += seconds
            for name, r in own.items():
                packed[f"{block}.{name}"] = r.packed(codes[name])
                network.get_parameter(f"{block}.{name}").copy_(r.values(codes[name]))
    return packed, spent


def _tell(bar: Bar, block: str, steps: int, text: str) -> None:
    bar.update(steps)
    bar.show(f"{block}: {text}")


def restore(part: Part, roundings: Mapping[str, LearnedRounding]) -> tuple[Mapping[str, Tensor], float]:
    """Codes and seconds of a block that is done. Raises ConfigError where they do not fit."""
    seconds = part.data.get("seconds")
    fits = isinstance(seconds, float) and part.tensors.keys() == roundings.keys()
    if fits:
        parts = ((part.tensors[name], r.start.parts["codes"]) for name, r in roundings.items())
        fits = all((got.dtype, got.shape) == (want.dtype, want.shape) for got, want in parts)
    if not fits:
        raise ConfigError("the saved reconstruction is of another recipe", "start over with --force")
    assert isinstance(seconds, float)
    return {name: r.unpacked(part.tensors[name]) for name, r in roundings.items()}, seconds


# --- what a block sees -----------------------------------------------------------------------------------------------


def spread(inputs: CalibrationInputs, count: int) -> CalibrationInputs:
    """``count`` of the inputs, evenly spread over the set, so that all its timesteps remain; all where it has fewer."""
    n = len(inputs)
    index = torch.arange(n) if count >= n else torch.arange(count) * n // count
    return CalibrationInputs(inputs.x_t[index], inputs.t[index])


class _Reached(Exception):
    """The network came to the block; what follows it need not be computed."""


def capture(
    full: nn.Module, network: nn.Module, block: str, inputs: CalibrationInputs, device: torch.device
) -> BlockData:
    """What ``network`` gives to ``block``, and what the block of ``full`` puts out, on ``inputs``, fewer where MEMORY asks."""
    fewer = that_fit(full, network, block, inputs, device)
    return BlockData(_arguments(network, block, fewer, device), _output(full, block, fewer, device))


def that_fit(
    full: nn.Module, network: nn.Module, block: str, inputs: CalibrationInputs, device: torch.device
) -> CalibrationInputs:
    """As many of ``inputs`` as MEMORY can hold arguments and outputs of ``block`` for, evenly spread."""
    first = CalibrationInputs(inputs.x_t[:1], inputs.t[:1])
    one = [*_arguments(network, block, first, device), _output(full, block, first, device)]
    return spread(inputs, max(1, MEMORY // sum(t.nbytes for t in one)))


def _arguments(network: nn.Module, block: str, inputs: CalibrationInputs, device: torch.device) -> tuple[Tensor, ...]:
    seen: list[tuple[Tensor, ...]] = []

    def see(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen.append(arguments)
        raise _Reached

    # First of all hooks: the tensor that the block is given, not what a quantizer at its door makes of it.
    handle = network.get_submodule(block).register_forward_pre_hook(see, prepend=True)
    _run(network, inputs, device, handle.remove)
    return tuple(torch.cat(argument) for argument in zip(*seen, strict=True))


def _output(network: nn.Module, block: str, inputs: CalibrationInputs, device: torch.device) -> Tensor:
    seen: list[Tensor] = []

    def see(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(output)
        raise _Reached

    handle = network.get_submodule(block).register_forward_hook(see)
    _run(network, inputs, device, handle.remove)
    return torch.cat(seen)


def _run(network: nn.Module, inputs: CalibrationInputs, device: torch.device, release: Callable[[], None]) -> None:
    try:
        with torch.no_grad():
            for x, t in inputs.chunks():
                try:
                    network(x.to(device), t.to(device))
                except _Reached:
                    continue
    finally:
        release()


# --- one block -------------------------------------------------------------------------------------------------------


def learn_block(
    block: nn.Module,
    roundings: Mapping[str, LearnedRounding],
    data: BlockData,
    config: ReconstructConfig,
    draw: torch.Generator,
    deadline: float = math.inf,
    tell: Callable[[int, str], object] = lambda n, text: None,
) -> Learned:
    """Codes for the parameters of ``block`` that ``roundings`` names; its others stay as they are.

    The schedule has ``config.iterations`` steps, fewer where nothing is left to decide: a flat held-out error half-way is no
    reason to stop, since much of its fall comes when the last weights have to choose. With a ``deadline`` (of
    time.monotonic) before its end it goes by the clock, and is complete by then. ``tell`` is told how many steps are done, and
    how it stands; all of the schedule in the end. Raises NumericalError on NaN.
    """
    held = torch.arange(len(data.target)) % HELD_OUT == 0
    trained, held_out = (~held).nonzero().flatten(), held.nonzero().flatten()
    check_enough(len(held), "reconstruct")

    def measure(codes: Mapping[str, Tensor]) -> float:
        return hard_error(block, {name: r.values(codes[name]) for name, r in roundings.items()}, data, held_out)

    best: Mapping[str, Tensor] = {name: r.stored_codes() for name, r in roundings.items()}
    stored = measure(best)
    if not math.isfinite(stored):
        raise NumericalError("outputs of a block hold NaN or infinity", "check the checkpoint and its calibration set")
    if stored == 0:
        tell(config.iterations, "exact")
        return Learned(best, (0.0,))
    device = data.target.device
    parameters = [r.v for r in roundings.values()]
    optimizer = torch.optim.Adam(parameters, lr=config.rate, capturable=device.type == "cuda")

    def learn(rows: Tensor, beta: Tensor | float | None = None) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = block_loss(block, roundings, *data.rows(rows), stored, beta)
        loss.backward()
        optimizer.step()
        return loss

    warm_up, decide = Repeated(learn, device), Repeated(learn, device)
    every, started = math.ceil(config.iterations / CHECKS), time.monotonic()
    errors, lowest = [1.0], 1.0
    step, progress = 0, 0.0
    while progress < 1:
        beta = annealed_beta(progress)
        rows = trained[torch.randint(len(trained), (config.batch,), generator=draw)]
        if beta is None:
            warm_up(rows)
        else:
            decide(rows, beta)
        step += 1
        tell(1, f"error x {lowest:.3f}")
        progress = share_done(step, config.iterations, started, deadline)
        if step % every and progress < 1:
            continue
        codes = {name: r.codes() for name, r in roundings.items()}
        errors.append(measure(codes) / stored)
        if errors[-1] < lowest:
            best, lowest = codes, errors[-1]
        if undecided(roundings) < DECIDED:
            break
    tell(config.iterations - step, f"error x {lowest:.3f}")
    return Learned(best, tuple(errors))


def share_done(step: int, iterations: int, started: float, deadline: float) -> float:
    """How much of the schedule is over: by steps, or by the clock where that is further."""
    by_clock = 0.0 if deadline == math.inf else (time.monotonic() - started) / max(deadline - started, 1e-9)
    return max(step / iterations, by_clock)


@torch.enable_grad()
def block_loss(
    block: nn.Module,
    roundings: Mapping[str, LearnedRounding],
    arguments: tuple[Tensor, ...],
    target: Tensor,
    stored: float,
    beta: Tensor | float | None,
) -> Tensor:
    """What the module's docstring says is minimised, on some inputs; ``stored`` is e(stored), no ``beta`` no penalty."""
    output = functional_call(block, {name: r() for name, r in roundings.items()}, arguments)
    weights = sum(r.weights for r in roundings.values())
    loss: Tensor = weights * (output - target).square().mean() / stored
    if beta is None:
        return loss
    return loss + PENALTY * torch.stack([rounding_penalty(r.soft(), beta) for r in roundings.values()]).sum()


@torch.no_grad()
def undecided(roundings: Mapping[str, LearnedRounding]) -> float:
    """The share of weights whose h is neither 0 nor 1, but for a twentieth."""
    number = sum(int(((h := r.soft()) > 0.05).logical_and(h < 0.95).sum()) for r in roundings.values())
    return number / sum(r.weights for r in roundings.values())


@torch.no_grad()
def hard_error(block: nn.Module, values: Mapping[str, Tensor], data: BlockData, index: Tensor) -> float:
    """Mean squared error of what ``block`` puts out with ``values`` as parameters, over the inputs of ``index``."""
    total = 0.0
    for rows in index.split(CHUNK):
        arguments, target = data.rows(rows)
        total += float((functional_call(block, dict(values), arguments) - target).double().square().sum())
    return total / (len(index) * data.target[0].numel())
