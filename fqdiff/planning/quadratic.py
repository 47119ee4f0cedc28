"""The quadratic multiple-choice knapsack: one choice per item, and what two items choose may help or hurt together.

Exact solutions are out of reach (the problem holds the quadratic knapsack, which is strongly NP-hard): a given choice is
improved by single changes and by pairs of changes until none is left that pays and fits.

Shapes: M items, F choices each, K rows of the matrix, the last of which is zero.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fqdiff.planning.knapsack import Array, fractions, lower_bound

Index = NDArray[np.intp]
BOUND_STEPS = 200  # of Frank and Wolfe's method, 2 s of them for 150 items; the bound gains little from more
TOLERANCE = 1e-9  # relative gain below which a change is none: sums in float64 differ in their last digits


@dataclass(frozen=True)
class Quadratic:
    """``linear`` [M, F] (infinite where an item has fewer choices) + 1/2 sum of ``matrix`` [K, K] over the chosen ``rows``.

    ``rows`` [M, F]: the row of each choice; the last one, all zero, for choices that only count linearly.
    """

    linear: Array
    matrix: Array
    rows: Index

    def value(self, choice: Sequence[int]) -> float:
        """What ``choice`` [M] is worth, less being better."""
        return float(self.shares(choice).sum())

    def shares(self, choice: Sequence[int]) -> Array:
        """What each item adds, half of what it has in common with another counted to either: [M], sums to the value."""
        items = np.arange(len(choice))
        rows = self.rows[items, list(choice)]
        found: Array = self.linear[items, list(choice)] + 0.5 * self.matrix[np.ix_(rows, rows)].sum(axis=1)
        return found

    def table(self, choice: Sequence[int]) -> Array:
        """[M, F]: of what is chosen its share; of any other, that and what the whole would change by with it instead."""
        items = np.arange(len(choice))
        rows = self.rows[items, list(choice)]
        field = self.matrix[:, rows].sum(axis=1)
        instead = field[self.rows] - self.matrix[self.rows, rows[:, None]] + 0.5 * self.diagonal
        shares = 0.5 * field[rows]
        found: Array = self.linear + (shares - instead[items, list(choice)])[:, None] + instead
        return found

    @cached_property
    def diagonal(self) -> Array:
        """The matrix's diagonal, choice by choice: [M, F]."""
        return self.matrix.diagonal()[self.rows]

    @property
    def alone(self) -> Array:
        """Value of every choice beside nothing else, [M, F]: what a planner without cross terms would go by."""
        return self.linear + 0.5 * self.diagonal

    def scaled(self, factors: Array) -> "Quadratic":
        """The same with every item's value ``factors`` [M] times as large, and a product by the roots of both."""
        roots = np.zeros(len(self.matrix))
        roots[self.rows] = np.sqrt(factors)[:, None]
        return Quadratic(self.linear * factors[:, None], self.matrix * np.outer(roots, roots), self.rows)


def separate(values: Array) -> Quadratic:
    """Items that have nothing in common: ``values`` [M, F] alone."""
    return Quadratic(values, np.zeros((1, 1)), np.zeros(values.shape, dtype=np.intp))


def quadratic_bound(problem: Quadratic, costs: Array, budget: float, choice: Sequence[int]) -> float:
    """A value that no choice within ``budget`` gets below, where the matrix is positive semidefinite, as Gram matrices are.

    The best of fractions of choices, by the method of Frank and Wolfe (1956) from ``choice``: at every point the tangent
    plane lies below the problem, and Lagrange's bound below all that fits on the plane (the duality gap of Jaggi 2013, eq. 2).
    Fractions of two choices cancel part of either's error, so that even the best bound leaves a gap.
    """
    known = np.isfinite(problem.linear)
    linear, least = np.where(known, problem.linear, 0.0), -np.inf
    now = _shares_of(problem, choice)
    for _ in range(BOUND_STEPS):
        field = problem.matrix @ _rows_of(problem, now)
        slope = np.where(known, problem.linear + field[problem.rows], np.inf)
        finite = np.where(known, slope, 0.0)
        value = float((linear * now).sum() + 0.5 * (finite - linear).ravel() @ now.ravel())
        least = max(least, value - float((finite * now).sum()) + lower_bound(slope, costs, budget))
        way = fractions(slope, costs, budget) - now
        along = _rows_of(problem, way)
        fall, bend = -float((finite * way).sum()), float(along @ problem.matrix @ along)
        if fall <= TOLERANCE * abs(value):
            break
        now += way * (min(1.0, fall / bend) if bend > 0 else 1.0)
    return least


def _shares_of(problem: Quadratic, choice: Sequence[int]) -> Array:
    """``choice`` as what part of each option is taken: [M, F]."""
    shares = np.zeros(problem.linear.shape)
    shares[np.arange(len(choice)), list(choice)] = 1.0
    return shares


def _rows_of(problem: Quadratic, shares: Array) -> Array:
    """``shares`` [M, F] added up over the rows of the matrix: [K]. The last row is all zero, whatever its sum."""
    rows = np.zeros(len(problem.matrix))
    np.add.at(rows, problem.rows.ravel(), shares.ravel())
    return rows


@dataclass(frozen=True)
class Improved:
    """A choice that no single change and no pair of changes improves, and the number of ``swaps`` that led to it."""

    choice: tuple[int, ...]
    swaps: int


def improve(
    problem: Quadratic,
    costs: Array,
    size: Callable[[tuple[int, ...]], int],
    target: int,
    choice: tuple[int, ...],
    margin: float = 0.0,
) -> Improved:
    """``choice``, which fits ``target``, changed in one or two items as long as that lowers its value, the best first.

    ``size`` has the last word. ``costs`` [M, F] tell which changes to try: single ones even where they exceed the room by
    ``margin``, which is for the difference between the two.
    """
    items, options = np.nonzero(np.isfinite(problem.linear))
    flat = problem.rows[items, options]
    inner = problem.matrix[np.ix_(flat, flat)]
    single = np.eye(len(items), dtype=bool)
    swaps = 0
    while True:
        now = list(choice)
        every = np.arange(len(now))
        rows = problem.rows[every, now]
        table = problem.table(choice)
        gain = (table - table[every, now][:, None])[items, options]
        more = (costs - costs[every, now][:, None])[items, options]
        old = problem.matrix[np.ix_(flat, rows[items])]
        # One item to a, another to b: what each changes by, and what the two changes have in common.
        change = gain[:, None] + gain + inner - old - old.T + problem.matrix[np.ix_(rows[items], rows[items])]
        change[single] = gain
        new = options != np.array(now)[items]
        room = target - size(choice)
        fits = (items[:, None] < items) & new[:, None] & new & (more[:, None] + more <= room)
        fits[single] = new & (more <= room + margin)
        able = fits & (change < -TOLERANCE * abs(problem.value(choice)))
        first, second = np.nonzero(able)
        for place in np.argsort(change[able], kind="stable").tolist():
            changed = now.copy()
            for n in (first[place], second[place]):
                changed[items[n]] = int(options[n])
            if size(tuple(changed)) <= target:
                choice, swaps = tuple(changed), swaps + 1
                break
        else:
            return Improved(choice, swaps)
