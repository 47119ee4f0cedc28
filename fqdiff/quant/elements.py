"""Which single elements of a tensor, or which of its output channels, are in another format than the rest."""

import torch
from torch import Tensor

from fqdiff.errors import ConfigError
from fqdiff.quant.codebooks import fit_codebook, looked_up, nearest_entry
from fqdiff.quant.formats import Format, Grain, Granularity, Mixed, PerElement, PerOutput, PerTensor, get_format
from fqdiff.quant.outputs import channel_sums
from fqdiff.quant.packed import pack_tensor, unpack_tensor
from fqdiff.quant.qparams import check_finite, dequantize, from_rows, group_rows, quantize
from fqdiff.quant.ranges import FISHER, fitted_qparams

BY_FISHER, BY_RISE = "fisher", "rise"


def choose_kept(
    x: Tensor, fmt: Format, granularity: Grain, weight: Tensor | None, by: str, span: str = FISHER
) -> Tensor | None:
    """Positions of the elements, or of the output channels, that are not in ``fmt``, increasing int64 [count]; None for none.

    ``weight``: Fisher values, shaped like ``x``. ``by`` "fisher": those of the largest (of channels the largest sum). "rise":
    elements of the largest Fisher value times squared error, see :func:`rise`; channels where that falls most in the other
    format, with ranges by ``span``. Of equals the first. Raises ConfigError without ``weight``.
    """
    if not isinstance(granularity, Mixed):
        return None
    if isinstance(granularity, PerOutput):
        if weight is None:
            raise ConfigError("output channels chosen without Fisher values", "run fqdiff fisher")
        axis = granularity.scales.axis
        gain = channel_sums(weight, axis)
        if by == BY_RISE:
            low, high = (channel_rise(x, f, granularity, weight, span) for f in (fmt, get_format(granularity.high)))
            gain = low - high
        return largest(gain, granularity.count)
    if weight is None:
        raise ConfigError("elements kept without Fisher values of single weights", "fqdiff fisher --granularity weight")
    return largest(weight if by == BY_FISHER else rise(x, fmt, granularity, weight), granularity.count)


def channel_rise(x: Tensor, fmt: Format, granularity: PerOutput, weight: Tensor, span: str) -> Tensor:
    """Sum of Fisher value times squared error of each output channel in ``fmt``, float64 [O]."""
    grain = PerTensor() if fmt.is_cast else granularity.scales
    stored = unpack_tensor(pack_tensor(x, fmt, grain, span, weight=weight))
    return channel_sums(weight * (stored - x).square(), granularity.scales.axis)


def rise(x: Tensor, fmt: Format, granularity: PerElement, weight: Tensor) -> Tensor:
    """What each element would do beside the others in ``fmt``: Fisher value times squared error, shaped like ``x``.

    By ranges of the least sum of these without the elements that would do most as 0. Fitted to all, ranges reach out for
    outliers, which then err least of all, and everything else for their sake.
    """
    check_finite(x)
    first = largest(weight * x.square(), granularity.count)
    counted = torch.ones_like(x).flatten().index_fill(0, first, 0.0).view(x.shape)
    back = _beside(x, counted, fmt, granularity.scales, weight)
    return weight * (back - x).square()


def _beside(x: Tensor, counted: Tensor, fmt: Format, scales: Granularity, weight: Tensor) -> Tensor:
    """``x`` in ``fmt``, fitted to the elements where ``counted`` is 1."""
    if fmt.is_cast:
        return x.to(fmt.dtype).float()
    if fmt.kind == "codebook":
        rows = group_rows(x, scales)
        codebook = fit_codebook(rows, group_rows(weight * counted, scales), 2 ** int(fmt.bits)).float()
        return from_rows(looked_up(nearest_entry(rows, codebook), codebook), tuple(x.shape), scales)
    qparams = fitted_qparams(x * counted, fmt, scales, FISHER, weight)
    return dequantize(quantize(x, qparams, fmt, scales), qparams, scales)


def largest(values: Tensor, count: int) -> Tensor:
    """Row-major positions of the ``count`` largest, increasing; of equals the first."""
    return values.flatten().sort(descending=True, stable=True).indices[:count].sort().values
