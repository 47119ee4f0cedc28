"""Recipes and manifests: what an artifact is made from, and what is written beside its payload."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fqdiff.errors import ArtifactCorrupt, ConfigError
from fqdiff.store.fields import count, items, mapping, number, record, text
from fqdiff.store.files import readable

SCHEMA = 1
KINDS = (
    "dataset",
    "checkpoint",
    "fisher",
    "validation",
    "plan",
    "calibration",
    "quantized",
    "samples",
    "features",
    "metrics",
    "comparison",
)
ID_LENGTH = 16
ID_PATTERN = re.compile(rf"[0-9a-f]{{{ID_LENGTH}}}")
FILE_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9]+)+")
FILE_NAME_LIMIT = 100
SETTINGS_LIMIT = 1_000_000  # characters of a settings file


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
        """The first 16 hex digits of the sha256 of the recipe as canonical JSON. Raises ConfigError for NaN and infinity."""
        try:
            canonical = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), allow_nan=False)
        except ValueError:
            raise ConfigError(f"a setting of {self.stage} is NaN or infinite", "use finite numbers") from None
        return hashlib.sha256(canonical.encode()).hexdigest()[:ID_LENGTH]

    def input(self, role: str) -> Input | None:
        """The input that fills ``role``."""
        return next((i for i in self.inputs if i.role == role), None)


@dataclass(frozen=True)
class FileRecord:
    """One payload file."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The recipe, and how and when it was carried out.

    ``settings``: the text of the TOML file that the command was given, if it was.
    """

    recipe: Recipe
    id: str
    created: str
    command: str
    files: tuple[FileRecord, ...]
    environment: Mapping[str, Any]
    seconds: float
    peak_memory: int
    settings: str = ""

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
        return self.recipe.input(role)

    def file(self, name: str) -> FileRecord:
        """The payload file called ``name``. Raises ArtifactCorrupt where there is none."""
        for file in self.files:
            if file.name == name:
                return file
        raise ArtifactCorrupt(f"{self.kind} {self.id} has no file {name}", "remove the artifact and make it again")


def to_json(manifest: Manifest) -> str:
    """The text of ``manifest.json``."""
    return json.dumps({"schema": SCHEMA, **asdict(manifest)}, indent=1) + "\n"


def recipe_from_json(data: Any, where: Path) -> Recipe:
    """The recipe in ``data``, every field checked. Raises ArtifactCorrupt."""
    with readable(where, "a recipe", _delete(where)):
        given = mapping(data)
        return Recipe(
            text(given["kind"]),
            text(given["stage"]),
            count(given["schema"]),
            tuple(record(Input, i) for i in items(given["inputs"])),
            mapping(given["config"]),
            count(given["seed"]),
        )


def from_json(data: Any, where: Path) -> Manifest:
    """The manifest in ``data``, every field checked: it may come from a stranger. Raises ArtifactCorrupt."""
    with readable(where, "a manifest", _delete(where)):
        given = mapping(data)
        if given["schema"] != SCHEMA:
            raise ArtifactCorrupt(
                f"{where} has schema {str(given['schema'])[:20]}", f"this fqdiff reads schema {SCHEMA}"
            )
        manifest = Manifest(
            recipe_from_json(given["recipe"], where),
            text(given["id"]),
            text(given["created"]),
            text(given["command"]),
            tuple(record(FileRecord, f) for f in items(given["files"])),
            mapping(given["environment"]),
            number(given["seconds"]),
            count(given["peak_memory"]),
            text(given.get("settings", ""), SETTINGS_LIMIT),  # which manifests of earlier versions lack
        )
        if manifest.kind not in KINDS or not ID_PATTERN.fullmatch(manifest.id):
            raise ValueError(f"kind {manifest.kind!r}, id {manifest.id!r}")
        names = [f.name for f in manifest.files]
        for name in names:
            if not FILE_PATTERN.fullmatch(name) or name == "manifest.json" or len(name) > FILE_NAME_LIMIT:
                raise ValueError(f"it lists a file {name!r}, and names are plain, without folders")
        if len(set(names)) < len(names):
            raise ValueError("it lists a file twice")
        if manifest.recipe.id != manifest.id:
            raise ArtifactCorrupt(
                f"{where} was edited: its recipe has id {manifest.recipe.id}, not {manifest.id}", _delete(where)
            )
    return manifest


def _delete(where: Path) -> str:
    return f"delete the folder {where.parent}, and make it again"
