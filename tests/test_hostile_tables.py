"""Stores from strangers: plans, metrics, Parquet tables, parts and validations are refused with a clear error, or do no harm."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fqdiff.errors import ArtifactCorrupt
from fqdiff.pipeline import Runner
from fqdiff.store.fisher_files import FISHER_SCHEMA
from fqdiff.store.parquet import unpacked_size
from fqdiff.store.parts import StoredParts, last_unfinished
from fqdiff.store.store import Store
from tests.attacker import (
    JSON_FILES,
    artifact,
    changed,
    fuzz,
    json_values,
    little_memory,
    load,
    pack_file,
    payload,
    places,
    refuse,
    rewrite,
    tensor_file,
    unpack_file,
)
from tests.test_store import RECIPE, part


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


# --- plans and metrics -----------------------------------------------------------------------------------------------


@fuzz
@given(data=st.data())
@pytest.mark.parametrize("kind", JSON_FILES)
def test_any_value_anywhere_in_a_plan_or_result_is_refused_or_harmless(
    kind: str, data: st.DataObject, tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")
    good = json.loads(payload(kind, JSON_FILES[kind]))
    if kind == "plan":
        good["entries"] = good["entries"][3:6]
        count = sum(math.prod(e["shape"]) for e in good["entries"])
        good["totals"] |= {"parameters": count, "bits_per_weight": 8 * good["totals"]["file_bytes"] / count}
    path = data.draw(st.sampled_from(places(good)))
    content = json.dumps(changed(good, path, data.draw(json_values))).encode()
    try:
        load(store, kind, JSON_FILES[kind], content)
    except ArtifactCorrupt as error:
        assert JSON_FILES[kind] in error.message  # noqa: PT017 (no error is fine too)


@pytest.mark.parametrize(
    "lie",
    [
        {"format": "int9"},
        {"format": ["int8"]},
        {"granularity": 5},
        {"granularity": "channel:7"},
        {"granularity": "group:7:0"},
        {"granularity": "channel:0:float16"},
        {"format": "int5sym"},
        {"format": "float32", "granularity": "channel:0", "bytes": 128},
        {"bytes": -1},
        {"bytes": 1},
        {"bytes": "100"},
        {"bytes": 2**80},
        {"shape": [0]},
        {"shape": [2**40, 2**40]},
        {"shape": []},
        {"shape": 4},
        {"shape": [True]},
        {"score": "0.1"},
        {"score": float("nan")},
        {"score": -1e9},
        {"threshold": float("-inf")},
        {"threshold": 0.5},
        {"threshold": 10**400},
        {"parameter": None},
        {"block": 1},
        {"block": "zz"},
        {"block": "7"},
        {"rule": {}},
        {"rule": "\ud800"},
        {"alternatives": None},
        {"alternatives": [{"format": "int5", "bytes": 1, "predicted": 0.0}]},
        {"alternatives": [{"format": "int3", "bytes": 1, "predicted": 0.0}]},
        {"alternatives": [{"format": "int5", "bytes": 1}]},
        {"alternatives": [[]]},
        {"predicted": 7.0},
        {"predicted": float("nan")},
        {"predicted": None, "alternatives": []},
        {"constraint": 5},
        {"constraint": None},
        {"constraint": "traffic"},
        {"constraint": "a whim"},
        {"extra": 1},
    ],
    ids=str,
)
def test_a_plan_entry_that_makes_no_sense_is_refused(lie: dict[str, Any], store: Store) -> None:
    data = json.loads(payload("plan", "plan.json"))
    data["entries"][4].update(lie)  # a weight in int5
    refuse(store, "plan", "plan.json", json.dumps(data).encode())


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["entries"].append(data["entries"][0]),
        lambda data: data["entries"].clear(),
        lambda data: data.pop("entries"),
        lambda data: data["entries"][0].pop("rule"),
        lambda data: data["totals"].update(file_bytes=10),
        lambda data: data["totals"].update(file_bytes=-1),
        lambda data: data.update(totals=None),
        lambda data: data.pop("budget"),
        lambda data: data["budget"].update(target_bytes=data["totals"]["file_bytes"] - 1),
        lambda data: data["budget"].update(max_loss_increase=1.0),
        lambda data: data["budget"].update(target_bytes=None),
        lambda data: data["budget"].update(predicted=3.0),
        lambda data: data["budget"].update(score=None),
        lambda data: data.update(strategy=None),
        lambda data: data.update(strategy="foo"),
        lambda data: data.update(strategy="uniform"),
        lambda data: data.update(budget=None),
        lambda data: data.update(budget=None, strategy="uniform"),
        lambda data: data["totals"].update(parameters=data["totals"]["parameters"] + 1),
        lambda data: data["totals"].update(bits_per_weight=2.0),
        lambda data: data["totals"].update(file_bytes=data["totals"]["file_bytes"] - 1),
        lambda data: data["totals"].update(more=1),
        lambda data: data["budget"].update(score="foo"),
        lambda data: data["budget"].update(timestep_weights="foo"),
        lambda data: data["budget"].update(constraint="foo"),
        lambda data: data["budget"].update(lower_bound=1.0),
        lambda data: data["budget"].update(lower_bound=-1.0),
        lambda data: data["budget"].update(target_bytes=None, max_loss_increase=-0.5),
        lambda data: data.update(schema=99),
    ],
)
def test_a_plan_with_missing_or_double_parts_is_refused(change: Any, store: Store) -> None:
    data = json.loads(payload("plan", "plan.json"))
    change(data)
    refuse(store, "plan", "plan.json", json.dumps(data).encode())


# --- Parquet ---------------------------------------------------------------------------------------------------------


def good_table() -> pa.Table:
    return pq.read_table(pa.BufferReader(payload("fisher", "fisher.parquet")))


def parquet(table: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **{"compression": "zstd", **options})
    return bytes(sink.getvalue())


def with_column(table: pa.Table, name: str, values: Any, kind: pa.DataType | None = None) -> pa.Table:
    index = table.schema.get_field_index(name)
    array = pa.array(values, kind or FISHER_SCHEMA.field(name).type)
    return table.set_column(index, pa.field(name, array.type), array)


PARQUET_ATTACKS: dict[str, Callable[[pa.Table], pa.Table]] = {
    "no rows": lambda t: t.slice(0, 0),
    "a row left out": lambda t: t.slice(1),
    "rows in reverse": lambda t: t.take(list(range(t.num_rows))[::-1]),
    "two rows swapped": lambda t: t.take([1, 0, *range(2, t.num_rows)]),
    "a tensor twice": lambda t: pa.concat_tables([t, t]),
    "a column left out": lambda t: t.drop_columns(["max"]),
    "a column too many": lambda t: t.append_column("more", pa.array([0] * t.num_rows)),
    "columns in another order": lambda t: t.select(t.column_names[::-1]),
    "numbers as text": lambda t: with_column(t, "mean", ["1"] * t.num_rows, pa.string()),
    "names as numbers": lambda t: with_column(t, "tensor", [1] * t.num_rows, pa.int32()),
    "names as bytes": lambda t: with_column(t, "tensor", [b"\xff"] * t.num_rows, pa.binary()),
    "float32 means": lambda t: with_column(t, "mean", [1.0] * t.num_rows, pa.float32()),
    "an empty cell": lambda t: with_column(t, "mean", [None, *t["mean"].to_pylist()[1:]]),
    "an empty name": lambda t: with_column(t, "tensor", [None, *t["tensor"].to_pylist()[1:]]),
    "an empty list": lambda t: with_column(t, "channel", [None, *t["channel"].to_pylist()[1:]]),
    "an empty cell in a list": lambda t: with_column(t, "channel", [[None] * len(c) for c in t["channel"].to_pylist()]),
    "lists of other lengths": lambda t: with_column(t, "channel", [[1.0], *t["channel"].to_pylist()[1:]]),
    "NaN": lambda t: with_column(t, "mean", [float("nan")] * t.num_rows),
    "a negative Fisher value": lambda t: with_column(t, "max", [-1.0] * t.num_rows),
    "infinity in a list": lambda t: with_column(
        t, "channel", [[float("inf")] * len(c) for c in t["channel"].to_pylist()]
    ),
    "timesteps that fall": lambda t: with_column(t, "timestep", [-n for n in t["timestep"].to_pylist()]),
    "timesteps that differ": lambda t: with_column(t, "timestep", [1, *t["timestep"].to_pylist()[1:]]),
    "no weights": lambda t: with_column(t, "numel", [0] * t.num_rows),
    "weights that change": lambda t: with_column(t, "numel", range(1, t.num_rows + 1)),
    "no samples": lambda t: with_column(t, "n_samples", [0] * t.num_rows),
    "samples that differ": lambda t: with_column(t, "n_samples", [3, 3, 3] + [2] * (t.num_rows - 3)),
    "a block that changes": lambda t: with_column(t, "block", [str(i) for i in range(t.num_rows)]),
    "no metadata": lambda t: t.replace_schema_metadata(None),
    "metadata of another kind": lambda t: t.replace_schema_metadata({"fqdiff": '{"kind": 5}'}),
    "metadata that is a list": lambda t: t.replace_schema_metadata({"fqdiff": "[1]"}),
    "deep metadata": lambda t: t.replace_schema_metadata({"fqdiff": '{"kind":' + "[" * 100_000}),
    "bytes for metadata": lambda t: t.replace_schema_metadata({b"fqdiff": b"\xff\xfe"}),
}


def test_a_table_written_by_other_means_still_loads(store: Store) -> None:
    load(store, "fisher", "fisher.parquet", parquet(good_table(), compression="none"))


def test_a_table_without_channels_loads(store: Store) -> None:
    empty = with_column(good_table(), "channel", [[]] * good_table().num_rows)
    value = Runner(store).load(rewrite(store, artifact(store, "fisher"), "fisher.parquet", parquet(empty)))
    assert {e.channel.shape[1] for e in value.entries.values()} == {0}


@pytest.mark.parametrize("attack", PARQUET_ATTACKS)
def test_a_fisher_table_that_is_none_is_refused(attack: str, store: Store) -> None:
    refuse(store, "fisher", "fisher.parquet", parquet(PARQUET_ATTACKS[attack](good_table())))


def test_files_that_are_no_parquet_are_refused(store: Store) -> None:
    good = parquet(good_table())
    for content in (b"", b"PAR1", b"PAR1" * 3, good[:-1], good[4:], good[: len(good) // 2] + good[-8:], b"\0" * 10**6):
        refuse(store, "fisher", "fisher.parquet", content)


def rows_of_zeros(count: int) -> pa.Table:
    columns = {f.name: pa.array(np.zeros(count), f.type, safe=False) for f in FISHER_SCHEMA if f.name[0] in "simn"}
    columns |= {"tensor_id": pa.array(np.zeros(count, np.int16)), "timestep": pa.array(np.zeros(count, np.int16))}
    columns |= {
        name: pa.DictionaryArray.from_arrays(np.zeros(count, np.int8), ["1"]).cast(pa.string())
        for name in ("tensor", "block")
    }
    columns["channel"] = pa.FixedSizeListArray.from_arrays(np.zeros(count, np.float32), 1).cast(
        FISHER_SCHEMA.field("channel").type
    )
    return pa.table({f.name: columns[f.name] for f in FISHER_SCHEMA}, FISHER_SCHEMA).replace_schema_metadata(
        {"fqdiff": '{"kind": "empirical"}'}
    )


@pytest.mark.parametrize("dictionary", [True, False])
def test_a_small_table_that_unpacks_to_millions_of_rows_is_refused_without_memory(
    dictionary: bool, store: Store
) -> None:
    content = parquet(pa.concat_tables([rows_of_zeros(100_000)] * 30), use_dictionary=dictionary)
    assert len(content) < 2**20
    pa.default_memory_pool().release_unused()
    with little_memory(100 * 2**20):
        refuse(store, "fisher", "fisher.parquet", content, "unpack")


@pytest.mark.parametrize("dictionary", [True, False])
def test_a_long_name_in_every_row_takes_little_memory(dictionary: bool, store: Store) -> None:
    content = parquet(long_names(), use_dictionary=dictionary, data_page_size=2**30, write_statistics=False)
    assert len(content) < 2**21
    pa.default_memory_pool().release_unused()
    with little_memory(100 * 2**20):
        refuse(store, "fisher", "fisher.parquet", content)


def long_names() -> pa.Table:
    return with_column(rows_of_zeros(150), "tensor", ["a" * 2**20] * 150)


def varint(number: int, length: int = 0) -> bytes:
    """A Thrift integer, drawn out to ``length`` bytes."""
    digits = [2 * number >> 7 * i & 127 for i in range(max(length, -(-(2 * number).bit_length() // 7)))]
    return bytes([*(d | 128 for d in digits[:-1]), digits[-1]])


def test_sizes_in_a_footer_are_not_believed(store: Store) -> None:
    content = parquet(long_names(), use_dictionary=False, data_page_size=2**30, write_statistics=False)
    facts = pq.ParquetFile(pa.BufferReader(content)).metadata.row_group(0)
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    end = content[footer:]
    for size in (facts.total_byte_size, facts.column(2).total_uncompressed_size):
        assert end.count(varint(size)) == 1
        end = end.replace(varint(size), varint(1000, len(varint(size))))
    lie = content[:footer] + end
    assert pq.ParquetFile(pa.BufferReader(lie)).metadata.row_group(0).total_byte_size == 1000
    pa.default_memory_pool().release_unused()
    with little_memory(100 * 2**20):
        refuse(store, "fisher", "fisher.parquet", lie, "unpack")


def test_strings_stored_as_differences_are_refused(store: Store) -> None:
    content = parquet(good_table(), use_dictionary=False, column_encoding={"tensor": "DELTA_BYTE_ARRAY"})
    refuse(store, "fisher", "fisher.parquet", content, "encoding 7")


@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_unpacked_sizes_are_those_that_pyarrow_finds(version: str, tmp_path: Path) -> None:
    path = tmp_path / "fisher.parquet"
    path.write_bytes(parquet(good_table(), row_group_size=100, data_page_version=version, data_page_size=200))
    facts = pq.ParquetFile(path).metadata
    columns = [facts.row_group(i).column(k) for i in range(facts.num_row_groups) for k in range(facts.num_columns)]
    values, size = unpacked_size(path)
    assert values == sum(c.num_values for c in columns)
    headers = sum(c.total_uncompressed_size for c in columns) - size  # pyarrow counts the page headers too
    assert 0 < headers < 100 * 20 * len(columns)


# --- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "facts", ["[]", "{}", '{"digest": 1}', '{"digest": "DIGEST"}', '{"digest": "DIGEST", "data": [1]}', '{"data": {}}']
)
def test_a_part_without_digest_or_data_is_refused(facts: str, store: Store) -> None:
    parts = StoredParts(store.parts_folder("plan", RECIPE.id), RECIPE)
    parts.save("state", part(1.0))
    path = parts.folder / "state.safetensors"
    header, data = unpack_file(path.read_bytes())
    digest = json.loads(header["__metadata__"]["fqdiff"])["digest"]
    header["__metadata__"]["fqdiff"] = facts.replace("DIGEST", digest)
    path.write_bytes(pack_file(header, data))
    with pytest.raises(ArtifactCorrupt, match="state"):
        parts.load("state")


def test_an_unfinished_recipe_that_belongs_elsewhere_is_refused(store: Store) -> None:
    parts = StoredParts(store.parts_folder("plan", "0" * 16), RECIPE)
    parts.save("state", part(1.0))
    with pytest.raises(ArtifactCorrupt, match="belongs to"):
        last_unfinished(store, "plan")
    (parts.folder / "recipe.json").write_text('{"kind": NaN}')
    with pytest.raises(ArtifactCorrupt, match="recipe"):
        last_unfinished(store, "plan")


# --- validations -----------------------------------------------------------------------------------------------------


def rewritten(kind: str, name: str, change: Callable[[pa.Table], pa.Table]) -> bytes:
    """A Parquet payload with its table changed."""
    sink = pa.BufferOutputStream()
    table = pq.read_table(pa.BufferReader(payload(kind, name)))
    pq.write_table(
        change(table), sink, compression="zstd", use_dictionary=["tensor", "block", "format", "range", "plan"]
    )
    return sink.getvalue().to_pybytes()


def swapped(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, values)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.slice(1),
        lambda t: t.slice(0, 0),
        lambda t: t.drop_columns(["weight"]),
        lambda t: t.append_column("other", t["weight"]),
        lambda t: t.append_column("predicted_x", pa.array([None] * 12, pa.float64())),
        lambda t: t.append_column("predicted_x", pa.array([float("nan")] * 12)),
        lambda t: t.append_column("predicted_true", t["weight"]),
        lambda t: swapped(t, "timestep", pa.array([1, 1, 6] * 4, pa.int16())),
        lambda t: swapped(t, "timestep", pa.array([-5, 1, 6] * 4, pa.int16())),
        lambda t: swapped(t, "timestep", pa.array([1, 6, 900] * 3 + [1, 6, 901], pa.int16())),
        lambda t: swapped(t, "tensor", pa.array(["a"] * 12)),
        lambda t: swapped(t, "shift", pa.array([float("inf")] * 12)),
        lambda t: t.take(pa.array(list(range(11, -1, -1)))),
    ],
)
def test_rows_that_are_no_validation_are_refused(change: Any, store: Store) -> None:
    refuse(store, "validation", "validation.parquet", rewritten("validation", "validation.parquet", change))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("candidates.parquet", lambda t: t.slice(0, 0)),
        ("candidates.parquet", lambda t: t.take(pa.array([0, 1, 2, 2]))),
        ("candidates.parquet", lambda t: swapped(t, "numel", pa.array([0, 6, 6, 6], pa.int64()))),
        ("candidates.parquet", lambda t: swapped(t, "tensor", pa.array(["a" * 10**5] * 2 + ["b"] * 2))),
        ("candidates.parquet", lambda t: t.drop_columns(["image_error"])),
        ("plans.parquet", lambda t: t.append_column("score_x", t["bits"])),
        ("plans.parquet", lambda t: swapped(t, "bits", pa.array([float("nan"), 1.0]))),
    ],
)
def test_tables_that_are_no_candidates_or_plans_are_refused(name: str, change: Any, store: Store) -> None:
    refuse(store, "validation", name, rewritten("validation", name, change))


@pytest.mark.parametrize(
    "tensors",
    [
        {"gram": torch.ones(4, 4)},
        {"gram": torch.ones(3, 4).double()},
        {"gram": torch.full((4, 4), float("nan")).double()},
        {"choice": torch.tensor([[0, 4], [1, 3]])},
        {"choice": torch.tensor([[0, -1], [1, 3]])},
        {"choice": torch.tensor([[0, 2]])},
        {"choice": torch.tensor([0, 2])},
        {"other": torch.ones(1)},
    ],
    ids=str,
)
def test_a_gram_matrix_that_does_not_fit_its_candidates_is_refused(tensors: Any, store: Store) -> None:
    good = {"gram": torch.ones(4, 4).double(), "choice": torch.tensor([[0, 2], [1, 3]])}
    refuse(store, "validation", "gram.safetensors", tensor_file(**{**good, **tensors}))


@pytest.mark.parametrize("name", ["validation.parquet", "candidates.parquet", "plans.parquet"])
def test_a_table_that_unpacks_to_gigabytes_is_refused_without_memory(name: str, store: Store) -> None:
    sink = pa.BufferOutputStream()
    zeros = pa.array(np.zeros(2**22))
    pq.write_table(pa.table({f"c{i}": zeros for i in range(20)}), sink, compression="zstd", use_dictionary=False)
    content = sink.getvalue().to_pybytes()
    del zeros
    with little_memory():
        refuse(store, "validation", name, content, "unpack")


@fuzz
@given(data=st.data())
def test_any_value_anywhere_in_a_summary_is_refused_or_harmless(data: st.DataObject, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    good = json.loads(payload("validation", "summary.json"))
    content = json.dumps(changed(good, data.draw(st.sampled_from(places(good))), data.draw(json_values))).encode()
    try:
        load(store, "validation", "summary.json", content)
    except ArtifactCorrupt as error:
        assert error.message  # noqa: PT017 (no error is fine too)
