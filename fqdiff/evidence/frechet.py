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


def frechet_distance_of_features(a: Tensor, b: Tensor) -> float:
    """The distance of ``a`` [N, D] and ``b`` [M, D], by the cheaper of two equal forms.

    With fewer images than features the covariances are products of thin matrices, S = X^T X / (N - 1), and the trace of
    (S_a S_b)^(1/2) is the sum of the singular values of X_a X_b^T, an N x M matrix instead of a D x D one.
    """
    if max(len(a), len(b)) >= a.shape[1]:
        return frechet_distance(feature_statistics(a), feature_statistics(b))
    x_a, x_b = a.double(), b.double()
    means = (x_a.mean(dim=0) - x_b.mean(dim=0)).square().sum()
    x_a = (x_a - x_a.mean(dim=0)) / (len(a) - 1) ** 0.5
    x_b = (x_b - x_b.mean(dim=0)) / (len(b) - 1) ** 0.5
    cross = torch.linalg.svdvals(x_a @ x_b.T).sum()
    return max(0.0, float(means + x_a.square().sum() + x_b.square().sum() - 2 * cross))
