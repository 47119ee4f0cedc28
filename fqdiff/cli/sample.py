"""``fqdiff sample``."""

from typing import TYPE_CHECKING, Annotated

import typer

from fqdiff.cli.session import Session, common
from fqdiff.cli.show import artifact_data
from fqdiff.configs import SampleConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fqdiff.store.manifest import Manifest


@common()
def sample(
    session: Session,
    model: Annotated[
        str | None, typer.Argument(help="Checkpoint or quantized checkpoint.", show_default="the latest")
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, help="How many images.", show_default=f"{SampleConfig.count}")
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="ddim or ddpm.", show_default=f"{SampleConfig.sampler}")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Inference steps.", show_default="50; for ddpm all timesteps")
    ] = None,
    eta: Annotated[
        float | None, typer.Option(min=0, max=1, help="DDIM's randomness, 0 to 1.", show_default="0")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass; changes no image.")] = 100,
) -> None:
    """Make images from a model; image k depends on the seed and k alone."""
    from dataclasses import replace

    from fqdiff.pipeline import Step

    source = session.resolve(model, ("checkpoint", "quantized"))
    config = sample_settings(session, source, {}, sampler=sampler, steps=steps, eta=eta, count=count)
    step = Step("sample", {"model": source}, config, session.seed)
    session.runner.context = replace(session.runner.context, batch_size=batch_size)
    manifest = session.make(step)
    if manifest is None:
        return
    grid = session.store.directory(manifest.kind, manifest.id) / "samples.png"
    data = {**artifact_data(session.store, manifest), "count": config.count, "seed": session.seed, "grid": str(grid)}
    session.result(data, lambda: f"samples {manifest.id}: {config.count} images, seed {session.seed}\nlook at {grid}")


def sample_settings(session: Session, model: "Manifest", base: "Mapping[str, object]", **flags: object) -> SampleConfig:
    """The sampler's settings; without a number of steps, ddpm takes every timestep that ``model`` was trained with."""
    sampler = flags.get("sampler") or session.from_file("sample", "sampler", "ddim") or base.get("sampler")
    if sampler == "ddpm":
        base = {"steps": session.runner.load(model).spec.noise_schedule().num_train_timesteps, **base}
    return session.settings("sample", SampleConfig, base, **flags)
