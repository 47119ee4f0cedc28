"""``fqdiff run``: the whole pipeline in one command."""

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fqdiff.cli.import_ import import_step
from fqdiff.cli.session import COMMON_OPTIONS, Session, common
from fqdiff.cli.show import duration, table
from fqdiff.cli.train import choose_dataset, training_step
from fqdiff.configs import (
    ClassifierConfig,
    DatasetConfig,
    FidConfig,
    FisherConfig,
    SampleConfig,
    TrainConfig,
    get_preset,
)
from fqdiff.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from fqdiff.chains import Chain, ModelSteps
    from fqdiff.pipeline import Step
    from fqdiff.store.manifest import Manifest


@dataclass(frozen=True)
class Scale:
    """Which model a run starts from, and how much of everything it does after that.

    ``preset`` is trained on ``dataset``; or ``pretrained`` is imported, to be used with its own data set.
    """

    fisher: FisherConfig
    sample: SampleConfig
    preset: str = ""
    dataset: str | None = None
    pretrained: str = ""


SCALES = {
    "tiny": Scale(FisherConfig(samples=2), SampleConfig(steps=5, count=64), "tiny", "mnist5k"),
    # Bounded by 6 minutes on two cores: six sets of 400 x 20 image-steps of 2 ms, 4,000 per-sample gradients of 13 ms. Every
    # timestep is measured, since the plans read t = 1.
    "demo": Scale(
        FisherConfig(samples=4, granularity="weight", bins=1),
        SampleConfig(steps=20, count=400),
        pretrained="pretrained:mnist-small",
    ),
    "small": Scale(FisherConfig(), SampleConfig(), "small"),
    "paper": Scale(FisherConfig(), SampleConfig("ddpm", steps=1000), "paper"),
}
# A size that starts from a pretrained model, and what stands for it where a model is to be trained in the same time.
FROM_SCRATCH = {
    "demo": Scale(FisherConfig(timesteps=1000, samples=4), SampleConfig(steps=25, count=1000), "demo", "mnist5k")
}
PICTURE_COLUMNS = 16


@common(*(name for name in COMMON_OPTIONS if name != "name"))
def run(
    session: Session,
    size: Annotated[str, typer.Argument(help="demo, small or paper (or tiny, for a test).", metavar="SIZE")],
    from_scratch: Annotated[
        bool,
        typer.Option(
            "--from-scratch", help="Train demo's model, at 16 x 16, instead of importing one; other sizes always train."
        ),
    ] = False,
) -> None:
    """Take or train a model, measure, plan, quantize, sample and compare: the whole pipeline at one size."""
    from fqdiff.chains import make_chain
    from fqdiff.store.sources import load_dataset

    if size not in SCALES:
        raise ConfigError(f"unknown size '{size}'", f"one of: {', '.join(SCALES)}")
    scale = FROM_SCRATCH.get(size, SCALES[size]) if from_scratch else SCALES[size]
    if scale.pretrained and "train" in session.tables():
        raise ConfigError(f"run {size} starts from {scale.pretrained}: nothing to train", "add --from-scratch")
    stages = (
        "plan",
        "quantize",
        "reconstruct",
        "reconstruct-temporal",
        "activations",
        "temporal-scales",
        "activation-steps",
        "noise-correction",
    )
    fixed: list[str] = [name for name in stages if name in session.tables()]
    fixed += [f"train.{key}" for key in ("preset", "dataset", "image_size") if key in session.tables().get("train", {})]
    if fixed:
        raise ConfigError(f"run {size} fixes {', '.join(fixed)} itself", "leave it out, or use the single commands")
    started = time.monotonic()
    checkpoint, dataset = checkpoint_step(session, scale)
    fisher = session.settings("fisher", FisherConfig, vars(scale.fisher))
    held_out = len(load_dataset(dataset, 0, session.runner.context).reference)
    enough = {"count": min(scale.sample.count, held_out)}  # more could not be compared with as many real images
    sample = session.settings("sample", SampleConfig, {**vars(scale.sample), **enough})
    classifier = session.settings("classifier", ClassifierConfig, {})
    fid = session.settings("fid", FidConfig, {})
    chain = make_chain(checkpoint, fisher, sample, classifier, fid, session.seed)
    steps = list(chain.steps())
    if session.dry_run:
        show_steps(session, steps)
        return
    made: dict[str, Manifest] = {}
    for number, (label, step) in enumerate(steps, start=1):
        session.note(f"[{number}/{len(steps)}] {label}")
        made[step.id] = session.runner.run(step)
        session.tell_cost(made[step.id])
    for row in chain.models:
        session.store.give_name(f"{size}-{slug(row.label)}", made[row.model.id])
    data = {
        "size": size,
        "pretrained": scale.pretrained or None,
        "models": [row_data(session, chain, row, made) for row in (*chain.models, chain.noise_floor)],
        "picture": str(save_picture(session, size, chain, made)),
        "store": str(session.store.root),
        "seconds": round(time.monotonic() - started, 1),
    }
    session.result(data, lambda: run_text(data))


def checkpoint_step(session: Session, scale: Scale) -> "tuple[Step, DatasetConfig]":
    """The step that imports or trains the model of ``scale``, and its data set."""
    from fqdiff.store.pretrained import open_model
    from fqdiff.store.sources import image_channels

    if scale.pretrained:
        file = open_model(scale.pretrained)
        session.note(f"{file.source}: {file.description}")
        dataset = choose_dataset(session, file.dataset, file.model.spec.image_shape[1])
        return import_step(file, dataset), dataset
    preset = get_preset(scale.preset)
    dataset = choose_dataset(session, scale.dataset, preset.image_size)
    config = session.settings("train", TrainConfig, preset.train)
    return training_step(dataset, image_channels(dataset), preset, config, session.seed), dataset


def slug(label: str) -> str:
    """``label`` as a name: letters and digits joined by dashes."""
    words = "".join(c if c.isalnum() else " " for c in label.lower()).split()
    return "-".join(words)


def show_steps(session: Session, steps: "list[tuple[str, Any]]") -> None:
    """Every step with its id and whether it is there."""
    rows = [
        {"step": label, "kind": s.kind, "id": s.id, "exists": session.store.find(s.kind, s.id) is not None}
        for label, s in steps
    ]
    header = ("step", "kind", "id", "")
    cells = [[str(r["step"]), str(r["kind"]), str(r["id"]), "there" if r["exists"] else "to make"] for r in rows]
    session.result({"steps": rows}, lambda: table(header, cells))


def row_data(session: Session, chain: "Chain", row: "ModelSteps", made: "Mapping[str, Manifest]") -> dict[str, Any]:
    """Numbers of one model, each with the id of the artifact it comes from."""
    metrics = session.runner.load(made[row.fid.id])
    file_bytes = made[row.model.id].file("model.safetensors").bytes
    parameters = sum(t.numel() for t in session.runner.load(made[chain.checkpoint.id]).tensors.values())
    return {
        "model": row.label,
        "id": row.model.id,
        "bits_per_weight": 8 * file_bytes / parameters,
        "file_bytes": file_bytes,
        "samples": row.samples.id,
        "metrics": row.fid.id,
        **asdict(metrics),
    }


def run_text(data: dict[str, Any]) -> str:
    """The table, what to look at, and what the numbers rest on."""
    models = data["models"]
    first, floor = models[0], models[-1]
    name = first["features"]
    header = (
        "model",
        "bits/weight",
        "file bytes",
        f"FID {name}",
        "difference to FP32 [95 %]",
        "image error",
        "confidence",
        "metrics",
    )
    cells = []
    for r in models:
        change, error = "", ""
        if r["image_error"] is not None:
            low, high = r["interval"]
            change, error = f"{r['difference']:+.2f} [{low:+.2f}, {high:+.2f}]", f"{r['image_error']:.1e}"
        own = next(m for m in r["measures"] if (m["metric"], m["of"]) == ("fid", "model1"))
        fid = f"{r['fid']:.2f} ± {own['high'] - own['value']:.2f}"
        numbers = [f"{r['bits_per_weight']:.2f}", f"{r['file_bytes']:,}", fid, change, error]
        cells.append([r["model"], *numbers, f"{r['confidence']:.3f}", r["metrics"]])
    low, high = floor["interval"]
    moved = f"{floor['difference']:+.2f} [{low:+.2f}, {high:+.2f}]"
    return "\n".join(
        [
            table(header, cells),
            f"FID: {first['n']} samples of seed {first['seed']} against as many held-out images. "
            "±, [ ]: 95 %, by bootstrap; of differences, paired.",
            f"Last row: FP32 with seed {floor['seed']}. New noise alone moves FID by {moved}.",
            "Image error: mean squared pixel difference to FP32's image of the same noise, pixels in [-1, 1]: 0 is FP32 itself.",
            "A FID below FP32's is no gain: the images moved away from the model's, and by chance towards the reference.",
            f"Samples side by side, same noise in each column: {data['picture']}",
            f"Store: {data['store']} (fqdiff store ls); {duration(data['seconds'])} in all.",
        ]
    )


def save_picture(session: Session, size: str, chain: "Chain", made: "Mapping[str, Manifest]") -> "Path":
    """PNG of the first samples, one row per model, same noise in each column, and of held-out images."""
    import torch

    from fqdiff.store.files import write_atomically
    from fqdiff.viz.grids import labelled_rows, png

    rows = [(row.label, session.runner.load(made[row.samples.id]).images[:PICTURE_COLUMNS]) for row in chain.models]
    reference = session.runner.load(made[chain.dataset.id]).reference
    spread = torch.linspace(0, len(reference) - 1, PICTURE_COLUMNS).long()  # a source may be sorted by label
    picture = labelled_rows([*rows, ("held-out real images", reference[spread])])
    path = session.store.inside("pictures", f"{size}-{chain.models[0].samples.id}.png")
    write_atomically(path, png(picture))
    return path
