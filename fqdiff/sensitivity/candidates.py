"""Candidates: one weight tensor in one format, everything else in full precision."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fqdiff.errors import ConfigError
from fqdiff.quant.formats import PerChannel, PerTensor, get_format
from fqdiff.quant.packed import pack_tensor, unpack_tensor
from fqdiff.quant.qparams import dequantize, quantize
from fqdiff.quant.ranges import least_error_qparams
from fqdiff.values import Candidate

MIN_MAX, CLIPPED = "min-max", "clipped"


def make_candidates(
    tensors: Mapping[str, Tensor], blocks: Mapping[str, str], formats: Sequence[str], clipped: Sequence[str]
) -> tuple[Candidate, ...]:
    """Every tensor of two axes or more in each of ``formats`` by min-max ranges, then in each of ``clipped``.

    Tensor by tensor: candidate k is that of tensor k // (formats + clipped).
    """
    for name in clipped:
        if not get_format(name).is_integer:
            raise ConfigError(f"{name} is no integer: it has no range to clip", "clip integer formats, such as int4")
    ways = [(get_format(f).name, MIN_MAX) for f in formats] + [(f, CLIPPED) for f in clipped]
    weights = [name for name, tensor in tensors.items() if tensor.ndim >= 2]
    return tuple(
        Candidate(name, blocks[name], tensors[name].numel(), fmt, kind) for name in weights for fmt, kind in ways
    )


def quantized_weight(candidate: Candidate, weight: Tensor, granularity: str, axis: int) -> Tensor:
    """``weight`` as ``candidate`` would store it, float32. ``granularity``: "channel" along ``axis``, or "tensor"."""
    fmt = get_format(candidate.format)
    grain = PerChannel(axis) if granularity == "channel" and not fmt.is_cast else PerTensor()
    if candidate.range == MIN_MAX:
        return unpack_tensor(pack_tensor(weight, fmt, grain))
    qparams = least_error_qparams(weight, fmt, grain)
    return dequantize(quantize(weight, qparams, fmt, grain), qparams, grain)


def channel_errors(weight: Tensor, quantized: Tensor, axis: int) -> Tensor:
    """Sum of squared errors within each output channel, float64 [O]."""
    error: Tensor = (quantized.double() - weight.double()).square().movedim(axis, 0).flatten(1).sum(dim=1)
    return error


def group_by_tensor(candidates: Sequence[Candidate]) -> dict[str, list[int]]:
    """Positions of each tensor's candidates, in the order of the tensors."""
    groups: dict[str, list[int]] = {}
    for k, candidate in enumerate(candidates):
        groups.setdefault(candidate.tensor, []).append(k)
    return groups


def mean_bits(candidates: Sequence[Candidate]) -> float:
    """Mean bits of the codes over the weights of ``candidates``, one per tensor; scales and kept tensors not counted."""
    bits = torch.tensor([get_format(c.format).bits for c in candidates], dtype=torch.float64)
    sizes = torch.tensor([c.numel for c in candidates], dtype=torch.float64)
    return float((bits * sizes).sum() / sizes.sum())
