"""Every parameter in every format that it may take: the bytes it would cost, and what its error would do.

Shapes: M parameters, F options, O output channels.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fqdiff.context import Context
from fqdiff.errors import QuantizationError
from fqdiff.planning.knapsack import Array, lower_hull
from fqdiff.quant.container import DTYPE_NAMES, Description, metadata, model_bytes, stored_tensors
from fqdiff.quant.elements import BY_RISE, choose_kept
from fqdiff.quant.formats import Format, Granularity, PerElement, PerGroup, PerOutput, PerTensor, get_format
from fqdiff.quant.granularity import granularities
from fqdiff.quant.packed import pack_tensor, stored_bytes, unpack_tensor
from fqdiff.quant.ranges import FISHER, MIN_MAX
from fqdiff.quant.rounding import NEAREST
from fqdiff.sensitivity.candidates import channel_errors

FLOATS = ("float32", "float16")  # what biases and norms may take
KEPT_IN = "float16"
KEPT_SHARES = (0.005, 0.01, 0.02, 0.05)  # of a tensor's elements
KEPT_UP_TO = 4  # bits of the others: above that errors are so small that an element of 16 bits buys nothing
Importance = Mapping[str, Tensor]
Model = Mapping[str, object]


@dataclass(frozen=True)
class Ways:
    """What there is to choose from: ``formats``, each with every one of ``granularities`` and ``ranges`` that it can have.

    ``granularities`` as in a plan's settings, such as "channel" and "group-near:64"; ``scale``: what scales are stored in;
    ``kept_shares``: of each tensor's elements, kept in float16; ``boundaries``: where the granularity "split" splits, by name.
    """

    formats: tuple[str, ...]
    granularities: tuple[str, ...] = ("channel",)
    ranges: tuple[str, ...] = (MIN_MAX,)
    scale: str = "float32"
    rounding: str = NEAREST
    kept_shares: tuple[float, ...] = ()
    boundaries: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Option:
    """One parameter stored in one way. ``bytes``: its payload; ``value``: what its error is predicted to do.

    ``span`` is the range that is predicted to do least.
    """

    description: Description
    span: str
    rounding: str
    bytes: int
    value: float

    @property
    def format(self) -> str:
        """Name of the format."""
        return self.description[1].name

    def is_all_in(self, name: str) -> bool:
        """Whether all output channels are stored in format ``name``."""
        return self.format == name and not isinstance(self.description[2], PerOutput)

    def stored(self, tensor: Tensor, weight: Tensor | None, kept: Tensor | None = None) -> Tensor:
        """``tensor`` as it would be read back, float32; ``weight`` are the Fisher values of its elements, if known.

        ``kept``: which elements are kept, where the caller knows.
        """
        _, fmt, granularity = self.description
        if kept is None:
            kept = choose_kept(tensor, fmt, granularity, weight, BY_RISE, self.span)
        return unpack_tensor(pack_tensor(tensor, fmt, granularity, self.span, self.rounding, weight, kept))


def best_ranges(options: Iterable[Option]) -> tuple[Option, ...]:
    """Of options that differ in nothing but the range the one of least value, the first of several."""
    kept: dict[Description, Option] = {}
    for option in options:
        if option.description not in kept or option.value < kept[option.description].value:
            kept[option.description] = option
    return tuple(kept.values())


def every_option(
    tensors: Mapping[str, Tensor],
    axes: Mapping[str, int],
    ways: Ways,
    importance: Importance,
    weights: Mapping[str, Tensor],
    context: Context,
) -> dict[str, tuple[Option, ...]]:
    """Options of every parameter, in every range.

    ``importance`` [1], [O] or of the parameter's shape: an option's value is the sum of importance * error^2. ``weights``:
    Fisher values that ranges and codebooks are fitted to, where they are known. What overflows is no option. Raises
    QuantizationError for NaN and infinity, ConfigError for group sizes that do not divide.
    """
    found = {}
    with context.progress(len(tensors), "plan", "tensor") as bar:
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise QuantizationError(f"'{name}' holds NaN or infinity", "check the checkpoint it came from")
            chosen: dict[Description, Tensor | None] = {}  # kept elements: the same for all ranges
            options = []
            for description, span in tensor_ways(name, tensor, axes[name], ways):
                option = Option(description, span, ways.rounding, stored_bytes(*description), 0.0)
                try:
                    if description not in chosen:
                        chosen[description] = choose_kept(tensor, *description[1:], weights.get(name), BY_RISE)
                    stored = option.stored(tensor, weights.get(name), chosen[description])
                except QuantizationError:  # the tensor is finite: it overflows the cast, or its scales do
                    continue
                value = predicted_value(tensor, stored, axes[name], importance[name])
                options.append(replace(option, value=value))
            if not options:
                raise QuantizationError(f"'{name}' can be stored in none of {', '.join(ways.formats)}", "add float32")
            found[name] = tuple(options)
            bar.update()
    return found


def tensor_ways(name: str, tensor: Tensor, axis: int, ways: Ways) -> Iterator[tuple[Description, str]]:
    """Every way of storing one parameter: its description, and the range."""
    shape = tuple(tensor.shape)
    if tensor.ndim < 2:
        yield from (((shape, get_format(f), PerTensor()), MIN_MAX) for f in FLOATS)
        return
    grains = list(
        dict.fromkeys(
            granularities(wish, ways.scale, {name: (shape, axis)}, ways.boundaries)[name] for wish in ways.granularities
        )
    )
    for fmt in map(get_format, ways.formats):
        if fmt.is_cast:
            yield (shape, fmt, PerTensor()), MIN_MAX
            continue
        for grain in grains:
            if fmt.kind != "codebook" or not isinstance(
                grain, PerGroup
            ):  # a list for every group costs more than it saves
                for each in (grain, *_with_kept(tensor, fmt, grain, ways.kept_shares)):
                    yield from (((shape, fmt, each), span) for span in _ranges(fmt, ways.ranges))


def _with_kept(tensor: Tensor, fmt: Format, grain: Granularity, shares: Sequence[float]) -> list[PerElement]:
    """``grain`` with every number of kept elements that is one, and not all."""
    if fmt.bits > KEPT_UP_TO:
        return []
    counts = dict.fromkeys(round(share * tensor.numel()) for share in shares)
    return [PerElement(count, KEPT_IN, grain) for count in counts if 0 < count < tensor.numel()]


def _ranges(fmt: Format, ranges: Sequence[str]) -> tuple[str, ...]:
    """Those of ``ranges`` that ``fmt`` can tell apart."""
    if fmt.is_integer:
        return tuple(ranges)
    return (FISHER,) if FISHER in ranges and fmt.kind in ("ternary", "codebook") else (MIN_MAX,)


def predicted_value(tensor: Tensor, stored: Tensor, axis: int, importance: Tensor) -> float:
    """Sum of importance * (stored - tensor)^2; ``importance`` [1], [O] or of the parameter's shape."""
    if importance.shape == tensor.shape:
        return float((importance.double() * (stored.double() - tensor.double()).square()).sum())
    column = (tensor, stored) if tensor.ndim >= 2 else (tensor.reshape(-1, 1), stored.reshape(-1, 1))
    squares = channel_errors(*column, axis if tensor.ndim >= 2 else 0)
    return float(importance.double() @ (squares if len(importance) == len(squares) else squares.sum().reshape(1)))


@dataclass(frozen=True)
class Market:
    """All options with their values and the bytes they add to the file of ``model``."""

    model: Model
    options: Mapping[str, tuple[Option, ...]]

    def table(self, entry: Callable[[str, Option], float]) -> Array:
        """``entry`` of every option, float64 [M, F], infinite where a parameter has fewer options."""
        table = np.full((len(self.options), max(map(len, self.options.values()))), np.inf)
        for row, (name, options) in zip(table, self.options.items(), strict=True):
            row[: len(options)] = [entry(name, option) for option in options]
        return table

    @cached_property
    def values(self) -> Array:
        """float64 [M, F], infinite where a parameter has fewer options."""
        return self.table(lambda name, option: option.value)

    @cached_property
    def costs(self) -> Array:
        """Bytes of each option, payload and its lines of the header, float64 [M, F]; infinite as in ``values``.

        How many digits the header's offsets take depends on everything stored before; here all take as many as the largest
        could. :meth:`size` knows the truth.
        """
        largest = sum(max(option.bytes for option in options) for options in self.options.values())
        offset = 10 ** len(str(largest)) - 1
        return self.table(lambda name, option: option.bytes + header_bytes(name, option.description, offset))

    def chosen(self, choice: Iterable[int]) -> dict[str, Option]:
        """The option that each parameter takes."""
        return {n: options[j] for (n, options), j in zip(self.options.items(), choice, strict=True)}

    def size(self, choice: Iterable[int]) -> int:
        """Size of the whole file, to the byte."""
        described = {name: option.description for name, option in self.chosen(choice).items()}
        return model_bytes(self.model, described)

    def worthwhile(self) -> "Market":
        """The same with only those options that a linear relaxation would ever take: the lower hull of (bytes, value)."""
        hulls = (lower_hull(v, c) for v, c in zip(self.values, self.costs, strict=True))
        return Market(
            self.model,
            {n: tuple(each[j] for j in hull) for (n, each), hull in zip(self.options.items(), hulls, strict=True)},
        )

    def restricted(self, allowed: Mapping[str, str]) -> "Market":
        """The same with one format only for the parameters in ``allowed``."""
        options = {
            name: tuple(o for o in each if name not in allowed or o.is_all_in(allowed[name]))
            for name, each in self.options.items()
        }
        for name, each in options.items():
            if not each:
                raise QuantizationError(f"'{name}' cannot be stored in {allowed[name]}", "choose another format for it")
        return Market(self.model, options)


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
