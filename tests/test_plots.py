"""Pictures of Fisher tables, and ``fqdiff fisher top``."""

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

from fqdiff.cli.app import app
from fqdiff.cli.fisher_top import parameter_rows, ranked
from fqdiff.errors import ConfigError, LineageError
from fqdiff.models.registry import parameter_blocks
from fqdiff.pipeline import Runner
from fqdiff.rng import generator
from fqdiff.store.store import Store
from fqdiff.values import Checkpoint, FisherEntry, FisherTable, TrajectoryEntry
from fqdiff.viz.curves import block_curves, block_mean
from fqdiff.viz.figures import DECADES, log_limits, render, short_names
from fqdiff.viz.fisher import DRAW, OF_ENTRIES, Subject, applicable
from fqdiff.viz.maps import cell_edges, log_map, relative_error, scaled_map, scaled_to_maximum

ID = "fisher 0123456789abcdef"


def entry(block: str, mean: Tensor, numel: int = 1, error: float = 0.3) -> FisherEntry:
    empty = torch.zeros(len(mean), 0, dtype=torch.float64)
    return FisherEntry(block, numel, mean, error * mean, 2 * mean, empty)


def random_table(
    names: dict[str, tuple[str, int]], timesteps: int, decades: float = 6.0, samples: int = 4
) -> FisherTable:
    """Values spread evenly over ``decades``, falling with t; every seventh tensor is exactly 0 at every third timestep."""
    entries = {}
    for k, (name, (block, numel)) in enumerate(names.items()):
        mean = 10 ** (decades * (torch.rand(timesteps, dtype=torch.float64, generator=generator(0, name)) - 1))
        mean *= torch.logspace(3, 3 - decades / 2, timesteps, dtype=torch.float64)
        if k % 7 == 0:
            mean[::3] = 0
        entries[name] = entry(block, mean, numel)
    t = torch.linspace(0, 999, timesteps, dtype=torch.float64).round().long()
    return FisherTable("empirical", t, samples, entries)


def table_of(checkpoint: Checkpoint, timesteps: int, decades: float = 6.0) -> FisherTable:
    blocks = parameter_blocks(checkpoint.network())
    return random_table({n: (blocks[n], t.numel()) for n, t in checkpoint.tensors.items()}, timesteps, decades)


def with_extras(table: FisherTable) -> FisherTable:
    """The same with layer outputs, and with a sampler run whose errors reach 0."""
    activations = {n.removesuffix(".weight"): e for n, e in table.entries.items() if n.endswith(".weight")}
    trajectory = {
        name: TrajectoryEntry(
            e.block, e.numel, mean := float(e.mean.mean()), 1.1 * mean, 9 * mean, torch.ones(2), torch.full((5,), mean)
        )
        for name, e in table.entries.items()
    }
    return replace(table, activations=activations, trajectory=trajectory)


def words(svg: bytes) -> list[str]:
    """All text of an SVG file; raises where it is not XML."""
    return [text for element in ElementTree.fromstring(svg).iter() if (text := (element.text or "").strip())]


# --- numbers -----------------------------------------------------------------------------------------------------------


def test_each_timestep_is_scaled_to_its_largest_tensor() -> None:
    """Rejects scaling per tensor, over the whole table, and a minimum taken away."""
    values = np.array([[1.0, 0.0, 5.0], [4.0, 0.0, 2.0], [2.0, 0.0, 0.0]])
    assert scaled_to_maximum(values).tolist() == [[0.25, 0, 1], [1, 0, 0.4], [0.5, 0, 0]]


def test_a_blocks_mean_counts_every_weight_once_and_its_error_is_the_largest_possible() -> None:
    """Rejects the mean of tensor means, and errors added in quadrature."""
    one = FisherEntry("1", 30, *(torch.tensor([v], dtype=torch.float64) for v in (2.0, 0.4, 9.0)), torch.zeros(1, 0))
    two = FisherEntry("1", 10, *(torch.tensor([v], dtype=torch.float64) for v in (6.0, 1.2, 9.0)), torch.zeros(1, 0))
    mean, error = block_mean([one, two])
    assert mean.tolist() == [(30 * 2 + 10 * 6) / 40]
    assert error.tolist() == pytest.approx([(30 * 0.4 + 10 * 1.2) / 40])


def test_the_error_of_tensors_that_vary_as_one_is_reached() -> None:
    """Samples of two tensors, one three times the other: the block's own standard error equals the combined one."""
    samples = torch.rand(16, dtype=torch.float64, generator=generator(0, "samples"))

    def measured(values: Tensor, numel: int) -> FisherEntry:
        error = values.std() / len(values) ** 0.5
        return FisherEntry("1", numel, values.mean()[None], error[None], values.max()[None], torch.zeros(1, 0))

    _, error = block_mean([measured(samples, 5), measured(3 * samples, 15)])
    whole = (5 * samples + 15 * 3 * samples) / 20
    assert error[0] == pytest.approx(float(whole.std() / 4))


def test_relative_errors_are_in_per_cent_and_unknown_where_the_mean_is_zero() -> None:
    found = relative_error(np.array([[4.0, 0.0]]), np.array([[1.0, 0.0]]))
    assert found[0, 0] == 25
    assert np.isnan(found[0, 1])


@pytest.mark.parametrize(
    ("values", "limits"),
    [
        ([0.0, 1e-3, 1e2], (1e-3, 1e2)),
        ([1e-20, 1e3], (1e3 * 10.0**-DECADES, 1e3)),
        ([0.0, 0.0], (0.1, 1.0)),
        ([5.0, 5.0], (0.5, 5.0)),
    ],
)
def test_log_scales_leave_out_zeros_and_what_is_far_below_the_largest(
    values: list[float], limits: tuple[float, float]
) -> None:
    assert log_limits(np.array(values)) == pytest.approx(limits)


def test_cells_meet_half_way_between_timesteps() -> None:
    assert cell_edges(np.array([0.0, 10.0, 30.0])).tolist() == [-5, 5, 20, 40]
    assert cell_edges(np.array([7.0])).tolist() == [6.5, 7.5]


def test_names_lose_what_their_block_shares() -> None:
    assert short_names(["block1.res1.conv1.weight", "block1.res2.conv1.weight"]) == ["res1.conv1", "res2.conv1"]
    assert short_names(["stem.conv.weight"]) == ["conv"]
    assert short_names(["head.late", "head.output"]) == ["late", "output"]


# --- pictures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timesteps", [1, 40])
@pytest.mark.parametrize("name", list(DRAW))
def test_every_picture_says_what_it_shows_and_of_what(checkpoint: Checkpoint, name: str, timesteps: int) -> None:
    """As PNG and as SVG, with zeros and over 23 decades; a second drawing has the same bytes.

    Those would differ by the layout solver's last bits, by a second layout between PNG and SVG, and by random ids.
    """
    subject = Subject(with_extras(table_of(checkpoint, timesteps, 23)), checkpoint, ID)
    figure = DRAW[name](subject)
    png, svg = render(figure, "png"), render(figure, "svg")
    assert png.startswith(b"\x89PNG")
    if timesteps == 1:
        again = DRAW[name](subject)
        assert (render(again, "svg"), render(again, "png")) == (svg, png)  # in the other order, too
    text = words(svg)
    assert ID in text
    joined = " ".join(text)
    for part in LABELS[name]:
        assert part in joined, part


F_T = "mean squared per-sample gradient F_t"
T_AXIS = "timestep t (0 = image, T-1 = noise)"
LABELS = {
    "heatmap-linear": [F_T, T_AXIS, "empirical Fisher", "x 4 samples", "block 3", "res1.conv1", "brightest"],
    "heatmap-log": [F_T, T_AXIS, "0: grey", f"{DECADES} decades below the largest", "stem", "head"],
    "heatmap-minmax": ["F_t / largest F_t of the timestep", T_AXIS, "block 6"],
    "blocks": [F_T, T_AXIS, "± 1 standard error", "block 1", "head"],
    "tensors": [F_T, T_AXIS, "block 5", "attention.qkv"],
    "weights": ["mean |w| of the tensor", "mean |w| of the channel", "output channel", "block 4"],
    "histograms": ["weight", "weights per bin of", "block 2: "],
    "error": ["standard error / mean", "in %", T_AXIS, "(grey: mean is 0)"],
    "trajectory": ["whole sampler run", "5 runs", "± 1 standard error", "block 2"],
    "activations": ["gradient of the output", T_AXIS, "layer's output"],
}


def large_table(tensors: int, timesteps: int) -> FisherTable:
    names = {f"down.{k // 40}.layer{k % 40}.conv.weight": (f"down.{k // 40}", 9 * (k + 1)) for k in range(tensors)}
    return random_table(names, timesteps)


@pytest.mark.parametrize(("tensors", "timesteps"), [(75, 1000), (1000, 30)])
def test_labels_of_large_tables_do_not_overlap(tensors: int, timesteps: int) -> None:
    table = large_table(tensors, timesteps)
    figure = log_map(table, table.entries, ID)
    png = render(figure, "png")
    assert png.startswith(b"\x89PNG")
    axes = figure.axes[0]
    (blocks,) = axes.child_axes
    for labels in (axes.get_yticklabels(), blocks.get_yticklabels(), axes.get_xticklabels()):
        boxes = [label.get_window_extent() for label in labels if label.get_text()]
        assert len(boxes) >= 2
        assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))
    assert len(axes.get_yticklabels()) >= 40


def test_a_table_of_nothing_but_zeros_is_drawn(checkpoint: Checkpoint) -> None:
    table = table_of(checkpoint, 3)
    zeros = {n: entry(e.block, torch.zeros(3, dtype=torch.float64), e.numel) for n, e in table.entries.items()}
    subject = Subject(with_extras(replace(table, entries=zeros)), checkpoint, ID)
    for name in OF_ENTRIES | {"trajectory", "activations"}:
        assert render(DRAW[name](subject), "png")


def test_the_papers_picture_leaves_out_stem_and_head(checkpoint: Checkpoint) -> None:
    table = table_of(checkpoint, 4)
    entries = {n: e for n, e in table.entries.items() if n.endswith(".weight")}
    (mesh,) = scaled_map(table, entries, ID).axes[0].collections
    inside = [e for e in entries.values() if e.block not in ("stem", "head")]
    assert mesh.get_array().shape == (len(inside), 4)
    assert float(mesh.get_array().max()) == 1


def test_one_line_per_block_and_its_band_around_it(checkpoint: Checkpoint) -> None:
    table = table_of(checkpoint, 5)
    axes = block_curves(table, ID).axes[0]
    assert {line.get_label() for line in axes.lines} == {"stem", "head", *(f"block {b}" for b in "123456")}
    line = next(line for line in axes.lines if line.get_label() == "block 3")
    mean, _ = block_mean([e for e in table.entries.values() if e.block == "3"])
    assert line.get_ydata().tolist() == mean.tolist()


def test_a_name_from_a_strangers_file_is_no_formula() -> None:
    """``$`` would start one, and matplotlib raises where it is wrong; control characters are no XML."""
    names = {r"a.$\frac{$.weight": ("1", 1), "a.\x00\x1b.weight": ("$x$", 1), "a." + 500 * "x": ("<b>", 1)}
    table = random_table(names, 2)
    text = words(render(log_map(replace(table, kind="$_$"), table.entries, "$^$"), "svg"))
    assert {"$^$", "$x$", "<b>"} <= set(text)
    assert max(len(t) for t in text) < 120


def test_pictures_need_values_and_the_tables_own_checkpoint(checkpoint: Checkpoint) -> None:
    table = table_of(checkpoint, 2)
    assert applicable(table) == [n for n in DRAW if n not in ("trajectory", "activations")]
    run_only = replace(with_extras(table), entries={}, activations={})
    assert applicable(run_only) == ["weights", "histograms", "trajectory"]
    for name in applicable(run_only):
        assert render(DRAW[name](Subject(run_only, checkpoint, ID)), "svg")
    with pytest.raises(LineageError):
        Subject(large_table(3, 2), checkpoint, ID)


# --- fisher top --------------------------------------------------------------------------------------------------------


def small_table() -> FisherTable:
    def row(
        block: str, numel: int, means: Sequence[float], errors: Sequence[float], top: Sequence[float]
    ) -> FisherEntry:
        values = (torch.tensor(v, dtype=torch.float64) for v in (means, errors, top))
        return FisherEntry(block, numel, *values, torch.zeros(2, 0))

    entries = {
        "a": row("1", 10, [1.0, 3.0], [0.1, 0.3], [5.0, 7.0]),
        "b": row("2", 100, [0.5, 0.5], [0.4, 0.2], [9.0, 9.0]),
        "c": row("2", 1, [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]),
    }
    return FisherTable("empirical", torch.tensor([0, 500]), 4, entries)


def test_parameters_are_ranked_by_what_was_asked() -> None:
    rows = parameter_rows(small_table(), "mean")
    a, b, c = rows
    assert (a["mean"], a["standard_error"], a["max"], a["sum"]) == pytest.approx((2.0, 0.2, 6.0, 20.0))
    assert (a["share"], b["share"], c["share"]) == pytest.approx((20 / 70, 50 / 70, 0))
    assert (a["relative_error"], b["relative_error"], c["relative_error"]) == pytest.approx((0.1, 0.6, 0))
    for by, first in (("mean", "a"), ("sum", "b"), ("max", "b"), ("relative-error", "b")):
        assert next(r["parameter"] for r in ranked(rows, by)) == first
        assert ranked(rows, by)[-1]["parameter"] == "c"


def test_one_timestep_is_read_or_the_nearest_is_named() -> None:
    assert parameter_rows(small_table(), "500")[0]["mean"] == 3
    with pytest.raises(ConfigError, match="no timestep 400") as caught:
        parameter_rows(small_table(), "400")
    assert "500" in caught.value.hint
    for wrong in ("first", "-1", "9" * 5000, "run"):
        with pytest.raises(ConfigError):
            parameter_rows(small_table(), wrong)


def test_the_samplers_run_is_ranked_where_there_is_one() -> None:
    table = with_extras(small_table())
    a = parameter_rows(table, "run")[0]
    assert (a["mean"], a["relative_error"], a["max"]) == pytest.approx((2.0, 1.1, 18.0))
    with pytest.raises(ConfigError, match="no single timesteps"):
        parameter_rows(replace(table, entries={}), "mean")


# --- commands ----------------------------------------------------------------------------------------------------------


def call(store: Path, *arguments: str) -> Result:
    return CliRunner(env={"FQDIFF_STORE": str(store), "COLUMNS": "200"}).invoke(app, list(arguments))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plots") / "store"
    for command in (
        ["train", "--preset", "tiny", "--dataset", "mnist5k", "--steps", "5"],
        ["fisher", "--timesteps", "3", "--samples", "2"],
    ):
        result = call(folder, *command, "--quiet")
        assert result.exit_code == 0, result.stderr
    return folder


def test_plot_fisher_writes_what_it_says(store: Path) -> None:
    result = call(store, "plot", "fisher", "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    (manifest,) = Store(store).manifests("fisher")
    table = Runner(Store(store)).load(manifest)
    assert data["id"] == manifest.id
    assert data["pictures"] == applicable(table)
    folder = store / "pictures" / f"fisher-{manifest.id}"
    assert data["files"] == [str(folder / f"{n}.{f}") for n in applicable(table) for f in ("png", "svg")]
    assert sorted(data["files"]) == sorted(str(p) for p in folder.iterdir())
    assert any(manifest.id in text for text in words((folder / "blocks.svg").read_bytes()))
    before = {p: p.read_bytes() for p in folder.iterdir()}
    assert call(store, "plot", "fisher", "--picture", "blocks").exit_code == 0
    assert {p: p.read_bytes() for p in folder.iterdir()} == before


def test_plot_fisher_draws_what_is_asked_where_it_is_asked(store: Path, tmp_path: Path) -> None:
    arguments = ["plot", "fisher", "--picture", "error", "--picture", "blocks", "--format", "png", "--output"]
    target = tmp_path / "new" / "folder"
    result = call(store, *arguments, str(target))
    assert result.stdout.splitlines() == [str(target / "error.png"), str(target / "blocks.png")]
    assert sorted(p.name for p in target.iterdir()) == ["blocks.png", "error.png"]
    assert call(store, *arguments, str(target)).exit_code == 0
    (target / "blocks.png").write_bytes(b"mine")
    assert call(store, *arguments, str(target)).exit_code == 2
    assert (target / "blocks.png").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plot", "fisher", "--picture", "pie"], "unknown picture 'pie'"),
        (["plot", "fisher", "--picture", "trajectory"], "has no values for 'trajectory'"),
        (["plot", "fisher", "--format", "gif"], "unknown format 'gif'"),
        (["plot", "fisher", "--picture", "blocks", "--output", f"{__file__}/x"], "cannot write"),
        (["fisher", "top", "--by", "name"], "cannot rank by 'name'"),
        (["fisher", "top", "--at", "1"], "no timestep 1"),
    ],
)
def test_what_cannot_be_drawn_or_listed_is_one_line_and_a_hint(store: Path, arguments: list[str], message: str) -> None:
    result = call(store, *arguments, "--quiet")
    assert result.exit_code == 2
    first, second = result.stderr.splitlines()
    assert message in first
    assert second.startswith("hint: ")


def test_fisher_top_lists_the_highest_and_their_share(store: Path) -> None:
    result = call(store, "fisher", "top", "--k", "4", "--by", "sum", "--json")
    data = json.loads(result.stdout)
    sums = [row["sum"] for row in data["parameters"]]
    assert len(sums) == 4
    assert sums == sorted(sums, reverse=True)
    (manifest,) = Store(store).manifests("fisher")
    assert data["id"] == manifest.id
    text = call(store, "fisher", "top", manifest.id, "--k", "4", "--by", "sum").stdout
    assert all(row["parameter"] in text for row in data["parameters"])
    share = re.search(r"together ([\d.]+)% of the sum", text)
    assert share is not None
    assert float(share[1]) == pytest.approx(100 * sum(row["share"] for row in data["parameters"]), abs=0.06)
