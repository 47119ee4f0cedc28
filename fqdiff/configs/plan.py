"""Choosing a precision for every parameter."""

import re
from dataclasses import dataclass
from itertools import pairwise

from fqdiff.configs.quantize import ACTIVATION_FORMATS
from fqdiff.configs.recipes import later
from fqdiff.errors import require
from fqdiff.groups import parse_groups

SCALES = ("float32", "float16")
ELEMENT = "element"
OUTPUT = "output"
WHOLE_RUN = "run"
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

    ``granularity``: tensor, channel, split, group:SIZE or group-near:SIZE, of a budget several with commas; element among them
    lets single elements be kept in another format, output whole output channels; ``scale``: what scales are stored in;
    ``symmetric``: integers without zero points; ``ranges``: what the codes of integers span, of a budget several, empty for the
    default; ``rounding``: how codes are chosen.

    Rules read Fisher values ``at`` a timestep, their "mean" over all, or those of a sampler's whole "run". They put a tensor
    into ``low`` below its threshold, else into ``high``, or into one of the formats of ``ladder``, widest first. A ladder's next
    thresholds are ``ladder_step`` times smaller each, or ``lower_thresholds``, for ``threshold`` alone.

    ``budget`` reads one of ``target_bpw``, ``target_bytes`` and ``max_loss_increase`` (negative: none); ``score`` says what is
    kept small, ``formats`` what there is to choose from, empty for the default, and ``ends`` the format of stem and head, empty
    for any. ``predictor`` gram adds what errors do together; ``refine``: plans that may be measured, 0 for none. Both, and the
    scores in RIVALS, look at ``calibration_samples`` images at each of ``calibration_timesteps``, or, for the trajectory score,
    at sampler runs. With ``phases`` of timesteps, tensors may be read with fewer bits in some, so that a timestep reads at most
    ``traffic_bpw`` bits per weight, averaged over all; 0 for no such limit.

    ``activations``: their format, empty where the plan says nothing of them; of the share ``activation_ratio`` of what is
    quantized, where Fisher values of layer outputs are highest, ``wide_activations``.
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
    activations: str = later("")
    wide_activations: str = later("")
    activation_ratio: float = later(0.0)

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
            self.at in ("mean", WHOLE_RUN) or (self.at.isascii() and self.at.isdigit()),
            f"cannot read the Fisher table at '{self.at}'",
            "a timestep such as 1, 'mean', or 'run' of a trajectory table",
        )
        for granularity in self.granularity.split(","):
            require(
                granularity in ("tensor", "channel", "split", ELEMENT, OUTPUT)
                or GROUPS.fullmatch(granularity) is not None,
                f"unknown granularity '{granularity}'",
                "tensor, channel, split, group:SIZE such as group:32, group-near:SIZE, element or output",
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
        self._check_activations()
        self._check_elements()
        self._check_outputs()
        self._check_ladder()
        self._check_budget()

    def _check_activations(self) -> None:
        for name in filter(None, (self.activations, self.wide_activations)):
            require(
                name in ACTIVATION_FORMATS,
                f"unknown activation format '{name}'",
                f"one of: {', '.join(ACTIVATION_FORMATS)}",
            )
        require(0 <= self.activation_ratio <= 1, f"activation_ratio is {self.activation_ratio}", "a share, in [0, 1]")
        require(
            bool(self.wide_activations) == (self.activation_ratio > 0),
            "wider activations without a share that has them, or the other way round",
            "e.g. --activations int4 --wide-activations int8 --activation-ratio 0.25",
        )
        bits = [int("".join(filter(str.isdigit, name)) or 0) for name in (self.activations, self.wide_activations)]
        require(
            not self.wide_activations or 0 < bits[0] < bits[1],
            f"wide activations in '{self.wide_activations}', others in '{self.activations or 'float32'}'",
            "wide is what has more bits: --activations int4 --wide-activations int8",
        )

    def _check_elements(self) -> None:
        if not self.by_element:
            return
        require(
            self.strategy != "uniform" and self.score != "uniform",
            "granularity element with one format for all",
            "element keeps some elements in another: use --threshold, --groups, --ratio, --mean-std or a budget",
        )
        require(self.rounding != "squant", "squant counts the errors of kept elements, which have none", "use nearest")

    def _check_outputs(self) -> None:
        if not self.by_output:
            return
        how = "use --threshold, --groups, --ratio, --mean-std or a budget"
        one = self.strategy == "uniform" or self.score == "uniform"
        require(not one, "granularity output with one format for all", how)
        require(
            self.score not in ("modelopt", "autoround"),
            f"score '{self.score}' values tensors that are stored in one format",
            "leave output out of --granularity",
        )
        require(self.rounding == "nearest", f"{self.rounding} for output channels in two formats", "use nearest")
        require(
            self.strategy == "budget" or "split" not in self.scale_granularities,
            "output channels in two formats whose scales are split",
            "leave output or split out of --granularity",
        )
        require(
            not self.by_element, "elements and outputs of one tensor in other formats", "element or output, not both"
        )
        require(
            set(self.scale_granularities) != {"tensor"}, "output channels in two formats with one scale", "add channel"
        )

    def _check_ladder(self) -> None:
        if not self.ladder:
            for name, words in (("ladder_step", "--ladder-step"), ("lower_thresholds", "a --threshold of several")):
                require(getattr(self, name) == getattr(PlanConfig, name), f"{words} without a ladder", "add --ladder")
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
                "--ladder-step says nothing about a ladder of two",
                "leave it out",
            )
            return
        given = (self.threshold, *self.lower_thresholds)
        require(
            self.strategy == "threshold",
            f"strategy '{self.strategy}' has no use for several thresholds",
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
            self.ladder_step == PlanConfig.ladder_step, "--ladder-step beside all thresholds", "leave one of them out"
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
        require(
            len(given) == 1,
            f"{len(given)} targets for one plan",
            "give one of --target-bpw, --target-size, --max-loss-increase",
        )
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
            f"unknown timestep weights '{self.timestep_weights}'",
            "one of: uniform, snr, sampler, sampler:ddimN such as sampler:ddim20, gain, or at:T such as at:1",
        )
        require(
            self.timestep_weights == "uniform" or self.score not in ("trajectory", "weight-mse"),
            f"score '{self.score}' has no timesteps to weight",
            "leave --timestep-weights out",
        )
        require(
            len(set(self.formats)) == len(self.formats),
            f"formats {','.join(self.formats)} name one twice",
            "name each once, e.g. --formats float16,int8,int4",
        )
        offered = self.formats or (*INTEGERS, *FITTED)
        require(
            self.ends_format in ("", *offered),
            f"ends in {self.ends_format}, which is none of the formats {','.join(offered)}",
            "let --formats name it too, or --ends one of them",
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
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
            require(not unused, f"nothing looks at {flags}", "add --predictor gram or --refine 5")
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
            "use --score fisher or trajectory, or leave --predictor and --refine out",
        )
        require(
            "max_loss_increase" not in given,
            "predictor gram and refine look for the least rise of a size",
            "give --target-bpw or --target-size instead of --max-loss-increase",
        )
        require(
            self.score != "trajectory" or self.calibration_timesteps == PlanConfig.calibration_timesteps,
            "a sampler run takes the steps of its Fisher table",
            "leave --calibration-timesteps out; --calibration-samples counts the runs",
        )

    def _check_phases(self, targets: list[str]) -> None:
        require(1 <= self.phases <= 4, f"phases is {self.phases}", "use 1 (none) to 4")
        require(0 <= self.traffic_bpw <= 64, f"traffic_bpw is {self.traffic_bpw}", "bits per weight, e.g. 2.5")
        if self.phases == 1:
            require(self.traffic_bpw == 0, "--traffic-bpw without phases", "add --phases 4, or give a smaller target")
            return
        require(
            self.score == "fisher" and not self.timestep_weights.startswith("at:"),
            f"score '{self.score}' with timestep weights '{self.timestep_weights}' does not tell phases apart",
            "use --score fisher, with weights of all timesteps",
        )
        require(
            not self.by_element and not self.by_output,
            "tensors of two formats know no phases",
            "leave element and output out of --granularity, or phases",
        )
        require(not self.is_measured, "predictor gram and refine know no phases", "leave them out, or phases")
        require(
            "max_loss_increase" not in targets, "phases for a limit on the rise", "give --target-bpw or --target-size"
        )

    @property
    def by_element(self) -> bool:
        """Whether single elements may be kept in another format than their tensor."""
        return ELEMENT in self.granularity.split(",")

    @property
    def by_output(self) -> bool:
        """Whether output channels of a tensor may differ in format."""
        return OUTPUT in self.granularity.split(",")

    @property
    def scale_granularities(self) -> tuple[str, ...]:
        """Which weights may share a scale; with nothing but elements or outputs asked for, those of a channel."""
        scales = tuple(g for g in self.granularity.split(",") if g not in (ELEMENT, OUTPUT))
        return scales or (PlanConfig.granularity,)

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


def quantize_reads_fisher(granularity: str, table: str) -> bool:
    """Whether a plan of ``granularity`` may ask for its Fisher table of granularity ``table`` when it is carried out.

    Ranges are fitted to single weights, and output channels chosen by any table.
    """
    return table == "weight" or OUTPUT in granularity.split(",")


@dataclass(frozen=True)
class PluginPlanConfig:
    """A plan that a plug-in makes: the strategy ``strategy`` of the distribution ``distribution`` in version ``version``.

    ``settings``: NAME=VALUE each, handed on as they are. ``at``: where Fisher values are read, a timestep or mean.
    ``granularity``: tensor, channel, group:SIZE or group-near:SIZE; ``scale``: what scales are stored in.
    """

    strategy: str
    distribution: str
    version: str
    settings: tuple[str, ...] = ()
    at: str = "mean"
    granularity: str = "channel"
    scale: str = "float32"

    def __post_init__(self) -> None:
        require(bool(self.strategy and self.distribution and self.version), "a plug-in without name or version")
        names = [setting.partition("=")[0] for setting in self.settings]
        for name, setting in zip(names, self.settings, strict=True):
            require(bool(name) and "=" in setting, f"setting '{setting}'", "give NAME=VALUE, e.g. share=0.25")
        require(len(set(names)) == len(names), f"settings {', '.join(names)} name one twice", "give each once")
        require(
            self.at == "mean" or (self.at.isascii() and self.at.isdigit()),
            f"cannot read the Fisher table at '{self.at}'",
            "a timestep such as 1, or 'mean'",
        )
        require(
            self.granularity in ("tensor", "channel") or GROUPS.fullmatch(self.granularity) is not None,
            f"unknown granularity '{self.granularity}' of a plug-in's plan",
            "tensor, channel, group:SIZE such as group:32, or group-near:SIZE",
        )
        require(self.scale in SCALES, f"unknown scale '{self.scale}'", f"one of: {', '.join(SCALES)}")
