"""Every metric of several sets of images, what resampling them does to it, and which differences are more than chance.

Shapes: N images in every set and in the reference, D features, R resamples.
"""

import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import astuple, dataclass
from itertools import combinations

import torch
from torch import Tensor

from fqdiff.evidence.decisions import half_width, holm, holm_shares, images_needed, p_value, verdict
from fqdiff.evidence.inception_score import inception_score_draws
from fqdiff.evidence.kernel import block_distances, kernel_draws
from fqdiff.evidence.neighbours import manifold_draws
from fqdiff.evidence.paired import feature_distance, image_mse, psnr, ssim
from fqdiff.evidence.resampling import mean_draws

BASELINE, FLOOR = "baseline", "floor"
MODEL = "model1"  # the only one, where there is only one
NETWORK = ("noise_error", "divergence")  # of the models themselves, measured in sensitivity.curves
PAIRED = ("image_mse", "psnr", "ssim", "feature_distance")
MANIFOLD = ("precision", "recall", "density", "coverage")
DISTRIBUTION = ("fid", "kid", *MANIFOLD, "inception_score")
BLOCKS = 10  # of KID's block variance
SHARES = ("precision", "recall", "coverage")  # of images: from 0 to 1
LOWER_IS_BETTER = (*NETWORK, "image_mse", "feature_distance", "fid", "kid")


@dataclass(frozen=True)
class ImageSet:
    """Images uint8 [N, C, H, W], their features [N, D], class probabilities [N, K] if known, and how often each resample
    draws each image: int32 [R, N].
    """

    images: Tensor
    features: Tensor
    probabilities: Tensor | None
    counts: Tensor


@dataclass(frozen=True)
class Resampled:
    """A metric's ``value``, and its ``draws`` float64 [R], one of each resample.

    ``freedom``: degrees of freedom of the standard error, where it rests on few samples.
    """

    value: float
    draws: Tensor
    freedom: float = math.inf

    @property
    def standard_error(self) -> float:
        """The draws' standard deviation. Their mean is of no use: resampling adds the bias of a finite sample once more."""
        return float(self.draws.std())


@dataclass(frozen=True)
class Measure:
    """One metric of the images ``of`` one role, with its standard error and interval. Of paired metrics: against the baseline."""

    metric: str
    of: str
    value: float
    standard_error: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """One metric ``of`` one role minus that of ``against``, its interval, and whether it is chance.

    ``p``: two-sided; ``adjusted_p``: after Holm's correction over all pairs of the metric. ``verdict``: one of VERDICTS, on
    ``of``. ``images_needed``: with how many images a difference of this size would be told, at the level that Holm's correction
    leaves to it (of NETWORK metrics: with how many inputs at each timestep, or runs of the sampler); None for no number.
    """

    metric: str
    of: str
    against: str
    difference: float
    standard_error: float
    low: float
    high: float
    p: float
    adjusted_p: float
    verdict: str
    images_needed: int | None


Results = Mapping[str, Mapping[str, Resampled]]  # by metric, then by role


def paired_metrics(one: ImageSet, baseline: ImageSet) -> dict[str, Resampled]:
    """The means of PAIRED between image k of both sets, over all k."""
    values = {
        "image_mse": image_mse(one.images, baseline.images),
        "psnr": psnr(one.images, baseline.images),
        "ssim": ssim(one.images, baseline.images),
        "feature_distance": feature_distance(one.features, baseline.features),
    }
    return {name: Resampled(float(v.mean()), mean_draws(v, one.counts).cpu()) for name, v in values.items()}


def kernel_metrics(real: ImageSet, sets: Sequence[ImageSet], tick: Callable[[int], None]) -> list[Resampled]:
    """KID of each of ``sets``; ``tick`` is told of each."""
    draws = kernel_draws(
        real.features, _after_whole(real.counts), [(s.features, _after_whole(s.counts)) for s in sets], tick
    )
    return [_resampled(d) for d in draws.unbind(dim=1)]


def kernel_blocks(
    real: ImageSet, sets: Mapping[str, ImageSet], level: float, draw: torch.Generator
) -> tuple[Measure, ...]:
    """KID of each of ``sets`` as the mean over a tenth of the images at a time, its standard error from the blocks' variance.

    The intervals are Student's. No resampling: a second opinion on :func:`kernel_metrics`. Real images, which may be sorted,
    are mixed by ``draw``.
    """
    size = max(2, len(real.features) // BLOCKS)
    mixed = real.features[torch.randperm(len(real.features), generator=draw).to(real.features.device)]
    rows = []
    for role, one in sets.items():
        blocks = block_distances(mixed, one.features, size)
        value, error = float(blocks.mean()), float(blocks.std()) / math.sqrt(len(blocks))
        half = half_width(error, level, len(blocks) - 1)
        rows.append(Measure("kid_blocks", role, value, error, value - half, value + half))
    return tuple(rows)


def manifold_metrics(real: ImageSet, fake: ImageSet) -> dict[str, Resampled]:
    """MANIFOLD of one set."""
    draws = manifold_draws(real.features, _after_whole(real.counts), fake.features, _after_whole(fake.counts))
    return {name: _resampled(d) for name, d in zip(MANIFOLD, astuple(draws), strict=True)}


def score_metric(one: ImageSet) -> dict[str, Resampled]:
    """The Inception score, where class probabilities are known."""
    if one.probabilities is None:
        return {}
    return {"inception_score": _resampled(inception_score_draws(one.probabilities, _after_whole(one.counts)))}


def _after_whole(counts: Tensor) -> Tensor:
    """``counts`` after those of the images themselves, so that one pass gives value and draws."""
    return torch.cat([torch.ones_like(counts[:1]), counts])


def _resampled(draws: Tensor) -> Resampled:
    return Resampled(float(draws[0]), draws[1:].cpu())


def measures(results: Results, level: float) -> tuple[Measure, ...]:
    """One row for each metric and role; the intervals are normal ones of ``level``, those of SHARES cut to what can be."""
    rows = []
    for metric in _in_order(results):
        for role, found in results[metric].items():
            half = half_width(found.standard_error, level, found.freedom)
            ends = possible(metric, found.value - half, found.value + half)
            rows.append(Measure(metric, role, found.value, found.standard_error, *ends))
    return tuple(rows)


def possible(metric: str, low: float, high: float) -> tuple[float, float]:
    """The interval's part that ``metric`` can have."""
    return (max(low, 0.0), min(high, 1.0)) if metric in SHARES else (low, high)


def model_roles(models: int) -> list[str]:
    """The roles of so many models."""
    return [f"model{k}" for k in range(1, models + 1)]


def measured(metric: str, models: int, floor: bool) -> list[str]:
    """The roles that ``metric`` is measured of; a paired one measures against the baseline."""
    return [*([] if metric in PAIRED else [BASELINE]), *model_roles(models), *([FLOOR] if floor else [])]


def compared(metric: str, models: int) -> list[tuple[str, str]]:
    """The pairs of roles whose difference in ``metric`` is asked for: models against the baseline, and against each other.

    Against the baseline a paired metric has no difference: it is one.
    """
    against_baseline = [] if metric in PAIRED else [(role, BASELINE) for role in model_roles(models)]
    return against_baseline + model_pairs(model_roles(models))


def model_pairs(roles: Sequence[str]) -> list[tuple[str, str]]:
    """Each later one of ``roles`` against each earlier one."""
    return [(of, against) for against, of in combinations(roles, 2)]


def differences(
    results: Results, models: int, full_precision_of: Sequence[int], images: int, level: float
) -> tuple[Difference, ...]:
    """One row for each metric and pair of roles, and one for floor against baseline.

    Holm's correction is over the pairs of a metric; the floor, which is no question about the models, stays out.
    ``full_precision_of``: numbers of the models that the baseline is the full precision of.
    """
    own = {f"model{k}" for k in full_precision_of} | {FLOOR}
    rows: list[Difference] = []
    for metric in _in_order(results):
        by_role = results[metric]
        pairs = compared(metric, models)
        tested = _tested(by_role, pairs, level)
        if FLOOR in by_role and metric not in PAIRED:
            tested |= _tested(by_role, [(FLOOR, BASELINE)], level)
        told = {pair for pair, (adjusted, _) in tested.items() if adjusted <= 1 - level}
        beyond = {role for role in own if (role, BASELINE) in told and _beats_baseline(metric, by_role, role)}
        rows += [_row(metric, by_role, pair, test, beyond, images, level) for pair, test in tested.items()]
    return tuple(rows)


def network_differences(results: Results, samples: Mapping[str, int], level: float) -> tuple[Difference, ...]:
    """One row for each NETWORK metric and pair of models that have it, corrected by Holm's rule over these pairs.

    ``samples``: by metric, what was resampled: inputs at each timestep, or runs.
    """
    rows: list[Difference] = []
    for metric in (m for m in NETWORK if m in results):
        by_role = results[metric]
        tested = _tested(by_role, model_pairs([*by_role]), level)
        rows += [_row(metric, by_role, pair, test, set(), samples[metric], level) for pair, test in tested.items()]
    return tuple(rows)


def _in_order(results: Results) -> list[str]:
    return [metric for metric in (*PAIRED, *DISTRIBUTION) if metric in results]


def _difference(by_role: Mapping[str, Resampled], of: str, against: str) -> tuple[float, float, float]:
    """The difference, its standard error, and the degrees of freedom of that."""
    a, b = by_role[of], by_role[against]
    return a.value - b.value, float((a.draws - b.draws).std()), min(a.freedom, b.freedom)


def _tested(
    by_role: Mapping[str, Resampled], pairs: Sequence[tuple[str, str]], level: float
) -> dict[tuple[str, str], tuple[float, float]]:
    """Of each pair the p-value after Holm's correction over all of them, and what the one before it must not exceed."""
    found = [p_value(*_difference(by_role, *pair)) for pair in pairs]
    return dict(zip(pairs, zip(holm(found), holm_shares(found, 1 - level), strict=True), strict=True))


def _beats_baseline(metric: str, by_role: Mapping[str, Resampled], role: str) -> bool:
    """Whether ``role`` has a better value than the baseline.

    That alone puts it beyond nothing: a model that cannot be told from its full precision has moved nowhere.
    """
    return _gain(metric, by_role[role].value - by_role[BASELINE].value) > 0


def _gain(metric: str, difference: float) -> float:
    """``difference``, positive where it is good."""
    return -difference if metric in LOWER_IS_BETTER else difference


def _row(
    metric: str,
    by_role: Mapping[str, Resampled],
    pair: tuple[str, str],
    test: tuple[float, float],
    beyond: Set[str],
    samples: int,
    level: float,
) -> Difference:
    d, error, freedom = _difference(by_role, *pair)
    adjusted, share = test
    half, gain = half_width(error, level, freedom), _gain(metric, d)
    word = verdict(gain, adjusted, level, pair[0 if gain > 0 else 1] in beyond)
    p, needed = p_value(d, error, freedom), images_needed(d, error, samples, 1 - share, freedom)
    return Difference(metric, *pair, d, error, d - half, d + half, p, adjusted, word, needed)
