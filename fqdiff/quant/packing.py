"""Packing codes without gaps. Bits: a little-endian bit stream, code k in bits [k * bits, (k + 1) * bits), bits in 1-8.

Trits (codes 0, 1, 2): five to a byte, its base-3 digits, the first the lowest: 1.6 bits each, where two bits would waste a
fifth.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fqdiff.errors import QuantizationError

TRIT = 1.6  # bits
TRITS = 5  # in a byte
POWERS = (1, 3, 9, 27, 81)
WORDS = {1: torch.int64, 2: torch.int32, 4: torch.int16, 8: torch.uint8}  # as many bytes as a byte has codes


def packed_bytes(count: int, bits: float) -> int:
    """Bytes that ``count`` codes of ``bits`` bits take."""
    return -(-count // TRITS) if bits == TRIT else (count * int(bits) + 7) // 8


def pack(codes: Tensor, bits: float) -> Tensor:
    """uint8 stream of :func:`packed_bytes` bytes from uint8 codes of any shape, row-major."""
    flat = codes.reshape(-1)
    largest = 2 if bits == TRIT else 2 ** int(bits) - 1
    if flat.numel() and int(flat.max()) > largest:
        raise QuantizationError(f"code {int(flat.max())} does not fit in {bits} bits", "quantize to the format first")
    if bits == TRIT:
        digits = F.pad(flat, (0, -flat.numel() % TRITS)).view(-1, TRITS)
        return (digits * torch.tensor(POWERS, dtype=torch.uint8, device=codes.device)).sum(dim=1, dtype=torch.uint8)
    width = int(bits)
    # Eight codes fill exactly `width` bytes, and fit one 64-bit word.
    words = F.pad(flat.long(), (0, -flat.numel() % 8)).view(-1, 8)
    word = (words << (width * torch.arange(8, device=codes.device))).sum(dim=1)
    stream = (word[:, None] >> (8 * torch.arange(width, device=codes.device))) & 0xFF
    return stream.to(torch.uint8).reshape(-1)[: packed_bytes(flat.numel(), bits)].clone()


def unpack(stream: Tensor, bits: float, shape: tuple[int, ...]) -> Tensor:
    """uint8 codes of ``shape`` from a stream made by :func:`pack`; those of 8 bits share its memory."""
    count = 1
    for size in shape:
        count *= size
    if stream.dtype != torch.uint8 or stream.ndim != 1 or stream.numel() != packed_bytes(count, bits):
        raise QuantizationError(
            f"{stream.numel()} stored bytes for {count} codes of {bits} bits", f"expected {packed_bytes(count, bits)}"
        )
    if bits == TRIT:
        digits = torch.arange(256, device=stream.device)[:, None] // torch.tensor(POWERS, device=stream.device) % 3
        return digits.to(torch.uint8)[stream.long()].reshape(-1)[:count].view(shape)
    width = int(bits)
    if 8 % width == 0:
        words = stream.to(WORDS[width])  # a byte's codes, with room for a byte each
    else:
        octets = F.pad(stream, (0, -stream.numel() % width)).view(-1, width)
        words = F.pad(octets, (0, 8 - width)).view(torch.int64)  # eight codes
    return _spread(words, width).view(torch.uint8).reshape(-1)[:count].view(shape)


def _spread(words: Tensor, width: int) -> Tensor:
    """Words of as many codes as bytes, adjacent from the lowest bit: each code moved to a byte of its own.

    The upper half of the codes moves to the upper half of the word, then the same in each half: whole words at a time, in a
    tenth of the memory and a third of the time that a number of 64 bits per code takes.
    """
    count = size = words.element_size()
    while count > 1:
        count //= 2
        low = sum((1 << count * width) - 1 << 16 * count * part for part in range(size // (2 * count)))
        words = (words & low) | ((words << count * (8 - width)) & (low << 8 * count))
    return words
