"""Stores from strangers: every file in them is refused with a clear error, or does no harm.

An attacker can make hashes and ids fit, since they are not secret: so do these tests.
"""

import copy
import hashlib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fqdiff.cli.compare_text import comparison_text
from fqdiff.errors import ArtifactCorrupt, FqdiffError
from fqdiff.evidence.comparison import model_roles
from fqdiff.pipeline import Runner
from fqdiff.store.codecs import CODECS
from fqdiff.store.fisher_files import FISHER_SCHEMA
from fqdiff.store.manifest import Manifest
from fqdiff.store.parquet import unpacked_size
from fqdiff.store.parts import StoredParts, last_unfinished
from fqdiff.store.store import Store
from fqdiff.values import Checkpoint, ClassifierWeights, Comparison, Plan, QuantizedCheckpoint
from tests.test_store import KINDS, RECIPE, part, put, tiny_value

MODEL_FILES = {"checkpoint": "model.safetensors", "quantized": "model.safetensors"}
TENSOR_FILES = {
    **MODEL_FILES,
    "dataset": "images.safetensors",
    "samples": "samples.safetensors",
    "features": "classifier.safetensors",
    "calibration": "calibration.safetensors",
}
JSON_FILES = {"plan": "plan.json", "metrics": "metrics.json", "comparison": "comparison.json"}
FILES = {**TENSOR_FILES, **JSON_FILES, "fisher": "fisher.parquet", "validation": "validation.parquet"}
fuzz = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


# --- the attacker's tools --------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@cache
def template(kind: str) -> tuple[Any, Store, Manifest]:
    """A store with one artifact; its folder lives as long as the first value."""
    folder = tempfile.TemporaryDirectory()
    store = Store(Path(folder.name))
    return folder, store, put(store, kind)


def artifact(store: Store, kind: str) -> Manifest:
    """The only artifact of ``kind`` in ``store``, put there if it is not there yet."""
    _, source, manifest = template(kind)
    if not store.directory(kind, manifest.id).exists():
        shutil.copytree(source.root, store.root, dirs_exist_ok=True)
    return manifest


def rewrite(store: Store, manifest: Manifest, name: str, content: bytes) -> Manifest:
    """Replace a payload file, and its hash in the manifest with it."""
    folder = store.directory(manifest.kind, manifest.id)
    (folder / name).write_bytes(content)
    data = json.loads((folder / "manifest.json").read_text())
    for record in data["files"]:
        if record["name"] == name:
            record |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(data))
    found = store.find(manifest.kind, manifest.id)
    assert found is not None
    return found


def use(kind: str, value: Any) -> None:
    """What a stage would do with a value before it computes anything."""
    if isinstance(value, Checkpoint | QuantizedCheckpoint):
        value.network()
    if isinstance(value, ClassifierWeights):
        value.feature_network()
    if isinstance(value, Plan):
        assert value.bits_per_weight > 0
    if isinstance(value, Comparison):
        labels = dict.fromkeys(["baseline", *model_roles(value.models)], "a model")
        assert comparison_text("0" * 16, value, labels if value.floor_seed is None else {**labels, "floor": "noise"})


def load(store: Store, kind: str, name: str, content: bytes) -> None:
    """Meet ``content`` as the payload file ``name`` of an artifact, and use what it holds."""
    use(kind, Runner(store).load(rewrite(store, artifact(store, kind), name, content)))


def refuse(store: Store, kind: str, name: str, content: bytes, match: str | None = None) -> None:
    with pytest.raises(ArtifactCorrupt, match=match) as error:
        load(store, kind, name, content)
    assert name in error.value.message
    assert len(str(error.value)) < 1000


@contextmanager
def little_memory(limit: int = 300 * 2**20) -> Iterator[None]:
    """The process never holds ``limit`` bytes more than it does now."""

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
    except OSError:
        pytest.skip("this system does not measure peak memory")
    before = status("VmRSS:")
    yield
    assert status("VmHWM:") - before < limit


# any JSON, and what Python's reader takes beside it
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 0, 2**31, 2**40, 2**63, 2**64, 10**400, 1e308, float("nan"), float("inf"), "", "\ud800"])
    | st.floats()
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside ``data``."""
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path, *(p for key, value in inner for p in places(value, (*path, key)))]


def changed(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of ``data`` with ``value`` at ``path``."""
    if not path:
        return value
    result = copy.deepcopy(data)
    inner = result
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return result


# --- manifests -------------------------------------------------------------------------------------------------------


def write_manifest(store: Store, kind: str, data: Any) -> None:
    """Put ``data`` where its own recipe says it belongs, if it says so."""
    (folder,) = (store.root / kind).iterdir()
    recipe = data.get("recipe") if isinstance(data, dict) else None
    if isinstance(recipe, dict) and data.get("id") == folder.name:
        text = json.dumps(recipe, sort_keys=True, separators=(",", ":"))
        data = {**data, "id": hashlib.sha256(text.encode()).hexdigest()[:16]}
        folder = folder.rename(folder.with_name(data["id"]))
    (folder / "manifest.json").write_text(json.dumps(data))


def use_everything(store: Store) -> None:
    """All that reads manifests. Anything but FqdiffError is a failure."""
    runner = Runner(store)
    steps: list[Callable[[Manifest], object]] = [
        store.verify,
        runner.load,
        lambda m: list(store.lineage(m)),
        lambda m: f"{m.bytes:,} {m.seconds:.1f} {m.peak_memory / 2**20:.0f} {m.created} {m.command}".encode(),
        lambda m: store.resolve(m.id),
        lambda m: store.leftovers(),
    ]
    try:
        for manifest in store.manifests():
            for step in steps:
                step(manifest)
    except FqdiffError as error:
        assert error.message  # noqa: PT017 (no error is fine too)


@fuzz
@given(data=st.data())
def test_any_value_anywhere_in_a_manifest_is_refused_or_harmless(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = Store(tmp_path_factory.mktemp("store"))
    manifest = artifact(store, "metrics")
    good = json.loads((store.directory("metrics", manifest.id) / "manifest.json").read_text())
    good["recipe"]["inputs"] = [{"role": "samples", "kind": "samples", "id": "0" * 16}]
    path = data.draw(st.sampled_from(places(good)))
    write_manifest(store, "metrics", changed(good, path, data.draw(json_values)))
    use_everything(store)


@pytest.mark.parametrize(
    "name",
    [
        "../../../secret.json",
        "/etc/passwd",
        "a/b.json",
        "..",
        ".hidden",
        "metrics.json\0.png",
        "metrics.json\n",
        "manifest.json",
        "a" * 5000 + ".json",
        "",
        "C:\\x.json",
    ],
)
def test_a_file_name_that_is_not_plain_is_refused(name: str, store: Store, tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text("{}")
    manifest = artifact(store, "metrics")
    path = store.directory("metrics", manifest.id) / "manifest.json"
    data = json.loads(path.read_text())
    data["files"].append({"name": name, "bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()})
    path.write_text(json.dumps(data))
    with pytest.raises(ArtifactCorrupt, match="lists a file"):
        store.find("metrics", manifest.id)


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("place", ["seconds", "config"])
def test_numbers_that_are_not_finite_are_refused(text: str, place: str, store: Store) -> None:
    manifest = artifact(store, "metrics")
    path = store.directory("metrics", manifest.id) / "manifest.json"
    good = {"seconds": '"seconds": 0.5', "config": '"size": 1.5'}[place]
    path.write_text(path.read_text().replace(good, good.split(":")[0] + ": " + text))
    with pytest.raises(ArtifactCorrupt, match=r"manifest\.json"):
        store.find("metrics", manifest.id)


@pytest.mark.parametrize(
    "content",
    ["[" * 100_000, '{"a":' * 300 + "1" + "}" * 300, "[" + "[]," * 1_300_000 + "[]]", "", "\xff", "null"],
    ids=["deep", "as deep as Python reads", "many lists", "empty", "no UTF-8", "null"],
)
def test_json_that_is_deep_large_or_broken_is_refused_without_memory(content: str, store: Store) -> None:
    manifest = artifact(store, "metrics")
    path = store.directory("metrics", manifest.id) / "manifest.json"
    path.write_bytes(content.encode("latin-1"))
    with little_memory(), pytest.raises(ArtifactCorrupt, match=r"manifest\.json"):
        store.find("metrics", manifest.id)


def test_a_manifest_of_a_gigabyte_is_refused_without_reading_it(store: Store) -> None:
    manifest = artifact(store, "metrics")
    with (store.directory("metrics", manifest.id) / "manifest.json").open("r+b") as file:
        file.truncate(2**30)
    with little_memory(50 * 2**20), pytest.raises(ArtifactCorrupt, match=r"manifest\.json"):
        store.find("metrics", manifest.id)


def test_an_artifact_under_another_kind_is_refused(store: Store) -> None:
    manifest = artifact(store, "metrics")
    (store.root / "plan").mkdir()
    os.rename(store.directory("metrics", manifest.id), store.directory("plan", manifest.id))
    with pytest.raises(ArtifactCorrupt, match="belongs to metrics"):
        store.find("plan", manifest.id)


def test_inputs_that_point_outside_are_not_followed(store: Store, tmp_path: Path) -> None:
    outside = Store(tmp_path / "outside")
    put(outside, "plan")
    manifest = artifact(store, "metrics")
    path = store.directory("metrics", manifest.id) / "manifest.json"
    data = json.loads(path.read_text())
    data["recipe"]["inputs"] = [
        {"role": "a", "kind": "../../outside/plan", "id": manifest.id},
        {"role": "b", "kind": "plan", "id": "../../../outside/plan"},
    ]
    write_manifest(store, "metrics", data)
    (found,) = store.manifests()
    assert [m for _, m, _, _ in store.lineage(found)] == [found, None, None]


# --- links and names that lead outside -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_payload_that_is_a_link_is_refused_even_if_its_hash_fits(kind: str, store: Store, tmp_path: Path) -> None:
    manifest = artifact(store, kind)
    for record in manifest.files:
        path = store.directory(kind, manifest.id) / record.name
        outside = tmp_path / record.name
        os.rename(path, outside)
        path.symlink_to(outside)
        with pytest.raises(ArtifactCorrupt, match=f"{record.name} is a link"):
            Runner(store).load(manifest)
        if not record.name.endswith((".png", ".svg")):
            with pytest.raises(ArtifactCorrupt, match=f"{record.name} is a link"):
                CODECS[kind].load(path.parent)
        path.unlink()
        os.rename(outside, path)


@pytest.mark.parametrize("what", ["plan", "plan/{id}", "plan/{id}/manifest.json"])
def test_a_folder_or_manifest_that_is_a_link_is_refused(what: str, store: Store, tmp_path: Path) -> None:
    manifest = artifact(store, "plan")
    path = store.root / what.format(id=manifest.id)
    os.rename(path, tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    for read in (
        lambda: store.find("plan", manifest.id),
        lambda: list(store.manifests()),
        lambda: store.resolve(manifest.id),
    ):
        with pytest.raises(ArtifactCorrupt, match="link"):
            read()


def test_removing_an_artifact_never_follows_a_link(store: Store, tmp_path: Path) -> None:
    manifest = artifact(store, "plan")
    path = store.root / "plan" / manifest.id / "manifest.json"
    os.rename(path, tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    store.remove("plan", manifest.id)
    assert (tmp_path / "outside").is_file()
    assert not path.parent.exists()


def test_nothing_is_written_or_removed_through_a_link(store: Store, tmp_path: Path) -> None:
    manifest = artifact(store, "plan")
    outside = tmp_path / "outside"
    (outside / RECIPE.id).mkdir(parents=True)
    kept = [outside / ".tmp-precious", outside / RECIPE.id / ".tmp-precious", outside / f"plan-{RECIPE.id}.lock"]
    for path in kept:
        path.write_text("precious")
    (store.root / "parts").mkdir()
    for folder in ("names", "locks", "samples", "parts/plan"):
        (store.root / folder).symlink_to(outside)
    for write in (
        lambda: store.give_name("best", manifest),
        lambda: store.lock("plan", RECIPE.id).acquire(timeout=0),
        lambda: store.temporary("samples"),
        lambda: StoredParts(store.parts_folder("plan", RECIPE.id), RECIPE).save("state", part(1.0)),
        lambda: last_unfinished(store, "plan"),
        store.leftovers,
    ):
        with pytest.raises(ArtifactCorrupt, match="link"):
            write()
    assert [path.read_text() for path in kept] == ["precious"] * 3
    assert len(list(outside.rglob("*"))) == 4


def test_a_lock_that_is_a_link_is_refused_and_its_target_stays(store: Store, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (store.root / "locks").mkdir(parents=True)
    (store.root / "locks" / f"plan-{RECIPE.id}.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(ArtifactCorrupt, match="link"):
        store.lock("plan", RECIPE.id)
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.mark.parametrize(
    "content", [b"../../etc/passwd", b"plan/../../x", b"../plan/" + b"0" * 16, b"", b"\xff\0\n", b"plan/" * 10**6]
)
def test_a_name_that_stands_for_no_artifact_names_nothing(content: bytes, store: Store) -> None:
    artifact(store, "plan")
    (store.root / "names").mkdir()
    (store.root / "names" / "evil").write_bytes(content)
    assert store.names() == {}
    with pytest.raises(FqdiffError, match="evil"):
        store.resolve("evil")


def test_name_files_that_are_links_folders_or_pipes_are_not_read(store: Store, tmp_path: Path) -> None:
    manifest = artifact(store, "plan")
    (tmp_path / "outside").write_text(f"plan/{manifest.id}")
    (store.root / "names" / "folder").mkdir(parents=True)
    (store.root / "names" / "link").symlink_to(tmp_path / "outside")
    os.mkfifo(store.root / "names" / "pipe")
    assert store.names() == {}


def test_payloads_and_manifests_that_are_pipes_or_folders_are_refused(store: Store) -> None:
    manifest = artifact(store, "plan")
    folder = store.directory("plan", manifest.id)
    for name in ("plan.json", "manifest.json"):
        (folder / name).unlink()
        for make in (os.mkfifo, os.mkdir):
            make(folder / name)
            with pytest.raises(ArtifactCorrupt, match=name):
                Runner(store).load(manifest) if name == "plan.json" else store.find("plan", manifest.id)
            (folder / name).rmdir() if (folder / name).is_dir() else (folder / name).unlink()


# --- pickles ---------------------------------------------------------------------------------------------------------


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("old_format", [False, True])
def test_a_pickle_is_refused_and_not_executed(kind: str, old_format: bool, store: Store, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    torch.save({"weight": Payload(marker)}, tmp_path / "evil.pt", _use_new_zipfile_serialization=not old_format)
    refuse(store, kind, FILES[kind], (tmp_path / "evil.pt").read_bytes())
    assert not marker.exists()
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert marker.exists()  # it would have worked


# --- safetensors -----------------------------------------------------------------------------------------------------


def unpack_file(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def pack_file(header: Any, data: bytes, length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def payload(kind: str, name: str) -> bytes:
    """A file as fqdiff writes it."""
    _, store, manifest = template(kind)
    return (store.directory(kind, manifest.id) / name).read_bytes()


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


def tensor_file(**tensors: torch.Tensor) -> bytes:
    from safetensors.torch import save

    return save({k: v.clone() for k, v in tensors.items()}, {"fqdiff": '{"name": "x"}'})


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
        {"threshold": float("-inf")},
        {"threshold": 10**400},
        {"parameter": None},
        {"block": 1},
        {"rule": {}},
        {"rule": "\ud800"},
        {"alternatives": None},
        {"alternatives": [{"format": "int5", "bytes": 1, "predicted": 0.0}]},
        {"alternatives": [{"format": "int3", "bytes": 1, "predicted": 0.0}]},
        {"alternatives": [{"format": "int5", "bytes": 1}]},
        {"alternatives": [[]]},
        {"predicted": 7.0},
        {"predicted": float("nan")},
        {"constraint": 5},
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
