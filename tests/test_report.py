"""``fqdiff report``: what it says, that it is one sound page, and that a browser shows it."""

import json
import re
import shutil
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import fqdiff
from fqdiff.pipeline import Runner
from fqdiff.report.data import Report, collect, find_comparison
from fqdiff.report.html import text as as_html
from fqdiff.report.markdown import commands_text, escape, markdown
from fqdiff.report.origins import lineage_nodes
from fqdiff.report.page import PAGE_LIMIT, html_page
from fqdiff.report.pictures import TIMESTEPS, fisher_section
from fqdiff.report.samples import sample_section
from fqdiff.report.tables import Table, decile_mean, deciles, tables
from fqdiff.report.words import SAME, dominated, verdict
from fqdiff.store.store import Store
from fqdiff.values import Curve, Point, TrajectoryEntry
from fqdiff.viz.comparison import intervals
from fqdiff.viz.lineage import LANE, SIDE, Node, graph, layout, lines_of
from fqdiff.viz.pareto import Dot, front, pareto
from fqdiff.viz.samples import magnified_difference
from tests.browser import Browser, find_chromium
from tests.test_cli import call, good

VOID = {"meta", "img", "input", "br", "link", "hr"}
HOSTILE = "</script><script>window.hacked=1</script>\"'><img src=x onerror=window.hacked=1>&$x$|`*\n\x00"
SECTIONS = ["verdict", "models", "pareto", "samples", "metrics", "curves", "plans", "fisher", "lineage", "reproduce"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "store"
    config = folder.parent / "quick.toml"
    config.write_text("[classifier]\nepochs = 1\n[compare]\nresamples = 30\n")
    good(folder, "train", "--preset", "tiny", "--dataset", "mnist5k", "--steps", "10", "--name", "full")
    good(folder, "fisher", "--timesteps", "150", "--samples", "2")
    good(folder, "plan", "--groups", "12/345/6", "--at", "mean", "--name", "groups")
    for low in ("float32", "int8", "int2"):
        good(folder, "plan", "full", "--uniform", low, "--name", low)
    settings = ["--features", "digits", "--count", "40", "--steps", "3", "--config", str(config)]
    good(folder, "compare", "full", "int8", "int2", *settings)
    good(folder, "compare", "full", "groups", "int8", "int2", "float32", *settings)
    return folder


def report_of(store: Path, *refs: str) -> Report:
    opened = Store(store)
    return collect(Runner(opened), find_comparison(opened, refs))


@pytest.fixture(scope="module")
def report(store: Path) -> Report:
    return report_of(store)


@pytest.fixture(scope="module")
def page(report: Report) -> str:
    return html_page(report)


@pytest.fixture(scope="module")
def hostile(report: Report) -> Report:
    """The same report where everything that a stranger may write is hostile."""
    name = f"{HOSTILE}-0"
    rows = tuple(replace(row, label=f"{HOSTILE}-{k}") for k, row in enumerate(report.rows))
    artifacts = tuple(
        replace(
            row,
            names=(HOSTILE,),
            manifest=row.manifest
            and replace(
                row.manifest,
                command=HOSTILE,
                settings=HOSTILE,
                environment={f"{HOSTILE}{k}": v if v is None else HOSTILE for k, v in row.manifest.environment.items()},
                recipe=replace(row.manifest.recipe, config={HOSTILE: HOSTILE}, stage=HOSTILE),
            ),
        )
        for row in report.artifacts
    )
    ((key, subject),) = report.fisher.items()

    def renamed(names: Iterator[str]) -> dict[str, str]:
        return {n: f"{name}.{n}" for n in names}

    new = renamed(iter(subject.table.entries))
    table = replace(
        subject.table, kind=HOSTILE, entries={new[n]: e for n, e in subject.table.entries.items()}, trajectory={}
    )
    tensors = {new[n]: t for n, t in subject.checkpoint.tensors.items()}
    fisher = {key: replace(subject, table=table, checkpoint=replace(subject.checkpoint, tensors=tensors))}
    plans = {
        role: replace(
            plan, strategy=HOSTILE, entries=tuple(replace(e, parameter=new[e.parameter]) for e in plan.entries)
        )
        for role, plan in report.plans.items()
    }
    comparison = replace(report.comparison, features=HOSTILE, reference=HOSTILE, sampler=HOSTILE)
    return replace(report, rows=rows, artifacts=artifacts, fisher=fisher, plans=plans, comparison=comparison)


@pytest.fixture(scope="module")
def hostile_page(hostile: Report) -> str:
    return html_page(hostile)


class Page(HTMLParser):
    """Start tags with their attributes; ``open`` are those without an end, empty after a balanced page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.problems: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> at {self.getpos()}")

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


# --- the page's structure ----------------------------------------------------------------------------------------------


def test_the_page_is_balanced_and_small(page: str) -> None:
    parsed = Page(page)
    assert not parsed.problems
    assert not parsed.open
    assert len(page.encode()) <= PAGE_LIMIT
    assert [a["id"] for a in parsed.all("section")] == SECTIONS


def test_nothing_in_the_page_leads_outside(page: str) -> None:
    """Rejects matplotlib's own SVG, whose metadata, style sheet and xlink name addresses and hold for the whole page."""
    for tag, attributes in Page(page).tags:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
                assert (value or "").startswith(("data:image/png;base64,", "#")), (tag, name, value)
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)]*)", page))
    assert "http:" not in page
    assert "https:" not in page
    assert "@import" not in page
    (policy,) = [a["content"] for a in Page(page).all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_ids_are_unique_and_every_reference_has_its_target(page: str) -> None:
    tags = Page(page).tags
    ids = Counter(a["id"] for _, a in tags if "id" in a)
    assert [i for i, n in ids.items() if n > 1] == []
    named = [a[k] for _, a in tags for k in ("for", "aria-labelledby", "data-control", "data-of") if k in a]
    named += [a["href"][1:] for _, a in tags if (a.get("href") or "").startswith("#")]  # type: ignore[index]
    named += re.findall(r"url\(#([^)]*)\)", page)
    assert named
    assert set(named) <= ids.keys()


def test_who_cannot_see_the_page_is_told_the_same(page: str) -> None:
    parsed = Page(page)
    assert all(a.get("alt") for a in parsed.all("img"))
    assert len(parsed.all("img")) == 1 + 2 * 4
    assert parsed.all("th")
    assert all(a.get("scope") in ("col", "row") for a in parsed.all("th"))
    assert all(a.get("aria-label") for a in parsed.all("svg"))
    assert len(parsed.all("caption")) == len(parsed.all("table"))
    assert parsed.all("html")[0]["lang"] == "en"
    assert all("aria-label" in a for _, a in parsed.tags if a.get("tabindex") == "0" and a.get("id") != "commands")


def test_hostile_text_adds_no_tag_anywhere(page: str, hostile_page: str) -> None:
    """Rejects a page that leaves out escaping in one place only: every start tag has to be the same."""
    parsed = Page(hostile_page)
    assert not parsed.problems
    assert not parsed.open
    drawn = {"text", "tspan", "g", "use", "path", "defs"}  # how many there are depends on where labels find room
    of_hostile, of_benign = ([t for t, _ in p.tags if t not in drawn] for p in (parsed, Page(page)))
    assert of_hostile == of_benign
    assert not any(name.startswith("on") for _, a in parsed.tags for name in a)
    assert len(parsed.all("script")) == 4


def test_files_of_the_page_are_in_the_package() -> None:
    root = Path(fqdiff.__file__).parent
    listed = tomllib.loads((root.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert sorted(listed["fqdiff.report"]) == sorted(p.name for p in (root / "report").glob("page.[!p]*"))


# --- what it says ------------------------------------------------------------------------------------------------------


def cells(table: Table, name: str) -> dict[str, str]:
    column = [head.partition(" [")[0] for head in table.header].index(name)
    return {row[0].text: row[column].text for row in table.rows}


def test_sizes_are_those_of_the_files(store: Path, report: Report) -> None:
    table = tables(report)[0]
    sizes = cells(table, "bytes")
    weights = sum(t.numel() for t in report.fisher[next(iter(report.fisher))].checkpoint.tensors.values())
    for row in report.models:
        path = store / row.model / "model.safetensors"
        assert sizes[row.label] == f"{path.stat().st_size:,}"
        assert cells(table, "bits/weight")[row.label] == f"{8 * path.stat().st_size / weights:.3f}"
    assert [row.label for row in report.rows] == ["full", "groups", "int8", "int2", "float32", "full, other noise"]
    assert cells(table, "of other noise")["float32"] == "identical"
    assert cells(table, "times smaller")["full"] == "1.00"


def test_the_verdict_names_what_is_smaller_and_nearer(report: Report) -> None:
    lines = verdict(report)
    assert lines[0].startswith("float32 is nearest to full (image MSE 0.0e+00), int2 the smallest (")
    value = report.comparison
    for better, other in dominated(report):
        assert better.file_bytes is not None
        assert other.file_bytes is not None
        assert better.file_bytes <= other.file_bytes
        assert value.measure("image_mse", better.role).value < value.measure("image_mse", other.role).value
    bigger = replace(report, rows=tuple(replace(r, file_bytes=10**6 + (r.label == "int2")) for r in report.rows))
    assert ("int8", "int2") in {(a.label, b.label) for a, b in dominated(bigger)}
    assert "int8 is no larger than int2, and nearer to full." in verdict(bigger)


def test_one_model_is_told_apart_in_the_singular(report: Report) -> None:
    value, row = report.comparison, report.row("model3")
    roles = ("baseline", "floor", "model1")

    def first(role: str) -> str:
        return {"model3": "model1", "model1": "gone"}.get(role, role)

    measures = tuple(replace(m, of=first(m.of)) for m in value.measures if first(m.of) in roles)
    pairs = [replace(d, of=first(d.of)) for d in value.differences if d.against == "baseline" and first(d.of) in roles]
    told = {"fid": "not distinguishable", "kid": "worse"}
    pairs = [replace(d, verdict=told.get(d.metric, d.verdict)) for d in pairs]
    one = replace(value, models=1, measures=measures, differences=tuple(pairs))
    rows = (report.row("baseline"), replace(row, role="model1"), report.row("floor"))
    lines = verdict(replace(report, comparison=one, rows=rows))
    smaller = (report.row("baseline").file_bytes or 0) / (row.file_bytes or 1)
    assert lines[0].startswith(f"int2 against full: {smaller:.1f} times smaller; image MSE ")
    assert lines[1:] == [
        "By KID of 40 images, int2 is worse than full.",
        "FID of 40 images cannot tell int2 from full.",
    ]


def test_the_verdict_says_plainly_what_a_lower_fid_is_worth(report: Report) -> None:
    words = {"model1": "not worse", "model2": "not distinguishable", "model3": "worse", "model4": "worse"}
    told = tuple(
        replace(d, verdict=words[d.of]) if d.metric == "fid" and d.against == "baseline" and d.of in words else d
        for d in report.comparison.differences
    )
    lines = verdict(replace(report, comparison=replace(report.comparison, differences=told)))
    assert (
        "By FID of 40 images, int2 and float32 are worse than full; groups differs from full by a lower FID, which is no "
        "gain; int8 cannot be told from full." in lines
    )


def test_whole_sampler_runs_have_dots_in_the_place_of_a_map(report: Report) -> None:
    ((key, subject),) = report.fisher.items()
    runs = {
        name: TrajectoryEntry(e.block, e.numel, float(e.mean[0]) + 1, 0.1, 2.0, torch.zeros(0), torch.ones(3))
        for name, e in subject.table.entries.items()
    }
    html = fisher_section(
        replace(report, fisher={key: replace(subject, table=replace(subject.table, entries={}, trajectory=runs))})
    )
    parsed = Page(html)
    assert not parsed.open
    assert len(parsed.all("svg")) == 1
    assert not parsed.all("script")


def json_of(page: str) -> list[dict[str, Any]]:
    return [json.loads(found) for found in re.findall(r'<script type="application/json">(.*?)</script>', page)]


def test_every_point_of_a_curve_tells_its_values(report: Report, page: str) -> None:
    told = [found for found in json_of(page) if "texts" in found]
    value = report.comparison
    for data, curves, name in zip(told, (value.noise_error, value.divergence), ("t = ", "step "), strict=True):
        assert len(data["texts"]) == len(data["places"]) == len(curves[0].points)
        assert data["places"] == sorted(data["places"])
        for k, text in enumerate(data["texts"]):
            first, *lines = text.splitlines()
            assert first == f"{name}{curves[0].points[k].at}"
            assert [line.partition(": ")[0] for line in lines] == [report.labels[c.of] for c in curves]
            found = [float(line.partition(": ")[2].partition(" ")[0]) for line in lines]
            assert found == pytest.approx([c.points[k].value for c in curves], rel=6e-3)


def test_deciles_are_weighted_means_that_make_up_the_whole(report: Report) -> None:
    """Ten tenths of the way to the last point; by hand for a curve of three points."""
    points = tuple(
        Point(at, weight, value, 0.0) for at, weight, value in ((0, 0.2, 1.0), (5, 0.2, 3.0), (99, 0.6, 7.0))
    )
    curve = Curve("model1", 2, points, 5.0, 0.0, 5.0, 5.0)
    tenths = deciles([p.at for p in points])
    assert tenths == [(0, 5), (99, 99)]
    assert [decile_mean(curve, *tenth) for tenth in tenths] == pytest.approx([2.0, 7.0])
    noise, runs = (t for t in tables(report) if t.title.startswith(("Noise error", "Divergence")))
    assert noise.header[0] == runs.header[0] == "model"
    assert 2 < len(noise.header) <= 12
    assert len(runs.header) == 2 + 3  # three steps
    assert cells(noise, "mean")["float32"] == "0.00e+00 ± 0.0e+00"


def test_the_formats_of_a_plan_can_be_read_without_its_picture(report: Report, page: str) -> None:
    (table,) = [t for t in tables(report) if t.title.startswith("Format of each weight tensor")]
    assert table.header == ("weight tensor", "block", "Fisher value", "groups", "int8", "int2", "float32")
    for role, plan in report.plans.items():
        formats = cells(table, report.labels[role])
        assert formats == {e.parameter: e.format_label for e in plan.entries if len(e.shape) >= 2}
    assert "<summary>Format of each weight tensor, as a table</summary>" in page
    assert "### Format of each weight tensor" in markdown(report)


def test_orange_means_told_apart_and_nothing_else(report: Report) -> None:
    """Rejects orange for the models that nothing beats, beside orange for those that FID tells from the baseline."""
    told = {"model2": "worse", "model3": "not worse"}
    differences = tuple(
        replace(d, verdict=told.get(d.of, SAME)) if (d.metric, d.against) == ("fid", "baseline") else d
        for d in report.comparison.differences
    )
    value = replace(report.comparison, differences=differences)
    sizes = {row.role: row.file_bytes or 1 for row in report.rows if row.role != "floor"}
    for figure in (pareto(value, report.labels, sizes, ""), intervals(value, report.labels, "")):
        left, right = figure.axes
        orange = [[line for line in axes.lines if line.get_color() == "#D55E00"] for axes in (left, right)]
        assert not orange[0]
        assert len([line for line in orange[1] if line.get_marker() == "o" and line.get_alpha() is None]) == 2


def test_every_cell_of_the_heat_map_is_a_value_of_the_table(report: Report, page: str) -> None:
    ((_, subject),) = report.fisher.items()
    (data,) = [found for found in json_of(page) if "rows" in found]
    assert len(data["timesteps"]) == TIMESTEPS
    assert data["timesteps"][0] == int(subject.table.timesteps[0])
    assert data["timesteps"][-1] == int(subject.table.timesteps[-1])
    place = {int(t): k for k, t in enumerate(subject.table.timesteps)}
    assert set(data["rows"]) == set(subject.weights)
    for name, row in zip(data["rows"], data["values"], strict=True):
        wanted = [float(subject.table.entries[name].mean[place[t]]) for t in data["timesteps"]]
        assert row == pytest.approx(wanted, rel=6e-3, abs=1e-300)


def test_the_commands_lead_from_the_model_to_the_comparison(store: Path, report: Report, page: str) -> None:
    opened = Store(store)
    chain = {name for _, m, _, name in opened.lineage(opened.resolve("latest", ("comparison",))) if m}
    assert {row.key for row in report.artifacts if row.manifest} == chain
    assert all(key in page for key in chain)
    named = replace(
        report,
        artifacts=tuple(
            replace(r, manifest=r.manifest and replace(r.manifest, command=r.kind)) for r in report.artifacts
        ),
    )
    # In the order of their making, each once: a plan was made before any was quantized, and all were sampled by compare.
    order = ["dataset", "checkpoint", "fisher", "plan", "features", "samples", "quantized", "comparison"]
    commands = [command for command, _ in named.commands]
    assert sorted(commands) == sorted(order)
    assert [c for c in commands if c not in ("features", "samples", "quantized")] == [*order[:4], "comparison"]


def test_what_a_settings_file_said_can_be_read_in_the_report(store: Path, report: Report, page: str) -> None:
    """Rejects a command that cannot be given again because its file is elsewhere; a file named twice is shown once."""
    (made,) = [m for m in Store(store).manifests("comparison") if m.id == report.id]
    assert made.settings == (store.parent / "quick.toml").read_text()
    told = commands_text(report)
    assert told.count("#     epochs = 1") == 1
    assert as_html(told) in page
    first = [(command, settings) for command, settings in report.commands if settings]
    assert len(first) >= 1
    changed = replace(
        report,
        artifacts=tuple(
            replace(r, manifest=r.manifest and replace(r.manifest, command=f"fqdiff {r.key}", settings="a = 1\n"))
            for r in report.artifacts
        ),
    )
    lines = commands_text(changed).splitlines()
    assert lines[1:3] == ["#   its file of settings:", "#     a = 1"]
    assert lines[4] == f"#   its file of settings: that of {lines[0]}"


@pytest.mark.parametrize(
    ("refs", "models"),
    [((), 4), (("groups",), 4), (("full", "int2"), 4), (("float32", "int8", "full"), 4)],
)
def test_models_lead_to_the_latest_comparison_that_has_them(store: Path, refs: tuple[str, ...], models: int) -> None:
    opened = Store(store)
    found = find_comparison(opened, refs)
    assert report_of(store, *refs).comparison.models == models
    samples = found.input("model1")
    assert samples is not None
    assert find_comparison(opened, (samples.id, found.input("baseline").id)).id == found.id  # type: ignore[union-attr]
    assert find_comparison(opened, (found.id,)).id == found.id


@pytest.mark.parametrize("what", ["report", "plot pareto", "plot samples"])
def test_what_was_never_compared_says_how_to_compare_it(store: Path, tmp_path: Path, what: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    good(copy, "plan", "full", "--uniform", "int4", "--name", "new")
    result = call(copy, *what.split(), "full", "new")
    assert result.exit_code == 1
    assert "has all of: full new" in result.stderr
    assert "hint: fqdiff compare full new" in result.stderr
    first, second = (m.id for m in Store(copy).manifests("comparison"))
    assert call(copy, *what.split(), first, second).exit_code == 2
    assert "Traceback" not in call(tmp_path / "empty", *what.split()).stderr


def test_what_is_gone_is_left_out(store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    whole = report_of(copy)
    for row in whole.artifacts:
        if row.kind in ("fisher", "plan"):
            good(copy, "store", "rm", row.key, "--force")
    parsed = Page(html_page(report_of(copy)))
    assert [a["id"] for a in parsed.all("section")] == [s for s in SECTIONS if s not in ("fisher", "plans")]
    baseline = whole.row("baseline").samples
    good(copy, "store", "rm", baseline, "--force")
    for row in whole.models:
        good(copy, "store", "rm", row.model, "--force")
    parsed = Page(html_page(report_of(copy)))
    assert not parsed.problems
    assert [a["id"] for a in parsed.all("section")] == [
        "verdict",
        "models",
        "metrics",
        "curves",
        "lineage",
        "reproduce",
    ]
    assert call(copy, "plot", "pareto").exit_code == 1
    for row in whole.rows:
        call(copy, "store", "rm", row.samples, "--force")
    assert "## 4 models against" in markdown(report_of(copy))
    assert call(copy, "plot", "samples").exit_code == 1


def test_samples_take_the_room_there_is(report: Report) -> None:
    sizes = []
    for room in (10**7, 40_000, 9_000, 3_500):
        html = sample_section(report, room)
        sizes.append(len(html.encode()))
        assert sizes[-1] <= room
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 2
    assert sample_section(report, 100) == ""


# --- Markdown ----------------------------------------------------------------------------------------------------------


def test_markdown_holds_every_table(report: Report) -> None:
    text = markdown(report)
    for table in tables(report):
        assert f"### {table.title}" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == sum(2 + len(table.rows) for table in tables(report))
    assert all(command in text for command, _ in report.commands)


def test_hostile_text_stays_in_its_cell(hostile: Report) -> None:
    """Rejects an unescaped bar, which would add a column, and a line break, which would end the table."""
    lines = markdown(hostile).splitlines()
    for table in tables(hostile):
        start = lines.index(f"### {table.title}") + 2
        for line in lines[start : start + 2 + len(table.rows)]:
            assert len(re.findall(r"(?<!\\)\|", line)) == len(table.header) + 1
    outside = "\n".join(lines).partition("```")[0]
    assert not re.findall(r"(?<!\\)<", outside)
    fences = [line for line in lines if line.startswith("```")]
    assert len(fences) == 2


@given(st.text())
def test_escaped_text_has_no_markup_left(text: str) -> None:
    escaped = escape(text)
    assert "\n" not in escaped
    assert re.sub(r"\\([\\`*_{}\[\]<>#|~&$])", r"\1", escaped) == " ".join(text.split())


# --- commands ----------------------------------------------------------------------------------------------------------


def test_report_writes_one_file_and_says_where(store: Path, tmp_path: Path, page: str, report: Report) -> None:
    data = good(store, "report")
    path = store / "pictures" / f"report-{report.id}.html"
    assert data["file"] == str(path)
    assert path.read_text() == page
    assert data["verdict"] == verdict(report)
    target = tmp_path / "r.html"
    target.write_text("mine")
    result = call(store, "report", "int8", "groups", "--output", str(target))
    assert result.exit_code == 2
    assert "exists, and is another" in result.stderr
    assert target.read_text() == "mine"


def test_markdown_goes_to_stdout_or_a_file(store: Path, tmp_path: Path, report: Report) -> None:
    assert call(store, "report", "--markdown").stdout == markdown(report) + "\n"
    target = tmp_path / "r.md"
    good(store, "report", "--markdown", "--output", str(target))
    assert target.read_text() == markdown(report)


@pytest.mark.parametrize("name", ["pareto", "samples"])
def test_pictures_alone_are_png_and_svg(store: Path, tmp_path: Path, name: str) -> None:
    data = good(store, "plot", name, "--output", str(tmp_path / "out"))
    assert data["files"] == [str(tmp_path / "out" / f"{name}.{suffix}") for suffix in ("png", "svg")]
    png, svg = ((tmp_path / "out" / f"{name}.{suffix}").read_bytes() for suffix in ("png", "svg"))
    assert png.startswith(b"\x89PNG")
    assert str(data["id"]).encode() in svg
    good(store, "plot", name, "--output", str(tmp_path / "out"))


# --- pictures ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), max_size=8))
def test_the_front_is_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    dots = [Dot(str(k), size, float(value), value, value) for k, (size, value) in enumerate(points)]
    found = front(dots)
    beaten = {
        (a.size, a.value)
        for a in dots
        for b in dots
        if b.size <= a.size and b.value <= a.value and (b.size, b.value) != (a.size, a.value)
    }
    assert {(d.size, d.value) for d in found} == {(d.size, d.value) for d in dots} - beaten
    assert [d.size for d in found] == sorted({d.size for d in found})


def test_what_is_made_stands_right_of_what_it_was_made_from(report: Report) -> None:
    nodes = lineage_nodes(report)
    places = layout(nodes).boxes
    assert len(set(places.values())) == len(nodes)
    for key, node in nodes.items():
        assert all(places[source][0] < places[key][0] for source in node.sources)


def test_no_line_of_the_lineage_runs_behind_a_box(report: Report) -> None:
    """Rejects straight lines to what was made columns away: each passes a column in a lane of its own, between the boxes,
    and lines from one column to the next stay in the gap. All lines of a box can be followed from it.
    """
    nodes = lineage_nodes(report)
    found = layout(nodes)
    for (_, number), (x, y) in found.lanes.items():
        assert x == number
        assert all(abs(y - row) >= 0.5 + LANE / 2 - 1e-9 for column, row in found.boxes.values() if column == x)
    ends = lines_of(nodes, found)
    assert all(
        start[0] % 1 == pytest.approx(SIDE) and end[0] - start[0] == pytest.approx(1 - 2 * SIDE) for start, end in ends
    )
    assert len(set(ends)) == len(ends)
    for key, node in nodes.items():
        for source in node.sources:
            first, last = found.boxes[source][0], found.boxes[key][0]
            assert all((source, number) in found.lanes for number in range(first + 1, last))


def test_boxes_of_the_lineage_name_what_they_hold_with_its_id(report: Report) -> None:
    """Rejects a name in the place of the id, and samples that do not say whose they are."""
    nodes = lineage_nodes(report)
    for key, node in nodes.items():
        assert node.lines[-1] == key.partition("/")[2]
    for row in report.rows:
        assert nodes[f"samples/{row.samples}"].lines[0] == f"of {row.label}"
    assert nodes[report.row("baseline").model].lines[0] == "full"


def test_a_loop_that_a_stranger_wrote_is_drawn_too() -> None:
    nodes = {"a": Node("plan", ("a",), ("b",), True), "b": Node("plan", ("b",), ("a",), True)}
    assert len(set(layout(nodes).boxes.values())) == 2
    graph(nodes, "")


def test_differences_are_magnified_without_wrapping_round() -> None:
    """Rejects a difference of uint8, where 0 - 1 is 255."""
    images = torch.tensor([0, 1, 200, 255], dtype=torch.uint8).reshape(1, 1, 2, 2)
    others = torch.tensor([1, 0, 100, 255], dtype=torch.uint8).reshape(1, 1, 2, 2)
    assert magnified_difference(images, others, 8).flatten().tolist() == [8, 8, 255, 0]


# --- in a browser ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium: set FQDIFF_CHROMIUM, or have chromium or google-chrome on PATH")
    with Browser(program) as found:
        yield found


@pytest.fixture
def opened(browser: Browser, page: str, tmp_path: Path) -> Browser:
    path = tmp_path / "report.html"
    path.write_text(page)
    browser.problems.clear()
    browser.requests.clear()
    browser.look(1280, 900, "light")
    browser.open(path)
    return browser


def quiet(browser: Browser, path: Path) -> None:
    """Nothing on the console, and nothing asked for but the file."""
    assert browser.problems == []
    assert [url for url in browser.requests if not url.startswith("data:")] == [
        (path / "report.html").resolve().as_uri()
    ]


def column(browser: Browser, number: int) -> list[str]:
    rows = f"[...document.querySelectorAll('#models tbody tr')].map(r => r.children[{number}].textContent)"
    return [str(text) for text in browser.run(rows)]


def test_the_page_renders_in_silence(opened: Browser, tmp_path: Path) -> None:
    for width in (1280, 390):
        opened.look(width, 844, "dark")
        assert opened.run("document.documentElement.scrollWidth <= innerWidth")
        assert opened.run("document.querySelectorAll('svg').length") == 7
    assert opened.run("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    quiet(opened, tmp_path)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_a_picture_of_the_page_has_something_in_every_section(
    opened: Browser, tmp_path: Path, width: int, scheme: str
) -> None:
    """Rejects a page that is blank, or has a section without its picture: as it is drawn, and not as it is written."""
    opened.look(width, 900, scheme)
    opened.settle()
    path = tmp_path / "page.png"
    opened.screenshot(path)
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("L")).astype(int)
    boxes = opened.run(
        "[...document.querySelectorAll('section')].map(s => { const b = s.getBoundingClientRect();"
        " return [s.id, ...[b.left, b.top + scrollY, b.right, b.bottom + scrollY].map(Math.round)] })"
    )
    assert [name for name, *_ in boxes] == SECTIONS
    for name, left, top, right, bottom in boxes:
        section = pixels[top + 8 : bottom - 8, left + 8 : right - 8]
        assert section.size, name
        ground = np.bincount(section.ravel()).argmax()
        assert (ground > 128) == (scheme == "light"), name
        drawn = np.abs(section - ground) > 40
        assert drawn.mean() > 0.005, name
        assert all(part.any() for part in np.array_split(drawn, 3)), name


def test_what_is_wider_than_a_phone_says_so_and_can_be_pointed_at(opened: Browser, tmp_path: Path) -> None:
    """Rejects titles and legends in pictures that scroll, and an overlay that is placed by the screen and not by the picture."""
    opened.look(390, 844, "light")
    opened.settle()
    wide, hidden = opened.run(
        "(() => { const all = [...document.querySelectorAll('.scroll')], says = s => 'wide' in s.dataset;"
        " return [all.filter(says).length, all.filter(s => s.scrollWidth > s.clientWidth + 1 && !says(s)).length] })()"
    )
    assert wide > 4
    assert hidden == 0
    assert opened.run("[...document.querySelectorAll('.legend, h3')].every(e => e.scrollWidth <= e.clientWidth)")
    left, right, frame_left, frame_right = opened.run(
        "(() => { const a = document.querySelector('#curves .places').getBoundingClientRect(),"
        " b = document.querySelector('#curves .frame').getBoundingClientRect(); return [a.left, a.right, b.left, b.right] })()"
    )
    (axes, *_) = [found["axes"] for found in json_of((tmp_path / "report.html").read_text()) if "texts" in found]
    assert left == pytest.approx(frame_left + axes[0] * (frame_right - frame_left), abs=1)
    assert right == pytest.approx(frame_left + (axes[0] + axes[2]) * (frame_right - frame_left), abs=1)
    assert frame_right > 390
    more = "document.querySelector('#curves .scroll').hasAttribute('data-more')"
    assert opened.run(more)
    opened.run("document.querySelector('#curves .scroll').scrollLeft = 9999")
    opened.settle()
    assert not opened.run(more)
    quiet(opened, tmp_path)


def test_tables_fit_a_desktop_and_heads_stand_over_their_cells(opened: Browser, tmp_path: Path) -> None:
    assert opened.run(
        "[...document.querySelectorAll('#models .scroll, #metrics .scroll')].every(s => !('wide' in s.dataset))"
    )
    ends = opened.run(
        "[...document.querySelectorAll('#models thead th, #metrics thead th')].map(h => [h.classList.contains('words'),"
        " getComputedStyle(h).textAlign, h.cellIndex])"
    )
    assert ["left" if words or index == 0 else "right" for words, _, index in ends] == [align for _, align, _ in ends]
    assert any(words and index for words, _, index in ends)
    quiet(opened, tmp_path)


def test_a_table_is_sorted_by_keyboard(opened: Browser, tmp_path: Path) -> None:
    before = column(opened, 2)
    opened.run("document.querySelectorAll('#models th button')[2].focus()")
    opened.press("Enter", 13)
    sizes = [int(text.replace(",", "")) for text in column(opened, 2)]
    assert sizes == sorted(sizes) != [int(text.replace(",", "")) for text in before]
    opened.press("Enter", 13)
    assert [int(text.replace(",", "")) for text in column(opened, 2)] == sorted(sizes, reverse=True)
    assert opened.run("document.querySelectorAll('#models th')[2].getAttribute('aria-sort')") == "descending"
    opened.run("document.querySelectorAll('#models th button')[4].click()")
    errors = column(opened, 4)
    assert errors[-1] == ""
    opened.run("document.querySelectorAll('#models th button')[4].click()")
    assert column(opened, 4)[-1] == ""  # what has no value is last either way
    assert column(opened, 4)[:-1] == errors[-2::-1]
    quiet(opened, tmp_path)


def test_the_slider_shows_one_model_at_a_time(opened: Browser, report: Report, tmp_path: Path) -> None:
    shown = "[...document.querySelectorAll('.slide')].filter(s => s.children[0].offsetParent).map(s => s.dataset.label)"
    opened.run("document.getElementById('samples-slider').focus()")
    for row in report.models:
        assert opened.run(shown) == [row.label]
        assert opened.run("document.querySelector('#samples output').textContent") == row.label
        opened.press("ArrowRight", 39)
    assert (
        opened.run("document.getElementById('samples-slider').getAttribute('aria-valuetext')")
        == report.models[-1].label
    )
    opened.look(1280, 900, "light", "print")
    assert opened.run(shown) == [row.label for row in report.models]
    quiet(opened, tmp_path)


def test_dots_and_boxes_tell_what_they_are(opened: Browser, report: Report, tmp_path: Path) -> None:
    opened.run("document.querySelector('#pareto [data-tip]').focus()")
    told = opened.run("document.getElementById('tip').textContent")
    assert report.models[0].label in told
    assert f"{report.models[0].file_bytes:,} bytes" in told
    opened.press("Escape", 27)
    assert opened.run("document.getElementById('tip').hidden")
    opened.run("document.getElementById('lineage').scrollIntoView()")
    opened.settle()
    x, y = opened.run(
        "(() => { const b = [...document.querySelectorAll('#lineage [data-tip]')].pop().getBoundingClientRect();"
        " return [b.left + b.width / 2, b.top + b.height / 2] })()"
    )
    opened.point(x, y)
    assert "comparison/" in opened.run("document.getElementById('tip').textContent")
    assert not opened.run("document.getElementById('tip').hidden")
    quiet(opened, tmp_path)


def test_the_heat_map_tells_the_cell_under_pointer_and_cursor(opened: Browser, report: Report, tmp_path: Path) -> None:
    ((_, subject),) = report.fisher.items()
    names = [name for members in subject.weight_groups.values() for name in members]
    opened.run("document.querySelector('.cells').focus()")
    for key, code in (("ArrowDown", 40), ("ArrowDown", 40), ("ArrowRight", 39), ("ArrowLeft", 37)):
        opened.press(key, code)
    value = float(subject.table.entries[names[2]].mean[0])
    first = int(subject.table.timesteps[0])
    told = opened.run("document.querySelector('.heat .readout').textContent")
    assert told.startswith(f"{names[2]}, t = {first}: ")
    assert float(told.rpartition(" ")[2]) == pytest.approx(value, rel=6e-3)
    opened.run("document.querySelector('.cells').scrollIntoView({block: 'end'})")
    opened.settle()
    x, y, width, height = opened.run(
        "(() => { const b = document.querySelector('.cells').getBoundingClientRect();"
        " return [b.left, b.top, b.width, b.height] })()"
    )
    opened.point(x + width - 1, y + height - 1)
    last = int(subject.table.timesteps[-1])
    assert opened.run("document.querySelector('.heat .readout').textContent").startswith(f"{names[-1]}, t = {last}: ")
    quiet(opened, tmp_path)


def test_curves_tell_the_point_under_pointer_and_cursor(opened: Browser, report: Report, tmp_path: Path) -> None:
    value = report.comparison
    opened.run("document.querySelector('#curves .places').focus()")
    for key, code in (("ArrowRight", 39), ("ArrowRight", 39), ("ArrowLeft", 37)):
        opened.press(key, code)
    second = value.noise_error[2].points[1]
    told = opened.run("document.querySelector('#curves .readout').textContent")
    assert told.startswith(f"t = {second.at}; groups: ")
    assert f"int2: {second.value:.2e} ± " in told
    opened.press("End", 35)
    told = opened.run("document.querySelector('#curves .readout').textContent")
    assert told.startswith(f"t = {value.noise_error[0].points[-1].at}; ")
    opened.run("[...document.querySelectorAll('#curves .places')].pop().scrollIntoView({block: 'center'})")
    opened.settle()
    x, y, width, height = opened.run(
        "(() => { const b = [...document.querySelectorAll('#curves .places')].pop().getBoundingClientRect();"
        " return [b.left, b.top, b.width, b.height] })()"
    )
    opened.point(x + width - 2, y + height / 2)
    tip = opened.run("document.getElementById('tip').textContent")
    assert tip.startswith("step 3\n")
    assert f"int2: {value.divergence[2].points[-1].value:.2e} ± " in tip
    assert not opened.run("[...document.querySelectorAll('#curves .line')].pop().hidden")
    quiet(opened, tmp_path)


def test_the_theme_follows_the_system_until_the_button_is_used(opened: Browser, tmp_path: Path) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    light = opened.run(ground)
    opened.look(1280, 900, "dark")
    dark = opened.run(ground)
    assert light != dark
    assert opened.run("document.getElementById('theme').textContent") == "Light"
    opened.run("document.getElementById('theme').click()")
    assert opened.run(ground) == light
    opened.look(1280, 900, "dark", "print")
    assert opened.run("getComputedStyle(document.documentElement).getPropertyValue('--card').trim()") == "#fff"
    quiet(opened, tmp_path)


def test_hostile_text_runs_nothing(browser: Browser, hostile_page: str, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(hostile_page)
    browser.problems.clear()
    browser.requests.clear()
    browser.open(path)
    assert browser.run("typeof window.hacked") == "undefined"
    quiet(browser, tmp_path)
