"""Fréchet distance of generated images to held-out real ones, and to another model's, with its uncertainty."""

import torch

from fqdiff.configs import FidConfig
from fqdiff.context import Context
from fqdiff.errors import ConfigError, DataError, LineageError
from fqdiff.evidence.bootstrap import difference_interval
from fqdiff.evidence.features import FeatureNetwork, to_unit_range
from fqdiff.evidence.frechet import frechet_distance_of_features
from fqdiff.rng import generator
from fqdiff.values import ClassifierWeights, Dataset, FidResult, SampleSet


def fid(
    samples: SampleSet,
    dataset: Dataset,
    features: FeatureNetwork | ClassifierWeights,
    baseline: SampleSet | None,
    config: FidConfig,
    seed: int,
    context: Context,
) -> FidResult:
    """FID of ``samples`` against as many held-out images of ``dataset``, both as uint8 through the same ``features``.

    With a ``baseline`` sampled from the same noise: the difference of the two FIDs and its paired bootstrap interval.
    Raises ConfigError for a count that one side does not have, DataError for other image shapes, LineageError for a
    baseline of another seed.
    """
    network = features.feature_network() if isinstance(features, ClassifierWeights) else features
    reference = dataset.reference
    if samples.images.shape[1:] != reference.shape[1:]:
        raise DataError(
            f"samples of shape {tuple(samples.images.shape[1:])} against images of {tuple(reference.shape[1:])}",
            "compare with the data set the model was trained on",
        )
    n = config.count or min(len(samples.images), len(reference))
    if n > min(len(samples.images), len(reference)):
        raise ConfigError(
            f"{n} images asked for; there are {len(samples.images)} samples and {len(reference)} held-out images",
            "lower --count, or take a larger data set",
        )
    # A source may be sorted by label, and MNIST's first half is neater than its second: take n at random, always the same.
    chosen = torch.randperm(len(reference), generator=generator(0, "reference"))[:n].sort().values
    reference = reference[chosen]
    with context.progress(2 + (baseline is not None) * (1 + config.resamples), "fid", "step") as bar:
        real = network.extract(reference)
        bar.update()
        fake = network.extract(samples.images[:n])
        bar.update()
        distance = frechet_distance_of_features(real, fake)
        difference, interval, image_error = None, None, None
        if baseline is not None:
            if baseline.images.shape[1:] != samples.images.shape[1:]:
                raise LineageError(
                    f"a baseline of images {tuple(baseline.images.shape[1:])}", "take samples of the same image size"
                )
            if baseline.seed != samples.seed or len(baseline.images) < n:
                raise LineageError(
                    f"a baseline of {len(baseline.images)} images with seed {baseline.seed}, samples with seed {samples.seed}",
                    "sample both with the same --seed and --count",
                )
            base = network.extract(baseline.images[:n])
            difference = distance - frechet_distance_of_features(real, base)
            interval = difference_interval(
                fake, base, real, generator(seed, "bootstrap"), config.resamples, tick=bar.update
            )
            image_error = float(
                (to_unit_range(samples.images[:n]) - to_unit_range(baseline.images[:n])).square().mean()
            )
            bar.update()
    return FidResult(
        fid=distance,
        n=n,
        features=network.name,
        features_sha256=network.sha256,
        dimension=real.shape[1],
        reference=f"{dataset.name}, {n} of {len(dataset.reference)} held-out images",
        seed=samples.seed,
        image_mean=float(samples.images[:n].double().mean()) / 127.5 - 1,
        reference_mean=float(reference.double().mean()) / 127.5 - 1,
        confidence=network.confidence(samples.images[:n]) if network.confidence else None,
        difference=difference,
        interval=interval,
        image_error=image_error,
    )
