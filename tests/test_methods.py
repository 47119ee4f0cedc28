"""The table of methods says what is so: its commands exist, its bundles equal their flags, and what is missing is named."""

import json
import re
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
from tests.test_cli import call, good

NAMES = ["linear", "squant", "ptq4dm", "q-diffusion", "ptqd", "tdq", "tfmq", "repq", "fisher"]
PLANS = {"q-diffusion": "split", "squant": "squant", "ptq4dm": "by-mse", "fisher": "budget"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods") / "store"
    good(folder, "train", "--preset", "tiny", "--dataset", "mnist5k", "--steps", "5", "--name", "one")
    good(folder, "fisher", "--timesteps", "3")
    good(folder, "plan", "--uniform", "int4", "--name", "int4")
    good(folder, "plan", "--uniform", "int4", "--rounding", "squant", "--name", "squant")
    good(folder, "plan", "--uniform", "int4", "--range", "mse", "--name", "by-mse")
    good(folder, "plan", "--uniform", "int4", "--granularity", "split", "--name", "split")
    good(folder, "plan", "--target-bpw", "9", "--name", "budget")
    few = ("--steps", "4", "--timesteps", "4", "--samples", "2")
    good(folder, "calibrate", "one", *few, "--name", "uniform")
    good(folder, "calibrate", "one", *few, "--scheme", "ndtc", "--name", "ndtc")
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
def test_a_bundle_is_the_flags_that_it_prints(store: Path, name: str, activations: tuple[str, ...]) -> None:
    sets = "ndtc" if name == "ptq4dm" else "uniform"
    plan, bundle = PLANS.get(name, "int4"), METHODS[name].bundle
    ActivationConfig(**bundle.activations)  # type: ignore[arg-type]
    uses_inputs = bool(activations) or bundle.reconstruct or bundle.reparameterize or bundle.noise_correction
    common = (*activations, *(("--calibration", sets) if uses_inputs else ()), "--dry-run")
    by_name = good(store, "quantize", plan, "--method", name, *common)
    flags = bundle.flags(bool(activations))
    assert by_name["bundle"] == list(flags)
    assert good(store, "quantize", plan, *" ".join(flags).split(), *common)["id"] == by_name["id"]
    assert f"{name} is {' '.join(flags)}".strip() in call(store, "quantize", plan, "--method", name, *common).stdout


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
    ],
)
def test_what_a_method_is_not_is_refused(store: Path, arguments: tuple[str, ...], message: str) -> None:
    refused = call(store, "quantize", *arguments)
    assert refused.exit_code == 2
    assert message in refused.stderr
    assert "hint: " in refused.stderr


def test_a_flag_goes_over_its_method(store: Path) -> None:
    common = ("int4", "--activations", "int8", "--calibration", "uniform", "--dry-run")
    made = good(store, "quantize", *common, "--method", "tfmq", "--activation-intervals", "4")
    assert made["config"]["intervals"] == 4  # type: ignore[index]
    assert made["config"]["range"] == "min-max"  # type: ignore[index]


def test_q_diffusion_makes_a_model_of_the_size_of_its_plan_and_scales(store: Path) -> None:
    few = ("--reconstruct-iterations", "3", "--steps-iterations", "2", "--calibration", "uniform")
    made: Any = good(store, "quantize", "split", "--method", "q-diffusion", "--activations", "int8", *few)
    assert made["file_bytes"] == made["promised_bytes"] + made["activation_bytes"]
    assert "split" in {a["granularity"] for a in _header(Path(made["file"]))["activations"]}
    assert any(q["granularity"].startswith("split") for q in _header(Path(made["file"]))["quantized"].values())
    weights: Any = good(store, "quantize", "split", "--method", "q-diffusion", *few[:2], *few[4:])
    assert weights["file_bytes"] == weights["promised_bytes"]


def test_fisher_distills_before_it_quantizes_activations(store: Path) -> None:
    few = ("--distill-batch", "2", "--activation-intervals", "2", "--calibration", "uniform")
    method = ("quantize", "budget", "--method", "fisher", "--distill", "2", *few)
    made: Any = good(store, *method, "--activations", "int8")
    assert made["file_bytes"] == made["promised_bytes"] + made["activation_bytes"]
    weights: Any = good(store, "quantize", "budget", "--distill", "2", *few[:2])
    assert weights["id"] in str(made["inputs"]["model"])
    assert weights["file_bytes"] == weights["promised_bytes"]
    plain: Any = good(store, "quantize", "budget", "--method", "fisher", "--distill", "0", "--dry-run")
    assert plain["id"] == good(store, "quantize", "budget", "--dry-run")["id"]


def _header(path: Path) -> Any:
    content = path.read_bytes()
    return json.loads(json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["fqdiff"])


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
        assert name == "fisher" or METHODS[name].paper.rpartition("arXiv:")[2] in text
