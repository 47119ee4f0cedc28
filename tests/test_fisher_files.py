"""Fisher tables in files: what was measured is what is read; what was not is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fqdiff.configs import FisherConfig
from fqdiff.context import Context
from fqdiff.errors import ArtifactCorrupt
from fqdiff.stages.fisher import fisher
from fqdiff.store.fisher_files import WEIGHTS_SCHEMA, load_fisher, save_fisher, weights_bytes
from fqdiff.values import Checkpoint, Dataset, FisherTable

CONFIGS = {
    "tensor": FisherConfig(timesteps=2, samples=2, granularity="tensor"),
    "channel": FisherConfig(timesteps=2, samples=2, activations=False),
    "weight": FisherConfig("true", timesteps=3, samples=2, granularity="weight", bins=2),
    "trajectory": FisherConfig("trajectory", samples=3, steps=2, granularity="weight"),
}


@pytest.fixture(scope="module")
def tables(checkpoint: Checkpoint, dataset: Dataset) -> dict[str, FisherTable]:
    return {name: fisher(checkpoint, dataset, config, 0, Context()) for name, config in CONFIGS.items()}


def close(a: Any, b: Any) -> None:
    """Equal but for channels, which are kept in float32."""
    for key, value in vars(a).items():
        other = getattr(b, key)
        if isinstance(value, torch.Tensor):
            assert value.dtype == other.dtype
            expected = value.float().double() if key == "channel" else value
            assert torch.equal(expected, other), key
        else:
            assert value == other


@pytest.mark.parametrize("name", CONFIGS)
def test_a_table_survives_the_store(tables: dict[str, FisherTable], tmp_path: Path, name: str) -> None:
    table = tables[name]
    save_fisher(table, tmp_path)
    loaded = load_fisher(tmp_path)
    assert (loaded.kind, loaded.samples) == (table.kind, table.samples)
    assert torch.equal(loaded.timesteps, table.timesteps)
    assert (table.gain is None) == (loaded.gain is None) == (name != "trajectory")
    if table.gain is not None:
        close(table.gain, loaded.gain)
    for kind in ("entries", "activations", "trajectory"):
        measured, read = getattr(table, kind), getattr(loaded, kind)
        assert list(measured) == list(read)
        for parameter, entry in measured.items():
            close(entry, read[parameter])
    assert [(w.first, w.last) for w in loaded.weights] == [(w.first, w.last) for w in table.weights]
    for measured, read in zip(table.weights, loaded.weights, strict=True):
        values = read.read()
        assert all(torch.equal(v, values[parameter]) for parameter, v in measured.read().items())


def test_columns_say_what_they_hold(tables: dict[str, FisherTable], tmp_path: Path) -> None:
    save_fisher(tables["weight"], tmp_path)
    rows = pq.read_table(tmp_path / "fisher.parquet")
    assert set(rows["n_samples"].to_pylist()) == {2}
    for row in rows.slice(0, 3).to_pylist():
        entry = tables["weight"].entries[row["tensor"]]
        k = tables["weight"].timesteps.tolist().index(row["timestep"])
        assert row["mean"] == float(entry.mean[k])
        assert row["max"] == float(entry.maximum[k])
        assert row["sum"] == row["mean"] * row["numel"]
        assert row["standard_error"] == float(entry.standard_error[k])
        assert row["channel"] == entry.channel[k].float().tolist()
        assert (row["block"], row["numel"]) == (entry.block, entry.numel)
    (weights, _) = (pq.read_table(p) for p in sorted(tmp_path.glob("weights-*.parquet")))
    assert weights.schema.field("value").type.value_type == pa.float32()
    assert (set(weights["first_timestep"].to_pylist()), set(weights["last_timestep"].to_pylist())) == ({0}, {0})


def test_the_size_of_single_weights_is_promised(tables: dict[str, FisherTable], tmp_path: Path) -> None:
    save_fisher(tables["weight"], tmp_path)
    size = sum(p.stat().st_size for p in tmp_path.glob("weights-*.parquet"))
    parameters = sum(e.numel for e in tables["weight"].entries.values())
    assert 0.7 * weights_bytes(parameters, 2) < size <= weights_bytes(parameters, 2)


def test_single_weights_are_read_when_asked_for(tables: dict[str, FisherTable], tmp_path: Path) -> None:
    """What happens to their file after the table was loaded is met when they are read, and not before."""
    save_fisher(tables["weight"], tmp_path)
    first, second = load_fisher(tmp_path).weights
    (tmp_path / "weights-0001.parquet").write_bytes(b"")
    first.read()
    with pytest.raises(ArtifactCorrupt, match="weights-0001"):
        second.read()


def column(name: str, change: Callable[[list[Any]], list[Any]]) -> Callable[[pa.Table], pa.Table]:
    def attack(table: pa.Table) -> pa.Table:
        field = table.schema.field(name)
        values = pa.array(change(table[name].to_pylist()), field.type)
        return table.set_column(table.schema.get_field_index(name), field, values)

    return attack


def first_to(value: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda cells: [value(cells[0]) if callable(value) else value, *cells[1:]]


def every(value: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda cells: [value] * len(cells)


WEIGHT_ATTACKS: dict[str, Callable[[pa.Table], pa.Table]] = {
    "a parameter left out": lambda t: t.slice(1),
    "an unknown parameter": column("tensor", first_to("other")),
    "a parameter twice": lambda t: pa.concat_tables([t, t.slice(0, 1)]),
    "a column left out": lambda t: t.drop_columns(["shape"]),
    "bins that differ": column("first_timestep", first_to(1)),
    "a bin that ends before it begins": column("last_timestep", every(-1)),
    "a shape that does not fit": column("shape", first_to(lambda shape: [2, *shape])),
    "a negative shape": column("shape", first_to(lambda shape: [-shape[0], -1, *shape[1:]])),
    "a value too few": column("value", first_to(lambda cells: cells[1:])),
    "a negative value": column("value", first_to(lambda cells: [-1.0, *cells[1:]])),
    "NaN": column("value", first_to(lambda cells: [float("nan"), *cells[1:]])),
    "an empty cell": column("value", first_to(lambda cells: [None, *cells[1:]])),
    "no rows": lambda t: t.slice(0, 0),
}


@pytest.mark.parametrize("attack", WEIGHT_ATTACKS)
def test_single_weights_that_are_none_are_refused(tables: dict[str, FisherTable], tmp_path: Path, attack: str) -> None:
    save_fisher(tables["weight"], tmp_path)
    path = tmp_path / "weights-0000.parquet"
    table = pq.read_table(path)
    assert table.schema.equals(WEIGHTS_SCHEMA)
    changed = WEIGHT_ATTACKS[attack](table)
    pq.write_table(changed.replace_schema_metadata(table.schema.metadata), path)
    with pytest.raises(ArtifactCorrupt, match="weights-0000"):
        load_fisher(tmp_path).weights[0].read()


TRAJECTORY_ATTACKS: dict[str, Callable[[pa.Table], pa.Table]] = {
    "a parameter left out": lambda t: t.slice(1),
    "an unknown parameter": column("tensor", first_to("other")),
    "a parameter twice": lambda t: pa.concat_tables([t, t.slice(0, 1)]),
    "another block": column("block", first_to("9")),
    "another size": column("numel", first_to(5)),
    "a negative mean": column("mean", first_to(-1.0)),
    "NaN among the runs": column("sample", first_to([float("nan")] * 3)),
    "a run less for one parameter": column("sample", first_to([1.0, 1.0])),
    "other counts of runs": column("n_samples", first_to(2)),
}


@pytest.mark.parametrize("attack", TRAJECTORY_ATTACKS)
def test_a_trajectory_that_is_none_is_refused(tables: dict[str, FisherTable], tmp_path: Path, attack: str) -> None:
    save_fisher(tables["trajectory"], tmp_path)
    path = tmp_path / "trajectory.parquet"
    table = pq.read_table(path)
    pq.write_table(TRAJECTORY_ATTACKS[attack](table).replace_schema_metadata(table.schema.metadata), path)
    with pytest.raises(ArtifactCorrupt, match=r"trajectory\.parquet"):
        load_fisher(tmp_path)


GAIN_ATTACKS: dict[str, Callable[[pa.Table], pa.Table]] = {
    "a step left out": lambda t: t.slice(1),
    "other timesteps": column("timestep", lambda cells: [t + 1 for t in cells]),
    "a negative gain": column("mean", first_to(-1.0)),
    "an infinite error": column("standard_error", first_to(float("inf"))),
    "NaN among the runs": column("sample", first_to([float("nan")] * 3)),
    "a run less": column("sample", every([1.0, 1.0])),
    "a run less at one step": column("sample", first_to([1.0, 1.0])),
    "a column left out": lambda t: t.drop_columns(["sample"]),
}


@pytest.mark.parametrize("attack", GAIN_ATTACKS)
def test_gains_that_are_none_are_refused(tables: dict[str, FisherTable], tmp_path: Path, attack: str) -> None:
    save_fisher(tables["trajectory"], tmp_path)
    path = tmp_path / "gain.parquet"
    table = pq.read_table(path)
    pq.write_table(GAIN_ATTACKS[attack](table).replace_schema_metadata(table.schema.metadata), path)
    with pytest.raises(ArtifactCorrupt, match=r"gain\.parquet"):
        load_fisher(tmp_path)


def test_a_run_with_two_bins_of_weights_is_refused(tables: dict[str, FisherTable], tmp_path: Path) -> None:
    save_fisher(tables["trajectory"], tmp_path)
    (tmp_path / "weights-0001.parquet").write_bytes((tmp_path / "weights-0000.parquet").read_bytes())
    with pytest.raises(ArtifactCorrupt, match="weights-0001"):
        load_fisher(tmp_path)


@pytest.mark.parametrize(
    "attack",
    {
        "other timesteps": column("timestep", lambda cells: [t + 1 for t in cells]),
        "other samples": column("n_samples", every(3)),
    }.items(),
    ids=lambda item: item[0],
)
def test_outputs_measured_elsewhere_are_refused(
    tables: dict[str, FisherTable], tmp_path: Path, attack: tuple[str, Callable[[pa.Table], pa.Table]]
) -> None:
    save_fisher(tables["tensor"], tmp_path)
    path = tmp_path / "activations.parquet"
    table = pq.read_table(path)
    pq.write_table(attack[1](table).replace_schema_metadata(table.schema.metadata), path)
    with pytest.raises(ArtifactCorrupt, match=r"activations\.parquet"):
        load_fisher(tmp_path)


@pytest.mark.parametrize("name", ["activations.parquet", "weights-0000.parquet", "trajectory.parquet", "gain.parquet"])
def test_a_file_that_is_no_table_is_refused(tables: dict[str, FisherTable], tmp_path: Path, name: str) -> None:
    save_fisher(tables["weight"], tmp_path)
    (tmp_path / name).write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(ArtifactCorrupt, match=name):
        load_fisher(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(ArtifactCorrupt, match=name):
        load_fisher(tmp_path)
