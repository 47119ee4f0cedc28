"""Precision, recall, density and coverage: manifolds as unions of balls that reach to the k-th nearest neighbour.

Kynkäänniemi et al. 2019 (arXiv:1904.06991), eq. 1 and 2, with k = 3; Naeem et al. 2020 (arXiv:2002.09797), eq. 3 and 4, with
k = 5. A point on the edge of a ball is inside, as in the papers.
Shapes: N real and M generated images, D features, R resamples.
"""

from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from fqdiff.errors import DataError

PRECISION_NEIGHBOURS = 3
DENSITY_NEIGHBOURS = 5
ROWS = 250  # of the distance matrix in memory at once


@dataclass(frozen=True)
class Manifolds:
    """float64 [R] each, or [1] of the images themselves."""

    precision: Tensor
    recall: Tensor
    density: Tensor
    coverage: Tensor


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances [N, M], exact: an image has distance 0 from itself."""
    return torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist")


def neighbour_distances(x: Tensor, *neighbours: int) -> Tensor:
    """Distance of each of ``x`` [N, D] to its k-th nearest neighbour, itself not counted; [len(neighbours), N].

    Raises DataError with too few images.
    """
    if len(x) <= max(neighbours):
        raise DataError(f"{len(x)} images have no {max(neighbours)} neighbours each", "use a larger count")
    nearest = []
    for part in x.split(ROWS):
        ordered = distances(part, x).topk(max(neighbours) + 1, largest=False).values
        nearest.append(ordered[:, list(neighbours)].T)
    return torch.cat(nearest, dim=1)


def manifold_draws(real: Tensor, real_counts: Tensor, fake: Tensor, fake_counts: Tensor) -> Manifolds:
    """The four values in each resample: counts int32 [R, N] and [R, M]; of the images themselves where all counts are 1.

    The balls keep the radii of the whole sets: a neighbour drawn twice would shrink them to nothing. Balls that were not drawn
    cover nothing.
    """
    narrow, wide = neighbour_distances(real, PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS)
    (reach,) = neighbour_distances(fake, PRECISION_NEIGHBOURS)
    n, m = len(real), len(fake)
    # Sums of small whole numbers: exact in float32, which multiplies twice as fast.
    w_real, w_fake = real_counts.float(), fake_counts.float()
    drawn = fake_counts.double()
    balls_hit = torch.zeros_like(w_fake)
    density, recall, coverage = (torch.zeros_like(drawn[:, 0]) for _ in range(3))
    for part in torch.arange(n).split(ROWS):
        d = distances(real[part], fake)
        weights = real_counts[:, part].double()
        balls_hit += w_real[:, part] @ (d <= narrow[part, None]).float()
        inside = w_fake @ (d <= wide[part, None]).float().T  # [R, part]: generated images in each real ball
        density += (weights * inside).sum(dim=1)
        coverage += (weights * (inside > 0)).sum(dim=1)
        recall += (weights * (w_fake @ (d <= reach).float().T > 0)).sum(dim=1)
    precision = (drawn * (balls_hit > 0)).sum(dim=1) / m
    return Manifolds(precision, recall / n, density / (DENSITY_NEIGHBOURS * n * m) * n, coverage / n)


def manifold_values(real: Tensor, fake: Tensor) -> tuple[float, float, float, float]:
    """Precision, recall, density and coverage of ``fake`` [M, D] against ``real`` [N, D]."""
    once = [torch.ones(1, len(x), dtype=torch.int32, device=x.device) for x in (real, fake)]
    precision, recall, density, coverage = (float(t) for t in astuple(manifold_draws(real, once[0], fake, once[1])))
    return precision, recall, density, coverage
