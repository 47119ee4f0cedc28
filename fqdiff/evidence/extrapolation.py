"""Fréchet distance without the bias of a finite sample: FID_infinity (Chong and Forsyth 2020, arXiv:1911.07023).

Shapes: N images, D features, K sizes.
"""

import torch
from torch import Tensor

from fqdiff.errors import DataError
from fqdiff.evidence.frechet import feature_statistics, frechet_distance

SMALLEST = 0.2  # share of all images in the smallest subset


def enough_images(features: Tensor) -> bool:
    """Whether the smallest subset of ``features`` [N, D] has more images than features: no covariance is singular."""
    return int(SMALLEST * len(features)) > features.shape[1]


def frechet_infinity(reference: Tensor, features: Tensor, generator: torch.Generator, sizes: int = 15) -> float:
    """FID_infinity of ``features`` [N, D] against the Gaussian of ``reference`` [M, D]: section 3 of the paper.

    FID_n = FID_infinity + slope / n: a least squares line through the distances of random subsets of ``sizes`` sizes, evenly
    spaced from a fifth of N to N, is read off at 1 / n = 0. The reference's own bias stays, as in the paper: it is the same
    for all models. Can be below 0 by chance. Raises DataError where the smallest subset has no more images than features.
    """
    smallest = int(SMALLEST * len(features))
    if not enough_images(features):
        raise DataError(
            f"a subset of {smallest} of {len(features)} images is no more than {features.shape[1]} features",
            "extrapolation needs more than five times as many images as features",
        )
    real = feature_statistics(reference)
    counts = torch.linspace(smallest, len(features), sizes).round().long().tolist()
    distances = []
    for n in counts:
        subset = features[torch.randperm(len(features), generator=generator)[:n]]
        distances.append(frechet_distance(real, feature_statistics(subset)))
    design = torch.tensor([[1.0, 1 / n] for n in counts], dtype=torch.float64)
    line = torch.linalg.lstsq(design, torch.tensor(distances, dtype=torch.float64)[:, None]).solution
    return float(line[0])
