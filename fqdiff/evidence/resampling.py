"""Bootstrap resamples as counts: how often each image is drawn. Shared counts are what pairs two models.

Shapes: N images, R resamples.
"""

import math

import torch
from torch import Tensor


def draw_counts(images: int, resamples: int, generator: torch.Generator) -> Tensor:
    """int32 [R, N]: how often each of N images is drawn in each of R resamples of N, with replacement.

    Resample r takes the r-th N numbers of ``generator``: a shorter run starts with the same resamples.
    """
    counts = [
        torch.randint(images, (images,), generator=generator).bincount(minlength=images) for _ in range(resamples)
    ]
    return torch.stack(counts).int()


def widened(draws: Tensor, values: Tensor, samples: int) -> Tensor:
    """``draws`` [R, ...] of means ``values`` [...] of so many samples, with the spread that such means have.

    Resamples of n samples spread by (n - 1) / n of the variance of a mean of n: with two by half of it.
    """
    return values + (draws - values) * math.sqrt(samples / (samples - 1))


def mean_draws(values: Tensor, counts: Tensor) -> Tensor:
    """Mean of ``values`` [N] in each resample of ``counts`` [R, N]; float64 [R]."""
    return counts.double() @ values.double() / len(values)
