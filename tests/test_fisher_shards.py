"""Long measurements: cut into units, shared between processes, stopped, continued, and joined to the same bytes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from fqdiff.cli.shards import parse_shard
from fqdiff.configs import FisherConfig
from fqdiff.context import Context, MemoryParts, Part
from fqdiff.errors import ArtifactCorrupt, ArtifactNotFound
from fqdiff.stages import fisher as module
from fqdiff.stages.fisher import fisher, fisher_shard, gather, missing_units, units
from fqdiff.store.manifest import recipe_from_json
from fqdiff.store.parts import RECIPE, StoredParts, adopt_parts, unfinished
from fqdiff.store.store import Store
from fqdiff.values import Checkpoint, Dataset
from tests.test_cli import call, good
from tests.test_fisher import same

SMALL = FisherConfig(timesteps=10, samples=2, granularity="weight", bins=5)


# --- units -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "count", "largest"),
    [
        (FisherConfig(timesteps=1000, samples=8), 63, 16),
        (FisherConfig(timesteps=1000, samples=128), 63, 16),
        (FisherConfig(timesteps=3, samples=2), 1, 3),
        (FisherConfig(timesteps=50, samples=64), 25, 2),
        (FisherConfig(timesteps=1000, granularity="weight", bins=20), 20, 50),
        (FisherConfig(timesteps=10, granularity="weight", bins=4), 4, 3),
        (FisherConfig(timesteps=3, granularity="weight", bins=20), 3, 1),
        (FisherConfig("trajectory", samples=10), 3, 4),
    ],
    ids=str,
)
def test_units_hold_all_the_work_once_and_in_order(
    checkpoint: Checkpoint, config: FisherConfig, count: int, largest: int
) -> None:
    cut = units(checkpoint.spec, config)
    members = [m for unit in cut for m in unit.members]
    assert (len(cut), max(len(u.members) for u in cut)) == (count, largest)
    assert members == sorted(set(members))
    if config.kind == "trajectory":
        assert members == list(range(config.samples))
    else:
        assert (len(members), members[0], members[-1]) == (config.timesteps, 0, 999)
    assert [u.name for u in cut] == [f"unit-{k + 1:04}-of-{count:04}" for k in range(count)]


@pytest.mark.parametrize("config", [SMALL, FisherConfig("trajectory", samples=9, steps=1)], ids=["timesteps", "runs"])
@pytest.mark.parametrize("order", ["2/2 1/2", "3/3 1/3 2/3", "6/7 1/6 2/6 3/6 4/6 5/6 6/6"])
def test_shards_in_any_order_join_to_the_table_of_one_run(
    checkpoint: Checkpoint, dataset: Dataset, config: FisherConfig, order: str
) -> None:
    """Also more shards than units, and shares that overlap."""
    whole = fisher(checkpoint, dataset, config, 0, Context())
    context = Context(parts=MemoryParts())
    for text in order.split():
        fisher_shard(checkpoint, dataset, config, 0, context, parse_shard(text))
    assert not missing_units(checkpoint.spec, config, context.parts)
    joined = gather(checkpoint, config, context)
    assert same(joined, whole)
    assert all(torch.equal(e.samples, joined.trajectory[name].samples) for name, e in whole.trajectory.items())


def measuring(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the units that are measured from now on."""
    seen: list[str] = []
    measure_unit = module.timesteps_of

    def spy(job: Any, unit: Any, *rest: Any) -> Part:
        seen.append(unit.name)
        return measure_unit(job, unit, *rest)

    monkeypatch.setattr(module, "timesteps_of", spy)
    return seen


def test_a_run_stopped_between_units_continues_with_those_that_lack(
    checkpoint: Checkpoint, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fisher(checkpoint, dataset, SMALL, 0, Context())
    seen, parts, asked = measuring(monkeypatch), MemoryParts(), iter([False, True])
    with pytest.raises(KeyboardInterrupt):
        fisher(checkpoint, dataset, SMALL, 0, Context(parts=parts, soft_stop=lambda: nullcontext(lambda: next(asked))))
    names = [u.name for u in units(checkpoint.spec, SMALL)]
    assert seen == sorted(parts.saved) == names[:2]
    assert missing_units(checkpoint.spec, SMALL, parts) == names[2:]
    seen.clear()
    assert same(fisher(checkpoint, dataset, SMALL, 0, Context(parts=parts)), whole)
    assert seen == names[2:]


def test_units_that_are_not_what_they_should_be_are_named(checkpoint: Checkpoint, dataset: Dataset) -> None:
    parts = MemoryParts()
    context = Context(parts=parts)
    fisher_shard(checkpoint, dataset, SMALL, 0, context, (1, 1))
    name = units(checkpoint.spec, SMALL)[3].name
    part = parts.saved.pop(name)
    with pytest.raises(ArtifactNotFound, match=f"{name} of the Fisher table is missing"):
        gather(checkpoint, SMALL, context)
    parts.save(name, Part(part.tensors, {**part.data, "members": [1, 2]}))
    with pytest.raises(ArtifactCorrupt, match=f"{name} holds other timesteps"):
        gather(checkpoint, SMALL, context)
    short = {key: v for key, v in part.tensors.items() if key != "parameter/head.output.bias/mean"}
    parts.save(name, Part(short, part.data))
    with pytest.raises(ArtifactCorrupt, match="do not fit together"):
        gather(checkpoint, SMALL, context)


# --- whole commands --------------------------------------------------------------------------------------------------

UNITS = ["--samples", "2", "--granularity", "weight", "--bins", "8"]
MEASURE = ["fisher", "--timesteps", "16", *UNITS]
SLOWLY = ["fisher", "--timesteps", "64", *UNITS]  # long enough to be stopped half-way


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a checkpoint."""
    folder = tmp_path_factory.mktemp("trained") / "store"
    good(folder, "train", "--preset", "tiny", "--dataset", "mnist5k", "--steps", "3")
    return folder


@pytest.fixture
def stores(trained: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two machines with the same checkpoint."""
    return tuple(Path(shutil.copytree(trained, tmp_path / f"empty-{name}")) for name in ("a", "b"))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def measured_halves(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two machines with every other unit each."""
    folder = tmp_path_factory.mktemp("halves")
    for k, name in enumerate(("a", "b"), start=1):
        shard(Path(shutil.copytree(trained, folder / name)), f"{k}/2")
    return folder


@pytest.fixture
def halves(measured_halves: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of them, to be damaged."""
    return tuple(Path(shutil.copytree(measured_halves / name, tmp_path / name)) for name in ("a", "b"))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def whole(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, bytes]]:
    """Id and files of one run without a stop."""
    folder = shutil.copytree(trained, tmp_path_factory.mktemp("whole") / "store")
    return str(good(folder, *MEASURE)["id"]), files(folder)


@pytest.fixture(scope="module")
def slow_whole(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, bytes]]:
    """The same of SLOWLY."""
    folder = shutil.copytree(trained, tmp_path_factory.mktemp("slow") / "store")
    return str(good(folder, *SLOWLY)["id"]), files(folder)


def files(store: Path) -> dict[str, bytes]:
    """Payload of the only Fisher table."""
    (folder,) = store.glob("fisher/*")
    found = {p.name: p.read_bytes() for p in folder.glob("*.parquet")}
    assert {"fisher.parquet", "activations.parquet"} <= found.keys()
    return found


def parts_of(store: Path) -> list[Path]:
    return sorted(store.glob("parts/fisher/*/unit-*.safetensors"))


def shard(store: Path, text: str, *more: str) -> str:
    data = good(store, *MEASURE, *more, "--shard", text)
    assert not list(store.glob("fisher/*"))
    return str(data["id"])


@pytest.mark.parametrize(("how", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_a_killed_measurement_continues_to_the_same_bytes(
    stores: tuple[Path, Path],
    slow_whole: tuple[str, dict[str, bytes]],
    how: signal.Signals,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, _ = stores
    table, expected = slow_whole
    process = subprocess.Popen([sys.executable, "-m", "fqdiff", *SLOWLY, "--quiet", "--store", str(store)])
    deadline = time.monotonic() + 60
    while not parts_of(store):
        assert time.monotonic() < deadline
        assert process.poll() is None, "it ended before it could be stopped"
        time.sleep(0.01)
    process.send_signal(how)
    assert process.wait(timeout=30) == code
    kept = [p.stem for p in parts_of(store)]
    assert 1 <= len(kept) < 8
    assert not list(store.glob("fisher/*/manifest.json"))
    seen = measuring(monkeypatch)
    result = call(store, *SLOWLY)
    assert result.exit_code == 0, result.stderr
    assert f"continuing fisher {table}" in result.stderr
    assert sorted(kept + seen) == [f"unit-{k:04}-of-0008" for k in range(1, 9)]
    assert files(store) == expected
    assert not list(store.glob("parts/fisher/*"))


def test_shards_of_two_machines_merge_to_the_bytes_of_one_run(
    halves: tuple[Path, Path], whole: tuple[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = halves
    assert [p.stem[5:9] for p in parts_of(b)] == ["0002", "0004", "0006", "0008"]
    seen = measuring(monkeypatch)
    assert good(a, "fisher", "merge", "--from", str(b), "--name", "joined")["id"] == whole[0]
    assert not seen
    assert files(a) == whole[1]
    assert Store(a).resolve("joined", ("fisher",)).id == whole[0]
    assert not parts_of(a)
    assert len(parts_of(b)) == 4
    # A second time there is nothing to do, and nothing is left behind.
    assert good(a, "fisher", "merge", whole[0], "--from", str(b))["id"] == whole[0]
    assert not list(a.glob("parts/fisher/*"))
    assert not seen


def test_three_shards_of_one_store_need_no_other(
    stores: tuple[Path, Path], whole: tuple[str, dict[str, bytes]]
) -> None:
    store, _ = stores
    for text in ("3/3", "1/3", "2/3"):
        shard(store, text)
    result = call(store, "fisher", "merge")
    assert result.exit_code == 0
    assert "all units are here" in result.stderr
    assert files(store) == whole[1]
    assert "whole" in call(store, *MEASURE, "--shard", "1/3").stderr


def test_a_plain_run_takes_what_shards_left(
    halves: tuple[Path, Path], whole: tuple[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, store = halves
    seen = measuring(monkeypatch)
    assert good(store, *MEASURE)["id"] == whole[0]
    assert [name[5:9] for name in seen] == ["0001", "0003", "0005", "0007"]
    assert files(store) == whole[1]


def test_a_merge_without_all_units_names_one_and_keeps_the_others(stores: tuple[Path, Path]) -> None:
    a, b = stores
    table = shard(a, "1/4")
    shard(b, "2/4")
    shown = good(a, "fisher", "merge", "--from", str(b), "--dry-run")
    assert (shown["id"], shown["exists"], len(parts_of(a))) == (table, False, 2)
    assert shown["missing"] == [f"unit-{k:04}-of-0008" for k in (3, 4, 7, 8)]
    result = call(a, "fisher", "merge", "--from", str(b))
    assert result.exit_code == 1
    assert f"4 units of fisher {table} are missing, the first unit-0003-of-0008" in result.stderr
    assert len(parts_of(a)) == 4
    assert not list(a.glob("fisher/*"))


def test_units_that_differ_between_machines_are_refused(halves: tuple[Path, Path]) -> None:
    a, b = halves
    table = shard(a, "1/1")
    path = parts_of(b)[1]
    recipe = recipe_from_json(json.loads((path.parent / RECIPE).read_text()), path)
    parts = StoredParts(path.parent, recipe)
    part = parts.load(path.stem)
    assert part is not None
    name = "parameter/stem.conv.weight/mean"
    parts.save(path.stem, Part({**part.tensors, name: part.tensors[name] * (1 + 1e-15)}, part.data))
    result = call(a, "fisher", "merge", "--from", str(b))
    assert result.exit_code == 1
    assert f"{path.stem} of fisher {table} differs between the stores" in result.stderr
    assert str(path) in result.stderr
    assert (len(parts_of(a)), len(parts_of(b))) == (8, 4)


@pytest.mark.parametrize("whose", [0, 1], ids=["ours", "theirs"])
@pytest.mark.parametrize("damage", ["a bit", "half", "empty", "a link"])
def test_a_damaged_unit_is_named_and_nothing_is_dropped(halves: tuple[Path, Path], whose: int, damage: str) -> None:
    a, b = halves
    path = parts_of(halves[whose])[2]
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    changed = {"a bit": bytes(content), "half": bytes(content[: len(content) // 2]), "empty": b"", "a link": b""}[
        damage
    ]
    path.write_bytes(changed)
    if damage == "a link":
        path.unlink()
        path.symlink_to("/dev/zero")
    result = call(a, "fisher", "merge", "--from", str(b))
    assert result.exit_code == 1
    assert path.name in result.stderr
    assert "Traceback" not in result.stderr
    assert len(parts_of(b)) == 4
    assert len(parts_of(a)) >= 4
    assert not list(a.glob("fisher/*"))
    if whose == 0 and damage != "a link":
        assert path.read_bytes() == changed
        assert path.name in call(a, *MEASURE).stderr


def test_shards_of_another_recipe_are_left_alone(
    halves: tuple[Path, Path], whole: tuple[str, dict[str, bytes]]
) -> None:
    a, b = halves
    table, other = whole[0], shard(b, "1/4", "--seed", "1")
    assert table != other
    assert good(a, "fisher", "merge", "--from", str(b))["id"] == table
    assert files(a) == whole[1]
    assert not parts_of(a)
    # Nothing unfinished here, and more than one table there: which?
    third = shard(b, "1/8", "--seed", "2")
    result = call(a, "fisher", "merge", "--from", str(b))
    assert result.exit_code == 1
    assert f"shards of 3 tables: {', '.join(sorted([table, other, third]))}" in result.stderr
    result = call(a, "fisher", "merge", third, "--from", str(b))
    assert f"7 units of fisher {third} are missing" in result.stderr


def test_a_merge_without_shards_says_so(stores: tuple[Path, Path]) -> None:
    a, b = stores
    for arguments in ([], ["abcd"], ["--from", str(b)], ["--from", str(b / "nowhere")]):
        result = call(a, "fisher", "merge", *arguments)
        assert result.exit_code == 1
        assert "no unfinished Fisher table" in result.stderr


def test_units_of_a_stranger_are_read_as_such(
    stores: tuple[Path, Path], halves: tuple[Path, Path], whole: tuple[str, dict[str, bytes]]
) -> None:
    (a, _), (b, _), table = stores, halves, whole[0]
    folder = parts_of(b)[0].parent
    moved = folder.rename(folder.with_name("0" * 16))
    result = call(a, "fisher", "merge", "--from", str(b))
    assert result.exit_code == 1
    assert f"belongs to fisher {table}" in result.stderr
    moved.rename(folder)
    (recipe,) = unfinished(Store(b), "fisher")
    assert adopt_parts(Store(b), Store(a), recipe) == 4
    assert adopt_parts(Store(b), Store(a), recipe) == 0


def test_two_processes_measure_the_bytes_of_one(stores: tuple[Path, Path], whole: tuple[str, dict[str, bytes]]) -> None:
    """torchrun on the CPU (gloo): every other unit each. With --force, although units of another run are there."""
    store, _ = stores
    shard(store, "1/2")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fqdiff"]
    run = subprocess.run(
        [sys.executable, *torchrun, *MEASURE, "--force", "--store", str(store), "--json"],
        capture_output=True, text=True, timeout=120, check=False, env=os.environ,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["id"] == whole[0]
    assert "making" in run.stderr
    assert files(store) == whole[1]
    assert not list(store.glob("parts/fisher/*"))
    (manifest,) = Store(store).manifests("fisher")
    assert manifest.environment["processes"] == 2
