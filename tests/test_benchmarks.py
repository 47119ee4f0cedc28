"""What the scripts of benchmarks/ print, of comparisons made here."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from fqdiff.configs import CalibrateConfig, ClassifierConfig
from fqdiff.report.words import interval
from fqdiff.store.store import Store
from fqdiff.values import Comparison, Curve, Point
from tests.test_cli import good
from tests.test_comparison import comparison, real, sets  # noqa: F401 - fixtures
from tests.test_docs import ROOT, load


def floor_of(value: Comparison) -> str:
    return interval(value.pair("fid", "floor", "baseline"), "+.2f")


def test_the_field_s_table_has_an_interval_for_other_noise(comparison: Comparison) -> None:  # noqa: F811
    found = SimpleNamespace(id="c0")
    runner = SimpleNamespace(
        store=SimpleNamespace(find=lambda kind, id_: found if (kind, id_) == ("comparison", "c0") else None),
        load=lambda manifest: comparison,
    )
    ends = {
        f"{name}{end}": 1.0 for name in ("fid_difference", "image_mse", "noise_error") for end in ("", "_low", "_high")
    }
    row = {
        **ends, "error": None, "samples_id": "s0", "comparison_id": "c0", "checkpoint_id": "m0", "quantized_id": "q0",
        "fid": 1.5, "fid_floor": 2.0, "fid_full": 1.0, "image_mse_floor": 0.3, "bytes": 7, "bits_per_weight": 4.0,
        "verdict": "worse", "making_seconds": 60.0,
    }  # fmt: skip
    lines = list(load(ROOT / "benchmarks" / "methods.py").table([row], runner))
    assert lines[2].startswith("| float32 | | 32 | 1.0 |")
    assert f"| float32, other noise | | 32 | 2.0, {floor_of(comparison)} |" in lines[3]
    assert " | 1.5, +1.00 [+1.00, +1.00] | worse | " in lines[4]


def test_the_study_redone_has_an_interval_for_other_noise(comparison: Comparison) -> None:  # noqa: F811
    module = load(ROOT / "benchmarks" / "replication.py")
    curve = Curve("model1", 32, (Point(0, 1.0, 0.1, 0.01),), 0.1, 0.01, 0.08, 0.12)
    plan = SimpleNamespace(parameters=100, entries=())
    values = {"c0": replace(comparison, noise_error=(curve,)), "p0": plan}
    runner = SimpleNamespace(load=lambda manifest: values[manifest.id])
    stored = SimpleNamespace(id="m0", file=lambda name: SimpleNamespace(bytes=400))
    made = module.Made(module.SINGLE, SimpleNamespace(id="p0"), stored, stored)
    lines = list(module.lines(runner, stored, [made], SimpleNamespace(id="c0")))
    assert f" {floor_of(comparison)}; full precision: " in lines[2]


def test_options_that_cannot_be_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = load(ROOT / "benchmarks" / "replication.py")
    store = tmp_path / "store"
    monkeypatch.setattr("sys.argv", ["replication.py", "--fisher-samples", "1", "--store", str(store)])
    with pytest.raises(SystemExit, match=r"^error: samples is 1; a standard error needs 2 or more$"):
        module.main()
    assert not store.exists()


def test_a_part_that_a_row_leaves_out_is_said() -> None:
    """Rejects two rows of one name: the method, and the method without a part of it."""
    methods = load(ROOT / "benchmarks" / "methods.py")
    row = {"quantize_method": "fisher", "quantize_activations": "int8", "quantize_noise_correction": None}
    assert methods.words(row) == "fisher"
    assert methods.words({**row, "quantize_activation_steps": False}) == "fisher, without activation steps"
    assert methods.words({**row, "quantize_noise_correction": True}) == "fisher, noise correction"
    assert methods.words({"quantize_activations_split_skips": False}) == "skips joined"


def test_wide_activations_are_measured_in_every_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole script on a tiny model. Rejects a script whose parts fit no more, and sites that are wide in no order."""
    module, store = load(ROOT / "benchmarks" / "activation_precision.py"), tmp_path / "store"
    good(store, "train", "--preset", "tiny", "--dataset", "mnist5k", "--steps", "20")
    good(store, "fisher", "--timesteps", "4", "--samples", "2", "--name", "outputs")
    few = CalibrateConfig(steps=4, timesteps=4, samples=2)
    for name, value in (("CalibrateConfig", lambda: few), ("INTERVALS", 2), ("STEPS", 2)):
        monkeypatch.setattr(module, name, value)
    options = ("--store", str(store), "--images", "4", "--shares", "0,0.5,1")
    monkeypatch.setattr("sys.argv", ["activation_precision.py", "outputs", *options])
    module.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row[1] for row in rows] == ["none", "fisher", "reverse", "random", "all"]
    errors = [float(row[2]) for row in rows]
    assert errors[-1] < min(errors[:-1])
    assert len(set(errors)) == 5


def test_the_budget_benchmark_pairs_its_models_and_its_ladder_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole script on a tiny model. Rejects a ladder over its budget, or far below it, and rows that are measured twice."""
    module, store = load(ROOT / "benchmarks" / "budget.py"), tmp_path / "store"
    good(store, "train", "--preset", "tiny", "--dataset", "mnist5k", "--steps", "20", "--name", "tiny")
    few = ("--granularity", "weight", "--bins", "1", "--samples", "2", "tiny")
    good(store, "fisher", "--kind", "true", "--timesteps", "4", *few, "--name", "loss")
    good(store, "fisher", "--kind", "trajectory", *few, "--name", "runs")
    small = ClassifierConfig(epochs=1)
    monkeypatch.setattr(module, "fid", lambda *given: SimpleNamespace(fid=2.0, difference=1.0, interval=(0.5, 1.5)))
    monkeypatch.setattr(module, "ClassifierConfig", lambda: small)
    cheap = {"score": "fisher", "scale": "float16", "formats": ("float32", "int8", "int6", "int4")}
    for name, more in (("fisher", {}), ("fisher, refined", {"refine": 2})):
        monkeypatch.setitem(module.SCORES, name, ("loss", {**cheap, **more}))
    kept = tmp_path / "budget.json"
    options = ("--store", str(store), "--loss", "loss", "--runs", "runs", "--images", "8", "--steps", "2")
    plans = ("--budgets", "6", "--strategies", "fisher/ladder/fisher, refined", "--output", str(kept))
    monkeypatch.setattr("sys.argv", ["budget.py", "tiny", *options, *plans])
    module.main()
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [line.split(" | ")[0] for line in printed] == ["| float32, other noise"] + [
        f"| {name}, 6" for name in ("fisher", "ladder", "fisher, refined")
    ]
    bits = [float(line.split(" | ")[1]) for line in printed]
    assert 5.0 < bits[2] <= 6.0
    assert printed[1].split(" | ")[4] == ""
    assert printed[1].split(" | ")[8] == "2.0, +1.0 [+0.5, +1.5]"
    assert float(printed[2].split(" | ")[4].split()[0]) > 0
    rows = json.loads(kept.read_text())["rows"]
    assert len(rows[1]["noise_draws"]) == module.RESAMPLES
    assert len(rows[1]["errors"]) == 8
    other = tmp_path / "other noise.json"
    again = ("--budgets", "6", "--strategies", "fisher", "--output", str(other), "--seed", "7")
    monkeypatch.setattr("sys.argv", ["budget.py", "tiny", *options, *again])
    module.main()
    seventh = json.loads(other.read_text())["rows"][1]
    assert seventh["model"] == rows[1]["model"]
    assert seventh["errors"] != rows[1]["errors"]
    monkeypatch.setattr("sys.argv", ["budget.py", "tiny", *options, *plans])
    before = kept.read_bytes()
    monkeypatch.setattr(module.Judge, "row", None)
    module.main()
    assert kept.read_bytes() == before


def test_a_ratio_of_noise_errors_is_paired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rejects a ratio turned over, and intervals of resamples that differ from model to model, of which one is not exact."""
    module, store = load(ROOT / "benchmarks" / "noise_ratio.py"), tmp_path / "store"
    good(store, "train", "--preset", "tiny", "--dataset", "mnist5k", "--steps", "20")
    for name in ("int4", "int8"):
        plan = good(store, "plan", "--uniform", name)
        good(store, "quantize", str(plan["id"]), "--name", name)
    copied = str(good(store, "quantize", str(plan["id"]))["id"])
    monkeypatch.setattr(module, "INPUTS", 4)
    monkeypatch.setattr("sys.argv", ["noise_ratio.py", "int4", "int8", copied, "--store", str(store)])
    module.main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["int4", "int8", copied]
    assert rows[0][2] == "1.000 [1.000, 1.000]"
    assert rows[1][1:] == rows[2][1:]
    means = [float(row[1].split()[0]) for row in rows[:2]]
    ratio, low, high = (float(part.strip("[],")) for part in rows[1][2].split())
    assert ratio == pytest.approx(means[1] / means[0], abs=1e-3)
    assert 0 <= low <= ratio <= high < 0.2


def test_schedules_of_reconstruction_are_held_against_the_longest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole script on a tiny model. Rejects steps of all together that are lost, and a reference of fewer steps."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # as where a script runs
    module, store = load(ROOT / "benchmarks" / "reconstruction.py"), tmp_path / "store"
    good(store, "train", "--preset", "tiny", "--dataset", "mnist5k", "--steps", "20", "--name", "tiny")
    few = CalibrateConfig(steps=4, timesteps=4, samples=8)
    monkeypatch.setattr(module, "CalibrateConfig", lambda: few)
    monkeypatch.setattr(module, "INPUTS", 4)
    options = ("--store", str(store), "--low", "int3", "--schedules", "2,3,2+4", "--seeds", "0,1")
    monkeypatch.setattr("sys.argv", ["reconstruction.py", "tiny", *options])
    module.main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    lengths = [["2", "none"], ["3", "none"], ["2", "4"]]
    seeded = [[*length, seed] for seed in "01" for length in lengths]
    assert [row[:3] for row in rows] == [["none", "none", "0"], *seeded]
    assert [row[4] for row in rows].count("1.000 [1.000, 1.000]") == 1
    assert rows[2][4] == "1.000 [1.000, 1.000]"
    assert len({row[-1] for row in rows}) == 7
    configs = [Store(store).resolve(row[-1], ("quantized",)).recipe.config for row in rows]
    assert [config.get("network_iterations") for config in configs] == [None, None, None, 4, None, None, 4]


def test_what_step_noise_absorbs_is_paired_with_the_model_as_rounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole script on a tiny model. Rejects a variance that is absorbed where nothing is drawn, and one that never is."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # as where a script runs
    module, store = load(ROOT / "benchmarks" / "step_noise.py"), tmp_path / "store"
    good(store, "train", "--preset", "tiny", "--dataset", "mnist5k", "--steps", "20", "--name", "tiny")
    few, small = CalibrateConfig(steps=20, samples=4), ClassifierConfig(epochs=1)
    monkeypatch.setattr(module, "CalibrateConfig", lambda: few)
    monkeypatch.setattr(module, "ClassifierConfig", lambda: small)
    monkeypatch.setattr(module, "fid", lambda *given: SimpleNamespace(fid=2.0, difference=1.0, interval=(0.5, 1.5)))
    options = ("--store", str(store), "--weights", "int3", "--images", "6", "--steps", "4")
    monkeypatch.setattr("sys.argv", ["step_noise.py", "tiny", *options])
    module.main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row[1] for row in rows] == ["0"] * 3 + ["1"] * 3
    assert [row[2] for row in rows[:3]] == ["nothing", "slope and bias", "slope, bias and variance"]
    errors = [row[3] for row in rows]
    assert errors[1] == errors[2] != errors[0]
    assert errors[4] != errors[5]
    assert [row[4] == "" for row in rows] == [True, False, False] * 2
