"""Which elements of a tensor are meant: a compact index, a bitmap or the positions, whichever takes fewer bytes.

The positions as Elias and Fano wrote them (Elias 1974, doi:10.1145/321812.321820): of each its l lowest bits as they are, and of
what is above them the steps from one position to the next, in unary. That is within half a bit of the least for each.
Shapes: n elements, k of them in the index.
"""

import torch
from torch import Tensor

from fqdiff.errors import QuantizationError
from fqdiff.quant.packing import pack, packed_bytes, unpack


def low_bits(count: int, numel: int) -> int:
    """l = floor(log2(n / k))."""
    return (numel // count).bit_length() - 1


def _sparse_bits(count: int, numel: int) -> int:
    """Bits of the positions: k l, and a bit for each position and each step of 2^l on the way to the last one possible."""
    low = low_bits(count, numel)
    return count * low + count + ((numel - 1) >> low)


def is_bitmap(count: int, numel: int) -> bool:
    """Whether ``count`` of ``numel`` elements are told by one bit for each element."""
    return packed_bytes(numel, 1) <= packed_bytes(_sparse_bits(count, numel), 1)


def index_bytes(count: int, numel: int) -> int:
    """Bytes of the index of any ``count`` of ``numel`` elements, 0 < count < numel."""
    return packed_bytes(numel if is_bitmap(count, numel) else _sparse_bits(count, numel), 1)


def pack_positions(positions: Tensor, numel: int) -> Tensor:
    """uint8 stream of :func:`index_bytes` bytes from increasing int64 ``positions`` [k] below ``numel``."""
    count, device = len(positions), positions.device
    if is_bitmap(count, numel):
        bits = torch.zeros(numel, dtype=torch.uint8, device=device)
        bits[positions] = 1
        return pack(bits, 1)
    low = low_bits(count, numel)
    lowest = (positions[:, None] >> torch.arange(low, device=device)) & 1
    steps = torch.zeros(_sparse_bits(count, numel) - count * low, dtype=torch.uint8, device=device)
    steps[(positions >> low) + torch.arange(count, device=device)] = 1
    return pack(torch.cat([lowest.reshape(-1).to(torch.uint8), steps]), 1)


def unpack_positions(stream: Tensor, count: int, numel: int) -> Tensor:
    """The positions that :func:`pack_positions` packed, int64 [k].

    Raises QuantizationError for a stream that names another number of elements; see :func:`check_positions` for the rest.
    """
    if is_bitmap(count, numel):
        return _ones(unpack(stream, 1, (numel,)), count)
    low, bits = low_bits(count, numel), unpack(stream, 1, (_sparse_bits(count, numel),))
    lowest = bits[: count * low].view(count, low)
    positions = _ones(bits[count * low :], count) - torch.arange(count, device=stream.device) << low
    for k in range(low):
        positions |= lowest[:, k].long() << k
    return positions


def _ones(bits: Tensor, count: int) -> Tensor:
    found = int(bits.sum())
    if found != count:
        raise QuantizationError(f"an index of {found} elements where {count} are kept")
    return bits.nonzero().flatten()


def check_positions(stream: Tensor, count: int, numel: int) -> None:
    """Raise QuantizationError unless ``stream`` is what :func:`pack_positions` writes: positions increasing, below n."""
    positions = unpack_positions(stream, count, numel)
    inside = int(positions[-1]) < numel and bool((positions.diff() > 0).all())
    if not inside or not torch.equal(pack_positions(positions, numel), stream):
        raise QuantizationError(f"an index of kept elements that is not increasing, or beyond {numel} elements")
