"""A model for use in Python, from wherever it is: a file, an artifact's folder, or a store."""

import os
from pathlib import Path

from torch import nn

from fqdiff.errors import ArtifactNotFound
from fqdiff.store.files import read_json, readable
from fqdiff.store.manifest import KINDS, from_json
from fqdiff.store.model_files import read_model
from fqdiff.store.store import Store, check_file

FILE = "model.safetensors"
MODEL_KINDS = ("checkpoint", "quantized")
DEFAULT_STORE = "fqdiff-store"
HINT = f"give a {FILE} that fqdiff wrote, the folder of such an artifact, or the name of one in a store"


def load_model(ref_or_path: str | os.PathLike[str], store: str | os.PathLike[str] | None, cache: bool) -> nn.Module:
    """What :func:`fqdiff.load` promises."""
    if is_path(ref_or_path):
        file = file_at(Path(ref_or_path))
    else:
        opened = Store(Path(store or os.environ.get("FQDIFF_STORE") or DEFAULT_STORE))
        manifest = opened.resolve(str(ref_or_path), MODEL_KINDS)
        opened.verify(manifest)
        file = opened.directory(manifest.kind, manifest.id) / FILE
    model = read_model(file, HINT)
    network = model.packed_network(cache)
    network.spec = model.spec  # type: ignore[assignment]  # a plain attribute, neither tensor nor module
    return network


def is_path(ref_or_path: str | os.PathLike[str]) -> bool:
    """Whether this is a path; told by its text alone, so that no file lying about changes what a reference means."""
    if not isinstance(ref_or_path, str):
        return True
    folder, name = os.path.split(ref_or_path)
    return name.endswith(".safetensors") or name in ("", ".", "..") or (folder != "" and folder not in KINDS)


def file_at(given: Path) -> Path:
    """The model file at a path that a user names, which may lead through links; in a folder its manifest vouches for it."""
    with readable(given, "a readable file", HINT):
        path = given.resolve()
        is_folder = path.is_dir()
        file = path / FILE if is_folder else path
        is_there = file.is_file()
    if not is_there:
        raise ArtifactNotFound(f"there is no file {file}", HINT)
    about = path / "manifest.json"
    if is_folder and about.exists():
        with readable(path, "a readable artifact", HINT):
            check_file(file, from_json(read_json(about, HINT), about).file(FILE), HINT)
    return file
