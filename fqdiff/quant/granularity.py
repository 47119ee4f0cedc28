"""One wish for a whole model, such as groups of 32, as the granularity of each of its tensors."""

from collections.abc import Mapping
from math import prod

import torch

from fqdiff.errors import ConfigError
from fqdiff.quant.formats import SPLIT, Granularity, PerChannel, PerGroup, PerSplit, PerTensor
from fqdiff.quant.qparams import nearest_sizes

SCALE_DTYPES = {"float32": torch.float32, "float16": torch.float16}


def granularities(
    wish: str, scale: str, tensors: Mapping[str, tuple[tuple[int, ...], int]], boundaries: Mapping[str, int]
) -> dict[str, Granularity]:
    """What ``wish`` means for each of ``tensors``, name -> (shape, axis of output channels).

    ``tensor``; ``channel``; ``split``: per channel, but of tensors that ``boundaries`` names, two scales, on either side of the
    input channel that it gives; ``group:SIZE``; or ``group-near:SIZE``, in each tensor the size nearest to SIZE (by ratio) that
    divides its output channels: those of 3x3 kernels seldom have a power of two. A channel of no more weights than a group
    is one group: such a tensor gets a scale per channel. Raises ConfigError where group:SIZE does not divide a channel.
    """
    dtype = SCALE_DTYPES[scale]
    if wish == "tensor":
        return dict.fromkeys(tensors, PerTensor(dtype))
    kind, _, digits = wish.partition(":")
    found: dict[str, Granularity] = {}
    for name, (shape, axis) in tensors.items():
        if kind == SPLIT and name in boundaries:
            found[name] = PerSplit(boundaries[name], axis, dtype)
            continue
        weights = prod(shape) // shape[axis]
        size = weights if kind in ("channel", SPLIT) else min(int(digits), weights)
        if kind == "group-near":
            size = nearest_sizes(weights, int(digits), 1)[0]
        if weights % size:
            near = ", ".join(map(str, nearest_sizes(weights, size)))
            raise ConfigError(
                f"groups of {size} do not divide the {weights} weights of an output channel of '{name}'",
                f"sizes that do: {near}; or group-near:{size} takes the nearest for each tensor",
            )
        found[name] = PerChannel(axis, dtype) if size == weights else PerGroup(size, axis, dtype)
    return found
