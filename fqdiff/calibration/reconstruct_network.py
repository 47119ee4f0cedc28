"""Network-wise reconstruction: the rounding of all blocks together, so that the network puts out what full precision does.

Blocks come first (:mod:`fqdiff.calibration.reconstruct`): each is rounded for its own output, and cannot know what the later
ones make of its errors. From there on, no longer than it took them, every rounding is learned at once on the noise that
is predicted. A network's rounding learned as a whole overfits where it starts from nothing (BRECQ, Li et al. 2021,
arXiv:2102.05426, section 3.2); after the blocks it has little left to change.

    minimise over h in [0, 1]    e(h) / e(blocks)

with e the mean squared error of the output, by Adam, its rate falling to 0 by half a cosine, through roundings that are whole at
every step (:mod:`fqdiff.quant.hard_rounding`). One input in HELD_OUT is never trained on: on these, or as many as CHECKED, the
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
from fqdiff.calibration.repeated import Repeated
from fqdiff.configs import ReconstructConfig
from fqdiff.context import Context, Part
from fqdiff.errors import ConfigError, NumericalError
from fqdiff.quant.adaround import can_learn_rounding
from fqdiff.quant.hard_rounding import HardRounding
from fqdiff.quant.packed import PackedTensor, unpack_tensor
from fqdiff.quant.packing import unpack
from fqdiff.rng import generator
from fqdiff.values import Checkpoint, QuantizedCheckpoint

NAME = "network"  # of its part
CHECKED = 160  # held-out inputs that are measured: they pass the whole network, CHECKS times
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
class Progress:
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
    schedule is shortened to fit. A stopped run goes on. Raises NumericalError where outputs are no numbers.
    """
    device, total, called = context.device, config.network_iterations, time.monotonic()
    state = begin(checkpoint, model, apart, device)
    if not state.roundings:
        return dict(model.packed)
    full = checkpoint.network().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    fixed = {name: unpack_tensor(p).to(device) for name, p in model.packed.items()}
    targets = full_outputs(full, inputs, context)
    held = torch.arange(len(targets.t)) % HELD_OUT == 0
    trained, held_out = (~held).nonzero().flatten(), held.nonzero().flatten()
    held_out = held_out[torch.arange(min(CHECKED, len(held_out))) * len(held_out) // min(CHECKED, len(held_out))]
    start = output_error(full, fixed, targets, held_out)
    if not math.isfinite(start):
        raise NumericalError(
            "outputs of the network hold NaN or infinity", "check the checkpoint and its calibration set"
        )
    saved = context.parts.load(NAME)
    if saved is not None:
        restore(state, saved)
    learn = Repeated(partial(learn_step, full, state, fixed, start), device)
    before, started = state.seconds, time.monotonic()
    deadline = called + 60 * config.minutes - before if config.minutes else math.inf
    every = math.ceil(total / CHECKS)
    with context.progress(total, "all blocks together", "step") as bar:
        bar.update(state.step)
        progress = state.step / total if start else 1.0
        while progress < 1:
            set_rate(state.optimizer, RATE * (1 + math.cos(math.pi * progress)) / 2)
            draw = generator(seed, "reconstruct network", state.step)
            learn(*targets.rows(trained[torch.randint(len(trained), (config.batch,), generator=draw)]))
            state.step += 1
            bar.update()
            progress = share_done(state.step, total, started, deadline)
            if state.step % every and progress < 1:
                continue
            values = {name: r().detach() for name, r in state.roundings.items()}
            error = output_error(full, {**fixed, **values}, targets, held_out) / start
            if error < state.lowest:
                state.best, state.lowest = {name: r.packed() for name, r in state.roundings.items()}, error
            state.seconds = before + time.monotonic() - called
            context.parts.save(NAME, snapshot(state))
            bar.show(f"error x {state.lowest:.3f}")
    return {**model.packed, **state.best}


def full_outputs(full: nn.Module, inputs: CalibrationInputs, context: Context) -> Targets:
    """What full precision puts out for ``inputs``, evenly spread fewer where MEMORY holds no more."""
    inputs = spread(inputs, max(1, MEMORY // (2 * inputs.x_t[0].nbytes)))
    outputs = []
    with context.progress(len(inputs), "outputs of full precision", "input") as bar, torch.no_grad():
        for x, t in inputs.chunks():
            outputs.append(full(x.to(context.device), t.to(context.device)))
            bar.update(len(t))
    return Targets(inputs.x_t.to(context.device), inputs.t.to(context.device), torch.cat(outputs))


def begin(checkpoint: Checkpoint, model: QuantizedCheckpoint, apart: Collection[str], device: torch.device) -> Progress:
    """Before the first step."""
    roundings = {
        name: HardRounding(name, checkpoint.tensors[name], p).to(device)
        for name, p in model.packed.items()
        if can_learn_rounding(p.format, p.granularity) and name not in apart
    }
    on_cuda = device.type == "cuda"
    groups = [{"params": [r.h for r in roundings.values()]}]  # a list alone may not be empty
    optimizer = torch.optim.Adam(
        groups,
        lr=torch.tensor(0.0, device=device) if on_cuda else 0.0,  # a graph reads the rate where it is
        betas=BETAS,
        capturable=on_cuda,
    )
    return Progress(roundings, optimizer, {name: model.packed[name] for name in roundings})


def set_rate(optimizer: torch.optim.Adam, rate: float) -> None:
    """The learning rate of the next step."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


@torch.enable_grad()
def learn_step(
    full: nn.Module, state: Progress, fixed: Mapping[str, Tensor], start: float, x: Tensor, t: Tensor, output: Tensor
) -> Tensor:
    """One step of the optimizer on some inputs; returns the loss of the module's docstring."""
    found = functional_call(full, {**fixed, **{name: r() for name, r in state.roundings.items()}}, (x, t))
    loss: Tensor = (found - output).square().mean() / start
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    state.optimizer.step()
    for rounding in state.roundings.values():
        rounding.keep_within()
    return loss


@torch.no_grad()
def output_error(full: nn.Module, values: Mapping[str, Tensor], targets: Targets, index: Tensor) -> float:
    """Mean squared error of what the network puts out with ``values`` as parameters, over the inputs of ``index``."""
    total = 0.0
    for rows in index.split(CHUNK):
        x, t, output = targets.rows(rows)
        total += float((functional_call(full, dict(values), (x, t)) - output).double().square().sum())
    return total / (len(index) * targets.output[0].numel())


def snapshot(state: Progress) -> Part:
    """Everything as plain tensors."""
    tensors: dict[str, Tensor] = {f"h/{name}": r.h for name, r in state.roundings.items()}
    tensors |= {f"best/{name}": p.parts["codes"] for name, p in state.best.items()}
    for index, values in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{k}": v for k, v in values.items()}
    data = {"step": state.step, "seconds": state.seconds, "lowest": state.lowest}
    return Part({k: v.detach().cpu().clone() for k, v in tensors.items()}, data)


def restore(state: Progress, part: Part) -> None:
    """Put ``part`` into a fresh ``state``, in place. Raises ConfigError where it does not fit."""
    try:
        tensors, data = part.tensors, part.data
        step, seconds, lowest = data["step"], data["seconds"], data["lowest"]
        if not (isinstance(step, int) and isinstance(seconds, float) and isinstance(lowest, float)):
            raise ValueError("no count of steps")
        for name, rounding in state.roundings.items():
            rounding.load_state_dict({**rounding.state_dict(), "h": tensors[f"h/{name}"]})
            codes = unpack(tensors[f"best/{name}"], state.best[name].format.bits, state.best[name].shape)
            state.best[name] = rounding.choices.packed(codes)
        optimizer = state.optimizer.state_dict()
        optimizer["state"] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer/"):
                _, index, name = key.split("/")
                optimizer["state"].setdefault(int(index), {})[name] = value
        state.optimizer.load_state_dict(optimizer)
        state.step, state.seconds, state.lowest = step, seconds, lowest
    except (KeyError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"the saved reconstruction is of another recipe ({reason})", "start over with --force"
        ) from None
