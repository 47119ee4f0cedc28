"""One codec per kind: a value into files of a directory, and back. Loaded files are checked before they become a value."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fqdiff.store.evidence_files import (
    load_comparison,
    load_features,
    load_metrics,
    load_samples,
    save_comparison,
    save_features,
    save_metrics,
    save_samples,
)
from fqdiff.store.fields import text
from fqdiff.store.files import read_tensors, readable, write_tensors
from fqdiff.store.fisher_files import load_fisher, save_fisher
from fqdiff.store.model_files import (
    load_calibration,
    load_checkpoint,
    load_quantized,
    save_calibration,
    save_checkpoint,
    save_quantized,
)
from fqdiff.store.payload import LABEL_LIMIT, expect, expect_names, take
from fqdiff.store.plan_files import load_plan, save_plan
from fqdiff.store.validation import load_validation, save_validation
from fqdiff.values import Dataset


@dataclass(frozen=True)
class Codec:
    """``save(value, directory)`` writes the payload files; ``load(directory)`` reads the value back."""

    save: Callable[[Any, Path], None]
    load: Callable[[Path], Any]


def save_dataset(value: Dataset, directory: Path) -> None:
    """``images.safetensors``."""
    tensors = {"images": value.images, "held_out": value.held_out}
    if value.labels is not None:
        tensors["labels"] = value.labels
    write_tensors(directory / "images.safetensors", tensors, {"fqdiff": json.dumps({"name": value.name})})


def load_dataset(directory: Path) -> Dataset:
    """Images with their labels, and which are held out."""
    path = directory / "images.safetensors"
    tensors, meta = read_tensors(path)
    expect_names(tensors, path, "images", "labels", "held_out")
    images = take(tensors, path, "images", torch.uint8, 4)
    held_out = take(tensors, path, "held_out", torch.bool, 1)
    labels = take(tensors, path, "labels", torch.int64, 1) if "labels" in tensors else None
    lengths = {len(t) for t in (images, held_out, *([labels] if labels is not None else []))}
    expect(len(lengths) == 1, path, f"tensors of different lengths {sorted(lengths)}")
    expect(not held_out.all(), path, "it has no training image")
    expect(labels is None or 0 <= int(labels.min()) <= int(labels.max()) < LABEL_LIMIT, path, "labels out of range")
    with readable(path, "a data set"):
        return Dataset(text(meta["name"]), images, labels, held_out)


CODECS: Mapping[str, Codec] = {
    "dataset": Codec(save_dataset, load_dataset),
    "checkpoint": Codec(save_checkpoint, load_checkpoint),
    "fisher": Codec(save_fisher, load_fisher),
    "validation": Codec(save_validation, load_validation),
    "plan": Codec(save_plan, load_plan),
    "calibration": Codec(save_calibration, load_calibration),
    "quantized": Codec(save_quantized, load_quantized),
    "samples": Codec(save_samples, load_samples),
    "features": Codec(save_features, load_features),
    "metrics": Codec(save_metrics, load_metrics),
    "comparison": Codec(save_comparison, load_comparison),
}
