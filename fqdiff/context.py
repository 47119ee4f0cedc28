"""What a stage may use besides its inputs: where to compute, how to show progress, where to keep partial results.

Nothing here may change a result; what does belongs in the stage's config.
"""

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


class Bar(Protocol):
    """One running progress bar."""

    def update(self, n: int = 1) -> None:
        """Count ``n`` more units as done."""

    def show(self, text: str) -> None:
        """Replace the text behind the bar, such as the current loss."""


class SilentBar:
    """A bar that shows nothing."""

    def update(self, n: int = 1) -> None:
        """Nothing to show."""

    def show(self, text: str) -> None:
        """Nothing to show."""


def silent_progress(total: int, label: str, unit: str) -> AbstractContextManager[Bar]:
    """The default: no progress shown."""
    return nullcontext(SilentBar())


def never_stop() -> AbstractContextManager[Callable[[], bool]]:
    """The default: nobody asks a stage to stop."""
    return nullcontext(lambda: False)


Progress = Callable[[int, str, str], AbstractContextManager[Bar]]


@dataclass(frozen=True)
class Part:
    """A piece of an unfinished artifact: tensors and plain JSON data."""

    tensors: Mapping[str, Tensor]
    data: Mapping[str, object]


class Parts(Protocol):
    """Where a stage keeps partial results, by name, so that a killed run can continue. Saving replaces atomically."""

    def load(self, name: str) -> Part | None:
        """The part last saved under ``name``."""

    def save(self, name: str, part: Part) -> None:
        """Keep ``part`` under ``name``."""


class MemoryParts:
    """Parts that live as long as the process."""

    def __init__(self) -> None:
        self.saved: dict[str, Part] = {}

    def load(self, name: str) -> Part | None:
        """The part last saved under ``name``."""
        return self.saved.get(name)

    def save(self, name: str, part: Part) -> None:
        """Keep ``part`` under ``name``."""
        self.saved[name] = part


@dataclass(frozen=True)
class Context:
    """``batch_size``: images per forward pass while sampling, 0 for what fits. ``save_interval``: seconds between saved train
    states. ``max_memory``: bytes that the process should stay below, 0 for no limit; stages that can then take smaller batches.

    A stage that can stop between two steps with its state saved works inside ``soft_stop()``, asks what it yields after
    each step, and raises KeyboardInterrupt when told so. Outside of it an interrupt comes at once.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batch_size: int = 0
    max_memory: int = 0
    progress: Progress = silent_progress
    parts: Parts = field(default_factory=MemoryParts)
    save_interval: float = field(default_factory=lambda: float(os.environ.get("FQDIFF_SAVE_INTERVAL", "30")))
    soft_stop: Callable[[], AbstractContextManager[Callable[[], bool]]] = never_stop

    def __post_init__(self) -> None:
        if self.device.type == "cuda":
            compute_in_full_float32()

    @property
    def evidence_device(self) -> torch.device:
        """Where statistics in float64 are computed: on CUDA, else on the CPU, since MPS has no float64."""
        return self.device if self.device.type == "cuda" else torch.device("cpu")


def compute_in_full_float32() -> None:
    """From now on float32 on CUDA is float32, and an algorithm of one input gives one result.

    By default torch lets convolutions round their inputs to TF32, whose fraction has ten bits, as float16's: every model would be
    sampled as if its weights had been cast, and what a cast costs could not be measured.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
