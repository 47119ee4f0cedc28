"""Number formats as rows of a table, and granularities: how many weights share one scale."""

import re
from dataclasses import dataclass, replace

import torch

from fqdiff.errors import ConfigError

FLOAT16_SCALES = ":float16"
FLOAT8_MAX = 448  # the largest e4m3; e5m2 has it too, and 24 powers of two below it, so that its scales are as moderate
SYMMETRIC = "sym"  # how the names of integer formats without a zero point end
PHASES = ":"  # before the bits of each phase
MOST_PHASES = 4
PHASE_BITS = re.compile(rf"[234568](/[234568]){{1,{MOST_PHASES - 1}}}", re.ASCII)


@dataclass(frozen=True)
class Format:
    """How one weight is stored.

    ``cast``: the number itself, in ``dtype``. ``float``: a number in ``dtype`` times a scale. ``integer`` and ``ternary``:
    an unsigned code of ``bits`` bits, bit-packed, with x ~ scale * (code - zero_point). ``codebook``: a code too, the position
    of the number in a list of 2^bits.

    ``phase_bits``: of integers that are read with fewer bits in some phases of the timesteps, the bits of each phase, from
    t = 0 on; ``bits`` is the largest of them (:mod:`fqdiff.quant.nested`).
    """

    name: str
    kind: str
    bits: float
    dtype: torch.dtype = torch.uint8
    symmetric: bool = True
    phase_bits: tuple[int, ...] = ()

    @property
    def is_cast(self) -> bool:
        """The only formats without a scale."""
        return self.kind == "cast"

    @property
    def is_integer(self) -> bool:
        """Evenly spaced codes between the ends of a range."""
        return self.kind == "integer"

    @property
    def is_packed(self) -> bool:
        """Codes smaller than a byte, or a byte, in one stream."""
        return self.kind in ("integer", "ternary", "codebook")

    @property
    def has_zero_points(self) -> bool:
        """Whether each group stores the code of 0."""
        return self.is_integer and not self.symmetric

    @property
    def qmax(self) -> int:
        """The largest code (the smallest is 0); of floats the largest number used."""
        if self.kind == "float":
            return FLOAT8_MAX
        return 2 if self.kind == "ternary" else (1 << int(self.bits)) - 1

    @property
    def zero_point(self) -> int | None:
        """The code of 0 where it is the same for all weights; None where each group stores its own, or nothing is 0."""
        if self.kind == "float":
            return 0
        return (self.qmax + 1) // 2 if self.symmetric and self.kind != "codebook" else None


FORMATS = {
    f.name: f
    for f in (
        Format("float32", "cast", 32, torch.float32),
        Format("float16", "cast", 16, torch.float16),
        Format("bfloat16", "cast", 16, torch.bfloat16),
        Format("float8_e4m3", "float", 8, torch.float8_e4m3fn),
        Format("float8_e5m2", "float", 8, torch.float8_e5m2),
        *(Format(f"int{bits}", "integer", bits, symmetric=False) for bits in (8, 6, 5, 4, 3, 2)),
        *(Format(f"int{bits}{SYMMETRIC}", "integer", bits) for bits in (8, 6, 5, 4, 3, 2)),
        Format("ternary", "ternary", 1.6),  # five codes of three values fill a byte: 3^5 = 243
        *(Format(f"codebook{bits}", "codebook", bits) for bits in (4, 3, 2, 1)),
    )
}


def get_format(name: str) -> Format:
    """The row called ``name``, or with phases: the row and the bits of each phase, ``int6:6/4/2/2``. Else ConfigError."""
    base, _, bits = name.partition(PHASES)
    if bits and base in FORMATS and PHASE_BITS.fullmatch(bits):
        fmt, phase_bits = FORMATS[base], tuple(map(int, bits.split("/")))
        if fmt.is_integer and max(phase_bits) == fmt.bits and len(set(phase_bits)) > 1:
            return replace(fmt, name=name, phase_bits=phase_bits)
    if name not in FORMATS:
        raise ConfigError(f"unknown format '{name}'", f"one of: {', '.join(FORMATS)}")
    return FORMATS[name]


def with_phases(fmt: Format, phase_bits: tuple[int, ...]) -> Format:
    """``fmt``, an integer format, with so many bits in each phase; the largest are its own, and they are not all equal."""
    return get_format(fmt.name + PHASES + "/".join(map(str, phase_bits)))


def without_zero_point(fmt: Format) -> Format:
    """The symmetric row of the same width; formats that store no zero point are their own."""
    return FORMATS[fmt.name + SYMMETRIC] if fmt.has_zero_points else fmt


@dataclass(frozen=True)
class PerTensor:
    """One scale and zero point for the whole tensor."""

    scale_dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return "tensor" + _suffix(self.scale_dtype)


@dataclass(frozen=True)
class PerChannel:
    """One scale and zero point for each slice along ``axis``."""

    axis: int
    scale_dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"channel:{self.axis}" + _suffix(self.scale_dtype)


@dataclass(frozen=True)
class PerGroup:
    """One scale and zero point for every ``group_size`` consecutive weights of each slice along ``axis``, in row-major order."""

    group_size: int
    axis: int
    scale_dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"group:{self.group_size}:{self.axis}" + _suffix(self.scale_dtype)


@dataclass(frozen=True)
class PerSplit:
    """Two scales and zero points for each slice along ``axis``: of the weights of its first ``boundary`` input channels, and of
    the others.

    For layers that are given two tensors joined along the channels (Q-Diffusion: Li et al. 2023, section 4.2). Input channels
    are the first axis of a slice.
    """

    boundary: int
    axis: int
    scale_dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{SPLIT}:{self.boundary}:{self.axis}" + _suffix(self.scale_dtype)


SPLIT = "split"
Granularity = PerTensor | PerChannel | PerGroup | PerSplit


@dataclass(frozen=True)
class PerElement:
    """``count`` elements of a tensor are kept in ``high``, a cast; the others share scales by ``scales``."""

    count: int
    high: str
    scales: Granularity

    def __str__(self) -> str:
        return f"{ELEMENT}:{self.count}:{self.high}+{self.scales}"


@dataclass(frozen=True)
class PerOutput:
    """``count`` output channels of a tensor are stored in the format ``high``; all share scales by ``scales``."""

    count: int
    high: str
    scales: PerChannel | PerGroup

    def __str__(self) -> str:
        return f"{OUTPUT}:{self.count}:{self.high}+{self.scales}"


Mixed = PerElement | PerOutput  # granularities of tensors in two formats
Grain = Granularity | Mixed
ELEMENT = "element"
OUTPUT = "output"
CASTS = tuple(f.name for f in FORMATS.values() if f.is_cast)
TEXT = re.compile(
    r"(tensor|channel:(?P<channel>\d)|group:(?P<size>[1-9]\d{0,8}):(?P<axis>\d)|split:(?P<boundary>[1-9]\d{0,8}):(?P<of>\d))"
    r"(?P<half>:float16)?",
    re.ASCII,
)
WHOLE = "|".join(re.escape(name) for name in FORMATS)
KEPT = re.compile(rf"{ELEMENT}:(?P<count>[1-9]\d{{0,12}}):(?P<high>{'|'.join(CASTS)})\+(?P<scales>.*)", re.ASCII)
OUTPUTS = re.compile(rf"{OUTPUT}:(?P<count>[1-9]\d{{0,12}}):(?P<high>{WHOLE})\+(?P<scales>.*)", re.ASCII)


def scales_of(grain: Grain) -> Granularity:
    """Which of the weights share a scale, but for those that are kept one by one."""
    return grain.scales if isinstance(grain, Mixed) else grain


def _suffix(scale_dtype: torch.dtype) -> str:
    return FLOAT16_SCALES if scale_dtype == torch.float16 else ""


def parse_granularity(text: str) -> Grain:
    """``tensor``, ``channel:AXIS``, ``group:SIZE:AXIS`` or ``split:BOUNDARY:AXIS``, with ``:float16`` for scales in float16; the
    inverse of ``str``.

    ``element:COUNT:HIGH+`` before any of these: so many elements are kept in the cast HIGH. ``output:COUNT:HIGH+`` before
    ``channel`` and ``group``: so many output channels are stored in the format HIGH.
    """
    kept = KEPT.fullmatch(text)
    if kept is not None:
        return PerElement(int(kept["count"]), kept["high"], _parse_scales(kept["scales"]))
    outputs = OUTPUTS.fullmatch(text)
    if outputs is not None:
        scales = _parse_scales(outputs["scales"])
        if not isinstance(scales, PerChannel | PerGroup):
            raise ConfigError(
                f"output channels in two formats with other scales: '{text}'", "a scale per channel, or per group"
            )
        return PerOutput(int(outputs["count"]), outputs["high"], scales)
    return _parse_scales(text)


def _parse_scales(text: str) -> Granularity:
    match = TEXT.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"unknown granularity '{text}'", "tensor, channel:AXIS, group:SIZE:AXIS or split:BOUNDARY:AXIS"
        )
    scale_dtype = torch.float16 if match["half"] else torch.float32
    if match["size"]:
        return PerGroup(int(match["size"]), int(match["axis"]), scale_dtype)
    if match["boundary"]:
        return PerSplit(int(match["boundary"]), int(match["of"]), scale_dtype)
    return PerChannel(int(match["channel"]), scale_dtype) if match["channel"] else PerTensor(scale_dtype)
