"""``fqdiff run``: the whole pipeline in one command."""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fqdiff.cli.session import Session, common
from fqdiff.cli.show import duration, table
from fqdiff.cli.train import choose_dataset, training_step
from fqdiff.configs import FisherConfig, SampleConfig, TrainConfig, get_preset
from fqdiff.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from fqdiff.chains import Chain, ModelSteps


@dataclass(frozen=True)
class Scale:
    """How much of everything a run does beside training."""

    dataset: str | None
    fisher: FisherConfig
    sample: SampleConfig


SCALES = {
    "tiny": Scale("mnist5k", FisherConfig(timesteps=20, samples=2), SampleConfig(steps=5, count=64)),
    "demo": Scale("mnist5k", FisherConfig(timesteps=1000, samples=4), SampleConfig(steps=25, count=1000)),
    "small": Scale(None, FisherConfig(), SampleConfig()),
    "paper": Scale(None, FisherConfig(), SampleConfig("ddpm", steps=1000)),
}
PICTURE_COLUMNS = 16


@common()
def run(
    session: Session,
    size: Annotated[str, typer.Argument(help="demo, small or paper (or tiny, for a test).", metavar="SIZE")],
) -> None:
    """Train, measure, plan, quantize, sample and compare: the whole pipeline at one size."""
    from fqdiff.chains import make_chain
    from fqdiff.store.sources import image_channels

    if size not in SCALES:
        raise ConfigError(f"unknown size '{size}'", f"one of: {', '.join(SCALES)}")
    started = time.monotonic()
    scale, preset = SCALES[size], get_preset(size)
    dataset = choose_dataset(session, scale.dataset, preset.image_size)
    config = session.settings("train", TrainConfig, preset.train)
    checkpoint = training_step(dataset, image_channels(dataset), preset, config, session.seed)
    fisher = session.settings("fisher", FisherConfig, vars(scale.fisher))
    sample = session.settings("sample", SampleConfig, vars(scale.sample))
    chain = make_chain(checkpoint, fisher, sample, session.seed)
    steps = list(chain.steps())
    if session.dry_run:
        show_steps(session, steps)
        return
    for number, (label, step) in enumerate(steps, start=1):
        session.note(f"[{number}/{len(steps)}] {label}")
        session.tell_cost(session.runner.run(step))
    for row in chain.models:
        manifest = session.store.find(row.model.kind, row.model.id)
        assert manifest is not None
        session.store.give_name(f"{size}-{slug(row.label)}", manifest)
    picture = save_picture(session, size, chain)
    rows = [row_data(session, chain, row) for row in (*chain.models, chain.noise_floor)]
    seconds = time.monotonic() - started
    data = {
        "size": size,
        "seconds": round(seconds, 1),
        "models": rows,
        "picture": str(picture),
        "store": str(session.store.root),
    }
    session.result(data, lambda: run_text(data, chain))


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


def row_data(session: Session, chain: "Chain", row: "ModelSteps") -> dict[str, Any]:
    """Numbers of one model, each with the id of the artifact it comes from."""
    manifest = session.store.find(row.model.kind, row.model.id)
    metrics = session.runner.load(session.runner.run(row.fid))
    assert manifest is not None
    file_bytes = next(f.bytes for f in manifest.files if f.name == "model.safetensors")
    checkpoint = session.runner.run(chain.checkpoint)
    parameters = sum(t.numel() for t in session.runner.load(checkpoint).tensors.values())
    return {
        "model": row.label,
        "id": manifest.id,
        "bits_per_weight": 8 * file_bytes / parameters,
        "file_bytes": file_bytes,
        "samples": row.samples.id,
        "metrics": row.fid.id,
        "n": metrics.n,
        "seed": metrics.seed,
        "fid": metrics.fid,
        "features": metrics.features,
        "difference": metrics.difference,
        "interval": metrics.interval,
        "confidence": metrics.confidence,
        "image_mean": metrics.image_mean,
    }


def run_text(data: dict[str, Any], chain: "Chain") -> str:
    """The table, what to look at, and what the numbers rest on."""
    header = (
        "model",
        "bits/weight",
        "file bytes",
        f"FID {data['models'][0]['features']}",
        "difference to FP32 [95 %]",
        "confidence",
        "metrics",
    )
    cells = []
    for r in data["models"]:
        change = (
            ""
            if r["difference"] is None
            else f"{r['difference']:+.2f} [{r['interval'][0]:+.2f}, {r['interval'][1]:+.2f}]"
        )
        size = f"{r['file_bytes']:,}"
        cells.append(
            [
                r["model"],
                f"{r['bits_per_weight']:.2f}",
                size,
                f"{r['fid']:.2f}",
                change,
                f"{r['confidence']:.3f}",
                r["metrics"],
            ]
        )
    first, floor = data["models"][0], data["models"][-1]
    moved = abs(floor["fid"] - first["fid"])
    return "\n".join(
        [
            table(header, cells),
            f"N = {first['n']} images against as many held-out ones, sample seed {first['seed']}.",
            f"The last row is FP32 with seed {floor['seed']}: noise alone moves FID by {moved:.2f}; less is no difference.",
            f"samples side by side, same noise in each column: {data['picture']}",
            f"store: {data['store']} (fqdiff store ls); {duration(data['seconds'])} in all",
        ]
    )


def save_picture(session: Session, size: str, chain: "Chain") -> "Path":
    """PNG of the first samples, one row per model, same noise in each column."""
    import torch

    from fqdiff.store.files import write_atomically
    from fqdiff.viz.grids import labelled_rows, png

    rows = [
        (row.label, session.runner.load(session.runner.run(row.samples)).images[:PICTURE_COLUMNS])
        for row in chain.models
    ]
    real = session.runner.load(session.runner.run(chain.dataset)).reference[:PICTURE_COLUMNS]
    picture = labelled_rows([*rows, ("held-out real images", torch.as_tensor(real))])
    path = session.store.root / "pictures" / f"{size}-{chain.models[0].samples.id}.png"
    write_atomically(path, png(picture))
    return path
