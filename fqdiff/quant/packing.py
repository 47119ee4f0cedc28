"""Bit packing: codes of 1-8 bits in a little-endian bit stream. Code k occupies bits [k * bits, (k + 1) * bits)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fqdiff.errors import QuantizationError


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that ``count`` codes of ``bits`` bits take."""
    return (count * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 stream of :func:`packed_bytes` bytes from uint8 codes of any shape, row-major."""
    flat = codes.reshape(-1)
    if flat.numel() and int(flat.max()) >> bits:
        raise QuantizationError(f"code {int(flat.max())} does not fit in {bits} bits", "quantize to the format first")
    # Eight codes fill exactly `bits` bytes, and fit one 64-bit word.
    words = F.pad(flat.long(), (0, -flat.numel() % 8)).view(-1, 8)
    word = (words << (bits * torch.arange(8, device=codes.device))).sum(dim=1)
    stream = (word[:, None] >> (8 * torch.arange(bits, device=codes.device))) & 0xFF
    return stream.to(torch.uint8).reshape(-1)[: packed_bytes(flat.numel(), bits)].clone()


def unpack(stream: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """uint8 codes of ``shape`` from a stream made by :func:`pack`."""
    count = 1
    for size in shape:
        count *= size
    if stream.dtype != torch.uint8 or stream.ndim != 1 or stream.numel() != packed_bytes(count, bits):
        raise QuantizationError(
            f"{stream.numel()} stored bytes for {count} codes of {bits} bits", f"expected {packed_bytes(count, bits)}"
        )
    octets = F.pad(stream.long(), (0, -stream.numel() % bits)).view(-1, bits)
    word = (octets << (8 * torch.arange(bits, device=stream.device))).sum(dim=1)
    codes = (word[:, None] >> (bits * torch.arange(8, device=stream.device))) & (2**bits - 1)
    flat: Tensor = codes.to(torch.uint8).reshape(-1)[:count]
    return flat.view(shape)
