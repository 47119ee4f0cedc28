"""``fqdiff calibrate``."""

from typing import TYPE_CHECKING, Annotated

import typer

from fqdiff.cli.session import Session, common, of_checkpoint, only_input
from fqdiff.cli.show import artifact_data, mebibytes
from fqdiff.configs import CALIBRATION_SCHEMES, CalibrateConfig, calibration_settings
from fqdiff.errors import ConfigError

if TYPE_CHECKING:
    from fqdiff.pipeline import Step
    from fqdiff.store.manifest import Manifest
    from fqdiff.values import CalibrationSet

EXAMPLE = "Example: fqdiff calibrate --scheme uniform --samples 64"


@common()
def calibrate(
    session: Session,
    model: Annotated[
        str | None,
        typer.Argument(help="Checkpoint: name, id or prefix.", show_default="the latest", metavar="[MODEL]"),
    ] = None,
    scheme: Annotated[
        str | None,
        typer.Option(help=f"Which timesteps: {', '.join(CALIBRATION_SCHEMES)}.", show_default=CalibrateConfig.scheme),
    ] = None,
    timesteps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Inputs kept of each run.",
            show_default=f"{CalibrateConfig.timesteps}; of a third at most all its steps",
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Sampler runs.", show_default=f"{CalibrateConfig.samples}")
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help="ddim or ddpm.", show_default=f"{CalibrateConfig.sampler}")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of a run.", show_default="50; for ddpm all timesteps")
    ] = None,
    eta: Annotated[
        float | None, typer.Option(min=0, max=1, help="DDIM's randomness, 0 to 1.", show_default="0")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            help="noise: what the sampler meets; data: noised training images.", show_default=CalibrateConfig.source
        ),
    ] = None,
    location: Annotated[
        float | None,
        typer.Option(help="Of ndtc's skew-normal, as a share of T.", show_default=f"{CalibrateConfig.location}"),
    ] = None,
    spread: Annotated[
        float | None, typer.Option(help="Of the same, as a share of T.", show_default=f"{CalibrateConfig.spread}")
    ] = None,
    skew: Annotated[
        float | None, typer.Option(help="Its shape; 0 is a normal.", show_default=f"{CalibrateConfig.skew:g}")
    ] = None,
    fisher: Annotated[
        str | None,
        typer.Option(
            help="Fisher table that weighs the timesteps.", show_default="the latest of the model", metavar="REF"
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="float32 or float16: how inputs are stored.", show_default=CalibrateConfig.precision),
    ] = None,
) -> None:
    """Record model inputs along the full-precision sampler, to quantize activations with."""
    checkpoint = session.resolve(model, ("checkpoint",))
    step = calibration_step(
        session,
        checkpoint,
        fisher,
        scheme=scheme,
        source=source,
        sampler=sampler,
        steps=steps,
        eta=eta,
        timesteps=timesteps,
        samples=samples,
        location=location,
        spread=spread,
        skew=skew,
        precision=precision,
    )
    manifest = session.make(step)
    if manifest is None:
        return
    value: CalibrationSet = session.runner.load(manifest)
    kept = value.t.unique().tolist()
    facts = {"count": len(value.t), "timesteps": len(kept), "first_timestep": kept[0], "last_timestep": kept[-1]}

    def text() -> str:
        spread = f"{len(kept)} timesteps from {kept[0]} to {kept[-1]}"
        return f"calibration {manifest.id}: {len(value.t):,} inputs at {spread}, {mebibytes(manifest.bytes)}"

    session.result({**artifact_data(session.store, manifest), **facts}, text)


def calibration_step(session: Session, checkpoint: "Manifest", fisher: str | None = None, **flags: object) -> "Step":
    """The step that records a set of ``checkpoint``: ``flags`` over the settings file, over the defaults.

    ``fisher``: the table that weighs the timesteps, the latest of the checkpoint where the scheme asks for one.
    """
    from fqdiff.calibration.schemes import chosen_steps
    from fqdiff.diffusion.samplers import sampling_timesteps
    from fqdiff.pipeline import Step

    given = session.given("calibrate", CalibrateConfig, **flags)
    total = session.runner.load(checkpoint).spec.noise_schedule().num_train_timesteps
    config = CalibrateConfig(**calibration_settings(given, total))
    sampling_timesteps(total, config.steps)  # here, so that a dry run refuses what the stage would
    if config.scheme != "fisher":
        chosen_steps(config, session.seed)
    inputs = {"checkpoint": checkpoint}
    if config.scheme == "fisher":
        inputs["fisher"] = of_checkpoint(session, "fisher", checkpoint.id, fisher)
    elif fisher is not None:
        raise ConfigError(f"'{config.scheme}' has no use for a Fisher table", "add --scheme fisher, or leave it out")
    if config.source == "data":
        inputs["dataset"] = only_input(session, checkpoint, "dataset")
    return Step("calibrate", inputs, config, session.seed)
