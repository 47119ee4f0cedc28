"""Bit-plane nesting: one tensor at several precisions, the upper bits of its codes shared by all of them.

The top b bits of an N-bit code c name an interval of 2^s codes, s = N - b, and its middle stands for all of them:

    x ~ scale * (2^s (c >> s) + (2^s - 1) / 2 - zero_point)

With s = 0 that is the plain integer format. Formats with ``phase_bits`` store their codes so: part ``codes`` holds the top bits,
as many as the least that any phase uses, ``plane1``, ``plane2``, ... the following bits up to the next number that a phase uses.
Who uses b bits reads no plane beyond them.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fqdiff.quant.formats import Format
from fqdiff.quant.packing import pack, packed_bytes, unpack


def plane_widths(fmt: Format) -> dict[str, int]:
    """Bits of each part that holds codes, from the top bits down."""
    levels = sorted(set(fmt.phase_bits))
    names = ["codes", *(f"plane{k}" for k in range(1, len(levels)))]
    return dict(zip(names, (b - a for a, b in zip([0, *levels], levels, strict=False)), strict=True))


def plane_layout(shape: tuple[int, ...], fmt: Format) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """dtype and shape of these parts for a tensor of ``shape``."""
    count = torch.Size(shape).numel()
    return {part: (fmt.dtype, (packed_bytes(count, width),)) for part, width in plane_widths(fmt).items()}


def split_codes(codes: Tensor, fmt: Format) -> dict[str, Tensor]:
    """uint8 ``codes`` of ``fmt.bits`` bits as packed planes."""
    parts, left = {}, int(fmt.bits)
    for part, width in plane_widths(fmt).items():
        left -= width
        parts[part] = pack((codes >> left) & (2**width - 1), width)
    return parts


def interval_middles(parts: Mapping[str, Tensor], fmt: Format, bits: int, shape: tuple[int, ...]) -> Tensor:
    """What the top ``bits`` bits of each code stand for, in codes of all bits, float32; reads no plane beyond them."""
    codes, known = torch.zeros(shape, dtype=torch.uint8, device=parts["codes"].device), 0
    for part, width in plane_widths(fmt).items():
        if known < bits:
            codes = (codes << width) | unpack(parts[part], width, shape)
            known += width
    steps = 2 ** (int(fmt.bits) - bits)
    return codes.float().mul_(steps).add_((steps - 1) / 2)


def bytes_read(sizes: Mapping[str, int], fmt: Format) -> float:
    """Mean over phases of the bytes that a use of the tensor reads; ``sizes``: those of each part."""
    if not fmt.phase_bits:
        return float(sum(sizes.values()))
    unread, known = 0, 0
    for part, width in plane_widths(fmt).items():
        unread += sizes[part] * sum(bits <= known for bits in fmt.phase_bits)
        known += width
    return sum(sizes.values()) - unread / len(fmt.phase_bits)
