"""``fqdiff plan``."""

from typing import TYPE_CHECKING, Annotated

import typer

from fqdiff.cli.session import Session, common, only_input
from fqdiff.cli.show import artifact_data, mebibytes, table
from fqdiff.configs import PlanConfig
from fqdiff.errors import ArtifactNotFound, ConfigError

if TYPE_CHECKING:
    from fqdiff.pipeline import External, Step
    from fqdiff.store.manifest import Manifest
    from fqdiff.values import Plan


@common()
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
        str | None, typer.Option(help="One scale per tensor or channel.", show_default=f"{PlanConfig.granularity}")
    ] = None,
) -> None:
    """Choose a format for every parameter, from its Fisher value."""
    from fqdiff.pipeline import Step

    asked = {"groups": groups, "threshold": threshold, "ratio": ratio, "mean-std": mean_std, "uniform": uniform}
    strategies = [name for name, value in asked.items() if value is not None]
    if len(strategies) > 1:
        raise ConfigError(f"--{' and --'.join(strategies)} are different strategies", "give one of them")
    if uniform is not None and low is not None:
        raise ConfigError("--uniform names the format already", "leave --low out")
    config = session.settings(
        "plan",
        PlanConfig,
        {},
        strategy=strategies[0] if strategies else None,
        groups=groups,
        thresholds=parse_thresholds(thresholds) if thresholds is not None else None,
        threshold=threshold,
        ratio=ratio,
        mean_std=mean_std,
        at=at,
        low=uniform or low,
        high=high,
        granularity=granularity,
    )
    step = Step("plan", plan_inputs(session, source, config.strategy), config)
    manifest = session.make(step)
    if manifest is None:
        return
    value: Plan = session.runner.load(manifest)
    rows = plan_rows(value)
    totals = {"strategy": value.strategy, "file_bytes": value.file_bytes, "bits_per_weight": value.bits_per_weight}
    session.result(
        {**artifact_data(session.store, manifest), **totals, "blocks": rows}, lambda: plan_text(manifest, value, rows)
    )


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


def plan_rows(value: "Plan") -> list[dict[str, object]]:
    """Block by block: weight tensors, how many of them change format, payload bytes before and after."""
    rows: list[dict[str, object]] = []
    for block in ("stem", "1", "2", "3", "4", "5", "6", "head"):
        entries = [e for e in value.entries if e.block == block]
        tensors = [e for e in entries if len(e.shape) >= 2]
        counts: dict[str, int] = {}
        for e in tensors:
            counts[e.format] = counts.get(e.format, 0) + 1
        before = sum(4 * _numel(e.shape) for e in entries)
        rows.append({"block": block, "formats": counts, "before": before, "after": sum(e.bytes for e in entries)})
    return rows


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def plan_text(manifest: "Manifest", value: "Plan", rows: list[dict[str, object]]) -> str:
    """The table of :func:`plan_rows` for people."""
    cells = []
    for r in rows:
        counts = r["formats"]
        assert isinstance(counts, dict)
        shown = ", ".join(f"{n} {name}" for name, n in sorted(counts.items()))
        cells.append([str(r["block"]), shown, f"{r['before']:,}", f"{r['after']:,}"])
    payload = sum(e.bytes for e in value.entries)
    before = sum(4 * _numel(e.shape) for e in value.entries)
    cells.append(["header", "", "", f"{value.file_bytes - payload:,}"])
    cells.append(["file", "", f"{before:,}", f"{value.file_bytes:,}"])
    header = ("block", "weight tensors", "bytes in float32", "bytes planned")
    rules = list(
        dict.fromkeys(f"{e.rule} (threshold {e.threshold:.3g})" for e in value.entries if e.threshold is not None)
    )
    title = f"plan {manifest.id}: {value.strategy}, {value.bits_per_weight:.3f} bits per weight, {mebibytes(value.file_bytes)}"
    return "\n".join([title, table(header, cells), *rules])
