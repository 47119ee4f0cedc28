"""Strategies of other packages: found by entry point, recorded in the plan, refused in one line where they are wrong."""

import tomllib
from pathlib import Path

import pytest

from fqdiff.store.store import Store
from tests.test_cli import call, good

EXAMPLE = Path(__file__).parent.parent / "examples" / "strategy_plugin"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plugins") / "store"
    good(folder, "train", "--preset", "tiny", "--dataset", "mnist5k", "--steps", "5", "--name", "bare")
    good(folder, "train", "--preset", "tiny", "--dataset", "mnist5k", "--steps", "6", "--name", "full")
    good(folder, "fisher", "full", "--timesteps", "3")
    return folder


def install(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    entries: str,
    code: str,
    name: str = "my-package",
    version: str = "1.0",
) -> None:
    """What pip leaves behind: a module, and the metadata of the distribution that brings it."""
    module = entries.partition(":")[0].split("= ")[-1].strip()
    (folder / f"{module}.py").write_text(code)
    about = folder / f"{name.replace('-', '_')}.dist-info"
    about.mkdir(parents=True, exist_ok=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (about / "entry_points.txt").write_text(f"[fqdiff.strategies]\n{entries}\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(__import__("sys").modules, module, raising=False)


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The example, installed as its pyproject.toml says; its version."""
    about = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())
    ((name, target),) = about["project"]["entry-points"]["fqdiff.strategies"].items()
    (module,) = about["tool"]["setuptools"]["py-modules"]
    code = (EXAMPLE / f"{module}.py").read_text()
    install(tmp_path, monkeypatch, f"{name} = {target}", code, about["project"]["name"], about["project"]["version"])
    return str(about["project"]["version"])


def test_the_examples_plan_is_quantized_like_any_other(store: Path, example: str) -> None:
    data = good(
        store, "plan", "full", "--strategy", "size-and-fisher", "--setting", "share=0.4", "--setting", "low=int3"
    )
    assert data["strategy"] == f"size-and-fisher of fqdiff-size-and-fisher {example}"
    opened = Store(store)
    manifest = opened.find("plan", str(data["id"]))
    assert manifest is not None
    config = manifest.recipe.config
    assert (config["distribution"], config["version"]) == ("fqdiff-size-and-fisher", example)
    assert config["settings"] == ["share=0.4", "low=int3"]
    quantized = good(store, "quantize", str(data["id"]))
    size = opened.directory("quantized", str(quantized["id"])) / "model.safetensors"
    assert size.stat().st_size == data["file_bytes"]
    shown = call(store, "plan", "show", str(data["id"]))
    assert shown.exit_code == 0, shown.stderr
    text = call(
        store, "plan", "full", "--strategy", "size-and-fisher", "--setting", "share=0.4", "--setting", "low=int3"
    )
    assert "int3" in text.stdout
    assert "int8" in text.stdout
    assert "plan-plugin: found plan" in text.stderr


def test_the_most_important_weights_stay_high(store: Path, example: str) -> None:
    data = good(store, "plan", "full", "--strategy", "size-and-fisher", "--setting", "share=0.4")
    entries = Store(store).directory("plan", str(data["id"])) / "plan.json"
    import json

    weights = [e for e in json.loads(entries.read_text())["entries"] if len(e["shape"]) >= 2]
    best = max(weights, key=lambda e: e["score"])
    assert best["format"] == "int8"
    assert {e["format"] for e in weights} == {"int8", "int4"}
    assert all("size-and-fisher" in e["rule"] for e in weights)


def test_another_version_is_another_plan(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "def choose(tensors, importance, settings):\n    return dict.fromkeys(tensors, settings['to'])\n"
    ids = []
    for version in ("1.0", "1.1"):
        install(tmp_path, monkeypatch, "flat = flat_strategy:choose", code, version=version)
        ids.append(good(store, "plan", "full", "--strategy", "flat", "--setting", "to=int4")["id"])
    ids.append(good(store, "plan", "full", "--strategy", "flat", "--setting", "to=int5")["id"])
    assert len(set(ids)) == 3


def test_what_a_plugin_does_to_the_weights_it_is_shown_changes_nothing(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "def choose(tensors, importance, settings):\n"
        "    for t in tensors.values():\n        t.fill_(float('nan'))\n"
        "    assert not importance\n"
        "    return dict.fromkeys(tensors, 'int4')\n"
    )
    install(tmp_path, monkeypatch, "vandal = vandal_strategy:choose", code)
    done = call(store, "plan", "bare", "--strategy", "vandal")
    assert done.exit_code == 0, done.stderr
    assert "has no table; the plug-in gets no importance" in done.stderr
    good(store, "quantize")  # of the latest plan: NaN would be refused


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise KeyError('boo')", "strategy odd of my-package 1.0 failed: KeyError: 'boo'"),
        ("return None", "returned NoneType: not a format's name for each tensor's name"),
        ("return dict.fromkeys(tensors, 4)", "returned dict: not a format's name"),
        ("return {}", "gave no format for "),
        ("return dict.fromkeys(tensors, 'int4') | {'more': 'int4'}", "gave a format for more, unknown tensors"),
        ("return dict.fromkeys(tensors, 'int99')", "unknown format 'int99'"),
        ("return dict.fromkeys(tensors, 'int4:4/2')", "phases belong to a budget"),
        ("return dict.fromkeys(tensors, float('nan'))", "not a format's name"),
    ],
)
def test_nonsense_is_one_clear_line_and_writes_nothing(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, message: str
) -> None:
    install(
        tmp_path, monkeypatch, "odd = odd_strategy:choose", f"def choose(tensors, importance, settings):\n    {body}\n"
    )
    before = [m.id for m in Store(store).manifests()]
    done = call(store, "plan", "full", "--strategy", "odd")
    assert done.exit_code == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert [m.id for m in Store(store).manifests()] == before


def test_what_cannot_be_found_says_what_there_is(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = call(store, "plan", "full", "--strategy", "missing")
    assert done.exit_code == 2
    assert "no plug-in offers a strategy 'missing'" in done.stderr
    install(tmp_path, monkeypatch, "odd = odd_strategy:choose", "import nothing_of_that_name\n")
    assert (
        "strategies of plug-ins: odd of my-package 1.0" in call(store, "plan", "full", "--strategy", "missing").stderr
    )
    assert "cannot be imported: ModuleNotFoundError" in call(store, "plan", "full", "--strategy", "odd").stderr
    install(tmp_path, monkeypatch, "odd = third_strategy:choose", "choose = 3\n")
    assert "is no function" in call(store, "plan", "full", "--strategy", "odd").stderr
    other = tmp_path / "other"
    other.mkdir()
    install(other, monkeypatch, "odd = other_strategy:choose", "", name="other-package", version="2")
    twice = call(store, "plan", "full", "--strategy", "odd").stderr
    assert "is offered twice: odd of my-package 1.0, odd of other-package 2" in twice


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strategy", "groups"], "'groups' is a strategy of fqdiff's own"),
        (["--strategy", "flat", "--low", "int4"], "--low beside --strategy"),
        (["--strategy", "flat", "--target-bpw", "4"], "--target-bpw beside --strategy"),
        (["--strategy", "size-and-fisher", "--setting", "share"], "setting 'share'"),
        (["--strategy", "size-and-fisher", "--setting", "a=1", "--setting", "a=2"], "name one twice"),
        (["--strategy", "size-and-fisher", "--setting", "share=7"], "share is 7.0"),
        (["--strategy", "size-and-fisher", "--granularity", "element"], "unknown granularity 'element'"),
        (["--setting", "share=1", "--uniform", "int4"], "--setting without a plug-in"),
    ],
)
def test_wrong_options_are_refused(store: Path, example: str, arguments: list[str], message: str) -> None:
    done = call(store, "plan", "full", *arguments)
    assert done.exit_code == 2
    assert message in done.stderr
