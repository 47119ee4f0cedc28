"""``fqdiff fid``: a plan or model named is quantized and sampled on the way."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fqdiff.cli.compare_text import cells
from fqdiff.cli.quantize_steps import planned_step
from fqdiff.cli.sample import sample_settings
from fqdiff.cli.session import Session, common, only_input
from fqdiff.cli.show import artifact_data, table
from fqdiff.configs import ClassifierConfig, FidConfig, SampleConfig, config_from_data
from fqdiff.errors import ArtifactNotFound, ConfigError, DataError
from fqdiff.report.words import DISTRIBUTION_COLUMNS

if TYPE_CHECKING:
    from fqdiff.pipeline import External, Step
    from fqdiff.store.manifest import Manifest
    from fqdiff.values import FidResult


FEATURES_HELP = "inception, digits, or torchscript:FILE, a network of yours: it is executable."
InceptionOption = Annotated[
    Path | None,
    typer.Option(
        envvar="FQDIFF_INCEPTION",
        help="clean-fid's inception-2015-12-05.pt, from a source you trust: it is executable.",
    ),
]


@common()
def fid(
    session: Session,
    source: Annotated[
        str | None,
        typer.Argument(
            help="Samples; or a plan or model, which is sampled first.",
            show_default="the latest of these",
            metavar="[REF]",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="Baseline samples; those of another seed are resampled apart.",
            show_default="the full-precision model's, if sampled",
        ),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(help=FEATURES_HELP, show_default="inception if its weights are at hand, else digits"),
    ] = None,
    inception_weights: InceptionOption = None,
    count: Annotated[
        int | None, typer.Option(min=10, help="Images of each set.", show_default="as many as both sets have")
    ] = None,
) -> None:
    """Compare generated images with held-out real ones: FID and its kind."""
    from dataclasses import asdict

    from fqdiff.pipeline import Step

    found = session.resolve(source, ("samples", "quantized", "plan", "checkpoint"))
    dataset = ancestor(session, found, "dataset")
    network = choose_features(session, features, inception_weights, dataset)
    config = session.settings("fid", FidConfig, {}, count=count)
    samples, baseline = fid_samples(session, found, dataset, config.count, against)
    inputs: dict[str, Step | Manifest | External] = {"samples": samples, "dataset": dataset, "features": network}
    if baseline is not None:
        inputs["baseline"] = baseline
    manifest = session.make(Step("fid", inputs, config))
    if manifest is None:
        return
    value: FidResult = session.runner.load(manifest)
    session.result({**artifact_data(session.store, manifest), **asdict(value)}, lambda: fid_text(manifest, value))


def fid_samples(
    session: Session, found: "Manifest", dataset: "Manifest", count: int, against: str | None
) -> "tuple[Step | Manifest, Step | Manifest | None]":
    """The samples to judge and their baseline. A plan is quantized and a model sampled on the way.

    The baseline is the one named; else, for a quantized model, samples of its checkpoint made in the same way: where they
    exist, or where samples are being made anyway.
    """
    from fqdiff.pipeline import Step

    named = session.store.resolve(against, ("samples",)) if against is not None else None
    if found.kind == "samples":
        model = only_input(session, found, "model")
        if named is not None or model.kind == "checkpoint":
            return found, named
        config = config_from_data(SampleConfig, found.recipe.config)
        full = Step("sample", {"model": ancestor(session, model, "checkpoint")}, config, found.recipe.seed)
        return found, session.store.find(full.kind, full.id)
    held_out = len(session.runner.load(dataset).reference)
    if count > held_out:
        raise ConfigError(f"{count} images asked for; there are {held_out} held-out ones", "lower --count")
    checkpoint = ancestor(session, found, "checkpoint")
    enough = {"count": count or min(SampleConfig.count, held_out)}
    config = sample_settings(session, checkpoint, enough)
    model_step = planned_step(session, found) if found.kind == "plan" else found
    session.note(f"samples: {config.count} with {config.sampler} in {config.steps} steps, seed {session.seed}")
    samples = Step("sample", {"model": model_step}, config, session.seed)
    if found.kind == "checkpoint":
        return samples, named
    return samples, named or Step("sample", {"model": checkpoint}, config, session.seed)


def ancestor(session: Session, manifest: "Manifest", kind: str) -> "Manifest":
    """The nearest artifact of ``kind`` that ``manifest`` was made from."""
    found = next((m for _, m, _, _ in session.store.lineage(manifest) if m is not None and m.kind == kind), None)
    if found is None:
        raise ArtifactNotFound(
            f"the {kind} behind {manifest.kind} {manifest.id} is gone", "make it again, or name another"
        )
    return found


def choose_features(
    session: Session, asked: str | None, weights: Path | None, dataset: "Manifest | Step"
) -> "Step | External":
    """The feature network asked for; without a choice Inception if its weights are at hand, else digits, and a note."""
    from fqdiff.pipeline import External, Step
    from fqdiff.store.inception import find_inception, load_inception
    from fqdiff.store.torchscript import load_torchscript

    if asked is not None and asked.startswith("torchscript:"):
        network = load_torchscript(Path(asked.removeprefix("torchscript:")).expanduser())
        return External("torchscript", network.sha256[:16], network)
    if asked not in (None, "inception", "digits"):
        raise ConfigError(f"unknown features '{asked}'", "one of: inception, digits, torchscript:FILE")
    if asked is None:
        asked = "inception" if weights or find_inception() else "digits"
        reason = "" if asked == "inception" else " (no Inception weights at hand: --inception-weights FILE)"
        session.note(f"features: {asked}{reason}")
    if asked == "inception":
        if session.dry_run and not (weights or find_inception()):
            raise ConfigError("without the Inception weights the result has no id yet", "give --inception-weights FILE")
        network = load_inception(weights)
        return External("inception", network.sha256[:16], network)
    if not isinstance(dataset, Step) and session.runner.load(dataset).labels is None:
        raise DataError("the data set has no labels to train a digits classifier on", "use --features inception")
    return Step("classifier", {"dataset": dataset}, session.settings("classifier", ClassifierConfig, {}))


def fid_text(manifest: "Manifest", value: "FidResult") -> str:
    """The result in words: every metric, what it depends on, and how sure the difference is."""
    from fqdiff.evidence.comparison import MODEL
    from fqdiff.evidence.decisions import interval_verdict

    own = value.measure("fid")
    columns = {m.metric: DISTRIBUTION_COLUMNS[m.metric] for m in value.measures}
    roles = dict.fromkeys(m.of for m in value.measures)
    rows = [["baseline" if of == "baseline" else "samples", *cells(value.measures, of, columns)] for of in roles]
    lines = [
        f"FID {value.features} {value.fid:.3f} ± {own.high - own.value:.3f}"
        f"  (N = {value.n}, seed {value.seed}, metrics {manifest.id})",
        table(["95 % intervals", *(name for name, _ in columns.values())], rows),
        f"features: {value.features}, {value.dimension} dimensions, sha256 {value.features_sha256[:16]}",
        f"reference: {value.reference}; mean pixel {value.image_mean:+.3f}, reference {value.reference_mean:+.3f}",
    ]
    if value.fid_infinity is not None:
        lines.append(f"FID extrapolated to infinitely many images: {value.fid_infinity:.3f}")
    for blocks in (m for m in value.kid_blocks if m.of == MODEL):
        lines.append(f"KID once more, by the variance of blocks: {blocks.value:.3g} ± {blocks.high - blocks.value:.3g}")
    if value.confidence is not None:
        lines.append(f"mean top-1 confidence of the classifier: {value.confidence:.3f}")
    if value.difference is not None and value.interval is not None:
        low, high = value.interval
        same_noise = value.image_error is not None
        if same_noise:
            lines.append(f"mean squared pixel difference to the baseline, same noise: {value.image_error:.2e}")
        found = interval_verdict(-value.difference, low, high)
        drawn = "same noise" if same_noise else "other noise, resampled apart"
        lines.append(
            f"FID minus the baseline's ({drawn}): {value.difference:+.3f} [{low:+.3f}, {high:+.3f}], 95 %: {found}"
        )
        if found == "not worse" and same_noise:
            lines.append("Not worse: lower is no gain, for the model moved away from the baseline.")
    return "\n".join(lines)
