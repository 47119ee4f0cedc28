"""Biases that depend on the timestep: a table of K intervals of t for each layer, added to what the layer puts out.

The intervals have equal width: t in [0, T) is in interval floor(t K / T). Shapes: B batch, O output channels.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fqdiff.errors import QuantizationError

SUFFIX = ".timestep_bias"  # a table's name in the file: its layer's, and this
DTYPE = torch.float16
LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


def channel_axis(layer: nn.Module) -> int:
    """The axis of ``layer``'s output that counts its channels."""
    return -1 if isinstance(layer, nn.Linear) else 1


def interval_of(t: Tensor, intervals: int, num_train_timesteps: int) -> Tensor:
    """The interval, in [0, intervals), of each timestep in ``t``."""
    return torch.div(t * intervals, num_train_timesteps, rounding_mode="floor")


def check_tables(network: nn.Module, tables: Mapping[str, Tensor], num_train_timesteps: int) -> None:
    """Raise QuantizationError unless ``tables`` are finite, float16 [K, O] of layers with a bias, with one K in [1, T]."""
    counts = {len(table) for table in tables.values() if table.ndim}
    if len(counts) > 1 or not all(1 <= count <= num_train_timesteps for count in counts):
        raise QuantizationError(
            f"timestep biases for {sorted(counts)[:5]} intervals", "one number for all, from 1 to T"
        )
    layers = {name: module for name, module in network.named_modules() if isinstance(module, LAYERS)}
    for name, table in tables.items():
        bias = layers[name].bias if name in layers else None
        if bias is None:
            raise QuantizationError(f"a timestep bias for '{name[:100]}', which is no layer with a bias")
        if table.dtype != DTYPE or table.ndim != 2 or table.shape[1:] != bias.shape:
            raise QuantizationError(f"a timestep bias of {table.dtype} {tuple(table.shape)} for '{name}'")
        if not torch.isfinite(table).all():
            raise QuantizationError(f"the timestep bias of '{name}' holds NaN or infinity")


def add_timestep_bias(
    network: nn.Module, tables: Mapping[str, Tensor], num_train_timesteps: int
) -> Callable[[Tensor], None]:
    """From now on ``network(x, t)`` adds to each layer's output the row of its table that t calls for, sample by sample.

    ``tables`` are keyed by layer name. They become buffers, which move with the network, but are in no state dict: parameters
    keep their names, and nothing else about the network changes. The function returned tells the layers the timesteps [B] of a
    batch that a part of the network alone is to compute.
    """
    if not tables:
        return lambda t: None
    check_tables(network, tables, num_train_timesteps)
    intervals = len(next(iter(tables.values())))
    current: list[Tensor] = []  # the interval of each sample of the batch on its way

    def note(t: Tensor) -> None:
        current[:] = [interval_of(t, intervals, num_train_timesteps)]

    def note_arguments(module: nn.Module, arguments: tuple[Tensor, Tensor]) -> None:
        note(arguments[1])

    def add_bias(layer: nn.Module, arguments: object, output: Tensor) -> Tensor:
        rows = layer.get_buffer("timestep_bias")[current[0]].float()  # [B, O]
        shape = [len(rows), *[1] * (output.ndim - 1)]
        shape[channel_axis(layer)] = rows.shape[1]
        return output + rows.view(shape)

    network.register_forward_pre_hook(note_arguments)
    for name, table in tables.items():
        layer = network.get_submodule(name)
        layer.register_buffer("timestep_bias", table, persistent=False)
        layer.register_forward_hook(add_bias)
    return note
