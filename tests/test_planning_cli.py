"""``fqdiff plan`` with a budget, ``plan show``, ``plan diff`` and ``plot plan``."""

import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fqdiff
from fqdiff.cli.plan_budget import budget_defaults, facts_text, less_than
from fqdiff.cli.plan_show import diff_rows
from fqdiff.configs import SCORES, PlanConfig
from fqdiff.errors import ConfigError, LineageError
from fqdiff.pipeline import Runner
from fqdiff.planning.plans import check_target
from fqdiff.store.store import Store
from fqdiff.values import Plan
from tests.test_cli import call, good

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with an empirical and a trajectory table, and two plans of 4 bits per weight."""
    folder = tmp_path_factory.mktemp("planning") / "store"
    good(folder, "train", "--preset", "tiny", "--dataset", "mnist5k", "--steps", "20", "--name", "tiny-fp32")
    good(folder, "fisher", "--timesteps", "4", "--samples", "2", "--name", "empirical")
    good(folder, "fisher", "--kind", "trajectory", "--steps", "3", "--samples", "2", "--name", "run")
    good(folder, "plan", "empirical", "--target-bpw", "6", "--name", "by-fisher")
    good(folder, "plan", "empirical", "--target-bpw", "6", "--score", "random", "--seed", "3", "--name", "by-chance")
    return folder


def test_a_size_is_kept_from_the_plan_to_the_file(store: Path) -> None:
    made = good(store, "plan", "empirical", "--target-size", "90KiB", "--name", "by-size")
    assert made["strategy"] == "budget"
    assert made["budget"]["target_bytes"] == 90 * 1024  # type: ignore[index]
    small = good(store, "quantize", "by-size")
    assert small["file_bytes"] == made["file_bytes"] == Path(str(small["file"])).stat().st_size <= 90 * 1024


def test_the_score_follows_the_table_and_the_recipe_holds_it(store: Path) -> None:
    scores = {}
    for ref in ("empirical", "run"):
        made = good(store, "plan", ref, "--target-bpw", "6")
        scores[ref] = Store(store).resolve(str(made["id"])).recipe.config["score"]
    assert scores == {"empirical": "fisher", "run": "trajectory"}
    by_name = good(store, "plan", "run", "--target-bpw", "6", "--score", "trajectory")
    assert by_name["id"] == good(store, "plan", "run", "--target-bpw", "6")["id"]


@pytest.mark.parametrize(("measured", "told"), [(1.04, False), (1.2, True), (0.8, True)])
def test_a_plan_whose_prediction_was_off_says_so(store: Path, measured: float, told: bool) -> None:
    plan: Plan = Runner(Store(store)).load(Store(store).resolve("by-fisher"))
    assert plan.budget is not None
    facts = replace(plan.budget, measured=measured * plan.budget.predicted, evaluations=2)
    text = "\n".join(facts_text(replace(plan, budget=facts)))
    assert "the best of 2 plans tried" in text
    assert ("they do not agree" in text) is told


def test_how_near_to_the_best_a_plan_is_said_to_be() -> None:
    assert less_than(0.75, 1.0) == "; no plan that fits is predicted less than 0.75, 25 % below"
    assert less_than(1 - 1e-12, 1.0) == "; no plan that fits is predicted less"


def test_a_budget_that_names_no_table_takes_one_that_suits_what_it_is_told(store: Path) -> None:
    """Rejects the latest table, whatever it is: then a score of timesteps fails, and a plan is not the best there could be."""
    later = str(good(store, "fisher", "--timesteps", "3", "--samples", "2")["id"])
    ids = {"run": Store(store).resolve("run", ("fisher",)).id, "empirical": later}

    def read(*arguments: str) -> str:
        inputs = good(store, "plan", *arguments, "--target-bpw", "6")["inputs"]
        assert isinstance(inputs, dict)
        return str(inputs["fisher"]).removeprefix("fisher/")

    assert read() == read("tiny-fp32") == read("tiny-fp32", "--score", "trajectory") == ids["run"]
    for flags in (("--score", "fisher"), ("--timestep-weights", "snr"), ("--score", "random")):
        assert read("tiny-fp32", *flags) == ids["empirical"]
    assert read("empirical") == Store(store).resolve("empirical", ("fisher",)).id


def test_a_budget_without_a_table_of_runs_is_told_of_it(tmp_path: Path) -> None:
    good(tmp_path, "train", "--preset", "tiny", "--dataset", "mnist5k", "--steps", "1", "--name", "one")
    command = "fqdiff fisher --kind trajectory --granularity weight --bins 1"
    for ref in ((), ("one",)):
        refused = call(tmp_path, "plan", *ref, "--target-bpw", "6")
        assert refused.exit_code == 1
        assert command in refused.stderr
    good(tmp_path, "fisher", "--timesteps", "2", "--samples", "2")
    assert command in call(tmp_path, "plan", "one", "--target-bpw", "6", "--dry-run").stderr


def test_a_plan_of_one_width_reads_a_table_that_is_named_where_it_fits_to_it(store: Path) -> None:
    table = str(good(store, "fisher", "--timesteps", "2", "--samples", "2", "--granularity", "weight")["id"])
    for flags in (("--uniform", "int4", "--range", "fisher"), ("--uniform", "codebook4")):
        made: Any = good(store, "plan", table, *flags)
        assert made["inputs"].keys() == {"checkpoint", "fisher"}
        assert good(store, "quantize", str(made["id"]))["file_bytes"] == made["file_bytes"]
    plain: Any = good(store, "plan", table, "--uniform", "int4")
    assert plain["inputs"].keys() == {"checkpoint"}


def test_a_file_in_the_way_is_named_before_the_work(store: Path, tmp_path: Path) -> None:
    there = tmp_path / "there.safetensors"
    there.write_bytes(b"")
    before = {m.id for m in Store(store).manifests()}
    for path, message in ((there, "exists"), (tmp_path / "none" / "x.safetensors", "no such folder")):
        refused = call(store, "quantize", "by-chance", "--output", str(path))
        assert refused.exit_code == 2
        assert message in refused.stderr
    assert {m.id for m in Store(store).manifests()} == before


@pytest.mark.parametrize("text", ["90kB", "90KB", "90 kb", "90000"])
def test_a_size_may_be_spelt_as_people_do(store: Path, text: str) -> None:
    assert good(store, "plan", "empirical", "--target-size", text)["budget"]["target_bytes"] == 90_000  # type: ignore[index]


def test_only_chance_depends_on_the_seed(store: Path) -> None:
    def made(*flags: str) -> object:
        return good(store, "plan", "empirical", "--target-bpw", "6", *flags, "--dry-run")["id"]

    assert made("--seed", "1") == made("--seed", "2")
    assert made("--score", "random", "--seed", "1") != made("--score", "random", "--seed", "2")


def test_weight_error_needs_no_fisher_values(store: Path) -> None:
    made = good(store, "plan", "tiny-fp32", "--score", "weight-mse", "--target-bpw", "7")
    assert made["inputs"].keys() == {"checkpoint"}  # type: ignore[attr-defined]


def test_a_plan_tells_how_good_it_is(store: Path) -> None:
    text = call(store, "plan", "empirical", "--target-bpw", "6").stdout
    assert "bits per weight" in text
    assert re.search(r"no plan that fits is predicted less(?: than [\d.e+-]+, [\d.e-]+ % below)?$", text, re.MULTILINE)
    text = call(store, "plan", "empirical", "--max-loss-increase", "0.5").stdout
    assert "predicted rise at most 0.5" in text


def test_a_target_that_is_too_small_names_the_smallest_size(store: Path) -> None:
    before = [m.id for m in Store(store).manifests()]
    result = call(store, "plan", "empirical", "--target-size", "1KiB")
    assert result.exit_code == 2
    hint = result.stderr.splitlines()[-1]
    least, *wider = re.split(r"; with ", hint.split("--target-size ")[1])
    assert [m.id for m in Store(store).manifests()] == before
    assert good(store, "plan", "empirical", "--target-size", least)["file_bytes"] == int(least)
    # What it says would reach further does.
    one_bit, single_weights = (text.rsplit(" ", 1) for text in wider)
    formats, size = one_bit[0].removeprefix("--formats "), int(one_bit[1].replace(",", ""))
    assert formats.endswith(",int2,codebook1")
    made = good(store, "plan", "empirical", "--formats", formats, "--target-size", str(size))
    assert int(str(made["file_bytes"])) <= size < int(least)
    assert single_weights[0] == "fqdiff fisher --granularity weight"
    assert size < int(single_weights[1].replace(",", "")) < int(least)


def test_a_table_of_single_weights_reaches_as_far_as_the_hint_says(store: Path) -> None:
    flags = ("--target-size", "1KiB", "--granularity", "channel")
    hint = call(store, "plan", "empirical", *flags).stderr.splitlines()[-1]
    table = str(good(store, "fisher", "--timesteps", "2", "--samples", "2", "--granularity", "weight")["id"])
    further = call(store, "plan", table, *flags).stderr.splitlines()[-1]
    told = hint.split("--granularity weight ")[1].replace(",", "")
    assert f"--target-size {told}; with --formats" in further
    assert "--granularity weight" not in further
    named = ("--formats", "float32,int2,codebook1", "--target-size", "1KiB")
    assert "; with" not in call(store, "plan", table, *named).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--uniform", "int7"], "unknown format 'int7'"),
        (["--ratio", "0.5", "--low", "int7"], "unknown format 'int7'"),
        (["--ladder", "float16,int8,int7", "--ratio", "0.5"], "unknown format 'int7'"),
        (["--target-bpw", "4", "--formats", "int4,int7"], "unknown format 'int7'"),
        (["--target-bpw", "6", "--ends", "int7"], "unknown format 'int7'"),
        (["--target-bpw", "6", "--ends", "bfloat16"], "none of the formats float32,float16,int8,"),
        (["--target-size", "10B"], "no plan fits 10 bytes"),
        (["--target-size", "0"], "the smallest file with these formats has"),
        (["--target-bpw", "0"], "the smallest file with these formats has"),
        (["--ratio", "0.5", "--low", "int8", "--high", "int8"], "low and high are int8, both"),
        (["--target-bpw", "6", "--formats", ""], "--formats names nothing"),
        (["--ratio", "0.5", "--ladder", " , "], "--ladder names nothing"),
        (["--target-bpw", "6", "--range", ""], "--range names nothing"),
        (["--target-bpw", "6", "--formats", "int4,int4"], "name each once"),
        (["--target-bpw", "6", "--target-size", "1MB"], "--target-bpw and --target-size belong to"),
        (["--target-bpw", "6", "--score", "weight-mse", "--timestep-weights", "snr"], "leave --timestep-weights out"),
        (["--uniform", "codebook4", "--rounding", "squant"], "--rounding is about integer codes"),
    ],
)
def test_a_dry_run_refuses_what_the_plan_would(store: Path, arguments: list[str], message: str) -> None:
    result = call(store, "plan", "empirical", *arguments, "--dry-run")
    assert result.exit_code == 2
    assert message in result.stderr
    assert "hint: " in result.stderr
    assert not result.stdout


def test_a_rule_reads_the_whole_run_of_a_trajectory_table(store: Path) -> None:
    """Rejects the first step, which such a table has no row of, and the mean over steps: each as if it acted alone."""
    made = good(store, "plan", "run", "--ratio", "0.3", "--name", "by-run")
    opened = Store(store)
    assert opened.resolve(str(made["id"])).recipe.config["at"] == "run"
    table = Runner(opened).load(opened.resolve("run"))
    plan = Runner(opened).load(opened.resolve("by-run"))
    assert {e.parameter: e.score for e in plan.entries} == {n: e.mean for n, e in table.trajectory.items()}
    assert good(store, "plan", "run", "--ratio", "0.3", "--at", "run", "--dry-run")["id"] == made["id"]
    assert good(store, "plan", "empirical", "--ratio", "0.3", "--at", "0", "--dry-run")["config"]["at"] == "0"  # type: ignore[index]
    assert good(store, "plan", "run", "--ratio", "0.3", "--at", "mean", "--dry-run")["id"] != made["id"]
    good(store, "plan", "run", "--ratio", "0.3", "--granularity", "output", "--low", "int4", "--name", "by-channel")
    good(store, "quantize", "by-channel")
    for ref, at, hint in (("run", "1", "or --at run"), ("empirical", "run", "--at mean")):
        refused = call(store, "plan", ref, "--ratio", "0.3", "--at", at)
        assert refused.exit_code == 2
        assert hint in refused.stderr


def test_diff_sees_ranges_and_roundings(store: Path) -> None:
    for name, flags in (("mm", ()), ("mse", ("--range", "mse")), ("sq", ("--rounding", "squant"))):
        good(store, "plan", "tiny-fp32", "--uniform", "int4", *flags, "--name", name)
    for name, key, value in (("mse", "range", "mse"), ("sq", "rounding", "squant")):
        rows = good(store, "plan", "diff", "mm", name)["changed"]
        assert isinstance(rows, list)
        plan = Runner(Store(store)).load(Store(store).resolve("mm"))
        assert len(rows) == sum(e.format == "int4" for e in plan.entries) > 20
        assert {(row["bytes"], row[f"{key}_b"]) for row in rows} == {(0, value)}
        text = call(store, "plan", "diff", "mm", name).stdout
        assert re.search(rf"int4 channel:0 {rows[0][f'{key}_a']} +int4 channel:0 {value}", text)


def test_sizes_of_files_and_folders_are_those_of_the_store(store: Path, tmp_path: Path) -> None:
    good(store, "plan", "empirical", "--target-bpw", "6", "--name", "sized")
    made = good(store, "quantize", "sized")
    found = good(store, "size", str(made["id"]))
    copy = tmp_path / "model.safetensors"
    copy.write_bytes(Path(str(made["file"])).read_bytes())
    for path in (copy, Path(str(made["file"])).parent):
        by_path = good(store, "size", str(path))
        for key in ("file_bytes", "kinds", "tensors", "bits_per_weight"):
            assert by_path[key] == found[key]
    assert call(store, "size", str(copy)).stdout.startswith(str(copy))
    missing = call(store, "size", str(tmp_path / "none.safetensors"))
    assert (missing.exit_code, "there is no file" in missing.stderr) == (1, True)


def test_show_lists_every_parameter_with_what_would_be_next(store: Path) -> None:
    data = good(store, "plan", "show", "by-fisher")
    entries = data["entries"]
    assert isinstance(entries, list)
    plan = Runner(Store(store)).load(Store(store).resolve("by-fisher"))
    assert [e["parameter"] for e in entries] == [e.parameter for e in plan.entries]
    limited = [e for e in entries if e["constraint"] == "budget"]
    assert limited
    assert all(e["next"]["more_bytes"] > 0 and e["next"]["predicted"] < e["predicted"] for e in limited)
    text = call(store, "plan", "show", "by-fisher").stdout
    assert "block4.res1.conv1.weight" in text
    good(store, "plan", "empirical", "--groups", "12/345/6", "--at", "0", "--name", "by-groups")
    assert "group 345: its mean Fisher value" in call(store, "plan", "show", "by-groups").stdout


def test_diff_names_what_changed_and_adds_up(store: Path) -> None:
    data = good(store, "plan", "diff", "by-fisher", "by-chance")
    plans = [Runner(Store(store)).load(Store(store).resolve(name)) for name in ("by-fisher", "by-chance")]
    changed = data["changed"]
    assert isinstance(changed, list)
    assert changed
    assert sum(row["bytes"] for row in changed) == sum(e.bytes for e in plans[1].entries) - sum(
        e.bytes for e in plans[0].entries
    )
    assert sum(row["predicted_b"] - row["predicted_a"] for row in changed) > 0
    assert good(store, "plan", "diff", "by-fisher", "by-fisher")["changed"] == []
    assert "parameters differ" in call(store, "plan", "diff", "by-fisher", "by-chance").stdout


def test_a_pareto_curve_is_shown_and_nothing_is_made(store: Path) -> None:
    before = [m.id for m in Store(store).manifests()]
    points = good(store, "plan", "empirical", "--pareto", "3:8:0.5")["points"]
    assert isinstance(points, list)
    assert [p["target_bpw"] for p in points] == [3 + 0.5 * k for k in range(11)]
    assert points[0]["file_bytes"] is None
    rises = [p["predicted"] for p in points if p["predicted"] is not None]
    assert rises == sorted(rises, reverse=True)
    assert "too small" in call(store, "plan", "empirical", "--pareto", "3:8:0.5").stdout
    assert [m.id for m in Store(store).manifests()] == before


def test_a_plan_is_measured_on_the_data_set_of_its_table_and_tells_so(store: Path) -> None:
    flags = ("--target-bpw", "6", "--formats", "float32,int8,int4", "--calibration-timesteps", "2")
    made = good(store, "plan", "empirical", *flags, "--predictor", "gram", "--refine", "2", "--name", "together")
    table = Store(store).resolve("empirical").input("dataset")
    assert table is not None
    assert made["inputs"].keys() == {"checkpoint", "fisher", "dataset"}  # type: ignore[attr-defined]
    assert Store(store).resolve("together").input("dataset") == table
    facts = made["budget"]
    assert isinstance(facts, dict)
    assert (facts["predictor"], facts["calibration_timesteps"], facts["calibration_samples"]) == ("gram", 2, 4)
    assert facts["predicted"] <= facts["diagonal"]
    assert facts["measured"] > 0
    assert 1 <= facts["evaluations"] <= 2
    text = call(store, "plan", "empirical", *flags, "--predictor", "gram", "--refine", "2").stdout
    assert re.search(r"in float32.* in int8.* in int4", text)  # rejects the order in which some tensor had them
    for command in (
        ["plan", "show", "together"],
        ["plan", "empirical", *flags, "--predictor", "gram", "--refine", "2"],
    ):
        text = call(store, *command).stdout
        assert "predictor gram, 2 timesteps x 4 training images: local optimum" in text
        assert "measured " in text
    plain = good(store, "plan", "empirical", "--target-bpw", "6")
    assert plain["inputs"].keys() == {"checkpoint", "fisher"}  # type: ignore[attr-defined]
    run = good(store, "plan", "run", "--target-bpw", "6", "--refine", "1", "--calibration-samples", "1")
    assert run["inputs"].keys() == {"checkpoint", "fisher"}  # type: ignore[attr-defined]
    assert run["budget"]["calibration_timesteps"] == 3  # type: ignore[index]


def test_calibration_inputs_depend_on_the_seed_and_on_nothing_else_that_is_random(store: Path) -> None:
    def made(*flags: str) -> object:
        return good(store, "plan", "empirical", "--target-bpw", "6", *flags, "--dry-run")["id"]

    assert made("--refine", "2", "--seed", "1") != made("--refine", "2", "--seed", "2")
    assert made("--refine", "2") != made("--refine", "3")


def test_a_plan_is_drawn(store: Path, tmp_path: Path) -> None:
    files = good(store, "plot", "plan", "by-fisher", "--output", str(tmp_path / "out"))["files"]
    assert isinstance(files, list)
    png, svg = (Path(f).read_bytes() for f in files)
    assert png[:4] == b"\x89PNG"
    assert b"bits per weight" in svg
    assert b"Fisher value" in svg
    good(store, "plan", "tiny-fp32", "--uniform", "int4", "--name", "plain")
    files = good(store, "plot", "plan", "plain", "--format", "svg", "--output", str(tmp_path / "plain"))["files"]
    assert isinstance(files, list)
    assert b"no Fisher values" in Path(files[0]).read_bytes()


def test_a_target_in_the_file_gives_way_to_a_flag(store: Path, tmp_path: Path) -> None:
    config = tmp_path / "fqdiff.toml"
    config.write_text('[plan]\ntarget_bpw = 4.0\nscore = "reverse"\nformats = ["float32", "int8", "int2"]\n')
    chosen = good(store, "plan", "empirical", "--config", str(config), "--dry-run")["config"]
    assert isinstance(chosen, dict)
    assert (chosen["strategy"], chosen["target_bpw"], chosen["score"]) == ("budget", 4.0, "reverse")
    assert chosen["formats"] == ["float32", "int8", "int2"]
    flags = ("--target-size", "1MB", "--score", "fisher")
    chosen = good(store, "plan", "empirical", "--config", str(config), *flags, "--dry-run")["config"]
    assert isinstance(chosen, dict)
    assert (chosen["target_bpw"], chosen["target_bytes"], chosen["score"]) == (0.0, 1_000_000, "fisher")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target-bpw", "6", "--target-size", "1MB"], "different targets"),
        (["--target-bpw", "6", "--ratio", "0.5"], "different strategies"),
        (["--target-bpw", "6", "--at", "5"], "has no use for --at"),
        (["--target-size", "much"], "cannot read --target-size"),
        (["--target-bpw", "6", "--score", "luck"], "unknown score 'luck'"),
        (["--target-bpw", "6", "--formats", "int9,int4"], "unknown format 'int9'"),
        (["--score", "random"], "--score without a budget"),
        (["--pareto", "8:2:1"], "the grid '8:2:1'"),
        (["--pareto", "2:8"], "cannot read the grid"),
        (["--pareto", "2:8:1", "--name", "x"], "makes no artifact"),
        (["--groups", "12/345/6", "--ends", "int8"], "has no use for --ends"),
        (["--groups", "12/345/6", "--predictor", "gram"], "has no use for --predictor"),
        (["--refine", "3"], "--refine without a budget"),
        (["--pareto", "4:8:1", "--predictor", "gram"], "the diagonal's predictions"),
        (["--max-loss-increase", "1", "--refine", "3"], "least rise of a size"),
        (["--target-bpw", "6", "--calibration-samples", "8"], "nothing looks at --calibration-samples"),
    ],
)
def test_settings_that_do_not_fit_are_refused(store: Path, arguments: list[str], message: str) -> None:
    result = call(store, "plan", "empirical", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_plans_of_different_models_are_not_compared(store: Path) -> None:
    plan = Runner(Store(store)).load(Store(store).resolve("by-fisher"))
    with pytest.raises(LineageError, match="different models"):
        diff_rows(plan, replace(plan, entries=plan.entries[1:]))


def test_phases_go_from_the_plan_to_the_images(store: Path, tmp_path: Path) -> None:
    made = good(
        store, "plan", "empirical", "--target-bpw", "6", "--phases", "2", "--traffic-bpw", "4.5", "--name", "phased"
    )
    assert made["phases"]["count"] == 2  # type: ignore[index]
    small = good(store, "quantize", "phased", "--name", "phased-model")
    assert small["file_bytes"] == made["file_bytes"] == Path(str(small["file"])).stat().st_size
    sizes = good(store, "size", "phased-model")
    assert sum(sizes["kinds"].values()) == made["file_bytes"]  # type: ignore[attr-defined]
    good(store, "sample", "phased-model", "--count", "2", "--steps", "4")
    network = fqdiff.load("phased-model", store=store)
    x, t = torch.randn(2, *network.spec.image_shape), torch.tensor([3, 999])
    assert torch.equal(network(x, t), fqdiff.load(str(small["file"]), cache=True)(x, t))
    text = call(store, "plan", "show", "phased").stdout
    assert "2 phases: " in text
    assert "without phases, within the same limits" in text
    good(store, "plot", "plan", "phased", "--output", str(tmp_path / "out"))
    result = call(store, "plan", "empirical", "--target-bpw", "6", "--traffic-bpw", "4.5")
    assert result.exit_code == 2
    assert "add --phases 4" in result.stderr
    result = call(store, "plan", "empirical", "--uniform", "int4", "--phases", "2")
    assert result.exit_code == 2
    assert "phases" in result.stderr


def test_the_table_of_what_goes_with_a_score_is_true() -> None:
    """Against the settings themselves, cell by cell."""
    text = (ROOT / "docs" / "concepts.md").read_text()
    head, *rows = re.findall(
        r"^\| (.*) \|$", text[text.index("| `--score` | a size") :].partition("\n\n")[0], re.MULTILINE
    )
    columns: dict[str, dict[str, Any]] = {
        "a size": {},
        "`--pareto`": {},
        "`--max-loss-increase`": {"target_bpw": 0.0, "max_loss_increase": 1.0},
        "`--predictor gram`": {"predictor": "gram"},
        "`--refine`": {"refine": 3},
        "`--phases`": {"phases": 2},
        "`output` channels": {"granularity": "channel,output"},
        "kept elements": {"granularity": "channel,element"},
    }
    assert head.split(" | ")[1:] == list(columns)
    told = {row.split(" | ")[0].strip("`"): row.split(" | ")[1:] for row in rows}
    assert told.keys() == set(SCORES)
    for score, cells in told.items():
        for cell, settings in zip(cells, columns.values(), strict=True):
            try:
                PlanConfig("budget", **{"target_bpw": 4.0, "score": score, **settings})
            except ConfigError:
                assert cell == "no", (score, settings)
            else:
                assert cell == "yes", (score, settings)


def test_every_budget_of_the_example_sweep_can_be_kept(store: Path) -> None:
    """Rejects 1.5 bits without one-bit codes, and controls that lack the formats of their rivals."""
    good(store, "import", "pretrained:mnist-small", "--name", "small")
    checkpoint = Runner(Store(store)).load(Store(store).resolve("small"))
    sweep = tomllib.loads((ROOT / "examples" / "sweeps" / "budget.toml").read_text())
    listed = [
        (p, bpw, score) for p in sweep["plans"] for bpw in several(p["target_bpw"]) for score in several(p["score"])
    ]
    assert {bpw for _, bpw, _ in listed} == {1.5, 2.0, 2.5, 3.0, 3.5, 4.0}
    assert {score for _, _, score in listed} == set(SCORES)
    for given, bpw, score in listed:
        table = sweep["fisher"][given["fisher"]]
        settings = {"target_bpw": bpw, "score": score, "formats": tuple(given.get("formats", ()))}
        config = PlanConfig("budget", **{**budget_defaults(table, settings), **settings})  # type: ignore[arg-type]
        check_target(checkpoint, config, table["granularity"] == "weight")


def several(value: object) -> list[Any]:
    return value if isinstance(value, list) else [value]
