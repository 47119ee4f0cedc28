"""Reading and writing single files: atomic writes, and readers that trust nothing they read."""

import hashlib
import json
import math
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from fqdiff.errors import ArtifactCorrupt, FqdiffError
from fqdiff.store.fields import mapping

TEMPORARY = ".tmp-"  # how names of unfinished files and folders begin
JSON_LIMIT = 4 * 2**20  # bytes; parsed, hostile JSON takes twenty times as much
JSON_DEPTH = 40
MAKE_AGAIN = "remove the artifact with fqdiff store rm, and make it again"


# --- writing ---------------------------------------------------------------------------------------------------------


def sync(path: Path) -> None:
    """Make sure that a file or directory is on the disk, not only in memory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary_path(folder: Path) -> Path:
    """A path in ``folder`` that nothing uses yet. What is made there gets the permissions that the user's umask gives."""
    return folder / f"{TEMPORARY}{secrets.token_hex(8)}"


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside ``path``, then rename over it: readers see the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path.parent)
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_tensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """A safetensors file. One metadata key at most, or its bytes would differ from run to run."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    assert len(metadata) <= 1
    try:
        save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata=dict(metadata))
    except SafetensorError as error:  # a full disk, among others
        raise OSError(str(error)) from error


def disk_error(error: OSError, doing: str) -> FqdiffError:
    """A disk that is full or a folder that is closed, as one line for the user."""
    return FqdiffError(f"{doing}: {error.strerror or error}", "nothing was lost; free space or choose another --store")


# --- reading ---------------------------------------------------------------------------------------------------------


@contextmanager
def readable(where: Path | str, what: str, hint: str = MAKE_AGAIN) -> Iterator[None]:
    """Turn whatever the content of a file makes its reader raise into one ArtifactCorrupt that names the file."""
    try:
        yield
    except ArtifactCorrupt:
        raise
    except (FqdiffError, LookupError, OSError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        reason = error.message if isinstance(error, FqdiffError) else str(error)
        reason = f"{reason} is missing" if isinstance(error, KeyError) else reason or type(error).__name__
        raise ArtifactCorrupt(f"{where} is not {what}: {reason[:200]}", hint) from error


def plain_size(path: Path, hint: str = MAKE_AGAIN) -> int:
    """Size of a regular file. Raises ArtifactCorrupt where there is none, or a link, which could lead out of the store."""
    try:
        status = path.lstat()
    except OSError as error:
        raise ArtifactCorrupt(
            f"{path} is missing" if isinstance(error, FileNotFoundError) else f"{path}: {error.strerror}", hint
        ) from None
    if not stat.S_ISREG(status.st_mode):
        raise ArtifactCorrupt(f"{path} is a link or a folder, not a file", hint)
    return status.st_size


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_json(content: bytes | str) -> Any:
    """Parsed JSON of bounded size and depth, every number finite. Raises ValueError."""
    if len(content) > JSON_LIMIT:
        raise ValueError(f"more than {JSON_LIMIT} bytes of JSON")
    try:
        data = json.loads(content, parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    level = [data]
    for _ in range(JSON_DEPTH):
        level = [
            child
            for one in level
            if isinstance(one, dict | list)
            for child in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return data
    raise ValueError("JSON nested too deeply")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:20]} is too large")
    return value


def read_json(path: Path, hint: str = MAKE_AGAIN) -> Any:
    """What :func:`parse_json` makes of a file. Raises ArtifactCorrupt."""
    plain_size(path, hint)
    with readable(path, "readable JSON", hint), path.open("rb") as file:
        return parse_json(file.read(JSON_LIMIT + 1))


def read_tensors(path: Path, hint: str = MAKE_AGAIN) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors and the parsed ``fqdiff`` metadata of a safetensors file. Raises ArtifactCorrupt.

    safetensors checks shapes and offsets against the file's size before it reserves memory.
    """
    from safetensors import SafetensorError, safe_open

    plain_size(path, hint)
    with readable(path, "a readable safetensors file", hint):
        with path.open("rb") as start:
            if int.from_bytes(start.read(8), "little") > JSON_LIMIT:
                raise ValueError(f"its header is larger than {JSON_LIMIT} bytes")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = mapping(parse_json((file.metadata() or {}).get("fqdiff", "{}")))
                return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise ValueError(str(error)) from error
