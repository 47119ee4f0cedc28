import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from fqdiff.cli.app import app
from fqdiff.store.store import Store

ROOT = Path(__file__).parent.parent


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("examples") / "store")
    for command in (
        ["train", "--preset", "tiny", "--dataset", "mnist5k", "--steps", "5"],
        ["fisher", "--timesteps", "3"],
    ):
        result = CliRunner(env={"FQDIFF_STORE": folder}).invoke(app, [*command, "--quiet"])
        assert result.exit_code == 0, result.stderr
    return folder


def test_the_command_page_equals_the_commands_help() -> None:
    generated = load(ROOT / "docs" / "generate_cli.py").generate()
    assert (ROOT / "docs" / "cli.md").read_text() == generated, "run python docs/generate_cli.py"


def test_the_formats_example_runs_and_fewer_bits_mean_more_error(store: str) -> None:
    errors = load(ROOT / "examples" / "compare_formats.py").main(store, count=8, steps=3)
    assert errors["float16"] < errors["int8"] < errors["int4"]


def test_real_images_are_as_far_from_each_other_as_the_example_says(store: str) -> None:
    """Rejects sets that overlap: the distance of a set from itself is 0, and falls with the number that they share."""
    few, many = (load(ROOT / "examples" / "real_vs_real.py").main(store, "mnist5k", 8, n, 2) for n in (100, 500))
    assert 0 < max(many) < min(few)


def test_the_fisher_example_names_tensors(store: str) -> None:
    names = load(ROOT / "examples" / "query_fisher.py").main(store)
    assert len(set(names)) == 5
    assert "head.output.weight" in names


def test_the_duckdb_example_shares_the_information_out_among_blocks(store: str) -> None:
    """Rejects a mean of means, which would count a small tensor as much as a large one: against pyarrow's own sums."""
    pytest.importorskip("duckdb", reason="duckdb is not installed")
    shares = load(ROOT / "examples" / "query_fisher_duckdb.py").main(store)
    opened = Store(Path(store))
    path = opened.directory("fisher", opened.resolve("latest", ("fisher",)).id) / "fisher.parquet"
    totals: dict[str, float] = {}
    for row in pq.read_table(path, columns=["block", "sum"]).to_pylist():
        totals[row["block"]] = totals.get(row["block"], 0.0) + row["sum"]
    assert shares == pytest.approx({block: total / sum(totals.values()) for block, total in totals.items()})
    assert list(shares.values()) == sorted(shares.values(), reverse=True)


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "examples").glob("*.py")))
def test_an_example_that_is_asked_for_help_only_says_what_it_does(name: str, tmp_path: Path) -> None:
    """Rejects a script that takes --help for a job, or for a file's name."""
    command = [sys.executable, str(ROOT / "examples" / name), "--help"]
    own = {**os.environ, "PYTHONPATH": str(ROOT) + os.pathsep + os.environ.get("PYTHONPATH", "")}
    done = subprocess.run(command, cwd=tmp_path, env=own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()
    assert not list(tmp_path.iterdir())


def test_the_chain_example_compares_what_it_made(tmp_path: Path) -> None:
    errors = load(ROOT / "examples" / "end_to_end.py").main(str(tmp_path / "store"), count=20, steps=10)
    assert 0 < errors["fisher, 4 bits"] < errors["reverse, 4 bits"]


def test_the_example_of_ones_own_network_gets_smaller_and_the_mix_lies_between() -> None:
    found = load(ROOT / "examples" / "own_unet.py").main(channels=16)
    sizes, errors = ([value[k] for value in found.values()] for k in (0, 1))
    assert errors[0] == 0 < errors[1] < errors[3] < errors[2]
    assert sizes[0] > sizes[1] > sizes[3] > sizes[2]


def test_the_features_example_is_taken_by_fid_and_compare(store: str, tmp_path: Path) -> None:
    path = load(ROOT / "examples" / "own_features.py").main(str(tmp_path / "edges.pt"))
    runner = CliRunner(env={"FQDIFF_STORE": store})
    full = Store(Path(store)).resolve("latest", ("checkpoint",)).id
    for command in (
        ["plan", full, "--uniform", "int4", "--name", "four"],
        ["compare", full, "four", "--count", "20", "--steps", "3", "--features", f"torchscript:{path}"],
        ["fid", "--features", f"torchscript:{path}"],
    ):
        result = runner.invoke(app, [*command, "--json"])
        assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["dimension"] == 32


def test_the_python_page_runs_from_top_to_bottom(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FQDIFF_STORE", store)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec("".join(blocks), names)
    assert names["images"].dtype == torch.uint8
    assert names["images"].shape == (4, *names["network"].spec.image_shape)


def test_the_python_of_the_readme_makes_the_model_it_names(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fqdiff-store").symlink_to(store)
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    assert {p.format.name for p in names["small"].packed.values()} == {"int8", "float32"}
    assert isinstance(names["network"], torch.nn.Module)


def test_every_command_in_the_readme_exists() -> None:
    text = (ROOT / "README.md").read_text() + (ROOT / "docs" / "concepts.md").read_text()
    known = {c.name for c in app.registered_commands} | {g.name for g in app.registered_groups}
    used = set(re.findall(r"fqdiff ([a-z]+)", text))
    assert used
    assert used <= known | {"diff"}


def test_links_in_the_docs_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_nothing_committed_names_a_path_of_this_machine() -> None:
    texts = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    for path in [*texts, *(ROOT / "examples").rglob("*.py"), *(ROOT / "examples").rglob("*.json")]:
        assert not re.search(r"/(root|home/\w+|tmp)/", path.read_text()), path


def test_what_the_replication_says_of_fisher_information_follows_from_the_readmes_table() -> None:
    """Rejects "block 1 alone has 99 %": that is its share of the means of a weight, not of all Fisher information."""
    rows = re.findall(r"^([1-6]) +([\d,]+) .* (\S+)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    means = {int(block): float(mean) for block, _, mean in rows}
    sums = {int(block): int(weights.replace(",", "")) * means[int(block)] for block, weights, _ in rows}
    first, second, sixth = (f"{sums[block] / sum(sums.values()):.0%}".replace("%", " %") for block in (1, 2, 6))
    words = (ROOT / "docs" / "results" / "replication.md").read_text()
    assert f"of the sum of these six means block 1 has {means[1] / sum(means.values()):.0%}".replace("%", " %") in words
    assert f"block 1 has {first}, and block 6 ({sixth}) comes before block 2 ({second})" in words
    assert "cannot be told from noise" not in words
