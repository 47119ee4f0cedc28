"""A weight tensor as it is stored: which plain tensors it is made of, how many bytes they take, and back."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fqdiff.errors import QuantizationError
from fqdiff.quant.formats import Format, Granularity, PerTensor
from fqdiff.quant.packing import pack, packed_bytes, unpack
from fqdiff.quant.qparams import QParams, choose_qparams, dequantize, group_count, quantize


@dataclass(frozen=True)
class PackedTensor:
    """``parts``: ``data`` for a cast; ``codes``, ``scale`` and ``zero_point`` for an integer format."""

    format: Format
    granularity: Granularity
    shape: tuple[int, ...]
    parts: Mapping[str, Tensor]


def part_layout(
    shape: tuple[int, ...], fmt: Format, granularity: Granularity
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """dtype and shape of every part that a tensor of ``shape`` is stored as."""
    if fmt.dtype is not None:
        return {"data": (fmt.dtype, shape)}
    groups = group_count(shape, granularity)
    return {
        "codes": (torch.uint8, (packed_bytes(torch.Size(shape).numel(), fmt.bits),)),
        "scale": (torch.float32, (groups,)),
        "zero_point": (torch.uint8, (packed_bytes(groups, fmt.bits),)),
    }


def stored_bytes(shape: tuple[int, ...], fmt: Format, granularity: Granularity) -> int:
    """Payload bytes of a tensor of ``shape``: codes, scales and zero points."""
    layout = part_layout(shape, fmt, granularity)
    return sum(dtype.itemsize * torch.Size(size).numel() for dtype, size in layout.values())


def pack_tensor(x: Tensor, fmt: Format, granularity: Granularity) -> PackedTensor:
    """``x`` in ``fmt``: a cast, or rounded to nearest on a min-max grid and bit-packed.

    Raises QuantizationError where ``x`` is not finite, or a cast overflows.
    """
    shape = tuple(x.shape)
    if fmt.dtype is not None:
        data = x.to(fmt.dtype, copy=True)  # never the caller's own memory: the packed model stands alone
        if not torch.isfinite(data).all():
            raise QuantizationError(
                f"values up to {float(x.abs().max()):.3g} in {fmt.name}", "they overflow; use bfloat16"
            )
        return PackedTensor(fmt, PerTensor(), shape, {"data": data.contiguous()})
    qparams = choose_qparams(x, fmt, granularity)
    parts = {
        "codes": pack(quantize(x, qparams, fmt, granularity), fmt.bits),
        "scale": qparams.scale,
        "zero_point": pack(qparams.zero_point, fmt.bits),
    }
    return PackedTensor(fmt, granularity, shape, parts)


def unpack_tensor(packed: PackedTensor) -> Tensor:
    """The float32 values that ``packed`` stands for; the parts are checked against the layout first."""
    layout = part_layout(packed.shape, packed.format, packed.granularity)
    got = {name: (t.dtype, tuple(t.shape)) for name, t in packed.parts.items()}
    if got != layout:
        raise QuantizationError(f"stored parts {got} of a {packed.format.name} tensor", f"expected {layout}")
    if packed.format.dtype is not None:
        return packed.parts["data"].float()
    groups = group_count(packed.shape, packed.granularity)
    qparams = QParams(packed.parts["scale"], unpack(packed.parts["zero_point"], packed.format.bits, (groups,)))
    return dequantize(unpack(packed.parts["codes"], packed.format.bits, packed.shape), qparams, packed.granularity)
