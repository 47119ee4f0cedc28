"""Training of a noise predictor: images in, a checkpoint holding the averaged (EMA) weights out.

Shapes: B batch, C channels, H W pixels.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from fqdiff import distributed
from fqdiff.configs import TrainConfig
from fqdiff.context import Context, Part
from fqdiff.diffusion.schedule import NoiseSchedule, add_noise, loss_weight, regression_target
from fqdiff.errors import ConfigError, DataError, NumericalError
from fqdiff.evidence.features import to_unit_range
from fqdiff.models.registry import build
from fqdiff.preview import preview
from fqdiff.rng import derive_seed, generator
from fqdiff.values import Checkpoint, Dataset, ModelSpec

LONG_STEP = 10.0  # seconds; a step that takes longer is not timed in full


@dataclass
class Training:
    """The running state: everything a killed run needs to continue bit-identically."""

    network: nn.Module
    average: AveragedModel
    optimizer: torch.optim.Optimizer
    step: int
    loss: Tensor


def train(dataset: Dataset, init: Checkpoint | None, config: TrainConfig, seed: int, context: Context) -> Checkpoint:
    """The checkpoint after ``config.steps`` optimizer steps on the training images of ``dataset``.

    Starts from the weights of ``init``, from fresh ones without it. Every draw of step k comes from (seed, label, k), so a
    run that continues from a saved part ends with the same bits as one that was never stopped. Raises NumericalError on a
    loss or gradient that is not finite, ConfigError where ``init`` is another network.
    """
    spec = ModelSpec(config.architecture, config.schedule, config.prediction)
    images = dataset.train
    if tuple(images.shape[1:]) != spec.image_shape:
        raise DataError(
            f"images of shape {tuple(images.shape[1:])} for a network of {spec.image_shape}",
            "match --image-size to the preset",
        )
    images = images.to(context.device)
    schedule = spec.noise_schedule()
    state = initial_state(spec, config, seed, context.device, init)
    saved = context.parts.load("state")
    if saved is not None:
        restore(state, saved)
    forward = distributed.wrap(state.network)
    last_save = time.monotonic()
    with context.progress(config.steps, "train", "step") as bar, context.soft_stop() as stop_requested:
        bar.update(state.step)
        while state.step < config.steps:
            try:
                train_step(state, forward, images, schedule, config, seed)
            except NumericalError:
                save(state, context)  # the step that failed has changed nothing
                raise
            bar.update()
            bar.show(f"loss {float(state.loss[max(0, state.step - 50) : state.step].mean()):.4f}")
            stopping = distributed.agree(stop_requested())
            if stopping or time.monotonic() - last_save >= context.save_interval:
                save(state, context)
                last_save = time.monotonic()
            if stopping:
                raise KeyboardInterrupt
    tensors = {name: p.detach().cpu().contiguous() for name, p in state.average.module.named_parameters()}
    return Checkpoint(spec, tensors, state.loss, preview(spec, tensors, seed, context.device))


def initial_state(
    spec: ModelSpec, config: TrainConfig, seed: int, device: torch.device, init: Checkpoint | None = None
) -> Training:
    """The weights of ``init``, or fresh ones drawn from (seed, "weights"), with their optimizer and average."""
    if init is not None and init.spec != spec:
        raise ConfigError(
            "the checkpoint to start from is another network, or has another schedule or prediction",
            "give the --preset, --image-size, --schedule and --prediction it was trained with",
        )
    with torch.random.fork_rng(devices=[]):  # torch's initialisers draw from the global generator
        torch.manual_seed(derive_seed(seed, "weights"))
        network = build(spec.architecture)
    if init is not None:
        network.load_state_dict(dict(init.tensors))
    network = network.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    # Warm-up of the average: early on it follows the weights, so that a short run is not averaged with its own start.
    average = AveragedModel(network, multi_avg_fn=lambda old, new, n: _average(old, new, n, config.ema_decay))
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    optimizer = kind(network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    return Training(network, average, optimizer, 0, torch.zeros(config.steps))


def _average(old: Sequence[Tensor], new: Sequence[Tensor], count: Tensor | int, decay: float) -> None:
    warm = (1 + float(count)) / (10 + float(count))
    torch._foreach_lerp_(list(old), list(new), 1 - min(decay, warm))


def learning_rate(config: TrainConfig, step: int) -> float:
    """Rate of ``step``: linear warm-up, then constant or a half cosine to zero."""
    rate = config.learning_rate * min(1.0, (step + 1) / max(1, config.warmup))
    if config.decay == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * step / config.steps))
    return rate


def train_step(
    state: Training, forward: nn.Module, images: Tensor, schedule: NoiseSchedule, config: TrainConfig, seed: int
) -> None:
    """One optimizer step, in place. ``images`` uint8 [N, C, H, W]; each process takes its share of the batch."""
    mine = slice(distributed.rank(), None, distributed.world_size())
    draw = generator(seed, "train", state.step)
    chosen = batch_indices(len(images), config.batch_size, state.step, seed)
    t = torch.randint(schedule.num_train_timesteps, (len(chosen),), generator=draw)[mine].to(images.device)
    noise = torch.randn(len(chosen), *images.shape[1:], generator=draw)[mine].to(images.device)
    x_0 = to_unit_range(images[chosen[mine].to(images.device)])
    x_t = add_noise(schedule, x_0, noise, t).contiguous(memory_format=torch.channels_last)
    target, _ = regression_target(schedule, config.prediction, x_0, noise, t)
    weight = loss_weight(schedule, config.prediction, config.weighting, t, x_t)

    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(config, state.step)
    # Dropout can draw only from the global generator: seed it for this step, and give it back afterwards.
    devices = [images.device] if images.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derive_seed(seed, "dropout", state.step, distributed.rank()))
        with torch.autocast(images.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            loss = (weight * (forward(x_t, t).float() - target).square()).mean()
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(state.network.parameters(), config.clip_norm or math.inf)
    if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
        raise NumericalError(
            f"loss {loss.item():g}, gradient norm {norm.item():g} at step {state.step}",
            "the last good state is kept; lower --learning-rate, or lengthen --warmup",
        )
    state.optimizer.step()
    state.average.update_parameters(state.network)
    state.loss[state.step] = distributed.mean(loss.detach()).item()
    state.step += 1


def batch_indices(count: int, batch_size: int, step: int, seed: int) -> Tensor:
    """Which images step ``step`` sees: consecutive pieces of one endless row of shuffled epochs."""
    positions = torch.arange(step * batch_size, (step + 1) * batch_size)
    epochs = {
        int(e): torch.randperm(count, generator=generator(seed, "epoch", int(e))) for e in (positions // count).unique()
    }
    return torch.stack([epochs[int(p) // count][int(p) % count] for p in positions])


def save(state: Training, context: Context) -> None:
    """Keep ``state``, from the first process only."""
    if distributed.rank() == 0:
        context.parts.save("state", snapshot(state))


def snapshot(state: Training) -> Part:
    """Weights, averaged weights, optimizer state and losses as plain tensors."""
    tensors = {f"network.{k}": v for k, v in state.network.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in state.average.state_dict().items()}
    for index, values in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": v for k, v in values.items()}
    tensors["loss"] = state.loss
    return Part({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, {"step": state.step})


def restore(state: Training, part: Part) -> None:
    """Put ``part`` into a fresh ``state``, in place. Raises ConfigError where it does not fit."""

    def section(prefix: str) -> Mapping[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in part.tensors.items() if k.startswith(prefix)}

    try:
        step = part.data["step"]
        if not isinstance(step, int) or not 0 <= step <= len(state.loss):
            raise ValueError(f"step {step} of {len(state.loss)}")
        state.network.load_state_dict(section("network."))
        state.average.load_state_dict(section("average."))
        optimizer = state.optimizer.state_dict()
        optimizer["state"] = {}
        for key, value in section("optimizer.").items():
            index, name = key.split(".", 1)
            optimizer["state"].setdefault(int(index), {})[name] = value
        state.optimizer.load_state_dict(optimizer)
        state.loss.copy_(part.tensors["loss"])
    except (KeyError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"the saved training state is of another recipe ({reason})", "start over with --force"
        ) from None
    state.step = step


def estimate_seconds(config: TrainConfig, device: torch.device) -> float:
    """What training will take, from timing a few steps on random weights: full batches where they are quick enough."""
    spec = ModelSpec(config.architecture, config.schedule, config.prediction)
    schedule = spec.noise_schedule()
    probe = min(4, config.batch_size)
    while True:
        short = TrainConfig(**{**vars(config), "batch_size": probe, "steps": 3})
        state = initial_state(spec, short, 0, device)
        images = torch.zeros(probe, *spec.image_shape, dtype=torch.uint8, device=device)
        step_seconds = math.inf
        for _ in range(short.steps):
            start = time.monotonic()
            train_step(state, state.network, images, schedule, short, 0)
            step_seconds = min(step_seconds, time.monotonic() - start)
        seconds = step_seconds * config.batch_size / probe
        if probe == config.batch_size or seconds > LONG_STEP:
            return seconds / distributed.processes_launched() * config.steps
        probe = config.batch_size
