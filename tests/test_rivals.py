"""The libraries that plans are compared with: what they save is what is counted, and the package itself never imports them."""

import ast
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fqdiff
from fqdiff.configs import ClassifierConfig
from fqdiff.values import Checkpoint
from tests.test_cli import good
from tests.test_docs import ROOT, load

FOREIGN = ("optimum", "sdnq")


@pytest.fixture(scope="module")
def libraries() -> Iterator[ModuleType]:
    yield from _benchmark("rival_libraries")


@pytest.fixture(scope="module")
def rivals() -> Iterator[ModuleType]:
    yield from _benchmark("rivals")


def _benchmark(name: str) -> Iterator[ModuleType]:
    """A script of benchmarks/, which imports its neighbours as scripts do."""
    folder = ROOT / "benchmarks"
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        made = load(folder / f"{name}.py") if name == "rivals" else __import__(name)
        yield made
    finally:
        sys.path.remove(str(folder))
        for neighbour in {"budget", "rival_libraries"} - before:
            sys.modules.pop(neighbour, None)


def needs(library: str) -> None:
    try:
        version(library)
    except PackageNotFoundError:
        pytest.skip(f"{library} is not installed: pip install -c constraints.txt '.[bench]'")


SETTINGS = [
    ("optimum-quanto", {"weights": "qint8"}),
    ("optimum-quanto", {"weights": "qint4", "dtype": "float16"}),
    ("optimum-quanto", {"weights": "qint2", "optimizer": "hqq", "exclude": ["head.output"]}),
    ("optimum-quanto", {"weights": "qfloat8_e4m3fn", "exclude": ["stem*", "head*"]}),
    ("sdnq", {"weights_dtype": "uint4", "quant_conv": True, "group_size": -1, "group_transposed": False}),
    (
        "sdnq",
        {"weights_dtype": "uint2", "dtype": "float16", "scale_dtype": "uint8", "quant_conv": True, "group_size": -1},
    ),
]
SMALL = {"minimum_allowed_numel": 0, "minimum_allowed_channel_size": 0}  # the test's network is tiny


def quantized(libraries: ModuleType, checkpoint: Checkpoint, library: str, options: dict[str, Any]) -> Any:
    needs(library)
    options = {**SMALL, **options} if library == "sdnq" else options
    return libraries.quantized(checkpoint.network(), libraries.Setting(library, "", options))


@pytest.mark.parametrize(("library", "options"), SETTINGS)
def test_counted_bytes_are_the_file_and_the_file_is_smaller(
    libraries: ModuleType, checkpoint: Checkpoint, library: str, options: dict[str, Any], tmp_path: Path
) -> None:
    made = quantized(libraries, checkpoint, library, options)
    path = tmp_path / "model.safetensors"
    save_file(made.network.state_dict(), path)  # as their pages say
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    data = sum(t.nbytes for t in load_file(path).values())
    assert path.stat().st_size == len(made.content) == header + data
    # In place of weights of 4 bytes each. Tiny layers do not make up for their headers, so data alone is compared.
    assert data < 4 * sum(t.numel() for t in checkpoint.tensors.values())


@pytest.mark.parametrize(("library", "options"), SETTINGS)
def test_its_weights_are_what_its_network_computes_with(
    libraries: ModuleType, checkpoint: Checkpoint, library: str, options: dict[str, Any]
) -> None:
    made = quantized(libraries, checkpoint, library, options)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([3, 700])
    dtype = libraries.DTYPES[options.get("dtype", "float32")]
    with torch.no_grad():
        original = checkpoint.network()(x, t)
        plain = checkpoint.spec.network(made.weights)(x, t)
        own = made.network(x.to(dtype), t).float()
    assert made.touched
    assert (plain - original).abs().max() > 1e-4
    # Activations in float16 leave three digits.
    assert torch.allclose(own, plain, atol=2e-2 if dtype == torch.float16 else 1e-4)


def test_the_file_of_quanto_holds_the_whole_network(
    libraries: ModuleType, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    made = quantized(libraries, checkpoint, "optimum-quanto", {"weights": "qint4"})
    from optimum.quanto import quantization_map, requantize

    path = tmp_path / "model.safetensors"
    path.write_bytes(made.content)
    zeros = checkpoint.spec.network({name: torch.zeros_like(t) for name, t in checkpoint.tensors.items()})
    requantize(zeros, load_file(path), quantization_map(made.network))
    for name in made.touched:
        weight = zeros.get_submodule(name.removesuffix(".weight")).weight
        assert torch.equal(weight.dequantize(), made.weights[name]), name


def test_the_file_of_sdnq_holds_the_whole_network(
    libraries: ModuleType, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    made = quantized(libraries, checkpoint, "sdnq", dict(SETTINGS[-2][1]))
    from sdnq.dequantizer import dequantize_sdnq_model

    path = tmp_path / "model.safetensors"
    path.write_bytes(made.content)
    twin = quantized(libraries, checkpoint, "sdnq", dict(SETTINGS[-2][1])).network
    for parameter in twin.parameters():
        parameter.data.zero_()
    twin.load_state_dict(load_file(path), assign=True)
    restored = dict(dequantize_sdnq_model(twin).named_parameters())
    assert all(torch.equal(restored[name], weight) for name, weight in made.weights.items())


def test_settings_have_labels_of_their_own(libraries: ModuleType) -> None:
    settings = [*libraries.quanto_settings(), *libraries.sdnq_settings()]
    assert len({(s.library, s.label) for s in settings}) == len(settings)
    assert len({(s.library, json.dumps(s.options, sort_keys=True)) for s in settings}) == len(settings)


def test_a_library_enters_with_its_most_exact_setting_that_fits(rivals: ModuleType) -> None:
    def row(library: str, label: str, size: int, noise: float) -> Any:
        return rivals.Setting(library, label), rivals.Row(label, "", size, noise)

    rows = [
        row("sdnq", "small", 250, 9.0),
        row("sdnq", "worse", 300, 10.0),
        row("sdnq", "exact", 400, 1.0),
        row("optimum-quanto", "large", 500, 0.5),
    ]
    names = [r.label for _, r in rivals.entrants(rows, [2, 3, 3.5, 4], parameters=1000)]
    assert names == ["small", "exact", "large"]


def test_measurements_are_found_again_after_an_interruption(rivals: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    assert rivals.Ledger(path).get({"a": 1, "b": 2}, lambda: {"x": 1}) == {"x": 1}
    with path.open("a") as file:
        file.write('{"key": {"a": 2}, "va')
    ledger = rivals.Ledger(path)
    assert ledger.get({"b": 2, "a": 1}, lambda: pytest.fail("measured twice")) == {"x": 1}
    assert ledger.get({"a": 2}, lambda: {"x": 2}) == {"x": 2}
    assert rivals.Ledger(path).get({"a": 2}, lambda: pytest.fail("measured twice")) == {"x": 2}


def test_tables_go_between_the_marks_and_leave_the_rest(rivals: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{rivals.BEGIN}\nold\n{rivals.END}\nafter\n")
    rivals.write_between(page, ["new"])
    assert page.read_text() == f"before\n{rivals.BEGIN}\n\nnew\n\n{rivals.END}\nafter\n"


def test_the_package_never_imports_them() -> None:
    """Neither by a statement, anywhere in a file, nor by a name given to importlib."""
    for path in Path(fqdiff.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func):
                names = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            assert not [n for n in names if n.split(".")[0] in FOREIGN], path


def test_only_the_bench_extra_asks_for_them() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanting = {
        name
        for name, wanted in {"": project["dependencies"], **project["optional-dependencies"]}.items()
        if any(w.startswith(FOREIGN) for w in wanted)
    }
    assert wanting == {"bench"}


def test_the_page_is_made_from_the_first_command_to_the_last_row(
    rivals: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a library that rounds to bfloat16, so that none has to be there. Rejects a script whose parts fit no more."""
    store = tmp_path / "store"
    good(store, "train", "--preset", "tiny", "--dataset", "mnist5k", "--steps", "5", "--name", "mnist-small")
    weight = ("--granularity", "weight", "--bins", "1", "--samples", "2")
    good(store, "fisher", "--timesteps", "2", *weight, "--name", "loss")
    good(store, "fisher", "--kind", "trajectory", "--steps", "2", *weight, "--name", "runs")

    def rounded(network: Any, setting: Any) -> Any:
        weights = {name: t.to(torch.bfloat16).float() for name, t in network.state_dict().items()}
        return SimpleNamespace(content=bytes(100_000), weights=weights)

    page = tmp_path / "page.md"
    page.write_text(f"{rivals.BEGIN}\n{rivals.END}\n")
    monkeypatch.setattr(rivals, "quanto_settings", lambda: ())
    monkeypatch.setattr(rivals, "sdnq_settings", lambda: (rivals.Setting("sdnq", "rounded", {}),))
    monkeypatch.setattr(rivals, "quantized", rounded)
    monkeypatch.setattr(rivals, "version", lambda name: "0")
    monkeypatch.setattr(rivals, "ClassifierConfig", lambda: ClassifierConfig(epochs=1))
    words = ["rivals.py", "--store", str(store), "--images", "12", "--steps", "2", "--budgets", "64"]
    monkeypatch.setattr("sys.argv", [*words, "--markdown", str(page)])
    rivals.main()
    made = page.read_text()
    (theirs,) = re.findall(r"\| \*\*sdnq: rounded\*\* \| 100,000 \|.*", made)
    (plan,) = re.findall(r"\| fqdiff: trajectory \|.*", made)
    for line in (theirs, plan):
        assert re.search(r"\| \d+\.\d, [+-]\d+\.\d \[[+-]\d+\.\d, [+-]\d+\.\d\] \|", line)
    assert int(plan.split(" | ")[1].replace(",", "")) <= 100_000
    before = (tmp_path / "store-rivals.jsonl").read_bytes()
    monkeypatch.setattr(rivals, "quantized", lambda *arguments: pytest.fail("measured twice"))
    rivals.main()
    assert page.read_text() == made
    assert (tmp_path / "store-rivals.jsonl").read_bytes() == before
