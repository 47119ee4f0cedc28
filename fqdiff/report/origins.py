"""Where a report's numbers come from: the graph of artifacts, and the commands."""

import json
from collections.abc import Mapping

from fqdiff.report.data import ArtifactRow, Report
from fqdiff.report.html import chart, html_table, text
from fqdiff.report.markdown import commands_text
from fqdiff.report.svg import inline_svg
from fqdiff.viz.lineage import Node, graph


def lineage_section(report: Report) -> str:
    """The graph, and every artifact with its inputs and settings."""
    nodes = lineage_nodes(report)
    tips = {f"node-{number}": f"{row.key}\n{_state(row)}" for number, row in enumerate(report.artifacts)}
    placed = inline_svg(graph(nodes, ""), "lineage", "What was made from what; as in the table below", tips)
    rows = "".join(
        f'<tr><th scope="row">{text(row.key)}</th><td>{text(", ".join(row.names))}</td>'
        f"<td>{text(', '.join(f'{role}: {key}' for role, key in row.inputs))}</td><td>{_recipe(row)}</td></tr>"
        for row in report.artifacts
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("artifact", "names", "made from", "settings"))
    listed = html_table("plain", "Artifacts", head, rows)
    summary = "<summary>Every artifact, its inputs and its settings</summary>"
    return f"{chart(placed, 'Lineage')}\n<details>{summary}{listed}</details>"


def lineage_nodes(report: Report) -> dict[str, Node]:
    """The boxes of the graph, by kind/id: the names that an artifact has, else whose it is, and its id."""
    owners = {f"samples/{row.samples}": row.label for row in report.rows}
    owners |= {row.model: row.label for row in reversed(report.rows)}
    nodes = {}
    for row in report.artifacts:
        whose = ", ".join(row.names) or (f"of {owners[row.key]}" if row.key in owners else "")
        lines = (whose, row.id) if whose else (row.id,)
        nodes[row.key] = Node(row.kind, lines, tuple(key for _, key in row.inputs), row.manifest is not None)
    return nodes


def _state(row: ArtifactRow) -> str:
    return (
        "not in the store"
        if row.manifest is None
        else f"{row.manifest.created[:19].replace('T', ' ')} UTC\n{row.manifest.command}"
    )


def _recipe(row: ArtifactRow) -> str:
    if row.manifest is None:
        return "not in the store"
    recipe = row.manifest.recipe
    settings = json.dumps({**recipe.config, "seed": recipe.seed}, ensure_ascii=False)
    return f"{text(recipe.stage)} (schema {recipe.schema}): <code>{text(settings)}</code>"


def reproduce_section(report: Report) -> str:
    """The commands, and the machine that the comparison was made on."""
    manifest = next(row.manifest for row in report.artifacts if row.id == report.id and row.manifest is not None)
    facts: Mapping[str, object] = manifest.environment
    rows = "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in facts.items() if value is not None)
    return (
        "<p>In this order. Equal recipes give equal ids: a store that has them finds them again.</p>\n"
        '<button type="button" class="button copy" data-of="commands" hidden>Copy</button>'
        f'<pre id="commands" tabindex="0">{text(commands_text(report))}</pre>\n'
        f"<details><summary>Where the comparison was made</summary><dl>{rows}</dl></details>"
    )
