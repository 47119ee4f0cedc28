"""Reading and writing single files: atomic writes, and readers that trust nothing they read."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fqdiff.errors import ArtifactCorrupt, FqdiffError

JSON_LIMIT = 64 * 2**20


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Make sure that a file or directory is on the disk, not only in memory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside ``path``, then rename over it: readers see the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def disk_error(error: OSError, doing: str) -> FqdiffError:
    """A disk that is full or a folder that is closed, as one line for the user."""
    return FqdiffError(f"{doing}: {error.strerror or error}", "nothing was lost; free space or choose another --store")


def read_json(path: Path) -> Any:
    """Parsed JSON of bounded size. Raises ArtifactCorrupt."""
    try:
        if path.stat().st_size > JSON_LIMIT:
            raise ArtifactCorrupt(f"{path} is {path.stat().st_size} bytes", f"at most {JSON_LIMIT} are read")
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactCorrupt(
            f"{path} cannot be read as JSON: {error}", "remove the artifact and make it again"
        ) from None


def write_tensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """A safetensors file. One metadata key at most, or its bytes would differ from run to run."""
    from safetensors.torch import save_file

    assert len(metadata) <= 1
    save_file(dict(tensors), path, metadata=dict(metadata))


def read_tensors(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors and the parsed ``fqdiff`` metadata of a safetensors file. Raises ArtifactCorrupt.

    safetensors checks header length, shapes and offsets against the file's size before it reserves memory.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("fqdiff", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, ValueError, RecursionError, SafetensorError, TypeError, AttributeError) as error:
        raise ArtifactCorrupt(
            f"{path} cannot be read as safetensors: {error}", "remove the artifact and make it again"
        ) from None
    if not isinstance(metadata, dict):
        raise ArtifactCorrupt(f"{path} has no readable metadata", "remove the artifact and make it again")
    return tensors, metadata
