"""The table of methods says what is so: its commands exist, its bundles equal their flags, and what is missing is named."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.main import get_command

from fqdiff.calibration.schemes import chosen_steps
from fqdiff.cli.app import app
from fqdiff.configs import ActivationConfig, CalibrateConfig
from fqdiff.diffusion.samplers import sampling_timesteps
from fqdiff.methods import METHODS
from fqdiff.quant.timestep_bias import interval_of
from fqdiff.store.store import Store
from fqdiff.treatment import feasible
from tests.test_cli import call, good

NAMES = ["linear", "squant", "ptq4dm", "q-diffusion", "ptqd", "tdq", "tfmq", "repq", "fisher"]
PLANS = {"q-diffusion": "split", "squant": "squant", "ptq4dm": "by-mse", "fisher": "budget"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods") / "store"
    good(folder, "train", "--preset", "tiny", "--dataset", "mnist5k", "--steps", "5", "--name", "one")
    good(folder, "fisher", "--kind", "trajectory", "--samples", "2", "--steps", "2")
    good(folder, "fisher", "--timesteps", "3")
    good(folder, "plan", "--uniform", "int4", "--name", "int4")
    good(folder, "plan", "--uniform", "int4", "--rounding", "squant", "--name", "squant")
    good(folder, "plan", "--uniform", "int4", "--range", "mse", "--name", "by-mse")
    good(folder, "plan", "--uniform", "int4", "--granularity", "split", "--name", "split")
    good(folder, "plan", "--target-bpw", "9", "--name", "budget")
    few = ("--steps", "4", "--timesteps", "4", "--samples", "2")
    good(folder, "calibrate", "one", *few, "--name", "uniform")
    good(folder, "calibrate", "one", *few, "--scheme", "ndtc", "--name", "ndtc")
    good(folder, "plan", "--uniform", "codebook4", "--name", "codebooks")
    ends = ("--scheme", "late", "--steps", "6", "--timesteps", "2", "--samples", "2")
    good(folder, "calibrate", "one", *ends, "--name", "late")
    good(folder, "calibrate", "one", "--steps", "1", "--timesteps", "1", "--samples", "1", "--name", "single")
    good(folder, "calibrate", "one", "--steps", "40", "--timesteps", "40", "--samples", "2", "--name", "many")
    return folder


def test_the_command_lists_all_of_them_and_what_is_missing(tmp_path: Path) -> None:
    found = good(tmp_path, "methods")["methods"]
    assert isinstance(found, list)
    assert [m["name"] for m in found] == NAMES == list(METHODS)
    assert "not there  block reconstruction of weights" in call(tmp_path, "methods", "ptqd").stdout
    refused = call(tmp_path, "methods", "gptq")
    assert refused.exit_code == 2
    assert "unknown method 'gptq'" in refused.stderr


@pytest.mark.parametrize("name", NAMES)
def test_every_command_and_flag_that_makes_a_method_exists(name: str) -> None:
    """Rejects a table that promises what the command line does not have."""
    for line in METHODS[name].made_by:
        program, command, *rest = line.replace("[", "").replace("]", "").split()
        assert program == "fqdiff"
        found = get_command(app).commands[command]  # type: ignore[attr-defined]
        found = next(iter(found.commands.values())) if hasattr(found, "commands") else found
        options = {o for p in found.params for o in (*p.opts, *p.secondary_opts)}
        assert {word for word in rest if word.startswith("--")} <= options


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("activations", [(), ("--activations", "int8")], ids=["weights", "both"])
def test_a_bundle_is_the_flags_that_it_prints(
    store: Path, name: str, activations: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if METHODS[name].bundle.is_of_activations and not activations:
        return
    monkeypatch.setattr(feasible, "check_reparameterization", lambda places: None)  # SiLU, but nothing is made
    sets = "ndtc" if name == "ptq4dm" else "many"
    plan, bundle = PLANS.get(name, "int4"), METHODS[name].bundle
    ActivationConfig(**bundle.activations)  # type: ignore[arg-type]
    uses_inputs = bool(activations) or bundle.reconstruct or bundle.reparameterize or bundle.noise_correction
    common = (*activations, *(("--calibration", sets) if uses_inputs else ()), "--dry-run")
    by_name = good(store, "quantize", plan, "--method", name, *common)
    flags = bundle.flags(bool(activations))
    assert by_name["bundle"] == list(flags)
    assert by_name["plan_bundle"] == list(bundle.plan_flags())
    assert good(store, "quantize", plan, *" ".join(flags).split(), *common)["id"] == by_name["id"]
    shown = f"{name} is {' '.join(flags) or 'its plan, as it is'}"
    assert shown in call(store, "quantize", plan, "--method", name, *common).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("int4", "--method", "gptq"), "unknown method 'gptq'"),
        (("int4", "--method", "q-diffusion", "--calibration", "uniform"), "q-diffusion splits the weights"),
        (("split", "--method", "q-diffusion", "--calibration", "ndtc"), "q-diffusion calibrates by uniform"),
        (("int4", "--method", "squant"), "squant has the rounding squant; the plan has nearest"),
        (("by-mse", "--method", "linear"), "linear has the range min-max; the plan has mse"),
        (("int4", "--method", "fisher"), "fisher is a plan by budget; this is one by uniform"),
        (
            ("by-mse", "--method", "ptq4dm", "--activations", "int8", "--calibration", "uniform"),
            "ptq4dm calibrates by ndtc",
        ),
        (("codebooks", "--method", "linear"), "linear is about integers, of which the plan has none"),
        (("codebooks", "--method", "squant"), "squant is about integers, of which the plan has none"),
        (("int4", "--method", "tdq"), "tdq is about activations, and these stay float32"),
        (("int4", "--method", "tdq", "--activations", "int8", "--dynamic"), "tdq calibrates the ranges of activations"),
        (("int4", "--method", "linear", "--activations", "int8", "--dynamic"), "linear calibrates the ranges"),
        (
            ("split", "--method", "q-diffusion", "--no-reconstruct", "--calibration", "uniform"),
            "a calibration set that nothing learns from",
        ),
        (
            ("int4", "--activations", "int8", "--activation-first", "float16", "--calibration", "uniform"),
            "unknown format of the first layer's input 'float16'",
        ),
    ],
)
def test_what_a_method_is_not_is_refused(store: Path, arguments: tuple[str, ...], message: str) -> None:
    refused = call(store, "quantize", *arguments)
    assert refused.exit_code == 2
    assert message in refused.stderr
    assert "hint: " in refused.stderr


INT8 = ("--activations", "int8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("int4", "--method", "tfmq", *INT8, "--calibration", "uniform"), "16 of 20 intervals of timesteps hold no"),
        (("int4", "--method", "tdq", *INT8, "--calibration", "late"), "18 of 20 intervals of timesteps hold no"),
        (("int4", "--method", "ptqd", "--calibration", "late"), "8 of 10 intervals of timesteps hold no"),
        (("codebooks", "--method", "tfmq", "--calibration", "uniform"), "tfmq is about integers"),
        (("codebooks", "--reconstruct", "--calibration", "uniform"), "no weight of this model is an integer"),
        (("int4", "--method", "repq", *INT8, "--calibration", "uniform"), "silu stands between"),
        (("int4", "--reconstruct", "--calibration", "single"), "one calibration input is too few to reconstruct on"),
        (
            ("int4", *INT8, "--learn-steps", "--calibration", "single"),
            "one calibration input is too few to learn steps on",
        ),
        (
            ("int4", *INT8, "--activation-intervals", "2", "--temporal-scales", "--temporal-intervals", "1001",
             "--calibration", "uniform"),
            "1001 intervals of 1000 timesteps",
        ),
        (
            ("int4", "--bias-correction", "timestep", "--calibration-steps", "4"),
            "10 intervals for 4 calibration steps leave one without any",
        ),
    ],
)  # fmt: skip
def test_what_a_later_stage_would_refuse_is_named_before_the_first_begins(
    store: Path, arguments: tuple[str, ...], message: str
) -> None:
    """Rejects a reconstruction that is stored, and minutes, before its activations turn out to have no inputs."""
    before = sorted(store.rglob("*"))
    for more in (("--dry-run",), ()):
        refused = call(store, "quantize", *arguments, *more)
        assert refused.exit_code in (1, 2)
        assert message in refused.stderr.splitlines()[0]
        assert "hint: " in refused.stderr
    assert sorted(store.rglob("*")) == before


def test_what_is_there_is_found_without_a_look_at_its_inputs(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = good(store, "quantize", "int4")
    monkeypatch.setattr(feasible, "check_feasible", None)
    assert good(store, "quantize", "int4", "--dry-run")["exists"]
    assert good(store, "quantize", "int4")["id"] == made["id"]


BY_HAND: dict[str, tuple[str, ...]] = {
    "linear": ("--uniform", "int4"),
    "squant": ("--uniform", "int4", "--rounding", "squant"),
    "ptq4dm": ("--uniform", "int4", "--range", "mse"),
    "q-diffusion": ("--uniform", "int4", "--granularity", "split"),
    "ptqd": ("--uniform", "int4"),
    "tdq": ("--uniform", "int4"),
    "tfmq": ("--uniform", "int4"),
    "fisher": ("--target-bpw", "4"),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_of_a_checkpoint_a_method_is_what_its_commands_make(store: Path, name: str) -> None:
    """Every id is that of the plan, the set and the model made by hand. Rejects a plan with other defaults than fqdiff plan's."""
    scheme = METHODS[name].bundle.scheme or "uniform"
    found: Any = good(
        store, "quantize", "one", "--method", name, "--weights", "int4", *INT8, "--dry-run", "--seed", "7"
    )
    table = () if name != "fisher" else (_tables(store)["trajectory"],)
    assert found["plan"] == good(store, "plan", *(table or ("one",)), *BY_HAND[name], "--dry-run")["id"]
    chosen = Store(store).find("calibration", str(found["calibration"]))
    assert chosen is None or chosen.recipe.config["scheme"] == scheme


def _tables(store: Path) -> dict[str, str]:
    return {str(m.recipe.config["kind"]): m.id for m in Store(store).manifests("fisher")}


def test_of_a_checkpoint_what_is_missing_is_made_and_named(store: Path, tmp_path: Path) -> None:
    """A store with a checkpoint alone. Rejects a set of another scheme, and one that is made where nothing learns from it."""
    alone = Path(shutil.copytree(store, tmp_path / "store"))
    for kind in ("plan", "calibration", "quantized"):
        shutil.rmtree(alone / kind, ignore_errors=True)
    config = tmp_path / "few.toml"
    config.write_text("[calibrate]\nsteps = 4\ntimesteps = 3\nsamples = 2\n")
    command = ("quantize", "one", "--method", "ptq4dm", *INT8, "--config", str(config), "--seed", "3")
    shown = call(alone, *command, "--dry-run")
    assert "plan: uniform int8, for ptq4dm, " in shown.stderr
    assert "calibration: ndtc of that checkpoint, " in shown.stderr
    assert not [*alone.glob("plan/*"), *alone.glob("calibration/*")]
    made: Any = good(alone, *command)
    assert made["id"] in shown.stdout
    by_hand = good(alone, "calibrate", "one", "--scheme", "ndtc", "--config", str(config), "--seed", "3", "--dry-run")
    assert by_hand["exists"]
    assert good(alone, "plan", "one", "--uniform", "int8", "--range", "mse", "--dry-run")["exists"]
    again = good(alone, "quantize", "latest", "--method", "ptq4dm", *INT8, "--seed", "3", "--dry-run")
    assert (again["id"], again["calibration"]) == (made["id"], by_hand["id"])
    weights: Any = good(alone, "quantize", "one", "--method", "linear", "--dry-run")
    assert weights["calibration"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("one",), "without a plan that says how to quantize it"),
        (("int4", "--weights", "int8"), "--weights of a plan, which says them itself"),
        (("int4", "--method", "linear", "--weights", "int8"), "--weights of a plan, which says them itself"),
        (("one", "--method", "linear", "--weights", "int9"), "unknown format 'int9'"),
        (("one", "--method", "linear", "--weights", "4.25"), "unknown format '4.25'"),
        (("one", "--method", "fisher", "--weights", "W4A8"), "unknown format 'W4A8'"),
        (("one", "--method", "linear", "--weights", "codebook4"), "linear is about integers"),
        (("one", "--method", "ptqd", "--noise-intervals", "50", "--calibration", "uniform"), "46 of 50 intervals"),
        (("one", "--method", "repq", *INT8), "silu stands between"),
        (("other", "--method", "fisher"), "no Fisher table of checkpoint"),
    ],
)
def test_of_a_checkpoint_bad_input_is_named_before_a_plan_is_made(
    store: Path, arguments: tuple[str, ...], message: str
) -> None:
    good(store, "train", "--preset", "tiny", "--dataset", "mnist5k", "--steps", "6", "--name", "other")
    before = sorted(store.rglob("*"))
    refused = call(store, "quantize", *arguments)
    assert refused.exit_code in (1, 2)
    assert message in refused.stderr.splitlines()[-2]
    assert sorted(store.rglob("*")) == before


def test_a_budget_may_be_a_number_of_bits(store: Path) -> None:
    found: Any = good(store, "quantize", "one", "--method", "fisher", "--weights", "4.25", "--dry-run")
    table = _tables(store)["trajectory"]
    assert found["plan"] == good(store, "plan", table, "--target-bpw", "4.25", "--dry-run")["id"]


def test_a_method_takes_no_set_of_noised_images_unless_it_is_named(store: Path, tmp_path: Path) -> None:
    """Nor one of another scheme, be it the latest. Rejects ranges of inputs that no sampler meets, without a word."""
    alone = Path(shutil.copytree(store, tmp_path / "store"))
    flags = ("--steps", "4", "--timesteps", "2", "--samples", "2")
    uniform: Any = good(alone, "calibrate", "one", *flags)
    data: Any = good(alone, "calibrate", "one", *flags, "--source", "data")
    good(alone, "calibrate", "one", *flags, "--scheme", "late")
    command = ("quantize", "one", "--method", "linear", *INT8, "--dry-run")
    assert good(alone, *command)["calibration"] == uniform["id"]
    assert good(alone, *command, "--calibration", str(data["id"]))["calibration"] == data["id"]


def test_a_flag_goes_over_its_method(store: Path) -> None:
    common = ("int4", "--activations", "int8", "--calibration", "uniform", "--dry-run")
    made = good(store, "quantize", *common, "--method", "tfmq", "--activation-intervals", "4")
    assert made["config"]["intervals"] == 4  # type: ignore[index]
    assert made["config"]["range"] == "min-max"  # type: ignore[index]


def test_q_diffusion_makes_a_model_of_the_size_of_its_plan_and_scales(store: Path) -> None:
    few = ("--reconstruct-iterations", "3", "--reconstruct-network", "2", "--calibration", "uniform")
    int8 = ("--activations", "int8", "--steps-iterations", "2")
    made: Any = good(store, "quantize", "split", "--method", "q-diffusion", *few, *int8)
    assert made["file_bytes"] == made["promised_bytes"] + made["activation_bytes"]
    assert "split" in {a["granularity"] for a in _header(Path(made["file"]))["activations"]}
    assert any(q["granularity"].startswith("split") for q in _header(Path(made["file"]))["quantized"].values())
    weights: Any = good(store, "quantize", "split", "--method", "q-diffusion", *few)
    assert weights["file_bytes"] == weights["promised_bytes"]


def test_fisher_distills_then_quantizes_activations_then_learns_their_steps(store: Path) -> None:
    """Rejects steps learned on weights that are still to be distilled, and none learned at all."""
    weights = ("quantize", "budget", "--distill", "2", "--distill-batch", "2")
    few = (*weights[2:], "--activation-intervals", "2", "--calibration", "uniform", *INT8)
    method = ("quantize", "budget", "--method", "fisher", *few)
    distilled: Any = good(store, *weights)
    fixed: Any = good(store, *method, "--no-learn-steps")
    learned: Any = good(store, *method, "--steps-iterations", "2")
    assert distilled["id"] in str(fixed["inputs"]["model"])
    assert fixed["id"] in str(learned["inputs"]["model"])
    assert Store(store).resolve(learned["id"], ("quantized",)).recipe.stage == "activation-steps"
    assert learned["file_bytes"] == fixed["file_bytes"] == fixed["promised_bytes"] + fixed["activation_bytes"]
    assert distilled["file_bytes"] == distilled["promised_bytes"]
    plain: Any = good(store, "quantize", "budget", "--method", "fisher", "--distill", "0", "--dry-run")
    assert plain["id"] == good(store, "quantize", "budget", "--dry-run")["id"]


def _header(path: Path) -> Any:
    content = path.read_bytes()
    return json.loads(json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["fqdiff"])


def test_the_parts_of_repq_that_silu_lets_through_are_there_by_flag(store: Path) -> None:
    flags = re.findall(r"--[a-z-]+ [a-z0-9-]+", METHODS["repq"].missing)
    assert flags == ["--softmax log-sqrt2", "--activation-granularity channel"]
    made: Any = good(store, "quantize", "int4", *INT8, *" ".join(flags).split(), "--calibration", "uniform")
    found = {(a["format"], a["granularity"]) for a in _header(Path(made["file"]))["activations"]}
    assert found == {("int8", "channel"), ("logsqrt2_8", "channel")}


def test_ndtc_is_said_to_be_what_its_defaults_make_it() -> None:
    """Rejects a table that promises a skewed distribution where the default has no skew."""
    assert (CalibrateConfig.location, CalibrateConfig.spread, CalibrateConfig.skew) == (0.4, 0.4, 0.0)
    assert "normal cut off at both ends, 0.4 T its mean and its spread" in METHODS["ptq4dm"].implemented


def test_what_a_method_asks_of_its_plan_is_printed_as_flags(store: Path) -> None:
    for name, flags in (
        ("ptq4dm", "--range mse"),
        ("squant", "--rounding squant"),
        ("q-diffusion", "--granularity split"),
    ):
        assert METHODS[name].bundle.plan_flags() == (flags,)
        shown = call(store, "quantize", "one", "--method", name, "--dry-run").stdout
        assert f"its plan is {flags}" in shown
    assert METHODS["fisher"].bundle.plan_flags() == ("--target-bpw",)


def test_a_method_learns_of_a_plan_from_a_set_of_its_scheme_whatever_is_the_latest(store: Path) -> None:
    """Rejects noised images, or another method's timesteps, because they were recorded last."""
    few = ("--steps", "8", "--timesteps", "8", "--samples", "2")
    data: Any = good(store, "calibrate", "one", *few, "--source", "data")
    assert [*Store(store).manifests("calibration")][-1].id == data["id"]
    uniform = Store(store).resolve("many", ("calibration",)).id
    for method, plan in (("q-diffusion", "split"), ("linear", "int4"), ("ptqd", "int4")):
        assert good(store, "quantize", plan, "--method", method, *INT8, "--dry-run")["calibration"] == uniform
    asked: Any = good(store, "quantize", "int4", "--method", "linear", *INT8, "--calibration", data["id"], "--dry-run")
    assert asked["calibration"] == data["id"]
    shutil.rmtree(Store(store).directory("calibration", data["id"]))


def test_linear_is_uniform_and_by_channel(store: Path) -> None:
    good(store, "plan", "--uniform", "int4", "--granularity", "tensor", "--name", "by-tensor")
    for plan, message in (
        ("budget", "linear is a plan by uniform; this is one by budget"),
        ("by-tensor", "linear has one scale for each channel; the plan has others"),
    ):
        refused = call(store, "quantize", plan, "--method", "linear", "--dry-run")
        assert refused.exit_code == 2
        assert message in refused.stderr


def test_tfmq_is_refused_before_there_is_a_plan_where_nothing_depends_on_t_alone(tmp_path: Path) -> None:
    """Rejects a dry run that promises what the run refuses, and a plan that is left behind."""
    good(
        tmp_path,
        "train",
        "--preset",
        "paper",
        "--image-size",
        "8",
        "--steps",
        "1",
        "--batch-size",
        "1",
        "--name",
        "old",
    )
    good(tmp_path, "calibrate", "old", "--steps", "20", "--timesteps", "20", "--samples", "1")
    arguments = ("quantize", "old", "--method", "tfmq", "--weights", "int4")
    for more in ((), ("--dry-run",)):
        refused = call(tmp_path, *arguments, *more)
        assert refused.exit_code == 2
        assert "no integer weight of this model depends on t alone" in refused.stderr
    assert not [*Store(tmp_path).manifests("plan")]


def test_noise_correction_can_be_left_out(store: Path) -> None:
    left: Any = good(store, "quantize", "int4", "--method", "ptqd", "--no-noise-correction", "--dry-run")
    assert left["id"] == good(store, "quantize", "int4", "--dry-run")["id"]


def test_a_method_makes_a_model(store: Path) -> None:
    made = good(store, "quantize", "int4", "--method", "ptqd", "--noise-intervals", "2", "--calibration", "uniform")
    assert made["noise_correction_bytes"]


def test_the_intervals_of_tfmq_are_filled_by_the_calibration_set_of_the_default() -> None:
    config, bundle = CalibrateConfig(), METHODS["tfmq"].bundle
    t = torch.tensor(sampling_timesteps(1000, config.steps))[chosen_steps(config, 0)[0]]
    intervals = int(str(bundle.activations["intervals"]))
    assert len(interval_of(t, intervals, 1000).unique()) == intervals


def test_every_method_has_its_section_with_an_equation() -> None:
    page = (Path(__file__).parent.parent / "docs" / "methods.md").read_text()
    sections = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE))
    assert list(sections) == NAMES
    for name, text in sections.items():
        assert " = " in text
        assert re.findall(r"!\[[^\]]+\]\(images/methods/(\S+)\.svg\)", text) == [name]
        assert name == "fisher" or METHODS[name].paper.rpartition("arXiv:")[2] in text


def test_every_picture_of_a_method_is_there_and_drawn_by_the_script() -> None:
    """The page names one for each method, above. Rejects a picture that nobody names, and colours that a dark page hides."""
    docs = Path(__file__).parent.parent / "docs"
    files = {path.stem: path for path in (docs / "images" / "methods").iterdir()}
    assert {path.suffix for path in files.values()} == {".svg"}
    drawn = re.findall(
        r'^    "([a-z0-9-]+)": [a-z0-9_]+,$', (docs / "generate_method_pictures.py").read_text(), re.MULTILINE
    )
    assert sorted(files) == sorted(drawn) == sorted(NAMES)
    for path in files.values():
        content = path.read_text()
        assert len(content) < 60_000
        assert not re.search(r"(fill|stroke): (#000000|#ffffff|black|white)", content)
