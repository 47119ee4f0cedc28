"""Scales and zero points: choosing them, and applying them.  x ~ scale * (q - zero_point), q in [0, qmax].

Shapes: G groups of weights that share a scale, n weights in each.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fqdiff.errors import QuantizationError
from fqdiff.quant.formats import Format, Granularity, PerChannel, PerSplit, PerTensor

LEAST_FLOAT16_SCALE = 2.0**-20  # below it float16, whose numbers are then 2^-24 apart, has less than 4 bits left


@dataclass(frozen=True)
class QParams:
    """``scale`` float32 (whichever dtype stores it) and ``zero_point`` uint8, [G]."""

    scale: Tensor
    zero_point: Tensor


# --- groups ----------------------------------------------------------------------------------------------------------


def group_count(shape: tuple[int, ...], granularity: Granularity) -> int:
    """How many scales a tensor of ``shape`` gets. Raises QuantizationError where it cannot be divided so."""
    if isinstance(granularity, PerTensor):
        return 1
    if granularity.axis >= len(shape):
        raise QuantizationError(f"channel axis {granularity.axis} of a tensor of shape {shape}", "use a smaller axis")
    channels = shape[granularity.axis]
    if isinstance(granularity, PerChannel):
        return channels
    if isinstance(granularity, PerSplit):
        split_sizes(shape, granularity)
        return 2 * channels
    weights, size = torch.Size(shape).numel() // channels, granularity.group_size
    if weights % size:
        raise QuantizationError(
            f"groups of {size} do not divide the {weights} weights of an output channel of shape {shape}",
            f"sizes that do: {', '.join(map(str, nearest_sizes(weights, size)))}",
        )
    return channels * (weights // size)


def split_sizes(shape: tuple[int, ...], granularity: PerSplit) -> tuple[int, int]:
    """How many weights of an output channel are on either side. Raises QuantizationError where one has none."""
    others = [n for axis, n in enumerate(shape) if axis != granularity.axis]
    channels, boundary, kernel = others[0] if others else 0, granularity.boundary, torch.Size(others[1:]).numel()
    if boundary >= channels:
        raise QuantizationError(
            f"a split at input channel {boundary} of a tensor of shape {shape}", f"it has {channels} of them"
        )
    return boundary * kernel, (channels - boundary) * kernel


def nearest_sizes(weights: int, wanted: int, count: int = 6) -> list[int]:
    """The ``count`` divisors of ``weights`` that come closest to ``wanted`` by their ratio, in order."""
    small = [n for n in range(1, int(weights**0.5) + 1) if weights % n == 0]
    divisors = {*small, *(weights // n for n in small)}
    return sorted(sorted(divisors, key=lambda n: (max(n / wanted, wanted / n), n))[:count])


def group_rows(x: Tensor, granularity: Granularity) -> Tensor:
    """The weights that share a scale as the rows of a matrix [G, n].

    Parts of unequal size end in zeros, which every range holds and which add to no error.
    """
    groups = group_count(tuple(x.shape), granularity)
    if isinstance(granularity, PerTensor):
        return x.reshape(1, -1)
    rows = x.movedim(granularity.axis, 0)
    if isinstance(granularity, PerSplit):
        sizes = split_sizes(tuple(x.shape), granularity)
        padded = x.new_zeros(len(rows), 2, max(sizes))
        for part, half in enumerate(rows.reshape(len(rows), -1).split(sizes, dim=1)):
            padded[:, part, : half.shape[1]] = half
        rows = padded
    return rows.reshape(groups, -1)


def from_rows(rows: Tensor, shape: tuple[int, ...], granularity: Granularity) -> Tensor:
    """The tensor of ``shape`` that :func:`group_rows` makes ``rows`` of; contiguous."""
    if isinstance(granularity, PerTensor):
        return rows.reshape(shape)
    axis = granularity.axis
    moved = (shape[axis], *shape[:axis], *shape[axis + 1 :])
    if isinstance(granularity, PerSplit):
        first, second = split_sizes(shape, granularity)
        halves = rows.reshape(shape[axis], 2, -1)
        rows = torch.cat([halves[:, 0, :first], halves[:, 1, :second]], dim=1)
    return rows.reshape(moved).movedim(0, axis).contiguous()


def row_sizes(shape: tuple[int, ...], granularity: Granularity) -> Tensor:
    """How many weights share each scale, int64 [G]."""
    groups = group_count(shape, granularity)
    if isinstance(granularity, PerSplit):
        return torch.tensor(split_sizes(shape, granularity)).repeat(groups // 2)
    return torch.full((groups,), torch.Size(shape).numel() // groups)


def check_finite(x: Tensor) -> None:
    """Raise QuantizationError unless every element of ``x`` is a number."""
    if not torch.isfinite(x).all():
        raise QuantizationError("a tensor to quantize holds NaN or infinity", "check the checkpoint it came from")


# --- choosing --------------------------------------------------------------------------------------------------------


def choose_qparams(x: Tensor, fmt: Format, granularity: Granularity, weight: Tensor | None = None) -> QParams:
    """Min-max parameters, for ternary those of least squared error, weighted by ``weight`` if given; 0 is always exact.

    Raises QuantizationError where ``x`` is not finite, or float16 cannot hold the scales.
    """
    check_finite(x)
    rows = group_rows(x, granularity)
    if fmt.kind == "ternary":
        weights = None if weight is None else group_rows(weight, granularity)
        return _with_fixed_zero(stored_scale(ternary_scale(rows, weights), granularity.scale_dtype), fmt)
    return range_qparams(rows.amin(dim=1), rows.amax(dim=1), fmt, granularity.scale_dtype)


def range_qparams(minimum: Tensor, maximum: Tensor, fmt: Format, scale_dtype: torch.dtype = torch.float32) -> QParams:
    """Parameters that spread the codes of ``fmt`` from ``minimum`` to ``maximum`` [G], widened to hold 0.

    Symmetric integers reach one step further down than up; a negative scale turns that to the side that is longer.
    """
    low = minimum.clamp(max=0).double()
    high = maximum.clamp(min=0).double()
    if fmt.kind == "float":
        return _with_fixed_zero(stored_scale(torch.maximum(-low, high) / fmt.qmax, scale_dtype), fmt)
    if fmt.zero_point is not None:
        longer, shorter = torch.maximum(-low, high), torch.minimum(-low, high)
        step = torch.maximum(longer / fmt.zero_point, shorter / (fmt.zero_point - 1))
        scale = stored_scale(step, scale_dtype)
        return _with_fixed_zero(torch.where(high > -low, -scale, scale), fmt)
    scale = stored_scale((high - low) / fmt.qmax, scale_dtype)
    zero_point = torch.round(-low / scale).clamp(0, fmt.qmax).to(torch.uint8)
    return QParams(scale, zero_point)


def fixed_zero_point(fmt: Format, groups: int, device: torch.device) -> Tensor:
    """The zero point of a format that stores none, uint8 [G]."""
    assert fmt.zero_point is not None
    return torch.full((groups,), fmt.zero_point, dtype=torch.uint8, device=device)


def _with_fixed_zero(scale: Tensor, fmt: Format) -> QParams:
    return QParams(scale, fixed_zero_point(fmt, len(scale), scale.device))


def ternary_scale(rows: Tensor, weight: Tensor | None = None) -> Tensor:
    """The s of least sum weight (x - s c)^2 over s and codes c in {-1, 0, 1}, for each row; float64 [G].

    The best codes for an s are those of the magnitudes above s / 2, so that they are the k largest for some k. With them the
    best s is their weighted mean, and the sum falls by s^2 times their weights' sum: try every k.
    """
    magnitudes, order = rows.double().abs().sort(dim=1, descending=True)
    weights = torch.ones_like(magnitudes) if weight is None else weight.double().gather(1, order)
    mass = weights.cumsum(dim=1)
    means = (weights * magnitudes).cumsum(dim=1) / mass.clamp(min=1e-300)
    best = (mass * means.square()).argmax(dim=1, keepdim=True)
    found = means.gather(1, best).squeeze(1)
    # A row that nothing weighs is fitted as if all were alike.
    return found if weight is None else torch.where(mass[:, -1] > 0, found, ternary_scale(rows))


def stored_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``scale`` (float64, 0 or more) as ``dtype`` stores it, in float32; groups of zeros get 1.

    float16 rounds up, so that no code leaves its range, and never to 0. Raises QuantizationError where it overflows, or
    where even the tensor's largest scale is below LEAST_FLOAT16_SCALE; smaller groups beside a larger one lose nothing
    that counts.
    """
    if dtype == torch.float16:
        largest = float(scale.max())
        nearest = scale.half()
        above = (nearest.view(torch.int16) + 1).view(torch.float16)  # of positive floats: the next one
        scale = torch.where(nearest.double() < scale, above, nearest)
        if 0 < largest < LEAST_FLOAT16_SCALE or not torch.isfinite(scale).all():
            raise QuantizationError(f"float16 cannot hold scales up to {largest:.3g}", "use --scale float32")
    scale = scale.float()
    # A group of zeros, or of numbers too small for a float32 step, is stored as zeros: any step will do.
    return torch.where(scale > 0, scale, torch.ones_like(scale))


# --- applying --------------------------------------------------------------------------------------------------------


def quantize(x: Tensor, qparams: QParams, fmt: Format, granularity: Granularity) -> Tensor:
    """Codes, shape of ``x``: round to nearest, clamp to the format's range. uint8, or the format's own float."""
    rows = group_rows(x, granularity) / qparams.scale[:, None]
    if fmt.kind == "float":
        codes = rows.clamp(-fmt.qmax, fmt.qmax).to(fmt.dtype)  # beyond it e4m3 has only NaN
    else:
        codes = (torch.round(rows) + qparams.zero_point[:, None]).clamp(0, fmt.qmax).to(torch.uint8)
    return from_rows(codes, tuple(x.shape), granularity)


def dequantize(codes: Tensor, qparams: QParams, granularity: Granularity) -> Tensor:
    """float32 values of ``codes``."""
    # In place: a float32 copy of the tensor is what memory has to hold, not two.
    rows = group_rows(codes, granularity).to(torch.float32, copy=True)
    rows.sub_(qparams.zero_point[:, None]).mul_(qparams.scale[:, None])
    return from_rows(rows, tuple(codes.shape), granularity)
