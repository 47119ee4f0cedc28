"""Networks whose weights stay packed: a layer's float32 values exist while the layer uses them, and no longer.

A packed parameter is a child module of the layer that owns it, under the parameter's name, so that a network's ``state_dict``
holds the tensors of the file: ``conv.weight.codes``, ``conv.weight.scale``. Whoever reads ``conv.weight``, be it the layer or a
parent, gets the values dequantized anew, and they are freed with the last reference to them, after an exception too.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fqdiff.errors import QuantizationError
from fqdiff.quant.packed import PackedTensor, unpack_tensor


class PackedParameter(nn.Module):
    """One parameter as it is stored; calling it gives its float32 values, without a gradient of their own.

    The parts are buffers, and move with ``.to(device)``. With ``cache`` the values are kept from the first call on, once for
    each precision. ``phase`` tells which phase of the timesteps they are for, where its format has some.
    """

    def __init__(self, packed: PackedTensor, cache: bool) -> None:
        super().__init__()
        self.packed_as = packed.format, packed.granularity, packed.shape
        self.cache = cache
        self.phase: int | None = None
        self.values: dict[float, Tensor] = {}  # by bits
        for name, part in packed.parts.items():
            self.register_buffer(name, part)
        self.register_load_state_dict_post_hook(_forget)  # type: ignore[no-untyped-call]

    def forward(self) -> Tensor:
        fmt = self.packed_as[0]
        bits = fmt.bits if self.phase is None or not fmt.phase_bits else fmt.phase_bits[self.phase]
        if bits in self.values:
            return self.values[bits]
        # Cached values may be read outside of the inference mode that they were first read in.
        with torch.inference_mode(False), torch.no_grad():
            values = unpack_tensor(PackedTensor(*self.packed_as, dict(self.named_buffers())), self.phase)
        if self.cache:
            self.values[bits] = values
        return values

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedParameter":
        """What ``.to``, ``.cuda`` and their like do. Raises QuantizationError where it would change a part's dtype."""
        moved = {name: fn(part) for name, part in self.named_buffers()}
        for name, part in self.named_buffers():
            if moved[name].dtype != part.dtype:
                raise QuantizationError(
                    f"packed weights cannot become {moved[name].dtype}",
                    "they give float32 values; move them with .to(device), and use torch.autocast for other arithmetic",
                )
        self._buffers.update(moved)
        self.values = {}
        return self

    def extra_repr(self) -> str:
        fmt, granularity, shape = self.packed_as
        return f"{shape}, {fmt.name}" + ("" if fmt.is_cast else f", {granularity}")


def _forget(module: nn.Module, incompatible: object) -> None:
    assert isinstance(module, PackedParameter)
    module.values = {}


class PackedLayer(nn.Module):
    """Joined to a layer's class: reading a packed parameter gives its values."""

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        return found() if isinstance(found, PackedParameter) else found


@functools.cache
def _packed_class(kind: type[Any]) -> type[Any]:
    """``kind`` as a :class:`PackedLayer`; one class for all its layers."""
    return type(f"Packed{kind.__name__}", (PackedLayer, kind), {})


def hold_packed(network: nn.Module, packed: Mapping[str, PackedTensor], cache: bool = False) -> None:
    """Put ``packed`` in the place of the parameters of ``network``, which may be on the meta device.

    A layer that reads a parameter twice dequantizes it twice, unless ``cache``. Raises QuantizationError where a name or a
    shape is not the network's, or a parameter is left.
    """
    replace_parameters(network, packed, cache)
    left = [name for name, _ in network.named_parameters()]
    if left:
        raise QuantizationError(f"nothing is packed for {', '.join(left[:3])}")


def replace_parameters(network: nn.Module, packed: Mapping[str, PackedTensor], cache: bool = False) -> None:
    """As :func:`hold_packed`, of a network that may keep other parameters as they are."""
    parameters = dict(network.named_parameters())
    for name, tensor in packed.items():
        if name not in parameters or tuple(parameters[name].shape) != tensor.shape:
            raise QuantizationError(f"the network has no parameter '{name}' of shape {tensor.shape}")
        owner, _, own_name = name.rpartition(".")
        layer = network.get_submodule(owner)
        if not isinstance(layer, PackedLayer):
            layer.__class__ = _packed_class(type(layer))  # type: ignore[arg-type]  # types are hashable
        delattr(layer, own_name)
        layer.add_module(own_name, PackedParameter(tensor, cache))
