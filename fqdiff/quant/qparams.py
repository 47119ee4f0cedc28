"""Scales and zero points: choosing them, and applying them.  x ~ scale * (q - zero_point), q in [0, 2^bits - 1]."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fqdiff.errors import QuantizationError
from fqdiff.quant.formats import Format, Granularity, PerTensor


@dataclass(frozen=True)
class QParams:
    """``scale`` float32 and ``zero_point`` uint8, one element per group of weights that share them."""

    scale: Tensor
    zero_point: Tensor


def group_count(shape: tuple[int, ...], granularity: Granularity) -> int:
    """How many scales a tensor of ``shape`` gets."""
    if isinstance(granularity, PerTensor):
        return 1
    if granularity.axis >= len(shape):
        raise QuantizationError(f"channel axis {granularity.axis} of a tensor of shape {shape}", "use a smaller axis")
    return shape[granularity.axis]


def choose_qparams(x: Tensor, fmt: Format, granularity: Granularity) -> QParams:
    """Asymmetric min-max parameters; the range always holds 0, so that 0 is exact.

    Raises QuantizationError where ``x`` is not finite.
    """
    rows = channel_rows(x, granularity)
    return range_qparams(rows.amin(dim=1), rows.amax(dim=1), fmt)


def channel_rows(x: Tensor, granularity: Granularity) -> Tensor:
    """The weights that share a scale as the rows of a matrix [groups, ...]. Raises QuantizationError unless all are finite."""
    if not torch.isfinite(x).all():
        raise QuantizationError("a tensor to quantize holds NaN or infinity", "check the checkpoint it came from")
    groups = group_count(tuple(x.shape), granularity)
    return (
        x.reshape(1, -1) if isinstance(granularity, PerTensor) else x.movedim(granularity.axis, 0).reshape(groups, -1)
    )


def range_qparams(minimum: Tensor, maximum: Tensor, fmt: Format) -> QParams:
    """Asymmetric parameters that spread all codes of ``fmt`` from ``minimum`` to ``maximum`` [groups], widened to hold 0."""
    low = minimum.clamp(max=0).double()
    high = maximum.clamp(min=0).double()
    scale = ((high - low) / fmt.qmax).float()
    # A group of zeros, or of numbers too small for a float32 step, is stored as zeros: any step will do.
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero_point = torch.round(-low / scale).clamp(0, fmt.qmax).to(torch.uint8)
    return QParams(scale, zero_point)


def _broadcast(parameter: Tensor, shape: tuple[int, ...], granularity: Granularity) -> Tensor:
    if isinstance(granularity, PerTensor):
        return parameter.reshape(())
    view = [1] * len(shape)
    view[granularity.axis] = -1
    return parameter.reshape(view)


def quantize(x: Tensor, qparams: QParams, fmt: Format, granularity: Granularity) -> Tensor:
    """Codes (uint8, shape of ``x``): round to nearest, clamp to the format's range."""
    shape = tuple(x.shape)
    scale = _broadcast(qparams.scale, shape, granularity)
    zero_point = _broadcast(qparams.zero_point, shape, granularity)
    return (torch.round(x / scale) + zero_point).clamp(0, fmt.qmax).to(torch.uint8)


def dequantize(codes: Tensor, qparams: QParams, granularity: Granularity) -> Tensor:
    """float32 values of ``codes``."""
    shape = tuple(codes.shape)
    zero_point = _broadcast(qparams.zero_point, shape, granularity)
    scale = _broadcast(qparams.scale, shape, granularity)
    return (codes.float() - zero_point) * scale
