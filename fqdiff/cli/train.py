"""``fqdiff train``."""

from typing import TYPE_CHECKING, Annotated

import typer

from fqdiff.cli.session import Session, common
from fqdiff.cli.show import artifact_data, duration, mebibytes
from fqdiff.configs import DatasetConfig, Preset, TrainConfig, config_from_data, get_preset
from fqdiff.errors import ArtifactNotFound, ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fqdiff.pipeline import Step
    from fqdiff.store.manifest import Manifest
    from fqdiff.values import Checkpoint

RECIPE = "Recipe, by default the preset's"
EXAMPLE = "Example: fqdiff train --preset demo --dataset mnist5k --name my-digits"


def choose_dataset(session: Session, name: str | None, image_size: int) -> DatasetConfig:
    """The data set asked for, or MNIST if it is at hand, else mnist5k, and a note that says which."""
    from fqdiff.store.sources import dataset_config, default_dataset

    if name is not None:
        return dataset_config(name, image_size)
    config, line = default_dataset(image_size)
    session.note(line)
    return config


def resolved_architecture(preset: Preset, image_size: int, image_channels: int) -> dict[str, object]:
    """Every field of the preset's architecture, for images of this size and number of channels."""
    from fqdiff.models.registry import unet_architecture, unet_config

    changed = {**preset.architecture, "image_size": image_size, "image_channels": image_channels}
    return unet_architecture(unet_config(changed))


def training_step(
    dataset: DatasetConfig,
    image_channels: int,
    preset: Preset,
    config: TrainConfig,
    seed: int,
    init: "Manifest | None" = None,
) -> "Step":
    """The step that trains ``preset`` on ``dataset``, from the weights of ``init`` where it is given."""
    from fqdiff.pipeline import Step

    architecture = resolved_architecture(preset, dataset.image_size, image_channels)
    return Step(
        "train",
        {"dataset": Step("dataset", {}, dataset), **({} if init is None else {"init": init})},
        TrainConfig(**{**vars(config), "architecture": architecture}),
        seed,
    )


@common()
def train(
    session: Session,
    preset: Annotated[str | None, typer.Option(help="paper, small, demo or tiny.", show_default="small")] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="mnist, mnist5k, mnist15k, fashion-mnist, cifar10 or folder:PATH.",
            show_default="mnist if it can be had, else mnist5k",
        ),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=8, help="Side of the images in pixels.", show_default="the preset's")
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(help="Checkpoint whose weights to start from: id, name or path.", show_default="fresh weights"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run that was interrupted last, whatever its recipe.")
    ] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps.", rich_help_panel=RECIPE)] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images per step.", rich_help_panel=RECIPE)] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.", rich_help_panel=RECIPE)] = None,
    optimizer: Annotated[str | None, typer.Option(help="adam or adamw.", rich_help_panel=RECIPE)] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Weight decay.", rich_help_panel=RECIPE)] = None,
    warmup: Annotated[int | None, typer.Option(min=0, help="Steps of linear warm-up.", rich_help_panel=RECIPE)] = None,
    decay: Annotated[
        str | None, typer.Option(help="cosine or none, after the warm-up.", rich_help_panel=RECIPE)
    ] = None,
    clip_norm: Annotated[
        float | None, typer.Option(min=0, help="Largest gradient norm; 0 clips nothing.", rich_help_panel=RECIPE)
    ] = None,
    ema_decay: Annotated[
        float | None, typer.Option(help="Decay of the averaged weights.", rich_help_panel=RECIPE)
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(help="Noise schedule: linear or cosine.", rich_help_panel=RECIPE)
    ] = None,
    prediction: Annotated[
        str | None, typer.Option(help="What the network predicts: eps or v.", rich_help_panel=RECIPE)
    ] = None,
    weighting: Annotated[
        str | None, typer.Option(help="Loss over timesteps: uniform or min-snr.", rich_help_panel=RECIPE)
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="float32 or bfloat16 (autocast).", rich_help_panel=RECIPE)
    ] = None,
) -> None:
    """Train a diffusion model and keep its averaged weights as a checkpoint."""
    import torch

    from fqdiff.models.registry import build
    from fqdiff.stages.train import estimate_seconds
    from fqdiff.store.sources import image_channels

    recipe = (preset, dataset, image_size, steps, batch_size, learning_rate, optimizer, weight_decay, warmup, decay)
    recipe_too = (clip_norm, ema_decay, schedule, prediction, weighting, precision, init, session.config_path)
    if resume:
        if session.force or any(value is not None for value in (*recipe, *recipe_too)):
            raise ConfigError("--resume continues the interrupted recipe as it is", "leave the other settings out")
        finish_training(session, interrupted_step(session), {})
        return
    preset_name = preset or session.from_file("train", "preset", "small") or "small"
    chosen = get_preset(preset_name)
    config = session.settings(
        "train",
        TrainConfig,
        chosen.train,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        optimizer=optimizer,
        weight_decay=weight_decay,
        warmup=warmup,
        decay=decay,
        clip_norm=clip_norm,
        ema_decay=ema_decay,
        schedule=schedule,
        prediction=prediction,
        weighting=weighting,
        precision=precision,
    )
    size = image_size or session.from_file("train", "image_size", 32) or chosen.image_size
    data = choose_dataset(session, dataset or session.from_file("train", "dataset", "mnist5k"), size)
    start = None if init is None else session.store.resolve(init, ("checkpoint",))
    step = training_step(data, image_channels(data), chosen, config, session.seed, start)
    parameters = sum(p.numel() for p in build(step.config.architecture, "meta").parameters())
    found = session.store.find(step.kind, step.id)
    seconds = 0.0 if found else estimate_seconds(step.config, session.device)
    where = f"{session.device} with {torch.get_num_threads()} threads"
    cost = f"{config.steps} steps of {config.batch_size} images, about {duration(seconds)} on {where}"
    session.note(f"preset {preset_name}: {chosen.description}")
    session.note(f"{parameters:,} parameters, {mebibytes(4 * parameters)} in float32; {cost}")
    facts = {
        "preset": preset_name,
        "parameters": parameters,
        "bytes_float32": 4 * parameters,
        "dataset": data.name,
        "steps": config.steps,
        "estimated_seconds": round(seconds, 1),
    }
    finish_training(session, step, facts)


def finish_training(session: Session, step: "Step", facts: "Mapping[str, object]") -> None:
    """Run ``step`` and show the checkpoint; ``facts`` are for --dry-run."""
    manifest = session.make(step, facts)
    if manifest is not None:
        show_checkpoint(session, manifest)


def show_checkpoint(session: Session, manifest: "Manifest") -> None:
    """Id, size, last loss and where the pictures are; an imported model has no loss."""
    value: Checkpoint = session.runner.load(manifest)
    folder = session.store.directory(manifest.kind, manifest.id)
    parameters = sum(t.numel() for t in value.tensors.values())
    last = None if value.loss is None else float(value.loss[-max(1, len(value.loss) // 20) :].mean())
    data = {**artifact_data(session.store, manifest), "parameters": parameters, "loss": last}
    size = manifest.file("model.safetensors").bytes

    def text() -> str:
        head = f"checkpoint {manifest.id}: {parameters:,} parameters, {mebibytes(size)}\n"
        if last is None:
            return f"{head}look at {folder / 'samples.png'}"
        look = f"look at {folder / 'samples.png'} and {folder / 'loss.png'}"
        return f"{head}loss over the last twentieth of the steps: {last:.4f}\n{look}"

    session.result(data, text)


def interrupted_step(session: Session) -> "Step":
    """The unfinished training saved last; its recipe stands beside its state."""
    from fqdiff.pipeline import Step
    from fqdiff.store.parts import last_unfinished

    recipe = last_unfinished(session.store, "checkpoint")
    if recipe is None:
        raise ArtifactNotFound(f"no interrupted training in {session.store.root}", "start one with fqdiff train")
    inputs = {source.role: session.store.find(source.kind, source.id) for source in recipe.inputs}
    found = {role: manifest for role, manifest in inputs.items() if manifest is not None}
    if len(found) < len(inputs) or "dataset" not in found:
        raise ConfigError("an input of the interrupted training is gone", "start over with fqdiff train --force")
    return Step("train", found, config_from_data(TrainConfig, recipe.config), recipe.seed)
