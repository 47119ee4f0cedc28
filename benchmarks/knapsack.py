"""How long the planner's knapsack takes, and how far from its lower bound it ends, on synthetic models of many sizes.

    python benchmarks/knapsack.py

A model of M tensors, of 100 to a million weights each, has F ways of storing every one: bits from 2 to 16, at two granularities
whose errors and scales differ. A way's predicted rise falls by 4 with every bit, times the tensor's sensitivity, which spans
decades, and times noise, so that ways cross and none is simply better. Choices: M x F. Seconds are the processor's for one
budget, the median and the largest of all budgets and models; gap: value over Lagrange's lower bound, less 1, which whole
choices cannot close. Exact: nothing was left out of the search.
"""

import argparse
import statistics
import time

import numpy as np

from fqdiff.planning.knapsack import Array, frontier, lower_bound

BITS = np.array([16, 12, 10, 8, 7, 6, 5, 4, 3, 2], dtype=float)
GRAINS = 2
HEADER = 300.0  # bytes that a tensor's lines of the header take


def synthetic(tensors: int, seed: int) -> tuple[Array, Array, float]:
    """Values and costs, float64 [M, F], and the number of weights."""
    draw = np.random.default_rng(seed)
    weights = np.round(10 ** draw.uniform(2, 6, tensors))[:, None]
    sensitivity = 10 ** draw.normal(0, 1.5, tensors)[:, None]
    values, costs = [], []
    for grain in range(GRAINS):
        noise = np.exp(draw.normal(0, 0.3, (tensors, len(BITS))))
        values.append(sensitivity * weights * 4.0**-BITS * noise / (1 + grain))
        costs.append(np.ceil(BITS * weights / 8 + grain * weights / 32) + HEADER)
    return np.concatenate(values, axis=1), np.concatenate(costs, axis=1), float(weights.sum())


def main() -> None:
    """Parse the command line, solve, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", default="50,150,300,1000", help="sizes, with commas")
    parser.add_argument("--budgets", default="2.5,3,4,6", help="bits per weight, the header included")
    parser.add_argument("--seeds", type=int, default=2, help="models of every size")
    options = parser.parse_args()

    print("| tensors | choices | seconds, median | largest | exact | largest gap |\n|---|---|---|---|---|---|")
    for tensors in map(int, options.tensors.split(",")):
        seconds, gaps, exact = [], [], 0
        for seed in range(options.seeds):
            values, costs, weights = synthetic(tensors, seed)
            for bits in map(float, options.budgets.split(",")):
                budget = max(bits * weights / 8, float(costs.min(axis=1).sum()))
                started = time.process_time()
                best = frontier(values, costs, budget, budget)[0]
                seconds.append(time.process_time() - started)
                gaps.append(best.value / lower_bound(values, costs, budget) - 1)
                exact += best.exact
        median = statistics.median(seconds)
        row = (tensors, f"{tensors * len(BITS) * GRAINS:,}", f"{median:.2f}", f"{max(seconds):.2f}")
        print(f"| {' | '.join(map(str, row))} | {exact} of {len(seconds)} | {max(gaps):.1e} |", flush=True)


if __name__ == "__main__":
    main()
