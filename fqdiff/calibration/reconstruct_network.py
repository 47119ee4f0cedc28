"""Network-wise reconstruction: the rounding of all blocks together, so that the network puts out what full precision does.

Blocks come first (:mod:`fqdiff.calibration.reconstruct`): each is rounded for its own output, and cannot know what the later
ones make of its errors. From there on every rounding is learned at once, on the output of the network. Learned as a whole from
the start a network's rounding is said to overfit (BRECQ, Li et al. 2021, arXiv:2102.05426, section 3.2); after the blocks it has
little left to change.

    minimise over h in [0, 1]    e(h) / e(blocks)

with e the mean squared error of the output, by Adam, its rate falling to 0 by half a cosine, through roundings that are whole at
every step (:mod:`fqdiff.quant.hard_rounding`). One input in HELD_OUT is not trained on here: on these, or as many as CHECKED, the
error is measured now and then, and the best rounding met is kept, the blocks' own included.

Shapes: N inputs, C channels, H W pixels.
"""

import math
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fqdiff.calibration.inputs import CHUNK, CalibrationInputs
from fqdiff.calibration.reconstruct import CHECKS, HELD_OUT, MEMORY, share_done, spread
from fqdiff.calibration.repeated import Repeated, set_rate
from fqdiff.calibration.requirements import check_enough
from fqdiff.configs import ReconstructConfig
from fqdiff.context import Context, Part
from fqdiff.errors import ConfigError, NumericalError
from fqdiff.quant.adaround import can_learn_rounding
from fqdiff.quant.hard_rounding import HardRounding
from fqdiff.quant.packed import PackedTensor, unpack_tensor
from fqdiff.rng import generator
from fqdiff.values import Checkpoint, QuantizedCheckpoint

NAME = "network"  # of its part
CHECKED = 160  # held-out inputs that are measured: they pass the whole network, CHECKS times
EXACT = 1e-11  # of an output's mean square: what batches of other sizes change in float32
RATE = 0.002  # how far Adam moves h in a step at first; h goes from 0 to 1
BETAS = (0.9, 0.99)


@dataclass(frozen=True)
class Targets:
    """``x_t`` and what full precision puts out, ``output``, [N, C, H, W], at ``t`` [N], where it computes."""

    x_t: Tensor
    t: Tensor
    output: Tensor

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, timesteps and outputs of some."""
        index = index.to(self.t.device)
        return self.x_t[index], self.t[index], self.output[index]


@dataclass
class Learning:
    """Everything that a step changes. ``best``: codes of the lowest held-out error met, ``lowest``, relative to the start's."""

    roundings: Mapping[str, HardRounding]
    optimizer: torch.optim.Adam
    best: dict[str, PackedTensor]
    lowest: float = 1.0
    step: int = 0
    seconds: float = 0.0


def reconstruct_network(
    checkpoint: Checkpoint,
    model: QuantizedCheckpoint,
    inputs: CalibrationInputs,
    config: ReconstructConfig,
    seed: int,
    context: Context,
    apart: Collection[str] = (),
) -> dict[str, PackedTensor]:
    """The packed tensors of ``model`` after ``config.network_iterations`` steps on the rounding of its integers.

    ``apart``: parameters whose rounding stays. All ``inputs`` are used, where MEMORY holds them. With ``config.minutes`` the
    schedule goes by the clock where that is faster. A stopped run goes on. Raises ConfigError for a single input, NumericalError
    where outputs are no numbers.
    """
    learnable = {
        name: p for name, p in model.packed.items() if can_learn_rounding(p.format, p.granularity) and name not in apart
    }
    if not learnable:
        return dict(model.packed)
    called, total = time.monotonic(), config.network_iterations
    full = checkpoint.network().to(context.device)
    targets = full_outputs(full, inputs, context)
    trained, held_out = split(len(targets.t))
    fixed = {name: unpack_tensor(p).to(context.device) for name, p in model.packed.items()}
    start = output_error(full, fixed, targets, held_out)
    state = begin(checkpoint, learnable, context.device)
    saved = context.parts.load(NAME)
    if saved is not None:
        restore(state, saved)
    learn = Repeated(partial(learn_step, full, state, fixed, start), context.device)
    began = called - state.seconds
    deadline = began + 60 * config.minutes if config.minutes else math.inf
    with (
        context.progress(total, "all blocks together", "step") as bar,
        context.soft_stop() as stop_requested,
    ):
        bar.update(state.step)
        exact = start <= EXACT * float(targets.output.square().mean())
        progress = 1.0 if exact else share_done(state.step, total, began, deadline)
        while progress < 1:
            set_rate(state.optimizer.param_groups[0], RATE * (1 + math.cos(math.pi * progress)) / 2)
            draw = generator(seed, "reconstruct network", state.step)
            learn(*targets.rows(trained[torch.randint(len(trained), (config.batch,), generator=draw)]))
            state.step += 1
            bar.update()
            checked, progress = checks(progress), share_done(state.step, total, began, deadline)
            if checks(progress) > checked:
                error = output_error(full, {**fixed, **values(state)}, targets, held_out) / start
                if error < state.lowest:
                    state.best, state.lowest = {name: r.packed() for name, r in state.roundings.items()}, error
                bar.show(f"error x {state.lowest:.3f}")
            stopping = stop_requested()
            if stopping or checks(progress) > checked:
                state.seconds = time.monotonic() - began
                context.parts.save(NAME, snapshot(state))
            if stopping:
                raise KeyboardInterrupt
    return {**model.packed, **state.best}


def checks(progress: float) -> int:
    """How many of CHECKS are due at a share of the schedule."""
    return math.floor(min(progress, 1.0) * CHECKS + 1e-9)


def split(count: int) -> tuple[Tensor, Tensor]:
    """Which of ``count`` inputs are trained on, and on which errors are measured. Raises ConfigError for fewer than two."""
    check_enough(count, "reconstruct")
    held = torch.arange(count) % HELD_OUT == 0
    held_out = held.nonzero().flatten()
    few = min(CHECKED, len(held_out))
    return (~held).nonzero().flatten(), held_out[torch.arange(few) * len(held_out) // few]


def full_outputs(full: nn.Module, inputs: CalibrationInputs, context: Context) -> Targets:
    """What full precision puts out for ``inputs``, evenly spread fewer where MEMORY holds no more.

    Raises NumericalError where that is no number.
    """
    inputs = spread(inputs, max(1, MEMORY // (2 * inputs.x_t[0].nbytes)))
    outputs = []
    with context.progress(len(inputs), "outputs of full precision", "input") as bar, torch.no_grad():
        for x, t in inputs.chunks():
            outputs.append(full(x.to(context.device), t.to(context.device)))
            bar.update(len(t))
    output = torch.cat(outputs)
    if not torch.isfinite(output).all():
        raise NumericalError(
            "outputs of the network hold NaN or infinity", "check the checkpoint and its calibration set"
        )
    return Targets(inputs.x_t.to(context.device), inputs.t.to(context.device), output)


def begin(checkpoint: Checkpoint, learnable: Mapping[str, PackedTensor], device: torch.device) -> Learning:
    """Before the first step."""
    roundings = {name: HardRounding(name, checkpoint.tensors[name], p).to(device) for name, p in learnable.items()}
    on_cuda = device.type == "cuda"
    optimizer = torch.optim.Adam(
        [r.h for r in roundings.values()],
        lr=torch.tensor(RATE, device=device) if on_cuda else RATE,  # a graph reads the rate where it is
        betas=BETAS,
        capturable=on_cuda,
    )
    return Learning(roundings, optimizer, dict(learnable))


def values(state: Learning) -> dict[str, Tensor]:
    """What the roundings stand for now, by name; with gradients where they are enabled."""
    return {name: rounding() for name, rounding in state.roundings.items()}


@torch.enable_grad()
def learn_step(
    full: nn.Module, state: Learning, fixed: Mapping[str, Tensor], start: float, x: Tensor, t: Tensor, output: Tensor
) -> Tensor:
    """One step of the optimizer on some inputs; returns the loss of the module's docstring."""
    found = functional_call(full, {**fixed, **values(state)}, (x, t))
    loss: Tensor = (found - output).square().mean() / start
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    state.optimizer.step()
    for rounding in state.roundings.values():
        rounding.keep_within()
    return loss


@torch.no_grad()
def output_error(full: nn.Module, parameters: Mapping[str, Tensor], targets: Targets, index: Tensor) -> float:
    """Mean squared error of what the network puts out with ``parameters``, over the inputs of ``index``."""
    total = 0.0
    for rows in index.split(CHUNK):
        x, t, output = targets.rows(rows)
        total += float((functional_call(full, dict(parameters), (x, t)) - output).double().square().sum())
    return total / (len(index) * targets.output[0].numel())


def snapshot(state: Learning) -> Part:
    """Everything as plain tensors."""
    tensors: dict[str, Tensor] = {}
    for name, rounding in state.roundings.items():
        tensors |= {f"h/{name}": rounding.h, f"best/{name}": state.best[name].parts["codes"]}
        tensors |= {f"{key}/{name}": value for key, value in state.optimizer.state[rounding.h].items()}
    data = {"step": state.step, "seconds": state.seconds, "lowest": state.lowest}
    return Part({k: v.detach().cpu().clone() for k, v in tensors.items()}, data)


def restore(state: Learning, part: Part) -> None:
    """Put ``part`` into a fresh ``state``, in place. Raises ConfigError where it does not fit."""
    data, roundings = part.data, state.roundings
    step, seconds, lowest = (data.get(name) for name in ("step", "seconds", "lowest"))
    shapes: dict[str, tuple[torch.dtype, torch.Size]] = {}
    for name, rounding in roundings.items():
        codes = state.best[name].parts["codes"]
        like_h = {f"{key}/{name}": (torch.float32, rounding.h.shape) for key in ("h", "exp_avg", "exp_avg_sq")}
        shapes |= {**like_h, f"best/{name}": (codes.dtype, codes.shape), f"step/{name}": (torch.float32, torch.Size())}
    fits = {key: (t.dtype, t.shape) for key, t in part.tensors.items()} == shapes
    numbers = isinstance(step, int) and isinstance(seconds, float) and isinstance(lowest, float)
    if not (fits and numbers and all(torch.isfinite(t.float()).all() for t in part.tensors.values())):
        raise ConfigError("the saved reconstruction is of another recipe", "start over with --force")
    moments = {
        k: {key: part.tensors[f"{key}/{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        for k, name in enumerate(roundings)
    }
    state.optimizer.load_state_dict({**state.optimizer.state_dict(), "state": moments})
    for name, rounding in roundings.items():
        with torch.no_grad():
            rounding.h.copy_(part.tensors[f"h/{name}"])
        state.best[name] = rounding.choices.packed(rounding.choices.unpacked(part.tensors[f"best/{name}"]))
    assert isinstance(step, int)
    assert isinstance(seconds, float)
    assert isinstance(lowest, float)
    state.step, state.seconds, state.lowest = step, seconds, lowest
