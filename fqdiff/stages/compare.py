"""Are these models different, by how much, and how sure: every metric of sets of images made from the same noise."""

from collections.abc import Mapping, Sequence

from fqdiff.configs import CompareConfig
from fqdiff.context import Context
from fqdiff.errors import ConfigError, DataError, LineageError
from fqdiff.evidence.comparison import (
    BASELINE,
    FLOOR,
    NETWORK,
    Resampled,
    differences,
    kernel_blocks,
    measures,
    model_roles,
    network_differences,
    paired_metrics,
)
from fqdiff.evidence.features import FeatureNetwork
from fqdiff.evidence.resampling import draw_counts
from fqdiff.rng import generator
from fqdiff.sensitivity.curves import Measured, comparable, divergence, noise_error
from fqdiff.sensitivity.distributions import distribution_metrics, frechet_metric, image_set, real_images
from fqdiff.sensitivity.ledger import Ledger
from fqdiff.values import ClassifierWeights, Comparison, Dataset, Model, SampleSet


def compare(
    dataset: Dataset,
    features: FeatureNetwork | ClassifierWeights,
    baseline: SampleSet,
    floor: SampleSet | None,
    models: Sequence[SampleSet],
    networks: Sequence[Model],
    config: CompareConfig,
    seed: int,
    context: Context,
) -> Comparison:
    """All metrics of ``models`` and ``baseline``, their differences with intervals, and a verdict on every pair.

    Image k of ``baseline`` and of all ``models`` was made from the same noise: each resample draws the same k of all of them,
    and held-out images of ``dataset`` on their own. ``floor``, the baseline's model with another seed, is drawn apart: it shows
    how far two runs of one model differ. Every metric is of the same N images. ``networks``: the models that made ``baseline``
    and ``models``, in this order, or none; those whose noise schedule and kind of output are the baseline's are held against it
    timestep by timestep and step by step. Raises LineageError for sets of different seeds,
    DataError for images of different shapes, ConfigError for a count that one set does not have.
    """
    network = features.feature_network() if isinstance(features, ClassifierWeights) else features
    samples = {BASELINE: baseline, **dict(zip(model_roles(len(models)), models, strict=True))}
    _check_pairing(samples, floor)
    if floor is not None:
        samples[FLOOR] = floor
    n = _common_count(samples, dataset, config)
    shared, apart, held_out = (
        draw_counts(n, config.resamples, generator(seed, label)) for label in ("images", "floor", "held-out images")
    )
    results: dict[str, dict[str, Resampled]] = {}
    with context.progress(1 + 4 * len(samples), "compare", "step") as bar:
        real = image_set("held-out images", real_images(dataset, n), held_out, network, context)
        bar.update()
        sets = {}
        for role, given in samples.items():
            sets[role] = image_set(role, given.images[:n], apart if role == FLOOR else shared, network, context)
            bar.update()
        for role, one in sets.items():
            for metric, value in paired_metrics(one, sets[BASELINE]).items() if role != BASELINE else ():
                results.setdefault(metric, {})[role] = value
            bar.update()
        results |= distribution_metrics(real, sets, bar.update)
    with context.soft_stop() as stop_requested:
        ledger = Ledger(context, stop_requested)
        results["fid"] = frechet_metric(real, sets, ledger)
        errors, runs = _networks_compared(dataset, networks, config, baseline.seed, seed, context, ledger)
    of_networks = {name: means for name, (_, means) in zip(NETWORK, (errors, runs), strict=True) if means}
    counts = dict(zip(NETWORK, (config.error_inputs, config.trajectories), strict=True))
    return Comparison(
        n=n,
        level=config.level,
        resamples=config.resamples,
        features=network.name,
        features_sha256=network.sha256,
        dimension=real.features.shape[1],
        reference=f"{dataset.name}, {n} of {len(dataset.reference)} held-out images",
        seed=baseline.seed,
        floor_seed=floor.seed if floor is not None else None,
        models=len(models),
        measures=measures(results, config.level),
        differences=(
            *network_differences(of_networks, counts, config.level),
            *differences(results, len(models), config.full_precision_of, n, config.level),
        ),
        noise_error=errors[0],
        divergence=runs[0],
        sampler=_sampler_words(config) if runs[0] else "",
        kid_blocks=kernel_blocks(real, sets, config.level, generator(seed, "blocks")),
    )


def _check_pairing(paired: Mapping[str, SampleSet], floor: SampleSet | None) -> None:
    """Raise LineageError or DataError unless image k of all sets was made from the same noise, and ``floor``'s was not."""
    baseline = paired[BASELINE]
    if len(paired) < 2:
        raise ConfigError("there is no model to compare the baseline with", "name one or more")
    for role, one in paired.items():
        if one.seed != baseline.seed:
            raise LineageError(
                f"{role} has seed {one.seed}, the baseline {baseline.seed}: their images share no noise",
                "sample all with the same --seed",
            )
        if one.images.shape[1:] != baseline.images.shape[1:]:
            raise DataError(
                f"{role} has images {tuple(one.images.shape[1:])}, the baseline {tuple(baseline.images.shape[1:])}",
                "compare models of one image size",
            )
    if floor is not None and floor.seed == baseline.seed:
        raise LineageError(
            f"the noise floor has the baseline's own seed {floor.seed}",
            "sample the baseline's model with another --seed",
        )


def _common_count(samples: Mapping[str, SampleSet], dataset: Dataset, config: CompareConfig) -> int:
    """How many images of each set are compared: FIDs of different N are different quantities."""
    available = {"held-out": dataset.reference, **{role: s.images for role, s in samples.items()}}
    shapes = {tuple(images.shape[1:]) for images in available.values()}
    if len(shapes) > 1:
        raise DataError(
            f"images of {' and '.join(str(s) for s in sorted(shapes))}",
            "compare with the data set the models were trained on",
        )
    role, fewest = min(((role, len(images)) for role, images in available.items()), key=lambda item: item[1])
    if config.count > fewest:
        raise ConfigError(f"{config.count} images asked for; there are {fewest} of {role}", "lower --count")
    return config.count or fewest


def _networks_compared(
    dataset: Dataset,
    networks: Sequence[Model],
    config: CompareConfig,
    run_seed: int,
    seed: int,
    context: Context,
    ledger: Ledger,
) -> tuple[Measured, Measured]:
    """Noise errors and divergence of all that can be held against the first of ``networks``."""
    nothing: Measured = (), {}
    if not networks:
        return nothing, nothing
    first, *others = networks
    models = dict(zip(model_roles(len(others)), others, strict=True))
    models = {role: model for role, model in models.items() if comparable(model, first)}
    return (
        noise_error(first, models, dataset.reference, config, seed, context, ledger)
        if config.error_inputs
        else nothing,
        divergence(first, models, config, run_seed, seed, context, ledger) if config.trajectories else nothing,
    )


def _sampler_words(config: CompareConfig) -> str:
    """``ddim, 50 steps``; with its randomness where it has any."""
    eta = f", eta {config.eta:g}" if config.eta else ""
    return f"{config.sampler}, {config.steps} steps{eta}"
