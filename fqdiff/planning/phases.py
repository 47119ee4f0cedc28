"""Plans whose tensors are read with fewer bits in some phases of the timesteps, for two limits: bytes stored and bytes read.

Every stored bit lowers the error of every phase that reads it, so that for a limit on the file alone phases have nothing to
offer: the solver drops all of them. They pay where the bytes that a timestep reads are limited too, and less than those of the
file: tensors then keep their bits for the phases that matter to them.

Shapes: M parameters, F options, K phases.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from torch import Tensor

from fqdiff.configs import PlanConfig
from fqdiff.context import Context
from fqdiff.errors import ConfigError, QuantizationError
from fqdiff.models.registry import build, output_axes, split_weights
from fqdiff.planning import budget
from fqdiff.planning.candidates import Market, Option, Ways, predicted_value, tensor_ways
from fqdiff.planning.knapsack import Array, total
from fqdiff.planning.plans import Offer, make_plan, target_bytes, ways
from fqdiff.planning.scores import fisher_importance
from fqdiff.quant.container import Description
from fqdiff.quant.formats import PHASES, Format, get_format, with_phases
from fqdiff.quant.packed import pack_tensor, read_bytes, stored_bytes, unpack_tensor
from fqdiff.values import Checkpoint, FisherTable, Phases, Plan

ROUNDS = 40


def make_phased_plan(
    checkpoint: Checkpoint, table: FisherTable, offer: Offer, config: PlanConfig, context: Context
) -> Plan:
    """The plan of least predicted rise, summed over ``config.phases``, within the size of the file and what timesteps read.

    Raises ConfigError where nothing fits either.
    """
    target = target_bytes(config, offer.parameters)
    assert target is not None
    limit = int(config.traffic_bpw * offer.parameters / 8) if config.traffic_bpw > 0 else None
    single = best_within(offer.market, target, limit)
    market = with_nested(checkpoint, table, offer, config, context)
    best = best_within(market, target, limit)
    if best.predicted(market) >= single.predicted(offer.market):  # by rounding of float64 sums, or of a plan not exact
        market, best = offer.market, replace(single, choice=replace(single.choice, lower_bound=best.choice.lower_bound))
    shown, choice = shortened(market, best)
    facts = Phases(
        count=config.phases,
        read_bytes=total(reads_of(market), best.choice.positions),
        traffic_bytes=limit,
        single_predicted=single.predicted(offer.market),
        single_bytes=offer.market.size(single.choice.positions),
    )
    return replace(make_plan(replace(offer, market=shown), config, choice=choice), phases=facts)


# --- options ---------------------------------------------------------------------------------------------------------


def with_nested(
    checkpoint: Checkpoint, table: FisherTable, offer: Offer, config: PlanConfig, context: Context
) -> Market:
    """The market of ``offer`` with integers of fewer bits in some phases, where no other option is better in every way."""
    spec, shapes = checkpoint.spec, {name: tuple(t.shape) for name, t in checkpoint.tensors.items()}
    network = build(spec.architecture, "meta")
    axes = output_axes(network)
    schedule, count = spec.noise_schedule(), config.phases
    importance = [fisher_importance(table, config.timestep_weights, schedule, shapes, (k, count)) for k in range(count)]
    offered, options = ways(config, bool(offer.weights), split_weights(network)), {}
    with context.progress(len(shapes), "phases", "tensor") as bar:
        for name, tensor in checkpoint.tensors.items():
            options[name] = offer.market.options[name]
            if name not in offer.ends:
                phases = [each[name] for each in importance]
                nested = nested_options(name, tensor, axes[name], offered, phases, offer.weights.get(name))
                options[name] = undominated((*options[name], *nested))
            bar.update()
    return Market(offer.market.model, options)


def nested_options(
    name: str, tensor: Tensor, axis: int, offered: Ways, importance: Sequence[Tensor], weight: Tensor | None
) -> list[Option]:
    """``tensor`` in the integers of ``offered``, with every choice of their bits for the phases; ``importance`` of each, [K].

    Of those that store and read as much, in as many planes, the one of least value. Which phase reads how many bits changes
    its own value alone: codes, scales and the values of each number of bits are made once.
    """
    found: dict[tuple[Description, int, int], Option] = {}
    for (shape, fmt, grain), span in tensor_ways(name, tensor, axis, offered):
        widths = sorted({int(f.bits) for f in _integers(offered) if f.bits <= fmt.bits})
        if not fmt.is_integer or len(widths) < 2:
            continue
        try:
            packed = pack_tensor(tensor, replace(fmt, phase_bits=tuple(widths)), grain, span, offered.rounding, weight)
        except QuantizationError:  # as in every_option: its scales overflow
            continue
        stored = [unpack_tensor(packed, phase) for phase in range(len(widths))]
        rises = [
            {b: predicted_value(tensor, s, axis, i) for b, s in zip(widths, stored, strict=True)} for i in importance
        ]
        best: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {}
        for bits in product(widths, repeat=len(importance)):
            if max(bits) == fmt.bits and min(bits) < fmt.bits:
                key, value = (sum(bits), len(set(bits))), sum(rise[b] for rise, b in zip(rises, bits, strict=True))
                best[key] = min(best.get(key, (float("inf"), bits)), (value, bits))
        for key, (value, bits) in best.items():
            known = found.get(((shape, fmt, grain), *key))
            if known is None or value < known.value:
                description = (shape, with_phases(fmt, bits), grain)
                option = Option(description, span, offered.rounding, stored_bytes(*description), value)
                found[((shape, fmt, grain), *key)] = option
    return list(found.values())


def _integers(offered: Ways) -> Iterator[Format]:
    return (fmt for fmt in map(get_format, offered.formats) if fmt.is_integer)


def undominated(options: Sequence[Option]) -> tuple[Option, ...]:
    """Those without phases, and those with to which no other option is equal or better in all: bytes stored and read, lines
    of the header, and value.
    """
    facts = np.array([(o.bytes, read_bytes(*o.description), len(set(_bits(o))), o.value) for o in options])
    kept = []
    for k, option in enumerate(options):
        better = (facts <= facts[k]).all(axis=1)
        better[k:] &= (facts[k:] < facts[k]).any(axis=1)  # of equals the first stays
        if not _bits(option) or not better.any():
            kept.append(option)
    return tuple(kept)


def _bits(option: Option) -> tuple[int, ...]:
    return option.description[1].phase_bits


def reads_of(market: Market) -> Array:
    """Payload bytes that a timestep reads of each option, averaged over timesteps, float64 [M, F]; infinite as in ``values``."""
    return market.table(lambda name, option: read_bytes(*option.description))


# --- the best of them ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Best:
    """A choice, and ``price``: the predicted rise that it was worth to read one byte less."""

    choice: budget.Choice
    price: float

    def predicted(self, market: Market) -> float:
        """The rise."""
        return total(market.values, self.choice.positions)


def best_within(market: Market, target: int, limit: int | None) -> Best:
    """The choice of least value whose file takes at most ``target`` bytes, and of which a timestep reads at most ``limit``.

    With a limit that binds: Lagrange's relaxation of it, whose inner problem is the knapsack of :mod:`fqdiff.planning.budget`;
    its price is found by the cutting planes of its dual, which end where no choice is left between two. The best choice that
    fits is then mended by single changes; the ``lower_bound`` is the dual's, and the gap is told. Raises ConfigError where
    nothing fits.
    """
    values, reads = market.values, reads_of(market)
    free = budget.best_within(market, target)
    if limit is None or total(reads, free.positions) <= limit:
        return Best(free, 0.0)
    least = budget.best_within(market, target, reads).positions
    if total(reads, least) > limit:
        raise ConfigError(
            f"no plan that fits reads {limit:,} bytes or less",
            f"the least is {total(reads, least):,.0f} bytes: --traffic-bpw {_bits_per_weight(market, total(reads, least))}",
        )
    over, best, price = free.positions, least, 0.0
    bound = _floor(free, values)
    under, constraint = least, free.constraint
    for _ in range(ROUNDS):
        price = (total(values, under) - total(values, over)) / (total(reads, over) - total(reads, under))
        if price <= 0:
            break
        priced = values + price * reads
        found = budget.best_within(market, target, priced)
        constraint = found.constraint
        bound = max(bound, _floor(found, priced) - price * limit)
        if total(priced, found.positions) >= total(priced, under) * (1 - 1e-12):
            break
        if total(reads, found.positions) > limit:
            over = found.positions
        else:
            under = found.positions
            best = min(best, under, key=lambda positions: total(values, positions))
    best = budget.polished(market, best, target, values, (reads, limit))
    binds = "traffic" if constraint == "none" else "budget and traffic"
    return Best(budget.Choice(best, min(max(bound, 0.0), total(values, best)), binds), price)


def _floor(found: budget.Choice, values: Array) -> float:
    """What no choice gets below in ``values``, of which ``found`` is the best that fits."""
    if found.constraint == "none":
        return total(values, found.positions)
    assert found.lower_bound is not None
    return found.lower_bound


def _bits_per_weight(market: Market, size: float) -> float:
    weights = sum(int(np.prod(options[0].description[0])) for options in market.options.values())
    return float(np.ceil(8e4 * size / weights) / 1e4)


def shortened(market: Market, best: Best) -> tuple[Market, budget.Choice]:
    """``market`` without most options with phases, and the same choice in it: of each width and granularity stays the option
    that is best at the price of ``best``, and what was chosen.
    """
    options: dict[str, tuple[Option, ...]] = {}
    positions = []
    for (name, each), chosen in zip(market.options.items(), best.choice.positions, strict=True):
        kept: dict[object, Option] = {}
        for option in each:
            _, fmt, grain = option.description
            key = (fmt.name.partition(PHASES)[0], grain, bool(fmt.phase_bits))
            if key not in kept or _priced(option, best.price) < _priced(kept[key], best.price):
                kept[key] = option
        options[name] = tuple(o for o in each if o is each[chosen] or any(o is k for k in kept.values()))
        positions.append(next(k for k, o in enumerate(options[name]) if o is each[chosen]))
    return Market(market.model, options), replace(best.choice, positions=tuple(positions))


def _priced(option: Option, price: float) -> float:
    return option.value + price * read_bytes(*option.description)
