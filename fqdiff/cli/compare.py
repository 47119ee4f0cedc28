"""``fqdiff compare``: models named are sampled on the way, all with the same noise."""

from typing import TYPE_CHECKING, Annotated

import typer

from fqdiff.cli.compare_text import comparison_text
from fqdiff.cli.fid import FEATURES_HELP, InceptionOption, ancestor, choose_features
from fqdiff.cli.quantize_steps import planned_step
from fqdiff.cli.sample import SAMPLER_HELP, sample_settings
from fqdiff.cli.session import Session, common, only_input
from fqdiff.cli.show import artifact_data
from fqdiff.configs import CompareConfig, SampleConfig, config_from_data
from fqdiff.errors import ArtifactNotFound, ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from fqdiff.pipeline import Step
    from fqdiff.store.manifest import Manifest
    from fqdiff.values import Comparison

EXAMPLE = "Example: fqdiff compare demo-fp32 demo-int8 demo-int4 --features digits"
SOURCES = ("samples", "quantized", "plan", "checkpoint")
REF_HELP = "samples, or a model or plan, which is sampled first."


@common()
def compare(
    session: Session,
    baseline: Annotated[str, typer.Argument(help=f"What models are compared with: {REF_HELP}", metavar="BASELINE")],
    models: Annotated[list[str], typer.Argument(help=f"One or more: {REF_HELP}", metavar="MODEL...")],
    features: Annotated[
        str | None, typer.Option(help=FEATURES_HELP, show_default="inception if its weights are at hand, else digits")
    ] = None,
    inception_weights: InceptionOption = None,
    count: Annotated[
        int | None, typer.Option(min=10, help="Images of each set.", show_default="as many as all sets have")
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help=f"{SAMPLER_HELP}, for models.", show_default=f"{SampleConfig.sampler}")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Inference steps, for models.", show_default="50; for ddpm all timesteps")
    ] = None,
    eta: Annotated[
        float | None, typer.Option(min=0, max=1, help="DDIM's randomness, for models.", show_default="0")
    ] = None,
    level: Annotated[
        float | None, typer.Option(help="Level of intervals and verdicts.", show_default=f"{CompareConfig.level}")
    ] = None,
    resamples: Annotated[
        int | None, typer.Option(min=20, help="Bootstrap resamples.", show_default=f"{CompareConfig.resamples}")
    ] = None,
    error_inputs: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Noised held-out images at each timestep to compare predictions on; 0: none.",
            show_default=f"{CompareConfig.error_inputs}",
        ),
    ] = None,
    trajectories: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Runs of the sampler to follow step by step; 0: none.",
            show_default=f"{CompareConfig.trajectories}",
        ),
    ] = None,
    noise_floor: Annotated[
        bool, typer.Option(help="Sample the baseline with another seed too: what chance alone does.")
    ] = True,
) -> None:
    """Tell whether models differ, by how much, and how sure that is."""
    from dataclasses import asdict

    from fqdiff.chains import comparison_step
    from fqdiff.pipeline import Step

    refs = [baseline, *models]
    found = [session.resolve(ref, SOURCES) for ref in refs]
    for ref, manifest in zip(refs, found, strict=True):
        check_model_is_there(session, ref, manifest)
    dataset = ancestor(session, found[0], "dataset")
    for ref, manifest in zip(refs, found, strict=True):
        if ancestor(session, manifest, "dataset").id != dataset.id:
            session.note(f"{ref} was made from another data set; the real images are {baseline}'s")
    reference = session.runner.load(dataset).reference
    held_out = len(reference)
    if count is not None and count > held_out:
        raise ConfigError(f"{count} images asked for; there are {held_out} held-out ones", "lower --count")
    check_image_shapes(session, refs, found, reference)
    network = choose_features(session, features, inception_weights, dataset)
    flags = {"sampler": sampler, "steps": steps, "eta": eta}
    sampling, seed = sampling_of(session, found, flags, count, held_out)
    samples = [samples_of(session, manifest, sampling, seed) for manifest in found]
    floor = None
    if noise_floor:
        floor = Step("sample", {"model": model_of(session, found[0])}, sampling, seed + 1)
    own = tuple(k for k, manifest in enumerate(found[1:], start=1) if is_quantized_from(session, manifest, found[0]))
    config = session.settings(
        "compare",
        CompareConfig,
        {},
        count=count,
        level=level,
        resamples=resamples,
        full_precision_of=own,
        error_inputs=error_inputs,
        trajectories=trajectories,
    )
    networks = [model_of(session, manifest) for manifest in found]
    step = comparison_step(dataset, network, samples[0], samples[1:], floor, networks, config)
    labels = {"baseline": baseline, **{f"model{k}": ref for k, ref in enumerate(models, start=1)}}
    roles = {
        role: {"ref": labels.get(role, f"{baseline}, other noise"), "samples": step.inputs[role].id}
        for role in [*labels, *(["floor"] if floor is not None else [])]
    }
    made = session.make(step, {"roles": roles})
    if made is None:
        return
    value: Comparison = session.runner.load(made)
    data = {**artifact_data(session.store, made), "roles": roles, **asdict(value)}
    session.result(data, lambda: comparison_text(made.id, value, {role: r["ref"] for role, r in roles.items()}))


def sampling_of(
    session: Session, found: "list[Manifest]", flags: "Mapping[str, object]", count: int | None, held_out: int
) -> tuple[SampleConfig, int]:
    """How models are sampled, and with which seed: as the first samples named were; without any, as the flags say."""
    first = next((m for m in found if m.kind == "samples"), None)
    if first is not None:
        given = [f"--{name}" for name, value in flags.items() if value is not None]
        if given:
            raise ConfigError(
                f"{', '.join(given)} beside samples {first.id}, which say how all are sampled", "name models instead"
            )
        return config_from_data(SampleConfig, first.recipe.config), first.recipe.seed
    enough = {"count": min(SampleConfig.count, held_out)}
    config = sample_settings(session, ancestor(session, found[0], "checkpoint"), enough, count=count, **flags)
    session.note(f"samples: {config.count} with {config.sampler} in {config.steps} steps, seed {session.seed}")
    return config, session.seed


def samples_of(session: Session, found: "Manifest", config: SampleConfig, seed: int) -> "Step | Manifest":
    """The samples named, or the step that makes them."""
    from fqdiff.pipeline import Step

    if found.kind == "samples":
        return found
    return Step("sample", {"model": model_of(session, found)}, config, seed)


def model_of(session: Session, found: "Manifest") -> "Step | Manifest":
    """The model behind samples, the one a plan makes, or ``found`` itself."""
    if found.kind == "samples":
        return only_input(session, found, "model")
    return planned_step(session, found) if found.kind == "plan" else found


def check_model_is_there(session: Session, ref: str, found: "Manifest") -> None:
    """Raise ArtifactNotFound for samples whose model is gone: its predictions, and whether it is the baseline's own quantized
    one, can no longer be told.
    """
    model = found.input("model")
    if found.kind == "samples" and model is not None and session.store.find(model.kind, model.id) is None:
        raise ArtifactNotFound(
            f"{ref}: the model behind these samples, {model.kind} {model.id}, is not in the store any more",
            "make it again with the command that made it (fqdiff show), or leave the samples out",
        )


def check_image_shapes(
    session: Session, refs: "Sequence[str]", found: "Sequence[Manifest]", reference: "Tensor"
) -> None:
    """Raise DataError unless all of ``found`` make images of the shape of ``reference`` [N, C, H, W], before any is sampled."""
    from fqdiff.values import Checkpoint

    expected = tuple(reference.shape[1:])
    for ref, manifest in zip(refs, found, strict=True):
        checkpoint: Checkpoint = session.runner.load(ancestor(session, manifest, "checkpoint"))
        if checkpoint.spec.image_shape != expected:
            raise DataError(
                f"{ref} makes images {checkpoint.spec.image_shape}; {refs[0]}'s data set has {expected}",
                "compare models of one image size",
            )


def is_quantized_from(session: Session, found: "Manifest", baseline: "Manifest") -> bool:
    """Whether ``baseline`` is a checkpoint, or samples of one, that ``found`` was made from."""
    model = baseline.input("model")
    full = (model.kind, model.id) if model is not None else (baseline.kind, baseline.id)
    return full == ("checkpoint", ancestor(session, found, "checkpoint").id)
