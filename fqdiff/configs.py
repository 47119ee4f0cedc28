"""Every setting of every stage, with its default: plain data, no torch, so that ``--help`` can show it at once.

A field is a recipe field: changing it changes the artifact's id. Where to compute (device, batch size) is not one.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

from fqdiff.errors import ConfigError, require
from fqdiff.groups import parse_groups

Config = TypeVar("Config")


def config_from_data(kind: type[Config], data: Mapping[str, Any]) -> Config:
    """The config that a recipe holds as plain data. Raises ConfigError where it does not fit: it may come from a stranger."""
    try:
        return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in data.items()})
    except TypeError as error:
        raise ConfigError(f"settings of another fqdiff: {error}", "make the artifact again") from None


@dataclass(frozen=True)
class DatasetConfig:
    """Which images, at which size, and how many of them are held out as the reference set."""

    name: str = "mnist5k"
    image_size: int = 32
    content: str = ""  # sha256 over the source files: other pixels, other id


@dataclass(frozen=True)
class TrainConfig:
    """How a network is trained. ``architecture`` holds the fields of a UNetConfig."""

    architecture: dict[str, object] = field(default_factory=dict)
    schedule: str = "linear"
    prediction: str = "eps"
    weighting: str = "uniform"
    steps: int = 5000
    batch_size: int = 64
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    warmup: int = 200
    decay: str = "cosine"
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    precision: str = "float32"

    def __post_init__(self) -> None:
        require(self.steps >= 1, f"steps is {self.steps}", "train for at least one step")
        require(self.batch_size >= 1, f"batch_size is {self.batch_size}", "use 1 or more")
        require(self.learning_rate > 0, f"learning_rate is {self.learning_rate}", "use a positive rate, e.g. 1e-3")
        require(self.weight_decay >= 0, f"weight_decay is {self.weight_decay}", "use 0 or more")
        require(self.warmup >= 0, f"warmup is {self.warmup}", "use 0 or more steps")
        require(self.clip_norm >= 0, f"clip_norm is {self.clip_norm}", "use 0 (no clipping) or more")
        require(0 <= self.ema_decay < 1, f"ema_decay is {self.ema_decay}", "use a value in [0, 1), e.g. 0.999")
        require(self.optimizer in ("adam", "adamw"), f"unknown optimizer '{self.optimizer}'", "one of: adam, adamw")
        require(self.decay in ("none", "cosine"), f"unknown decay '{self.decay}'", "one of: none, cosine")
        require(self.prediction in ("eps", "v"), f"unknown prediction '{self.prediction}'", "one of: eps, v")
        require(
            self.weighting in ("uniform", "min-snr"),
            f"unknown weighting '{self.weighting}'",
            "one of: uniform, min-snr",
        )
        require(
            self.precision in ("float32", "bfloat16"),
            f"unknown precision '{self.precision}'",
            "one of: float32, bfloat16",
        )


@dataclass(frozen=True)
class ImportConfig:
    """Which model file: ``pretrained:NAME`` or the file's own name, and the sha256 of its bytes."""

    source: str = ""
    content: str = ""


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


SCALES = ("float32", "float16")
ELEMENT = "element"
GROUPS = re.compile(r"group(-near)?:[1-9][0-9]{0,8}")
TARGETS = ("target_bpw", "target_bytes", "max_loss_increase")
STRATEGIES = ("uniform", "threshold", "groups", "ratio", "mean-std", "budget")
RIVALS = ("hawq", "modelopt", "autoround")  # scores of others, which look at training images
SCORES = ("fisher", "trajectory", "weight-mse", *RIVALS, "random", "reverse", "uniform")
RANGES = ("min-max", "mse", "fisher", "percentile")
ROUNDINGS = ("nearest", "squant")
PREDICTORS = ("diagonal", "gram")
TIMESTEP_WEIGHTS = re.compile(r"uniform|snr|gain|sampler(:ddim[1-9][0-9]{0,8})?|at:[0-9]{1,9}")
INTEGERS = ("float32", "float16", "int8", "int6", "int5", "int4", "int3", "int2")
FITTED = (
    "ternary",
    "codebook4",
    "codebook3",
    "codebook2",
)  # worth it where they are fitted to single weights' Fisher values


@dataclass(frozen=True)
class PlanConfig:
    """How a precision is chosen for every parameter. One strategy, and the settings that it reads.

    ``granularity``: tensor, channel, group:SIZE or group-near:SIZE, of a budget several with commas; element among them lets
    single elements be kept in another format; ``scale``: what scales are
    stored in; ``symmetric``: integers without zero points; ``ranges``: what the codes of integers span, of a budget several,
    empty for the default; ``rounding``: how codes are chosen.

    Rules put a tensor into ``low`` below its threshold, else into ``high``, or into one of the formats of ``ladder``, widest
    first. A ladder's next thresholds are ``ladder_step`` times smaller each, or ``lower_thresholds``, for ``threshold`` alone.

    ``budget`` reads one of ``target_bpw``, ``target_bytes`` and ``max_loss_increase`` (negative: none); ``score`` says what is
    kept small, ``formats`` what there is to choose from, empty for the default, and ``ends`` the format of stem and head, empty
    for any. ``predictor`` gram adds what errors do together; ``refine``: plans that may be measured, 0 for none. Both, and the
    scores in RIVALS, look at ``calibration_samples`` images at each of ``calibration_timesteps``, or, for the trajectory score,
    at sampler runs. With ``phases`` of timesteps, tensors may be read with fewer bits in some, so that a timestep reads at most
    ``traffic_bpw`` bits per weight, averaged over all; 0 for no such limit.
    """

    strategy: str = "groups"
    groups: str = "12/345/6"
    thresholds: tuple[float, ...] = ()
    threshold: float = 0.0
    ratio: float = 0.25
    mean_std: float = 0.5
    at: str = "1"
    low: str = "float16"
    high: str = "float32"
    ladder: tuple[str, ...] = ()
    ladder_step: float = 10.0
    lower_thresholds: tuple[float, ...] = ()
    granularity: str = "channel"
    scale: str = "float32"
    symmetric: bool = False
    ranges: tuple[str, ...] = ()
    rounding: str = "nearest"
    target_bpw: float = 0.0
    target_bytes: int = 0
    max_loss_increase: float = -1.0
    score: str = "fisher"
    timestep_weights: str = "uniform"
    formats: tuple[str, ...] = ()
    ends: str = ""
    predictor: str = "diagonal"
    refine: int = 0
    calibration_timesteps: int = 10
    calibration_samples: int = 4
    phases: int = 1
    traffic_bpw: float = 0.0

    def __post_init__(self) -> None:
        require(self.strategy in STRATEGIES, f"unknown strategy '{self.strategy}'", f"one of: {', '.join(STRATEGIES)}")
        groups = parse_groups(self.groups)
        require(
            len(self.thresholds) in (0, len(groups)),
            f"{len(self.thresholds)} thresholds for {len(groups)} groups '{self.groups}'",
            "one per group, e.g. 0.1/0.01/0.1",
        )
        require(0 <= self.ratio <= 1, f"ratio is {self.ratio}", "the share of tensors that stays high, in [0, 1]")
        require(self.threshold >= 0, f"threshold is {self.threshold}", "Fisher values are 0 or more")
        require(all(t >= 0 for t in self.thresholds), f"thresholds {self.thresholds}", "Fisher values are 0 or more")
        require(self.mean_std >= 0, f"mean_std is {self.mean_std}", "use 0 or more, e.g. 0.5")
        require(
            self.at == "mean" or (self.at.isascii() and self.at.isdigit()),
            f"cannot read the Fisher table at '{self.at}'",
            "a timestep such as 1, or 'mean'",
        )
        for granularity in self.granularity.split(","):
            require(
                granularity in ("tensor", "channel", ELEMENT) or GROUPS.fullmatch(granularity) is not None,
                f"unknown granularity '{granularity}'",
                "tensor, channel, group:SIZE such as group:32, group-near:SIZE, or element",
            )
        for name in self.ranges:
            require(name in RANGES, f"unknown range '{name}'", f"one of: {', '.join(RANGES)}")
        require(self.rounding in ROUNDINGS, f"unknown rounding '{self.rounding}'", f"one of: {', '.join(ROUNDINGS)}")
        require(
            self.strategy == "budget" or (len(self.ranges) < 2 and len(self.scale_granularities) < 2),
            "several ranges or granularities to choose from, without a budget",
            "give one, or add --target-bpw",
        )
        for name in (*self.formats, self.ends, self.low, self.high):
            require(":" not in name, f"format {name} for all", "--phases 4 chooses bits by phase; give e.g. int6")
        require(self.scale in SCALES, f"unknown scale '{self.scale}'", f"one of: {', '.join(SCALES)}")
        self._check_elements()
        self._check_ladder()
        self._check_budget()

    def _check_elements(self) -> None:
        if not self.by_element:
            return
        require(
            self.strategy != "uniform" and self.score != "uniform",
            "granularity element with one format for all",
            "element keeps some elements in another: use --threshold, --groups, --ratio, --mean-std or a budget",
        )
        require(self.rounding != "squant", "squant counts the errors of kept elements, which have none", "use nearest")
        require(
            len(self.formats_by_rank) == 2,
            f"elements of {len(self.formats_by_rank)} formats in one tensor",
            "a ladder of two, or leave element out",
        )

    def _check_ladder(self) -> None:
        if not self.ladder:
            for name in ("ladder_step", "lower_thresholds"):
                require(getattr(self, name) == getattr(PlanConfig, name), f"{name} without a ladder", "add --ladder")
            return
        require(self.strategy != "uniform", "strategy 'uniform' has no use for ladder", "leave it out")
        require(
            len(set(self.ladder)) == len(self.ladder) >= 2,
            f"ladder {','.join(self.ladder)}",
            "two formats or more, each once, e.g. float16,int8,int4",
        )
        require(
            (self.low, self.high) == (PlanConfig.low, PlanConfig.high),
            "a ladder beside low and high",
            "give one of them",
        )
        require(1 < self.ladder_step < 1e30, f"ladder_step is {self.ladder_step}", "use more than 1, e.g. 10")
        if not self.lower_thresholds:
            require(
                len(self.ladder) > 2 or self.ladder_step == PlanConfig.ladder_step,
                "ladder_step says nothing about a ladder of two",
                "leave it out",
            )
            return
        given = (self.threshold, *self.lower_thresholds)
        require(
            self.strategy == "threshold",
            f"strategy '{self.strategy}' has no use for lower_thresholds",
            "its next thresholds go by --ladder-step",
        )
        require(
            len(given) == len(self.ladder) - 1,
            f"{len(given)} thresholds for {len(self.ladder)} formats",
            f"{len(self.ladder) - 1} of them, or one, and --ladder-step",
        )
        require(
            all(a > b >= 0 for a, b in pairwise(given)),
            f"thresholds {', '.join(f'{t:g}' for t in given)}",
            "each smaller than the one before",
        )
        require(
            self.ladder_step == PlanConfig.ladder_step, "ladder_step beside all thresholds", "leave one of them out"
        )

    def _check_budget(self) -> None:
        calibration = ("calibration_timesteps", "calibration_samples")
        of_phases = ("phases", "traffic_bpw")
        scored = ("score", "timestep_weights", "formats", "ends", "predictor", "refine")
        of_budget: tuple[str, ...] = (*TARGETS, *scored, *calibration, *of_phases)
        of_rules = ("groups", "thresholds", "threshold", "ratio", "mean_std", "at", "low", "high", "ladder")
        foreign = of_rules if self.strategy == "budget" else of_budget
        changed = [name for name in foreign if getattr(self, name) != getattr(PlanConfig, name)]
        require(not changed, f"strategy '{self.strategy}' has no use for {', '.join(changed)}", "leave it out")
        if self.strategy != "budget":
            return
        given = [name for name in TARGETS if getattr(self, name) != getattr(PlanConfig, name)]
        require(len(given) == 1, f"{len(given)} targets for one plan", f"give one of {', '.join(TARGETS)}")
        require(0 <= self.target_bpw <= 64, f"target_bpw is {self.target_bpw}", "bits per weight, e.g. 3.5")
        require(0 <= self.target_bytes < 2**62, f"target_bytes is {self.target_bytes}", "the size of a file")
        require(
            self.max_loss_increase == -1 or 0 <= self.max_loss_increase < 1e300,
            f"max_loss_increase is {self.max_loss_increase}",
            "use 0 or more",
        )
        require(self.score in SCORES, f"unknown score '{self.score}'", f"one of: {', '.join(SCORES)}")
        require(
            "max_loss_increase" not in given or self.score in ("fisher", "trajectory", "uniform"),
            f"a score of '{self.score}' is no loss that could be limited",
            "use --score fisher or trajectory, or give a size",
        )
        require(
            TIMESTEP_WEIGHTS.fullmatch(self.timestep_weights) is not None,
            f"unknown timestep_weights '{self.timestep_weights}'",
            "one of: uniform, snr, sampler, sampler:ddimN such as sampler:ddim20, gain, or at:T such as at:1",
        )
        require(
            self.timestep_weights == "uniform" or self.score not in ("trajectory", "weight-mse"),
            f"score '{self.score}' has no timesteps to weight",
            "leave timestep_weights out",
        )
        require(len(set(self.formats)) == len(self.formats), f"formats {','.join(self.formats)} name one twice")
        require(
            self.ends_format in ("", *(self.formats or (*INTEGERS, *FITTED))),
            f"ends in {self.ends_format}, formats {','.join(self.formats)}",
            "let formats name it too",
        )
        require(
            self.predictor in PREDICTORS, f"unknown predictor '{self.predictor}'", f"one of: {', '.join(PREDICTORS)}"
        )
        require(0 <= self.refine <= 1000, f"refine is {self.refine}", "plans to measure, 0 (none) to 1000")
        self._check_phases(given)
        for name in calibration:
            require(1 <= getattr(self, name) <= 10_000, f"{name} is {getattr(self, name)}", "use 1 or more")
        if not self.is_calibrated:
            unused = [name for name in calibration if getattr(self, name) != getattr(PlanConfig, name)]
            require(not unused, f"nothing looks at {', '.join(unused)}", "add --predictor gram or --refine 5")
        if not self.is_measured:
            return
        require(
            self.score not in RIVALS or self.predictor == "diagonal",
            f"predictor gram measures what '{self.score}' guesses",
            "use --score fisher or trajectory, or --refine instead of --predictor gram",
        )
        require(
            self.score in ("fisher", "trajectory", *RIVALS),
            f"the rise that '{self.score}' predicts cannot be measured",
            "use --score fisher or trajectory, or leave predictor and refine out",
        )
        require(
            "max_loss_increase" not in given,
            "predictor gram and refine look for the least rise of a size",
            "give --target-bpw or --target-size instead of --max-loss-increase",
        )
        require(
            self.score != "trajectory" or self.calibration_timesteps == PlanConfig.calibration_timesteps,
            "a sampler run takes the steps of its Fisher table",
            "leave calibration_timesteps out; calibration_samples counts the runs",
        )

    def _check_phases(self, targets: list[str]) -> None:
        require(1 <= self.phases <= 4, f"phases is {self.phases}", "use 1 (none) to 4")
        require(0 <= self.traffic_bpw <= 64, f"traffic_bpw is {self.traffic_bpw}", "bits per weight, e.g. 2.5")
        if self.phases == 1:
            require(self.traffic_bpw == 0, "traffic_bpw without phases", "add --phases 4, or give a smaller target")
            return
        require(
            self.score == "fisher" and not self.timestep_weights.startswith("at:"),
            f"score '{self.score}' with timestep_weights '{self.timestep_weights}' does not tell phases apart",
            "use --score fisher, with weights of all timesteps",
        )
        require(not self.by_element, "kept elements know no phases", "leave element out of --granularity, or phases")
        require(not self.is_measured, "predictor gram and refine know no phases", "leave them out, or phases")
        require(
            "max_loss_increase" not in targets, "phases for a limit on the rise", "give --target-bpw or --target-size"
        )

    @property
    def by_element(self) -> bool:
        """Whether single elements may be kept in another format than their tensor."""
        return ELEMENT in self.granularity.split(",")

    @property
    def scale_granularities(self) -> tuple[str, ...]:
        """Which weights may share a scale; with nothing but elements asked for, those of a channel."""
        return tuple(g for g in self.granularity.split(",") if g != ELEMENT) or (PlanConfig.granularity,)

    @property
    def formats_by_rank(self) -> tuple[str, ...]:
        """Formats of the rules, widest first."""
        return self.ladder or (self.high, self.low)

    @property
    def is_measured(self) -> bool:
        """Whether planning runs the network, on calibration inputs."""
        return self.predictor == "gram" or self.refine > 0

    @property
    def is_calibrated(self) -> bool:
        """Whether planning looks at calibration inputs: to measure, or for its score."""
        return self.is_measured or self.score in RIVALS

    @property
    def ends_format(self) -> str:
        """The format of stem and head, empty for any: uniform plans keep them at 8 bits unless told otherwise."""
        return self.ends or ("int8" if self.score == "uniform" else "")


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


CALIBRATION_SCHEMES = ("uniform", "ndtc", "early", "middle", "late", "fisher")


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

    ``rate``: learning rate of Adam. ``inputs``: so many of the calibration set at most, evenly spread. ``minutes``: how long
    it may take in all, 0 for as long as it takes.
    """

    iterations: int = 1000
    batch: int = 32
    rate: float = 0.1
    inputs: int = 1024
    minutes: float = 0.0

    def __post_init__(self) -> None:
        for name in ("iterations", "batch"):
            require(getattr(self, name) >= 1, f"reconstruction's {name} is {getattr(self, name)}", "use 1 or more")
        require(self.inputs >= 2, f"reconstruction's inputs is {self.inputs}", "use 2 or more, e.g. 1024")
        require(0 < self.rate <= 1, f"reconstruction's rate is {self.rate}", "use 0.0001 to 1, e.g. 0.01")
        require(
            0 <= self.minutes < float("inf"), f"reconstruction's minutes is {self.minutes}", "use 0 (no limit) or more"
        )


ACTIVATION_BITS = (8, 6, 4)
ACTIVATION_FORMATS = (*(f"int{bits}" for bits in ACTIVATION_BITS), *(f"int{bits}sym" for bits in ACTIVATION_BITS))
ACTIVATION_RANGES = ("min-max", "percentile", "mse", "l1", "cosine", "kl")
SOFTMAXES = ("uniform", "log2", "log-sqrt2")


@dataclass(frozen=True)
class ActivationConfig:
    """How activations are quantized: inputs of layers, and what attention multiplies.

    ``range``: what the codes span. ``intervals`` of timesteps with scales of their own. ``softmax``: how the codes of softmax
    outputs lie, in as many bits as ``format`` has. ``split_skips``: layers that are given a joined skip have one scale on either
    side. ``first``, ``last``: format of the first layer's input and of the network's output, empty for none. ``dynamic``: every
    input is quantized by its own minimum and maximum, and nothing is calibrated.
    """

    format: str = "int8"
    granularity: str = "tensor"
    range: str = "mse"
    intervals: int = 1
    softmax: str = "uniform"
    split_skips: bool = True
    first: str = ""
    last: str = ""
    dynamic: bool = False

    def __post_init__(self) -> None:
        for name, known in (
            ("format", ACTIVATION_FORMATS),
            ("granularity", ("tensor", "channel")),
            ("range", ACTIVATION_RANGES),
            ("softmax", SOFTMAXES),
            ("first", ("", *ACTIVATION_FORMATS)),
            ("last", ("", *ACTIVATION_FORMATS)),
        ):
            listed = ", ".join(filter(None, known))
            require(
                getattr(self, name) in known,
                f"unknown activation {name} '{getattr(self, name)}'",
                f"one of: {listed}",
            )
        require(self.intervals >= 1, f"activation intervals is {self.intervals}", "use 1 or more")
        calibrated = ("range", "intervals")
        unused = [name for name in calibrated if getattr(self, name) != getattr(ActivationConfig, name)]
        require(
            not (self.dynamic and unused),
            f"dynamic activations have no use for {', '.join(unused)}",
            "leave it out, or calibrate",
        )

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return int(self.format.removeprefix("int").removesuffix("sym"))


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
        require(self.count >= 0 and self.count != 1, f"count is {self.count}", "use 2 or more, or 0 for all")
        require(self.resamples >= 2, f"resamples is {self.resamples}", "an interval needs 2 or more, e.g. 200")


@dataclass(frozen=True)
class CompareConfig:
    """How many images of each set are compared (0: as many as all have), and at which level.

    ``full_precision_of``: numbers, from 1, of the models that the baseline is the full precision of: a value
    beyond the baseline's is no merit of theirs.
    """

    count: int = 0
    resamples: int = 1000
    level: float = 0.95
    full_precision_of: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require(self.count == 0 or self.count >= 10, f"count is {self.count}", "use 10 or more, or 0 for all")
        require(self.resamples >= 20, f"resamples is {self.resamples}", "a standard error needs 20 or more, e.g. 1000")
        require(0.5 <= self.level < 1, f"level is {self.level}", "use 0.5 to below 1, e.g. 0.95")
        require(
            all(k >= 1 for k in self.full_precision_of), "models are numbered from 1", "leave full_precision_of out"
        )


@dataclass(frozen=True)
class Preset:
    """A model size with the training that suits it. ``architecture`` holds what differs from the paper's U-Net."""

    description: str
    image_size: int
    architecture: dict[str, object]
    train: dict[str, object]


def _own_recipe(base: int, image_size: int, norm_groups: int, num_heads: int) -> dict[str, object]:
    """The paper's topology at another width, with SiLU, a learned time embedding and no dropout, which train faster."""
    return {
        "channels": [base, 2 * base, 4 * base, 8 * base, 8 * base, 6 * base],
        "image_size": image_size,
        "norm_groups": norm_groups,
        "num_heads": num_heads,
        "dropout": 0.0,
        "activation": "silu",
        "time_embedding": "learned",
    }


PRESETS = {
    "paper": Preset(
        "the paper's U-Net, 35.2 M parameters, 32 x 32: days on a CPU",
        32,
        {},
        {
            "optimizer": "adam",
            "learning_rate": 2e-5,
            "steps": 14_070,  # 15 epochs of 60,000 images
            "warmup": 0,
            "decay": "none",
            "ema_decay": 0.9999,
        },
    ),
    "small": Preset(
        "the same topology at a quarter of the width, 2.2 M parameters, 32 x 32",
        32,
        _own_recipe(16, 32, 8, 8),
        {"schedule": "cosine", "prediction": "v", "steps": 4500, "learning_rate": 2e-3},
    ),
    "demo": Preset(
        "the same topology at an eighth of the width, 0.6 M parameters, 16 x 16: two and a half minutes on two cores",
        16,
        _own_recipe(8, 16, 8, 4),
        {
            "schedule": "cosine",
            "prediction": "v",
            "steps": 1500,
            "learning_rate": 4e-3,
            "warmup": 100,
            "ema_decay": 0.995,
        },
    ),
    "tiny": Preset(
        "0.15 M parameters on 8 x 8 images: seconds, for tests; its images are not worth looking at",
        8,
        _own_recipe(4, 8, 2, 2),
        {"schedule": "cosine", "prediction": "v", "steps": 50, "batch_size": 16, "warmup": 10, "ema_decay": 0.9},
    ),
}


def get_preset(name: str) -> Preset:
    """The preset called ``name``, or ConfigError."""
    require(name in PRESETS, f"unknown preset '{name}'", f"one of: {', '.join(PRESETS)}")
    return PRESETS[name]
