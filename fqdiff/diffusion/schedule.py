"""Noise schedules and the algebra between noise, velocity and image.

Shapes: B batch, C channels, H W pixels, T num_train_timesteps. Timestep t in [0, T).
x_t = sqrt(alphas_cumprod[t]) * x_0 + sqrt(1 - alphas_cumprod[t]) * noise        (Ho et al. 2020, eq. 4)
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fqdiff.errors import ConfigError

SCHEDULES = ("linear", "cosine")
PREDICTIONS = ("eps", "v")  # what a network's output may stand for: the noise, or the velocity
MIN_SNR_GAMMA = 5.0


@dataclass(frozen=True)
class NoiseSchedule:
    """``betas`` [T] in float64 and what follows from them."""

    betas: Tensor

    @property
    def num_train_timesteps(self) -> int:
        return self.betas.numel()

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """[T], float64: the share of the image's variance left at each timestep."""
        return torch.cumprod(1 - self.betas, dim=0)


def make_schedule(name: str, num_train_timesteps: int) -> NoiseSchedule:
    """The schedule called ``name``.

    ``linear``: betas 1e-4 .. 0.02 for T = 1000 (Ho et al. 2020), scaled by 1000 / T for other T so that the image is gone
    at the end all the same. ``cosine``: Nichol and Dhariwal 2021, eq. 17, betas capped at 0.999.
    """
    if num_train_timesteps < 1:
        raise ConfigError(f"num_train_timesteps is {num_train_timesteps}", "use 1 or more, e.g. 1000")
    if name == "linear":
        scale = 1000 / num_train_timesteps
        betas = torch.linspace(scale * 1e-4, scale * 0.02, num_train_timesteps, dtype=torch.float64)
        return NoiseSchedule(betas.clamp(max=0.999))
    if name == "cosine":
        s = 0.008
        u = torch.linspace(0, 1, num_train_timesteps + 1, dtype=torch.float64)
        f = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2
        return NoiseSchedule((1 - f[1:] / f[:-1]).clamp(max=0.999))
    raise ConfigError(f"unknown noise schedule '{name}'", f"one of: {', '.join(SCHEDULES)}")


def signal_and_noise_scale(schedule: NoiseSchedule, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(alphas_cumprod[t]) and sqrt(1 - alphas_cumprod[t]) for t [B], shaped to multiply ``like`` [B, ...]."""
    alphas_cumprod = schedule.alphas_cumprod[t.cpu()]
    shape = (-1,) + (1,) * (like.ndim - 1)
    signal, noise = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
    return signal.to(like).view(shape), noise.to(like).view(shape)


def add_noise(schedule: NoiseSchedule, images: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t [B, C, H, W] from clean images, unit noise of the same shape and timesteps t [B]."""
    a, s = signal_and_noise_scale(schedule, t, images)
    return a * images + s * noise


def velocity(schedule: NoiseSchedule, images: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """v = sqrt(abar) * noise - sqrt(1 - abar) * x_0 (Salimans and Ho 2022, eq. 9)."""
    a, s = signal_and_noise_scale(schedule, t, images)
    return a * noise - s * images


def noise_from_velocity(schedule: NoiseSchedule, x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """The noise that velocity ``v`` stands for: sqrt(1 - abar) * x_t + sqrt(abar) * v."""
    return noise_from_output("v", x_t, v, signal_and_noise_scale(schedule, t, x_t))


def noise_from_output(prediction: str, x_t: Tensor, output: Tensor, scales: tuple[Tensor, Tensor]) -> Tensor:
    """The noise that a network's ``output`` stands for; ``scales`` of signal and noise, shaped to multiply ``x_t``."""
    if prediction == "eps":
        return output
    signal, noise = scales
    return noise * x_t + signal * output


def regression_target(
    schedule: NoiseSchedule, prediction: str, images: Tensor, noise: Tensor, t: Tensor
) -> tuple[Tensor, Tensor]:
    """What a network output should be, and the factor w with noise - eps_pred = w * (target - output).

    ``eps``: the noise itself, w = 1. ``v``: the velocity, w = sqrt(abar). Going through eps_pred instead would lose all
    digits near t = T, where w is below float32's resolution of the noise.
    """
    if prediction == "eps":
        return noise, torch.ones_like(noise[..., :1, :1, :1])
    return velocity(schedule, images, noise, t), signal_and_noise_scale(schedule, t, images)[0]


def loss_weight(schedule: NoiseSchedule, prediction: str, weighting: str, t: Tensor, like: Tensor) -> Tensor:
    """Weight of each sample's squared error in the training loss, t [B] -> shaped to multiply ``like`` [B, ...].

    ``uniform``: 1. ``min-snr``: min(SNR, 5) / SNR for eps, / (SNR + 1) for v, so that an error of the image implied counts
    min(SNR, 5) times at every t, SNR = abar / (1 - abar) (Hang et al. 2023, arXiv:2303.09556, section 3.4).
    """
    if weighting == "uniform":
        return torch.ones_like(like[..., :1, :1, :1])
    alphas_cumprod = schedule.alphas_cumprod[t.cpu()]
    snr = alphas_cumprod / (1 - alphas_cumprod)
    weight = snr.clamp(max=MIN_SNR_GAMMA) / (snr if prediction == "eps" else snr + 1)
    return weight.to(like).view((-1,) + (1,) * (like.ndim - 1))
