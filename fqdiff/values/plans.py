"""Plans, and all that explains them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from fqdiff.quant.container import model_bytes
from fqdiff.quant.elements import BY_FISHER, BY_RISE
from fqdiff.quant.formats import Format, Grain, Mixed, PerElement, PerOutput, get_format, parse_granularity
from fqdiff.quant.ranges import FISHER
from fqdiff.values.models import ModelSpec, model_description


@dataclass(frozen=True)
class Alternative:
    """How a parameter could have been stored: its payload ``bytes``, and what it was ``predicted`` to do."""

    format: str
    granularity: str
    range: str
    bytes: int
    predicted: float


@dataclass(frozen=True)
class PlanEntry:
    """What becomes of one parameter, and why. ``bytes`` is its payload in the file, scales and zero points included.

    ``range``: which weights the codes span, one of RANGES; ``rounding``: one of ROUNDINGS.

    Of a plan with a budget also: what the format chosen is ``predicted`` to do, all ``alternatives`` with it among them, and
    the ``constraint`` that kept a better one away ("none" where it is the best).
    """

    parameter: str
    block: str
    shape: tuple[int, ...]
    format: str
    granularity: str
    range: str
    rounding: str
    score: float | None
    threshold: float | None
    rule: str
    bytes: int
    predicted: float | None = None
    constraint: str | None = None
    alternatives: tuple[Alternative, ...] = ()

    @property
    def weights_by_format(self) -> dict[str, int]:
        """How many weights are stored in each format: in two, where elements are kept or output channels differ."""
        numel, granularity = torch.Size(self.shape).numel(), parse_granularity(self.granularity)
        if isinstance(granularity, PerOutput):
            other = granularity.count * numel // self.shape[granularity.scales.axis]
        elif isinstance(granularity, PerElement):
            other = granularity.count
        else:
            return {self.format: numel}
        return {granularity.high: other, self.format: numel - other}

    @property
    def code_bits(self) -> float:
        """Bits per weight of the codes alone."""
        counts = self.weights_by_format
        return sum(get_format(name).bits * count for name, count in counts.items()) / sum(counts.values())

    @property
    def format_label(self) -> str:
        """The format, or both of output channels in two: ``int3+int8``."""
        granularity = parse_granularity(self.granularity)
        return f"{self.format}+{granularity.high}" if isinstance(granularity, PerOutput) else self.format


@dataclass(frozen=True)
class Budget:
    """What a plan was to fit, and how well it does. One of ``target_bytes`` and ``max_loss_increase`` is given.

    ``predicted``: the rise, summed over parameters, in the unit of ``score``. ``lower_bound``: no plan from the same formats
    that fits is predicted less; of a limit on the rise, none takes fewer bytes. None
    of the score uniform, which looks at plans of one width alone.

    With the ``predictor`` gram: ``swaps`` from a plan made without cross terms to this one, a local optimum; ``diagonal``:
    what is predicted of the plan that the score alone would make. Where the network was run, on ``calibration_samples``
    inputs at each of ``calibration_timesteps`` (or sampler runs of so many steps): ``evaluations`` plans were ``measured``,
    this one rose least.
    """

    score: str
    timestep_weights: str
    target_bytes: int | None
    max_loss_increase: float | None
    predicted: float
    lower_bound: float | None
    constraint: str
    predictor: str = "diagonal"
    swaps: int | None = None
    diagonal: float | None = None
    calibration_timesteps: int = 0
    calibration_samples: int = 0
    measured: float | None = None
    evaluations: int = 0


@dataclass(frozen=True)
class Phases:
    """What ``count`` phases of timesteps bring. ``read_bytes``: payload that a timestep reads, averaged over all of them, to be
    at most ``traffic_bytes``, where that is given.

    ``single_predicted``, ``single_bytes``: predicted rise and file of the best plan without phases within the same limits.
    """

    count: int
    read_bytes: float
    traffic_bytes: int | None
    single_predicted: float
    single_bytes: int


@dataclass(frozen=True)
class Plan:
    """One entry per parameter, kept ones included. ``file_bytes`` is the size of the file that ``quantize`` writes.

    ``timestep_weights``: how timesteps count in the Fisher values of single weights, where no budget says so. ``activations``:
    their formats by site, empty where it says nothing of them.
    """

    strategy: str
    entries: tuple[PlanEntry, ...]
    file_bytes: int
    budget: Budget | None = None
    phases: Phases | None = None
    timestep_weights: str = "uniform"
    activations: Mapping[str, str] = field(default_factory=dict)

    @property
    def stored(self) -> dict[str, tuple[Format, Grain]]:
        """Format and granularity of every parameter, by its name."""
        return {e.parameter: (get_format(e.format), parse_granularity(e.granularity)) for e in self.entries}

    @property
    def fits_fisher(self) -> bool:
        """Whether carrying it out takes the Fisher values of single weights."""
        return any(e.range == FISHER or isinstance(parse_granularity(e.granularity), PerElement) for e in self.entries)

    @property
    def reads_fisher(self) -> bool:
        """Whether carrying it out takes Fisher values at all: they also choose output channels."""
        return self.fits_fisher or any(isinstance(parse_granularity(e.granularity), Mixed) for e in self.entries)

    @property
    def kept_by(self) -> str:
        """What chooses elements and output channels of another format: rules by Fisher value, budgets by predicted rise."""
        return BY_FISHER if self.budget is None else BY_RISE

    @property
    def parameters(self) -> int:
        """Number of weights of the model."""
        return sum(torch.Size(e.shape).numel() for e in self.entries)

    @property
    def bits_per_weight(self) -> float:
        """All bits of the file, header included, over the number of weights."""
        return 8 * self.file_bytes / self.parameters


def planned_bytes(spec: ModelSpec, entries: Iterable[PlanEntry]) -> int:
    """Size of the file that holds ``entries`` of the model ``spec``, header included, to the byte."""
    described = {e.parameter: (e.shape, get_format(e.format), parse_granularity(e.granularity)) for e in entries}
    return model_bytes(model_description(spec), described)
