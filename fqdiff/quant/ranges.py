"""Which range of weights the codes of an integer format span: that of all weights, or a narrower one.

A narrow range spends fewer steps on outliers, which saturate instead. A trap as much as a tool: every saturated weight
shrinks in the same direction, so that the errors add up where those of rounding cancel. The weight error falls, and the
output error may rise.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fqdiff.configs import RANGES
from fqdiff.errors import ConfigError
from fqdiff.quant.formats import Format, Granularity
from fqdiff.quant.qparams import (
    QParams,
    check_finite,
    choose_qparams,
    dequantize,
    group_rows,
    quantize,
    range_qparams,
    row_sizes,
)

SHRINKS = tuple(1 - 0.01 * step for step in range(80))
COARSE = tuple(
    1 - 0.04 * step for step in range(20)
)  # a quarter of the time, and within a few thousandths of the least error
PERCENTILE = 0.999  # of a group's weights on each side lie within the range
MIN_MAX, MSE, FISHER, WITHIN = RANGES


def fitted_qparams(
    x: Tensor, fmt: Format, granularity: Granularity, span: str = MIN_MAX, weight: Tensor | None = None
) -> QParams:
    """Parameters by the range called ``span``, one of RANGES; ``weight``, shaped like ``x``, is read by ``fisher`` alone.

    Only integers have a range to choose; a ternary scale is that of least (weighted) error for any ``span``.
    """
    if span == FISHER and weight is None:
        raise ConfigError(
            "a range by Fisher values without the values of single weights",
            "name a table that has them, fqdiff plan TABLE; fqdiff fisher --granularity weight makes one",
        )
    if not fmt.is_integer or span == MIN_MAX:
        return choose_qparams(x, fmt, granularity, weight if span == FISHER else None)
    if span == WITHIN:
        return percentile_qparams(x, fmt, granularity)
    return least_error_qparams(x, fmt, granularity, weight if span == FISHER else None, COARSE)


def percentile_qparams(x: Tensor, fmt: Format, granularity: Granularity) -> QParams:
    """Parameters of the range that leaves a thousandth of each group's weights outside on either side."""
    check_finite(x)
    rows = group_rows(x, granularity)
    sizes = row_sizes(tuple(x.shape), granularity).to(x.device)
    padding = torch.arange(rows.shape[1], device=x.device) >= sizes[:, None]
    ordered = rows.masked_fill(padding, float("inf")).sort(dim=1).values
    beyond = ((1 - PERCENTILE) * sizes.double()).long()
    low, high = (ordered.gather(1, place[:, None])[:, 0] for place in (beyond, sizes - 1 - beyond))
    return range_qparams(low, high, fmt, granularity.scale_dtype)


def least_error_qparams(
    x: Tensor,
    fmt: Format,
    granularity: Granularity,
    weight: Tensor | None = None,
    shrinks: Sequence[float] = SHRINKS,
) -> QParams:
    """Parameters of the range c * (min, max), c in ``shrinks``, falling, with the least squared error, group by group.

    The search of Q-Diffusion (Li et al. 2023) and BRECQ, with the square for the error, each weighted by ``weight`` where it
    is given. Ties go to the wider range.
    """
    check_finite(x)
    rows = group_rows(x, granularity)
    low, high = rows.amin(dim=1), rows.amax(dim=1)
    best = range_qparams(low, high, fmt, granularity.scale_dtype)
    weights = None if weight is None else group_rows(weight, granularity).double()
    least = torch.full((len(rows),), float("inf"), dtype=torch.float64, device=x.device)
    for shrink in shrinks:
        qparams = range_qparams(shrink * low, shrink * high, fmt, granularity.scale_dtype)
        back = dequantize(quantize(x, qparams, fmt, granularity), qparams, granularity)
        error = group_rows(back - x, granularity).double().square()
        error = (error if weights is None else error * weights).sum(dim=1)
        better = error < least
        least = torch.where(better, error, least)
        best = QParams(
            torch.where(better, qparams.scale, best.scale), torch.where(better, qparams.zero_point, best.zero_point)
        )
    return best
