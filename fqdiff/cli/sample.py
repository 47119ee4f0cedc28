"""``fqdiff sample``."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fqdiff.cli.session import Session, common
from fqdiff.cli.shards import make_shard, parse_shard
from fqdiff.cli.show import artifact_data, byte_count
from fqdiff.configs import SAMPLERS, SampleConfig
from fqdiff.errors import ArtifactNotFound, ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fqdiff.pipeline import Step
    from fqdiff.store.manifest import Manifest

SAMPLER_HELP = f"{', '.join(SAMPLERS[:-1])} or {SAMPLERS[-1]}"


@common()
def sample(
    session: Session,
    model: Annotated[
        str | None, typer.Argument(help="Checkpoint or quantized checkpoint.", show_default="the latest")
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, help="How many images.", show_default=f"{SampleConfig.count}")
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help=f"{SAMPLER_HELP}.", show_default=f"{SampleConfig.sampler}")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Inference steps.", show_default="50; for ddpm all timesteps")
    ] = None,
    eta: Annotated[
        float | None, typer.Option(min=0, max=1, help="DDIM's randomness, 0 to 1.", show_default="0")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Images per forward pass. Noise stays the same; kernels may round a rare pixel to the next level.",
            show_default="100; with --max-memory what fits, 100 at most",
        ),
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(help="Keep the process below this, e.g. 4GiB.", show_default="no limit")
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(help="Make share k of N only, as k/N; the same command without it joins them.", metavar="K/N"),
    ] = None,
    other: Annotated[
        list[Path] | None,
        typer.Option("--from", help="Another store that holds shards, e.g. of another machine; repeatable."),
    ] = None,
) -> None:
    """Make images from a model; image k depends on the seed and k alone."""
    from fqdiff.pipeline import Step

    if batch_size is not None and max_memory is not None:
        raise ConfigError("--max-memory chooses the batch size, and --batch-size is given", "give one of them")
    source = session.resolve(model, ("checkpoint", "quantized"))
    config = sample_settings(session, source, {}, sampler=sampler, steps=steps, eta=eta, count=count)
    step = Step("sample", {"model": source}, config, session.seed)
    limit = 0 if max_memory is None else byte_count("--max-memory", max_memory)
    session.runner.context = replace(session.runner.context, batch_size=batch_size or 0, max_memory=limit)
    if other and not session.dry_run:
        take_over(session, step, other)
    if shard is not None:
        make_shard(session, step, parse_shard(shard), ("make", "made"), "the same command without --shard")
        return
    manifest = session.make(step)
    if manifest is None:
        return
    grid = session.store.directory(manifest.kind, manifest.id) / "samples.png"
    data = {**artifact_data(session.store, manifest), "count": config.count, "seed": session.seed, "grid": str(grid)}
    session.result(data, lambda: f"samples {manifest.id}: {config.count} images, seed {session.seed}\nlook at {grid}")


def take_over(session: Session, step: "Step", others: list[Path]) -> None:
    """Copy the finished images of ``step`` from other stores, unless the samples are here. Raises ArtifactNotFound."""
    from fqdiff.store.parts import adopt_parts, unfinished
    from fqdiff.store.store import Store

    if session.store.find(step.kind, step.id) is not None:
        return
    for path in others:
        if step.id not in {recipe.id for recipe in unfinished(Store(path), step.kind)}:
            raise ArtifactNotFound(
                f"no shard of {step.kind} {step.id} in {path}", "shards have the same model, settings and --seed"
            )
        taken = adopt_parts(Store(path), session.store, step.recipe)
        session.note(f"{step.kind} {step.id}: {taken} units taken over from {path}")


def sample_settings(session: Session, model: "Manifest", base: "Mapping[str, object]", **flags: object) -> SampleConfig:
    """The sampler's settings; without a number of steps, ddpm takes every timestep that ``model`` was trained with."""
    sampler = flags.get("sampler") or session.from_file("sample", "sampler", "ddim") or base.get("sampler")
    if sampler == "ddpm":
        base = {"steps": session.runner.load(model).spec.noise_schedule().num_train_timesteps, **base}
    return session.settings("sample", SampleConfig, base, **flags)
