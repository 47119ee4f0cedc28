"""Rank correlation, and how far it could be chance.

Points come in clusters (all formats of one tensor) that are resampled together: they share the tensor's luck.
Shapes: S scores, K clusters, M points in each, N = K * M points, R resamples.
"""

import torch
from torch import Tensor

LEVEL = 0.95
PIECE = 2**21  # numbers ranked at once
MOST_UNDEFINED = 0.5  # share of resamples without a correlation beyond which there is no interval


def ranks(values: Tensor) -> Tensor:
    """Ranks 1 .. N along the last axis, in float64; ties share the mean of theirs."""
    values = values.double().contiguous()
    ordered = values.sort(dim=-1).values
    below = torch.searchsorted(ordered, values)
    up_to = torch.searchsorted(ordered, values, right=True)
    return (below + up_to + 1).double() / 2


def spearman(x: Tensor, y: Tensor) -> Tensor:
    """Spearman's rank correlation along the last axis: Pearson's of the ranks. NaN where one side is constant."""
    a, b = (r - r.mean(dim=-1, keepdim=True) for r in (ranks(x), ranks(y)))
    return (a * b).sum(dim=-1) / (a.square().sum(dim=-1) * b.square().sum(dim=-1)).sqrt()


def bootstrap_spearman(scores: Tensor, target: Tensor, generator: torch.Generator, resamples: int) -> Tensor:
    """Correlation of each of ``scores`` [S, K, M] with ``target`` [K, M] over ``resamples`` draws of K clusters: [S, R].

    All scores see the same draws, so their differences are paired.
    """
    clusters, size = target.shape
    picks = torch.randint(clusters, (resamples, clusters), generator=generator)
    done = []
    for part in picks.split(max(1, PIECE // (clusters * size * len(scores)))):
        drawn = scores[:, part].flatten(2)  # [S, R, N]
        done.append(spearman(drawn, target[part].flatten(1).expand_as(drawn)))
    return torch.cat(done, dim=1)


def percentile_interval(draws: Tensor) -> tuple[float, float] | None:
    """The middle 95 % of ``draws`` [R]; None where most of them are undefined, as for a single cluster."""
    defined = draws[~draws.isnan()]
    if len(defined) <= MOST_UNDEFINED * len(draws):
        return None
    ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = defined.double().quantile(ends).tolist()
    return low, high
