"""``fqdiff fisher``: options, what it says, and what it refuses in one line."""

import json
from pathlib import Path

import pytest

from fqdiff.cli.shards import parse_shard
from fqdiff.configs import FisherConfig
from fqdiff.errors import ConfigError
from fqdiff.fisher import memory
from fqdiff.pipeline import Runner
from fqdiff.store.store import Store
from tests.test_cli import call, good


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a checkpoint of 148,757 weights."""
    folder = tmp_path_factory.mktemp("command") / "store"
    good(folder, "train", "--preset", "tiny", "--dataset", "mnist5k", "--steps", "3")
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "5"], "--steps says nothing about the empirical Fisher"),
        (["--kind", "true", "--window", "2", "--sampler", "ddim"], "--sampler, --window says nothing about the true"),
        (["--kind", "trajectory", "--timesteps", "5"], "--timesteps says nothing about the trajectory Fisher"),
        (["--kind", "trajectory", "--no-activations"], "--activations says nothing about the trajectory"),
        (["--kind", "trajectory", "--variance-reduction", "both"], "--variance-reduction says nothing"),
        (["--kind", "trajectory", "--precision", "bfloat16"], "--precision says nothing"),
        (["--bins", "4"], "--bins says nothing without single weights"),
        (["--kind", "exact"], "unknown kind 'exact'"),
        (["--granularity", "layer"], "unknown granularity 'layer'"),
        (["--variance-reduction", "some"], "unknown variance_reduction 'some'"),
        (["--precision", "float16"], "unknown precision 'float16'"),
        (["--kind", "trajectory", "--sampler", "ddpm"], "unknown sampler 'ddpm'"),
        (["--kind", "trajectory", "--steps", "5", "--window", "6"], "window is 6"),
        (["--samples", "5", "--variance-reduction", "antithetic"], "5 samples in antithetic pairs"),
        (["--timesteps", "1001"], "1001 timesteps of a model that has 1000"),
        (["--kind", "trajectory", "--steps", "1001"], "1001 inference steps"),
        (["--shard", "3/2"], "there is no shard 3 of 2"),
        (["--shard", "0/2"], "there is no shard 0 of 2"),
        (["--shard", "half"], "cannot read the shard 'half'"),
        (["--shard", "1/2", "--name", "x"], "a shard is no artifact"),
        (["--max-memory", "much"], "cannot read --max-memory 'much'"),
        (["--max-disk", "-1"], "cannot read --max-disk '-1'"),
        (["--granularity", "weight", "--max-disk", "1MB"], "more than --max-disk 1 MiB"),
        (["--max-memory", "1MB"], "one sample on each of 1 threads needs about"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)  # fmt: skip
def test_options_that_do_not_fit_are_one_line_and_a_hint(store: Path, arguments: list[str], message: str) -> None:
    result = call(store, "fisher", *arguments)
    assert result.exit_code == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith(("error:", "hint:"))]
    assert len(errors) == 2
    assert message in errors[0]
    assert not result.stdout
    assert not list(store.glob("fisher/*"))


@pytest.mark.parametrize("text", ["", "/", "1/", "/2", "1/2/3", "-1/2", "1.0/2", "1 /2", "²/3", "a/b"])
def test_what_is_no_shard_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot read the shard"):
        parse_shard(text)


def test_a_shard_is_counted_from_one() -> None:
    assert (parse_shard("1/1"), parse_shard("07/12")) == ((1, 1), (7, 12))


def test_single_weights_say_what_they_will_take_and_how_to_take_less(store: Path) -> None:
    bins = ["--granularity", "weight", "--timesteps", "20", "--bins", "20"]
    result = call(store, "fisher", *bins, "--dry-run")
    assert result.exit_code == 0
    assert "single weights: 148,757 x 20 bins, about 9.4" in result.stderr
    result = call(store, "fisher", *bins, "--max-disk", "3MB")
    assert result.exit_code == 2
    assert "single weights take about 9 MiB, more than --max-disk 3 MiB" in result.stderr
    assert "use --bins 6 or fewer, --granularity channel, or raise --max-disk" in result.stderr
    assert call(store, "fisher", *bins[:-1], "6", "--max-disk", "3MB", "--dry-run").exit_code == 0
    # A trajectory keeps one diagonal; a table of fewer timesteps has fewer bins.
    trajectory = ["--granularity", "weight", "--kind", "trajectory", "--dry-run"]
    assert "148,757 x 1 bins" in call(store, "fisher", *trajectory).stderr
    few = ["--granularity", "weight", "--timesteps", "3", "--dry-run"]
    assert "148,757 x 3 bins" in call(store, "fisher", *few).stderr


def test_nothing_is_refused_that_is_not_kept(store: Path) -> None:
    assert call(store, "fisher", "--timesteps", "20", "--max-disk", "1B", "--dry-run").exit_code == 0


def test_options_reach_the_recipe(store: Path, tmp_path: Path) -> None:
    chosen = good(
        store, "fisher", "--kind", "true", "--timesteps", "7", "--samples", "4", "--granularity", "weight",
        "--bins", "3", "--no-activations", "--variance-reduction", "both", "--precision", "bfloat16", "--dry-run",
    )["config"]  # fmt: skip
    expected = FisherConfig(
        "true", timesteps=7, samples=4, granularity="weight", bins=3, activations=False,
        variance_reduction="both", precision="bfloat16",
    )  # fmt: skip
    assert chosen == vars(expected)
    chosen = good(store, "fisher", "--kind", "trajectory", "--steps", "9", "--window", "3", "--dry-run")["config"]
    assert chosen == vars(FisherConfig("trajectory", samples=24, steps=9, window=3))
    config = tmp_path / "fqdiff.toml"
    config.write_text('[fisher]\nkind = "trajectory"\nsteps = 9\n')
    chosen = good(store, "fisher", "--config", str(config), "--window", "2", "--dry-run")["config"]
    assert chosen == vars(FisherConfig("trajectory", samples=24, steps=9, window=2))


def test_how_the_work_is_done_is_not_in_the_recipe(store: Path) -> None:
    plain = good(store, "fisher", "--timesteps", "7", "--dry-run")["id"]
    work = ["--max-memory", "1GiB", "--max-disk", "5GiB", "--shard", "1/3"]
    assert good(store, "fisher", "--timesteps", "7", *work, "--dry-run")["id"] == plain


def test_measure_is_what_fisher_does_without_a_word(store: Path) -> None:
    plain = good(store, "fisher", "--timesteps", "7", "--dry-run")["id"]
    assert good(store, "fisher", "measure", "--timesteps", "7", "--dry-run")["id"] == plain


@pytest.mark.parametrize(
    ("arguments", "kind", "timesteps", "samples", "column"),
    [
        (["--timesteps", "3", "--samples", "2", "--kind", "true"], "true", 3, 2, "t=500"),
        (["--kind", "trajectory", "--steps", "2", "--samples", "3"], "trajectory", 2, 3, "whole run"),
    ],
)
def test_the_result_is_a_table_of_blocks(
    store: Path, arguments: list[str], kind: str, timesteps: int, samples: int, column: str
) -> None:
    data = good(store, "fisher", *arguments)
    assert (data["fisher_kind"], data["timesteps"], data["samples"]) == (kind, timesteps, samples)
    blocks = data["blocks"]
    assert isinstance(blocks, list)
    assert [b["block"] for b in blocks] == ["stem", "1", "2", "3", "4", "5", "6", "head"]
    assert sum(b["weights"] for b in blocks) == 148_757
    manifest = Store(store).resolve(str(data["id"]), ("fisher",))
    table = Runner(Store(store)).load(manifest)
    stem = [e for e in table.entries.values() if e.block == "stem"]
    assert blocks[0]["first"] == pytest.approx(
        sum(float(e.mean[0]) * e.numel for e in stem) / sum(e.numel for e in stem)
    )
    text = call(store, "fisher", *arguments).stdout
    assert column in text
    assert f"fisher {data['id']}: {kind}" in text


def test_little_memory_means_smaller_batches_and_the_same_id(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["fisher", "--timesteps", "2", "--samples", "6"]
    dry = good(store, *arguments, "--dry-run")["id"]
    monkeypatch.setattr(memory, "peak_memory", lambda: 0)
    batches = []
    fits = memory.batch_that_fits

    def spy(*values: object) -> int:
        batches.append(fits(*values))  # type: ignore[arg-type]
        return batches[-1]

    monkeypatch.setattr("fqdiff.stages.fisher.batch_that_fits", spy)
    assert good(store, *arguments, "--max-memory", "2MiB")["id"] == dry
    assert 1 <= batches[0] < 32


def test_a_shard_says_how_to_go_on(store: Path) -> None:
    arguments = ["fisher", "--timesteps", "4", "--samples", "2", "--seed", "9", "--shard", "2/3"]
    result = call(store, *arguments)
    table = good(store, *arguments)["id"]
    assert result.stdout == (
        f"measured shard 2 of 3 of fisher {table}\nwhen all are there: fqdiff fisher merge {table}\n"
    )
    shown = json.loads(call(store, *arguments, "--json", "--dry-run").stdout)
    assert shown == {"kind": "fisher", "id": table, "shard": 2, "of": 3, "done": False}
