"""Cross terms: the Gram matrix of output errors, which foretells the rise of any plan to second order.

With delta_k = eps(w + d_k) - eps(w) and G_kl = <delta_k, delta_l>, averaged over inputs, a plan of candidates c rises by
1/2 sum_{k, l in c} G_kl: errors within a tensor that point the same way and tensors that work together or against each other
are both in it (in the spirit of CLADO, Deng et al. 2023, arXiv:2307.05657). The Fisher diagonal has neither.
Shapes: K candidates, P plans, M tensors, N inputs.
"""

import torch
from torch import Tensor


def gram(deltas: Tensor, share: Tensor) -> Tensor:
    """Sum over inputs of share * <delta_k, delta_l>, float64 [K, K]; ``deltas`` [K, N, ...], ``share`` [N]."""
    total = torch.zeros(len(deltas), len(deltas), dtype=torch.float64)
    for n, part in enumerate(share):  # one input at a time: all of them in float64 are twice as large again
        rows = deltas[:, n].flatten(1).double()
        total += part * (rows @ rows.T)
    return total


def gram_rise(matrix: Tensor, choice: Tensor) -> tuple[Tensor, Tensor]:
    """The rise of each plan, 1/2 sum_kl G_kl, and the part of it on the diagonal, [P] each; ``choice`` int64 [P, M]."""
    chosen = matrix[choice[:, :, None], choice[:, None, :]]
    return 0.5 * chosen.sum(dim=(1, 2)), 0.5 * chosen.diagonal(dim1=1, dim2=2).sum(dim=1)


def cosines(matrix: Tensor, chosen: Tensor) -> Tensor:
    """G_kl / sqrt(G_kk G_ll) of all pairs k < l among ``chosen`` [M]; a candidate that changes nothing has none."""
    inner = matrix[chosen[:, None], chosen[None, :]]
    norms = inner.diagonal().clamp(min=0).sqrt()
    upper = torch.triu(torch.ones_like(inner), diagonal=1).bool() & (norms[:, None] * norms[None, :] > 0)
    return (inner / (norms[:, None] * norms[None, :]))[upper]
