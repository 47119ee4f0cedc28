"""Fréchet distance between Gaussians fitted to two feature sets (Heusel et al. 2017, eq. 6), in float64.

Shapes: N images, D features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fqdiff.errors import DataError, NumericalError


@dataclass(frozen=True)
class FeatureStatistics:
    """``mean`` [D] and ``covariance`` [D, D] (unbiased) of ``n`` feature vectors, float64."""

    mean: Tensor
    covariance: Tensor
    n: int


def feature_statistics(features: Tensor) -> FeatureStatistics:
    """Statistics of ``features`` [N, D]."""
    if len(features) < 2:
        raise DataError(f"a covariance needs two images or more, got {len(features)}", "use a larger count")
    x = features.double()
    if not torch.isfinite(x).all():
        raise NumericalError("features hold NaN or infinity", "look at the images they come from")
    mean = x.mean(dim=0)
    centred = x - mean
    return FeatureStatistics(mean, centred.T @ centred / (len(x) - 1), len(x))


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """|mean_a - mean_b|^2 + trace(S_a + S_b - 2 (S_a S_b)^(1/2)), at least 0.

    (S_a S_b)^(1/2) has the trace of (r S_b r)^(1/2) with r = S_a^(1/2), which is symmetric: two eigendecompositions,
    exact also where covariances are singular.
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    means = (a.mean - b.mean).square().sum()
    distance = means + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(0.0, float(distance))
