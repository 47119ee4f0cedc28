"""Measuring Fisher information, and putting what it foretells to the test."""

from dataclasses import dataclass

from fqdiff.errors import require

FISHER_KINDS = ("empirical", "true", "trajectory")
GRANULARITIES = ("tensor", "channel", "weight")
VARIANCE_REDUCTIONS = ("none", "antithetic", "common", "both")


@dataclass(frozen=True)
class FisherConfig:
    """How the Fisher diagonal is estimated: ``samples`` per timestep, at ``timesteps`` evenly spaced timesteps.

    ``trajectory`` measures whole sampler runs instead: ``samples`` of them, of ``steps`` steps; ``window`` consecutive steps
    are differentiated together, 0 for all. ``bins``: timestep bins of the per-weight values.
    """

    kind: str = "empirical"
    timesteps: int = 1000
    samples: int = 8
    granularity: str = "channel"
    bins: int = 20
    activations: bool = True
    variance_reduction: str = "none"
    precision: str = "float32"
    sampler: str = "ddim"
    steps: int = 50
    window: int = 0

    def __post_init__(self) -> None:
        for name, known in (
            ("kind", FISHER_KINDS),
            ("granularity", GRANULARITIES),
            ("variance_reduction", VARIANCE_REDUCTIONS),
            ("precision", ("float32", "bfloat16")),
            ("sampler", ("ddim",)),
        ):
            require(
                getattr(self, name) in known, f"unknown {name} '{getattr(self, name)}'", f"one of: {', '.join(known)}"
            )
        require(self.timesteps >= 1, f"timesteps is {self.timesteps}", "use 1 or more, e.g. 1000")
        require(self.samples >= 2, f"samples is {self.samples}", "a standard error needs 2 or more")
        require(
            self.variance_reduction not in ("antithetic", "both") or (self.samples % 2 == 0 and self.samples >= 4),
            f"{self.samples} samples in antithetic pairs",
            "use an even number, 4 or more",
        )
        require(self.bins >= 1, f"bins is {self.bins}", "use 1 or more, e.g. 20")
        require(self.steps >= 1, f"steps is {self.steps}", "use 1 or more, e.g. 50")
        require(
            0 <= self.window <= self.steps, f"window is {self.window}", f"use 1 to {self.steps}, or 0 for all steps"
        )


@dataclass(frozen=True)
class ValidateConfig:
    """How predictions are put to the test: every weight tensor in each of ``formats`` by min-max ranges, and in each of
    ``clipped`` by ranges of least weight error, one at a time.

    ``samples`` held-out images at each of ``timesteps``, as many training images for the scores that need some; ``images``
    pairs of final images after ``steps`` of DDIM, 0 for none; ``plans`` random plans beside the uniform ones, 0 for no
    plans at all.
    """

    formats: tuple[str, ...] = ("int8", "int6", "int4", "int3", "int2")
    clipped: tuple[str, ...] = ("int4",)
    granularity: str = "channel"
    timesteps: int = 20
    samples: int = 5
    images: int = 8
    steps: int = 25
    plans: int = 32
    resamples: int = 1000

    def __post_init__(self) -> None:
        require(bool(self.formats), "no formats to try", "e.g. int8,int4")
        for name in ("formats", "clipped"):
            values = getattr(self, name)
            require(len(set(values)) == len(values), f"{name} {','.join(values)} name one twice", "list each once")
        require(
            self.granularity in ("tensor", "channel"), f"unknown granularity '{self.granularity}'", "tensor or channel"
        )
        for name in ("timesteps", "samples", "steps"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}", "use 1 or more")
        for name in ("images", "plans"):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}", "use 0 (none) or more")
        require(self.resamples >= 2, f"resamples is {self.resamples}", "an interval needs 2 or more, e.g. 1000")
