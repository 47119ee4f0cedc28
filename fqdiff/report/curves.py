"""Noise errors and sampler runs in a report: curves that tell their values, and the same by deciles as a table."""

import json
from collections.abc import Sequence

from fqdiff.evidence.decisions import half_width
from fqdiff.report.data import Report
from fqdiff.report.html import chart, sortable_table, text
from fqdiff.report.svg import inline_svg, themed
from fqdiff.report.tables import decile_tables
from fqdiff.values import Curve
from fqdiff.viz.error_curves import curve_style, limits, noise_title, one_panel, run_title

BORDERS = {"-": "solid", "--": "dashed", "-.": "double", ":": "dotted"}  # CSS has no line of dashes and dots
NOISE_NOTE = (
    "The same noised held-out images for all models, half the squared difference of the noise that they predict, summed over "
    "pixels. Bands: intervals."
)
RUN_NOTE = "Runs from the same noise, step noise included: how far x is from the baseline's x after each step."


def curve_section(report: Report) -> str:
    """A chart for each of the two measures, with a table by deciles; empty where neither was taken."""
    value = report.comparison
    parts = []
    if value.noise_error:
        label = "Noise error of each model over timesteps; by deciles in the table"
        chart_of = _chart(report, value.noise_error, "errors", "t = ", label)
        parts += [
            f"<h3>{text(noise_title(value))}</h3>",
            _legend(report, value.noise_error),
            chart_of,
            _note(NOISE_NOTE),
        ]
    if value.divergence:
        label = f"Divergence of each model's runs over steps of {value.sampler}; by deciles in the table"
        chart_of = _chart(report, value.divergence, "runs", "step ", label)
        parts += [
            f"<h3>Sampler: {text(run_title(value))}</h3>",
            _legend(report, value.divergence),
            chart_of,
            _note(RUN_NOTE),
        ]
    for table in decile_tables(report):
        summary = f"<summary>{text(table.title)}</summary>"
        parts.append(f'<details class="printed">{summary}{sortable_table(table)}</details>')
    return "\n".join(parts)


def _legend(report: Report, curves: Sequence[Curve]) -> str:
    """The line of each model, beside its name. Outside of the picture: on a small screen that scrolls, and this does not."""
    entries = []
    for number, curve in enumerate(curves):
        colour, line = curve_style(number)
        style = f"border-top: 3px {BORDERS[line]} {themed(colour.lower())}"
        same = "" if curve.mean > 0 else " (identical)"
        entries.append(f'<li><span style="{style}"></span>{text(report.labels[curve.of])}{same}</li>')
    return f'<ul class="legend">{"".join(entries)}</ul>'


def _note(words: str) -> str:
    return f'<p class="note">{text(words)}</p>'


def _chart(report: Report, curves: Sequence[Curve], name: str, point: str, label: str) -> str:
    """The curves, and what they say at each point: by pointer, or by a line that the arrow keys move."""
    value = report.comparison
    placed = inline_svg(one_panel(curves, value, report.labels), name, label)
    low, high = limits(curves)
    at = [p.at for p in curves[0].points]
    lines = [
        "\n".join([f"{point}{t}", *(f"{report.labels[c.of]}: {_value(c, k, value.level)}" for c in curves)])
        for k, t in enumerate(at)
    ]
    data = {
        "axes": [round(share, 5) for share in placed.axes],
        "places": [round((t - low) / (high - low), 5) for t in at],
        "texts": lines,
        "label": f"Points of the curves: arrow keys move from {point}{at[0]} to {point}{at[-1]}",
    }
    content = json.dumps(data).replace("<", "\\u003c")
    return (
        f'<div class="curves">{chart(placed, label)}<output class="readout" aria-live="polite"></output>'
        f'<script type="application/json">{content}</script></div>'
    )


def _value(curve: Curve, number: int, level: float) -> str:
    found = curve.points[number]
    half = half_width(found.standard_error, level, curve.samples - 1)
    return f"{found.value:.2e} ± {half:.1e}" if found.value else "0"
