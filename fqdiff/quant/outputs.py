"""Output channels of one tensor in two formats: which are in which, and how both are stored as one.

The channels in the format ``high`` and the others are two tensors with their output axis first. Parts of one name and dtype are
stored end to end, one after the other, so that a tensor of two formats has hardly more lines in the file's header than others.
Shapes: O output channels, k of them in ``high``.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fqdiff.quant.formats import PerChannel, PerGroup

HIGH = "high_"
INDEX = "kept_index"
Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
Shape = tuple[int, ...]


def row_shapes(shape: Shape, axis: int, count: int) -> tuple[Shape, Shape]:
    """Shapes of the O - ``count`` channels that are not in ``high``, and of the others, output channels first."""
    others = (*shape[:axis], *shape[axis + 1 :])
    return (shape[axis] - count, *others), (count, *others)


def with_rows_first(scales: PerChannel | PerGroup) -> PerChannel | PerGroup:
    """``scales`` for tensors with their output channels first."""
    dtype = scales.scale_dtype
    return PerChannel(0, dtype) if isinstance(scales, PerChannel) else PerGroup(scales.group_size, 0, dtype)


def joined_layout(low: Layout, high: Layout) -> dict[str, tuple[torch.dtype, Shape]]:
    """dtype and shape of the parts of both tensors as they are stored, without the index."""
    found = dict(low)
    for name, (dtype, shape) in high.items():
        if name not in low:
            found[name] = (dtype, shape)
        elif low[name][0] == dtype:
            found[name] = (dtype, (torch.Size(low[name][1]).numel() + torch.Size(shape).numel(),))
        else:
            found[HIGH + name] = (dtype, shape)
    return found


def joined_parts(low: Mapping[str, Tensor], high: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parts of both tensors as they are stored: see :func:`joined_layout`."""
    found = dict(low)
    for name, part in high.items():
        if name not in low:
            found[name] = part
        elif low[name].dtype == part.dtype:
            found[name] = torch.cat([low[name].flatten(), part.flatten()])
        else:
            found[HIGH + name] = part
    return found


def separated_parts(
    parts: Mapping[str, Tensor], low: Layout, high: Layout
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The inverse of :func:`joined_parts`, from the layouts of both."""
    first: dict[str, Tensor] = {}
    second: dict[str, Tensor] = {}
    for name, (dtype, shape) in low.items():
        first[name] = parts[name]
        if name in high and high[name][0] == dtype:
            border = torch.Size(shape).numel()
            first[name] = parts[name][:border].view(shape)
            second[name] = parts[name][border:].view(high[name][1])
    for name in high:
        if name not in second:
            second[name] = parts[HIGH + name] if name in low else parts[name]
    return first, second


def separated(x: Tensor, axis: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The channels of ``x`` that are not at ``positions``, increasing int64 [k], and those that are; output channels first."""
    rows = x.movedim(axis, 0)
    others = torch.ones(len(rows), dtype=torch.bool, device=x.device)
    others[positions] = False
    return rows[others].contiguous(), rows[positions].contiguous()


def together(low: Tensor, high: Tensor, axis: int, positions: Tensor) -> Tensor:
    """The inverse of :func:`separated`; contiguous."""
    return in_order(low, high, axis, channel_order(positions, len(low) + len(high)))


def channel_order(positions: Tensor, channels: int) -> Tensor:
    """Where each of so many channels is among those that are not at ``positions`` followed by those that are, int64."""
    others = torch.ones(channels, dtype=torch.bool, device=positions.device)
    others[positions] = False
    order = torch.empty(channels, dtype=torch.int64, device=positions.device)
    order[others] = torch.arange(channels - len(positions), device=positions.device)
    order[positions] = torch.arange(channels - len(positions), channels, device=positions.device)
    return order


def in_order(low: Tensor, high: Tensor, axis: int, order: Tensor) -> Tensor:
    """The tensor whose channels are in ``low`` and ``high``, from their :func:`channel_order`; contiguous."""
    return torch.cat([low, high])[order].movedim(0, axis).contiguous()


def channel_sums(values: Tensor, axis: int) -> Tensor:
    """Sum over each output channel, float64 [O]."""
    return values.double().movedim(axis, 0).flatten(1).sum(dim=1)


def counts_of(shares: Sequence[float], channels: int) -> tuple[int, ...]:
    """Each of ``shares`` of so many ``channels``, rounded, where that is neither none nor all of them."""
    return tuple(k for k in dict.fromkeys(round(share * channels) for share in shares) if 0 < k < channels)
