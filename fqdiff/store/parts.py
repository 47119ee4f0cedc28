"""Partial results of an unfinished artifact, one safetensors file each, so that a killed run can continue."""

import json
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save

from fqdiff.context import Part
from fqdiff.digests import tensor_digest
from fqdiff.errors import ArtifactCorrupt, LineageError
from fqdiff.store.files import disk_error, read_json, read_tensors, write_atomically
from fqdiff.store.manifest import Recipe, recipe_from_json
from fqdiff.store.store import Store

RECIPE = "recipe.json"
START_OVER = "start over with --force"


class StoredParts:
    """Parts in a folder of their own, made on first use."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self.folder = folder
        self.recipe = recipe

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def load(self, name: str) -> Part | None:
        """The part last saved under ``name``. Raises ArtifactCorrupt where its digest does not fit."""
        path = self._path(name)
        if not path.exists() and not path.is_symlink():
            return None
        tensors, metadata = read_tensors(path, START_OVER)
        if metadata.get("digest") != tensor_digest(tensors) or not isinstance(metadata.get("data"), dict):
            raise ArtifactCorrupt(f"the partial result {path} is damaged", START_OVER)
        return Part(tensors, metadata["data"])

    def save(self, name: str, part: Part) -> None:
        """Keep ``part`` under ``name``; the one before stays whole until this one is."""
        content = json.dumps({"digest": tensor_digest(part.tensors), "data": dict(part.data)}, sort_keys=True)
        try:
            if not (self.folder / RECIPE).exists():
                write_atomically(self.folder / RECIPE, json.dumps(asdict(self.recipe)).encode())
            write_atomically(self._path(name), save(dict(part.tensors), metadata={"fqdiff": content}))
        except OSError as error:
            raise disk_error(error, f"cannot write {self._path(name)}") from error


def last_unfinished(store: Store, kind: str) -> Recipe | None:
    """The recipe of the unfinished artifact of ``kind`` whose part was saved last; None where all are finished."""
    return next(iter(unfinished(store, kind)), None)


def unfinished(store: Store, kind: str) -> list[Recipe]:
    """Recipes of the unfinished artifacts of ``kind``, the one whose part was saved last first."""
    newest: dict[str, float] = {}
    for folder in store.inside("parts", kind).glob("*"):
        saved = [part.lstat().st_mtime for part in folder.glob("*.safetensors")]
        if saved:
            newest[folder.name] = max(saved)
    recipes = []
    for name in sorted(newest, key=lambda name: -newest[name]):
        path = store.inside("parts", kind, name) / RECIPE
        recipe = recipe_from_json(read_json(path), path)
        if (recipe.kind, recipe.id) != (kind, name):
            raise ArtifactCorrupt(f"{path} belongs to {recipe.kind} {recipe.id}", f"delete the folder {path.parent}")
        if store.find(kind, recipe.id) is None:
            recipes.append(recipe)
    return recipes


def adopt_parts(source: Store, target: Store, recipe: Recipe) -> int:
    """Copy the parts of ``recipe`` that ``target`` lacks from ``source``; how many. Each is read and checked on the way.

    Raises LineageError where both hold a part and they differ: one of them comes from other code or another machine's kernels.
    """
    theirs = StoredParts(source.parts_folder(recipe.kind, recipe.id), recipe)
    ours = StoredParts(target.parts_folder(recipe.kind, recipe.id), recipe)
    taken = 0
    for path in sorted(theirs.folder.glob("*.safetensors")):
        name = path.stem
        part, known = theirs.load(name), ours.load(name)
        if part is None:
            continue
        if known is None:
            ours.save(name, part)
            taken += 1
        elif tensor_digest(known.tensors) != tensor_digest(part.tensors):
            raise LineageError(f"{name} of {recipe.kind} {recipe.id} differs between the stores", f"remove one: {path}")
    return taken
