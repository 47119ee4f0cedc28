"""``fqdiff quantize``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fqdiff.cli.output import check_output, copy_out
from fqdiff.cli.quantize_inputs import (
    WEIGHTS,
    calibration_by_method,
    calibration_of,
    check_plan,
    planned,
    planned_by_method,
    with_plan,
)
from fqdiff.cli.quantize_steps import CORRECTION, OF_ACTIVATIONS, STEPS, TEMPORAL, carried_out, requested
from fqdiff.cli.session import Session, common, only_input
from fqdiff.cli.show import artifact_data, mebibytes
from fqdiff.configs import (
    ACTIVATION_FORMATS,
    ACTIVATION_RANGES,
    SOFTMAXES,
    ActivationConfig,
    NoiseCorrectionConfig,
    QuantizeConfig,
    ReconstructConfig,
    StepsConfig,
    TemporalConfig,
)
from fqdiff.errors import ArtifactCorrupt, ConfigError
from fqdiff.methods import get_bundle
from fqdiff.treatment.request import make_treatment

if TYPE_CHECKING:
    from fqdiff.pipeline import Step
    from fqdiff.store.manifest import Manifest

ACTIVATIONS = "Activations"
RECONSTRUCTION = "Block reconstruction"
PREDICTION = "What the network predicts"
LEARNED_STEPS = "Learned activation steps"
SCALES_BY_TIME = "Activation scales by time"


@common()
def quantize(
    session: Session,
    source: Annotated[
        str | None,
        typer.Argument(
            help="Plan, or with --method a checkpoint: name, id or prefix.",
            show_default="the latest plan",
            metavar="[REF]",
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also copy the safetensors file here.")] = None,
    method: Annotated[
        str | None,
        typer.Option(help="A published method's settings, under all others; see fqdiff methods.", show_default="none"),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Of a checkpoint with --method: the format of its weights, or a budget's bits.", show_default=WEIGHTS
        ),
    ] = None,
    bias_correction: Annotated[
        str | None,
        typer.Option(
            help="What biases make up for: none, static (the mean over timesteps), or timestep, which adds to the file.",
            show_default=QuantizeConfig.bias_correction,
        ),
    ] = None,
    bias_intervals: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Intervals of timesteps with a correction of their own.",
            show_default=f"{QuantizeConfig.bias_intervals}",
        ),
    ] = None,
    calibration_images: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Sampler runs of the full-precision model to correct on.",
            show_default=f"{QuantizeConfig.calibration_images}",
        ),
    ] = None,
    calibration_steps: Annotated[
        int | None,
        typer.Option(min=1, help="DDIM steps of each.", show_default=f"{QuantizeConfig.calibration_steps}"),
    ] = None,
    distill: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Train all that is stored for so many steps to predict what the full-precision model predicts.",
            show_default=f"{QuantizeConfig.distill}",
        ),
    ] = None,
    distill_batch: Annotated[
        int | None,
        typer.Option(min=1, help="Inputs of each step.", show_default=f"{QuantizeConfig.distill_batch}"),
    ] = None,
    distill_rate: Annotated[
        float | None,
        typer.Option(
            help="How far a step moves a weight, in steps of its grid.", show_default=f"{QuantizeConfig.distill_rate}"
        ),
    ] = None,
    reconstruct: Annotated[
        bool | None,
        typer.Option(
            "--reconstruct/--no-reconstruct",
            help="Learn which way each weight is rounded, block by block, then all together, on a calibration set.",
            show_default="no-reconstruct",
            rich_help_panel=RECONSTRUCTION,
        ),
    ] = None,
    reconstruct_temporal: Annotated[
        bool | None,
        typer.Option(
            "--reconstruct-temporal/--reconstruct-together",
            help="First learn the layers that depend on t alone, as one block, over all timesteps.",
            show_default="together",
            rich_help_panel=RECONSTRUCTION,
        ),
    ] = None,
    reconstruct_iterations: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Optimizer steps of each block, at most.",
            show_default=f"{ReconstructConfig.iterations}",
            rich_help_panel=RECONSTRUCTION,
        ),
    ] = None,
    reconstruct_network: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Steps on all blocks together that follow, on what the network puts out; 0 for none.",
            show_default=f"{ReconstructConfig.network_iterations}",
            rich_help_panel=RECONSTRUCTION,
        ),
    ] = None,
    reconstruct_batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Inputs of each step.",
            show_default=f"{ReconstructConfig.batch}",
            rich_help_panel=RECONSTRUCTION,
        ),
    ] = None,
    reconstruct_rate: Annotated[
        float | None,
        typer.Option(
            help="Learning rate of blocks.", show_default=f"{ReconstructConfig.rate}", rich_help_panel=RECONSTRUCTION
        ),
    ] = None,
    reconstruct_inputs: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Inputs of the calibration set that a block is given, at most.",
            show_default=f"{ReconstructConfig.inputs}",
            rich_help_panel=RECONSTRUCTION,
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            max=1e6,
            help="Minutes for --reconstruct and --learn-steps together; schedules are shortened to fit.",
            show_default="as long as it takes",
            metavar="MINUTES",
        ),
    ] = None,
    reconstruct_minutes: Annotated[
        float | None,
        typer.Option(
            help="Time for all of it; schedules are shortened to fit.",
            show_default="as long as it takes",
            rich_help_panel=RECONSTRUCTION,
        ),
    ] = None,
    activations: Annotated[
        str | None,
        typer.Option(
            help=f"Quantize activations too: {', '.join(ACTIVATION_FORMATS)}.",
            show_default="float32",
            rich_help_panel=ACTIVATIONS,
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Calibration set for what learns from one: --reconstruct, ranges and steps of activations, ...",
            show_default="the latest of the model; with --method the latest of its scheme",
            metavar="REF",
            rich_help_panel=ACTIVATIONS,
        ),
    ] = None,
    activation_range: Annotated[
        str | None,
        typer.Option(
            help=f"What codes span: {', '.join(ACTIVATION_RANGES)}.",
            show_default=ActivationConfig.range,
            rich_help_panel=ACTIVATIONS,
        ),
    ] = None,
    activation_intervals: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Intervals of timesteps with scales of their own.",
            show_default=f"{ActivationConfig.intervals}",
            rich_help_panel=ACTIVATIONS,
        ),
    ] = None,
    activation_granularity: Annotated[
        str | None,
        typer.Option(
            help="A scale per tensor, or per channel (of attention: per head).",
            show_default=ActivationConfig.granularity,
            rich_help_panel=ACTIVATIONS,
        ),
    ] = None,
    softmax: Annotated[
        str | None,
        typer.Option(
            help=f"How codes of softmax outputs lie: {', '.join(SOFTMAXES)}.",
            show_default=ActivationConfig.softmax,
            rich_help_panel=ACTIVATIONS,
        ),
    ] = None,
    split_skips: Annotated[
        bool | None,
        typer.Option(
            "--split-skips/--joint-skips",
            help="Scales of their own for a skip and what it is joined to.",
            show_default="split",
            rich_help_panel=ACTIVATIONS,
        ),
    ] = None,
    quantize_temporal: Annotated[
        bool | None,
        typer.Option(
            "--quantize-temporal/--tabulate-temporal",
            help="Whether inputs of layers that depend on t alone are quantized; else samplers compute these once for each t.",
            show_default="quantize",
            rich_help_panel=ACTIVATIONS,
        ),
    ] = None,
    activation_first: Annotated[
        str | None,
        typer.Option(help="Format of the first layer's input.", show_default="float32", rich_help_panel=ACTIVATIONS),
    ] = None,
    activation_last: Annotated[
        str | None,
        typer.Option(help="Format of the network's output.", show_default="float32", rich_help_panel=ACTIVATIONS),
    ] = None,
    dynamic: Annotated[
        bool | None,
        typer.Option(
            "--dynamic/--static",
            help="Take ranges from every input as it comes; nothing is calibrated.",
            show_default="static",
            rich_help_panel=ACTIVATIONS,
        ),
    ] = None,
    temporal_scales: Annotated[
        bool | None,
        typer.Option(
            "--temporal-scales/--no-temporal-scales",
            help="Fit scales of several intervals by networks of the time embedding, and tabulate these.",
            show_default="no-temporal-scales",
            rich_help_panel=SCALES_BY_TIME,
        ),
    ] = None,
    temporal_intervals: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Intervals of timesteps in the table.",
            show_default=f"{TemporalConfig.intervals}",
            rich_help_panel=SCALES_BY_TIME,
        ),
    ] = None,
    temporal_iterations: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Optimizer steps of each network.",
            show_default=f"{TemporalConfig.iterations}",
            rich_help_panel=SCALES_BY_TIME,
        ),
    ] = None,
    temporal_rate: Annotated[
        float | None,
        typer.Option(
            help="Learning rate at first; it falls to 0.",
            show_default=f"{TemporalConfig.rate}",
            rich_help_panel=SCALES_BY_TIME,
        ),
    ] = None,
    learn_steps: Annotated[
        bool | None,
        typer.Option(
            "--learn-steps/--no-learn-steps",
            help="Learn the scales of activations by gradient, block by block, on a calibration set.",
            show_default="no-learn-steps",
            rich_help_panel=LEARNED_STEPS,
        ),
    ] = None,
    steps_iterations: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Optimizer steps of each block.",
            show_default=f"{StepsConfig.iterations}",
            rich_help_panel=LEARNED_STEPS,
        ),
    ] = None,
    steps_batch: Annotated[
        int | None,
        typer.Option(
            min=1, help="Inputs of each step.", show_default=f"{StepsConfig.batch}", rich_help_panel=LEARNED_STEPS
        ),
    ] = None,
    steps_rate: Annotated[
        float | None,
        typer.Option(
            help="By which share of itself a scale moves at first; it falls to 0.",
            show_default=f"{StepsConfig.rate}",
            rich_help_panel=LEARNED_STEPS,
        ),
    ] = None,
    steps_minutes: Annotated[
        float | None,
        typer.Option(
            help="Time for all blocks; the schedule is shortened to fit.",
            show_default="as long as it takes",
            rich_help_panel=LEARNED_STEPS,
        ),
    ] = None,
    steps_inputs: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Inputs of the calibration set that are used, at most.",
            show_default=f"{StepsConfig.inputs}",
            rich_help_panel=LEARNED_STEPS,
        ),
    ] = None,
    reparameterize: Annotated[
        bool,
        typer.Option(
            "--reparameterize",
            help="Give what norms put out one range for all channels, by their affines and the next layers' weights.",
            rich_help_panel=ACTIVATIONS,
        ),
    ] = False,
    noise_correction: Annotated[
        bool | None,
        typer.Option(
            "--noise-correction/--no-noise-correction",
            help="Measure slope, bias and variance of the error of the prediction, and make up for them.",
            show_default="no-noise-correction",
            rich_help_panel=PREDICTION,
        ),
    ] = None,
    noise_intervals: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Intervals of timesteps with a correction of their own.",
            show_default=f"{NoiseCorrectionConfig.intervals}",
            rich_help_panel=PREDICTION,
        ),
    ] = None,
) -> None:
    """Write the smaller checkpoint that a plan, or a method for a checkpoint, describes."""
    from fqdiff.treatment.steps import activations_of

    chosen = session.resolve(source, ("plan",) if source is None else ("plan", "checkpoint"))
    if chosen.kind == "checkpoint" and method is None:
        hint = f"name a method: --method linear; or make a plan: fqdiff plan {chosen.id}"
        raise ConfigError(f"checkpoint {chosen.id} without a plan that says how to quantize it", hint)
    if weights is not None and chosen.kind == "plan":
        raise ConfigError("--weights of a plan, which says them itself", "leave it out, or name a checkpoint")
    flags: dict[str, dict[str, object]] = {
        "quantize": {
            "bias_correction": bias_correction,
            "bias_intervals": bias_intervals,
            "calibration_images": calibration_images,
            "calibration_steps": calibration_steps,
            "distill": distill,
            "distill_batch": distill_batch,
            "distill_rate": distill_rate,
        },
        "reconstruct": {
            "iterations": reconstruct_iterations,
            "batch": reconstruct_batch,
            "rate": reconstruct_rate,
            "inputs": reconstruct_inputs,
            "network_iterations": reconstruct_network,
            "minutes": reconstruct_minutes,
        },
        "activations": {
            "format": activations,
            "range": activation_range,
            "intervals": activation_intervals,
            "granularity": activation_granularity,
            "softmax": softmax,
            "split_skips": split_skips,
            "temporal": quantize_temporal,
            "first": activation_first,
            "last": activation_last,
            "dynamic": dynamic,
        },
        TEMPORAL: {"intervals": temporal_intervals, "iterations": temporal_iterations, "rate": temporal_rate},
        STEPS: {
            "iterations": steps_iterations,
            "batch": steps_batch,
            "rate": steps_rate,
            "inputs": steps_inputs,
            "minutes": steps_minutes,
        },
        CORRECTION: {"intervals": noise_intervals},
    }
    asked = {
        "reconstruct": reconstruct,
        TEMPORAL: temporal_scales,
        STEPS: learn_steps,
        CORRECTION: noise_correction,
    }
    check_output(output)
    if chosen.kind == "checkpoint":
        assert method is not None
        subject = planned_by_method(session, chosen, method, get_bundle(method), weights)
    else:
        subject = planned(session, chosen)
    request = requested(
        session, flags, asked, reparameterize or None, reconstruct_temporal, budget, activations_of(subject.plan)
    )
    treatment = make_treatment(request, method)
    if method is None:
        inputs: Manifest | Step | None = calibration_of(session, subject.checkpoint, treatment, calibration)
    else:
        scheme = get_bundle(method).scheme
        inputs = calibration_by_method(session, subject.checkpoint, treatment, calibration, scheme)
    facts: dict[str, object] = {}
    lines: tuple[str, ...] = ()
    if method is not None:
        check_plan(session, method, subject, inputs)
        if subject.made is None and not session.dry_run:
            carried_out(session, subject, treatment, inputs)  # what is to be refused is, before there is a plan
            subject = with_plan(session, subject)
            check_plan(session, method, subject, inputs)
        bundle = get_bundle(method)
        same, of_plan = bundle.flags(treatment.activations is not None), bundle.plan_flags()
        facts = {
            "method": method,
            "bundle": same,
            "plan_bundle": of_plan,
            "plan": subject.plan.id,
            "calibration": inputs and inputs.id,
        }
        lines = (
            f"{method} is {' '.join(same)}" if same else f"{method} is its plan, as it is",
            *((f"its plan is {' '.join(of_plan)}",) if of_plan else ()),
        )
    manifest = session.make(carried_out(session, subject, treatment, inputs), facts, lines)
    if manifest is None:
        return
    assert subject.made is not None
    promised = session.runner.load(subject.made).file_bytes
    file = manifest.file("model.safetensors")
    added = added_bytes(session, manifest, promised)
    path = session.store.directory(manifest.kind, manifest.id) / file.name
    if output is not None:
        session.store.verify(manifest)
        copy_out(path, output)
    data = {
        **artifact_data(session.store, manifest),
        "file": str(path),
        "file_bytes": file.bytes,
        "promised_bytes": promised,
        "timestep_bias_bytes": added["quantize"],
        "activation_bytes": added["activations"],
        "noise_correction_bytes": added[CORRECTION],
    }

    def text() -> str:
        words = ("biases by timestep", "activation scales", "noise correction")
        extra = [f"{count:,} of {what}" for what, count in zip(words, added.values(), strict=True) if count]
        same = f"the plan's {promised:,} and {' and '.join(extra)}" if extra else "as planned"
        return f"quantized {manifest.id}: {mebibytes(file.bytes)}, {same}\n{output or path}"

    session.result(data, text)


def added_bytes(session: Session, manifest: "Manifest", promised: int) -> dict[str, int]:
    """What the stages that made a quantized model added to the ``promised`` bytes of its plan's file, by stage.

    Raises ArtifactCorrupt where nothing was to be added, and the file has another size all the same.
    """
    sizes: dict[str, int] = {}
    made = manifest
    while made.input("model") is not None:
        stage = "activations" if made.recipe.stage in OF_ACTIVATIONS else made.recipe.stage
        sizes.setdefault(stage, made.file("model.safetensors").bytes)
        made = only_input(session, made, "model")
    sizes["quantize"] = made.file("model.safetensors").bytes
    if sizes["quantize"] != promised and made.recipe.config.get("bias_correction") != "timestep":
        raise ArtifactCorrupt(
            f"quantized {made.id} takes {sizes['quantize']:,} bytes, and its plan promises {promised:,}",
            "one of them was edited: make both again with --force",
        )
    added, before = {}, promised
    for stage in ("quantize", "activations", CORRECTION):
        after = sizes.get(stage, before)
        added[stage], before = after - before, after
    return added
