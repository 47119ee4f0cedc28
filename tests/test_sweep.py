"""``fqdiff sweep`` from end to end, on the tiny preset."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from fqdiff.cli.session import Session
from fqdiff.cli.sweep_file import make_cells, read_sweep
from fqdiff.context import Context
from fqdiff.errors import ConfigError
from fqdiff.pipeline import Runner, Step
from fqdiff.stages import sample as sample_stage
from fqdiff.store.manifest import Manifest, Recipe
from fqdiff.store.store import Store
from fqdiff.sweep.cost import TIMED_STEPS, estimated_seconds, measured_rates, sampling_rate, work
from fqdiff.sweep.grid import expand
from fqdiff.sweep.processes import Died, run_in_processes
from fqdiff.values import Checkpoint
from tests.dying_worker import fail_at_two
from tests.test_cli import call, good

SWEEPS = Path(__file__).parent.parent / "examples" / "sweeps"
HEAD = '[sweep]\nmodel = "tiny"\nfeatures = "digits"\n'
QUICK = "[sample]\nsteps = 2\ncount = 20\n[classifier]\nepochs = 1\n[compare]\nresamples = 20\n"
TABLE = "[fisher.loss]\ntimesteps = 4\nsamples = 2\n"
SMALL = (
    HEAD + QUICK + TABLE + '[[plans]]\nuniform = "int4"\n[[plans]]\nratio = [0.25, 0.5]\nlow = "int8"\nat = "mean"\n'
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a model."""
    folder = tmp_path_factory.mktemp("sweep") / "store"
    good(folder, "train", "--preset", "tiny", "--dataset", "mnist5k", "--steps", "5", "--name", "tiny")
    return folder


@pytest.fixture
def store(base: Path, tmp_path: Path) -> Path:
    """A store of one's own with that model."""
    return Path(shutil.copytree(base, tmp_path / "store"))


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "small.toml"
    path.write_text(text)
    return str(path)


@pytest.fixture(scope="module")
def swept(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A store after the small sweep, and what it printed."""
    folder = tmp_path_factory.mktemp("swept")
    store = Path(shutil.copytree(base, folder / "store"))
    return store, good(store, "sweep", written(folder, SMALL))


def without_times(data: dict[str, Any]) -> list[dict[str, str]]:
    with Path(data["csv"]).open(newline="") as file:
        return [
            {name: value for name, value in row.items() if name != "making_seconds"} for row in csv.DictReader(file)
        ]


def ids(store: Path) -> set[str]:
    return {m.id for m in Store(store).manifests()}


# --- the grid --------------------------------------------------------------------------------------------------------


def test_a_list_is_a_grid_and_the_first_setting_varies_slowest() -> None:
    points = list(expand({"ratio": [0.1, 0.2], "low": ["int8", "int4"], "high": "float16"}, set(), "plans[1]"))
    assert [(p["ratio"], p["low"], p["high"]) for p in points] == [
        (0.1, "int8", "float16"), (0.1, "int4", "float16"), (0.2, "int8", "float16"), (0.2, "int4", "float16"),
    ]  # fmt: skip


def test_a_setting_that_is_a_list_needs_a_list_of_lists_for_a_grid() -> None:
    one = list(expand({"formats": ["int8", "int4"]}, {"formats"}, "plans[1]"))
    two = list(expand({"formats": [["int8", "int4"], ["int2"]]}, {"formats"}, "plans[1]"))
    assert [p["formats"] for p in one] == [["int8", "int4"]]
    assert [p["formats"] for p in two] == [["int8", "int4"], ["int2"]]


@pytest.mark.parametrize(("name", "cells"), [("paper", 13 * 3 * 2), ("bits", 24), ("budget", 9 * 6 * 2)])
def test_the_shipped_sweeps_have_the_cells_they_speak_of(name: str, cells: int, tmp_path: Path) -> None:
    found = make_cells(Session(tmp_path / "store", quiet=True), read_sweep(SWEEPS / f"{name}.toml"), None)
    assert len(found) == cells
    assert len({cell.artifacts["comparison"].id for cell in found}) == cells
    assert not (tmp_path / "store").exists()


def test_the_file_in_the_docs_is_one(tmp_path: Path) -> None:
    page = (SWEEPS.parent.parent / "docs" / "sweeps.md").read_text()
    found = read_sweep(Path(written(tmp_path, page.split("```toml\n")[1].split("```")[0])))
    assert (len(found.plans), len(found.quantize), found.sweep.seeds) == (4 * 2 + 2, 3 + 2 * 2, (0, 1))
    assert (set(found.fisher), set(found.calibration)) == ({"loss", "runs"}, {"even"})


def test_the_smallest_shipped_sweep_runs(store: Path) -> None:
    found: dict[str, Any] = good(store, "sweep", str(SWEEPS / "smoke.toml"))
    assert (len(found["cells"]), found["failed"]) == (6, 0)
    assert found["cells"][4]["image_mse"] < found["cells"][2]["image_mse"] < found["cells"][2]["image_mse_floor"]


def test_a_sweep_takes_the_settings_that_the_command_would(store: Path, tmp_path: Path) -> None:
    """Ids are hashes of all settings and inputs: a default or an input resolved in another way would show."""
    text = (
        HEAD
        + '[fisher.runs]\nkind = "trajectory"\nsteps = 2\nsamples = 2\n[fisher.loss]\ntimesteps = 4\nsamples = 2\n'
        + 'granularity = "weight"\nbins = 1\n'
        + '[[plans]]\ntarget_bpw = 9.0\nfisher = "loss"\n[[plans]]\ntarget_size = "150KiB"\nfisher = "runs"\n'
        + '[[plans]]\ntarget_bpw = 9.0\nfisher = "loss"\ntimestep_weights = "gain"\ntrajectory = "runs"\n'
        + '[[plans]]\ntarget_bpw = 9.0\nscore = "modelopt"\n[[plans]]\nstrategy = "mean-std"\nat = "mean"\nfisher = "loss"\n'
        + '[[quantize]]\nbias_correction = "static"\n'
    )
    cells = make_cells(Session(store, quiet=True), read_sweep(Path(written(tmp_path, text))), None)
    good(store, "fisher", "tiny", "--kind", "trajectory", "--steps", "2", "--samples", "2", "--name", "runs")
    weights = ["--timesteps", "4", "--samples", "2", "--granularity", "weight", "--bins", "1"]
    good(store, "fisher", "tiny", *weights, "--name", "loss")
    budget = ["--target-bpw", "9"]
    commands = [
        ["loss", *budget],
        ["runs", "--target-size", "150KiB"],
        ["loss", *budget, "--timestep-weights", "gain"],
        ["tiny", *budget, "--score", "modelopt"],
        ["loss", "--mean-std", "0.5", "--at", "mean"],
    ]
    for cell, command in zip(cells, commands, strict=True):
        assert good(store, "plan", *command, "--dry-run")["id"] == cell.artifacts["plan"].id, command
    made = good(store, "plan", *commands[-1])
    dry = good(store, "quantize", str(made["id"]), "--bias-correction", "static", "--dry-run")
    assert dry["id"] == cells[-1].artifacts["quantized"].id


# --- what it makes ---------------------------------------------------------------------------------------------------


def test_numbers_are_those_of_compare(swept: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    store, data = swept
    row = data["cells"][0]
    config = tmp_path / "quick.toml"
    config.write_text(QUICK)
    found = good(store, "compare", "tiny", row["plan_id"], "--features", "digits", "--config", str(config))
    assert found["id"] == row["comparison_id"]
    measures = {(m["metric"], m["of"]): m for m in found["measures"]}  # type: ignore[attr-defined]
    for metric, name in (("fid", "fid"), ("image_mse", "image_mse")):
        measure = measures[metric, "model1"]
        assert (row[name], row[f"{name}_low"], row[f"{name}_high"]) == tuple(
            measure[k] for k in ("value", "low", "high")
        )
    assert row["image_mse_floor"] == measures["image_mse", "floor"]["value"]
    floor = next(d for d in found["differences"] if (d["metric"], d["of"]) == ("fid", "floor"))  # type: ignore[attr-defined]
    names = ("fid_floor_difference", "fid_floor_difference_low", "fid_floor_difference_high")
    assert [row[name] for name in names] == [floor[k] for k in ("difference", "low", "high")]
    assert row["bytes"] == (store / "quantized" / row["quantized_id"] / "model.safetensors").stat().st_size


def test_every_row_leads_to_its_artifacts_and_settings(swept: tuple[Path, dict[str, Any]]) -> None:
    store, data = swept
    rows = data["cells"]
    assert [row["cell"] for row in rows] == [1, 2, 3]
    assert [row.get("plan_ratio") for row in rows] == [None, 0.25, 0.5]
    assert rows[0]["fisher_id"] is None
    for row in rows:
        named = {row[key] for key in row if key.endswith("_id")} - {None}
        assert named <= ids(store)
        assert len(named) == (10 if row["fisher_id"] else 9)
    assert rows[0]["bytes"] < rows[1]["bytes"] < rows[2]["bytes"]


def test_parquet_and_csv_hold_the_same_rows(swept: tuple[Path, dict[str, Any]]) -> None:
    _, data = swept
    table = pq.read_table(data["parquet"])
    with Path(data["csv"]).open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert json.loads(table.schema.metadata[b"fqdiff"]) == {"schema": 2, "sweep": "small"}
    for line, row, shown in zip(lines, table.to_pylist(), data["cells"], strict=True):
        assert line == {name: "" if value is None else str(value) for name, value in row.items()}
        assert {name: value for name, value in row.items() if value is not None} == {
            name: value for name, value in shown.items() if value is not None
        }


def test_asking_again_makes_nothing_and_the_same_table(swept: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    store, data = swept
    before, table = ids(store), Path(data["csv"]).read_bytes()
    output = tmp_path / "again.csv"
    again = call(store, "sweep", written(tmp_path, SMALL), "--output", str(output))
    assert again.exit_code == 0
    assert "making" not in again.stderr
    assert ids(store) == before
    assert output.read_bytes() == table
    assert "3 of 3 cells done" in again.stdout
    assert "with other noise" in again.stdout


def test_a_dry_run_tells_what_exists_and_makes_nothing(swept: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    store, data = swept
    before = sorted(store.rglob("*"))
    text = SMALL.replace('features = "digits"\n', 'features = "digits"\nseeds = [0, 1]\n')
    found: dict[str, Any] = good(store, "sweep", written(tmp_path, text), "--dry-run")
    assert [row["seed"] for row in found["cells"]] == [0, 1] * 3
    done = found["cells"][::2]
    assert [row["comparison_id"] for row in done] == [row["comparison_id"] for row in data["cells"]]
    assert all(step["exists"] for row in done for step in row["steps"])
    assert [row["to_make"] for row in found["cells"][1::2]] == [
        ["floor samples", "samples", "comparison"], ["samples", "comparison"], ["samples", "comparison"],
    ]  # fmt: skip
    assert found["missing"] == 7
    assert found["not_estimated"] == []
    assert sorted(store.rglob("*")) == before


def test_a_dry_run_without_anything_to_go_by_times_the_sampler(store: Path, tmp_path: Path) -> None:
    found = call(store, "sweep", written(tmp_path, SMALL), "--dry-run")
    assert "3 cells, 0 of them done" in found.stdout
    assert "and what classifier, compare, fisher, plan, quantize take: nothing in this store tells" in found.stdout


def test_every_timed_run_of_the_sampler_makes_its_images(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rejects parts that runs share: the second would find the images of the first, and a step would take 0 s."""
    steps: list[int] = []
    make_images = sample_stage.make_images

    def spy(predict, spec, config, *rest):  # type: ignore[no-untyped-def]
        steps.append(config.steps)
        return make_images(predict, spec, config, *rest)

    monkeypatch.setattr(sample_stage, "make_images", spy)
    assert sampling_rate(checkpoint, Context()) > 0
    assert steps == [1, 1, 1 + TIMED_STEPS]


def test_estimates_go_by_work_and_model(swept: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    store, _ = swept
    rates = measured_rates(Store(store))
    text = SMALL.replace("count = 20", "count = 60").replace("steps = 2\n", "steps = 10\n")
    cell = make_cells(Session(store, quiet=True), read_sweep(Path(written(tmp_path, text))), None)[0]
    checkpoint = cell.artifacts["checkpoint"].id
    times = sorted(m.seconds for m in Store(store).manifests("samples"))
    assert len(times) == 5
    step = dict(cell.steps())["samples"]
    assert estimated_seconds(step, checkpoint, rates) == pytest.approx(15 * times[2])
    assert estimated_seconds(step, "another", rates) is None
    config = {"kind": "trajectory", "samples": 3, "steps": 5, "timesteps": 1000}
    assert work(Recipe("fisher", "fisher", 2, (), config, 0)) == 15


def test_a_cell_that_fails_stops_no_other_and_is_not_tried_twice(store: Path, tmp_path: Path) -> None:
    text = HEAD.replace("[sweep]", "[sweep]\nseeds = [0, 1]") + QUICK + TABLE
    text += '[[plans]]\ntarget_bpw = [1.0, 12.0]\nscore = "weight-mse"\n'
    result = call(store, "sweep", written(tmp_path, text))
    assert result.exit_code == 1
    assert result.stderr.count("plan: making") == 2
    assert "2 of 4 cells done" in result.stdout
    assert result.stdout.count("failed: cell") == 2
    (path,) = (store / "sweeps").glob("*.parquet")
    rows = pq.read_table(path).to_pylist()
    assert [row["error"] is None for row in rows] == [False, False, True, True]
    assert "hint: " in rows[0]["error"]
    assert rows[0]["plan_id"] is None
    assert rows[0]["bytes"] is None
    assert rows[0]["checkpoint_id"] == rows[2]["checkpoint_id"]
    assert rows[2]["bits_per_weight"] <= 12.0


def test_an_error_that_nobody_foresaw_is_its_cells_alone(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Runner.run

    def without_memory(self: Runner, step: Step) -> Manifest:
        if step.stage == "plan" and step.config.low == "int4":
            raise RuntimeError("out of memory")
        return run(self, step)

    monkeypatch.setattr(Runner, "run", without_memory)
    result = call(store, "sweep", written(tmp_path, HEAD + QUICK + "[[plans]]\nuniform = ['int4', 'int8']\n"))
    assert result.exit_code == 1
    assert "failed: cell 1 (uniform int4; seed 0): RuntimeError: out of memory" in result.stdout
    assert "Traceback" in result.stderr
    assert "1 of 2 cells done" in result.stdout


def test_a_process_that_dies_takes_only_its_own_job_with_it() -> None:
    found = dict(run_in_processes([1, 2, 3, 4], 2, fail_at_two, ("ok",)))
    assert found == {1: ("ok", 1), 2: Died(3), 3: ("ok", 3), 4: ("ok", 4)}


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_interrupted_sweep_continues_to_the_same_table(
    jobs: int, swept: tuple[Path, dict[str, Any]], store: Path, tmp_path: Path
) -> None:
    """That of one job, with the same ids: all cells want the same samples of full precision at the same time."""
    file = written(tmp_path, SMALL)
    command = [sys.executable, "-m", "fqdiff", "sweep", file, "--store", str(store), "--jobs", str(jobs)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    seen = ""
    while "[1/3]" not in seen:
        read = process.stderr.readline()
        assert read, seen
        seen += read
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes of the command
    assert process.wait(timeout=120) == 130
    seen += process.stderr.read()
    assert "Traceback" not in seen
    assert seen.splitlines()[-1] == "interrupted; the same command continues where it stopped"
    assert all(state.startswith("Z") for state in states_of_group(process.pid))  # ended, if not yet buried
    assert not (store / "sweeps").exists()
    before = ids(store)
    done: dict[str, Any] = good(store, "sweep", file, "--jobs", str(jobs))
    assert before < ids(store) == ids(swept[0])
    # Whoever of the processes made it: what is made tells what the file said.
    assert {m.settings for m in Store(store).manifests("comparison")} == {Path(file).read_text()}
    assert Path(done["csv"]).name == Path(swept[1]["csv"]).name
    assert without_times(done) == without_times(swept[1])


@pytest.mark.parametrize(("jobs", "kill"), [(1, os.killpg), (2, os.kill)])
def test_a_killed_sweep_leaves_the_store_whole_and_the_same_command_finishes_it(
    jobs: int,
    kill: Callable[[int, int], None],
    swept: tuple[Path, dict[str, Any]],
    store: Path,
    tmp_path: Path,
) -> None:
    """SIGKILL, in the middle of a cell: all at once, and the parent alone, whose workers are then waited for or take over.

    Rejects a lock that outlives its process, an artifact that is there before all of it is, and a table of half the cells.
    """
    file = written(tmp_path, SMALL)
    command = [sys.executable, "-m", "fqdiff", "sweep", file, "--store", str(store), "--jobs", str(jobs)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    while "[1/3]" not in (read := process.stderr.readline()):
        assert read
    kill(process.pid, signal.SIGKILL)
    assert process.wait(timeout=30) == -signal.SIGKILL
    assert not (store / "sweeps").exists()
    assert good(store, "store", "verify")["damaged"] == []
    begun = ids(store)
    done: dict[str, Any] = good(store, "sweep", file, "--jobs", str(jobs))
    assert begun <= ids(store) == ids(swept[0])
    assert done["failed"] == 0
    assert without_times(done) == without_times(swept[1])
    assert good(store, "store", "verify")["damaged"] == []
    deadline = time.monotonic() + 60
    while any(not state.startswith("Z") for state in states_of_group(process.pid)):  # orphans end with their cell
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.stderr.close()


def states_of_group(group: int) -> list[str]:
    return subprocess.run(["ps", "-o", "stat=", "-g", str(group)], capture_output=True, text=True).stdout.split()


# --- bad files -------------------------------------------------------------------------------------------------------

PLAN = "[[plans]]\nuniform = 'int4'\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sweep = 3", "sweep in"),
        ("[sweep", "cannot be read"),
        (HEAD, "has no [[plans]]"),
        (PLAN, "has no [sweep]"),
        (HEAD + "[plans]\nuniform = 'int4'\n", "plans in"),
        (HEAD + PLAN + "[plan]\nratio = 0.2\n", "'plan' in"),
        ("[sweep]\nseeds = [0]\n" + PLAN, "names no model"),
        (HEAD + "seed = 1\n" + PLAN, "unknown setting 'seed' in [sweep]"),
        (HEAD + "seeds = [1, 1]\n" + PLAN, "name one twice"),
        (HEAD + "seeds = [-1]\n" + PLAN, "seeds [-1]"),
        (HEAD + "seeds = []\n" + PLAN, "no seeds"),
        (HEAD + "seeds = [0.5]\n" + PLAN, "sweep.seeds is 0.5"),
        (HEAD + PLAN + "ratoi = 0.2\n", "unknown setting 'ratoi' in [[plans]] number 1"),
        (HEAD + PLAN + "symmetric = 'yes'\n", "plans[1].symmetric is 'yes'"),
        (HEAD + PLAN + "granularity = []\n", "plans[1].granularity is an empty list"),
        (HEAD + PLAN + "fisher = 3\n", "plans[1].fisher is 3"),
        (HEAD + PLAN + PLAN, "plans name uniform int4 twice"),
        (HEAD + PLAN + "[[quantize]]\n[[quantize]]\n", "quantize name the default twice"),
        (HEAD + PLAN + "fisher = 'loss'\n", "uniform plans read no Fisher table"),
        (HEAD + PLAN + "ratio = 0.5\n", "belong to different strategies"),
        (HEAD + PLAN + "strategy = 'ratio'\n", "belong to strategy 'uniform'"),
        (HEAD + "[[plans]]\nratio = 0.5\n", "which of 0 Fisher tables"),
        (HEAD + TABLE + "[[plans]]\nratio = 0.5\nfisher = 'lost'\n", "no Fisher table is called 'lost'"),
        (HEAD + TABLE + "[[plans]]\nratio = [0.5, 1.5]\n", "plans (ratio 1.5): ratio is 1.5"),
        (HEAD + TABLE + "[[plans]]\ntarget_bpw = 4.0\ntimestep_weights = 'gain'\n", "whose gain?"),
        (
            HEAD + TABLE + "[[plans]]\ntarget_bpw = 4.0\ntimestep_weights = 'gain'\ntrajectory = 'loss'\n",
            "has not measured the sampler's gain",
        ),
        (HEAD + "[fisher.loss]\nsamples = 1\n" + PLAN, "fisher.loss: samples is 1"),
        (HEAD + "[fisher]\nloss = 3\n" + PLAN, "fisher.loss in"),
        (HEAD + "[fisher]\nloss = 'gone'\n" + PLAN, "no fisher is named 'gone'"),
        (HEAD + PLAN + "[[quantize]]\ndistill_rate = 0.1\n", "distill_rate without distillation"),
        (HEAD + PLAN + "[sample]\ncount = 100000\n", "sample.count is 100000; there are"),
        (HEAD + PLAN + "[compare]\nresamples = 3\n", "compare: resamples is 3"),
        (HEAD.replace("tiny", "lost") + PLAN, "no checkpoint is named 'lost'"),
        (HEAD.replace("digits", "fingers") + PLAN, "unknown features 'fingers'"),
    ],
)
def test_a_bad_file_is_named_before_any_work(base: Path, tmp_path: Path, text: str, message: str) -> None:
    before = sorted(base.rglob("*"))
    result = call(base, "sweep", written(tmp_path, text))
    assert result.exit_code in (1, 2)
    assert message in result.stderr.splitlines()[0]
    assert result.stderr.startswith("error: ")
    assert sorted(base.rglob("*")) == before


def test_an_output_that_cannot_be_written_is_refused_before_any_work(base: Path, tmp_path: Path) -> None:
    file = written(tmp_path, SMALL)
    (tmp_path / "there.csv").write_text("mine")
    refused = (
        ("there.csv", "exists"),
        ("gone/new.csv", "there is no folder"),
        ("table.xlsx", "cannot tell what to write"),
    )
    for output, message in refused:
        result = call(base, "sweep", file, "--output", str(tmp_path / output))
        assert result.exit_code == 2
        assert message in result.stderr
    assert (tmp_path / "there.csv").read_text() == "mine"
    assert not (base / "samples").exists()


def test_a_table_of_another_model_is_refused(swept: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    store, data = swept
    text = HEAD.replace("tiny", "pretrained:mnist-small") + f"[fisher]\nloss = '{data['cells'][1]['fisher_id']}'\n"
    result = call(store, "sweep", written(tmp_path, text + "[[plans]]\nratio = 0.5\nat = 'mean'\n"))
    assert result.exit_code == 1
    assert "is of another model" in result.stderr


def test_an_empty_list_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"plans\[1\]\.ratio is an empty list"):
        list(expand({"ratio": []}, set(), "plans[1]"))
