"""Ranges of activations: from their extremes, quantiles, or the range whose codes come closest to the numbers.

Closest by the squared or absolute error, the cosine, or the Kullback-Leibler divergence of the distributions: the
metrics that PTQ4DM (Shang et al. 2023, arXiv:2211.15736) compares. A number's weight
is how many it stands for. Shapes: G scales, n numbers of each, R bins of a histogram.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fqdiff.quant.activation_formats import ActivationFormat, activation_codes, activation_qparams, fake_quantize
from fqdiff.quant.qparams import QParams
from fqdiff.quant.ranges import PERCENTILE

WIDTHS = tuple(1 - step / 50 for step in range(50))  # of the whole range, tried from the widest on
BINS = 2048
Distance = Callable[[Tensor, Tensor, QParams, ActivationFormat, Tensor, Tensor], Tensor]


def activation_range(
    numbers: Tensor, weights: Tensor, low: Tensor, high: Tensor, fmt: ActivationFormat, span: str
) -> QParams:
    """Scales and zero points [G] by the range called ``span``, one of ACTIVATION_RANGES.

    ``numbers`` and ``weights`` float32 [G, n], between ``low`` and ``high`` [G], which are the extremes of more than those.
    """
    if span == "min-max":
        return activation_qparams(low, high, fmt)
    if span == "percentile":
        ends = [weighted_quantile(sign * numbers, weights, 1 - PERCENTILE) for sign in (1, -1)]
        return activation_qparams(ends[0], -ends[1], fmt)
    return closest_range(numbers, weights, low, high, fmt, DISTANCES[span])


def weighted_quantile(numbers: Tensor, weights: Tensor, share: float) -> Tensor:
    """The smallest of ``numbers`` [G, n] with more than ``share`` of the weight up to it, [G]."""
    ordered, order = numbers.sort(dim=1)
    reached = weights.double().gather(1, order).cumsum(dim=1)
    place = (reached <= share * reached[:, -1:]).sum(dim=1, keepdim=True)
    return ordered.gather(1, place)[:, 0]


def closest_range(
    numbers: Tensor, weights: Tensor, low: Tensor, high: Tensor, fmt: ActivationFormat, distance: Distance
) -> QParams:
    """The parameters with the least ``distance`` among ranges c * (low, high), then among those with one end moved.

    A search over widths and zero points, as PTQ4DM's, but along lines: both ends together, each alone from the whole range,
    then each alone from the best so far. An end that hardly anything reaches moves in without taking the other with it.
    Each scale is searched for on its own; ties go to the wider range.
    """
    best_low, best_high = low.clone(), high.clone()
    least = torch.full_like(low, float("inf"), dtype=torch.float64)

    def try_range(lower: Tensor, upper: Tensor) -> None:
        nonlocal best_low, best_high, least
        error = distance(numbers, weights, activation_qparams(lower, upper, fmt), fmt, low, high)
        better = error < least
        least = torch.where(better, error, least)
        best_low, best_high = torch.where(better, lower, best_low), torch.where(better, upper, best_high)

    for width in WIDTHS:
        try_range(width * low, width * high)
    if fmt.has_zero_points:  # all others have one number to choose
        for lower, upper in ((low, high), (None, None)):
            for width in WIDTHS:
                try_range(best_low if lower is None else lower, width * high)
            for width in WIDTHS:
                try_range(width * low, best_high if upper is None else upper)
    return activation_qparams(best_low, best_high, fmt)


def _back(numbers: Tensor, qparams: QParams, fmt: ActivationFormat) -> Tensor:
    return fake_quantize(numbers, qparams.scale[:, None], qparams.zero_point[:, None], fmt)


def _weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights).sum(dim=1, dtype=torch.float64)


def squared(
    numbers: Tensor, weights: Tensor, qparams: QParams, fmt: ActivationFormat, low: Tensor, high: Tensor
) -> Tensor:
    """Sum of squared errors, float64 [G]."""
    return _weighted_sum((_back(numbers, qparams, fmt) - numbers).square(), weights)


def absolute(
    numbers: Tensor, weights: Tensor, qparams: QParams, fmt: ActivationFormat, low: Tensor, high: Tensor
) -> Tensor:
    """Sum of absolute errors, float64 [G]."""
    return _weighted_sum((_back(numbers, qparams, fmt) - numbers).abs(), weights)


def cosine(
    numbers: Tensor, weights: Tensor, qparams: QParams, fmt: ActivationFormat, low: Tensor, high: Tensor
) -> Tensor:
    """1 - cosine between the numbers and what their codes give back, float64 [G]; 1 where all of these are 0."""
    back = _back(numbers, qparams, fmt)
    product = _weighted_sum(back * numbers, weights)
    norms = _weighted_sum(back.square(), weights) * _weighted_sum(numbers.square(), weights)
    return 1 - product / norms.clamp(min=1e-300).sqrt()


def divergence(
    numbers: Tensor, weights: Tensor, qparams: QParams, fmt: ActivationFormat, low: Tensor, high: Tensor
) -> Tensor:
    """KL divergence of the numbers' histogram from that of their codes, float64 [G] (TensorRT: Migacz 2017).

    R bins from ``low`` to ``high``. P: the histogram, what saturates counted in the last bin that does not. Q: the bins
    that do not saturate, each code's count spread evenly over its bins that are not empty.
    """
    width = ((high - low) / BINS).clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    bins = ((numbers - low[:, None]) / width).long().clamp(0, BINS - 1)
    counts = torch.zeros(len(numbers), BINS, dtype=torch.float64)
    counts.scatter_add_(1, bins, weights.double())
    centres = low[:, None] + (torch.arange(BINS) + 0.5) * width
    codes = activation_codes(centres, qparams.scale[:, None], qparams.zero_point[:, None], fmt).long()
    back = _back(centres, qparams, fmt)
    # A bin saturates where the nearest code is further away than half a step; logarithmic codes reach down to 0.
    step = qparams.scale.abs()[:, None] / 2
    beyond = (back - centres).abs() > step if fmt.kind != "log" else centres > qparams.scale[:, None]
    above, below = beyond & (centres > back), beyond & (centres < back)
    inside = counts.masked_fill(beyond, 0)
    first, last = (~beyond).double().argmax(dim=1), BINS - 1 - (~beyond).flip(1).double().argmax(dim=1)
    p = inside.clone()
    p.scatter_add_(1, last[:, None], (counts * above).sum(dim=1, keepdim=True))
    p.scatter_add_(1, first[:, None], (counts * below).sum(dim=1, keepdim=True))
    filled = (inside > 0).double()
    sums, members = (
        torch.zeros(len(codes), fmt.qmax + 2, dtype=torch.float64).scatter_add_(1, codes, values).gather(1, codes)
        for values in (inside, filled)
    )
    q = torch.where(inside > 0, sums / members.clamp(min=1), torch.zeros_like(sums))
    p, q = p / p.sum(dim=1, keepdim=True), q / q.sum(dim=1, keepdim=True).clamp(min=1e-300)
    return torch.where(p > 0, p * (p.clamp(min=1e-300) / q.clamp(min=1e-12)).log(), torch.zeros_like(p)).sum(dim=1)


DISTANCES: dict[str, Distance] = {"mse": squared, "l1": absolute, "cosine": cosine, "kl": divergence}
