"""Where a network's activations are quantized: the inputs of its layers, the operands of attention, and its output.

A **site** is named after its layer; ``MODULE.query``, ``.key``, ``.value`` and ``.softmax`` are what attention multiplies, and
``output`` is what the network puts out. Shapes: B batch, C channels, N attention heads, L tokens, D channels per head.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fqdiff.quant.timestep_bias import LAYERS

OUTPUT = "output"
OPERANDS = ("query", "key", "value", "softmax")
Transform = Callable[[Tensor], Tensor]
Release = Callable[[], None]


def activation_sites(network: nn.Module) -> dict[str, int]:
    """Every site, in the order of the network's modules, with the number of its channels; attention has its heads for such.

    The output has as many as the last layer puts out.
    """
    found: dict[str, int] = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            found[name] = module.in_features
        elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            found[name] = module.in_channels
        elif hasattr(module, "attend"):
            heads = module.num_heads
            assert isinstance(heads, int)
            found |= {f"{name}.{operand}": heads for operand in OPERANDS}
    last = network.get_submodule(last_layer(network))
    channels = last.out_features if isinstance(last, nn.Linear) else last.out_channels
    assert isinstance(channels, int)
    return {**found, OUTPUT: channels}


def last_layer(network: nn.Module) -> str:
    """The layer whose output is the network's: the last of its modules that is a layer."""
    names: list[str] = [name for name, module in network.named_modules() if isinstance(module, LAYERS)]
    return names[-1]


def site_axis(network: nn.Module, site: str) -> int:
    """The axis of the tensor at ``site`` that counts its channels."""
    owner = None if site == OUTPUT or is_operand(site) else network.get_submodule(site)
    return -1 if isinstance(owner, nn.Linear) else 1


def is_operand(site: str) -> bool:
    """Whether ``site`` is within attention."""
    return site.rpartition(".")[2] in OPERANDS


class OpenAttention:
    """softmax(q k^T / sqrt(D)) v written out, every operand passed through what ``through`` has for it."""

    def __init__(self, fused: Callable[..., Tensor]) -> None:
        self.fused = fused
        self.through: dict[str, Transform] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        """[B, N, L, D] three times -> the same shape."""
        q, k, v = self._passed("query", q), self._passed("key", k), self._passed("value", v)
        weights = torch.softmax(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5, dim=-1)
        return self._passed("softmax", F.dropout(weights, dropout)) @ v

    def _passed(self, operand: str, x: Tensor) -> Tensor:
        return self.through[operand](x) if operand in self.through else x


def tap(network: nn.Module, site: str, transform: Transform) -> Release:
    """From now on the tensor at ``site`` is what ``transform`` makes of it; the function returned ends that.

    Attention gives up its fused kernel, which shows nobody its softmax, while one of its operands is tapped.
    """
    if site == OUTPUT:  # by its last layer: a network with phases calls itself for parts of a batch
        last = network.get_submodule(last_layer(network))
        return last.register_forward_hook(lambda module, arguments, output: transform(output)).remove
    if not is_operand(site):
        layer = network.get_submodule(site)
        return layer.register_forward_pre_hook(
            lambda module, arguments: (transform(arguments[0]), *arguments[1:])
        ).remove
    owner, _, operand = site.rpartition(".")
    attention = network.get_submodule(owner)
    opened = attention.attend
    if not isinstance(opened, OpenAttention):
        assert callable(opened)
        opened = OpenAttention(opened)
        attention.attend = opened  # a plain attribute, neither tensor nor module
    opened.through[operand] = transform

    def release() -> None:
        opened.through.pop(operand, None)
        if not opened.through:
            attention.attend = opened.fused  # type: ignore[assignment]

    return release


@contextmanager
def watching(network: nn.Module, sites: Iterable[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Inside, ``see`` gets the name and the tensor of each of ``sites`` whenever the network computes it."""

    def watched(site: str) -> Transform:
        def transform(x: Tensor) -> Tensor:
            see(site, x)
            return x

        return transform

    releases = [tap(network, site, watched(site)) for site in sites]
    try:
        yield
    finally:
        for release in releases:
            release()


def channel_parts(granularity: str, channels: int, boundary: int | None) -> tuple[int, ...]:
    """How many neighbouring channels share each scale: all, those on either side of ``boundary``, or one each."""
    if granularity == "tensor":
        return (channels,)
    if granularity == "channel":
        return (1,) * channels
    assert boundary is not None
    return boundary, channels - boundary


def grouped(x: Tensor, axis: int, parts: tuple[int, ...]) -> list[Tensor]:
    """Sample by sample the numbers that share a scale, [B, g, n]: one tensor for parts of equal size, else one for each."""
    rows = x.movedim(axis, 1).reshape(len(x), sum(parts), -1)
    if len(set(parts)) == 1:
        return [rows.reshape(len(x), len(parts), -1)]
    return [part.reshape(len(x), 1, -1) for part in rows.split(parts, dim=1)]


def site_boundaries(sites: Mapping[str, int], boundaries: Mapping[str, int]) -> dict[str, int]:
    """``boundaries`` of layers that are ``sites``, with a channel on either side."""
    return {site: at for site, at in boundaries.items() if 0 < at < sites.get(site, 0)}
