"""Model files from outside the store: the pretrained ones that come with fqdiff, and anybody's of the same layout."""

from dataclasses import dataclass
from pathlib import Path

import torch

import fqdiff
from fqdiff.errors import ArtifactCorrupt, ConfigError
from fqdiff.store.fields import mapping, printable, text
from fqdiff.store.files import plain_size, read_json, readable, sha256_of
from fqdiff.store.model_files import read_model
from fqdiff.values import QuantizedCheckpoint

PREFIX = "pretrained:"
PACKAGE = Path(fqdiff.__file__).parent
FOLDERS = (PACKAGE / "checkpoints", PACKAGE.parent / "examples" / "checkpoints")  # of a wheel, of a checkout
REINSTALL = "install fqdiff again, or check the file out again"


@dataclass(frozen=True)
class ModelFile:
    """A model read from a file. ``source``: what it is called; ``dataset``: whose images it is usually measured with."""

    source: str
    sha256: str
    model: QuantizedCheckpoint
    description: str
    dataset: str | None


def open_model(source: str) -> ModelFile:
    """The model of ``pretrained:NAME``, or in the file at the path ``source``.

    Raises ConfigError for a name that is not known, ArtifactCorrupt for a file that is damaged, a link, or no model of casts
    to float32, float16 or bfloat16.
    """
    if source.startswith(PREFIX):
        return _open_pretrained(source.removeprefix(PREFIX))
    path = Path(source)
    known = ", ".join(PREFIX + name for name in pretrained_names())
    hint = f"give a .safetensors file as fqdiff quantize --output writes it, in half or full precision, or {known}"
    plain_size(path, hint)
    return ModelFile(printable(path.name), sha256_of(path), _read_casts(path, hint), "", None)


def pretrained_names() -> list[str]:
    """The names of the models that come with fqdiff."""
    return sorted(path.stem for path in _folder().glob("*.json"))


def _open_pretrained(name: str) -> ModelFile:
    if name not in pretrained_names():
        raise ConfigError(f"no pretrained model is called '{name}'", f"one of: {', '.join(pretrained_names())}")
    about, path = (
        (_folder() / f"{name}.{ending}").resolve() for ending in ("json", "safetensors")
    )  # installers may link
    with readable(about, "a pretrained model's description", REINSTALL):
        facts = mapping(read_json(about, REINSTALL))
        recorded, description, dataset = (text(facts[key]) for key in ("sha256", "description", "dataset"))
    plain_size(path, REINSTALL)
    digest = sha256_of(path)
    if digest != recorded:
        raise ArtifactCorrupt(f"{path} is damaged: sha256 {digest[:12]}…, recorded {recorded[:12]}…", REINSTALL)
    return ModelFile(PREFIX + name, digest, _read_casts(path, REINSTALL), description, dataset)


def _folder() -> Path:
    return next((folder for folder in FOLDERS if folder.is_dir()), FOLDERS[0])


def _read_casts(path: Path, hint: str) -> QuantizedCheckpoint:
    """The model in ``path``, whose every value is a finite floating-point number."""
    model = read_model(path, hint)
    with readable(path, "a model to import", hint):
        if model.timestep_bias:
            raise ValueError("it has biases by timestep; plans start from a model without")
        if model.activations:
            raise ValueError("its activations are quantized; plans start from a model whose are not")
        if model.noise_correction is not None:
            raise ValueError("what it predicts is corrected; plans start from a model without")
        for name, packed in model.packed.items():
            if packed.parts.keys() != {"data"}:
                mixed = " with kept elements" if "kept" in packed.parts else ""
                raise ValueError(f"'{name}' is {packed.format.name}{mixed}; plans start from half or full precision")
            if not torch.isfinite(packed.parts["data"]).all():
                raise ValueError(f"'{name}' holds NaN or infinity")
    return model
