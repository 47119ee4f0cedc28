"""The best plan that fits: least predicted rise within a file size, or the smallest file within a predicted rise."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fqdiff.errors import ConfigError
from fqdiff.planning.candidates import Market
from fqdiff.planning.knapsack import Array, frontier, lower_bound, total
from fqdiff.quant.formats import get_format

MARGIN = 64.0  # bytes by which the digits of the header's offsets may differ between neighbouring optima
ROUNDS = 20


class TargetTooSmall(ConfigError):
    """Nothing fits ``target`` bytes; ``smallest`` is the size of the smallest file. ``beyond``: what would be smaller still."""

    def __init__(self, target: int, smallest: int, beyond: str = "") -> None:
        super().__init__(
            f"no plan fits {target:,} bytes",
            f"the smallest file with these formats has {smallest:,} bytes: --target-size {smallest}{beyond}",
        )
        self.target, self.smallest = target, smallest


@dataclass(frozen=True)
class Choice:
    """A position in every parameter's options. ``lower_bound``: no plan that fits is predicted less (or, of a limit on the
    rise, smaller) than this; None where only some plans were looked at. ``constraint``: "budget", "max-loss-increase" or
    "none", where the best of all options fits.
    """

    positions: tuple[int, ...]
    lower_bound: float | None
    constraint: str


def best_within(market: Market, target: int, values: Array | None = None) -> Choice:
    """The choice of least value whose file takes at most ``target`` bytes, header included; ``values``: other than its own.

    The header's length depends on all choices together: the optima around the budget, with the header as it was in the last
    round, are tried with the true size, best first. Then no single better option still fits. Raises TargetTooSmall, naming
    the size that :func:`shrunk` finds, where that does not fit.
    """
    values, costs = market.values if values is None else values, market.costs
    cheapest = tuple(int(j) for j in costs.argmin(axis=1))
    if target < market.size(cheapest):
        cheapest = shrunk(market, cheapest)
        if target < (smallest := market.size(cheapest)):
            raise TargetTooSmall(target, smallest)
    wide = keep_everything(market, values)
    if market.size(wide) <= target:
        return Choice(wide, total(values, wide), "none")
    best, offset = cheapest, market.size(cheapest) - total(costs, cheapest)
    highest = float(costs.min(axis=1).sum())
    for _ in range(ROUNDS):
        budget = max(target - offset, float(costs.min(axis=1).sum()))
        highest = max(highest, budget + MARGIN)
        found = frontier(values, costs, budget - MARGIN, budget + MARGIN)
        sizes = [market.size(s.choice) for s in found]
        fitting = [s for s, size in zip(found, sizes, strict=True) if size <= target]
        if fitting and total(values, fitting[-1].choice) < total(values, best):
            best = fitting[-1].choice
        new = sizes[-1] - found[-1].cost if fitting else sizes[0] - found[0].cost + MARGIN
        if new == offset or (fitting and len(fitting) < len(found)):
            break
        offset = new
    best = polished(market, best, target, values)
    if total(values, best) == float(values.min(axis=1).sum()):
        return Choice(best, total(values, best), "none")
    least = lower_bound(values, costs, highest)
    if found[-1].exact and budget + MARGIN >= highest:  # then nothing that costs so much or less has a lower value
        least = max(least, found[-1].value)
    return Choice(best, min(max(least, 0.0), total(values, best)), "budget")


def shrunk(market: Market, choice: tuple[int, ...]) -> tuple[int, ...]:
    """``choice`` with single options put in that make the file smaller, until none does.

    Of the cheapest choice there may be some: with fewer bytes in front, offsets in the header may have fewer digits.
    """
    costs, size = market.costs, market.size(choice)
    while True:
        now = np.arange(len(choice)), list(choice)
        for i, j in np.argwhere(costs - costs[now][:, None] <= MARGIN).tolist():
            changed = (*choice[:i], j, *choice[i + 1 :])
            if (smaller := market.size(changed)) < size:
                choice, size = changed, smaller
                break
        else:
            return choice


def keep_everything(market: Market, values: Array | None = None) -> tuple[int, ...]:
    """For every parameter the option of least value, the widest of several."""
    values = market.values if values is None else values
    return tuple(
        min(range(len(options)), key=lambda j, o=options, v=row: (v[j], -o[j].description[1].bits))  # type: ignore[misc]
        for options, row in zip(market.options.values(), values, strict=True)
    )


def polished(
    market: Market, choice: tuple[int, ...], target: int, values: Array, also: tuple[Array, float] | None = None
) -> tuple[int, ...]:
    """``choice`` with single better options put in, the most valuable first, until none fits any more.

    ``also``: what else each option takes, and how much all may take together.
    """
    costs = market.costs
    while True:
        now = np.arange(len(choice)), list(choice)
        gain = values[now][:, None] - values
        room = target - market.size(choice) + MARGIN
        able = (gain > 0) & (costs - costs[now][:, None] <= room)
        if also is not None:
            taken, most = also
            able &= taken - taken[now][:, None] <= most - total(taken, choice)
        for i, j in sorted(np.argwhere(able).tolist(), key=lambda place: -gain[place[0], place[1]]):
            changed = (*choice[:i], j, *choice[i + 1 :])
            if market.size(changed) <= target:
                choice = changed
                break
        else:
            return choice


def smallest_within(market: Market, rise: float) -> Choice:
    """The smallest file whose predicted rise is at most ``rise``. Raises ConfigError where there is none."""
    values, costs = market.values, market.costs
    if rise < (least := float(values.min(axis=1).sum())):
        raise ConfigError(
            f"no plan has a predicted rise of {rise:g} or less", f"the least with these formats is {least:g}"
        )
    (found,) = frontier(costs, values, rise, rise)
    choice = found.choice
    cheapest = tuple(int(j) for j in costs.argmin(axis=1))
    # Costs take the header's length for fixed. Where it is not, a plan for a few bytes less may keep the limit as well.
    while market.size(choice) > market.size(cheapest):
        smaller = best_within(market, market.size(choice) - 1).positions
        if total(values, smaller) > rise:
            break
        choice = smaller
    header = market.size(choice) - total(costs, choice)
    constraint = "none" if choice == cheapest else "max-loss-increase"
    return Choice(choice, lower_bound(costs, values, rise) + header, constraint)


def widest_uniform(
    market: Market, ends: Mapping[str, str], fixed: Mapping[str, str], target: int, rise: float
) -> Choice:
    """The widest format that all weight tensors but ``ends`` can have; ``fixed`` are the formats of biases and norms.

    Within ``target`` bytes and a predicted rise of ``rise``; the smallest that does, for a limit on the rise alone. Of the
    granularities that a width comes in, all tensors have the same: of those that fit, the one of least value.
    """
    weights = [name for name in market.options if name not in fixed and name not in ends]
    common = [o.format for o in market.options[weights[0]]]
    for name in weights:
        common = [f for f in common if any(o.format == f for o in market.options[name])]
    widths = sorted(common, key=lambda f: get_format(f).bits, reverse=True)
    tried = []
    for fmt in widths:
        allowed = {**dict.fromkeys(weights, fmt), **ends, **fixed}
        ways = [
            [j for j, o in enumerate(options) if o.format == allowed[name]] for name, options in market.options.items()
        ]
        # Granularities come in the order of the settings; where two are one for a tensor, it has fewer of them.
        each = {tuple(way[min(k, len(way) - 1)] for way in ways) for k in range(max(map(len, ways)))}
        of_width = [(p, market.size(p), total(market.values, p)) for p in each]
        tried += sorted(of_width, key=lambda t: (t[2], t[1], t[0]))
    fitting = [t for t in tried if t[1] <= target and t[2] <= rise]
    if not fitting and min(size for _, size, _ in tried) > target:
        raise TargetTooSmall(target, min(size for _, size, _ in tried))
    if not fitting:
        raise ConfigError(
            f"no single width has a predicted rise of {rise:g} or less", f"the least is {min(t[2] for t in tried):g}"
        )
    limited = rise < float("inf")
    chosen = min(fitting, key=lambda t: t[1]) if limited else fitting[0]
    first = chosen is (min(tried, key=lambda t: t[1]) if limited else tried[0])
    constraint = "none" if first else "max-loss-increase" if limited else "budget"
    return Choice(chosen[0], None, constraint)
