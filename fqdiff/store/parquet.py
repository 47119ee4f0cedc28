"""What a Parquet file unpacks to, found without unpacking it.

pyarrow reserves the memory that the headers of a file ask for, however small the file is, and some damaged footers make it
abort the process as soon as Python looks at a column's metadata. So a stranger's headers are read here first: a few
integers in Thrift's compact protocol (https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md,
fields as in https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift).
"""

import mmap
from pathlib import Path
from typing import Any

FOOTER_LIMIT = 2 * 2**20
NESTING_LIMIT = 20
# PLAIN, PLAIN_DICTIONARY, RLE, BIT_PACKED, RLE_DICTIONARY, BYTE_STREAM_SPLIT. The others are differences between strings,
# which may unpack to any size.
ENCODINGS = (0, 2, 3, 4, 8, 9)
Struct = dict[int, Any]


def unpacked_size(path: Path) -> tuple[int, int]:
    """(values, bytes) of all pages, decompressed, as their own headers say. Raises ValueError."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        footer = int.from_bytes(data[-8:-4], "little")
        if data[:4] != b"PAR1" or data[-4:] != b"PAR1" or footer > min(FOOTER_LIMIT, len(data) - 12):
            raise ValueError("no Parquet file")
        try:
            chunks = _columns(_Reader(data, len(data) - 8 - footer).struct())
            if sum(_size(chunk[7]) for chunk in chunks) > len(data):
                raise ValueError("its columns overlap")
            sizes = [_unpacked_column(data, chunk) for chunk in chunks]
        except (IndexError, KeyError, TypeError):
            raise ValueError("its headers make no sense") from None
    return sum(values for values, _ in sizes), sum(size for _, size in sizes)


def _columns(footer: Struct) -> list[Struct]:
    return [chunk[3] for group in footer[4] for chunk in group[1]]


def _unpacked_column(data: mmap.mmap, chunk: Struct) -> tuple[int, int]:
    start = min(_size(chunk[9]), _size(chunk.get(11)) or _size(chunk[9]))  # a dictionary comes before the data
    values, size = _pages(_Reader(data, start), start + chunk[7])
    if values != chunk[5]:
        raise ValueError(f"{values} values where the footer says {chunk[5]}")
    return values, size


def _pages(reader: "_Reader", end: int) -> tuple[int, int]:
    """(values, decompressed bytes) of the pages of one column from where ``reader`` stands to ``end``."""
    values = size = 0
    while reader.at < end:
        header = reader.struct()
        size += _size(header[2])
        reader.at += _size(header[3])
        if 7 not in header:  # a dictionary is no row's value
            content, encoding = (header[5], 2) if 5 in header else (header[8], 4)
            if content[encoding] not in ENCODINGS:
                raise ValueError(f"encoding {content[encoding]}")
            values += _size(content[1])
    return values, size


def _size(value: Any) -> int:
    if value is None:
        return 0
    if type(value) is not int or value < 0:
        raise ValueError("a size is negative")
    return value


class _Reader:
    """Thrift structs at position ``at`` of ``data``, as {field number: integer, struct or list of structs}."""

    def __init__(self, data: mmap.mmap, at: int) -> None:
        self.data, self.at = data, at

    def struct(self, depth: int = 0) -> Struct:
        """The struct that begins here."""
        if depth > NESTING_LIMIT:
            raise ValueError("nested too deeply")
        result: Struct = {}
        field = 0
        while head := self._byte():
            field = field + (head >> 4) if head >> 4 else self._integer()
            result[field] = self._value(head & 15, depth)
        return result

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2):  # true and false take no room of their own
            return None
        if kind in (4, 5, 6):
            return self._integer()
        if kind == 12:
            return self.struct(depth + 1)
        if kind == 9:
            head = self._byte()
            count, inner = head >> 4, head & 15
            count = self._varint() if count == 15 else count
            found = [self._byte() if inner in (1, 2) else self._value(inner, depth + 1) for _ in range(count)]
            return found if inner == 12 else None
        length = self._varint() if kind == 8 else {3: 1, 7: 8}[kind]  # text, a byte, a double
        self.at += length
        return None

    def _byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def _varint(self) -> int:
        value = shift = 0
        while shift < 70:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
        raise ValueError("a number is too long")

    def _integer(self) -> int:
        coded = self._varint()
        return (coded >> 1) ^ -(coded & 1)
