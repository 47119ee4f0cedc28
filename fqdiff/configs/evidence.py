"""Samples, feature networks, FIDs and comparisons."""

from dataclasses import dataclass

from fqdiff.errors import require

SAMPLERS = ("ddim", "ddpm", "dpm++")


@dataclass(frozen=True)
class NoiseCorrectionConfig:
    """In how many ``intervals`` of timesteps the error of what a quantized network predicts is measured, and made up for."""

    intervals: int = 10

    def __post_init__(self) -> None:
        require(self.intervals >= 1, f"noise intervals is {self.intervals}", "use 1 or more, e.g. 10")


@dataclass(frozen=True)
class SampleConfig:
    """Which sampler makes the images, in how many steps, and how many images."""

    sampler: str = "ddim"
    steps: int = 50
    eta: float = 0.0
    count: int = 5000

    def __post_init__(self) -> None:
        require(self.sampler in SAMPLERS, f"unknown sampler '{self.sampler}'", f"one of: {', '.join(SAMPLERS)}")
        require(self.steps >= 1, f"steps is {self.steps}", "use 1 or more, e.g. 50")
        require(self.eta == 0 or self.sampler == "ddim", f"eta is DDIM's; {self.sampler} has none", "leave eta out")
        require(0 <= self.eta <= 1, f"eta is {self.eta}", "use 0 (deterministic) to 1 (as random as DDPM)")
        require(self.count >= 1, f"count is {self.count}", "sample at least one image")


@dataclass(frozen=True)
class ClassifierConfig:
    """How the digits feature network is trained: every image moved by up to ``shift`` of its side, turned by up to
    ``rotation`` degrees and resized by up to 1 +- ``scaling``, anew each time it is seen.
    """

    epochs: int = 40
    batch_size: int = 100
    learning_rate: float = 2e-3
    shift: float = 0.06
    rotation: float = 10.0
    scaling: float = 0.1

    def __post_init__(self) -> None:
        require(self.epochs >= 1, f"epochs is {self.epochs}", "train for at least one epoch")
        require(self.batch_size >= 1, f"batch_size is {self.batch_size}", "use 1 or more")
        require(0 <= self.shift < 1, f"shift is {self.shift}", "use a share of the side, e.g. 0.06")
        require(0 <= self.rotation <= 180, f"rotation is {self.rotation}", "use 0 to 180 degrees")
        require(0 <= self.scaling < 1, f"scaling is {self.scaling}", "use a share below 1, e.g. 0.1")
        require(self.learning_rate > 0, f"learning_rate is {self.learning_rate}", "use a positive rate, e.g. 2e-3")


@dataclass(frozen=True)
class FidConfig:
    """How many images of each set are compared; 0 takes as many as both have."""

    count: int = 0
    resamples: int = 200

    def __post_init__(self) -> None:
        require(self.count == 0 or self.count >= 10, f"count is {self.count}", "use 10 or more, or 0 for all")
        require(self.resamples >= 20, f"resamples is {self.resamples}", "a standard error needs 20 or more, e.g. 200")


@dataclass(frozen=True)
class CompareConfig:
    """How many images of each set are compared (0: as many as all have), and at which level.

    ``full_precision_of``: numbers, from 1, of the models that the baseline is the full precision of: a value
    beyond the baseline's is no merit of theirs. Networks are compared on ``error_inputs`` noised held-out images at each of
    about ``error_timesteps`` timesteps, and along ``trajectories`` runs of the sampler; 0 leaves either out. ``sampler``,
    ``steps`` and ``eta`` of those runs are the samples' own, filled in from their recipe.
    """

    count: int = 0
    resamples: int = 1000
    level: float = 0.95
    full_precision_of: tuple[int, ...] = ()
    error_timesteps: int = 20
    error_inputs: int = 32
    trajectories: int = 16
    sampler: str = ""
    steps: int = 0
    eta: float = 0.0

    def __post_init__(self) -> None:
        require(self.count == 0 or self.count >= 10, f"count is {self.count}", "use 10 or more, or 0 for all")
        require(self.resamples >= 20, f"resamples is {self.resamples}", "a standard error needs 20 or more, e.g. 1000")
        require(0.5 <= self.level < 1, f"level is {self.level}", "use 0.5 to below 1, e.g. 0.95")
        require(
            all(k >= 1 for k in self.full_precision_of), "models are numbered from 1", "leave full_precision_of out"
        )
        require(self.error_timesteps >= 1, f"error_timesteps is {self.error_timesteps}", "use 1 or more, e.g. 20")
        for name in ("error_inputs", "trajectories"):
            value = getattr(self, name)
            require(value == 0 or value >= 2, f"{name} is {value}", "an interval needs 2 or more; 0 leaves it out")

    @property
    def compares_networks(self) -> bool:
        """Whether the models themselves are compared, and not only their images."""
        return self.error_inputs > 0 or self.trajectories > 0
