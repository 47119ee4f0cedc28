"""Paired bootstrap: how far a difference of two Fréchet distances could be chance.

Shapes: N images, D features, R resamples.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fqdiff.evidence.frechet import frechet_distance_of_features


def difference_interval(
    model: Tensor,
    baseline: Tensor,
    reference: Tensor,
    generator: torch.Generator,
    resamples: int = 200,
    level: float = 0.95,
    tick: Callable[[], None] = lambda: None,
) -> tuple[float, float]:
    """Percentile interval of FID(model) - FID(baseline) over resampled images.

    ``model`` and ``baseline`` [N, D] are features of image k made from the same noise, so one draw of indices serves both;
    ``reference`` [N, D] is resampled on its own. Both sides of the difference share its draw. ``tick`` is called after each
    resample.
    """
    differences = []
    for _ in range(resamples):
        pick = torch.randint(len(model), (len(model),), generator=generator)
        real = reference[torch.randint(len(reference), (len(reference),), generator=generator)]
        fids = [frechet_distance_of_features(real, x[pick]) for x in (model, baseline)]
        differences.append(fids[0] - fids[1])
        tick()
    tail = (1 - level) / 2
    ends = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    low, high = torch.tensor(differences, dtype=torch.float64).quantile(ends)
    return float(low), float(high)
