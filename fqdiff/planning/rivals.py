"""The scores that others plan precisions by, for every option of a market: hawq, modelopt and autoround, as controls.

Each as :mod:`fqdiff.sensitivity.rivals` defines it, on the loss of calibration inputs, weighted by timestep.
Shapes: K options of all parameters together.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fqdiff.context import Context
from fqdiff.errors import NumericalError
from fqdiff.planning.candidates import Option
from fqdiff.sensitivity import rivals
from fqdiff.sensitivity.inputs import Inputs
from fqdiff.sensitivity.ledger import Ledger
from fqdiff.values import Checkpoint

# What the Hessian may cost: each product takes ten forward passes or more, and HAWQ's 100 draws move ranks by nothing
# (fqdiff.stages.validate).
HESSIAN_DRAWS = 4
HESSIAN_SAMPLES = 1  # training images at each timestep

Options = Mapping[str, tuple[Option, ...]]


@dataclass(frozen=True)
class Bench:
    """A checkpoint with its calibration ``inputs``, ``samples`` of them at each timestep; ``weights``: as options take them."""

    checkpoint: Checkpoint
    inputs: Inputs
    samples: int
    weights: Mapping[str, Tensor]
    seed: int
    context: Context

    def network(self) -> nn.Module:
        """On the device, with gradients."""
        network: nn.Module = self.checkpoint.network().to(
            self.context.device,
            memory_format=torch.channels_last,  # type: ignore[call-overload]
        )
        return network.requires_grad_(True)

    def stored(self, name: str, option: Option) -> Tensor:
        """Parameter ``name`` as ``option`` stores it."""
        return option.stored(self.checkpoint.tensors[name], self.weights.get(name))


def hawq_importance(bench: Bench) -> dict[str, Tensor]:
    """trace(H) / n of every weight tensor, float64 [1], H its block of the loss's Hessian (HAWQ-V2); 0 for a negative trace.

    Times a squared error that is Omega of HAWQ-V2. It knows no biases and norms, which here count as weights do on average.
    Raises NumericalError.
    """
    tensors = bench.checkpoint.tensors
    names = [name for name, tensor in tensors.items() if tensor.ndim >= 2]
    few = bench.inputs.chosen((torch.arange(len(bench.inputs)) % bench.samples < HESSIAN_SAMPLES).nonzero().flatten())
    network = bench.network()
    with bench.context.soft_stop() as stop_requested:
        ledger = Ledger(bench.context, stop_requested)
        traces = ledger.rows("hawq", len(names))
        for k in ledger.units("hawq", len(names), "tensor"):
            traces[k] = rivals.hessian_trace(network, names[k], few, bench.context.device, bench.seed, HESSIAN_DRAWS)
        ledger.save()
    check_finite("hawq", traces)
    positive = traces.clamp(min=0)
    mean = positive.sum() / sum(tensors[name].numel() for name in names)
    own = {name: trace / tensors[name].numel() for name, trace in zip(names, positive, strict=True)}
    return {name: own.get(name, mean).reshape(1) for name in tensors}


def modelopt_valued(bench: Bench, options: Options) -> dict[str, tuple[Option, ...]]:
    """``options`` with the values of ModelOpt's ``auto_quantize``. Raises NumericalError."""
    numbers = numbered(options)
    count = sum(map(len, options.values()))
    quantized = {name: _Stored(bench, name, options[name], numbers[name]) for name in options}
    network, chunks = bench.network(), bench.inputs.chunks()
    with bench.context.soft_stop() as stop_requested:
        ledger = Ledger(bench.context, stop_requested)
        values = ledger.rows("modelopt", count)
        for k in ledger.units("modelopt", len(chunks), "batch"):
            values += rivals.modelopt_scores(network, quantized, chunks[k], bench.context.device, count)
        ledger.save()
    return valued("modelopt", options, values)


def autoround_valued(bench: Bench, options: Options) -> dict[str, tuple[Option, ...]]:
    """``options`` with the values of AutoRound's ``AutoScheme``, whose gradients are taken where all tensors are stored alike.

    One pass for each format, kind of granularity and range; what a parameter lacks leaves it as it is. Where that many errors
    at once leave a network without gradients, such as one that rounds all its weights to 0, every error has the score 0: such an
    option has not been measured and is none. Raises NumericalError.
    """
    numbers = numbered(options)
    passes = alike(options)
    network = bench.network()
    with bench.context.soft_stop() as stop_requested:
        ledger = Ledger(bench.context, stop_requested)
        values = ledger.rows("autoround", sum(map(len, options.values())))
        for k in ledger.units("autoround", len(passes), "format"):
            placed = {name: (numbers[name][j], bench.stored(name, options[name][j])) for name, j in passes[k].items()}
            found = rivals.autoround_scores(network, placed, bench.inputs, bench.context.device)
            for number, value in found.items():
                values[number] = value
        ledger.save()
    found_values = valued("autoround", options, values)
    return {
        name: tuple(
            o for o in each if o.value > 0 or torch.equal(bench.stored(name, o), bench.checkpoint.tensors[name])
        )
        for name, each in found_values.items()
    }


VALUED = {"modelopt": modelopt_valued, "autoround": autoround_valued}


@dataclass(frozen=True)
class _Stored:
    """The options of one parameter, made anew each time they are gone through: all together would not fit in memory."""

    bench: Bench
    name: str
    options: Sequence[Option]
    numbers: Sequence[int]

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        for number, option in zip(self.numbers, self.options, strict=True):
            yield number, self.bench.stored(self.name, option)


def numbered(options: Options) -> dict[str, range]:
    """A number from 0 to K - 1 for each option, parameter by parameter."""
    found, start = {}, 0
    for name, each in options.items():
        found[name] = range(start, start + len(each))
        start += len(each)
    return found


def alike(options: Options) -> list[dict[str, int]]:
    """Parameter -> position of its option, for each way of storing that options share.

    Alike are options of one format, kind of granularity and range; of several group sizes the n-th of each parameter.
    """
    found: dict[tuple[object, ...], dict[str, int]] = {}
    for name, each in options.items():
        seen: Counter[tuple[object, ...]] = Counter()
        for j, option in enumerate(each):
            way = (option.format, type(option.description[2]).__name__, option.span)
            found.setdefault((*way, seen[way]), {})[name] = j
            seen[way] += 1
    return list(found.values())


def valued(score: str, options: Options, values: Tensor) -> dict[str, tuple[Option, ...]]:
    """``options`` with ``values`` [K], parameter by parameter. Raises NumericalError."""
    check_finite(score, values)
    numbers = numbered(options)
    return {
        name: tuple(replace(option, value=float(values[k])) for k, option in zip(numbers[name], each, strict=True))
        for name, each in options.items()
    }


def check_finite(score: str, values: Tensor) -> None:
    """Raise NumericalError unless all ``values`` of ``score`` are numbers."""
    if not torch.isfinite(values).all():
        raise NumericalError(f"the score '{score}' holds NaN or infinity", "check the checkpoint")
