"""Kernel distance, KID (Binkowski et al. 2018, arXiv:1801.01401): unbiased squared MMD, kernel (x.y / D + 1)^3, in float64.

Shapes: N images in each set, D features, R resamples.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fqdiff.errors import DataError

ROWS = 500  # of the kernel matrix in memory at once


def polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x.y / D + 1)^3 of every pair: [N, M] from ``x`` [N, D] and ``y`` [M, D]."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """KID over all pairs of ``a`` [N, D] and ``b`` [M, D]: eq. 4 of the paper, without pairs of one image with itself.

    Unbiased, hence sometimes below 0.
    """
    once = [(x, torch.ones(1, len(x), dtype=torch.int32, device=x.device)) for x in (a, b)]
    return float(kernel_draws(*once[0], once[1:]))


def block_distances(a: Tensor, b: Tensor, size: int) -> Tensor:
    """KID of consecutive blocks of ``size`` images, which are independent of each other; float64 [N // size].

    Their mean is unbiased for KID, their variance over their number estimates that mean's: the B-test of Zaremba et al.
    2013 (arXiv:1307.1954). Raises DataError with fewer than two blocks.
    """
    blocks = min(len(a), len(b)) // size
    if size < 2 or blocks < 2:
        raise DataError(
            f"{min(len(a), len(b))} images in blocks of {size}", "blocks of two images or more, and two of them or more"
        )
    pairs = [(a[k * size : (k + 1) * size], b[k * size : (k + 1) * size]) for k in range(blocks)]
    return torch.tensor([kernel_distance(x, y) for x, y in pairs], dtype=torch.float64)


def kernel_draws(
    reference: Tensor,
    reference_counts: Tensor,
    sets: list[tuple[Tensor, Tensor]],
    tick: Callable[[int], None] = lambda n: None,
) -> Tensor:
    """KID to ``reference`` [N, D] of each of M ``sets`` (features, counts [R, N]) in each resample; float64 [R, M].

    Each pair of different images counts as often as both were drawn; pairs of one image with itself stay out, so that drawing
    an image twice does not look like closeness. ``tick`` is told of each set.
    """
    within = _within(reference, reference_counts)
    distances = []
    for features, counts in sets:
        between = _between(reference, reference_counts, features, counts)
        distances.append(within + _within(features, counts) - 2 * between)
        tick(1)
    return torch.stack(distances, dim=1)


def _within(x: Tensor, counts: Tensor) -> Tensor:
    """Mean kernel over ordered pairs of different images as ``counts`` [R, N] draws them; [R]."""
    x, weights = x.double(), counts.double()
    squares = weights.square()
    total = torch.zeros_like(weights[:, 0])
    for part in torch.arange(len(x)).split(ROWS):
        total += (weights[:, part] @ polynomial_kernel(x[part], x) * weights).sum(dim=1)
    own = (x.square().sum(dim=1) / x.shape[1] + 1) ** 3
    pairs: Tensor = (total - squares @ own) / (weights.sum(dim=1).square() - squares.sum(dim=1))
    return pairs


def _between(x: Tensor, counts: Tensor, y: Tensor, other: Tensor) -> Tensor:
    """Mean kernel over pairs of one image of each set; [R]."""
    x, y, left, right = x.double(), y.double(), counts.double(), other.double()
    total = torch.zeros_like(left[:, 0])
    for part in torch.arange(len(x)).split(ROWS):
        total += (left[:, part] @ polynomial_kernel(x[part], y) * right).sum(dim=1)
    pairs: Tensor = total / (left.sum(dim=1) * right.sum(dim=1))
    return pairs
