"""The report's pictures as HTML: sizes against quality, plans, Fisher information."""

import json

import numpy as np

from fqdiff.evidence.comparison import BASELINE, FLOOR
from fqdiff.report.data import Report
from fqdiff.report.html import chart, sortable_table, text
from fqdiff.report.svg import Placed, inline_svg
from fqdiff.report.tables import fisher_values, plan_groups, plan_tables
from fqdiff.report.words import interval, judged
from fqdiff.values import Plan
from fqdiff.viz.fisher import DRAW, Subject
from fqdiff.viz.maps import cell_edges
from fqdiff.viz.pareto import pareto
from fqdiff.viz.plan import plans_and_fisher

TIMESTEPS = 101  # of a heat map, that tell their values; more would be as many bytes as the picture


def pareto_section(report: Report) -> str:
    """File size against image MSE and FID, every dot with its numbers; empty where all models are gone."""
    sizes = {row.role: row.file_bytes for row in report.rows if row.file_bytes is not None and row.role != FLOOR}
    value = report.comparison
    tips = {}
    for row in report.models:
        if row.file_bytes is None:
            continue
        size = f"{row.label}\n{row.file_bytes:,} bytes, {row.bits_per_weight:.3f} bits per weight"
        error, fid = value.measure("image_mse", row.role), value.pair("fid", row.role, BASELINE)
        tips[f"image_mse-{row.role}"] = f"{size}\nimage MSE {error.value:.2e} [{error.low:.2e}, {error.high:.2e}]"
        tips[f"fid-{row.role}"] = f"{size}\nFID minus baseline's {interval(fid, '+.3f')}\n{judged(fid)}"
    if not tips:
        return ""
    label = "File size against image MSE and FID, with intervals; the numbers are in the table of models"
    placed = inline_svg(pareto(value, report.labels, sizes, ""), "pareto", label, tips)
    note = (
        "Towards the lower left: smaller and nearer. The dashed line joins models that no smaller one comes as near as; hollow "
        "dots lie above it. Orange on the right: FID tells the model from the baseline."
    )
    return f'{chart(placed, "File size against quality")}\n<p class="note">{note}</p>'


def plan_section(report: Report) -> str:
    """The plans in words, and a picture for each set of plans of one architecture; empty without plans."""
    values = fisher_values(report)
    charts = []
    for number, (plans, table) in enumerate(zip(plan_groups(report), plan_tables(report), strict=True)):
        label = f"Format of each weight tensor in {', '.join(plans)}, beside its Fisher value; as in the table below"
        charts.append(chart(inline_svg(plans_and_fisher(plans, values, ""), f"plan{number}", label), "Plans"))
        charts.append(f"<details><summary>{text(table.title)}, as a table</summary>{sortable_table(table)}</details>")
    if not charts:
        return ""
    rows = "".join(
        f"<dt>{text(report.labels[role])}</dt><dd>{text(_plan_in_words(plan))}</dd>"
        for role, plan in report.plans.items()
    )
    note = (
        "A row is a weight tensor, the darker the more bits; on the right its Fisher value, of the first table below."
    )
    return "\n".join(
        [f"<dl>{rows}</dl>", *charts, f'<p class="note">{note if values else note.partition(";")[0] + "."}</p>']
    )


def _plan_in_words(plan: Plan) -> str:
    told = f"{plan.strategy}: {plan.bits_per_weight:.3f} bits per weight, everything counted, {plan.file_bytes:,} bytes"
    if plan.budget is None:
        return told
    return f"{told}; score {plan.budget.score}, predicted {plan.budget.predicted:.4g}"


def fisher_section(report: Report) -> str:
    """A map for each Fisher table; empty without one."""
    return "\n".join(_fisher_map(number, subject) for number, subject in enumerate(report.fisher.values()))


def _fisher_map(number: int, subject: Subject) -> str:
    """The heat map over timesteps; of a table that has only whole sampler runs, the dots. The title stands above it, where it
    does not scroll away.
    """
    over_time = bool(subject.table.entries)
    figure = DRAW["heatmap-log" if over_time else "trajectory"](subject)
    title = figure.axes[0].get_title().replace(r"\$", "$")
    figure.axes[0].set_title("")
    shown = "Heat map, weight tensor by timestep" if over_time else "Fisher value of each weight tensor"
    placed = inline_svg(figure, f"fisher{number}", f"{shown}: {subject.artifact}")
    head = f"<h3>{text(title)}</h3>{chart(placed, 'Fisher information')}"
    if not over_time:
        return head
    data = json.dumps(_cells(subject, placed)).replace("<", "\\u003c")
    return (
        f'<div class="heat">{head}<output class="readout" aria-live="polite"></output>'
        f'<script type="application/json">{data}</script>'
        '<p class="note hint">Point at a cell, or move over them with the arrow keys.</p></div>'
    )


def _cells(subject: Subject, placed: Placed) -> dict[str, object]:
    """The heat map's rows and values [R, T], of TIMESTEPS timesteps at most, and where they are drawn."""
    timesteps = subject.table.timesteps
    chosen = np.unique(np.linspace(0, len(timesteps) - 1, min(len(timesteps), TIMESTEPS)).round().astype(int))
    edges = cell_edges(timesteps.double().numpy())
    rows = [name for names in subject.weight_groups.values() for name in names]
    values = [subject.table.entries[name].mean[chosen].tolist() for name in rows]
    return {
        "rows": rows,
        "timesteps": timesteps[chosen].tolist(),
        "values": [[float(f"{v:.3g}") for v in row] for row in values],
        "span": [float(edges[0]), float(edges[-1])],
        "axes": [round(share, 5) for share in placed.axes],
    }
