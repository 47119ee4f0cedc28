"""Non-uniform formats: each group of weights has its own list of 2^n numbers, found by weighted k-means in one dimension.

After SqueezeLLM (Kim et al. 2023, arXiv:2306.07629, section 4.1): the sum of F (w - Q(w))^2 falls, F the Fisher value of each
weight. Every entry is the mean of the weights that become it, so that errors cancel within each: no shift, as clipped
ranges have.

Shapes: G groups, n weights in each, K entries of a codebook.
"""

import torch
from torch import Tensor

ITERATIONS = 30
LEAST_WEIGHT = 1e-6  # of a group's mean: weights that the loss does not see still have to be something


def fit_codebook(rows: Tensor, weight: Tensor | None, entries: int) -> Tensor:
    """Entries of least weighted squared error for each row, increasing, float64 [G, K]; ``rows`` and ``weight`` [G, n].

    Lloyd's iterations from two starts, quantiles and an even spread; the better one stays, row by row.
    """
    rows = rows.double()
    weight = torch.ones_like(rows) if weight is None else weight.double()
    mean = weight.mean(dim=1, keepdim=True)
    weight = torch.where(mean > 0, weight / mean.clamp(min=1e-300), torch.ones_like(weight)) + LEAST_WEIGHT
    starts = [_quantiles(rows, weight, entries), _even_spread(rows, entries)]
    found = [_lloyd(rows, weight, start) for start in starts]
    errors = [(weight * (rows - looked_up(nearest_entry(rows, c), c)).square()).sum(dim=1) for c in found]
    return torch.where((errors[0] <= errors[1])[:, None], found[0], found[1])


def _quantiles(rows: Tensor, weight: Tensor, entries: int) -> Tensor:
    # The best density of entries goes with the third root of the weight (Panter and Dite 1951).
    ordered, order = rows.sort(dim=1)
    mass = weight.gather(1, order).pow(1 / 3).cumsum(dim=1)
    wanted = (torch.arange(entries, dtype=torch.float64, device=rows.device) + 0.5) / entries * mass[:, -1:]
    return ordered.gather(1, torch.searchsorted(mass, wanted.contiguous()).clamp(max=rows.shape[1] - 1))


def _even_spread(rows: Tensor, entries: int) -> Tensor:
    low, high = rows.amin(dim=1, keepdim=True), rows.amax(dim=1, keepdim=True)
    place = (torch.arange(entries, dtype=torch.float64, device=rows.device) + 0.5) / entries
    return low + (high - low) * place


def _lloyd(rows: Tensor, weight: Tensor, codebook: Tensor) -> Tensor:
    for _ in range(ITERATIONS):
        codes = nearest_entry(rows, codebook)
        mass = torch.zeros_like(codebook).scatter_add_(1, codes, weight)
        moment = torch.zeros_like(codebook).scatter_add_(1, codes, weight * rows)
        codebook = torch.where(mass > 0, moment / mass.clamp(min=1e-300), codebook).sort(dim=1).values
    return codebook


def nearest_entry(rows: Tensor, codebook: Tensor) -> Tensor:
    """Position of the nearest entry of each row's increasing codebook, int64 [G, n]."""
    middles = (codebook[:, 1:] + codebook[:, :-1]) / 2
    return torch.searchsorted(middles.contiguous(), rows.to(middles.dtype).contiguous())


def looked_up(codes: Tensor, codebook: Tensor) -> Tensor:
    """The entries that ``codes`` [G, n] name, [G, n]."""
    return codebook.gather(1, codes.long())
