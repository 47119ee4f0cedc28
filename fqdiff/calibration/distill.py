"""Distillation: train what a packed model stores until it predicts what the full-precision one predicts.

No images are needed and no layout changes: the inputs are those of sampler runs of the full-precision model, and codes, scales,
codebooks, biases and norms move (:mod:`fqdiff.quant.trainable`), so that the file keeps its size to the byte. After
quantization-aware distillation for diffusion models (EfficientDM, He et al. 2024, arXiv:2310.03270, without its adapters).

The loss is the error of the velocity, |dv|^2 = |d eps|^2 + |d x_0|^2 (Salimans and Ho 2022, arXiv:2202.00512): that of
the noise alone hardly counts the first steps of a run, where x_t is nearly all noise and an error of x_0 moves all that follows.

The runs never end, so that no input comes twice: B walkers each follow a DDIM run of their own; one forward pass of the
full-precision model gives the targets of their inputs and moves all of them on. What they meet goes through a pool that is drawn
from at random: taken as it comes, neighbouring steps would see the same images, and their gradients pull the same way.

Shapes: B walkers, P inputs in the pool, C channels, H W pixels.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fqdiff.calibration.repeated import Repeated, set_rate
from fqdiff.configs import QuantizeConfig
from fqdiff.context import Context, Part
from fqdiff.diffusion.samplers import PredictNoise, ddim_update
from fqdiff.diffusion.schedule import NoiseSchedule, noise_from_output, signal_and_noise_scale
from fqdiff.errors import ConfigError, NumericalError
from fqdiff.quant.packed import PackedTensor
from fqdiff.quant.trainable import Trainable, rows_of, trainable
from fqdiff.rng import generator
from fqdiff.values import Checkpoint, ModelSpec, predict_noise

RUN_STEPS = 32  # DDIM steps of one walk from noise to image
GRID_RATE = 0.05  # learning rate of scales, codebooks, biases and norms, relative to that of the weights behind codes
BETAS = (0.9, 0.99)
POOL_STEPS = 64  # steps of all walkers that the pool holds: two whole runs, and so every part of a run alike
LEAST_ABAR = 0.01  # |d x_0|^2 = |d eps|^2 (1 - abar) / abar, of networks that predict the noise, has no bound


@dataclass
class Walkers:
    """``x`` float32 [B, C, H, W]; ``position`` int64 [B], steps done, up to RUN_STEPS; ``offset`` float64 [B] of each run's
    timesteps in their strides; ``runs``: begun so far.
    """

    x: Tensor
    position: Tensor
    offset: Tensor
    runs: int = 0

    @classmethod
    def begin(cls, spec: ModelSpec, count: int, seed: int) -> "Walkers":
        """``count`` walkers before their first step."""
        new = cls(
            torch.zeros(count, *spec.image_shape),
            torch.zeros(count, dtype=torch.int64),
            torch.zeros(count, dtype=torch.float64),
        )
        for b in range(count):
            new.restart(b, seed)
        return new

    def restart(self, b: int, seed: int) -> None:
        """Walker b at the noise of (seed, "distill", number of the run)."""
        draw = generator(seed, "distill", self.runs)
        self.x[b] = torch.randn(self.x.shape[1:], generator=draw)
        self.offset[b] = torch.rand(1, generator=draw, dtype=torch.float64)
        self.position[b] = 0
        self.runs += 1

    def timesteps(self, total: int, ahead: int = 0) -> Tensor:
        """Where each walker is after ``ahead`` more steps, int64 [B]; -1 past the end."""
        place = RUN_STEPS - 1 - (self.position + ahead) + self.offset
        found = (place * total / RUN_STEPS).floor().long()
        return torch.where(self.position + ahead < RUN_STEPS, found, -1)

    def move(self, eps: Tensor, abar: Tensor, abar_next: Tensor, seed: int) -> None:
        """One DDIM step (eta = 0) for all; those at the end begin anew."""
        self.x = ddim_update(self.x, eps, abar, abar_next)
        self.position += 1
        for b in (self.position == RUN_STEPS).nonzero().flatten().tolist():
            self.restart(b, seed)


@dataclass
class Pool:
    """Inputs and targets: ``x``, ``eps`` float32 [P, C, H, W], ``t`` int64 [P], ``abar`` float32 [P]."""

    x: Tensor
    eps: Tensor
    t: Tensor
    abar: Tensor

    @classmethod
    def empty(cls, spec: ModelSpec, count: int) -> "Pool":
        """Room for ``count``."""
        images = torch.zeros(count, *spec.image_shape)
        return cls(images, images.clone(), torch.zeros(count, dtype=torch.int64), torch.zeros(count))

    def put(self, where: Tensor, walkers: Walkers, predict: PredictNoise, schedule: NoiseSchedule, seed: int) -> None:
        """What the walkers meet at the places ``where`` [B]; they take a step."""
        t, following = (walkers.timesteps(schedule.num_train_timesteps, ahead) for ahead in (0, 1))
        with torch.inference_mode():
            eps = predict(walkers.x, t)
        abar = schedule.alphas_cumprod[t].float()
        abar_next = torch.where(following >= 0, schedule.alphas_cumprod[following.clamp(min=0)].float(), 1.0)
        for own, new in ((self.x, walkers.x), (self.eps, eps), (self.t, t), (self.abar, abar)):
            own[where] = new
        walkers.move(eps.clone(), abar[:, None, None, None], abar_next[:, None, None, None], seed)


@dataclass
class Distillation:
    """Everything that a step changes. ``losses``: of each step done."""

    tensors: Mapping[str, Trainable]
    optimizer: torch.optim.Adam
    walkers: Walkers
    pool: Pool
    losses: list[float] = field(default_factory=list)


def distill(
    checkpoint: Checkpoint, packed: Mapping[str, PackedTensor], config: QuantizeConfig, seed: int, context: Context
) -> dict[str, PackedTensor]:
    """``packed`` after ``config.distill`` steps of Adam, in the same formats. A stopped run goes on.

    The loss is 1/2 |v_q - v|^2 = 1/2 |eps_q - eps|^2 / abar, abar at least LEAST_ABAR, summed over pixels, mean over walkers.
    Raises NumericalError where it is no number.
    """
    spec, device = checkpoint.spec, context.device
    teacher = checkpoint.network().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    schedule = spec.noise_schedule()

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return predict_noise(spec, teacher)(x.to(device), t.to(device)).cpu()

    state = begin(checkpoint, packed, config, seed, device)
    learn = learner(state, teacher, spec)
    saved = context.parts.load("distill")
    if saved is not None:
        restore(state, saved)
    else:
        with context.progress(POOL_STEPS, "first inputs", "step") as bar:
            for where in torch.arange(len(state.pool.t)).split(config.distill_batch):
                state.pool.put(where, state.walkers, predict, schedule, seed)
                bar.update()
    last_save = time.monotonic()
    with context.progress(config.distill, "distill", "step") as bar, context.soft_stop() as stop_requested:
        bar.update(len(state.losses))
        while len(state.losses) < config.distill:
            distill_step(state, learn, predict, schedule, config, seed)
            bar.update()
            recent = state.losses[-50:]
            bar.show(f"velocity error {sum(recent) / len(recent):.4f}")
            stopping = stop_requested()
            if stopping or time.monotonic() - last_save >= context.save_interval:
                context.parts.save("distill", snapshot(state))
                last_save = time.monotonic()
            if stopping:
                raise KeyboardInterrupt
    return {name: module.cpu().packed() for name, module in state.tensors.items()}


def begin(
    checkpoint: Checkpoint,
    packed: Mapping[str, PackedTensor],
    config: QuantizeConfig,
    seed: int,
    device: torch.device,
) -> Distillation:
    """Before the first step. Learning rates are in steps of each tensor's grid, which formats make unlike."""
    tensors = {name: trainable(checkpoint.tensors[name], p).to(device) for name, p in packed.items()}
    groups: list[dict[str, Any]] = []
    for module in (rows for each in tensors.values() for rows in rows_of(each)):
        rate = config.distill_rate * module.step
        groups.append({"params": [module.weight], "lr": rate * (GRID_RATE if module.start.format.is_cast else 1.0)})
        if module.grid is not None:
            groups.append({"params": [module.grid], "lr": rate * GRID_RATE})
    on_cuda = device.type == "cuda"
    for group in groups:
        group["first"] = group["lr"]
        if on_cuda:  # a graph reads the rate where it is
            group["lr"] = torch.tensor(group["lr"], device=device)
    # A tensor is a group, a rate of its own, and fused a group is one kernel.
    optimizer = torch.optim.Adam(groups, betas=BETAS, capturable=on_cuda, fused=on_cuda)
    count = config.distill_batch
    walkers, pool = Walkers.begin(checkpoint.spec, count, seed), Pool.empty(checkpoint.spec, POOL_STEPS * count)
    return Distillation(tensors, optimizer, walkers, pool)


def learner(state: Distillation, teacher: nn.Module, spec: ModelSpec) -> Repeated:
    """One step of the optimizer on x, t, eps, abar and the scales of signal and noise of B inputs; returns the loss."""

    def student(x: Tensor, t: Tensor) -> Tensor:
        found: Tensor = functional_call(teacher, {name: module() for name, module in state.tensors.items()}, (x, t))
        return found

    def learn(x: Tensor, t: Tensor, eps: Tensor, abar: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        state.optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            error = noise_from_output(spec.prediction, x, student(x, t), (signal, noise)) - eps
            loss: Tensor = 0.5 * (error.square() / abar.clamp(min=LEAST_ABAR)).sum() / len(x)
            loss.backward()
        state.optimizer.step()
        return loss

    return Repeated(learn, next(teacher.parameters()).device)


def distill_step(
    state: Distillation,
    learn: Repeated,
    predict: PredictNoise,
    schedule: NoiseSchedule,
    config: QuantizeConfig,
    seed: int,
) -> None:
    """One optimizer step on inputs of the pool, which new ones replace. Rates fall to 0 by half a cosine."""
    pool, device = state.pool, learn.device
    draw = generator(seed, "distill batch", len(state.losses))
    chosen = torch.randperm(len(pool.t), generator=draw)[: config.distill_batch]
    x, t = pool.x[chosen].to(device, memory_format=torch.channels_last), pool.t[chosen]
    signal, noise = signal_and_noise_scale(schedule, t, x)
    for group in state.optimizer.param_groups:
        rate = group["first"] * 0.5 * (1 + math.cos(math.pi * len(state.losses) / config.distill))
        set_rate(group, rate)
    inputs = (t.to(device), pool.eps[chosen].to(device), pool.abar[chosen, None, None, None].to(device), signal, noise)
    loss = learn(x, *inputs).item()
    if not math.isfinite(loss):
        raise NumericalError(f"the velocity error is {loss} at step {len(state.losses)}", "lower --distill-rate")
    state.losses.append(loss)
    pool.put(chosen, state.walkers, predict, schedule, seed)


def snapshot(state: Distillation) -> Part:
    """Everything as plain tensors."""
    tensors = {f"{name}/{k}": v for name, module in state.tensors.items() for k, v in module.state_dict().items()}
    for index, values in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": v for k, v in values.items()}
    walkers = state.walkers
    tensors |= {"x": walkers.x, "position": walkers.position, "offset": walkers.offset}
    tensors |= {f"pool.{name}": values for name, values in vars(state.pool).items()}
    tensors["losses"] = torch.tensor(state.losses, dtype=torch.float64)
    return Part({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, {"runs": walkers.runs})


def restore(state: Distillation, part: Part) -> None:
    """Put ``part`` into a fresh ``state``, in place. Raises ConfigError where it does not fit."""
    try:
        tensors, runs = part.tensors, part.data["runs"]
        if not isinstance(runs, int):
            raise ValueError(f"{runs} runs")
        for name, module in state.tensors.items():
            module.load_state_dict({k: tensors[f"{name}/{k}"] for k in module.state_dict()})
        optimizer = state.optimizer.state_dict()
        optimizer["state"] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".", 2)
                optimizer["state"].setdefault(int(index), {})[name] = value
        state.optimizer.load_state_dict(optimizer)
        walkers = state.walkers
        for name in ("x", "position", "offset"):
            getattr(walkers, name).copy_(tensors[name])
        walkers.runs = runs
        for name, values in vars(state.pool).items():
            values.copy_(tensors[f"pool.{name}"])
        state.losses[:] = tensors["losses"].tolist()
    except (KeyError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"the saved distillation is of another recipe ({reason})", "start over with --force"
        ) from None
