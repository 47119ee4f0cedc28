"""A weight tensor as it is stored: which plain tensors it is made of, how many bytes they take, and back."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fqdiff.errors import QuantizationError
from fqdiff.quant.formats import Format, Granularity, PerTensor
from fqdiff.quant.packing import TRITS, pack, packed_bytes, unpack
from fqdiff.quant.qparams import QParams, choose_qparams, dequantize, fixed_zero_point, group_count, quantize


@dataclass(frozen=True)
class PackedTensor:
    """``parts``: ``data`` for a cast; else ``codes`` and ``scale``, and ``zero_point`` unless the format fixes it."""

    format: Format
    granularity: Granularity
    shape: tuple[int, ...]
    parts: Mapping[str, Tensor]


def part_layout(
    shape: tuple[int, ...], fmt: Format, granularity: Granularity
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """dtype and shape of every part that a tensor of ``shape`` is stored as."""
    if fmt.is_cast:
        return {"data": (fmt.dtype, shape)}
    groups = group_count(shape, granularity)
    stream = (packed_bytes(torch.Size(shape).numel(), fmt.bits),)
    layout = {
        "codes": (fmt.dtype, stream if fmt.is_packed else shape),
        "scale": (granularity.scale_dtype, (groups,)),
    }
    if fmt.zero_point is None:
        layout["zero_point"] = (torch.uint8, (packed_bytes(groups, fmt.bits),))
    return layout


def stored_bytes(shape: tuple[int, ...], fmt: Format, granularity: Granularity) -> int:
    """Payload bytes of a tensor of ``shape``: codes, scales and zero points."""
    layout = part_layout(shape, fmt, granularity)
    return sum(dtype.itemsize * torch.Size(size).numel() for dtype, size in layout.values())


def pack_tensor(x: Tensor, fmt: Format, granularity: Granularity) -> PackedTensor:
    """``x`` in ``fmt``: a cast, or rounded to nearest on the grid of :func:`choose_qparams` and packed.

    Raises QuantizationError where ``x`` is not finite, or a cast or a scale overflows.
    """
    shape = tuple(x.shape)
    if fmt.is_cast:
        data = x.to(fmt.dtype, copy=True)  # never the caller's own memory: the packed model stands alone
        if not torch.isfinite(data).all():
            raise QuantizationError(
                f"values up to {float(x.abs().max()):.3g} in {fmt.name}", "they overflow; use bfloat16"
            )
        return PackedTensor(fmt, PerTensor(), shape, {"data": data.contiguous()})
    qparams = choose_qparams(x, fmt, granularity)
    codes = quantize(x, qparams, fmt, granularity)
    parts = {
        "codes": pack(codes, fmt.bits) if fmt.is_packed else codes,
        "scale": qparams.scale.to(granularity.scale_dtype),
    }
    if fmt.zero_point is None:
        parts["zero_point"] = pack(qparams.zero_point, fmt.bits)
    return PackedTensor(fmt, granularity, shape, parts)


def check_layout(packed: PackedTensor) -> None:
    """Raise QuantizationError unless the parts have the dtypes and shapes that the format asks for."""
    layout = part_layout(packed.shape, packed.format, packed.granularity)
    got = {name: (t.dtype, tuple(t.shape)) for name, t in packed.parts.items()}
    if got != layout:
        raise QuantizationError(f"stored parts {got} of a {packed.format.name} tensor", f"expected {layout}")


def check_values(packed: PackedTensor) -> None:
    """Raise QuantizationError for parts that no packing makes: for the reader of a file that a stranger may have written."""
    fmt, parts = packed.format, packed.parts
    if fmt.is_cast:
        return
    scale = parts["scale"].float()
    turned = fmt.is_integer and fmt.symmetric  # the only scales that may be negative
    if not torch.isfinite(scale).all() or not scale.all() or (not turned and bool((scale < 0).any())):
        raise QuantizationError(f"scales of a {fmt.name} tensor that are 0, negative or no numbers")
    if fmt.kind == "ternary" and int(parts["codes"].max()) >= 3**TRITS:
        raise QuantizationError(f"byte {int(parts['codes'].max())} is not {TRITS} codes of three values")
    if fmt.kind == "float" and not torch.isfinite(parts["codes"].float()).all():
        raise QuantizationError(f"codes of a {fmt.name} tensor that are no numbers")


def unpack_tensor(packed: PackedTensor) -> Tensor:
    """The float32 values that ``packed`` stands for; the parts are checked against the layout first."""
    check_layout(packed)
    fmt, parts = packed.format, packed.parts
    if fmt.is_cast:
        return parts["data"].float()
    scale = parts["scale"].float()
    if fmt.zero_point is None:
        zero_point = unpack(parts["zero_point"], fmt.bits, (len(scale),))
    else:
        zero_point = fixed_zero_point(fmt, len(scale), scale.device)
    codes = unpack(parts["codes"], fmt.bits, packed.shape) if fmt.is_packed else parts["codes"]
    return dequantize(codes, QParams(scale, zero_point), packed.granularity)
