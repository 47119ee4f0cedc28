"""Calibration inputs: the (x_t, t) that a sampler gives to the network, which noised data never are exactly.

Shapes: N inputs, C channels, H W pixels, B runs, m inputs kept of each, S steps of a run.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from fqdiff.diffusion.samplers import ddim, ddpm, sampling_timesteps
from fqdiff.diffusion.schedule import add_noise
from fqdiff.errors import NumericalError
from fqdiff.evidence.features import to_unit_range
from fqdiff.rng import generator
from fqdiff.values import ModelSpec, predict_noise

CHUNK = 32  # inputs in one forward pass; fixed, so that results depend neither on the batch size nor on the machine


@dataclass(frozen=True)
class CalibrationInputs:
    """``x_t`` float32 [N, C, H, W] and ``t`` int64 [N], on the CPU, timestep by timestep in the sampler's order."""

    x_t: Tensor
    t: Tensor

    def __len__(self) -> int:
        return len(self.t)

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(x_t, t) in pieces that fit one forward pass."""
        yield from zip(self.x_t.split(CHUNK), self.t.split(CHUNK), strict=True)


def every_timestep(spec: ModelSpec) -> CalibrationInputs:
    """One input for each timestep from 0 to T - 1, without an image in it: for what a network makes of t alone."""
    total = spec.noise_schedule().num_train_timesteps
    return CalibrationInputs(torch.zeros(total, *spec.image_shape), torch.arange(total))


@dataclass(frozen=True)
class Sampler:
    """Which sampler runs, in how many steps; ``eta`` is DDIM's randomness."""

    name: str
    steps: int
    eta: float = 0.0


@dataclass(frozen=True)
class Kept:
    """Inputs of some runs, step by step: ``x_t`` [N, C, H, W], ``t`` [N] as the network was given it, ``step`` [N]."""

    x_t: Tensor
    t: Tensor
    step: Tensor


def joined(pieces: Sequence[Kept]) -> CalibrationInputs:
    """The inputs of all ``pieces``, step by step, within a step in the order of ``pieces``."""
    order = torch.cat([p.step for p in pieces]).sort(stable=True).indices
    return CalibrationInputs(torch.cat([p.x_t for p in pieces])[order], torch.cat([p.t for p in pieces])[order])


def record_runs(
    spec: ModelSpec,
    network: nn.Module,
    sampler: Sampler,
    runs: Sequence[int],
    steps: Tensor,
    seed: int,
    device: torch.device,
    tick: Callable[[int], None] = lambda n: None,
) -> Kept:
    """What ``network`` is given at ``steps`` [B, m] of ``runs``; an input asked for twice is kept twice.

    Run k draws its first noise, then its step noise, from (seed, "calibration", k). Only what is kept stays in memory, and
    the runs end with their last step that is kept. ``tick`` is told of every image-step. Raises NumericalError where a
    run leaves the finite numbers.
    """
    predict, schedule = predict_noise(spec, network), spec.noise_schedule()
    generators = [generator(seed, "calibration", k) for k in runs]
    kept: list[Kept] = []
    step = 0

    def noting(x: Tensor, t: Tensor) -> Tensor:
        rows = (steps == step).nonzero()[:, 0]
        kept.append(Kept(x.cpu()[rows], t.cpu()[rows], torch.full((len(rows),), step)))
        return predict(x, t)

    def draw_noise() -> Tensor:
        return torch.stack([torch.randn(spec.image_shape, generator=g) for g in generators]).to(device)

    algorithm = partial(ddim, eta=sampler.eta) if sampler.name == "ddim" else ddpm
    last = int(steps.max())
    with torch.inference_mode():
        for _, image in algorithm(noting, draw_noise(), schedule, sampler.steps, draw_noise):
            tick(len(runs))
            if not torch.isfinite(image).all():
                raise NumericalError("calibration images hold NaN or infinity", "check the checkpoint")
            if step == last:
                break
            step += 1
    return Kept(torch.cat([k.x_t for k in kept]), torch.cat([k.t for k in kept]), torch.cat([k.step for k in kept]))


def noised_images(
    spec: ModelSpec, images: Tensor, sampler: Sampler, runs: Sequence[int], steps: Tensor, seed: int
) -> Kept:
    """Noised ``images``, uint8 [N, C, H, W], at the timesteps of ``steps`` [B, m] instead of what the sampler meets there.

    Run k draws its image, then the noise of each input, from (seed, "calibration", k).
    """
    schedule = spec.noise_schedule()
    timesteps = torch.tensor(sampling_timesteps(schedule.num_train_timesteps, sampler.steps))
    noise, chosen = [], []
    for k in runs:
        draw = generator(seed, "calibration", k)
        chosen.append(int(torch.randint(len(images), (), generator=draw)))
        noise.append(torch.randn(steps.shape[1], *spec.image_shape, generator=draw))
    step = steps.flatten()
    x_0 = to_unit_range(images[chosen]).repeat_interleave(steps.shape[1], dim=0)
    x_t = add_noise(schedule, x_0, torch.cat(noise), timesteps[step])
    order = step.sort(stable=True).indices
    return Kept(x_t[order], timesteps[step][order], step[order])


def sampler_inputs(
    spec: ModelSpec,
    network: nn.Module,
    images: int,
    steps: int,
    seed: int,
    device: torch.device,
    tick: Callable[[int], None] = lambda n: None,
) -> CalibrationInputs:
    """What ``network`` is given by ``steps`` steps of DDIM (eta = 0) for each of ``images`` images.

    Image k starts from the noise of (seed, "calibration", k). ``tick`` is told of every image-step. Raises NumericalError
    where the run leaves the finite numbers.
    """
    every, sampler = torch.arange(steps), Sampler("ddim", steps)
    return joined(
        [
            record_runs(spec, network, sampler, ks.tolist(), every.expand(len(ks), steps), seed, device, tick)
            for ks in torch.arange(images).split(CHUNK)
        ]
    )
