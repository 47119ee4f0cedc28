"""From stored architecture (plain data) to network, and what other stages need to know about its parameters."""

from collections.abc import Mapping
from dataclasses import asdict, fields

import torch
from torch import nn

from fqdiff.errors import ConfigError
from fqdiff.models.unet import (
    RECONSTRUCTED,
    SinusoidalTable,
    TemporalBlock,
    UNet,
    UNetConfig,
    block_of,
    concat_boundaries,
    normed_convolutions,
)

Architecture = Mapping[str, object]


def unet_architecture(config: UNetConfig) -> dict[str, object]:
    """``config`` as plain JSON data with its family name."""
    data = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}
    return {"family": "unet", **data}


def unet_config(architecture: Architecture) -> UNetConfig:
    """The UNetConfig that ``architecture`` describes; every field checked, since it may come from a stranger's file."""
    known = {f.name: f.type for f in fields(UNetConfig)}
    given = {k: v for k, v in architecture.items() if k != "family"}
    for name in given.keys() - known.keys():
        raise ConfigError(f"unknown architecture field '{name}'", f"known: {', '.join(known)}")
    clean: dict[str, object] = {}
    for name, value in given.items():
        default = getattr(UNetConfig, name)
        if isinstance(default, tuple):
            if not isinstance(value, list | tuple) or not all(type(v) is int and 0 < v <= 65_536 for v in value):
                raise ConfigError(f"architecture field '{name}' is {value!r}", "a list of positive whole numbers")
            clean[name] = tuple(value)
        elif isinstance(default, float) and isinstance(value, int | float) and 0 <= value < 1:
            clean[name] = float(value)
        elif (isinstance(default, str) and isinstance(value, str)) or (type(value) is int and 0 < value <= 65_536):
            clean[name] = value
        else:
            raise ConfigError(f"architecture field '{name}' is {value!r}", f"e.g. {default!r}")
    return UNetConfig(**clean)  # type: ignore[arg-type]


def build(architecture: Architecture, device: torch.device | str = "cpu") -> nn.Module:
    """The network that ``architecture`` describes; on the ``meta`` device it costs no memory."""
    family = architecture.get("family")
    if family != "unet":
        raise ConfigError(f"unknown model family {family!r}", "known: unet")
    with torch.device(device):
        return UNet(unet_config(architecture))


def parameter_blocks(network: nn.Module) -> dict[str, str]:
    """Block (``1``-``6``, ``stem``, ``head``) of every parameter."""
    return {name: block_of(name) for name, _ in network.named_parameters()}


def first_layer(network: nn.Module) -> str:
    """The layer that is given x_t."""
    assert isinstance(network, UNet)
    return "stem.conv"


def time_features(network: nn.Module) -> torch.Tensor:
    """The sinusoidal embedding of every timestep that the network has, float32 [T, E]."""
    (table,) = (m.get_buffer("table") for m in network.modules() if isinstance(m, SinusoidalTable))
    return table


def temporal_block(network: nn.Module) -> tuple[nn.Module, dict[str, str]]:
    """What of ``network`` depends on t alone, a module of t, and the name in ``network`` of each of its parameters."""
    assert isinstance(network, UNet)
    block = TemporalBlock(network)
    names = {id(p): name for name, p in network.named_parameters()}
    return block, {own: names[id(p)] for own, p in block.named_parameters()}


def temporal_layers(network: nn.Module) -> set[str]:
    """The layers that are given nothing but what depends on t."""
    return {name.rpartition(".")[0] for name in temporal_block(network)[1].values()}


def reconstruction_blocks(network: nn.Module) -> list[str]:
    """The modules that are reconstructed as a whole, in the order of computing: every parameter is in one of them."""
    assert isinstance(network, UNet)
    found: list[str] = []
    for name, module in network.named_modules():
        if isinstance(module, RECONSTRUCTED) and not any(name.startswith(f"{block}.") for block in found):
            found.append(name)
    return found


def skip_boundaries(network: nn.Module) -> dict[str, int]:
    """Layers that are given a skip connection joined to something else, and the channel at which the skip begins."""
    assert isinstance(network, UNet)
    return concat_boundaries(network.config)


def split_weights(network: nn.Module) -> dict[str, int]:
    """Weights whose input channels are those of two joined tensors, and at which channel the second begins."""
    return {f"{layer}.weight": boundary for layer, boundary in skip_boundaries(network).items()}


def normed_layers(network: nn.Module) -> list[tuple[str, str, str]]:
    """(norm, function between, layer) for every layer that is given a norm's output, and nobody else is.

    Attention is given tensors that no norm has seen.
    """
    assert isinstance(network, UNet)
    return [(norm, network.config.activation, layer) for norm, layer in normed_convolutions(network)]


def output_axes(network: nn.Module) -> dict[str, int]:
    """The axis of every parameter that counts output channels: 1 for transposed convolutions' weights, else 0."""
    axes = {}
    for module_name, module in network.named_modules():
        transposed = isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
        for name, _ in module.named_parameters(prefix=module_name, recurse=False):
            axes[name] = 1 if transposed and name.endswith("weight") else 0
    return axes
