"""``fqdiff fisher``."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from fqdiff.cli.groups import DefaultCommand
from fqdiff.cli.session import Session, common, only_input
from fqdiff.cli.shards import make_shard, parse_shard
from fqdiff.cli.show import artifact_data, byte_count, mebibytes, table
from fqdiff.configs import FisherConfig
from fqdiff.errors import ConfigError

if TYPE_CHECKING:
    from fqdiff.store.manifest import Manifest
    from fqdiff.values import FisherTable


TRAJECTORY_RUNS = 24
app = typer.Typer(cls=DefaultCommand, help="Measure the Fisher information of every layer at every timestep.")


QUANTITY = "What is measured"
WORK = "How the work is done (changes no result)"


@app.command("measure", epilog="Example: fqdiff fisher --timesteps 1000")
@common()
def measure(
    session: Session,
    checkpoint: Annotated[
        str | None, typer.Argument(help="Checkpoint: name, id or prefix.", show_default="the latest")
    ] = None,
    timesteps: Annotated[
        int | None,
        typer.Option(
            min=1, help="Evenly spaced timesteps.", show_default=f"{FisherConfig.timesteps}", rich_help_panel=QUANTITY
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Samples per timestep, or sampler runs.",
            show_default=f"{FisherConfig.samples}; {TRAJECTORY_RUNS} runs",
            rich_help_panel=QUANTITY,
        ),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            help="empirical, true (targets drawn from the model) or trajectory (through the whole sampler).",
            show_default=FisherConfig.kind,
            rich_help_panel=QUANTITY,
        ),
    ] = None,
    granularity: Annotated[
        str | None,
        typer.Option(
            help="What a row keeps: tensor, channel, or also every weight in bins of timesteps.",
            show_default=FisherConfig.granularity,
            rich_help_panel=QUANTITY,
        ),
    ] = None,
    bins: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Bins of timesteps for --granularity weight.",
            show_default=f"{FisherConfig.bins}",
            rich_help_panel=QUANTITY,
        ),
    ] = None,
    activations: Annotated[
        bool | None,
        typer.Option(
            "--activations/--no-activations",
            help="Also measure the outputs of layers.",
            show_default="activations",
            rich_help_panel=QUANTITY,
        ),
    ] = None,
    variance_reduction: Annotated[
        str | None,
        typer.Option(
            help="none, antithetic (pairs of opposite noise), common (the same noise at every timestep) or both.",
            show_default=FisherConfig.variance_reduction,
            rich_help_panel=QUANTITY,
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="float32, or bfloat16 for the two passes (sums stay float64).",
            show_default=FisherConfig.precision,
            rich_help_panel=QUANTITY,
        ),
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            help="Sampler of a trajectory: ddim.", show_default=FisherConfig.sampler, rich_help_panel=QUANTITY
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="Steps of the sampler.", show_default=f"{FisherConfig.steps}", rich_help_panel=QUANTITY
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            min=0, help="Steps differentiated together; 0 for all.", show_default="0", rich_help_panel=QUANTITY
        ),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            help="Measure share k of N only, as k/N; fqdiff fisher merge joins them.",
            metavar="K/N",
            rich_help_panel=WORK,
        ),
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(help="Keep the process below this, e.g. 4GiB.", show_default="no limit", rich_help_panel=WORK),
    ] = None,
    max_disk: Annotated[str, typer.Option(help="Refuse to write more than this.", rich_help_panel=WORK)] = "1GiB",
) -> None:
    """Measure the Fisher information of every layer at every timestep; see also top, merge, validate."""
    from fqdiff.pipeline import Step

    source = session.resolve(checkpoint, ("checkpoint",))
    of_trajectory = {"sampler": sampler, "steps": steps, "window": window}
    of_timesteps = {
        "timesteps": timesteps,
        "activations": activations,
        "variance_reduction": variance_reduction,
        "precision": precision,
    }
    tables = session.tables().get("fisher", {})
    trajectory = (kind or tables.get("kind")) == "trajectory"
    foreign = [name for name, v in (of_timesteps if trajectory else of_trajectory).items() if v is not None]
    if foreign:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in foreign)
        raise ConfigError(
            f"{options} says nothing about the {kind or FisherConfig.kind} Fisher",
            "leave it out" if trajectory else "add --kind trajectory, or leave it out",
        )
    config = session.settings(
        "fisher",
        FisherConfig,
        {"samples": TRAJECTORY_RUNS} if trajectory else {},
        kind=kind,
        samples=samples,
        granularity=granularity,
        bins=bins,
        **of_timesteps,
        **of_trajectory,
    )
    if bins is not None and config.granularity != "weight":
        raise ConfigError("--bins says nothing without single weights", "add --granularity weight, or leave it out")
    inputs = {"checkpoint": source, "dataset": only_input(session, source, "dataset")}
    step = Step("fisher", inputs, config, session.seed)
    check_disk(session, source, config, byte_count("--max-disk", max_disk))
    if max_memory is not None:
        limit = byte_count("--max-memory", max_memory)
        session.runner.context = replace(session.runner.context, max_memory=limit)
    if shard is not None:
        make_shard(session, step, parse_shard(shard), ("measure", "measured"), f"fqdiff fisher merge {step.id}")
        return
    show_fisher(session, session.make(step))


def check_disk(session: Session, source: "Manifest", config: FisherConfig, limit: int) -> None:
    """Say what single weights will take, and refuse what is more than ``limit``."""
    from fqdiff.store.fisher_files import weights_bytes

    if config.granularity != "weight":
        return
    parameters = sum(t.numel() for t in session.runner.load(source).tensors.values())
    bins = 1 if config.kind == "trajectory" else min(config.bins, config.timesteps)
    size = weights_bytes(parameters, bins)
    session.note(f"single weights: {parameters:,} x {bins} bins, about {mebibytes(size)}")
    if size > limit:
        raise ConfigError(
            f"single weights take about {size / 2**20:.0f} MiB, more than --max-disk {limit / 2**20:.0f} MiB",
            f"use --bins {max(1, bins * limit // size)} or fewer, --granularity channel, or raise --max-disk",
        )


def show_fisher(session: Session, manifest: "Manifest | None") -> None:
    """The table of one Fisher artifact; nothing after --dry-run."""
    if manifest is None:
        return
    value: FisherTable = session.runner.load(manifest)
    rows = fisher_rows(value)
    data = {
        **artifact_data(session.store, manifest),
        "fisher_kind": value.kind,
        "timesteps": len(value.timesteps),
        "samples": value.samples,
        "blocks": rows,
    }
    session.result(data, lambda: fisher_text(manifest, value, rows))


def fisher_rows(value: "FisherTable") -> list[dict[str, object]]:
    """Mean Fisher value of each block's weights at the first, middle and last timestep and over all of them."""
    import torch

    rows: list[dict[str, object]] = []
    for block in dict.fromkeys(e.block for e in value.entries.values()):
        entries = [e for e in value.entries.values() if e.block == block]
        weights = sum(e.numel for e in entries)
        mean = torch.stack([e.mean * e.numel for e in entries]).sum(dim=0) / weights
        middle = len(value.timesteps) // 2
        numbers = {"first": mean[0], "middle": mean[middle], "last": mean[-1], "mean": mean.mean()}
        if value.trajectory:
            numbers["whole run"] = torch.tensor(
                sum(e.mean * e.numel for e in value.trajectory.values() if e.block == block) / weights
            )
        rows.append({"block": block, "weights": weights, **{k: float(v) for k, v in numbers.items()}})
    return rows


def fisher_text(manifest: "Manifest", value: "FisherTable", rows: list[dict[str, object]]) -> str:
    """The table of :func:`fisher_rows` for people."""
    t = value.timesteps
    columns = {
        "first": f"t={t[0]}",
        "middle": f"t={t[len(t) // 2]}",
        "last": f"t={t[-1]}",
        "mean": "mean over t",
        "whole run": "whole run",
    }
    shown = [key for key in columns if key in rows[0]]
    cells = [[str(r["block"]), f"{r['weights']:,}", *(f"{r[k]:.2e}" for k in shown)] for r in rows]
    what = (
        f"{value.samples} runs of {len(t)} steps"
        if value.trajectory
        else f"{len(t)} timesteps x {value.samples} samples"
    )
    title = f"fisher {manifest.id}: {value.kind}, mean squared per-sample gradient, {what}"
    return title + "\n" + table(("block", "weights", *(columns[k] for k in shown)), cells)
