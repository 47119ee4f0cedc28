"""Reparameterize a whole network: what its normed layers are given gets one range for all channels, and no output changes.

Factors are those of RepQ-ViT (:mod:`fqdiff.quant.reparameterize`), from the ranges by channel whose 8-bit codes come closest to
what the network computes on a calibration set. Shapes: C channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fqdiff.calibration.activations import Observed, observe
from fqdiff.calibration.inputs import CalibrationInputs
from fqdiff.calibration.ranges import activation_range
from fqdiff.calibration.requirements import check_reparameterization
from fqdiff.quant.activation_formats import get_activation_format
from fqdiff.quant.reparameterize import NormedInput, channel_factors, reparameterize
from fqdiff.values import Checkpoint


def reparameterized(
    checkpoint: Checkpoint,
    places: Sequence[NormedInput],
    inputs: CalibrationInputs,
    device: torch.device,
    tick: Callable[[int], None] = lambda n: None,
) -> Checkpoint:
    """``checkpoint`` with factors moved from all ``places`` into the norms before them; it predicts what it did.

    Raises QuantizationError where one of them does not allow that, or there is none.
    """
    check_reparameterization(places)
    tensors = dict(checkpoint.tensors)
    channels = {place.layer: (1,) * len(tensors[f"{place.norm}.weight"]) for place in places}
    network = checkpoint.network().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    seen = observe(network, channels, inputs, torch.zeros(len(inputs), dtype=torch.int64), 1, tick=tick)
    for place in places:
        names = f"{place.norm}.weight", f"{place.norm}.bias", f"{place.layer}.weight", f"{place.layer}.bias"
        gamma, beta, weight, bias = (tensors[name] for name in names)
        changed = reparameterize(gamma, beta, weight, bias, *_factors(seen[place.layer]))
        tensors |= dict(zip(names, changed, strict=True))
    return replace(checkpoint, tensors=tensors)


def _factors(seen: Observed) -> tuple[Tensor, Tensor]:
    """r and b [C] of one layer's input; channels that are always 0 keep theirs as they are."""
    ((numbers, weights),) = seen.weighted(0)
    low, high = seen.low[0], seen.high[0]
    qparams = activation_range(numbers, weights, low, high, get_activation_format("int8"), "mse")
    alive = (low < 0) | (high > 0)
    ratio, shift = torch.ones(len(alive), dtype=torch.float64), torch.zeros(len(alive), dtype=torch.float64)
    if alive.any():
        ratio[alive], shift[alive] = channel_factors(qparams.scale[alive], qparams.zero_point[alive])
    return ratio, shift
