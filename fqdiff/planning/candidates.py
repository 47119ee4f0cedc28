"""Every parameter in every format that it may take: the bytes it would cost, and what its error would do.

Shapes: M parameters, F formats, O output channels.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fqdiff.context import Context
from fqdiff.errors import QuantizationError
from fqdiff.planning.knapsack import Array
from fqdiff.quant.container import DTYPE_NAMES, Description, file_bytes, metadata, stored_tensors
from fqdiff.quant.formats import Granularity, PerChannel, PerTensor, get_format
from fqdiff.quant.packed import stored_bytes
from fqdiff.sensitivity.candidates import MIN_MAX, channel_errors, quantized_weight
from fqdiff.values import Candidate

FLOATS = ("float32", "float16")  # what biases and norms may take
Importance = Mapping[str, Tensor]
Model = Mapping[str, object]


@dataclass(frozen=True)
class Option:
    """One parameter in one format. ``bytes``: codes, scales and zero points; ``squares`` [O]: squared errors by channel."""

    format: str
    description: Description
    bytes: int
    squares: Tensor

    def value(self, importance: Tensor) -> float:
        """sum_c I_c * sum of d^2 within c; ``importance`` [O], or [1] for all channels alike."""
        squares = self.squares if len(importance) == len(self.squares) else self.squares.sum().reshape(1)
        return float(importance @ squares)


def grain(fmt: str, granularity: str, axis: int) -> Granularity:
    """Along ``axis`` for an integer format where a plan's granularity is "channel", else one scale, or none."""
    return PerChannel(axis) if granularity == "channel" and get_format(fmt).is_integer else PerTensor()


def make_options(
    tensors: Mapping[str, Tensor], axes: Mapping[str, int], formats: Sequence[str], granularity: str, context: Context
) -> dict[str, tuple[Option, ...]]:
    """Options of every parameter: ``formats`` for tensors of two axes or more, casts for biases and norms.

    A cast that overflows is none. Raises QuantizationError for NaN and infinity.
    """
    found = {}
    with context.progress(len(tensors), "plan", "tensor") as bar:
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise QuantizationError(f"'{name}' holds NaN or infinity", "check the checkpoint it came from")
            known = formats if tensor.ndim >= 2 else FLOATS
            options = (_option(name, tensor, axes[name], fmt, granularity) for fmt in known)
            found[name] = tuple(o for o in options if o is not None)
            bar.update()
    return found


def _option(name: str, tensor: Tensor, axis: int, fmt: str, granularity: str) -> Option | None:
    shape = tuple(tensor.shape)
    try:
        stored = quantized_weight(Candidate(name, "", tensor.numel(), fmt, MIN_MAX), tensor, granularity, axis)
    except QuantizationError:  # the tensor is finite: it overflows the cast
        return None
    column = (tensor, stored) if tensor.ndim >= 2 else (tensor.reshape(-1, 1), stored.reshape(-1, 1))
    description = shape, get_format(fmt), grain(fmt, granularity, axis)
    return Option(
        fmt, description, stored_bytes(*description), channel_errors(*column, axis if tensor.ndim >= 2 else 0)
    )


@dataclass(frozen=True)
class Market:
    """All options with their values and the bytes they add to the file of ``model``."""

    model: Model
    options: Mapping[str, tuple[Option, ...]]
    importance: Importance

    def _table(self, entry: Callable[[str, Option], float]) -> Array:
        table = np.full((len(self.options), max(map(len, self.options.values()))), np.inf)
        for row, (name, options) in zip(table, self.options.items(), strict=True):
            row[: len(options)] = [entry(name, option) for option in options]
        return table

    @cached_property
    def values(self) -> Array:
        """float64 [M, F], infinite where a parameter has fewer options."""
        return self._table(lambda name, option: option.value(self.importance[name]))

    @cached_property
    def costs(self) -> Array:
        """Bytes of each option, payload and its lines of the header, float64 [M, F]; infinite as in ``values``.

        How many digits the header's offsets take depends on everything stored before; here all take as many as the largest
        could. :meth:`size` knows the truth.
        """
        largest = sum(max(option.bytes for option in options) for options in self.options.values())
        offset = 10 ** len(str(largest)) - 1
        return self._table(lambda name, option: option.bytes + header_bytes(name, option.description, offset))

    def chosen(self, choice: Iterable[int]) -> dict[str, Option]:
        """The option that each parameter takes."""
        return {n: options[j] for (n, options), j in zip(self.options.items(), choice, strict=True)}

    def size(self, choice: Iterable[int]) -> int:
        """Size of the whole file, to the byte."""
        described = {name: option.description for name, option in self.chosen(choice).items()}
        return file_bytes(stored_tensors(described), metadata(self.model, described))

    def restricted(self, allowed: Mapping[str, str]) -> "Market":
        """The same with one format only for the parameters in ``allowed``."""
        options = {
            name: tuple(o for o in each if o.format == allowed.get(name, o.format))
            for name, each in self.options.items()
        }
        for name, each in options.items():
            if not each:
                raise QuantizationError(f"'{name}' cannot be stored in {allowed[name]}", "choose another format for it")
        return Market(self.model, options, self.importance)


def header_bytes(name: str, description: Description, offset: int) -> int:
    """Characters that one parameter adds to the header of a file whose offsets have as many digits as ``offset``."""
    parts = {
        part: {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset]}
        for part, (dtype, shape) in stored_tensors({name: description}).items()
    }
    described = _json_bytes(metadata({}, {name: description})) - _json_bytes(metadata({}, {}))
    return _json_bytes(parts) - len("{}") + len(",") + (described + len(",") if described else 0)


def _json_bytes(data: object) -> int:
    return len(json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode())
