"""Noised images on which rises are measured and scores computed, spread over the timesteps.

Shapes: N inputs, C channels, H W pixels, K timesteps.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fqdiff.diffusion.schedule import add_noise, regression_target
from fqdiff.errors import ConfigError
from fqdiff.evidence.features import to_unit_range
from fqdiff.rng import generator
from fqdiff.values import ModelSpec

CHUNK = 40  # inputs in one forward pass; fixed, so that results do not depend on the machine


@dataclass(frozen=True)
class Inputs:
    """``x_t`` [N, C, H, W], ``t`` [N], what the network's output should be (``target``), and ``weight`` [N, 1, 1, 1], with
    noise - eps_pred = weight * (target - output). ``share`` [N], float64: each input's part in a mean over all timesteps.
    """

    x_t: Tensor
    t: Tensor
    target: Tensor
    weight: Tensor
    share: Tensor

    def __len__(self) -> int:
        return len(self.t)

    def chosen(self, index: Tensor) -> "Inputs":
        """The inputs that ``index`` picks; shares keep their sum of 1."""
        share = self.share[index]
        return Inputs(self.x_t[index], self.t[index], self.target[index], self.weight[index], share / share.sum())

    def parts(self, size: int) -> "list[Inputs]":
        """In pieces of ``size``, shares as they are."""
        pieces = torch.arange(len(self)).split(size)
        return [Inputs(self.x_t[i], self.t[i], self.target[i], self.weight[i], self.share[i]) for i in pieces]

    def chunks(self) -> "list[Inputs]":
        """In pieces that fit one forward pass, shares as they are."""
        return self.parts(CHUNK)

    def to(self, device: torch.device) -> "Inputs":
        """On ``device``, all but the shares."""
        x_t, t, target, weight = (values.to(device) for values in (self.x_t, self.t, self.target, self.weight))
        return Inputs(x_t, t, target, weight, self.share)


def graded_timesteps(num_train_timesteps: int, count: int) -> tuple[Tensor, Tensor]:
    """Timesteps int64 [K], increasing, and their weights float64 [K] in a mean over all timesteps, which sum to 1.

    Midpoints of ``count`` strata [T (k / count)^2, T ((k + 1) / count)^2), each weighted by its width: dense near t = 0,
    where errors grow by orders of magnitude from one timestep to the next. Evenly spaced ones would either leave that end
    out or, with t = 0 among them, count it fifty times too much. Strata narrower than a timestep join: K may be less than
    ``count``.
    """
    if count > num_train_timesteps:
        raise ConfigError(
            f"{count} timesteps of a model that has {num_train_timesteps}", f"use 1 to {num_train_timesteps}"
        )
    edges = num_train_timesteps * torch.linspace(0, 1, count + 1, dtype=torch.float64).square()
    timesteps, stratum = ((edges[:-1] + edges[1:]) / 2).long().unique(return_inverse=True)
    widths = (edges[1:] - edges[:-1]) / num_train_timesteps
    return timesteps, torch.zeros(len(timesteps), dtype=torch.float64).index_add_(0, stratum, widths)


def draw_inputs(
    images: Tensor, spec: ModelSpec, timesteps: Tensor, weights: Tensor, samples: int, seed: int, label: str
) -> Inputs:
    """``samples`` inputs at each of ``timesteps``, timestep by timestep. ``images`` uint8 [N, C, H, W].

    Input n at timestep t draws its image and noise from (seed, label, t, n).
    """
    chosen, noise = [], []
    for t in timesteps.tolist():
        for n in range(samples):
            draw = generator(seed, label, t, n)
            chosen.append(int(torch.randint(len(images), (), generator=draw)))
            noise.append(torch.randn(images.shape[1:], generator=draw))
    schedule, t_all = spec.noise_schedule(), timesteps.repeat_interleave(samples)
    x_0, noise_all = to_unit_range(images[chosen]), torch.stack(noise)
    target, weight = regression_target(schedule, spec.prediction, x_0, noise_all, t_all)
    x_t = add_noise(schedule, x_0, noise_all, t_all)
    return Inputs(x_t, t_all, target, weight, weights.repeat_interleave(samples) / samples)
