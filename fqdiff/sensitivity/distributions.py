"""What comparing several models and judging one have in common: sets of images, as features, against held-out real ones.

Shapes: N images in every set and of the real ones, C channels, H W pixels, R resamples, M sets.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fqdiff.context import Context
from fqdiff.errors import NumericalError
from fqdiff.evidence.comparison import ImageSet, Resampled, kernel_metrics, manifold_metrics, score_metric
from fqdiff.evidence.features import FeatureNetwork
from fqdiff.evidence.frechet import frechet_distance_of_features
from fqdiff.evidence.frechet_bootstrap import frechet_draws, resamples_at_once
from fqdiff.rng import generator
from fqdiff.sensitivity.ledger import Ledger
from fqdiff.values import Dataset


def real_images(dataset: Dataset, count: int) -> Tensor:
    """``count`` of the held-out images, drawn at random and always the same ones: uint8 [N, C, H, W], in their order.

    A source may be sorted by label, and MNIST's first half is neater than its second.
    """
    chosen = torch.randperm(len(dataset.reference), generator=generator(0, "reference"))[:count].sort().values
    return dataset.reference[chosen]


def image_set(role: str, images: Tensor, counts: Tensor, network: FeatureNetwork, context: Context) -> ImageSet:
    """``images`` as ``network`` sees them, drawn as ``counts`` say. Raises NumericalError that names ``role``."""
    place = context.evidence_device
    features = network.extract(images)
    if not torch.isfinite(features).all():
        raise NumericalError(f"features of {role} hold NaN or infinity", "look at the images they come from")
    probabilities = network.probabilities(images, features).to(place) if network.probabilities else None
    return ImageSet(images.to(place), features.to(place), probabilities, counts.to(place))


def distribution_metrics(
    real: ImageSet, sets: Mapping[str, ImageSet], tick: Callable[[int], None]
) -> dict[str, dict[str, Resampled]]:
    """All metrics against ``real`` but FID, by metric and by role; ``tick`` is told of each set, twice."""
    kernel = kernel_metrics(real, [*sets.values()], tick)
    results = {"kid": dict(zip(sets, kernel, strict=True))}
    for role, one in sets.items():
        for metric, value in (manifold_metrics(real, one) | score_metric(one)).items():
            results.setdefault(metric, {})[role] = value
        tick(1)
    return results


def frechet_metric(real: ImageSet, sets: Mapping[str, ImageSet], ledger: Ledger) -> dict[str, Resampled]:
    """FID of each of ``sets`` and its draws, which are kept as parts: with large features they take hours."""
    resamples, at_once = len(real.counts), resamples_at_once(real.features)
    draws = ledger.rows("fid", resamples, len(sets))
    for k in ledger.units("bootstrap", -(-resamples // at_once), "piece"):
        part = slice(k * at_once, (k + 1) * at_once)
        drawn = [(one.features, one.counts[part]) for one in sets.values()]
        draws[part] = frechet_draws(real.features, real.counts[part], drawn)
    values = [frechet_distance_of_features(real.features, one.features) for one in sets.values()]
    return {role: Resampled(v, d) for role, v, d in zip(sets, values, draws.clone().unbind(dim=1), strict=True)}
