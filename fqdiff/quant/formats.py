"""Number formats as rows of a table, and granularities: how many weights share one scale."""

from dataclasses import dataclass

import torch

from fqdiff.errors import ConfigError


@dataclass(frozen=True)
class Format:
    """``dtype`` is set for formats that are a cast; integer formats store unsigned codes of ``bits`` bits."""

    name: str
    bits: int
    dtype: torch.dtype | None = None

    @property
    def is_integer(self) -> bool:
        return self.dtype is None

    @property
    def qmax(self) -> int:
        """The largest code of an integer format; the smallest is 0."""
        return (1 << self.bits) - 1


FORMATS = {
    f.name: f
    for f in (
        Format("float32", 32, torch.float32),
        Format("float16", 16, torch.float16),
        Format("bfloat16", 16, torch.bfloat16),
        Format("int8", 8),
        Format("int6", 6),
        Format("int5", 5),
        Format("int4", 4),
        Format("int3", 3),
        Format("int2", 2),
    )
}


def get_format(name: str) -> Format:
    """The row called ``name``, or ConfigError."""
    if name not in FORMATS:
        raise ConfigError(f"unknown format '{name}'", f"one of: {', '.join(FORMATS)}")
    return FORMATS[name]


@dataclass(frozen=True)
class PerTensor:
    """One scale and zero point for the whole tensor."""

    def __str__(self) -> str:
        return "tensor"


@dataclass(frozen=True)
class PerChannel:
    """One scale and zero point for each slice along ``axis``."""

    axis: int

    def __str__(self) -> str:
        return f"channel:{self.axis}"


Granularity = PerTensor | PerChannel


def parse_granularity(text: str) -> Granularity:
    """``"tensor"`` or ``"channel:AXIS"``; the inverse of ``str``."""
    kind, _, axis = text.partition(":")
    if text == "tensor":
        return PerTensor()
    if kind == "channel" and axis.isascii() and axis.isdigit() and len(axis) == 1:
        return PerChannel(int(axis))
    raise ConfigError(f"unknown granularity '{text}'", "tensor, or channel:AXIS such as channel:0")
