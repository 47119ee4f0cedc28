"""``fqdiff plan --strategy``: plans that an installed plug-in makes."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fqdiff.cli.plan_budget import title
from fqdiff.cli.plan_inputs import plan_inputs
from fqdiff.cli.session import Session
from fqdiff.cli.show import BLOCKS, artifact_data, table
from fqdiff.configs import STRATEGIES, PluginPlanConfig
from fqdiff.errors import ConfigError

if TYPE_CHECKING:
    from fqdiff.store.manifest import Manifest
    from fqdiff.values import Plan

READ = {"at", "granularity", "scale"}  # of the options of all plans


def make_by_plugin(
    session: Session, ref: str | None, name: str, settings: tuple[str, ...], flags: Mapping[str, object]
) -> None:
    """Make the plan of the plug-in ``name``, and say what it is. ``flags``: the other options that were given."""
    from fqdiff.pipeline import Step
    from fqdiff.planning.plugins import find_plugin

    if name in STRATEGIES:
        raise ConfigError(f"'{name}' is a strategy of fqdiff's own", "it has an option of its own: fqdiff plan --help")
    foreign = sorted(flags.keys() - READ)
    if foreign:
        options = ", ".join(f"--{option.replace('_', '-')}" for option in foreign)
        raise ConfigError(f"{options} beside --strategy", "what the plug-in reads is given by --setting NAME=VALUE")
    if session.tables().get("plan"):
        raise ConfigError(
            f"[plan] in {session.config_path} beside --strategy", "give --setting, --at, --granularity, --scale"
        )
    plugin = find_plugin(name)
    config = PluginPlanConfig(name, plugin.distribution, plugin.version, settings, **flags)  # type: ignore[arg-type]
    manifest = session.make(Step("plan-plugin", plugin_inputs(session, ref), config))
    if manifest is None:
        return
    value: Plan = session.runner.load(manifest)
    rows = format_rows(value)
    totals = {"strategy": value.strategy, "file_bytes": value.file_bytes, "bits_per_weight": value.bits_per_weight}
    session.result(
        {**artifact_data(session.store, manifest), **totals, "blocks": rows},
        lambda: "\n".join([title(manifest, value), plugin_table(rows), f"strategy {value.strategy}"]),
    )


def plugin_inputs(session: Session, ref: str | None) -> "dict[str, Manifest]":
    """Checkpoint and Fisher table; a checkpoint that is named, or the latest, goes without where it has none."""
    found = session.resolve(ref, ("checkpoint", "fisher"))
    tables = (m.input("checkpoint") for m in session.store.manifests("fisher"))
    if found.kind == "checkpoint" and not any(i is not None and i.id == found.id for i in tables):
        session.note(f"fisher: checkpoint {found.id} has no table; the plug-in gets no importance")
        return {"checkpoint": found}
    return plan_inputs(session, found.id, needs_table=True)


def format_rows(value: "Plan") -> list[dict[str, object]]:
    """Block by block: weights in each format, and payload bytes."""
    rows: list[dict[str, object]] = []
    for block in BLOCKS:
        entries = [e for e in value.entries if e.block == block]
        formats: dict[str, int] = {}
        for e in entries:
            if len(e.shape) >= 2:
                formats[e.format] = formats.get(e.format, 0) + 1
        rows.append({"block": block, "formats": formats, "bytes_planned": sum(e.bytes for e in entries)})
    return rows


def plugin_table(rows: list[dict[str, object]]) -> str:
    """Rows of :func:`format_rows` for people."""
    cells = []
    for row in rows:
        formats = row["formats"]
        assert isinstance(formats, dict)
        told = ", ".join(f"{count} {name}" for name, count in sorted(formats.items()))
        cells.append([str(row["block"]), told, f"{row['bytes_planned']:,}"])
    return table(("block", "tensors", "bytes planned"), cells)
