"""What codecs share: plain JSON, and tensors that have to be what they are said to be."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fqdiff.errors import ArtifactCorrupt
from fqdiff.store.files import MAKE_AGAIN

LABEL_LIMIT = 65_536  # classes of a data set


def expect(condition: bool, path: Path, message: str) -> None:
    """Raise ArtifactCorrupt with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ArtifactCorrupt(f"{path}: {message}", MAKE_AGAIN)


def write_json(path: Path, data: Any) -> None:
    """``data`` as JSON for people: no NaN, a line at the end."""
    path.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")


def expect_names(tensors: Mapping[str, Tensor], path: Path, *names: str) -> None:
    """Raise ArtifactCorrupt where there is a tensor of another name."""
    unknown = sorted(tensors.keys() - set(names))
    expect(not unknown, path, f"unknown tensors {', '.join(unknown[:3])[:100]}")


def take(tensors: Mapping[str, Tensor], path: Path, name: str, dtype: torch.dtype, ndim: int) -> Tensor:
    """The tensor called ``name``, not empty; ArtifactCorrupt where it is missing or of another kind."""
    found = tensors.get(name)
    if found is None or found.dtype != dtype or found.ndim != ndim or not found.numel():
        got = "missing" if found is None else f"{found.dtype} of shape {tuple(found.shape)}"
        raise ArtifactCorrupt(f"{path}: '{name}' is {got}; it should be {dtype} of {ndim} axes", MAKE_AGAIN)
    return found


def check_parameters(network: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless ``network``, which may be on the meta device, has parameters of just these shapes."""
    wanted = {name: tuple(p.shape) for name, p in network.named_parameters()}
    wrong = sorted(n for n in wanted.keys() | shapes.keys() if wanted.get(n) != shapes.get(n))
    if wrong:
        raise ValueError(f"tensors do not fit the architecture: {', '.join(wrong[:3])}")
