"""The quadratic knapsack against brute force."""

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from scipy.optimize import LinearConstraint, minimize

from fqdiff.planning.knapsack import Array, frontier, lower_bound, total
from fqdiff.planning.quadratic import Quadratic, improve, quadratic_bound, separate


def instance(seed: int, items: int) -> tuple[Quadratic, Array, Array]:
    """Items with two to four choices, the first dear and without error; and the errors [K, D] behind the matrix.

    Half of them share a direction, so that products matter. The last item only counts linearly, as biases do.
    """
    draw = np.random.default_rng(seed)
    widths = draw.integers(2, 5, size=items)
    rows = np.full((items, 4), -1)
    costs, linear = np.full((items, 4), np.inf), np.full((items, 4), np.inf)
    errors: list[Array] = []
    common = draw.normal(size=12)
    for i, width in enumerate(widths):
        linear[i, :width] = 0.0
        costs[i, :width] = np.sort(draw.integers(1, 40, size=width))[::-1]
        for j in range(1, width):
            if i == items - 1:
                linear[i, j] = draw.exponential()
            else:
                rows[i, j] = len(errors)
                errors.append((draw.normal(size=12) + draw.normal() * 2 * common) * 2.0**j)
    rows[rows < 0] = len(errors)
    deltas = np.array([*errors, np.zeros(12)])
    return Quadratic(linear, deltas @ deltas.T, rows), costs, deltas


def choices(problem: Quadratic) -> Iterator[tuple[int, ...]]:
    yield from itertools.product(*(np.flatnonzero(np.isfinite(row)).tolist() for row in problem.linear))


def from_errors(problem: Quadratic, deltas: Array, choice: tuple[int, ...]) -> float:
    """By the definition: half the square of the summed errors, and what counts linearly."""
    error = sum(deltas[problem.rows[i, j]] for i, j in enumerate(choice))
    return float(0.5 * np.square(error).sum() + total(problem.linear, choice))


def target_of(costs: Array, share: float) -> int:
    low = costs.min(axis=1).sum()
    high = np.where(np.isfinite(costs), costs, 0).max(axis=1).sum()
    return int(low + share * (high - low))


def size_of(costs: Array, choice: tuple[int, ...]) -> int:
    """With an overhead that depends on the whole choice, as a header's does."""
    return int(total(costs, choice)) + sum(choice) % 3


def start(problem: Quadratic, costs: Array, target: int) -> tuple[int, ...]:
    return frontier(problem.alone, costs, target - 2, target - 2)[0].choice


@pytest.mark.parametrize("seed", range(20))
def test_values_shares_and_tables_are_those_of_the_summed_errors(seed: int) -> None:
    """Rejects a product counted twice, and one between two choices of one item."""
    problem, _, deltas = instance(seed, 4)
    every = list(choices(problem))
    for choice in every[:: max(1, len(every) // 20)]:
        value = from_errors(problem, deltas, choice)
        assert problem.value(choice) == pytest.approx(value)
        assert problem.shares(choice).sum() == pytest.approx(value)
        table = problem.table(choice)
        assert total(table, choice) == pytest.approx(value)
        for i, j in np.argwhere(np.isfinite(problem.linear)).tolist():
            other = (*choice[:i], j, *choice[i + 1 :])
            change = from_errors(problem, deltas, other) - value
            assert table[i, j] - table[i, choice[i]] == pytest.approx(change, abs=1e-9 * (1 + value))


@pytest.mark.parametrize("seed", range(40))
def test_two_items_get_the_optimum_that_brute_force_finds(seed: int) -> None:
    """A pair of changes leads anywhere: from the cheapest choice to the best that fits, true sizes counted."""
    problem, costs, deltas = instance(seed, 2)
    target = target_of(costs, (seed % 7) / 7) + 2
    cheapest = tuple(int(j) for j in costs.argmin(axis=1))
    found = improve(problem, costs, lambda c: size_of(costs, c), target, cheapest, margin=2)
    fitting = [c for c in choices(problem) if total(costs, c) <= target - 2]  # whatever their overhead
    assert size_of(costs, found.choice) <= target
    assert problem.value(found.choice) <= min(from_errors(problem, deltas, c) for c in fitting) * (1 + 1e-9)


def test_larger_problems_end_where_no_pair_of_changes_helps_and_mostly_at_the_optimum() -> None:
    """Rejects a search by single changes alone, which reaches the optimum in 23 of 40 cases; this one in 35."""
    reached = swaps = 0
    for seed in range(40):
        problem, costs, deltas = instance(seed, 5)
        target = target_of(costs, 0.2 + 0.015 * seed) + 2
        found = improve(problem, costs, lambda c, costs=costs: size_of(costs, c), target, start(problem, costs, target))  # type: ignore[misc]
        value = from_errors(problem, deltas, found.choice)
        assert size_of(costs, found.choice) <= target
        fitting = [c for c in choices(problem) if size_of(costs, c) <= target]
        best = min(from_errors(problem, deltas, c) for c in fitting)
        near = [c for c in fitting if sum(a != b for a, b in zip(c, found.choice, strict=True)) <= 2]
        near = [
            c for c in near if total(costs, c) <= total(costs, found.choice) + target - size_of(costs, found.choice)
        ]
        assert min(from_errors(problem, deltas, c) for c in near) >= value * (1 - 1e-6)
        reached += value <= best * (1 + 1e-9)
        swaps += found.swaps
    assert reached >= 28
    assert swaps > 20


def test_errors_that_cancel_are_found_and_the_diagonal_does_not_see_them() -> None:
    """Two tensors whose coarse errors are opposite: each alone is the worst choice there is, together they do nothing."""
    error, small = np.array([3.0, 0, 0]), np.array([0, 1.0, 0])
    deltas = np.array([error, small, -error, np.array([0, 0, 1.0]), np.zeros(3)])
    problem = Quadratic(np.zeros((2, 3)), deltas @ deltas.T, np.array([[4, 1, 0], [4, 3, 2]]))
    costs = np.array([[10.0, 4, 3], [10, 4, 3]])
    (diagonal,) = frontier(problem.alone, costs, 8, 8)
    found = improve(problem, costs, lambda c: int(total(costs, c)), 8, diagonal.choice)
    assert diagonal.choice == (1, 1)
    assert from_errors(problem, deltas, diagonal.choice) == 1.0
    assert found.choice == (2, 2)
    assert from_errors(problem, deltas, found.choice) == 0.0


def test_factors_scale_what_items_do_and_by_their_roots_what_two_do_together() -> None:
    problem, _, deltas = instance(3, 4)
    factors = np.array([0.25, 4.0, 1.0, 9.0])
    choice = max(choices(problem))
    errors = [deltas[problem.rows[i, j]] * factors[i] ** 0.5 for i, j in enumerate(choice)]
    expected = 0.5 * np.square(sum(errors)).sum() + 9.0 * problem.linear[3, choice[3]]
    assert problem.scaled(factors).value(choice) == pytest.approx(expected)


def test_without_products_a_table_is_the_values_to_the_bit() -> None:
    values = np.random.default_rng(0).exponential(size=(5, 3))
    assert (separate(values).table((0, 1, 2, 1, 0)) == values).all()


# --- the bound ---------------------------------------------------------------------------------------------------------


def relaxed(problem: Quadratic, costs: Array, budget: float) -> float:
    """The least value of fractions of choices, by a solver that knows nothing of tangent planes."""
    known = np.isfinite(problem.linear)
    item, rows, linear, cost = np.nonzero(known)[0], problem.rows[known], problem.linear[known], costs[known]
    matrix = problem.matrix[np.ix_(rows, rows)]
    one_each = np.equal.outer(np.arange(len(known)), item).astype(float)
    limits = [LinearConstraint(one_each, 1, 1), LinearConstraint(cost, -np.inf, budget)]
    found = minimize(
        lambda x: linear @ x + 0.5 * x @ matrix @ x,
        one_each.T @ (1 / one_each.sum(axis=1)),
        jac=lambda x: linear + matrix @ x,
        bounds=[(0, 1)] * len(item),
        constraints=limits,
        options={"maxiter": 1000, "ftol": 1e-12},
        method="SLSQP",
    )
    assert found.status in (0, 8)  # 8: no step within rounding lowers it
    return float(found.fun)


@pytest.mark.parametrize("seed", range(20))
def test_no_choice_within_the_budget_is_worth_less_than_the_bound(seed: int) -> None:
    """Rejects a bound of the diagonal alone, which errors that cancel get below, and one far from the relaxation's own."""
    problem, costs, _ = instance(seed, 5)
    budget = target_of(costs, 0.4)
    within = [choice for choice in choices(problem) if total(costs, choice) <= budget]
    best = min(within, key=problem.value)
    for choice in (best, within[0]):
        bound = quadratic_bound(problem, costs, budget, choice)
        assert bound <= problem.value(best) * (1 + 1e-9)
        wanted = relaxed(problem, costs, budget)
        assert wanted - 0.06 * problem.value(best) <= bound <= wanted * (1 + 1e-4)


def test_without_cross_terms_the_bound_is_lagranges() -> None:
    values, costs = np.array([[0.0, 3.0, 9.0], [0.0, 1.0, np.inf]]), np.array([[9.0, 4.0, 1.0], [6.0, 2.0, np.inf]])
    assert quadratic_bound(separate(values), costs, 8, (2, 0)) == pytest.approx(lower_bound(values, costs, 8))
