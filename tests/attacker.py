"""What a stranger may do to a store: files changed, with hashes and ids that fit, since they are not secret."""

import copy
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from fqdiff.cli.compare_text import comparison_text
from fqdiff.errors import ArtifactCorrupt
from fqdiff.evidence.comparison import model_roles
from fqdiff.pipeline import Runner
from fqdiff.store.manifest import Manifest
from fqdiff.store.store import Store
from fqdiff.values import Checkpoint, ClassifierWeights, Comparison, Plan, QuantizedCheckpoint
from tests.test_store import put

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


def tensor_file(**tensors: torch.Tensor) -> bytes:
    from safetensors.torch import save

    return save({k: v.clone() for k, v in tensors.items()}, {"fqdiff": '{"name": "x"}'})
