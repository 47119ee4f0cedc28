"""Recipes and manifests: what an artifact is made from, and what is written beside its payload."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fqdiff.errors import ArtifactCorrupt

SCHEMA = 1
KINDS = ("dataset", "checkpoint", "fisher", "plan", "quantized", "samples", "features", "metrics")
ID_LENGTH = 16
ID_PATTERN = re.compile(rf"[0-9a-f]{{{ID_LENGTH}}}")
FILE_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9]+)+")


@dataclass(frozen=True)
class Input:
    """One input of a recipe: its role in the stage, and the artifact that fills it."""

    role: str
    kind: str
    id: str


@dataclass(frozen=True)
class Recipe:
    """All that determines an artifact. Same recipe, same id; any changed part, another id."""

    kind: str
    stage: str
    schema: int
    inputs: tuple[Input, ...]
    config: Mapping[str, Any]
    seed: int

    @property
    def id(self) -> str:
        """The first 16 hex digits of the sha256 of the recipe as canonical JSON."""
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:ID_LENGTH]


@dataclass(frozen=True)
class FileRecord:
    """One payload file."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The recipe, and how and when it was carried out."""

    recipe: Recipe
    id: str
    created: str
    command: str
    files: tuple[FileRecord, ...]
    environment: Mapping[str, Any]
    seconds: float
    peak_memory: int

    @property
    def kind(self) -> str:
        """Kind of the artifact."""
        return self.recipe.kind

    @property
    def bytes(self) -> int:
        """Size of all payload files."""
        return sum(f.bytes for f in self.files)

    def input(self, role: str) -> Input | None:
        """The input that fills ``role``."""
        return next((i for i in self.recipe.inputs if i.role == role), None)


def to_json(manifest: Manifest) -> str:
    """The text of ``manifest.json``."""
    return json.dumps({"schema": SCHEMA, **asdict(manifest)}, indent=1) + "\n"


def recipe_from_json(data: Any, where: str) -> Recipe:
    """The recipe in ``data``, every field checked. Raises ArtifactCorrupt."""
    try:
        inputs = tuple(Input(_text(i["role"]), _text(i["kind"]), _text(i["id"])) for i in _list(data["inputs"]))
        return Recipe(
            _text(data["kind"]),
            _text(data["stage"]),
            _count(data["schema"]),
            inputs,
            _mapping(data["config"]),
            _count(data["seed"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactCorrupt(f"{where} holds no recipe: {error}", "remove the artifact and make it again") from None


def from_json(data: Any, where: str) -> Manifest:
    """The manifest in ``data``, every field checked: it may come from a stranger. Raises ArtifactCorrupt."""
    try:
        if data["schema"] != SCHEMA:
            raise ArtifactCorrupt(f"{where} has schema {data['schema']!r}", f"this fqdiff reads schema {SCHEMA}")
        recipe = recipe_from_json(data["recipe"], where)
        files = tuple(
            FileRecord(_text(f["name"]), _count(f["bytes"]), _text(f["sha256"])) for f in _list(data["files"])
        )
        manifest = Manifest(
            recipe,
            _text(data["id"]),
            _text(data["created"]),
            _text(data["command"]),
            files,
            _mapping(data["environment"]),
            float(data["seconds"]),
            _count(data["peak_memory"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactCorrupt(f"{where} is not a manifest: {error}", "remove the artifact and make it again") from None
    if manifest.kind not in KINDS or not ID_PATTERN.fullmatch(manifest.id):
        raise ArtifactCorrupt(f"{where} names kind {manifest.kind!r}, id {manifest.id!r}", "remove the artifact")
    for record in files:
        if not FILE_PATTERN.fullmatch(record.name) or record.name == "manifest.json":
            raise ArtifactCorrupt(f"{where} lists a file {record.name!r}", "names are plain, without folders")
    if recipe.id != manifest.id:
        raise ArtifactCorrupt(f"{where} was edited: its recipe has id {recipe.id}, not {manifest.id}", "make it again")
    return manifest


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 10_000:
        raise TypeError(f"{str(value)[:50]!r} is no text")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"{str(value)[:50]!r} is no count")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{str(value)[:50]!r} is no list")
    return value


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{str(value)[:50]!r} is no table")
    return value
