"""Calibration sets, quantized weights and activations, and what makes up for their errors."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fqdiff.configs.recipes import later
from fqdiff.errors import require

THIRDS = ("early", "middle", "late")
CALIBRATION_SCHEMES = ("uniform", "ndtc", *THIRDS, "fisher")


@dataclass(frozen=True)
class CalibrateConfig:
    """Which model inputs (x_t, t) are recorded: ``timesteps`` of each of ``samples`` sampler runs of ``steps`` steps.

    ``uniform``: evenly spaced steps; ``early``, ``middle``, ``late``: the same within one third of the run, from noise to image.
    ``ndtc``: drawn from a skew-normal on t / T, ``location``, ``spread`` and ``skew`` its parameters, cut off at 0 and 1.
    ``fisher``: drawn in proportion to the Fisher information of the step's t. ``source`` data takes noised training images
    instead of what the sampler meets. ``precision``: dtype in which x_t is stored.
    """

    scheme: str = "uniform"
    source: str = "noise"
    sampler: str = "ddim"
    steps: int = 50
    eta: float = 0.0
    timesteps: int = 20
    samples: int = 256
    location: float = 0.4
    spread: float = 0.4
    skew: float = 0.0
    precision: str = "float32"

    def __post_init__(self) -> None:
        for name, known in (
            ("scheme", CALIBRATION_SCHEMES),
            ("source", ("noise", "data")),
            ("sampler", ("ddim", "ddpm")),
            ("precision", ("float32", "float16")),
        ):
            require(
                getattr(self, name) in known, f"unknown {name} '{getattr(self, name)}'", f"one of: {', '.join(known)}"
            )
        for name in ("steps", "timesteps", "samples"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}", "use 1 or more")
        require(0 <= self.eta <= 1, f"eta is {self.eta}", "use 0 (deterministic) to 1 (as random as DDPM)")
        require(self.eta == 0 or self.sampler == "ddim", "eta is DDIM's; ddpm has none", "leave eta out")
        own = ("location", "spread", "skew")
        unused = [name for name in own if getattr(self, name) != getattr(CalibrateConfig, name)]
        require(self.scheme == "ndtc" or not unused, f"'{self.scheme}' has no use for {', '.join(unused)}", "add ndtc")
        require(-1 <= self.location <= 2, f"location is {self.location}", "a share of T, e.g. 0.4")
        require(0.01 <= self.spread <= 100, f"spread is {self.spread}", "a share of T, e.g. 0.4")
        require(-100 <= self.skew <= 100, f"skew is {self.skew}", "0 for a normal, above it for a tail to large t")


def calibration_settings(given: Mapping[str, object], num_train_timesteps: int) -> dict[str, Any]:
    """``given`` settings of a CalibrateConfig with the defaults that depend on others.

    DDPM runs over all ``num_train_timesteps``; of a third of a run no more timesteps are kept than it has.
    """
    found: dict[str, Any] = {**({"steps": num_train_timesteps} if given.get("sampler") == "ddpm" else {}), **given}
    scheme, steps = found.get("scheme"), found.get("steps", CalibrateConfig.steps)
    if "timesteps" not in given and scheme in THIRDS and isinstance(steps, int):
        found["timesteps"] = max(1, min(CalibrateConfig.timesteps, len(third_of(str(scheme), steps))))
    return found


def third_of(scheme: str, steps: int) -> range:
    """The steps of a run of so many that are ``scheme``, one of THIRDS."""
    third = THIRDS.index(scheme)
    return range(third * steps // 3, (third + 1) * steps // 3)


BIAS_CORRECTIONS = ("none", "static", "timestep")


@dataclass(frozen=True)
class QuantizeConfig:
    """What makes up for rounding; the plan says all the rest.

    ``bias_correction``: how biases make up for what rounding does to the mean of a layer's output. ``static``: one correction
    for all timesteps. ``timestep``: also one for each of ``bias_intervals`` intervals of them, which adds to the file.
    Both look at ``calibration_images`` DDIM runs of ``calibration_steps`` steps of the full-precision model.

    ``distill``: so many optimizer steps on all that is stored, on ``distill_batch`` inputs each, to predict what the
    full-precision model predicts; ``distill_rate``: how far a step moves a weight, in steps of its grid.
    """

    bias_correction: str = "none"
    bias_intervals: int = 10
    calibration_images: int = 32
    calibration_steps: int = 20
    distill: int = 0
    distill_batch: int = 32
    distill_rate: float = 0.02

    def __post_init__(self) -> None:
        known = f"one of: {', '.join(BIAS_CORRECTIONS)}"
        require(self.bias_correction in BIAS_CORRECTIONS, f"unknown bias correction '{self.bias_correction}'", known)
        for name in ("bias_intervals", "calibration_images", "calibration_steps"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}", "use 1 or more")
        unused = {"none": ("bias_intervals", "calibration_images", "calibration_steps"), "static": ("bias_intervals",)}
        for name in unused.get(self.bias_correction, ()):
            require(
                getattr(self, name) == getattr(QuantizeConfig, name),
                f"bias correction '{self.bias_correction}' has no use for {name}",
                "leave it out",
            )
        require(self.distill >= 0, f"distill is {self.distill}", "use 0 or more steps, e.g. 1000")
        require(self.distill_batch >= 1, f"distill_batch is {self.distill_batch}", "use 1 or more, e.g. 32")
        require(0 < self.distill_rate <= 1, f"distill_rate is {self.distill_rate}", "use 0.001 to 1, e.g. 0.02")
        require(
            not self.distill or self.bias_correction == "none",
            "distillation trains biases as well; nothing is left to correct",
            "leave out --bias-correction or --distill",
        )
        for name in ("distill_batch", "distill_rate"):
            require(
                self.distill > 0 or getattr(self, name) == getattr(QuantizeConfig, name),
                f"{name} without distillation",
                "add --distill STEPS, or leave it out",
            )


@dataclass(frozen=True)
class ReconstructConfig:
    """How the rounding of weights is learned, block by block: at most ``iterations`` optimizer steps on ``batch`` inputs each.

    ``rate``: learning rate of Adam. ``inputs``: so many of the calibration set at most, evenly spread, are given to a block.
    ``minutes``: how long it may take in all, 0 for as long as it takes. ``network_iterations``: so many steps on all blocks
    together that follow.
    """

    iterations: int = 250
    batch: int = 32
    rate: float = 0.1
    inputs: int = 1024
    minutes: float = 0.0
    network_iterations: int = later(500, before=0)

    def __post_init__(self) -> None:
        for name in ("iterations", "batch"):
            require(getattr(self, name) >= 1, f"reconstruction's {name} is {getattr(self, name)}", "use 1 or more")
        together = self.network_iterations
        require(together >= 0, f"reconstruction's network_iterations is {together}", "use 0 (blocks alone) or more")
        require(self.inputs >= 2, f"reconstruction's inputs is {self.inputs}", "use 2 or more, e.g. 1024")
        require(0 < self.rate <= 1, f"reconstruction's rate is {self.rate}", "use 0.0001 to 1, e.g. 0.01")
        require(
            0 <= self.minutes < float("inf"), f"reconstruction's minutes is {self.minutes}", "use 0 (no limit) or more"
        )


@dataclass(frozen=True)
class StepsConfig:
    """How the steps of activation quantizers are learned, block by block: ``iterations`` optimizer steps on ``batch`` inputs.

    ``rate``: by which share of itself Adam moves a step at first; it falls to 0. ``inputs``: so many of the calibration set at
    most, evenly spread. ``minutes``: how long it may take in all, 0 for as long as it takes.
    """

    iterations: int = 100
    batch: int = 16
    rate: float = 0.02
    inputs: int = 1024
    minutes: float = later(0.0)

    def __post_init__(self) -> None:
        for name in ("iterations", "batch"):
            require(getattr(self, name) >= 1, f"learned steps' {name} is {getattr(self, name)}", "use 1 or more")
        require(self.inputs >= 2, f"learned steps' inputs is {self.inputs}", "use 2 or more, e.g. 1024")
        require(
            0 <= self.minutes < float("inf"), f"learned steps' minutes is {self.minutes}", "use 0 (no limit) or more"
        )
        require(0 < self.rate <= 1, f"learned steps' rate is {self.rate}", "use 0.0001 to 1, e.g. 0.01")


@dataclass(frozen=True)
class TemporalConfig:
    """How scales of activations become a function of time: networks trained for ``iterations`` steps from ``rate`` on.

    ``intervals``: of timesteps, for which the function is tabulated.
    """

    intervals: int = 50
    iterations: int = 300
    rate: float = 0.003

    def __post_init__(self) -> None:
        for name in ("intervals", "iterations"):
            require(getattr(self, name) >= 1, f"temporal scales' {name} is {getattr(self, name)}", "use 1 or more")
        require(0 < self.rate <= 1, f"temporal scales' rate is {self.rate}", "use 0.0001 to 1, e.g. 0.003")


ACTIVATION_BITS = (8, 6, 4)
ACTIVATION_FORMATS = (*(f"int{bits}" for bits in ACTIVATION_BITS), *(f"int{bits}sym" for bits in ACTIVATION_BITS))
ACTIVATION_RANGES = ("min-max", "percentile", "mse", "l1", "cosine", "kl")
SOFTMAXES = ("uniform", "log2", "log-sqrt2")


@dataclass(frozen=True)
class ActivationConfig:
    """How activations are quantized: inputs of layers, and what attention multiplies.

    ``range``: what the codes span. ``intervals`` of timesteps with scales of their own. ``softmax``: how the codes of softmax
    outputs lie, in as many bits as ``format`` has. ``split_skips``: layers that are given a joined skip have one scale on either
    side. ``temporal``: whether inputs of layers that depend on t alone are quantized too; without, samplers compute what these
    put out once for each t. ``first``, ``last``: format of the first layer's input and of the network's
    output, empty for none. ``dynamic``: every input is quantized by its own minimum and maximum, and nothing is calibrated.

    ``every_timestep``: ranges of layers that depend on t alone are those of all timesteps, not of the calibration set's. With
    several intervals they always are: a set that has one timestep of an interval would clip what all its others give.
    """

    format: str = "int8"
    granularity: str = "tensor"
    range: str = "mse"
    intervals: int = 1
    softmax: str = "uniform"
    split_skips: bool = True
    temporal: bool = True
    first: str = ""
    last: str = ""
    dynamic: bool = False
    every_timestep: bool = later(False)

    def __post_init__(self) -> None:
        if self.intervals > 1 and self.temporal:
            object.__setattr__(self, "every_timestep", True)
        for name, what, known in (
            ("format", "activation format", ACTIVATION_FORMATS),
            ("granularity", "activation granularity", ("tensor", "channel")),
            ("range", "activation range", ACTIVATION_RANGES),
            ("softmax", "codes of softmax outputs", SOFTMAXES),
            ("first", "format of the first layer's input", ("", *ACTIVATION_FORMATS)),
            ("last", "format of the network's output", ("", *ACTIVATION_FORMATS)),
        ):
            listed = ", ".join(filter(None, known))
            require(getattr(self, name) in known, f"unknown {what} '{getattr(self, name)}'", f"one of: {listed}")
        require(self.intervals >= 1, f"activation intervals is {self.intervals}", "use 1 or more")
        calibrated = ("range", "intervals")
        unused = [name for name in calibrated if getattr(self, name) != getattr(ActivationConfig, name)]
        require(
            not (self.dynamic and unused),
            f"dynamic activations have no use for {', '.join(unused)}",
            "leave it out, or calibrate",
        )
        require(
            not (self.dynamic and self.every_timestep),
            "dynamic activations have no use for every_timestep",
            "leave it out, or calibrate",
        )

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return int(self.format.removeprefix("int").removesuffix("sym"))
