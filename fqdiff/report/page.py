"""A report as one HTML page that needs nothing else: no network, no folder beside it."""

import base64
import hashlib
from collections.abc import Callable, Mapping
from importlib.resources import files
from string import Template

import fqdiff
from fqdiff.errors import FqdiffError
from fqdiff.evidence.comparison import BASELINE
from fqdiff.report.curves import curve_section
from fqdiff.report.data import Report
from fqdiff.report.html import chart, sortable_table, text
from fqdiff.report.origins import lineage_section, reproduce_section
from fqdiff.report.pictures import fisher_section, pareto_section, plan_section
from fqdiff.report.samples import sample_section
from fqdiff.report.svg import inline_svg
from fqdiff.report.tables import distribution_table, model_table, pair_table, paired_table
from fqdiff.report.words import (
    BEYOND,
    NO_GAIN,
    WHAT_N_COUNTS,
    join,
    model_sentences,
    pair_columns,
    title,
    verdict,
)
from fqdiff.viz.comparison import intervals

PAGE_LIMIT = 5_000_000  # bytes
ITS_HEADING = 1000  # bytes, more than the heading of the samples takes


def html_page(report: Report, tick: Callable[[], None] = lambda: None) -> str:
    """The page, of PAGE_LIMIT bytes at most: of samples it shows as many as fit. ``tick`` is told of each section done.

    Raises FqdiffError where all the rest alone is larger.
    """
    made: dict[str, str] = {}
    for name, (_, make) in SECTIONS.items():
        made[name] = make(report)
        tick()
    bare = len(_page(report, made).encode())
    if bare > PAGE_LIMIT:
        raise FqdiffError(f"the report takes {bare:,} bytes, and may take {PAGE_LIMIT:,}", "compare fewer models")
    return _page(report, made | {"samples": sample_section(report, PAGE_LIMIT - bare - ITS_HEADING)})


def _page(report: Report, made: Mapping[str, str]) -> str:
    there = {name: SECTIONS[name][0] for name, content in made.items() if content}
    value, script = report.comparison, _asset("page.js")
    body = "\n".join(
        f'<section id="{name}" aria-labelledby="{name}-head"><h2 id="{name}-head">{head}</h2>\n{made[name]}</section>'
        for name, head in there.items()
    )
    facts = (
        f"N = {value.n:,} images of each, seed {value.seed}, against {value.reference}. Features: {value.features}, "
        f"{value.dimension} dimensions, sha256 {value.features_sha256[:16]}. Comparison {report.id}."
    )
    return Template(_asset("page.html")).substitute(
        title=text(title(report)),
        script_hash=f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
        css=_asset("page.css"),
        script=script,
        facts=text(facts),
        nav="".join(f'<li><a href="#{name}">{head}</a></li>' for name, head in there.items()),
        body=body,
        footer=text(f"Written by fqdiff {fqdiff.__version__} from comparison {report.id}."),
    )


def _asset(name: str) -> str:
    return (files("fqdiff.report") / name).read_text(encoding="utf-8")


def _verdict(report: Report) -> str:
    lead = "".join(f"<li>{text(line)}</li>" for line in verdict(report))
    each = "".join(f"<dt>{text(label)}</dt><dd>{text(line)}</dd>" for label, line in model_sentences(report))
    value = report.comparison
    notes = [
        f"Image by image: every model drew from the same noise as {report.labels[BASELINE]}, so that differences are its own. "
        f"±, [ ] and bars: {value.level:.0%} intervals from {value.resamples:,} resamples of images, the same for all models. "
        f"Verdicts: at the {value.level:.0%} level, after Holm's correction over all pairs of a metric. "
        f"{WHAT_N_COUNTS} At 80% power."
    ]
    if any(d.verdict in BEYOND for d in value.differences):
        notes.append(NO_GAIN)
    return f'<ul class="lead">{lead}</ul>\n<dl>{each}</dl>\n' + "".join(f'<p class="note">{text(n)}</p>' for n in notes)


def _models(report: Report) -> str:
    figure = intervals(report.comparison, report.labels, "")
    label = f"Image error of each model, and its FID minus that of {report.labels[BASELINE]}, with intervals; as in the table"
    placed = inline_svg(figure, "intervals", label)
    hint = '<p class="note hint">A column\'s head sorts by it.</p>'
    return f"{sortable_table(model_table(report))}\n{hint}\n{chart(placed, 'Intervals')}"


def _metrics(report: Report) -> str:
    parts = []
    for table in (paired_table(report), distribution_table(report)):
        parts.append(f"<h3>{text(table.title)}</h3>\n{sortable_table(table)}")
    pairs = pair_table(report)
    metrics = join([name for name, _ in pair_columns().values()])
    summary = f"<summary>{text(pairs.title)} by {text(metrics)}, with verdicts</summary>"
    return "\n".join([*parts, f'<details class="printed">{summary}{sortable_table(pairs)}</details>'])


# What each is called, and what makes it; one that has nothing to show is left out. Samples come last, to fill the page.
SECTIONS: Mapping[str, tuple[str, Callable[[Report], str]]] = {
    "verdict": ("Verdict", _verdict),
    "models": ("Models", _models),
    "pareto": ("Size against quality", pareto_section),
    "samples": ("Samples", lambda _: ""),
    "metrics": ("All metrics", _metrics),
    "curves": ("Errors over time", curve_section),
    "plans": ("Plans", plan_section),
    "fisher": ("Fisher information", fisher_section),
    "lineage": ("Lineage", lineage_section),
    "reproduce": ("Reproduce", reproduce_section),
}
