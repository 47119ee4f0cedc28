"""Quantized activations: every site's tensor is replaced by what its codes give back, with the scales of its timestep.

Scales are a table of K equal intervals of t, as for biases by timestep, or are taken from each input (dynamic).
Shapes: B batch, C channels, K intervals of timesteps, G scales of a site at one timestep.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fqdiff.errors import QuantizationError
from fqdiff.quant.activation_formats import (
    activation_qparams,
    fake_quantize,
    get_activation_format,
    zero_points,
)
from fqdiff.quant.activation_sites import (
    OUTPUT,
    activation_sites,
    channel_parts,
    grouped,
    is_operand,
    site_axis,
    site_boundaries,
    tap,
)
from fqdiff.quant.container import Stored
from fqdiff.quant.qparams import QParams
from fqdiff.quant.timestep_bias import interval_of

SCALE, ZERO_POINT = ".activation_scale", ".activation_zero_point"  # names in the file: the site's, and these
GRANULARITIES = ("tensor", "split", "channel")


@dataclass(frozen=True)
class Activation:
    """How the tensor at one site is quantized: ``format`` is a name of the table of activation formats.

    ``granularity``: one scale for the ``tensor``, one per ``channel``, or ``split``: one on either side of where a skip was
    joined. ``scale`` float32 [K, G], and ``zero_point`` uint8 [K, G] where the format stores it; None where scales are dynamic.
    """

    format: str
    granularity: str
    scale: Tensor | None = None
    zero_point: Tensor | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What the file holds of it, by suffix."""
        both = {SCALE: self.scale, ZERO_POINT: self.zero_point}
        return {suffix: tensor for suffix, tensor in both.items() if tensor is not None}


def activation_layout(activations: Mapping[str, Activation]) -> dict[str, Stored]:
    """dtype and shape of every tensor that the file holds for ``activations``."""
    return {
        site + suffix: (tensor.dtype, tuple(tensor.shape))
        for site, activation in activations.items()
        for suffix, tensor in activation.tensors.items()
    }


def described_activations(activations: Mapping[str, Activation]) -> list[dict[str, Any]]:
    """What the header says of ``activations``: sites that are quantized in the same way stand together."""
    alike: dict[tuple[str, str, bool], list[str]] = {}
    for site, a in activations.items():
        alike.setdefault((a.format, a.granularity, a.scale is None), []).append(site)
    keys = ("format", "granularity", "dynamic", "sites")
    return [dict(zip(keys, (*how, sites), strict=True)) for how, sites in alike.items()]


class ActivationQuantizer(nn.Module):
    """The tensor at one site as its codes give it back; its scales are buffers that move with the network.

    They are in no state dict. ``axis`` counts the channels, ``parts`` neighbours of which share a scale.
    """

    def __init__(self, activation: Activation, axis: int, parts: tuple[int, ...]) -> None:
        super().__init__()
        self.format = get_activation_format(activation.format)
        self.axis, self.parts = axis, parts
        self.register_buffer("scale", activation.scale, persistent=False)
        self.register_buffer("zero_point", activation.zero_point, persistent=False)

    def forward(self, x: Tensor, interval: Tensor) -> Tensor:
        """``x`` with sample b quantized by the scales of ``interval[b]``, or by its own range."""
        scale = self._buffers["scale"]
        if scale is None:
            qparams = self._own_range(x)
        else:
            stored = self._buffers["zero_point"]
            zero_point = zero_points(self.format, scale) if stored is None else stored
            qparams = QParams(scale[interval], zero_point[interval])
        return fake_quantize(
            x, self._by_channel(qparams.scale, x), self._by_channel(qparams.zero_point, x), self.format
        )

    def _own_range(self, x: Tensor) -> QParams:
        groups = grouped(x, self.axis, self.parts)
        low = torch.cat([g.amin(dim=2) for g in groups], dim=1)
        high = torch.cat([g.amax(dim=2) for g in groups], dim=1)
        return activation_qparams(low, high, self.format)

    def _by_channel(self, values: Tensor, x: Tensor) -> Tensor:
        """[B, G] -> shaped to broadcast with ``x``."""
        if max(self.parts) > 1 and len(self.parts) > 1:
            values = values.repeat_interleave(torch.tensor(self.parts, device=values.device), dim=1)
        shape = [1] * x.ndim
        shape[0], shape[self.axis] = values.shape
        return values.view(shape)

    def extra_repr(self) -> str:
        return f"{self.format.name}, {len(self.parts)} scales" + (", dynamic" if self._buffers["scale"] is None else "")


def check_activations(
    network: nn.Module,
    activations: Mapping[str, Activation],
    num_train_timesteps: int,
    boundaries: Mapping[str, int],
) -> None:
    """Raise QuantizationError unless ``activations`` are of sites of ``network``, in formats and with scales that suit them.

    ``boundaries``: the layers that are given a joined skip, and the channel where it begins.
    """
    sites = activation_sites(network)
    borders = site_boundaries(sites, boundaries)
    counts = {len(a.scale) for a in activations.values() if a.scale is not None and a.scale.ndim}
    if len(counts) > 1 or not all(1 <= count <= num_train_timesteps for count in counts):
        raise QuantizationError(
            f"activation scales for {sorted(counts)[:5]} intervals", "one number for all, from 1 to T"
        )
    for site, activation in activations.items():
        if site not in sites:
            raise QuantizationError(f"an activation of '{site[:100]}', which is no layer and no operand of attention")
        if activation.granularity not in GRANULARITIES or (activation.granularity == "split" and site not in borders):
            raise QuantizationError(f"the activation of '{site}' has scales by '{activation.granularity[:20]}'")
        fmt = get_activation_format(activation.format)
        if fmt.kind in ("log", "unsigned") and not site.endswith(".softmax"):
            raise QuantizationError(f"the activation of '{site}' is {fmt.name}, and may be negative")
        parts = channel_parts(activation.granularity, sites[site], borders.get(site))
        _check_scales(site, activation, len(parts))


def _check_scales(site: str, activation: Activation, groups: int) -> None:
    fmt, scale, zero_point = get_activation_format(activation.format), activation.scale, activation.zero_point
    if scale is None:
        if zero_point is not None:
            raise QuantizationError(f"the activation of '{site}' has zero points without scales")
        return
    if scale.dtype != torch.float32 or scale.ndim != 2 or scale.shape[1] != groups:
        raise QuantizationError(f"activation scales of {scale.dtype} {tuple(scale.shape)} for '{site}'")
    wrong_sign = fmt.kind != "symmetric" and bool((scale < 0).any())
    if not torch.isfinite(scale).all() or not scale.all() or wrong_sign:
        raise QuantizationError(f"activation scales of '{site}' that are 0, negative or no numbers")
    if (zero_point is not None) != fmt.has_zero_points:
        raise QuantizationError(f"activation zero points of '{site}' that {fmt.name} has no use for, or lacks")
    if zero_point is not None and (
        zero_point.dtype != torch.uint8 or zero_point.shape != scale.shape or int(zero_point.max()) > fmt.qmax
    ):
        raise QuantizationError(f"activation zero points of '{site}' are {zero_point.dtype} {tuple(zero_point.shape)}")


def add_activation_quantizers(
    network: nn.Module,
    activations: Mapping[str, Activation],
    num_train_timesteps: int,
    boundaries: Mapping[str, int],
) -> None:
    """From now on ``network(x, t)`` computes with quantized activations, each sample with the scales of its own t.

    Parameters keep their names and values. Raises QuantizationError where :func:`check_activations` does.
    """
    if not activations:
        return
    check_activations(network, activations, num_train_timesteps, boundaries)
    shapes = site_shapes(network, activations, boundaries)
    quantizers = {site: ActivationQuantizer(a, *shapes[site]) for site, a in activations.items()}
    add_quantizers(network, quantizers, interval_count(activations), num_train_timesteps)


def interval_count(activations: Mapping[str, Activation]) -> int:
    """How many intervals of timesteps have scales of their own."""
    return next((len(a.scale) for a in activations.values() if a.scale is not None), 1)


def site_shapes(
    network: nn.Module, activations: Mapping[str, Activation], boundaries: Mapping[str, int]
) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Of each site the axis that counts its channels, and how many neighbours of these share each scale."""
    sites = activation_sites(network)
    borders = site_boundaries(sites, boundaries)
    return {
        site: (site_axis(network, site), channel_parts(a.granularity, sites[site], borders.get(site)))
        for site, a in activations.items()
    }


def add_quantizers(
    network: nn.Module, quantizers: Mapping[str, nn.Module], intervals: int, num_train_timesteps: int
) -> Callable[[Tensor], None]:
    """From now on the tensor at each site is what its quantizer makes of it and of the interval of each sample.

    The function returned tells the quantizers the timesteps [B] of a batch that a part of the network alone is to compute.
    """
    current: list[Tensor] = []  # the interval of each sample of the batch on its way

    def note(t: Tensor) -> None:
        current[:] = [interval_of(t, intervals, num_train_timesteps)]

    def note_arguments(module: nn.Module, arguments: tuple[Tensor, Tensor]) -> None:
        note(arguments[1])

    network.register_forward_pre_hook(note_arguments)
    for site, quantizer in quantizers.items():
        owner, _, own_name = ("", "", OUTPUT) if site == OUTPUT else site.rpartition(".")
        if site != OUTPUT and not is_operand(site):
            owner, own_name = site, "input"
        network.get_submodule(owner).add_module(f"{own_name}_quantizer", quantizer)
        tap(network, site, lambda x, quantizer=quantizer: quantizer(x, current[0]))  # type: ignore[misc]
    return note
