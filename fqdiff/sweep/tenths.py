"""Means of a curve over timesteps in each tenth of them."""

from collections.abc import Sequence

from fqdiff.values import Point

COUNT = 10
TENTHS = tuple(f"noise_error_decile{k}" for k in range(1, COUNT + 1))


def mean_by_tenth(points: Sequence[Point], num_train_timesteps: int) -> list[float | None]:
    """sum of w v / sum of w over the points (t, w, v) with floor(10 t / T) = k, for k = 0 ... 9, t = 0 being the image.

    The weights are the curve's own, so that tenths whose points' weights are equal in sum have its mean as their mean.
    None where a tenth holds no point.
    """
    found: list[float | None] = []
    for k in range(COUNT):
        inside = [p for p in points if p.at * COUNT // num_train_timesteps == k]
        weight = sum(p.weight for p in inside)
        found.append(sum(p.weight * p.value for p in inside) / weight if weight > 0 else None)
    return found
