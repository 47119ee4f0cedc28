"""The store on disk: ``<store>/<kind>/<id>/manifest.json`` and payload files.

A directory is written under a temporary name, hashed, synced and renamed: an artifact is there whole or not at all.
"""

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from fqdiff.errors import AmbiguousRef, ArtifactCorrupt, ArtifactNotFound, ConfigError, LineageError
from fqdiff.store.files import (
    TEMPORARY,
    disk_error,
    plain_size,
    read_json,
    readable,
    sha256_of,
    sync,
    temporary_path,
    write_atomically,
)
from fqdiff.store.manifest import ID_PATTERN, KINDS, FileRecord, Manifest, from_json, to_json

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Store:
    """Artifacts under ``root``. Opening a store that does not exist yet writes nothing."""

    root: Path

    def directory(self, kind: str, artifact_id: str) -> Path:
        """Where the artifact is, or would be."""
        return self.root / kind / artifact_id

    def inside(self, *names: str) -> Path:
        """The path of ``names`` under the root. Raises ArtifactCorrupt where one is a link: it may lead out of the store."""
        path = self.root
        for name in names:
            path = path / name
            try:
                linked = path.is_symlink()
            except OSError as error:
                raise disk_error(error, f"cannot use {path}") from error
            if linked:
                raise ArtifactCorrupt(f"{path} is a link", "a store holds plain files and folders; remove the link")
        return path

    def find(self, kind: str, artifact_id: str) -> Manifest | None:
        """The manifest of an artifact, or None where it is not there."""
        if kind not in KINDS or not ID_PATTERN.fullmatch(artifact_id):
            return None
        path = self.inside(kind, artifact_id, "manifest.json")
        if not path.exists():
            return None
        delete = f"delete the folder {path.parent}, and make it again"
        manifest = from_json(read_json(path, delete), path)
        if (manifest.kind, manifest.id) != (kind, artifact_id):
            raise ArtifactCorrupt(f"{path} belongs to {manifest.kind} {manifest.id}", delete)
        return manifest

    def entries(self, kind: str | None = None) -> Iterator[tuple[str, str]]:
        """Kind and id of every artifact's folder (of ``kind``), readable or not."""
        for one in (kind,) if kind else KINDS:
            for entry in _entries(self.inside(one)):
                if ID_PATTERN.fullmatch(entry.name):
                    yield one, entry.name

    def manifests(self, kind: str | None = None) -> Iterator[Manifest]:
        """Every artifact (of ``kind``), oldest first."""
        found = [m for entry in self.entries(kind) if (m := self.find(*entry)) is not None]
        yield from sorted(found, key=lambda m: (m.created, m.id))

    # --- references ------------------------------------------------------------------------------------------------

    def resolve(self, ref: str, kinds: tuple[str, ...] = ()) -> Manifest:
        """The artifact (of one of ``kinds``) that ``ref`` names: a name, an id, a unique prefix of one, or ``latest``.

        Raises ArtifactNotFound or AmbiguousRef.
        """
        wanted = " or ".join(kinds) or "artifact"
        named = self.names().get(ref)
        candidates = [m for kind in kinds or (None,) for m in self.manifests(kind)]
        if ref == "latest":
            if not candidates:
                raise ArtifactNotFound(f"no {wanted} in {self.root}", f"make one first: {_how_to_make(kinds)}")
            return max(candidates, key=lambda m: (m.created, m.id))
        if named is not None:
            found = [m for m in candidates if (m.kind, m.id) == named]
        else:
            prefix = ref.rpartition("/")[2]
            found = [m for m in candidates if len(prefix) >= 4 and m.id.startswith(prefix)]
            if "/" in ref:
                found = [m for m in found if m.kind == ref.rpartition("/")[0]]
        if not found:
            raise self._not_found(ref, kinds)
        if len(found) > 1:
            ids = ", ".join(f"{m.kind}/{m.id}" for m in found[:5])
            raise AmbiguousRef(f"'{ref}' may be any of {len(found)}: {ids}", "write more digits of the id")
        return found[0]

    def _not_found(self, ref: str, kinds: tuple[str, ...]) -> ArtifactNotFound:
        """The error that says what ``ref`` is, if it is anything: a name, an id, or the path of an artifact's folder or file."""
        problem, hint = f"no {' or '.join(kinds) or 'artifact'} is named '{ref}'", "fqdiff store ls shows what is there"
        ids = [part for part in ref.split("/") if ID_PATTERN.fullmatch(part)] or [ref]
        meant = [m for m in self.manifests() if len(ids[-1]) >= 4 and m.id.startswith(ids[-1])]
        if (named := self.names().get(ref)) is not None:
            state = "another kind is asked for" if self.find(*named) else "it is gone"
            problem = f"'{ref}' is the {named[0]} {named[1]}, and {state},"
        elif len(meant) == 1 and meant[0].kind not in (kinds or KINDS):
            problem = f"'{ref}' is the {meant[0].kind} {meant[0].id}, and another kind is asked for,"
        elif len(meant) == 1:
            hint = f"the {meant[0].kind} goes by its id: {meant[0].id}"
        else:
            hint += "; ids need 4 digits or more"
        return ArtifactNotFound(f"{problem} in {self.root}", hint)

    def names(self) -> dict[str, tuple[str, str]]:
        """Given names and the (kind, id) each stands for; a file that says no such thing names nothing."""
        pairs = {}
        for path in _entries(self.inside("names")):
            if NAME_PATTERN.fullmatch(path.name) and path.is_file() and not path.is_symlink():
                kind, _, artifact_id = _beginning(path).strip().partition("/")
                if kind in KINDS and ID_PATTERN.fullmatch(artifact_id):
                    pairs[path.name] = (kind, artifact_id)
        return pairs

    def give_name(self, name: str, manifest: Manifest) -> None:
        """Let ``name`` stand for ``manifest``; a name given before moves."""
        check_name(name)
        try:
            write_atomically(self.inside("names", name), f"{manifest.kind}/{manifest.id}\n".encode())
        except OSError as error:
            raise disk_error(error, f"cannot write the name '{name}'") from error

    # --- writing ---------------------------------------------------------------------------------------------------

    def lock(self, kind: str, artifact_id: str) -> FileLock:
        """A lock held by whoever makes the artifact; the system frees it when its holder dies."""
        path = self.inside("locks", f"{kind}-{artifact_id}.lock")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, f"cannot use the store {self.root}") from error
        return FileLock(path)

    def temporary(self, kind: str) -> Path:
        """A fresh directory beside the artifacts of ``kind``, to be handed to :meth:`commit` or removed."""
        path = temporary_path(self.inside(kind))
        path.mkdir(parents=True)
        return path

    def commit(self, directory: Path, manifest: Manifest, replace: bool = False) -> Manifest:
        """Turn a temporary directory into the artifact: hash, write the manifest, sync, rename. Returns it with its files.

        An artifact already there under the same id stays, and the new one is dropped; with ``replace`` it is the other way
        round.
        """
        records = []
        for path in sorted(directory.iterdir()):
            records.append(FileRecord(path.name, path.stat().st_size, sha256_of(path)))
            sync(path)
        complete = Manifest(**{**vars(manifest), "files": tuple(records)})
        write_atomically(directory / "manifest.json", to_json(complete).encode())
        sync(directory)
        target = self.inside(manifest.kind, manifest.id)
        if target.exists() and (replace or not (target / "manifest.json").exists()):
            self._discard(target)  # a directory without a manifest does not exist
        try:
            os.rename(directory, target)
        except OSError:
            existing = self.find(manifest.kind, manifest.id)
            if existing is None:
                raise
            shutil.rmtree(directory)
            return existing
        sync(target.parent)
        return complete

    def _discard(self, folder: Path) -> None:
        """Delete a folder: it is gone at once, and should deleting its files be interrupted, the rest is a leftover."""
        doomed = temporary_path(folder.parent)
        os.rename(folder, doomed)
        shutil.rmtree(doomed)

    # --- keeping house ---------------------------------------------------------------------------------------------

    def verify(self, manifest: Manifest) -> None:
        """Compare every payload file with its recorded size and hash. Raises ArtifactCorrupt naming the file."""
        folder = self.inside(manifest.kind, manifest.id)
        again = f"fqdiff store rm {manifest.id} --force, and make it again"
        with readable(folder, "a readable artifact", again):
            listed = {"manifest.json", *(record.name for record in manifest.files)}
            for path in _entries(folder):
                if path.name not in listed and not path.name.startswith("."):
                    raise ArtifactCorrupt(f"{path} is not in the manifest, so nothing vouches for it", again)
            for record in manifest.files:
                check_file(folder / record.name, record, again)

    def lineage(self, manifest: Manifest) -> Iterator[tuple[int, Manifest | None, str, str]]:
        """(depth, manifest or None if gone, role, kind/id) of ``manifest`` and all it was made from, depth first.

        What an artifact was made from follows where it is met first.
        """
        waiting = [(0, "", manifest.kind, manifest.id)]
        seen = set()
        while waiting:
            depth, role, kind, artifact_id = waiting.pop()
            found = self.find(kind, artifact_id) if depth else manifest
            yield depth, found, role, f"{kind}/{artifact_id}"
            if found is not None and (kind, artifact_id) not in seen:
                seen.add((kind, artifact_id))
                waiting += [(depth + 1, i.role, i.kind, i.id) for i in reversed(found.recipe.inputs)]

    def check_unused(self, targets: Sequence[tuple[str, str]]) -> None:
        """Raise LineageError where an artifact outside ``targets`` was made from one of them."""
        for manifest in self.manifests():
            if (manifest.kind, manifest.id) in targets:
                continue
            for source in manifest.recipe.inputs:
                if (source.kind, source.id) in targets:
                    raise LineageError(
                        f"{manifest.kind}/{manifest.id} was made from {source.kind}/{source.id}",
                        "--force removes it anyway",
                    )

    def remove(self, kind: str, artifact_id: str) -> None:
        """Delete an artifact, readable or not, and its names."""
        try:
            self._discard(self.inside(kind, artifact_id))
            for name, named in self.names().items():
                if named == (kind, artifact_id):
                    (self.root / "names" / name).unlink()
        except OSError as error:
            raise disk_error(error, f"cannot remove {kind} {artifact_id}") from error

    def parts_folder(self, kind: str, artifact_id: str) -> Path:
        """Where partial results of an unfinished artifact are kept."""
        return self.inside("parts", kind, artifact_id)

    def leftovers(self) -> list[Path]:
        """What killed runs left behind and nobody can use any more: temporary files, and parts of finished artifacts."""
        folders = [self.inside(name) for name in (*KINDS, "names")]
        found: list[Path] = []
        for kind in KINDS:
            for parts in _entries(self.inside("parts", kind)):
                if parts.is_dir() and not parts.is_symlink():
                    finished = self.find(kind, parts.name) is not None
                    (found if finished else folders).append(parts)
        temporary = (path for folder in folders for path in _entries(folder) if path.name.startswith(TEMPORARY))
        return found + [path for path in temporary if not path.is_symlink()]


def check_file(path: Path, record: FileRecord, hint: str) -> None:
    """Raise ArtifactCorrupt unless a file has the size and the hash that its manifest records."""
    size = plain_size(path, hint)
    if size != record.bytes:
        raise ArtifactCorrupt(f"{path} is damaged: {size} bytes, recorded {record.bytes}", hint)
    digest = sha256_of(path)
    if digest != record.sha256:
        raise ArtifactCorrupt(f"{path} is damaged: sha256 {digest[:12]}…, recorded {record.sha256[:12]}…", hint)


def _entries(folder: Path) -> list[Path]:
    """What a folder holds, by name; nothing where it is not there."""
    try:
        return sorted(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise disk_error(error, f"cannot read {folder}") from error


def _beginning(path: Path) -> str:
    """The first bytes of a file as text."""
    try:
        with path.open("rb") as file:
            return file.read(200).decode("ascii", errors="replace")
    except OSError as error:
        raise disk_error(error, f"cannot read {path}") from error


def check_name(name: str) -> None:
    """Raise ConfigError unless ``name`` may stand for an artifact."""
    if not NAME_PATTERN.fullmatch(name) or name == "latest":
        raise ConfigError(f"'{name}' cannot be a name", "letters, digits, dots, dashes and underscores; not 'latest'")


def _how_to_make(kinds: tuple[str, ...]) -> str:
    commands = {
        "checkpoint": "fqdiff train, or fqdiff import pretrained:mnist-small",
        "fisher": "fqdiff fisher",
        "validation": "fqdiff fisher validate",
        "plan": "fqdiff plan",
        "calibration": "fqdiff calibrate",
        "quantized": "fqdiff quantize",
        "samples": "fqdiff sample",
        "metrics": "fqdiff fid",
        "comparison": "fqdiff compare",
    }
    return next((commands[k] for k in kinds if k in commands), "fqdiff train")
