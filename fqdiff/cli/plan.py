"""``fqdiff plan``."""

from math import prod
from typing import TYPE_CHECKING, Annotated

import typer

from fqdiff.cli.session import NOTHING_RANDOM, Session, common, only_input
from fqdiff.cli.show import BLOCKS, artifact_data, mebibytes, table
from fqdiff.configs import SCALES, PlanConfig
from fqdiff.errors import ArtifactNotFound, ConfigError

if TYPE_CHECKING:
    from fqdiff.pipeline import External, Step
    from fqdiff.store.manifest import Manifest
    from fqdiff.values import Plan

READS_FISHER = {"at", "low", "high"}
ANY_STRATEGY = {"granularity", "scale", "symmetric"}
OWN_SETTINGS = {  # the setting that stands for a strategy, and what else that strategy reads
    "groups": READS_FISHER | {"thresholds"},
    "threshold": READS_FISHER,
    "ratio": READS_FISHER,
    "mean_std": READS_FISHER,
    "uniform": set(),
}


@common(*NOTHING_RANDOM)
def plan(
    session: Session,
    source: Annotated[
        str | None,
        typer.Argument(help="Fisher table, or checkpoint for --uniform.", show_default="the latest", metavar="[REF]"),
    ] = None,
    groups: Annotated[str | None, typer.Option(help="Block groups, one threshold each, e.g. 12/345/6.")] = None,
    thresholds: Annotated[
        str | None, typer.Option(help="The groups' thresholds, e.g. 0.1/0.01/0.1.", show_default="mean of each")
    ] = None,
    threshold: Annotated[float | None, typer.Option(min=0, help="One threshold for the whole model.")] = None,
    ratio: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of each block's tensors that stays high.")
    ] = None,
    mean_std: Annotated[
        float | None, typer.Option(min=0, help="Threshold mean - k std per block, k = clamp(A mean/std, 0.1, 2).")
    ] = None,
    uniform: Annotated[
        str | None, typer.Option(help="Every weight tensor in this format; needs no Fisher values.")
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(help="Read Fisher values at this timestep, or 'mean'.", show_default=f"{PlanConfig.at}"),
    ] = None,
    low: Annotated[
        str | None, typer.Option(help="Format below the threshold.", show_default=f"{PlanConfig.low}")
    ] = None,
    high: Annotated[str | None, typer.Option(help="Format above it.", show_default=f"{PlanConfig.high}")] = None,
    granularity: Annotated[
        str | None,
        typer.Option(
            help="One scale per tensor, per channel, per group:SIZE of a channel's weights, or group-near:SIZE.",
            show_default=f"{PlanConfig.granularity}",
        ),
    ] = None,
    scale: Annotated[
        str | None, typer.Option(help=f"Store scales in {' or '.join(SCALES)}.", show_default=f"{PlanConfig.scale}")
    ] = None,
    symmetric: Annotated[
        bool, typer.Option("--symmetric", help="Integers without zero points: int4 becomes int4sym.")
    ] = False,
) -> None:
    """Choose a format for every parameter, from its Fisher value."""
    from fqdiff.pipeline import Step
    from fqdiff.stages.plan import planned_formats

    flags: dict[str, object] = {
        "groups": groups,
        "thresholds": parse_thresholds(thresholds) if thresholds is not None else None,
        "threshold": threshold,
        "ratio": ratio,
        "mean_std": mean_std,
        "uniform": uniform,
        "at": at,
        "low": low,
        "high": high,
        "granularity": granularity,
        "scale": scale,
        "symmetric": symmetric or None,
    }
    given = {name for name, value in flags.items() if value is not None}
    strategy = choose_strategy(given, set(session.tables().get("plan", {})))
    flags |= {"strategy": strategy, "low": flags.pop("uniform") or low}
    config = session.settings("plan", PlanConfig, {}, **flags)
    low_format, high_format = (fmt.name for fmt in planned_formats(config))
    step = Step("plan", plan_inputs(session, source, config.strategy), config)
    manifest = session.make(step)
    if manifest is None:
        return
    value: Plan = session.runner.load(manifest)
    rows = plan_rows(value, low_format)
    full_bytes = only_input(session, manifest, "checkpoint").file("model.safetensors").bytes
    totals = {"strategy": value.strategy, "file_bytes": value.file_bytes, "bits_per_weight": value.bits_per_weight}
    session.result(
        {**artifact_data(session.store, manifest), **totals, "blocks": rows},
        lambda: plan_text(manifest, value, (low_format, high_format), rows, full_bytes),
    )


def choose_strategy(flags: set[str], in_file: set[str]) -> str | None:
    """The strategy that the given settings belong to; flags decide before the file. None leaves it to the file or default.

    Raises ConfigError for settings of two strategies, and for flags that the strategy does not read.
    """
    for given in (flags, in_file):
        named = sorted(given & OWN_SETTINGS.keys())
        if len(named) > 1:
            raise ConfigError(f"{' and '.join(named)} belong to different strategies", "give one of them")
        if named:
            strategy = named[0].replace("_", "-")
            foreign = sorted(flags - OWN_SETTINGS[named[0]] - {named[0]} - ANY_STRATEGY)
            if foreign:
                raise ConfigError(f"strategy '{strategy}' has no use for {', '.join(foreign)}", "leave it out")
            return strategy if "strategy" not in in_file or given is flags else None
    return None


def parse_thresholds(text: str) -> tuple[float, ...]:
    """``0.1/0.01/0.1`` as numbers."""
    try:
        return tuple(float(part) for part in text.split("/"))
    except ValueError:
        raise ConfigError(f"thresholds '{text}' are not numbers", "one per group, e.g. 0.1/0.01/0.1") from None


def plan_inputs(session: Session, ref: str | None, strategy: str) -> "dict[str, Step | Manifest | External]":
    """Checkpoint and Fisher table of a plan: of the table named, of the checkpoint named, or the latest."""
    if strategy == "uniform":
        found = session.resolve(ref, ("checkpoint", "fisher") if ref else ("checkpoint",))
        return {"checkpoint": found if found.kind == "checkpoint" else only_input(session, found, "checkpoint")}
    found = session.resolve(ref, ("checkpoint", "fisher") if ref else ("fisher",))
    if found.kind == "checkpoint":
        tables = [m for m in session.store.manifests("fisher") if (i := m.input("checkpoint")) and i.id == found.id]
        if not tables:
            raise ArtifactNotFound(f"no Fisher table of checkpoint {found.id}", f"fqdiff fisher {found.id}")
        found = tables[-1]
        session.note(f"fisher: the latest of that checkpoint, {found.id}")
    return {"checkpoint": only_input(session, found, "checkpoint"), "fisher": found}


def plan_rows(value: "Plan", low: str) -> list[dict[str, object]]:
    """Block by block: weight tensors and weights in all and in the low format, payload bytes before and after."""
    rows: list[dict[str, object]] = []
    for block in BLOCKS:
        entries = [e for e in value.entries if e.block == block]
        tensors = [e for e in entries if len(e.shape) >= 2]
        lowered = [e for e in tensors if e.format == low]
        rows.append(
            {
                "block": block,
                "tensors": len(tensors),
                "tensors_low": len(lowered),
                "weights": sum(prod(e.shape) for e in tensors),
                "weights_low": sum(prod(e.shape) for e in lowered),
                "bytes_float32": sum(4 * prod(e.shape) for e in entries),
                "bytes_planned": sum(e.bytes for e in entries),
            }
        )
    return rows


def plan_text(
    manifest: "Manifest", value: "Plan", formats: tuple[str, str], rows: list[dict[str, object]], full_bytes: int
) -> str:
    """The table of :func:`plan_rows` for people; ``full_bytes`` is the size of the full-precision file."""
    low, high = formats
    cells = [
        [
            str(r["block"]),
            f"{r['tensors_low']} of {r['tensors']}",
            f"{r['weights_low']:,} of {r['weights']:,}",
            f"{r['bytes_float32']:,}",
            f"{r['bytes_planned']:,}",
        ]
        for r in rows
    ]
    payload, full_payload = (sum(int(str(r[key])) for r in rows) for key in ("bytes_planned", "bytes_float32"))
    cells.append(["header", "", "", f"{full_bytes - full_payload:,}", f"{value.file_bytes - payload:,}"])
    cells.append(["file", "", "", f"{full_bytes:,}", f"{value.file_bytes:,}"])
    header = ("block", f"tensors to {low}", f"weights to {low}", "bytes in float32", "bytes planned")
    title = f"plan {manifest.id}: {value.strategy}, {value.bits_per_weight:.3f} bits per weight, {mebibytes(value.file_bytes)}"
    rest = "everything else stays float32"
    if high != "float32":
        rest = "biases and norms stay float32" + (
            "" if value.strategy == "uniform" else f", all other weights are {high}"
        )
    rules = dict.fromkeys(f"{e.rule} (threshold {e.threshold:.3g})" for e in value.entries if e.threshold is not None)
    return "\n".join([title, table(header, cells), rest, *rules])
