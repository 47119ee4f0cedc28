"""Precision of activations in the plan: one format, or a wider one where layer outputs matter most; quantize follows it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fqdiff.configs import PlanConfig, config_data
from fqdiff.context import Context
from fqdiff.errors import ArtifactCorrupt, ConfigError, LineageError
from fqdiff.models.registry import build
from fqdiff.planning.activations import activation_formats
from fqdiff.stages.plan import plan, plan_by_gain
from fqdiff.store.plan_files import load_plan, save_plan
from fqdiff.values import Checkpoint, FisherTable
from tests.test_cli import call, good

MIXED = ("--activations", "int4", "--wide-activations", "int8", "--activation-ratio", "0.25")
CONFIG = PlanConfig("uniform", low="int4", activations="int4", wide_activations="int8", activation_ratio=0.25)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("activations") / "store"
    good(folder, "train", "--preset", "tiny", "--dataset", "mnist5k", "--steps", "5", "--name", "one")
    good(folder, "fisher", "--timesteps", "3", "--name", "table")
    good(folder, "calibrate", "one", "--steps", "4", "--timesteps", "4", "--samples", "2")
    good(folder, "plan", "table", "--uniform", "int4", *MIXED, "--name", "mixed")
    return folder


def header(made: Any) -> Any:
    content = Path(made["file"]).read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["fqdiff"])


def test_a_plan_without_them_has_the_recipe_and_the_file_it_had(checkpoint: Checkpoint, tmp_path: Path) -> None:
    assert not {"activations", "wide_activations", "activation_ratio"} & config_data(PlanConfig()).keys()
    save_plan(plan(checkpoint, None, None, PlanConfig("uniform", low="int4"), 0, Context()), tmp_path)
    assert "activations" not in json.loads((tmp_path / "plan.json").read_text())


def test_w4a8_is_both_formats(store: Path) -> None:
    both = good(store, "plan", "one", "--uniform", "W4A8")
    assert good(store, "plan", "one", "--uniform", "w4a8")["id"] == both["id"]
    assert both["id"] == good(store, "plan", "one", "--uniform", "int4", "--activations", "int8", "--dry-run")["id"]
    assert set(both["activations"].values()) == {"int8"}  # type: ignore[attr-defined]
    weights = good(store, "plan", "one", "--uniform", "W4A32", "--dry-run")
    assert weights["id"] == good(store, "plan", "one", "--uniform", "int4", "--dry-run")["id"]


def test_the_share_with_the_highest_fisher_values_is_wide(checkpoint: Checkpoint, fisher_table: FisherTable) -> None:
    """Rejects a share taken from the lowest, and one of every block."""
    found = plan_by_gain(checkpoint, fisher_table, None, None, CONFIG, 0, Context()).activations
    assert not {"stem.conv", "output"} & found.keys()
    wide = {site for site, name in found.items() if name == "int8"}
    assert len(wide) == round(0.25 * len(found))
    value = {layer: float(entry.mean.mean()) for layer, entry in fisher_table.activations.items()}
    layers = [site for site in found if site in value]
    assert min(value[s] for s in layers if s in wide) >= max(value[s] for s in layers if s not in wide)
    qkv = [site for site in found if site.endswith((".query", ".key", ".value"))]
    assert {(site in wide) for site in qkv if "block2" in site} == {"block2.attention.qkv" in wide}


def test_quantize_follows_it_and_the_file_samples_without_calibration_data(store: Path, tmp_path: Path) -> None:
    """Rejects one format for all sites, and a file that needs its plan or its set to be read."""
    planned: Any = good(store, "plan", "show", "mixed")["activations"]
    made: Any = good(store, "quantize", "mixed")
    formats = {site: group["format"] for group in header(made)["activations"] for site in group["sites"]}
    assert formats == {
        site: name.replace("int", "uint") if site.endswith(".softmax") else name for site, name in planned.items()
    }
    assert set(planned.values()) == {"int4", "int8"}
    alone = Path(shutil.copytree(store, tmp_path / "store"))
    for kind in ("calibration", "plan", "fisher", "checkpoint"):
        shutil.rmtree(alone / kind)
    assert good(alone, "sample", made["id"], "--count", "2", "--steps", "2")
    shown = call(store, "plan", "show", "mixed").stdout
    assert "activations: int4 at " in shown
    assert "int8: " in shown


def test_settings_of_quantize_and_methods_go_with_it(store: Path) -> None:
    tabulated: Any = good(store, "quantize", "mixed", "--tabulate-temporal", "--activation-last", "int8")
    sites = {site for group in header(tabulated)["activations"] for site in group["sites"]}
    assert "output" in sites
    assert not any(site.startswith("stem.time") or site.endswith("res1.time") for site in sites)
    method: Any = good(store, "quantize", "mixed", "--method", "linear", "--dry-run")
    assert "--activation-range min-max" in method["bundle"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("quantize", "mixed", "--activations", "int8"), "--activations of a plan that has its own"),
        (("plan", "one", "--uniform", "W4A8", "--activations", "int8"), "--activations beside W4A8"),
        (("plan", "one", "--uniform", "W4A9"), "unknown activation format 'int9'"),
        (("plan", "one", "--uniform", "int4", *MIXED[:4]), "wider activations without a share"),
        (("plan", "table", "--uniform", "int4", *MIXED[2:]), "wide activations in 'int8', others in 'float32'"),
        (
            ("plan", "table", "--uniform", "int4", "--activations", "int8", *MIXED[2:]),
            "wide activations in 'int8', others in 'int8'",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(store: Path, arguments: tuple[str, ...], message: str) -> None:
    refused = call(store, *arguments)
    assert refused.exit_code == 2
    assert message in refused.stderr


def test_a_table_without_layer_outputs_or_of_other_layers_is_refused(
    checkpoint: Checkpoint, fisher_table: FisherTable
) -> None:
    network = build(checkpoint.spec.architecture, "meta")
    with pytest.raises(ConfigError, match="no Fisher values of layer outputs"):
        activation_formats(network, replace(fisher_table, activations={}), CONFIG)
    some = dict(list(fisher_table.activations.items())[:3])
    with pytest.raises(LineageError, match="no output of"):
        activation_formats(network, replace(fisher_table, activations=some), CONFIG)


def test_a_strangers_plan_is_checked(checkpoint: Checkpoint, fisher_table: FisherTable, tmp_path: Path) -> None:
    made = plan_by_gain(checkpoint, fisher_table, None, None, CONFIG, 0, Context())
    save_plan(made, tmp_path)
    assert load_plan(tmp_path) == made
    save_plan(replace(made, activations={"block1.res1.conv1": "int99"}), tmp_path)
    with pytest.raises(ArtifactCorrupt, match="unknown format"):
        load_plan(tmp_path)
