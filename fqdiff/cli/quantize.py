"""``fqdiff quantize``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fqdiff.cli.output import copy_out
from fqdiff.cli.session import Session, common, only_input
from fqdiff.cli.show import artifact_data, mebibytes
from fqdiff.configs import QuantizeConfig

if TYPE_CHECKING:
    from fqdiff.pipeline import Step
    from fqdiff.store.manifest import Manifest


@common()
def quantize(
    session: Session,
    source: Annotated[
        str | None, typer.Argument(help="Plan: name, id or prefix.", show_default="the latest", metavar="[PLAN]")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also copy the safetensors file here.")] = None,
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
) -> None:
    """Write the smaller checkpoint that a plan describes."""
    chosen = session.resolve(source, ("plan",))
    step = quantize_step(
        session,
        chosen,
        bias_correction=bias_correction,
        bias_intervals=bias_intervals,
        calibration_images=calibration_images,
        calibration_steps=calibration_steps,
        distill=distill,
        distill_batch=distill_batch,
        distill_rate=distill_rate,
    )
    manifest = session.make(step)
    if manifest is None:
        return
    promised = session.runner.load(chosen).file_bytes
    file = manifest.file("model.safetensors")
    path = session.store.directory(manifest.kind, manifest.id) / file.name
    if output is not None:
        session.store.verify(manifest)
        copy_out(path, output)
    data = {
        **artifact_data(session.store, manifest),
        "file": str(path),
        "file_bytes": file.bytes,
        "promised_bytes": promised,
        "timestep_bias_bytes": file.bytes - promised,
    }

    def text() -> str:
        extra = file.bytes - promised
        same = "as planned" if not extra else f"the plan's {promised:,} and {extra:,} of biases by timestep"
        return f"quantized {manifest.id}: {mebibytes(file.bytes)}, {same}\n{output or path}"

    session.result(data, text)


def quantize_step(session: Session, plan_manifest: "Manifest", **flags: object) -> "Step":
    """The step that carries out a plan on the checkpoint it was made for, with the settings of flags and file.

    It gets the plan's Fisher table where that has values of single weights, which ranges may be fitted to.
    """
    from fqdiff.pipeline import Step

    inputs = {"checkpoint": only_input(session, plan_manifest, "checkpoint"), "plan": plan_manifest}
    if plan_manifest.input("fisher") is not None:
        table = only_input(session, plan_manifest, "fisher")
        if table.recipe.config.get("granularity") == "weight":
            inputs["fisher"] = table
            if plan_manifest.input("trajectory") is not None:
                inputs["trajectory"] = only_input(session, plan_manifest, "trajectory")
    config = session.settings("quantize", QuantizeConfig, {}, **flags)
    seed = session.seed if config.bias_correction != "none" or config.distill else 0  # nothing else is random
    return Step("quantize", inputs, config, seed)
