"""Sweeps over methods: whole treatments in a file, what of them is refused before any work, and what the table makes of cells."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from fqdiff.cli.session import Session
from fqdiff.cli.sweep_file import make_cells, read_sweep
from fqdiff.methods import METHODS
from fqdiff.pipeline import Runner, Step
from fqdiff.store.manifest import Manifest, Recipe
from fqdiff.store.store import Store
from fqdiff.sweep.cells import Cell
from fqdiff.sweep.cost import work
from fqdiff.sweep.table import make_table
from fqdiff.sweep.tenths import mean_by_tenth
from fqdiff.sweep.verdicts import with_verdicts
from fqdiff.values import Point
from tests.test_cli import call, good

HEAD = '[sweep]\nmodel = "tiny"\nfeatures = "digits"\n'
QUICK = "[sample]\nsteps = 2\ncount = 20\n[classifier]\nepochs = 1\n[compare]\nresamples = 20\nerror_inputs = 2\n"
FEW = "steps = 4\ntimesteps = 4\nsamples = 2\n"
SET = f"[calibration.even]\n{FEW}"
PLAN = '[[plans]]\nuniform = "int4"\n'
SPLIT = '[[plans]]\nname = "split"\nuniform = "int4"\ngranularity = "split"\n'
SWEEP = (
    HEAD
    + "seeds = [1]\n"
    + QUICK
    + SET
    + PLAN.replace("\n", '\nname = "linear"\n', 1)
    + SPLIT
    + """
[[quantize]]
plans = "linear"
method = "linear"
activations = ["", "int8"]

[[quantize]]
plans = ["split"]
method = "q-diffusion"
activations = "int8"
[quantize.reconstruct]
iterations = 2
network_iterations = 0
[quantize.activation-steps]
iterations = 2

[[quantize]]
plans = "linear"
method = "repq"
activations = "int8"
"""
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a model, and a set of an outsider."""
    folder = tmp_path_factory.mktemp("methods") / "store"
    good(folder, "train", "--preset", "tiny", "--dataset", "mnist5k", "--steps", "5", "--name", "tiny")
    good(folder, "train", "--preset", "tiny", "--dataset", "mnist5k", "--steps", "6", "--name", "other")
    good(folder, "calibrate", "other", "--steps", "2", "--timesteps", "2", "--samples", "2", "--name", "others")
    return folder


@pytest.fixture(scope="module")
def swept(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, str]:
    """A store after the sweep over methods, its table, and what it printed."""
    folder = tmp_path_factory.mktemp("swept")
    store = Path(shutil.copytree(base, folder / "store"))
    result = call(store, "sweep", written(folder, SWEEP), "--output", str(folder / "table.parquet"))
    assert result.exit_code == 1
    return store, pq.read_table(folder / "table.parquet").to_pylist(), result.stdout


def written(folder: Path, text: str) -> str:
    path = folder / "methods.toml"
    path.write_text(text)
    return str(path)


def words(text: str) -> list[str]:
    return text.split()


def cells_of(store: Path, folder: Path, text: str) -> list[Cell]:
    return make_cells(Session(store, quiet=True), read_sweep(Path(written(folder, text))), None)


# --- the ids of single commands -----------------------------------------------------------------------------------


def test_cells_have_the_ids_that_single_commands_give(swept: tuple[Path, Any, str]) -> None:
    """With the sweep's seed, and the calibration set's own. Rejects a method whose stages a sweep puts together otherwise."""
    store, rows, _ = swept
    calibrated: Any = good(store, "calibrate", "tiny", *words("--steps 4 --timesteps 4 --samples 2 --dry-run"))
    assert {row["calibration_id"] for row in rows} == {None, calibrated["id"]}
    inputs = ("--calibration", calibrated["id"], "--seed", "1", "--dry-run")
    int8 = ("--activations", "int8")
    commands = [
        ("--method", "linear", *inputs[2:]),
        ("--method", "linear", *int8, *inputs),
        None,
        (
            "--method",
            "q-diffusion",
            *int8,
            *words("--reconstruct-iterations 2 --reconstruct-network 0 --steps-iterations 2"),
            *inputs,
        ),
    ]
    assert len(rows) == len(commands)
    for row, command in zip(rows, commands, strict=True):
        if command is None:  # refused for its SiLU
            assert row["quantized_id"] is None
            continue
        found = good(store, "quantize", row["plan_id"], *command)
        assert row["quantized_id"] == found["id"]


def test_every_word_of_a_way_is_that_of_a_flag(base: Path, tmp_path: Path) -> None:
    """Each stage alone, asked for by true or by a table; scheme fisher and DDPM as fqdiff calibrate takes them."""
    store = Path(shutil.copytree(base, tmp_path / "store"))
    table: Any = good(store, "fisher", "tiny", "--timesteps", "4", "--samples", "2")
    text = (
        HEAD
        + "[fisher.loss]\ntimesteps = 4\nsamples = 2\n"
        + '[calibration.mass]\nscheme = "fisher"\nfisher = "loss"\nsampler = "ddpm"\nsamples = 2\nseed = 3\n'
        + PLAN
        + """
[[quantize]]
reconstruct-temporal = true
[[quantize]]
noise-correction = { intervals = [1, 2] }
[[quantize]]
method = "ptqd"
noise-correction = false
[[quantize]]
activations = { format = "int8", range = "kl", intervals = 2 }
temporal-scales = true
[[quantize]]
activations = { format = "int6", dynamic = true }
bias_correction = "static"
"""
    )
    cells = cells_of(store, tmp_path, text)
    flags = words("--scheme fisher --sampler ddpm --samples 2 --seed 3 --fisher")
    inputs: Any = good(store, "calibrate", "tiny", *flags, table["id"], "--dry-run")
    assert cells[0].artifacts["calibration"].id == inputs["id"]
    plan: Any = good(store, "plan", "tiny", "--uniform", "int4")
    assert plan["id"] == cells[0].artifacts["plan"].id
    made: Any = good(store, "calibrate", "tiny", *flags, table["id"])
    learned = ("--calibration", made["id"])
    commands = [
        (*words("--reconstruct --reconstruct-temporal"), *learned),
        (*words("--noise-correction --noise-intervals 1"), *learned),
        (*words("--noise-correction --noise-intervals 2"), *learned),
        (),
        (*words("--activations int8 --activation-range kl --activation-intervals 2 --temporal-scales"), *learned),
        words("--activations int6 --dynamic --bias-correction static"),
    ]
    for cell, command in zip(cells, commands, strict=True):
        found = good(store, "quantize", plan["id"], *command, "--dry-run")
        assert cell.artifacts["quantized"].id == found["id"], command
    assert [name for name, _ in cells[0].steps()][:5] == ["plan", "fisher", "calibration", "quantize", "quantized"]


def test_the_shipped_table_has_every_method_with_and_without_activations(tmp_path: Path) -> None:
    """With the images that come with a package, of which fewer are held out, for MNIST's may not be at hand."""
    shipped = read_sweep(Path(__file__).parent.parent / "examples" / "sweeps" / "methods.toml")
    file = replace(shipped, sweep=replace(shipped.sweep, dataset="mnist5k"), stages={**shipped.stages, "sample": {}})
    cells = make_cells(Session(tmp_path / "store", quiet=True), file, None)
    assert len(cells) == len({cell.artifacts["comparison"].id for cell in cells}) == 48
    both = {cell.method for cell in cells if "quantize_activations" in cell.settings}
    assert both == METHODS.keys()
    assert {cell.method for cell in cells if "quantize_activations" not in cell.settings} == both - {"tdq", "repq"}


def test_a_name_crosses_a_way_with_the_plans_it_suits(base: Path, tmp_path: Path) -> None:
    text = HEAD + SET + SPLIT + SPLIT.replace("split", "channel")
    text += '[[quantize]]\n[[quantize]]\nplans = "split"\nmethod = "q-diffusion"\n'
    found = [(c.settings["plan_name"], c.quantize_label) for c in cells_of(base, tmp_path, text)]
    assert found == [("split", ""), ("split", "method q-diffusion"), ("channel", "")]


def test_a_pretrained_model_takes_the_data_set_it_is_told(tmp_path: Path) -> None:
    text = '[sweep]\nmodel = "pretrained:mnist-small"\nfeatures = "digits"\n'
    same, own = (
        cells_of(tmp_path / "store", tmp_path, text + line + PLAN)[0] for line in ('dataset = "mnist5k"\n', "")
    )
    assert same.artifacts["dataset"].id == own.artifacts["dataset"].id
    path = tmp_path / "images"
    result = call(tmp_path / "store", "sweep", written(tmp_path, text + f'dataset = "folder:{path}"\n' + PLAN))
    assert str(path) in result.stderr


# --- what fails, and what is refused ---------------------------------------------------------------------------------


def test_a_method_that_the_network_refuses_fails_alone(swept: tuple[Path, Any, str]) -> None:
    _, rows, shown = swept
    assert [row["error"] is None for row in rows] == [True, True, False, True]
    assert "silu" in rows[2]["error"].lower()
    assert "3 of 4 cells done" in shown


def test_a_set_that_leaves_intervals_empty_fails_its_cell_before_it_is_quantized(base: Path, tmp_path: Path) -> None:
    """The other cell begins with the same weights, and is made. Rejects a reconstruction stored for a cell that must fail."""
    store = Path(shutil.copytree(base, tmp_path / "store"))
    text = HEAD + QUICK + SET + PLAN + '[[quantize]]\nmethod = "tfmq"\nactivations = "int8"\n[[quantize]]\n'
    result = call(store, "sweep", written(tmp_path, text))
    assert "16 of 20 intervals of timesteps hold no calibration input" in result.stdout
    assert "1 of 2 cells done" in result.stdout
    assert [m.recipe.stage for m in Store(store).manifests("quantized")] == ["quantize"]


def test_a_plan_that_turns_out_not_to_suit_fails_its_cell_and_no_other(base: Path, tmp_path: Path) -> None:
    """A budget's ranges are chosen while it is planned. The other cell has the same plan and the same quantized weights."""
    store = Path(shutil.copytree(base, tmp_path / "store"))
    text = HEAD + QUICK + "[fisher.one]\ntimesteps = 4\nsamples = 2\n" + "[[plans]]\ntarget_bpw = 9.0\n"
    text += SET.replace("even", "odd") + 'scheme = "ndtc"\n[[quantize]]\nmethod = "ptq4dm"\n[[quantize]]\n'
    result = call(store, "sweep", written(tmp_path, text))
    assert result.exit_code == 1
    assert "failed: cell 1 (target_bpw 9.0; method ptq4dm; seed 0): ptq4dm has the range mse" in result.stdout
    assert "1 of 2 cells done" in result.stdout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PLAN + "[[quantize]]\nmethod = 'gptq'\n", "quantize (method gptq): unknown method 'gptq'"),
        (PLAN + "[[quantize]]\nmethod = 3\n", "quantize[1].method is 3"),
        (PLAN + "[[quantize]]\nmethods = 'linear'\n", "unknown setting 'methods' in [[quantize]] number 1"),
        (PLAN + "[[quantize]]\nplans = 'lost'\n", "quantize[1].plans: no [[plans]] have the name 'lost'"),
        (PLAN + "[[quantize]]\nplans = 3\n", "quantize[1].plans is 3"),
        (PLAN + SPLIT + "[[quantize]]\nplans = 'split'\n", "no [[quantize]] is for plans (uniform int4)"),
        (SPLIT + "[[quantize]]\n[[quantize]]\nplans = 'split'\n", "quantize name the default twice"),
        (PLAN + "[[quantize]]\nreconstruct = true\n", "which of 0 calibration sets?"),
        (SET + SET.replace("even", "odd") + PLAN + "[[quantize]]\nactivations = 'int8'\n", "which of 2 calibration sets?"),
        (PLAN + "[[quantize]]\nactivations = 'int8'\ncalibration = 'lost'\n", "no calibration set is called 'lost'"),
        (SET + PLAN + "[[quantize]]\ncalibration = 'even'\n", "a calibration set that nothing learns from"),
        (SET + PLAN + "[[quantize]]\nactivations = 'int9'\n", "unknown activation format 'int9'"),
        (SET + PLAN + "[[quantize]]\n[quantize.activations]\nrange = 'kl'\n", "range of activations that stay float32"),
        (SET + PLAN + "[[quantize]]\n[quantize.activations]\nranges = 'kl'\n", "unknown setting 'ranges' in activations of"),
        (SET + PLAN + "[[quantize]]\nreconstruct = 5\n", "quantize[1].reconstruct is 5"),
        (SET + PLAN + "[[quantize]]\nreconstruct = true\nreconstruct-temporal = true\n", "tables for reconstruct and"),
        (SET + PLAN + "[[quantize]]\nreconstruct = true\ndistill = 5\n", "weights distilled before their rounding"),
        (SET + PLAN + "[[quantize]]\ntemporal-scales = true\n", "scales by time of activations that stay float32"),
        (SET + PLAN + "[[quantize]]\nmethod = 'q-diffusion'\n", "q-diffusion splits the weights"),
        (SET + PLAN + "[[quantize]]\nmethod = 'squant'\n", "squant has the rounding squant; the plan has nearest"),
        (SET + PLAN + "[[quantize]]\nmethod = 'fisher'\n", "fisher is a plan by budget; this is one by uniform"),
        (
            SET + PLAN + "ranges = ['mse']\n[[quantize]]\nmethod = 'ptq4dm'\nactivations = 'int8'\n",
            "ptq4dm calibrates by ndtc",
        ),
        (PLAN + "activations = 'int8'\n", "a sweep's plan with formats of activations"),
        ("[calibration.a]\nsamples = 0\n" + PLAN, "calibration.a: samples is 0"),
        ("[calibration.a]\nscheme = 'fisher'\n" + PLAN, "calibration.a: which of 0 Fisher tables?"),
        ("[calibration.a]\nfisher = 'loss'\n[fisher.loss]\n" + PLAN, "'uniform' has no use for a Fisher table"),
        ("[calibration.a]\nseed = -1\n" + PLAN, "calibration.a.seed is -1"),
        ("[calibration]\na = 'gone'\n" + PLAN, "no calibration is named 'gone'"),
        ("[calibration]\na = 'others'\n" + PLAN, "is of another model"),
    ],
)  # fmt: skip
def test_a_bad_word_is_named_before_any_work(base: Path, tmp_path: Path, text: str, message: str) -> None:
    before = sorted(base.rglob("*"))
    result = call(base, "sweep", written(tmp_path, HEAD + text))
    assert result.exit_code in (1, 2)
    assert message in result.stderr.splitlines()[0]
    assert sorted(base.rglob("*")) == before


def test_a_data_set_is_for_pretrained_models(base: Path, tmp_path: Path) -> None:
    result = call(base, "sweep", written(tmp_path, HEAD + "dataset = 'mnist5k'\n" + PLAN))
    assert "'tiny' has a data set of its own" in result.stderr


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_the_table_has_the_curve_and_the_time_of_making(swept: tuple[Path, Any, str]) -> None:
    store, rows, shown = swept
    both = rows[1]
    runner, found = Runner(Store(store)), Store(store)
    comparison = found.find("comparison", both["comparison_id"])
    assert comparison is not None
    (curve,) = runner.load(comparison).noise_error
    assert (both["noise_error"], both["noise_error_low"]) == (curve.mean, curve.low)
    assert both["noise_error_decile1"] == mean_by_tenth(curve.points, 1000)[0]
    last = found.find("quantized", both["quantized_id"])
    assert isinstance(last, Manifest)
    first = found.find("quantized", last.recipe.input("model").id)  # type: ignore[union-attr]
    inputs, planned = found.find("calibration", both["calibration_id"]), found.find("plan", both["plan_id"])
    made = (planned, first, last, inputs)
    assert both["making_seconds"] == pytest.approx(sum(m.seconds for m in made), abs=2e-3)  # type: ignore[union-attr]
    assert rows[0]["making_seconds"] == pytest.approx(planned.seconds + first.seconds, abs=2e-3)  # type: ignore[union-attr]
    assert f"{curve.mean:.2e} [" in shown
    assert rows[2]["verdict"] is rows[2]["noise_error"] is rows[2]["making_seconds"] is None
    assert (both["quantize_method"], both["quantize_activations"], both["plan_name"]) == ("linear", "int8", "linear")
    assert (rows[3]["quantize_reconstruct_iterations"], both["quantize_reconstruct_iterations"]) == (2, None)


def test_a_comparison_without_curves_leaves_their_columns_empty() -> None:
    made = make_table([{"cell": 1, "fid_p": 0.5, "fid_difference": 1.0, "level": 0.95, "error": None}], "none")
    (row,) = made.to_pylist()
    assert (row["noise_error"], row["noise_error_decile10"], row["verdict"]) == (None, None, "not distinguishable")


def test_tenths_are_weighted_means_of_the_points_in_them() -> None:
    """By hand, T = 1000: t = 99 belongs to the first tenth, 100 to the second. Rejects plain means and rounded tenths."""
    points = [Point(0, 0.1, 4.0, 0.0), Point(99, 0.3, 8.0, 0.0), Point(100, 0.2, 3.0, 0.0), Point(999, 0.4, 5.0, 0.0)]
    found = mean_by_tenth(points, 1000)
    assert found[0] == pytest.approx((0.1 * 4 + 0.3 * 8) / 0.4)
    assert found[1:] == [pytest.approx(3.0), *[None] * 7, pytest.approx(5.0)]


def test_verdicts_are_corrected_for_all_cells_that_are_done() -> None:
    """Holm by hand: 0.01 x 3, then max(0.03, 0.02 x 2), then max(0.04, 0.03 x 1); the failed cell does not count."""

    def row(p: float, difference: float) -> dict[str, Any]:
        return {"fid_p": p, "fid_difference": difference, "level": 0.95, "error": None}

    failed = {"fid_p": None, "error": "no memory"}
    found = with_verdicts([row(0.02, 0.3), failed, row(0.01, -0.2), row(0.03, 0.1)])
    assert [r.get("fid_p_adjusted") for r in found] == [
        pytest.approx(0.04), None, pytest.approx(0.03), pytest.approx(0.04),
    ]  # fmt: skip
    assert [r.get("verdict") for r in found] == ["worse", None, "not worse", "worse"]
    assert with_verdicts([row(0.03, 0.1)] * 2)[0]["verdict"] == "not distinguishable"


def test_work_counts_what_stages_repeat() -> None:
    def units(stage: str, **config: int) -> float:
        return work(Recipe("quantized", stage, 1, (), config, 0))

    assert units("calibrate", samples=3, steps=5) == 15
    assert units("reconstruct-temporal", iterations=7) == units("activation-steps", iterations=7) == 7
    assert units("reconstruct", iterations=7, network_iterations=4) == 9
    assert units("quantize-reparameterized", distill=4) == 5
    assert units("noise-correction", intervals=9) == 1


def test_a_dry_run_names_the_stages_of_a_method(base: Path, tmp_path: Path) -> None:
    found: Any = good(base, "sweep", written(tmp_path, SWEEP), "--dry-run")
    assert found["cells"][-1]["to_make"][:6] == [
        "plan", "quantize", "reconstruct", "activations", "quantized", "samples",
    ]  # fmt: skip
    assert isinstance(cells_of(base, tmp_path, SWEEP)[-1].artifacts["quantized"], Step)
