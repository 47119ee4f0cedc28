"""The multiple-choice knapsack: one choice per item, least total value among all whose costs sum to at most a budget.

Exact, by a dynamic programme over Pareto-optimal partial choices that drops whatever Lagrange's bound rules out (in the
spirit of Pisinger 1995, "A minimal algorithm for the multiple-choice knapsack problem"). Sums are exact integers or plain
float64: no solver's tolerance lets a budget overrun by a byte.

Shapes: M items, F choices each. ``values``, ``costs`` float64 [M, F], infinite where an item has fewer choices.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
STATES = 20_000  # partial choices kept at once
PRICES = np.geomspace(1 / 3, 3, 21)  # at which bounds are taken, relative to the price of the linear relaxation


@dataclass(frozen=True)
class Solution:
    """``choice``: the position that each item takes, [M]. ``exact``: no choice of at most this cost has a lower value."""

    choice: tuple[int, ...]
    value: float
    cost: float
    exact: bool = True


@dataclass(frozen=True)
class Relaxation:
    """What fractions of choices could reach. ``price``: Lagrange's multiplier, the value that one unit of cost saves.

    ``choice`` is a whole choice within the budget: as far as the best fractions go, then whatever still fits.
    """

    price: float
    choice: tuple[int, ...]


def total(table: Array, choice: Sequence[int] | NDArray[np.intp]) -> float:
    """Sum over items of the chosen entries."""
    return float(table[np.arange(len(table)), list(choice)].sum())


def undominated(values: Array, costs: Array) -> NDArray[np.intp]:
    """Positions of one item's choices that no other one is at once as cheap and as good as, cost rising and value falling."""
    order = np.lexsort((values, costs))
    order = order[np.isfinite(costs[order])]
    below = np.minimum.accumulate(np.append(np.inf, values[order]))[:-1]
    return order[values[order] < below]


def lower_hull(values: Array, costs: Array) -> list[int]:
    """Positions of one item's choices on the lower convex hull of (cost, value), cost rising and value falling."""
    hull: list[int] = []
    for j in np.lexsort((values, costs)).tolist():
        if not np.isfinite(costs[j]) or (hull and values[j] >= values[hull[-1]]):
            continue
        while len(hull) > 1 and _saving(values, costs, hull[-2], hull[-1]) <= _saving(values, costs, hull[-1], j):
            hull.pop()
        hull.append(j)
    return hull


def _saving(values: Array, costs: Array, a: int, b: int) -> float:
    """Value saved per cost on the way from choice a to b."""
    return float((values[a] - values[b]) / (costs[b] - costs[a]))


def relax(values: Array, costs: Array, budget: float) -> Relaxation:
    """Solve the linear relaxation: from the cheapest choices up, always the step that saves most per cost.

    Raises ValueError where even the cheapest choices cost more than ``budget``.
    """
    hulls = [lower_hull(v, c) for v, c in zip(values, costs, strict=True)]
    choice = [hull[0] for hull in hulls]
    left = budget - total(costs, choice)
    if left < 0:
        raise ValueError(f"the cheapest choices cost {budget - left}, more than {budget}")
    steps = [(-_saving(values[i], costs[i], a, b), i, a, b) for i, hull in enumerate(hulls) for a, b in pairwise(hull)]
    price = 0.0
    for saving, i, a, b in sorted(steps):
        more = float(costs[i, b] - costs[i, a])
        if choice[i] != a:  # a step before this one did not fit
            continue
        if more <= left:
            choice[i], left = b, left - more
        elif price == 0.0:
            price = -saving
    return Relaxation(price, tuple(choice))


def frontier(values: Array, costs: Array, low: float, high: float, states: int = STATES) -> list[Solution]:
    """The optimum for every budget from ``low`` to ``high``: cost rising, value falling; the first is that for ``low``.

    Where ``low`` cannot be reached, from the cheapest on. With more than ``states`` partial choices the most promising ones
    go on, and solutions are not ``exact``. Raises ValueError where even ``high`` cannot be reached.
    """
    low = max(low, float(costs.min(axis=1).sum()))
    price = relax(values, costs, high).price
    choice = relax(values, costs, low).choice
    best = [Solution(choice, total(values, choice), total(costs, choice), exact=False)]
    for most in (states // 100, states):  # a quick try: what it finds rules out more in the second
        found = _search(values, costs, low, high, price, best[0].value, most)
        if found and (found[0].exact or found[0].value <= best[0].value):
            best = found
        if best[0].exact:
            break
    return best


def _search(
    values: Array, costs: Array, low: float, high: float, price: float, known: float, states: int
) -> list[Solution]:
    """What :func:`frontier` returns, by way of the choices that may end at ``known``, a value reached at ``low``, or less.

    Empty where it had to let go of too many.
    """
    prices = price * PRICES if price > 0 else np.zeros(1)
    priced = np.stack([values + p * np.where(np.isfinite(costs), costs, 0) for p in prices])  # [prices, M, F]
    least = priced.min(axis=2)
    # Items that are sure of their choice over many prices come last: bounds on the rest are then nearly exact.
    middle = len(prices) // 2
    sure = (priced.argmin(axis=2) == priced.argmin(axis=2)[middle]).sum(axis=0)
    order = np.argsort(sure, kind="stable")
    rest = np.cumsum(least[:, order[::-1]], axis=1)[:, ::-1]  # the items from each on
    rest = np.concatenate([rest[:, 1:], np.zeros((len(prices), 1))], axis=1)
    rest_cost = np.append(np.cumsum(costs.min(axis=1)[order[::-1]])[::-1][1:], 0.0)
    slack = 1e-9 * abs(known) + 1e-12 * float(
        np.abs(least).sum(axis=1).max()
    )  # float64 sums differ in their last digits

    def bound(value: Array, cost: Array, place: int) -> Array:
        """Lagrange's lower bound on what partial choices can end at, with the items up to ``place`` chosen."""
        best = np.full(len(value), -np.inf)
        for p, after in zip(prices, rest[:, place], strict=True):
            np.maximum(best, value + after - p * (high - cost), out=best)
        return best

    exact = True
    cost, value = np.zeros(1), np.zeros(1)
    trail: list[tuple[NDArray[np.intp], NDArray[np.intp]]] = []
    for place, i in enumerate(order):
        choices = undominated(values[i], costs[i])
        new_cost = (cost[:, None] + costs[i, choices]).ravel()
        new_value = (value[:, None] + values[i, choices]).ravel()
        # One price's bound first: what it rules out need not be sorted, and could not have ruled out anything else.
        rough = new_value + rest[middle, place] - prices[middle] * (high - new_cost) <= known + slack
        kept = np.flatnonzero(rough & (new_cost + rest_cost[place] <= high))
        kept = kept[np.lexsort((new_value[kept], new_cost[kept]))]
        below = np.minimum.accumulate(np.append(np.inf, new_value[kept]))[:-1]
        kept = kept[new_value[kept] < below]
        bounds = bound(new_value[kept], new_cost[kept], place)
        kept, bounds = kept[bounds <= known + slack], bounds[bounds <= known + slack]
        if len(kept) > states:
            exact = False
            kept = kept[np.sort(np.argsort(bounds, kind="stable")[:states])]
        cost, value = new_cost[kept], new_value[kept]
        trail.append((kept // len(choices), choices[kept % len(choices)]))
    first = max(int(np.searchsorted(cost, low, side="right")) - 1, 0)
    solutions = []
    for end in range(first, len(cost)):
        choice = np.empty(len(order), dtype=np.int64)
        choice[order] = _walk_back(trail, end)
        solutions.append(Solution(tuple(choice.tolist()), float(value[end]), float(cost[end]), exact))
    return solutions


def _walk_back(trail: list[tuple[NDArray[np.intp], NDArray[np.intp]]], end: int) -> tuple[int, ...]:
    choice = []
    for parents, chosen in reversed(trail):
        choice.append(int(chosen[end]))
        end = int(parents[end])
    return tuple(reversed(choice))


def lower_bound(values: Array, costs: Array, budget: float) -> float:
    """A value that no choice within ``budget`` gets below: Lagrange's, at the price of the linear relaxation."""
    price = relax(values, costs, budget).price
    finite = np.isfinite(costs)
    return (
        float(np.where(finite, values + price * np.where(finite, costs, 0), np.inf).min(axis=1).sum()) - price * budget
    )


def fractions(values: Array, costs: Array, budget: float) -> Array:
    """The best parts of choices within ``budget``, of least total value: [M, F], each item's sum to 1.

    What the linear relaxation comes to: at its price the least of every item, and the same part of the way from the cheaper to
    the dearer of equals. Raises ValueError where even the cheapest choices cost more.
    """
    price = relax(values, costs, budget).price
    finite = np.isfinite(costs)
    spent = np.where(finite, costs, 0.0)
    priced = np.where(finite, values + price * spent, np.inf)
    rounding = 1e-9 * (np.abs(np.where(finite, values, 0.0)) + price * spent).max(axis=1, keepdims=True)
    equal = priced <= priced.min(axis=1, keepdims=True) + rounding
    items = np.arange(len(costs))
    cheap, dear = np.where(equal, costs, np.inf).argmin(axis=1), np.where(equal, costs, -np.inf).argmax(axis=1)
    low, high = total(costs, cheap), total(costs, dear)
    part = min(max((budget - low) / (high - low), 0.0), 1.0) if high > low else 0.0
    shares = np.zeros(costs.shape)
    shares[items, cheap] += 1 - part
    shares[items, dear] += part
    return shares
