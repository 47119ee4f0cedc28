"""Stores from strangers: manifests, links and names that lead outside, pickles. All are refused, or do no harm."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fqdiff.errors import ArtifactCorrupt, FqdiffError
from fqdiff.pipeline import Runner
from fqdiff.store.codecs import CODECS
from fqdiff.store.manifest import Manifest
from fqdiff.store.parts import StoredParts, last_unfinished
from fqdiff.store.store import Store
from tests.attacker import (
    FILES,
    artifact,
    changed,
    fuzz,
    json_values,
    little_memory,
    places,
    refuse,
)
from tests.test_store import KINDS, RECIPE, part, put


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


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
