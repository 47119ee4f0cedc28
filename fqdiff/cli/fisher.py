"""``fqdiff fisher``."""

from typing import TYPE_CHECKING, Annotated

import typer

from fqdiff.cli import fisher_validate
from fqdiff.cli.groups import DefaultCommand
from fqdiff.cli.session import Session, common, only_input
from fqdiff.cli.show import artifact_data, table
from fqdiff.configs import FisherConfig

if TYPE_CHECKING:
    from fqdiff.store.manifest import Manifest
    from fqdiff.values import FisherTable


app = typer.Typer(cls=DefaultCommand, help="Measure the Fisher information of every layer at every timestep.")


@app.command("measure", epilog="Example: fqdiff fisher --timesteps 1000")
@common()
def measure(
    session: Session,
    checkpoint: Annotated[
        str | None, typer.Argument(help="Checkpoint: name, id or prefix.", show_default="the latest")
    ] = None,
    timesteps: Annotated[
        int | None, typer.Option(min=1, help="Evenly spaced timesteps.", show_default=f"{FisherConfig.timesteps}")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=2, help="Samples per timestep.", show_default=f"{FisherConfig.samples}")
    ] = None,
) -> None:
    """Measure the Fisher information of every layer at every timestep."""
    from fqdiff.pipeline import Step

    source = session.resolve(checkpoint, ("checkpoint",))
    config = session.settings("fisher", FisherConfig, {}, timesteps=timesteps, samples=samples)
    inputs = {"checkpoint": source, "dataset": only_input(session, source, "dataset")}
    step = Step("fisher", inputs, config, session.seed)
    manifest = session.make(step)
    if manifest is None:
        return
    value: FisherTable = session.runner.load(manifest)
    rows = fisher_rows(value)
    data = {
        **artifact_data(session.store, manifest),
        "timesteps": len(value.timesteps),
        "samples": value.samples,
        "blocks": rows,
    }
    session.result(data, lambda: fisher_text(manifest, value, rows))


def fisher_rows(value: "FisherTable") -> list[dict[str, object]]:
    """Mean Fisher value of each block's weights at the first, middle and last timestep and over all of them."""
    import torch

    rows: list[dict[str, object]] = []
    for block in ("stem", "1", "2", "3", "4", "5", "6", "head"):
        entries = [e for e in value.entries.values() if e.block == block]
        weights = sum(e.numel for e in entries)
        mean = torch.stack([e.mean * e.numel for e in entries]).sum(dim=0) / weights
        middle = len(value.timesteps) // 2
        numbers = {"first": mean[0], "middle": mean[middle], "last": mean[-1], "mean": mean.mean()}
        rows.append({"block": block, "weights": weights, **{k: float(v) for k, v in numbers.items()}})
    return rows


def fisher_text(manifest: "Manifest", value: "FisherTable", rows: list[dict[str, object]]) -> str:
    """The table of :func:`fisher_rows` for people."""
    t = value.timesteps
    header = ("block", "weights", f"t={t[0]}", f"t={t[len(t) // 2]}", f"t={t[-1]}", "mean over t")
    cells = [
        [str(r["block"]), f"{r['weights']:,}", *(f"{r[k]:.2e}" for k in ("first", "middle", "last", "mean"))]
        for r in rows
    ]
    title = f"fisher {manifest.id}: mean squared per-sample gradient, {len(t)} timesteps x {value.samples} samples"
    return title + "\n" + table(header, cells)


app.command("validate", epilog=fisher_validate.EXAMPLE)(fisher_validate.validate)
