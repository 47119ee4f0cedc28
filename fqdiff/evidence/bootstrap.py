"""Paired bootstrap: how far a difference of two Fréchet distances could be chance.

Shapes: N images, D features, R resamples.
"""

import torch
from torch import Tensor

from fqdiff.evidence.frechet import FeatureStatistics, feature_statistics, frechet_distance


def difference_interval(
    model: Tensor,
    baseline: Tensor,
    reference: Tensor,
    generator: torch.Generator,
    resamples: int = 200,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of FID(model) - FID(baseline) over resampled images.

    ``model`` and ``baseline`` [N, D] are features of image k made from the same noise, so one draw of indices serves both;
    ``reference`` [N, D] is resampled on its own. Both sides of the difference share its draw.
    """
    differences = []
    for _ in range(resamples):
        pick = torch.randint(len(model), (len(model),), generator=generator)
        real: FeatureStatistics = feature_statistics(
            reference[torch.randint(len(reference), (len(reference),), generator=generator)]
        )
        fids = [frechet_distance(real, feature_statistics(x[pick])) for x in (model, baseline)]
        differences.append(fids[0] - fids[1])
    tail = (1 - level) / 2
    low, high = torch.tensor(differences, dtype=torch.float64).quantile(
        torch.tensor([tail, 1 - tail], dtype=torch.float64)
    )
    return float(low), float(high)
