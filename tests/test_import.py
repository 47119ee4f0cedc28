"""Models that were trained elsewhere: exporting one, finding it again, and refusing what is none."""

import json
import os
import shutil
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fqdiff.chains import PLANS
from fqdiff.cli.run import FROM_SCRATCH, SCALES
from fqdiff.errors import ArtifactCorrupt, LineageError
from fqdiff.pipeline import Runner
from fqdiff.store import pretrained
from fqdiff.store.store import Store
from fqdiff.values import Checkpoint
from tests.test_cli import call, good
from tests.test_docs import ROOT, load

EXPORT = load(ROOT / "examples" / "export_checkpoint.py").main
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a tiny checkpoint, its metrics, and those of a quantized model."""
    folder = tmp_path_factory.mktemp("trained") / "store"
    good(folder, "train", "--preset", "tiny", "--dataset", "mnist5k", "--steps", "5", "--name", "tiny-fp32")
    config = folder.parent / "quick.toml"
    config.write_text("[sample]\nsteps = 3\ncount = 20\n[fisher]\ntimesteps = 2\nsamples = 2\n")
    good(folder, "fid", "--features", "digits", "--config", str(config), "--name", "of-fp32")
    good(folder, "plan", "--uniform", "int8", "--name", "int8")
    good(folder, "fid", "int8", "--features", "digits", "--config", str(config), "--name", "of-int8")
    return folder


@pytest.fixture(scope="module")
def shelf(trained: Path) -> Path:
    """A folder with one pretrained model, ``tiny``."""
    folder = trained.parent / "shelf"
    EXPORT("tiny", "tiny-fp32", trained, ["of-fp32"], folder=folder)
    return folder


@pytest.fixture(autouse=True)
def _pretrained(shelf: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """``pretrained:tiny`` is known; the shipped models are where a test asks for them."""
    if "shipped" not in request.fixturenames:
        monkeypatch.setattr(pretrained, "FOLDERS", (shelf,))


@pytest.fixture
def shipped() -> Path:
    return ROOT / "examples" / "checkpoints"


def parts_of(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """Tensors and facts of a model file."""
    with safe_open(path, framework="pt") as file:
        return load_file(path), json.loads(file.metadata()["fqdiff"])


def write(path: Path, tensors: Tensors, facts: Any) -> Path:
    save_file(tensors, path, metadata={"fqdiff": json.dumps(facts)})
    return path


def imported(store: Path, **data: Any) -> Checkpoint:
    value: Checkpoint = Runner(Store(store)).load(Store(store).resolve(data["id"]))
    return value


# --- export, and the way back ----------------------------------------------------------------------------------------


def test_an_import_gives_the_exported_weights_rounded_to_float16(trained: Path, tmp_path: Path) -> None:
    """Rejects an export of unrounded weights, and an import that casts them a second time to another format."""
    found = imported(tmp_path, **good(tmp_path, "import", "pretrained:tiny"))
    source = imported(trained, id="tiny-fp32")
    assert found.spec == source.spec
    assert found.tensors.keys() == source.tensors.keys()
    for name, tensor in found.tensors.items():
        assert torch.equal(tensor, source.tensors[name].half().float())
        assert tensor.dtype == torch.float32
    assert any(not torch.equal(t, source.tensors[name]) for name, t in found.tensors.items())


def test_an_import_has_pictures_but_no_loss(tmp_path: Path) -> None:
    data = good(tmp_path, "import", "pretrained:tiny", "--name", "mine")
    value = imported(tmp_path, id="mine")
    assert value.loss is None
    assert data["loss"] is None
    assert value.preview.shape[1:] == (1, 8, 8)
    assert sorted(p.name for p in Path(str(data["path"])).iterdir()) == [
        "history.safetensors", "manifest.json", "model.safetensors", "samples.png",
    ]  # fmt: skip
    assert "loss" not in call(tmp_path, "import", "pretrained:tiny").stdout


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_file_of_any_float_is_taken_with_its_values(dtype: torch.dtype, shelf: Path, tmp_path: Path) -> None:
    tensors, facts = parts_of(shelf / "tiny.safetensors")
    path = write(tmp_path / "given.safetensors", {k: t.to(dtype) for k, t in tensors.items()}, facts)
    found = imported(tmp_path, **good(tmp_path, "import", str(path), "--dataset", "mnist5k"))
    assert all(torch.equal(t, tensors[k].to(dtype).float()) for k, t in found.tensors.items())


def test_the_same_file_has_one_id_wherever_it_lies_and_other_bytes_have_another(shelf: Path, tmp_path: Path) -> None:
    ids = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "given.safetensors"
        shutil.copyfile(shelf / "tiny.safetensors", path)
        ids += [good(tmp_path, "import", str(path), "--dataset", "mnist5k")["id"]]
    tensors, facts = parts_of(path)
    write(path, {k: t.bfloat16() for k, t in tensors.items()}, facts)
    other = good(tmp_path, "import", str(path), "--dataset", "mnist5k")["id"]
    assert ids[0] == ids[1] != other


def test_fisher_plan_and_fid_take_an_imported_model(tmp_path: Path) -> None:
    config = tmp_path / "quick.toml"
    config.write_text("[sample]\nsteps = 3\ncount = 20\n[fisher]\ntimesteps = 3\nsamples = 2\n")
    checkpoint = good(tmp_path, "import", "pretrained:tiny")["id"]
    good(tmp_path, "fisher", "--config", str(config))
    good(tmp_path, "plan", "--ratio", "0.5", "--at", "mean", "--low", "int4")
    data = good(tmp_path, "fid", "--features", "digits", "--config", str(config))
    assert (data["n"], data["reference"]) == (20, "mnist5k, 20 of 1000 held-out images")
    lineage = call(tmp_path, "store", "lineage", "latest").stdout
    assert f"checkpoint/{checkpoint}" in lineage
    assert "[outside the store]" in lineage
    assert "[gone]" not in lineage


def test_the_description_holds_what_the_file_is_and_comes_from(trained: Path, shelf: Path) -> None:
    facts = json.loads((shelf / "tiny.json").read_text())
    store = Store(trained)
    source, metrics = store.resolve("tiny-fp32"), store.resolve("of-fp32")
    assert facts["sha256"] == pretrained.sha256_of(shelf / "tiny.safetensors")
    assert facts["bytes"] == (shelf / "tiny.safetensors").stat().st_size
    assert facts["checkpoint"]["id"] == source.id
    assert facts["checkpoint"]["recipe"]["config"] == source.recipe.config
    assert facts["trained_on"]["id"] == source.recipe.inputs[0].id
    assert str(trained) not in json.dumps(facts)
    (quality,) = facts["metrics"]
    assert quality["ids"]["metrics"] == metrics.id
    assert quality["ids"]["checkpoint"] == source.id
    assert (quality["n"], quality["sampler"]["steps"], quality["seed"]) == (20, 3, 0)
    assert quality["weights"] == "before rounding to float16"
    assert facts["overlap"]["train_images_trained_on"] == facts["overlap"]["train_images"] == 4000


def test_metrics_of_the_file_itself_are_taken_and_leave_its_bytes(trained: Path, shelf: Path, tmp_path: Path) -> None:
    store, folder = tmp_path / "store", tmp_path / "shelf"
    shutil.copytree(trained, store)
    good(store, "import", "pretrained:tiny", "--name", "again")
    (tmp_path / "quick.toml").write_text("[sample]\nsteps = 3\ncount = 20\n")
    good(store, "fid", "again", "--features", "digits", "--config", str(tmp_path / "quick.toml"), "--name", "better")
    EXPORT("tiny", "tiny-fp32", store, ["better", "of-fp32"], folder=folder)
    facts = json.loads((folder / "tiny.json").read_text())
    assert [m["weights"] for m in facts["metrics"]] == ["as in the file", "before rounding to float16"]
    assert (folder / "tiny.safetensors").read_bytes() == (shelf / "tiny.safetensors").read_bytes()


def test_metrics_of_another_model_are_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(LineageError, match="are those of quantized"):
        EXPORT("tiny", "tiny-fp32", trained, ["of-int8"], folder=tmp_path)


# --- what is refused -------------------------------------------------------------------------------------------------


def refused(store: Path, source: object, message: str, code: int = 1) -> None:
    """The command ends with one error and one hint, and leaves no artifact."""
    result = call(store, "import", str(source), "--dataset", "mnist5k")
    assert result.exit_code == code, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith(("error:", "hint:"))]
    assert len(errors) == 2
    assert message in errors[0]
    assert "Traceback" not in result.stderr
    assert not list(store.glob("*/*/manifest.json"))


@pytest.mark.parametrize("name", ["large", "", "../shelf/tiny", "tiny.json", "*"])
def test_an_unknown_name_is_answered_with_the_known_ones(name: str, tmp_path: Path) -> None:
    refused(tmp_path, f"pretrained:{name}", f"no pretrained model is called '{name}'", code=2)
    assert "one of: tiny" in call(tmp_path, "import", f"pretrained:{name}").stderr


def test_a_pretrained_file_that_is_damaged_or_missing_is_refused(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "shelf"
    shutil.copytree(shelf, folder)
    monkeypatch.setattr(pretrained, "FOLDERS", (folder,))
    content = bytearray((folder / "tiny.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "tiny.safetensors").write_bytes(bytes(content))
    refused(tmp_path / "store", "pretrained:tiny", "is damaged: sha256")
    (folder / "tiny.safetensors").unlink()
    refused(tmp_path / "store", "pretrained:tiny", "tiny.safetensors is missing")
    (folder / "tiny.json").write_text("{}")
    refused(tmp_path / "store", "pretrained:tiny", "sha256' is missing")


def test_an_installed_file_may_be_a_link(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some installers link files into place; what a link leads to is vouched for by the hash."""
    monkeypatch.setattr(pretrained, "FOLDERS", (tmp_path / "linked",))
    (tmp_path / "linked").mkdir()
    for name in ("tiny.json", "tiny.safetensors"):
        (tmp_path / "linked" / name).symlink_to(shelf / name)
    assert pretrained.open_model("pretrained:tiny").dataset == "mnist5k"


@pytest.mark.parametrize("what", ["link", "folder", "pipe", "nothing"])
def test_a_path_that_is_no_file_is_refused(what: str, shelf: Path, tmp_path: Path) -> None:
    path = tmp_path / "given.safetensors"
    if what == "link":
        path.symlink_to(shelf / "tiny.safetensors")
    elif what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    refused(tmp_path / "store", path, "is missing" if what == "nothing" else "is a link or a folder")


def first(tensors: Tensors, change: Callable[[torch.Tensor], torch.Tensor]) -> Tensors:
    """``tensors`` with the first one changed."""
    name = min(tensors)
    return {**tensors, name: change(tensors[name])}


def with_model(facts: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**facts, "model": {**facts["model"], **changes}}


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    changed = tensor.clone()
    changed.view(-1)[0] = float("nan")
    return changed


HOSTILE: dict[str, tuple[Callable[[Tensors, dict[str, Any]], tuple[Tensors, Any]], str]] = {
    "a shape": (lambda t, f: (first(t, lambda x: x[..., None].contiguous()), f), "do not fit the architecture"),
    "a missing tensor": (lambda t, f: ({k: v for k, v in t.items() if k != min(t)}, f), "do not fit the architecture"),
    "an extra tensor": (lambda t, f: ({**t, "more": torch.ones(1)}, f), "do not fit the architecture: more"),
    "NaN": (lambda t, f: (first(t, with_nan), f), "holds NaN or infinity"),
    "infinity": (lambda t, f: (first(t, lambda x: x + float("inf")), f), "holds NaN or infinity"),
    "int8 tensors": (lambda t, f: (first(t, lambda x: x.to(torch.int8)), f), "no format says how to read it"),
    "float64": (lambda t, f: (first(t, lambda x: x.double()), f), "no format says how to read it"),
    "no facts": (lambda t, f: (t, {}), "is missing"),
    "facts that are none": (lambda t, f: (t, [1, 2]), "is not a table"),
    "no model": (lambda t, f: (t, {k: v for k, v in f.items() if k != "model"}), "model' is missing"),
    "another schema": (lambda t, f: (t, {**f, "schema": 99}), "schema 99"),
    "another family": (lambda t, f: (t, with_model(f, architecture={"family": "mlp"})), "unknown model family"),
    "another schedule": (lambda t, f: (t, with_model(f, schedule="warp")), "warp"),
    "another prediction": (lambda t, f: (t, with_model(f, prediction="x")), "unknown prediction 'x'"),
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_file_that_is_no_such_model_is_refused(attack: str, shelf: Path, tmp_path: Path) -> None:
    change, message = HOSTILE[attack]
    path = write(tmp_path / "given.safetensors", *change(*parts_of(shelf / "tiny.safetensors")))
    refused(tmp_path / "store", path, message)


def test_a_packed_model_is_refused_since_plans_start_from_whole_weights(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "int8.safetensors"
    good(trained, "quantize", "int8", "--output", str(path))
    refused(tmp_path / "store", path, "is int8; plans start from half or full precision")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a readable safetensors file"),
        (b"\x80\x04]q\x00.", "is not a readable safetensors file"),
        ((2**40).to_bytes(8, "little") + b"{}", "its header is larger"),
        (b"PK\x03\x04" + bytes(100), "its header is larger"),
        ((2).to_bytes(8, "little") + b"{}", "is missing"),
    ],
    ids=["empty", "a pickle", "a header of a terabyte", "a zip as torch.save writes it", "no tensors"],
)
def test_bytes_that_are_no_model_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "given.safetensors").write_bytes(content)
    refused(tmp_path / "store", tmp_path / "given.safetensors", message)


def test_a_cut_file_is_refused(shelf: Path, tmp_path: Path) -> None:
    content = (shelf / "tiny.safetensors").read_bytes()
    for size in (4, 100, len(content) // 2, len(content) - 1):
        (tmp_path / "given.safetensors").write_bytes(content[:size])
        with pytest.raises(ArtifactCorrupt):
            pretrained.open_model(str(tmp_path / "given.safetensors"))


def test_images_of_another_shape_are_refused(tmp_path: Path) -> None:
    for k in range(5):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (20 * k, 0, 0)).save(tmp_path / "pictures" / f"{k}.png")
    result = call(tmp_path / "store", "import", "pretrained:tiny", "--dataset", f"folder:{tmp_path / 'pictures'}")
    assert result.exit_code == 1
    assert "images of shape (3, 8, 8) for pretrained:tiny, a model of (1, 8, 8)" in result.stderr
    assert not list(Store(tmp_path / "store").manifests("checkpoint"))


# --- what fqdiff ships -----------------------------------------------------------------------------------------------


def test_every_shipped_model_is_sound_small_and_was_not_trained_on_its_reference(shipped: Path) -> None:
    assert "mnist-small" in pretrained.pretrained_names()
    assert {p.stem for p in shipped.iterdir()} == set(pretrained.pretrained_names())
    for name in pretrained.pretrained_names():
        found = pretrained.open_model(f"pretrained:{name}")
        facts = json.loads((shipped / f"{name}.json").read_text())
        assert (facts["name"], facts["file"]) == (name, f"{name}.safetensors")
        assert facts["bytes"] == (shipped / facts["file"]).stat().st_size <= 5_000_000
        assert {p.format.name for p in found.model.packed.values()} == {"float16"}
        assert facts["overlap"]["held_out_images_trained_on"] == 0
        assert facts["metrics"]
        assert all(m["ids"]["metrics"] for m in facts["metrics"])


def test_the_demo_starts_from_the_shipped_model(shipped: Path, tmp_path: Path) -> None:
    steps = good(tmp_path, "run", "demo", "--dry-run")["steps"]
    checkpoint = good(tmp_path, "import", "pretrained:mnist-small", "--dry-run")
    assert isinstance(steps, list)
    assert steps[1] | {"step": "import", "id": checkpoint["id"]} == steps[1]
    trained = good(tmp_path, "run", "demo", "--from-scratch", "--dry-run")["steps"]
    assert isinstance(trained, list)
    assert [s["step"] for s in trained] == ["data set", "train", *(s["step"] for s in steps[2:])]


def test_a_run_from_a_pretrained_model_compares_formats_that_all_change_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rejects a plan of float16: the weights were shipped in it, and its row would show no error by construction."""
    monkeypatch.setitem(SCALES, "tiny", replace(SCALES["tiny"], pretrained="pretrained:tiny"))
    models = good(tmp_path, "run", "tiny")["models"]
    assert isinstance(models, list)
    full, *quantized, _ = models
    assert all(m["file_bytes"] < full["file_bytes"] and m["image_error"] > 0 for m in quantized)
    assert not list(tmp_path.glob("*/*/loss.png"))


def test_every_size_measures_the_timestep_that_its_plans_read() -> None:
    """Rejects a demo of 250 timesteps: evenly spaced from 0 to 999, they leave t = 1 out."""
    assert {plan.at for plan in PLANS.values() if plan.strategy == "groups"} == {"1"}
    assert all(scale.fisher.timesteps == 1000 for scale in (*SCALES.values(), *FROM_SCRATCH.values()))


def test_settings_of_training_are_refused_where_nothing_is_trained(shipped: Path, tmp_path: Path) -> None:
    (tmp_path / "fqdiff.toml").write_text("[train]\nsteps = 5\n")
    for more, code in (([], 2), (["--from-scratch"], 0)):
        result = call(tmp_path, "run", "demo", *more, "--config", str(tmp_path / "fqdiff.toml"), "--dry-run")
        assert result.exit_code == code
        assert ("nothing to train" in result.stderr) is (code == 2)


def test_a_wheel_would_hold_every_package_and_the_shipped_models() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "fqdiff").rglob("__init__.py")}
    assert set(settings["packages"]) == found | {"fqdiff.checkpoints"}
    assert settings["package-dir"] == {"fqdiff.checkpoints": "examples/checkpoints"}
    assert settings["package-data"]["fqdiff.checkpoints"] == ["*.safetensors", "*.json"]
