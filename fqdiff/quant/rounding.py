"""From weights to codes on a given grid: to the nearest, or so that errors cancel where their sums matter.

Shapes: O output channels, I input channels, k weights of one kernel.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from fqdiff.configs import ROUNDINGS
from fqdiff.errors import ConfigError
from fqdiff.quant.formats import Format, Granularity, PerChannel
from fqdiff.quant.qparams import QParams, from_rows, group_rows, quantize
from fqdiff.quant.ranges import MIN_MAX

NEAREST, SQUANT = ROUNDINGS


def rounded(x: Tensor, qparams: QParams, fmt: Format, granularity: Granularity, rounding: str) -> Tensor:
    """Codes of ``x`` by the rounding called ``rounding``, one of ROUNDINGS; only integers have a choice."""
    if rounding == NEAREST or not fmt.is_integer:
        return quantize(x, qparams, fmt, granularity)
    if not isinstance(granularity, PerChannel):
        raise ConfigError(
            f"squant with scales by {granularity}", "its sums are over channels: use --granularity channel"
        )
    rows = group_rows(x, granularity) / qparams.scale[:, None] + qparams.zero_point[:, None]
    kernel = torch.Size(x.shape[2:]).numel() if x.ndim > 2 else 1
    codes = squant(rows, kernel, fmt.qmax).to(torch.uint8)
    return from_rows(codes, tuple(x.shape), granularity)


def check_ranges(rounding: str, ranges: Iterable[str]) -> None:
    """Raise ConfigError for squant with ranges that cut weights off: all of these err in one direction, beyond any mending."""
    if rounding == SQUANT and (cutting := [span for span in ranges if span != MIN_MAX]):
        raise ConfigError(
            f"squant with the range {', '.join(cutting)}, outside of which no sum of errors can be mended",
            f"squant goes with --range {MIN_MAX}",
        )


def squant(rows: Tensor, kernel: int, qmax: int) -> Tensor:
    """Codes from 0 to ``qmax`` for ``rows`` [O, I * kernel], in grid units, by SQuant (Guo et al. 2022, arXiv:2202.07471).

    Rounded to nearest first. Then, in each kernel, as many as its errors sum to are turned the other way, those with the
    largest errors of the sum's sign: each kernel's sum is at most 1/2. Then the same in each channel, with one weight of each
    kernel to choose from: each channel's sum is at most 1/2, that of a kernel below 1. All this as far as there are weights to
    turn: what lies beyond the range stays at its end, and others make up for it. A kernel of one weight has no sum to mend:
    there all weights of a channel are one kernel.
    """
    channels, count = rows.shape
    kernels = rows.reshape(-1, kernel) if kernel > 1 else rows
    codes = kernels.round().clamp(0, qmax)
    codes, error, candidate, turn = _turned(codes, codes - kernels, qmax)
    if kernel == 1:
        return codes.reshape(channels, count)
    total = error.sum(dim=1).view(channels, -1).sum(dim=1)
    own = error.gather(1, candidate[:, None]).view(channels, -1).abs()
    able = torch.where(turn.view(channels, -1) * total[:, None] < 0, own, torch.full_like(own, -1.0))
    chosen = _top(able, total.abs().round().long()) & (able >= 0)
    step = torch.where(chosen, turn.view(channels, -1), torch.zeros_like(own)).view(-1, 1)
    return codes.scatter_add(1, candidate[:, None], step).reshape(channels, count)


def _turned(codes: Tensor, error: Tensor, qmax: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes and errors with each row's sum of errors brought to at most 1/2.

    And the position of one more that may turn, with the step it would take, 0 where it may not: the next in order, or, where
    the sum has changed its sign, the last one back.
    """
    total = error.sum(dim=1, keepdim=True)
    sign = total.sign()
    inside = (codes - sign >= 0) & (codes - sign <= qmax)
    gain = torch.where(inside, error * sign, torch.full_like(error, -1.0))
    needed = torch.minimum(total.abs().round().long(), (gain > 0).sum(dim=1, keepdim=True))
    order = gain.argsort(dim=1, descending=True, stable=True)
    step = torch.where(_places(order) < needed, sign, torch.zeros_like(sign))
    too_far = (needed >= total.abs()) & (needed > 0)
    position = torch.where(too_far, needed - 1, needed).clamp(max=codes.shape[1] - 1)
    candidate = order.gather(1, position)
    able = too_far | (gain.gather(1, candidate) > 0)
    turn = torch.where(able, torch.where(too_far, sign, -sign), torch.zeros_like(sign))
    return codes - step, error - step, candidate.squeeze(1), turn.squeeze(1)


def _places(order: Tensor) -> Tensor:
    """Rank of each element, from the ``order`` of each row."""
    ranks = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, ranks)


def _top(values: Tensor, count: Tensor) -> Tensor:
    """Whether each of ``values`` [O, I] is among the ``count`` [O] largest of its row."""
    return _places(values.argsort(dim=1, descending=True, stable=True)) < count[:, None]
