"""``fqdiff compare`` from end to end, on the tiny preset."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fqdiff.store.store import Store
from tests.test_cli import call, good
from tests.test_comparison import Halves, saved


def quick(store: Path) -> list[str]:
    """Settings that take a second; the classifier is trained for one epoch."""
    settings = ["--features", "digits", "--count", "40", "--steps", "4", "--config"]
    return [*settings, str(store.parent / "quick.toml")]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare") / "store"
    (folder.parent / "quick.toml").write_text("[classifier]\nepochs = 1\n[compare]\nresamples = 50\n")
    good(folder, "train", "--preset", "tiny", "--dataset", "mnist5k", "--steps", "20", "--name", "full")
    for low in ("float32", "int8", "int2"):
        good(folder, "plan", "full", "--uniform", low, "--name", low)
    return folder


@pytest.fixture(scope="module")
def result(store: Path) -> dict[str, Any]:
    return good(store, "compare", "full", "float32", "int8", "int2", *quick(store))


def pair(result: dict[str, Any], metric: str, of: str, against: str) -> dict[str, Any]:
    (found,) = [d for d in result["differences"] if (d["metric"], d["of"], d["against"]) == (metric, of, against)]
    return dict(found)


def test_plans_are_sampled_and_compared_with_full_precision(result: dict[str, Any]) -> None:
    values = {(m["metric"], m["of"]): m["value"] for m in result["measures"]}
    assert (result["n"], result["seed"], result["floor_seed"]) == (40, 0, 1)
    assert values["image_mse", "model1"] == 0.0
    errors = [values["image_mse", role] for role in ("model2", "model3", "floor")]
    assert errors == sorted(errors)
    assert pair(result, "fid", "model1", "baseline")["verdict"] == "not distinguishable"
    assert pair(result, "image_mse", "model3", "model2")["verdict"] == "worse"


def test_every_number_leads_to_its_samples(result: dict[str, Any], store: Path) -> None:
    opened = Store(store)
    refs = {role: found["ref"] for role, found in result["roles"].items()}
    assert refs == {
        "baseline": "full", "model1": "float32", "model2": "int8", "model3": "int2", "floor": "full, other noise",
    }  # fmt: skip
    manifest = opened.find("comparison", str(result["id"]))
    assert manifest is not None
    assert {i.role: i.id for i in manifest.recipe.inputs if i.kind == "samples"} == {
        role: found["samples"] for role, found in result["roles"].items()
    }
    assert manifest.recipe.config["full_precision_of"] == [1, 2, 3]


def test_what_was_quantized_from_the_baseline_is_never_better(result: dict[str, Any], store: Path) -> None:
    verdicts = {d["verdict"] for d in result["differences"] if d["against"] == "baseline"}
    assert "better" not in verdicts
    other = good(store, "compare", "int2", "full", *quick(store))
    manifest = Store(store).find("comparison", str(other["id"]))
    assert manifest is not None
    assert manifest.recipe.config["full_precision_of"] == []


def test_models_of_two_image_sizes_are_refused_before_anything_is_sampled(store: Path) -> None:
    good(
        store,
        "train",
        "--preset",
        "tiny",
        "--dataset",
        "mnist5k",
        "--image-size",
        "16",
        "--steps",
        "2",
        "--name",
        "large",
    )
    before = sorted(store.glob("samples/*"))
    done = call(store, "compare", "full", "large", *quick(store))
    assert done.exit_code == 1
    assert "error: large makes images (1, 16, 16); full's data set has (1, 8, 8)" in done.stderr
    assert sorted(store.glob("samples/*")) == before


def test_the_text_leads_with_paired_metrics(store: Path) -> None:
    done = call(store, "compare", "full", "float32", "int8", "int2", *quick(store))
    lines = done.stdout.splitlines()
    assert lines[0].startswith("comparison ")
    places = [done.stdout.index(words) for words in ("Noise predicted", "Sampler runs", "image MSE", "FID")]
    assert places == sorted(places)
    assert "compare: found comparison" in done.stderr
    (start,) = (k for k, line in enumerate(lines) if line == "Model against model")
    rows = [line.split() for line in lines[start + 3 : start + 15]]
    assert [" ".join(row[:3]) for row in rows[::4]] == [
        "int8 against float32",
        "int2 against float32",
        "int2 against int8",
    ]
    assert [row[3] for row in rows[:4]] == ["noise", "divergence", "image", "FID"]
    assert all("worse" in row for row in (rows[0], rows[1], rows[2], rows[8], rows[9], rows[10]))
    (same,) = [line for line in lines if line.startswith("float32 ") and "identical" in line]
    assert "0.00e+00" in same
    assert any(line.startswith("full, other noise") for line in lines)
    (start,) = (k for k, line in enumerate(lines) if line.startswith("Noise predicted for held-out images"))
    assert lines[start].endswith(": 20 timesteps, 32 images at each")
    means = [float(line.split()[1]) for line in lines[start + 3 : start + 6]]
    assert means[0] == 0 < means[1] < means[2]
    (start,) = (k for k, line in enumerate(lines) if line.startswith("Sampler runs from the same noise"))
    assert lines[start].endswith(": ddim, 4 steps, 16 runs")


def test_samples_named_are_those_that_models_would_get(result: dict[str, Any], store: Path) -> None:
    base = str(result["roles"]["baseline"]["samples"])
    config = quick(store)[-2:]
    with_samples = good(
        store,
        "compare",
        base,
        "float32",
        "int8",
        "int2",
        "--features",
        "digits",
        "--count",
        "40",
        "--seed",
        "7",
        *config,
    )
    assert with_samples["id"] == result["id"]


def test_a_comparison_without_floor_makes_no_samples_with_another_seed(store: Path) -> None:
    before = {m.id for m in Store(store).manifests("samples")}
    data = good(store, "compare", "full", "int8", *quick(store), "--no-noise-floor")
    assert data["floor_seed"] is None
    assert "floor" not in data["roles"]
    assert {m.id for m in Store(store).manifests("samples")} == before


def test_the_models_are_inputs_and_their_runs_are_the_samples_own(result: dict[str, Any], store: Path) -> None:
    opened = Store(store)
    manifest = opened.find("comparison", str(result["id"]))
    assert manifest is not None
    made_by = {}
    for k, role in enumerate(("baseline", "model1", "model2", "model3")):
        samples = opened.find("samples", str(result["roles"][role]["samples"]))
        assert samples is not None
        made_by[f"network{k}"] = samples.input("model").id  # type: ignore[union-attr]
    assert {i.role: i.id for i in manifest.recipe.inputs if i.role.startswith("network")} == made_by
    assert {name: manifest.recipe.config[name] for name in ("sampler", "steps", "eta")} == {
        "sampler": "ddim", "steps": 4, "eta": 0.0,
    }  # fmt: skip
    last = result["divergence"][2]["points"][-1]
    assert last["at"] == 4
    error = next(m for m in result["measures"] if (m["metric"], m["of"]) == ("image_mse", "model3"))
    assert last["value"] == pytest.approx(error["value"], rel=0.7)  # of the first 16 of 40 images


def test_networks_are_left_alone_where_nobody_asks(store: Path) -> None:
    data = good(store, "compare", "full", "int8", *quick(store), "--error-inputs", "0", "--trajectories", "0")
    manifest = Store(store).find("comparison", str(data["id"]))
    assert manifest is not None
    assert [i.role for i in manifest.recipe.inputs] == ["dataset", "features", "baseline", "floor", "model1"]
    assert (data["noise_error"], data["divergence"], data["sampler"]) == ([], [], "")
    done = call(store, "compare", "full", "int8", *quick(store), "--error-inputs", "0", "--trajectories", "0")
    assert "Noise predicted" not in done.stdout
    assert "Sampler runs" not in done.stdout


def test_samples_of_a_model_that_is_gone_are_refused_by_name(
    result: dict[str, Any], store: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    samples = str(result["roles"]["model2"]["samples"])
    model = Store(copy).resolve(samples, ("samples",)).input("model")
    assert model is not None
    good(copy, "store", "rm", f"{model.kind}/{model.id}", "--force")
    done = call(copy, "compare", "full", samples, "--features", "digits")
    assert done.exit_code == 1
    assert (
        f"{samples}: the model behind these samples, quantized {model.id}, is not in the store any more" in done.stderr
    )


def test_a_sampler_of_compares_own_is_refused(store: Path, tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text("[compare]\nsteps = 3\n")
    done = call(store, "compare", "full", "int8", "--features", "digits", "--config", str(tmp_path / "own.toml"))
    assert done.exit_code == 2
    assert "runs of the sampler are those of the samples" in done.stderr


def test_a_dry_run_makes_nothing(store: Path) -> None:
    before = [m.id for m in Store(store).manifests()]
    data = good(store, "compare", "full", "int8", *quick(store), "--seed", "5", "--dry-run")
    assert data["exists"] is False
    assert set(data["roles"]) == {"baseline", "model1", "floor"}  # type: ignore[call-overload]
    assert [m.id for m in Store(store).manifests()] == before


def test_a_network_of_ones_own_gives_the_features(store: Path, tmp_path: Path) -> None:
    path = saved(Halves(), tmp_path / "halves.pt")
    data = good(store, "compare", "full", "int2", *quick(store)[2:], "--features", f"torchscript:{path}")
    assert (data["features"], data["dimension"]) == ("torchscript", 2)
    assert "inception_score" not in {m["metric"] for m in data["measures"]}  # type: ignore[attr-defined]
    samples = Store(store).resolve(str(data["roles"]["model1"]["samples"]), ("samples",))  # type: ignore[index]
    assert good(store, "fid", samples.id, "--features", f"torchscript:{path}")["features"] == "torchscript"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["full"], 2, "Missing argument"),
        (["full", "nothing"], 1, "is named 'nothing'"),
        (["full", "int8", "--level", "2"], 2, "level is 2.0"),
        (["full", "int8", "--count", "5000"], 2, "5000 images asked for; there are 1000 held-out ones"),
        (["full", "int8", "--trajectories", "1"], 2, "trajectories is 1"),
        (["full", "int8", "--features", "clip"], 2, "unknown features 'clip'"),
        (["full", "int8", "--features", "torchscript:/no/such.pt"], 1, "no feature network at /no/such.pt"),
        (["SAMPLES", "int8", "--steps", "9"], 2, "--steps beside samples"),
        (["SAMPLES", "OTHER"], 1, "were made with steps 3, the baseline's"),
    ],
)
def test_bad_input_is_one_line_and_makes_nothing(
    arguments: list[str], code: int, message: str, store: Path, result: dict[str, Any]
) -> None:
    if "OTHER" in arguments:
        good(store, "sample", "full", "--count", "10", "--steps", "3", "--name", "other")
    before = [m.id for m in Store(store).manifests()]
    names = {"SAMPLES": str(result["roles"]["baseline"]["samples"]), "OTHER": "other"}
    given = [names.get(a, a) for a in arguments]
    features = [] if "--features" in given else ["--features", "digits"]
    done = call(store, "compare", *given, *features)
    assert done.exit_code == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert [m.id for m in Store(store).manifests()] == before


def test_the_artifact_is_plain_json(result: dict[str, Any], store: Path) -> None:
    path = Store(store).directory("comparison", str(result["id"])) / "comparison.json"
    data = json.loads(path.read_text())
    assert data["schema"] == 3
    assert data["measures"] == result["measures"]


def test_the_picture_names_models_and_marks_what_is_identical(
    result: dict[str, Any], store: Path, tmp_path: Path
) -> None:
    data = good(store, "plot", "compare", str(result["id"]), "--format", "svg", "--output", str(tmp_path / "pictures"))
    first, second = (Path(f) for f in data["files"])  # type: ignore[attr-defined]
    drawn = second.read_text()
    for text in ("float32 (identical)", "int2", "16 runs, ddim, 4 steps", "timestep t", f"comparison {result['id']}"):
        assert text in drawn
    drawn = first.read_text()
    for text in ("float32", "int8", "int2", "identical images", "other noise", f"comparison {result['id']}"):
        assert text in drawn
