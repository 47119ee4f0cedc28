"""Stores from strangers: every safetensors file is refused with a clear error, or does no harm."""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fqdiff.errors import ArtifactCorrupt
from fqdiff.store.store import Store
from tests.attacker import (
    FILES,
    MODEL_FILES,
    TENSOR_FILES,
    changed,
    fuzz,
    json_values,
    little_memory,
    load,
    pack_file,
    payload,
    places,
    refuse,
    tensor_file,
    unpack_file,
)
from tests.test_store import tiny_value

# --- safetensors -----------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.mark.parametrize("kind", TENSOR_FILES)
def test_files_that_are_no_safetensors_are_refused_without_memory(kind: str, store: Store) -> None:
    name = TENSOR_FILES[kind]
    good = payload(kind, name)
    header, data = unpack_file(good)
    with little_memory():
        for content in (
            b"",
            b"\0" * 7,
            random.Random(0).randbytes(1000),
            good[: len(good) // 2],
            good[:-1],
            good + b"\0",
            pack_file(header, data, 2**60),
            pack_file(header, data, 2**63 + 5),
            pack_file(header, data, 10),
            (90 * 2**20).to_bytes(8, "little") + b'{"a":' * 10,
            pack_file([], b""),
            pack_file("x", b""),
        ):
            refuse(store, kind, name, content)


def tensor_attacks(header: dict[str, Any], name: str) -> dict[str, Any]:
    """Headers that lie about the tensor ``name``."""
    entry = header[name]
    begin, end = entry["data_offsets"]
    other = next(k for k in header if k not in (name, "__metadata__"))

    def lie(**changes: Any) -> dict[str, Any]:
        return {**header, name: {**entry, **changes}}

    return {
        "shape of 2**60": lie(shape=[2**60]),
        "shape that overflows": lie(shape=[2**40, 2**40]),
        "empty shape with a huge axis": lie(shape=[2**40, 0], data_offsets=[begin, begin]),
        "negative size": lie(shape=[-1]),
        "shape that is no list": lie(shape="8"),
        "float shape": lie(shape=[1.5]),
        "negative offset": lie(data_offsets=[-4, end]),
        "offsets beyond the file": lie(data_offsets=[begin, 2**50]),
        "offsets in reverse": lie(data_offsets=[end, begin]),
        "overlap": lie(data_offsets=header[other]["data_offsets"]),
        "unknown dtype": lie(dtype="F12"),
        "float8": lie(dtype="F8_E4M3"),
        "missing": {k: v for k, v in header.items() if k != name},
        "twice under another name": {**header, "extra": entry},
        "extra and empty": {**header, "extra": {"dtype": "F32", "shape": [0], "data_offsets": [begin, begin]}},
        "renamed": {("x" if k == name else k): v for k, v in header.items()},
        "no tensors": {"__metadata__": header["__metadata__"]} if "__metadata__" in header else {},
    }


@pytest.mark.parametrize("kind", TENSOR_FILES)
def test_tensors_that_are_not_what_the_header_says_are_refused(kind: str, store: Store) -> None:
    name = TENSOR_FILES[kind]
    header, data = unpack_file(payload(kind, name))
    with little_memory():
        for tensor in [k for k in header if k != "__metadata__"][:3]:
            for lie in tensor_attacks(header, tensor).values():
                refuse(store, kind, name, pack_file(lie, data))


@pytest.mark.parametrize("kind", TENSOR_FILES)
def test_other_dtypes_of_the_same_size_are_refused(kind: str, store: Store) -> None:
    name = TENSOR_FILES[kind]
    header, data = unpack_file(payload(kind, name))
    others = {
        "F32": "I32",
        "U8": "I8",
        "BOOL": "U8",
        "I64": "F64",
        "F16": "I16",
        "BF16": "U16",
        "F8_E4M3": "F8_E5M2",
        "F8_E5M2": "U8",
    }
    for dtype, other in others.items():
        tensor = next((k for k, entry in header.items() if entry.get("dtype") == dtype), None)
        if tensor is not None:
            lie = {**header, tensor: {**header[tensor], "dtype": other}}
            refuse(store, kind, name, pack_file(lie, data))


@pytest.mark.parametrize(
    "metadata",
    [
        {"fqdiff": "no JSON"},
        {"fqdiff": "[1, 2]"},
        {"fqdiff": "null"},
        {"fqdiff": "[" * 100_000},
        {"fqdiff": '{"a":' * 300 + "1" + "}" * 300},
        {"fqdiff": '{"model": NaN}'},
        {"fqdiff": "{}"},
        {},
        {"fqdiff": 5},
        "text",
    ],
    ids=lambda m: str(m)[:30],
)
@pytest.mark.parametrize("kind", ["checkpoint", "quantized", "features", "dataset"])
def test_metadata_that_describes_nothing_is_refused(kind: str, metadata: Any, store: Store) -> None:
    header, data = unpack_file(payload(kind, TENSOR_FILES[kind]))
    refuse(store, kind, TENSOR_FILES[kind], pack_file({**header, "__metadata__": metadata}, data))


def with_facts(content: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """The file with other facts in its metadata; ``change`` edits them in place or returns others."""
    header, data = unpack_file(content)
    facts = json.loads(header["__metadata__"]["fqdiff"])
    returned = change(facts)
    header["__metadata__"]["fqdiff"] = json.dumps(facts if returned is None else returned)
    return pack_file(header, data)


@pytest.mark.parametrize("kind", MODEL_FILES)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("channels", [10**9] * 6),
        ("channels", [8192, 16384, 32768, 65536, 65536, 49152]),
        ("channels", []),
        ("channels", "16"),
        ("channels", [2.0] * 6),
        ("image_channels", -1),
        ("image_channels", 65536),
        ("image_size", 2**40),
        ("image_size", 9),
        ("num_heads", 0),
        ("norm_groups", 7),
        ("dropout", 3),
        ("dropout", float("nan")),
        ("activation", "__import__('os')"),
        ("activation", 5),
        ("time_embedding", []),
        ("time_channels", 65536),
        ("num_train_timesteps", 10**12),
        ("num_train_timesteps", True),
        ("family", "os.system"),
        ("family", None),
        ("attention_blocks", [99]),
        ("unknown_field", 1),
    ],
)
def test_an_architecture_that_cannot_be_is_refused_without_memory(
    kind: str, field: str, value: Any, store: Store
) -> None:
    def change(facts: dict[str, Any]) -> None:
        facts["model"]["architecture"][field] = value

    content = with_facts(payload(kind, "model.safetensors"), change)
    with little_memory():
        refuse(store, kind, "model.safetensors", content)


@pytest.mark.parametrize("kind", MODEL_FILES)
def test_time_tables_that_fill_the_memory_are_refused(kind: str, store: Store) -> None:
    def change(facts: dict[str, Any]) -> None:
        facts["model"]["architecture"] |= {"num_train_timesteps": 65_536, "time_channels": 8192}

    content = with_facts(payload(kind, "model.safetensors"), change)
    with little_memory():
        refuse(store, kind, "model.safetensors", content, "65536 timesteps")


@pytest.mark.parametrize("kind", MODEL_FILES)
@pytest.mark.parametrize(
    "change",
    [
        lambda facts: facts["model"].update(schedule="quadratic"),
        lambda facts: facts["model"].update(prediction=["v"]),
        lambda facts: facts["model"].update(prediction="x"),
        lambda facts: facts.update(model=[]),
        lambda facts: facts.update(schema=2),
        lambda facts: facts["model"]["architecture"].pop("image_size"),
        lambda facts: facts["model"]["architecture"].clear(),
    ],
)
def test_a_model_description_that_lacks_sense_is_refused(kind: str, change: Any, store: Store) -> None:
    def edit(facts: dict[str, Any]) -> None:
        change(facts)

    refuse(store, kind, "model.safetensors", with_facts(payload(kind, "model.safetensors"), edit))


@pytest.mark.parametrize(
    "lie",
    [
        {"format": "int1"},
        {"format": "float32"},
        {"format": ["int8"]},
        {"format": "int2"},
        {"format": "int8sym"},
        {"format": "ternary"},
        {"format": "float8_e4m3"},
        {"granularity": "channel:9"},
        {"granularity": "channel:-1"},
        {"granularity": "row"},
        {"granularity": "group:0:0"},
        {"granularity": "group:5:0"},
        {"granularity": "group:1:9"},
        {"granularity": "group:999999999:0"},
        {"granularity": "channel:0:float64"},
        {"granularity": "channel:" + "0" * 5000},
        {"granularity": 5},
        {"scale": "float16"},
        {"codebook": []},
        {"shape": [2**40]},
        {"shape": [2**31, 2**31, 4]},
        {"shape": [2**63]},
        {"shape": [0]},
        {"shape": []},
        {"shape": [-1, -4]},
        {"shape": [1.0]},
        {"shape": [1] * 5000},
        {"shape": "4"},
        {"shape": None},
    ],
    ids=str,
)
def test_a_quantized_description_that_does_not_fit_its_tensors_is_refused(lie: Any, store: Store) -> None:
    def change(facts: dict[str, Any]) -> None:
        next(iter(facts["quantized"].values())).update(lie)

    content = with_facts(payload("quantized", "model.safetensors"), change)
    with little_memory():
        refuse(store, "quantized", "model.safetensors", content)


def with_part(name: str, change: Callable[[torch.Tensor], None]) -> bytes:
    """The quantized file, with one stored tensor changed in place."""
    header, data = unpack_file(payload("quantized", "model.safetensors"))
    begin, end = header[name]["data_offsets"]
    dtype = {"F32": torch.float32, "F16": torch.float16}.get(header[name]["dtype"], torch.uint8)
    part = torch.frombuffer(bytearray(data[begin:end]), dtype=dtype)
    change(part)
    return pack_file(header, data[:begin] + part.numpy().tobytes() + data[end:])


def stored_as(fmt: str, part: str) -> str:
    """The stored tensor ``part`` of some weight in ``fmt``."""
    value = tiny_value("quantized")
    return next(f"{name}.{part}" for name, p in value.packed.items() if p.format.name == fmt and len(p.shape) > 1)


@pytest.mark.parametrize(
    ("fmt", "part", "value"),
    [
        ("int8", "scale", float("nan")),
        ("int5", "scale", float("inf")),
        ("int4", "scale", 0.0),
        ("int4", "scale", -1.0),
        ("int3sym", "scale", float("nan")),
        ("ternary", "scale", -1.0),
        ("ternary", "codes", 243),
        ("float8_e4m3", "scale", -1.0),
        ("float8_e4m3", "codes", 0x7F),
        ("float8_e5m2", "codes", 0xFC),
    ],
)
def test_stored_values_that_no_packing_makes_are_refused(fmt: str, part: str, value: float, store: Store) -> None:
    name = stored_as(fmt, part)
    content = with_part(name, lambda tensor: tensor[-1:].fill_(value))
    refuse(store, "quantized", "model.safetensors", content, match=f"a {fmt} tensor|byte 243")
    load(store, "quantized", "model.safetensors", with_part(name, lambda tensor: tensor[-1:].fill_(1)))


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: facts.update(quantized=[]),
        lambda facts: facts.update(quantized={}),
        lambda facts: facts["quantized"].update(more={"format": "int8", "granularity": "tensor", "shape": [4]}),
        lambda facts: facts["quantized"].popitem(),
        lambda facts: facts["quantized"].update(dict.fromkeys(facts["quantized"])),
    ],
)
def test_a_list_of_quantized_tensors_that_is_not_the_files_is_refused(change: Any, store: Store) -> None:
    def edit(facts: dict[str, Any]) -> None:
        change(facts)

    refuse(store, "quantized", "model.safetensors", with_facts(payload("quantized", "model.safetensors"), edit))


@pytest.mark.parametrize(
    "lie",
    [
        {"classes": 2**62},
        {"classes": 0},
        {"image_shape": [1, 10**6, 10**6]},
        {"image_shape": [2**62, 8, 8]},
        {"image_shape": [1, 8, 16]},
        {"image_shape": [1, 8]},
        {"image_shape": "188"},
        {"accuracy": None},
        {"accuracy": 10**400},
        {"dataset": 7},
    ],
    ids=str,
)
def test_a_classifier_that_does_not_fit_its_tensors_is_refused_without_memory(lie: Any, store: Store) -> None:
    content = with_facts(payload("features", "classifier.safetensors"), lambda facts: {**facts, **lie})
    with little_memory():
        refuse(store, "features", "classifier.safetensors", content)


def test_image_sets_whose_tensors_do_not_fit_each_other_are_refused(store: Store) -> None:
    images, n = tiny_value("dataset").images, torch.arange(10)
    good = {"images": images, "labels": n, "held_out": n > 7}
    for lie in (
        {"held_out": n[:9] > 7},
        {"held_out": n >= 0},
        {"labels": n[:1]},
        {"labels": n - 1},
        {"labels": n + 2**62},
        {"images": images.float()},
        {"images": images[:, :, :, :0]},
    ):
        refuse(store, "dataset", "images.safetensors", tensor_file(**{**good, **lie}))


def test_seeds_that_are_not_the_images_are_refused(store: Store) -> None:
    images = tiny_value("samples").images
    for seeds in (
        torch.zeros(6, 2).long(),
        torch.zeros(6, 0).long(),
        torch.zeros(0, 2).long(),
        torch.zeros(6, 3).long(),
    ):
        refuse(store, "samples", "samples.safetensors", tensor_file(images=images, seeds=seeds))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_checkpoint_with_a_weight_that_is_no_number_is_refused_and_the_tensor_named(
    value: float, store: Store
) -> None:
    """Rejects a reader that leaves it to the formats, of which some overflow and some name nothing."""
    header, data = unpack_file(payload("checkpoint", "model.safetensors"))
    begin = header["head.output.bias"]["data_offsets"][0]
    broken = data[:begin] + struct.pack("<f", value) + data[begin + 4 :]
    refuse(store, "checkpoint", "model.safetensors", pack_file(header, broken), r"'head\.output\.bias' holds NaN")


def test_a_preview_of_other_images_is_refused(store: Store) -> None:
    content = tensor_file(loss=torch.ones(3), preview=torch.zeros(4, 3, 8, 8, dtype=torch.uint8))
    refuse(store, "checkpoint", "history.safetensors", content)


@fuzz
@given(data=st.data())
@pytest.mark.parametrize("kind", ["checkpoint", "quantized", "features"])
def test_any_value_anywhere_in_the_metadata_is_refused_or_harmless(
    kind: str, data: st.DataObject, tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")
    content = payload(kind, TENSOR_FILES[kind])

    def change(facts: dict[str, Any]) -> Any:
        return changed(facts, data.draw(st.sampled_from(places(facts))), data.draw(json_values))

    try:
        load(store, kind, TENSOR_FILES[kind], with_facts(content, change))
    except ArtifactCorrupt as error:
        assert TENSOR_FILES[kind] in error.message  # noqa: PT017 (no error is fine too)


@fuzz
@given(data=st.data())
@pytest.mark.parametrize("kind", FILES)
def test_a_file_with_any_bytes_changed_is_refused_or_harmless(kind: str, data: st.DataObject, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    content = bytearray(payload(kind, FILES[kind]))
    positions = st.integers(0, len(content) - 1)
    if kind in ("fisher", "validation"):
        positions = st.integers(max(0, len(content) - 4000), len(content) - 1) | positions  # its footer
    elif kind in TENSOR_FILES:
        positions = st.integers(0, 500) | positions
    for position in data.draw(st.lists(positions, min_size=1, max_size=4)):
        content[position] = data.draw(st.integers(0, 255))
    try:
        load(store, kind, FILES[kind], bytes(content[: data.draw(st.just(len(content)) | positions)]))
    except ArtifactCorrupt as error:
        assert FILES[kind] in error.message  # noqa: PT017 (no error is fine too)
