"""Fréchet distances of many resamples at once: moments are updated by counts, and no feature is computed again.

Shapes: N images, D features, M sets of images, R resamples.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fqdiff.evidence.frechet import frechet_distance_of_features

MOST_FEATURES = 512  # beyond, D x D moments of many resamples cost more than one distance after the other
PRODUCTS = 128  # of pairs of features, in memory at once for all images
MOMENTS = 2**22  # numbers in the covariances of resamples in memory at once


def resampled_moments(features: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [R, D] and unbiased covariance [R, D, D] of ``features`` [N, D] in each resample of ``counts`` [R, N], float64.

    Both are linear in the counts: one product with the features, one with their pairwise products.
    """
    n, d = features.shape
    centre = features.double().mean(dim=0)
    columns = (features.double() - centre).T.contiguous()  # near 0, so that nothing cancels below
    weights = counts.double()
    mean = weights @ columns.T / n
    rows, others = torch.triu_indices(d, d)
    second = torch.empty(len(weights), d, d, dtype=torch.float64, device=weights.device)
    for part in torch.arange(len(rows)).split(PRODUCTS):
        a, b = rows[part], others[part]
        second[:, a, b] = second[:, b, a] = weights @ (columns[a] * columns[b]).T
    covariance = (second - n * mean[:, :, None] * mean[:, None, :]) / (n - 1)
    return mean + centre, covariance


def frechet_draws(
    reference: Tensor,
    reference_counts: Tensor,
    sets: Sequence[tuple[Tensor, Tensor]],
) -> Tensor:
    """Fréchet distance to ``reference`` [N, D] of each of M ``sets`` (features [N, D], counts [R, N]); float64 [R, M].

    In resample r the reference is the same for all sets: its root is computed once. Equal to
    :func:`frechet_distance_of_features` of the drawn rows, which also does the work where D is large.
    """
    done = []
    compute = _by_moments if _by_moments_is_cheaper(reference) else _by_rows
    for part in torch.arange(len(reference_counts)).split(resamples_at_once(reference)):
        done.append(compute(reference, reference_counts[part], [(x, counts[part]) for x, counts in sets]))
    return torch.cat(done)


def resamples_at_once(reference: Tensor) -> int:
    """How many resamples :func:`frechet_draws` works on together; it does no better with more."""
    return max(1, MOMENTS // reference.shape[1] ** 2) if _by_moments_is_cheaper(reference) else 1


def _by_moments_is_cheaper(reference: Tensor) -> bool:
    return reference.shape[1] <= min(MOST_FEATURES, len(reference))


def _by_moments(reference: Tensor, reference_counts: Tensor, sets: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """As :func:`frechet_draws`: tr (S_a S_b)^(1/2) from the eigenvalues of S_a^(1/2) S_b S_a^(1/2).

    On the CPU, wherever the features are: other devices take small eigenproblems one after the other.
    """
    mean, covariance = (m.cpu() for m in resampled_moments(reference, reference_counts))
    values, vectors = torch.linalg.eigh(covariance)
    root = (vectors * values.clamp(min=0).sqrt()[:, None, :]) @ vectors.mT
    distances = []
    for features, counts in sets:
        other, spread = (m.cpu() for m in resampled_moments(features, counts))
        cross = torch.linalg.eigvalsh(root @ spread @ root).clamp(min=0).sqrt().sum(dim=1)
        traces = (covariance + spread).diagonal(dim1=1, dim2=2).sum(dim=1)
        distances.append(((mean - other).square().sum(dim=1) + traces - 2 * cross).clamp(min=0))
    return torch.stack(distances, dim=1)


def _by_rows(reference: Tensor, reference_counts: Tensor, sets: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """As :func:`frechet_draws`, from the drawn rows themselves."""
    distances = []
    for r, real_counts in enumerate(reference_counts):
        real = reference.repeat_interleave(real_counts, dim=0)
        fakes = [features.repeat_interleave(counts[r], dim=0) for features, counts in sets]
        distances.append([frechet_distance_of_features(real, fake) for fake in fakes])
    return torch.tensor(distances, dtype=torch.float64)
