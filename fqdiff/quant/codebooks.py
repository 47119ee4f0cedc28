"""Non-uniform formats: each group of weights has its own list of 2^n numbers, found by weighted k-means in one dimension.

After SqueezeLLM (Kim et al. 2023, arXiv:2306.07629, section 4.1): the sum of F (w - Q(w))^2 falls, F the Fisher value of each
weight. Every entry is the mean of the weights that become it, so that errors cancel within each: no shift, as clipped
ranges have.

Shapes: G groups, n weights in each, K entries of a codebook.
"""

import torch
from torch import Tensor

ITERATIONS = 50
LEAST_WEIGHT = 1e-6  # of a group's mean: weights that the loss does not see still have to be something


def fit_codebook(rows: Tensor, weight: Tensor | None, entries: int) -> Tensor:
    """Entries of least weighted squared error for each row, increasing, float64 [G, K]; ``rows`` and ``weight`` [G, n].

    Lloyd's iterations from two starts, quantiles and an even spread; the better one stays, row by row.
    """
    ordered, order = rows.double().sort(dim=1)
    weight = torch.ones_like(ordered) if weight is None else weight.double().gather(1, order)
    mean = weight.mean(dim=1, keepdim=True)
    weight = torch.where(mean > 0, weight / mean.clamp(min=1e-300), torch.ones_like(weight)) + LEAST_WEIGHT
    # Of sorted numbers a cluster is a run, and its sums are differences of these: an iteration costs K searches, not n steps.
    sums = [_from_zero((weight * ordered**power).cumsum(dim=1)) for power in (0, 1, 2)]
    found = [
        _lloyd(ordered, sums, start) for start in (_quantiles(ordered, weight, entries), _spread(ordered, entries))
    ]
    errors = [_error(ordered, sums, codebook) for codebook in found]
    return torch.where((errors[0] <= errors[1])[:, None], found[0], found[1])


def _from_zero(sums: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(sums[:, :1]), sums], dim=1)


def _quantiles(ordered: Tensor, weight: Tensor, entries: int) -> Tensor:
    # The best density of entries goes with the third root of the weight (Panter and Dite 1951).
    mass = weight.pow(1 / 3).cumsum(dim=1)
    wanted = (torch.arange(entries, dtype=torch.float64, device=ordered.device) + 0.5) / entries * mass[:, -1:]
    return ordered.gather(1, torch.searchsorted(mass, wanted.contiguous()).clamp(max=ordered.shape[1] - 1))


def _spread(ordered: Tensor, entries: int) -> Tensor:
    place = (torch.arange(entries, dtype=torch.float64, device=ordered.device) + 0.5) / entries
    return ordered[:, :1] + (ordered[:, -1:] - ordered[:, :1]) * place


def _clusters(ordered: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Where the run of each entry begins and ends, int64 [G, K] each."""
    middles = ((codebook[:, 1:] + codebook[:, :-1]) / 2).contiguous()
    cuts = torch.searchsorted(ordered, middles)
    ends = torch.full_like(codebook[:, :1], ordered.shape[1], dtype=torch.int64)
    return torch.cat([torch.zeros_like(ends), cuts], dim=1), torch.cat([cuts, ends], dim=1)


def _lloyd(ordered: Tensor, sums: list[Tensor], codebook: Tensor) -> Tensor:
    for _ in range(ITERATIONS):
        begin, end = _clusters(ordered, codebook)
        mass, moment = (s.gather(1, end) - s.gather(1, begin) for s in sums[:2])
        codebook = torch.where(end > begin, moment / mass.clamp(min=1e-300), codebook).sort(dim=1).values
    return codebook


def _error(ordered: Tensor, sums: list[Tensor], codebook: Tensor) -> Tensor:
    """Weighted squared error of each row, [G]."""
    begin, end = _clusters(ordered, codebook)
    mass, moment, square = (s.gather(1, end) - s.gather(1, begin) for s in sums)
    return (square - 2 * codebook * moment + codebook.square() * mass).sum(dim=1)


def nearest_entry(rows: Tensor, codebook: Tensor) -> Tensor:
    """Position of the nearest entry of each row's increasing codebook, int64 [G, n]."""
    middles = (codebook[:, 1:] + codebook[:, :-1]) / 2
    return torch.searchsorted(middles.contiguous(), rows.to(middles.dtype).contiguous())


def looked_up(codes: Tensor, codebook: Tensor) -> Tensor:
    """The entries that ``codes`` [G, n] name, [G, n]."""
    return codebook.gather(1, codes.long())
