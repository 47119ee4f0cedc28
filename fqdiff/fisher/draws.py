"""Which image, noise and target each sample gets.

Shapes: B samples, C channels, H W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fqdiff.configs import FisherConfig
from fqdiff.diffusion.schedule import add_noise, regression_target
from fqdiff.errors import ConfigError
from fqdiff.evidence.features import to_unit_range
from fqdiff.rng import generator
from fqdiff.values import ModelSpec


@dataclass(frozen=True)
class Batch:
    """Samples, timestep by timestep. ``noise - eps_pred = weight * (target - output)``, one weight for each sample.

    ``x_t``, ``target``, ``model_noise`` [B, C, H, W], ``t`` int64 [B], ``weight`` float64 [B]. ``model_noise`` is what a true
    Fisher draws in place of the residual.
    """

    x_t: Tensor
    t: Tensor
    target: Tensor
    weight: Tensor
    model_noise: Tensor


def evenly_spaced_timesteps(num_train_timesteps: int, count: int) -> Tensor:
    """``count`` increasing timesteps from 0 to T - 1, both ends included."""
    if count > num_train_timesteps:
        raise ConfigError(
            f"{count} timesteps of a model that has {num_train_timesteps}", f"use 1 to {num_train_timesteps}"
        )
    return torch.linspace(0, num_train_timesteps - 1, count, dtype=torch.float64).round().long()


def antithetic(config: FisherConfig) -> bool:
    """Whether samples come in pairs of opposite noise."""
    return config.variance_reduction in ("antithetic", "both")


def draw_batch(
    images: Tensor, spec: ModelSpec, timesteps: Sequence[int], samples: range, config: FisherConfig, seed: int
) -> Batch:
    """Samples ``samples`` at each of ``timesteps``, images uint8 [N, C, H, W].

    Sample n at timestep t draws from (seed, "fisher", t, n) alone, so nothing depends on how the work is cut. ``common``
    leaves t out: the same images and noise at every timestep. ``antithetic`` gives 2 k and 2 k + 1 the same image and
    opposite noise.
    """
    chosen, noise, model_noise = [], [], []
    for t in timesteps:
        when = () if config.variance_reduction in ("common", "both") else (t,)
        for n in samples:
            draw = generator(seed, "fisher", *when, n // 2 if antithetic(config) else n)
            chosen.append(int(torch.randint(len(images), (), generator=draw)))
            sign = -1 if antithetic(config) and n % 2 else 1
            noise.append(sign * torch.randn(images.shape[1:], generator=draw))
            if config.kind == "true":
                draw = generator(seed, "fisher target", *when, n)
                model_noise.append(torch.randn(images.shape[1:], generator=draw))
    t_all = torch.tensor(timesteps).repeat_interleave(len(samples))
    schedule, x_0, noise_all = spec.noise_schedule(), to_unit_range(images[chosen]), torch.stack(noise)
    target, _ = regression_target(schedule, spec.prediction, x_0, noise_all, t_all)
    weight = residual_weight(spec, t_all)
    drawn = torch.stack(model_noise) if model_noise else torch.empty(0)
    return Batch(add_noise(schedule, x_0, noise_all, t_all), t_all, target, weight, drawn)


def residual_weight(spec: ModelSpec, t: Tensor) -> Tensor:
    """w [B], float64, with noise - eps_pred = w * (target - output)."""
    like = torch.zeros(len(t), 1, 1, 1, dtype=torch.float64)
    return regression_target(spec.noise_schedule(), spec.prediction, like, like, t)[1].flatten()
