"""Plans corrected by what they did: measure one, mend the prediction where it was off, plan again.

A rise that is quadratic in the weights' errors is the sum of what each tensor's gradient says of it (:mod:`fqdiff.sensitivity.
probes`), so one forward and one backward pass tell, tensor by tensor, by what factor the prediction was off: the diagonal's for
what it does not know of, cross terms and the scale of an empirical Fisher; that of cross terms for curvature.

Shapes: M items, P plans tried.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from fqdiff.planning.budget import MARGIN, Choice, best_within
from fqdiff.planning.candidates import Market
from fqdiff.planning.knapsack import Array, total
from fqdiff.planning.quadratic import Quadratic, improve, quadratic_bound
from fqdiff.sensitivity.ledger import Ledger

AGREEMENT = 0.05  # relative difference of predicted and measured that ends the search
LIMIT = 4.0  # by how much a tensor's factor may differ from that of the whole plan


@dataclass(frozen=True)
class Found:
    """The best choice found by ``problem``. ``swaps`` from its start; ``diagonal``: what the problem says of the best choice
    by the market's own values.
    """

    problem: Quadratic
    choice: Choice
    swaps: int
    diagonal: float

    @property
    def predicted(self) -> float:
        """By the problem."""
        return self.problem.value(self.choice.positions)


@dataclass(frozen=True)
class Trial:
    """A choice that was ``measured``; ``parts`` [M]: of each item in that."""

    found: Found
    measured: float
    parts: Array

    @property
    def agrees(self) -> bool:
        """Whether prediction and measurement agree."""
        return abs(self.found.predicted - self.measured) <= AGREEMENT * self.measured


def solve(market: Market, target: int, problem: Quadratic) -> Found:
    """The best choice that fits: exact without cross terms, else the better of two local optima.

    One starts from the best by the market's own values, one from the best by the matrix's diagonal.
    """
    first = best_within(market, target)
    if not problem.matrix.any():
        exact = best_within(market, target, problem.linear)
        return Found(problem, exact, 0, problem.value(first.positions))
    second = best_within(market, target, problem.alone)
    ends = [improve(problem, market.costs, market.size, target, c.positions, MARGIN) for c in (first, second)]
    best = min(ends, key=lambda end: problem.value(end.choice))
    free = best.choice == second.positions and second.constraint == "none"
    # As in best_within: with other choices the header may be shorter by some digits.
    room = target - market.size(best.choice) + total(market.costs, best.choice) + MARGIN
    bound = quadratic_bound(problem, market.costs, room, best.choice)
    bound = min(max(bound, 0.0), problem.value(best.choice))
    choice = Choice(best.choice, bound, "none" if free else "budget")
    return Found(problem, choice, best.swaps, problem.value(first.positions))


def corrections(
    problem: Quadratic, choices: Sequence[tuple[int, ...]], measured: Sequence[float], parts: Sequence[Array]
) -> Array:
    """Factors [M] on the values of ``problem``: of each item measured over predicted, the geometric mean over the plans tried.

    All times one factor that makes the last plan's prediction right. ``measured`` [P], ``parts`` [P, M]. Where errors cancel,
    so that a part is not positive, and wherever a ratio is farther from the plan's own, LIMIT holds.
    """
    logs, known = np.zeros(len(problem.linear)), np.zeros(len(problem.linear))
    for choice, rise, part in zip(choices, measured, parts, strict=True):
        predicted = problem.shares(choice)
        use = predicted > 0
        if rise > 0 and use.any():
            ratio = part[use] / predicted[use] * (predicted.sum() / rise)
            logs[use] += np.log(np.clip(ratio, 1 / LIMIT, LIMIT))
            known += use
    factors = np.exp(logs / np.maximum(known, 1))
    after = problem.scaled(factors).value(choices[-1])
    return factors * (measured[-1] / after) if measured[-1] > 0 and after > 0 else factors


def refine(
    market: Market,
    target: int,
    problem: Quadratic,
    measure: Callable[[tuple[int, ...]], tuple[float, Array]],
    most: int,
    ledger: Ledger,
) -> list[Trial]:
    """Up to ``most`` plans, each by the corrections of those before it, with what they did; the first from ``problem`` itself.

    Ends where prediction and measurement agree, or a plan comes back, with the prediction that it has by then.
    """
    measured, parts = ledger.rows("refine measured", most), ledger.rows("refine parts", most, len(market.options))
    trials: list[Trial] = []
    found = solve(market, target, problem)
    units = ledger.units("refine", most, "plan")
    todo = next(units, most)
    while True:
        number = len(trials)
        if number == todo:  # those before were measured by a run that was stopped
            measured[number], found_parts = measure(found.choice.positions)
            parts[number] = torch.from_numpy(found_parts)
            todo = next(units, most)
        trials.append(Trial(found, float(measured[number]), parts[number].numpy()))
        tried = [t.found.choice.positions for t in trials]
        if trials[-1].agrees or len(trials) == most:
            break
        factors = corrections(problem, tried, [t.measured for t in trials], [t.parts for t in trials])
        found = solve(market, target, problem.scaled(factors))
        if found.choice.positions in tried:
            again = tried.index(found.choice.positions)
            trials[again] = replace(trials[again], found=found)
            break
    units.close()
    return trials
