"""The store on disk: ``<store>/<kind>/<id>/manifest.json`` and payload files.

A directory is written under a temporary name, hashed, synced and renamed: an artifact is there whole or not at all.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from fqdiff.errors import AmbiguousRef, ArtifactCorrupt, ArtifactNotFound, ConfigError, LineageError
from fqdiff.store.files import disk_error, read_json, sha256_of, sync, write_atomically
from fqdiff.store.manifest import KINDS, FileRecord, Manifest, from_json, to_json

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
TEMPORARY = ".tmp-"


@dataclass(frozen=True)
class Store:
    """Artifacts under ``root``. Opening a store that does not exist yet writes nothing."""

    root: Path

    def directory(self, kind: str, artifact_id: str) -> Path:
        """Where the artifact is, or would be."""
        return self.root / kind / artifact_id

    def find(self, kind: str, artifact_id: str) -> Manifest | None:
        """The manifest of an artifact, or None where it is not there."""
        path = self.directory(kind, artifact_id) / "manifest.json"
        if not path.is_file():
            return None
        manifest = from_json(read_json(path), str(path))
        if (manifest.kind, manifest.id) != (kind, artifact_id):
            raise ArtifactCorrupt(f"{path} belongs to {manifest.kind} {manifest.id}", "it was moved by hand; remove it")
        return manifest

    def manifests(self, kind: str | None = None) -> Iterator[Manifest]:
        """Every artifact (of ``kind``), oldest first."""
        found = []
        for one in (kind,) if kind else KINDS:
            folder = self.root / one
            for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
                if not entry.name.startswith("."):
                    manifest = self.find(one, entry.name)
                    if manifest is not None:
                        found.append(manifest)
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
            other = f"'{ref}' is the {named[0]} {named[1]}" if named else f"no {wanted} is named '{ref}'"
            raise ArtifactNotFound(
                f"{other} in {self.root}", "fqdiff store ls shows what is there; ids need 4 digits or more"
            )
        if len(found) > 1:
            ids = ", ".join(f"{m.kind}/{m.id}" for m in found[:5])
            raise AmbiguousRef(f"'{ref}' may be any of {len(found)}: {ids}", "write more digits of the id")
        return found[0]

    def names(self) -> dict[str, tuple[str, str]]:
        """Given names and the (kind, id) each stands for."""
        folder = self.root / "names"
        pairs = {}
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if NAME_PATTERN.fullmatch(path.name):
                kind, _, artifact_id = path.read_text()[:200].strip().partition("/")
                pairs[path.name] = (kind, artifact_id)
        return pairs

    def give_name(self, name: str, manifest: Manifest) -> None:
        """Let ``name`` stand for ``manifest``; a name given before moves."""
        check_name(name)
        write_atomically(self.root / "names" / name, f"{manifest.kind}/{manifest.id}\n".encode())

    # --- writing ---------------------------------------------------------------------------------------------------

    def lock(self, kind: str, artifact_id: str) -> FileLock:
        """A lock held by whoever makes the artifact; the system frees it when its holder dies."""
        folder = self.root / "locks"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, f"cannot use the store {self.root}") from error
        return FileLock(folder / f"{kind}-{artifact_id}.lock")

    def temporary(self, kind: str) -> Path:
        """A fresh directory beside the artifacts of ``kind``, to be handed to :meth:`commit` or removed."""
        folder = self.root / kind
        folder.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(dir=folder, prefix=TEMPORARY))

    def commit(self, directory: Path, manifest: Manifest) -> Manifest:
        """Turn a temporary directory into the artifact: hash, write the manifest, sync, rename. Returns it with its files.

        An artifact already there under the same id stays, and the new one is dropped.
        """
        records = []
        for path in sorted(directory.iterdir()):
            records.append(FileRecord(path.name, path.stat().st_size, sha256_of(path)))
            sync(path)
        complete = Manifest(**{**vars(manifest), "files": tuple(records)})
        write_atomically(directory / "manifest.json", to_json(complete).encode())
        sync(directory)
        directory.chmod(0o755)
        target = self.directory(manifest.kind, manifest.id)
        if target.exists() and not (target / "manifest.json").exists():
            shutil.rmtree(target)  # a directory without a manifest does not exist
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

    # --- keeping house ---------------------------------------------------------------------------------------------

    def verify(self, manifest: Manifest) -> None:
        """Compare every payload file with its recorded size and hash. Raises ArtifactCorrupt naming the file."""
        folder = self.directory(manifest.kind, manifest.id)
        for record in manifest.files:
            path = folder / record.name
            if path.is_symlink() or not path.is_file():
                raise ArtifactCorrupt(f"{path} is missing", f"fqdiff store rm {manifest.id} --force, and make it again")
            size = path.stat().st_size
            digest = sha256_of(path) if size == record.bytes else ""
            if digest != record.sha256:
                got = f"sha256 {digest[:12]}…" if digest else f"{size} bytes"
                want = f"sha256 {record.sha256[:12]}…" if digest else f"{record.bytes} bytes"
                raise ArtifactCorrupt(
                    f"{path} is damaged: {got}, recorded {want}",
                    f"fqdiff store rm {manifest.id} --force, and make it again",
                )

    def lineage(self, manifest: Manifest) -> Iterator[tuple[int, Manifest | None, str, str]]:
        """(depth, manifest or None if gone, role, kind/id) of ``manifest`` and all it was made from, depth first."""

        def walk(one: Manifest, depth: int) -> Iterator[tuple[int, Manifest | None, str, str]]:
            for source in one.recipe.inputs:
                found = self.find(source.kind, source.id) if source.kind in KINDS else None
                yield depth, found, source.role, f"{source.kind}/{source.id}"
                if found is not None:
                    yield from walk(found, depth + 1)

        yield 0, manifest, "", f"{manifest.kind}/{manifest.id}"
        yield from walk(manifest, 1)

    def remove(self, manifest: Manifest, force: bool = False) -> None:
        """Delete an artifact and its names. Raises LineageError where others were made from it, unless ``force``."""
        users = [
            m for m in self.manifests() if any((i.kind, i.id) == (manifest.kind, manifest.id) for i in m.recipe.inputs)
        ]
        if users and not force:
            listed = ", ".join(f"{m.kind}/{m.id}" for m in users[:5])
            raise LineageError(
                f"{len(users)} artifacts were made from {manifest.kind}/{manifest.id}: {listed}",
                "--force removes it anyway",
            )
        for name, target in self.names().items():
            if target == (manifest.kind, manifest.id):
                (self.root / "names" / name).unlink()
        folder = self.directory(manifest.kind, manifest.id)
        doomed = folder.with_name(f"{TEMPORARY}rm-{manifest.id}")
        os.rename(folder, doomed)  # gone at once; deleting the files may take a while
        shutil.rmtree(doomed)

    def parts_folder(self, kind: str, artifact_id: str) -> Path:
        """Where partial results of an unfinished artifact are kept."""
        return self.root / "parts" / kind / artifact_id

    def leftovers(self) -> list[Path]:
        """What killed runs left behind and nobody can use any more: temporary files, and parts of finished artifacts."""
        found = [
            p
            for kind in KINDS
            if (self.root / kind).is_dir()
            for p in (self.root / kind).iterdir()
            if p.name.startswith(TEMPORARY)
        ]
        parts = self.root / "parts"
        for kind in sorted(parts.iterdir()) if parts.is_dir() else ():
            for folder in sorted(kind.iterdir()):
                if self.find(kind.name, folder.name) is not None:
                    found.append(folder)
                else:
                    found += [p for p in folder.iterdir() if p.name.startswith(TEMPORARY)]
        return found


def check_name(name: str) -> None:
    """Raise ConfigError unless ``name`` may stand for an artifact."""
    if not NAME_PATTERN.fullmatch(name) or name == "latest":
        raise ConfigError(f"'{name}' cannot be a name", "letters, digits, dots, dashes and underscores; not 'latest'")


def _how_to_make(kinds: tuple[str, ...]) -> str:
    commands = {
        "checkpoint": "fqdiff train",
        "fisher": "fqdiff fisher",
        "plan": "fqdiff plan",
        "quantized": "fqdiff quantize",
        "samples": "fqdiff sample",
        "metrics": "fqdiff fid",
    }
    return next((commands[k] for k in kinds if k in commands), "fqdiff train")
