"""Packed weights for the layers of any network, not of fqdiff's own alone."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fqdiff.configs.plan import GROUPS, SCALES
from fqdiff.errors import QuantizationError, require
from fqdiff.quant.formats import PerTensor, get_format
from fqdiff.quant.granularity import granularities
from fqdiff.quant.modules import replace_parameters
from fqdiff.quant.packed import PackedTensor, pack_tensor

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED, nn.Linear)


def layer_weights(network: nn.Module) -> dict[str, Tensor]:
    """The weights of all convolutions, transposed ones among them, and linear layers, by parameter name."""
    return {
        f"{name}.weight" if name else "weight": layer.weight
        for name, layer in network.named_modules()
        if isinstance(layer, LAYERS) and "weight" in layer._parameters
    }


def pack_layers(
    network: nn.Module,
    formats: str | Mapping[str, str],
    granularity: str = "channel",
    scale: str = "float32",
    cache: bool = False,
) -> dict[str, PackedTensor]:
    """Put the weights of ``network``'s layers into ``formats``, in place, and return how they are stored.

    ``formats``: one for all of :func:`layer_weights`, or by parameter name; other parameters stay as they are. ``granularity``,
    ``scale`` and ``cache`` as everywhere: tensor, channel (the output channel), group:SIZE or group-near:SIZE; float32 or
    float16; whether float32 weights are kept from their first use on. The network's ``state_dict()`` then has the packed tensors,
    and another one that was packed in the same way loads it. Raises QuantizationError for weights that are not
    layers', not float32, shared by two layers, or not finite, ConfigError for an unknown format; the network is then as it was.
    """
    known_grain = granularity in ("tensor", "channel") or GROUPS.fullmatch(granularity) is not None
    require(known_grain, f"unknown granularity '{granularity}'", "tensor, channel, group:SIZE or group-near:SIZE")
    require(scale in SCALES, f"unknown scale '{scale}'", f"one of: {', '.join(SCALES)}")
    weights = layer_weights(network)
    chosen = dict.fromkeys(weights, formats) if isinstance(formats, str) else dict(formats)
    for name in chosen:
        _check(network, name, weights)
    known = {name: get_format(fmt) for name, fmt in chosen.items()}
    axes = {
        name: (tuple(weights[name].shape), int(isinstance(_layer(network, name), TRANSPOSED)))
        for name, fmt in known.items()
        if not fmt.is_cast
    }
    grains = granularities(granularity, scale, axes, {})  # of a foreign network no joined skips are known
    packed = {n: pack_tensor(weights[n].detach(), fmt, grains.get(n, PerTensor())) for n, fmt in known.items()}
    replace_parameters(network, packed, cache)
    return packed


def _layer(network: nn.Module, name: str) -> nn.Module:
    return network.get_submodule(name.rpartition(".")[0])


def _check(network: nn.Module, name: str, weights: Mapping[str, Tensor]) -> None:
    if name not in weights:
        raise QuantizationError(f"'{name}' is no weight of a convolution or linear layer", "see layer_weights(network)")
    if weights[name].dtype != torch.float32:
        raise QuantizationError(f"'{name}' is {weights[name].dtype}", "network.float() first")
    owners = [n for n, p in network.named_parameters(remove_duplicate=False) if p is weights[name]]
    if len(owners) > 1:
        raise QuantizationError(f"{' and '.join(owners)} are one tensor", "leave it out of formats")
