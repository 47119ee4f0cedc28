"""Number formats of activations: rows of a table, the scales that suit a range, and rounding to what a code stands for.

Activations are never stored; what matters is which values are left of them. Shapes: any, as long as they broadcast.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fqdiff.configs import ACTIVATION_BITS, ACTIVATION_FORMATS
from fqdiff.errors import ConfigError
from fqdiff.quant.formats import SYMMETRIC, get_format
from fqdiff.quant.qparams import QParams, range_qparams, stored_scale


@dataclass(frozen=True)
class ActivationFormat:
    """``affine``: scale * (q - zero_point), a zero point of its own; ``symmetric``: 0 is the middle code; ``unsigned``: 0 is
    code 0; ``log``: scale * 2^(-q / per_octave), for numbers from 0 up. q in [0, qmax].
    """

    name: str
    kind: str
    bits: int
    per_octave: int = 0

    @property
    def qmax(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def has_zero_points(self) -> bool:
        """Whether scales come with the code of 0."""
        return self.kind == "affine"


def _formats() -> dict[str, ActivationFormat]:
    found = []
    for bits in ACTIVATION_BITS:
        found += [
            ActivationFormat(f"int{bits}", "affine", bits),
            ActivationFormat(f"int{bits}{SYMMETRIC}", "symmetric", bits),
            ActivationFormat(f"uint{bits}", "unsigned", bits),
            ActivationFormat(f"log2_{bits}", "log", bits, 1),
            ActivationFormat(f"logsqrt2_{bits}", "log", bits, 2),
        ]
    return {f.name: f for f in found}


FORMATS = _formats()
assert set(ACTIVATION_FORMATS) <= FORMATS.keys()


def get_activation_format(name: str) -> ActivationFormat:
    """The row called ``name``, or ConfigError."""
    if name not in FORMATS:
        raise ConfigError(f"unknown activation format '{name[:50]}'", f"one of: {', '.join(FORMATS)}")
    return FORMATS[name]


def softmax_format(name: str, bits: int) -> ActivationFormat:
    """The format of softmax outputs, which lie in [0, 1]: ``uniform`` (zero point 0), ``log2`` or ``log-sqrt2``."""
    prefix = {"uniform": "uint", "log2": "log2_", "log-sqrt2": "logsqrt2_"}[name]
    return get_activation_format(f"{prefix}{bits}")


def activation_qparams(low: Tensor, high: Tensor, fmt: ActivationFormat) -> QParams:
    """Scales and zero points that spread the codes of ``fmt`` from ``low`` to ``high``, widened to hold 0; shaped like them.

    Unsigned and logarithmic formats begin at 0, whatever ``low`` is.
    """
    if fmt.kind == "affine":
        return range_qparams(low, high, get_format(fmt.name))
    if fmt.kind == "symmetric":
        scale = range_qparams(low, high, get_format(fmt.name)).scale
        return QParams(scale, zero_points(fmt, scale))
    top = high.clamp(min=0).double()
    scale = stored_scale(top if fmt.kind == "log" else top / fmt.qmax, torch.float32)
    return QParams(scale, torch.zeros_like(scale, dtype=torch.uint8))


def zero_points(fmt: ActivationFormat, scale: Tensor) -> Tensor:
    """The zero points of a format that stores none, uint8, shaped like ``scale``."""
    middle = (fmt.qmax + 1) // 2 if fmt.kind == "symmetric" else 0
    return torch.full_like(scale, middle, dtype=torch.uint8)


def activation_codes(x: Tensor, scale: Tensor, zero_point: Tensor, fmt: ActivationFormat) -> Tensor:
    """Codes as floats; in a logarithmic format qmax + 1 where x is below what its last code stands for."""
    if fmt.kind != "log":
        return (x / scale).round_().add_(zero_point).clamp_(0, fmt.qmax)
    return (x / scale).clamp_(min=0).log2_().mul_(-fmt.per_octave).round_().clamp_(0, fmt.qmax + 1)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, fmt: ActivationFormat) -> Tensor:
    """``x`` as the codes of ``fmt`` give it back.

    Logarithmic (RepQ-ViT: Li et al. 2023, arXiv:2212.08254): q = round(-m log2(x / scale)), x ~ 2^(-q / m) scale, m 1 or 2 to an
    octave; x above the scale becomes the scale, and what lies beyond the last code becomes 0.
    """
    codes = activation_codes(x, scale, zero_point, fmt)
    if fmt.kind != "log":
        return codes.sub_(zero_point).mul_(scale)
    beyond = codes > fmt.qmax
    return codes.div_(-fmt.per_octave).exp2_().mul_(scale).masked_fill_(beyond, 0)
