"""Metrics of generated images against held-out real ones, and the difference to another model's, with their uncertainty."""

from fqdiff.configs import FidConfig
from fqdiff.context import Context
from fqdiff.errors import ConfigError, DataError, LineageError
from fqdiff.evidence.comparison import BASELINE, MODEL, differences, kernel_blocks, measures
from fqdiff.evidence.extrapolation import enough_images, frechet_infinity
from fqdiff.evidence.features import FeatureNetwork, to_unit_range
from fqdiff.evidence.resampling import draw_counts
from fqdiff.rng import generator
from fqdiff.sensitivity.distributions import distribution_metrics, frechet_metric, image_set, real_images
from fqdiff.sensitivity.ledger import Ledger
from fqdiff.values import ClassifierWeights, Dataset, FidResult, SampleSet

LEVEL = 0.95


def fid(
    samples: SampleSet,
    dataset: Dataset,
    features: FeatureNetwork | ClassifierWeights,
    baseline: SampleSet | None,
    config: FidConfig,
    seed: int,
    context: Context,
) -> FidResult:
    """FID and all its kind of ``samples`` against as many held-out images of ``dataset``, both as uint8 through ``features``.

    With a ``baseline``: its metrics too, and the difference of the two FIDs, from paired resamples where both come from the
    same noise; those of another seed are resampled apart. Values, resamples and intervals are those of a comparison with the
    same seed and count. Raises ConfigError for a count that one side does not have, DataError for other image shapes,
    LineageError for a baseline of other images, or too few.
    """
    network = features.feature_network() if isinstance(features, ClassifierWeights) else features
    n = _count(samples, dataset, config)
    given = {MODEL: samples}
    if baseline is not None:
        _check_baseline(samples, baseline, n)
        given[BASELINE] = baseline
    paired = baseline is not None and baseline.seed == samples.seed
    shared, apart, other_noise = (
        draw_counts(n, config.resamples, generator(seed, label)) for label in ("images", "held-out images", "floor")
    )
    counts = {MODEL: shared, BASELINE: shared if paired else other_noise}
    reference = real_images(dataset, n)
    with context.progress(1 + 3 * len(given), "fid", "step") as bar:
        real = image_set("held-out images", reference, apart, network, context)
        bar.update()
        sets = {}
        for role, one in given.items():
            sets[role] = image_set(role, one.images[:n], counts[role], network, context)
            bar.update()
        results = distribution_metrics(real, sets, bar.update)
    with context.soft_stop() as stop_requested:
        results["fid"] = frechet_metric(real, sets, Ledger(context, stop_requested))
    difference, interval, image_error = None, None, None
    if baseline is not None:
        (row,) = differences({"fid": results["fid"]}, 1, (), n, LEVEL)
        difference, interval = row.difference, (row.low, row.high)
    if baseline is not None and paired:
        shift = to_unit_range(samples.images[:n]) - to_unit_range(baseline.images[:n])
        image_error = float(shift.square().mean())
    ours = sets[MODEL].features.cpu()
    infinity = None
    if enough_images(ours):
        infinity = frechet_infinity(real.features.cpu(), ours, generator(seed, "subsets"))
    return FidResult(
        fid=results["fid"][MODEL].value,
        n=n,
        features=network.name,
        features_sha256=network.sha256,
        dimension=real.features.shape[1],
        reference=f"{dataset.name}, {n} of {len(dataset.reference)} held-out images",
        seed=samples.seed,
        image_mean=float(samples.images[:n].double().mean()) / 127.5 - 1,
        reference_mean=float(reference.double().mean()) / 127.5 - 1,
        confidence=network.confidence(samples.images[:n]) if network.confidence else None,
        difference=difference,
        interval=interval,
        image_error=image_error,
        fid_infinity=infinity,
        measures=measures(results, LEVEL),
        kid_blocks=kernel_blocks(real, sets, LEVEL, generator(seed, "blocks")),
    )


def _count(samples: SampleSet, dataset: Dataset, config: FidConfig) -> int:
    """How many images of each side are taken."""
    reference = dataset.reference
    if samples.images.shape[1:] != reference.shape[1:]:
        raise DataError(
            f"samples of shape {tuple(samples.images.shape[1:])} against images of {tuple(reference.shape[1:])}",
            "compare with the data set the model was trained on",
        )
    fewest = min(len(samples.images), len(reference))
    if config.count > fewest:
        raise ConfigError(
            f"{config.count} images asked for; there are {len(samples.images)} samples and {len(reference)} held-out images",
            "lower --count, or take a larger data set",
        )
    return config.count or fewest


def _check_baseline(samples: SampleSet, baseline: SampleSet, n: int) -> None:
    """Raise LineageError unless ``baseline`` has ``n`` images of the size of ``samples``."""
    if baseline.images.shape[1:] != samples.images.shape[1:]:
        raise LineageError(
            f"a baseline of images {tuple(baseline.images.shape[1:])}", "take samples of the same image size"
        )
    if len(baseline.images) < n:
        raise LineageError(
            f"a baseline of {len(baseline.images)} images for {n} samples", "sample both with the same --count"
        )
