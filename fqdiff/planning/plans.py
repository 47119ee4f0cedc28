"""A checkpoint and its Fisher table as a market of options, and the plans bought there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from fqdiff.configs import FITTED, INTEGERS, PlanConfig
from fqdiff.context import Context
from fqdiff.errors import ConfigError
from fqdiff.models.registry import build, output_axes, parameter_blocks
from fqdiff.planning import budget, scores
from fqdiff.planning.candidates import FLOATS, Market, Ways, make_options
from fqdiff.planning.knapsack import total
from fqdiff.quant.formats import get_format, without_zero_point
from fqdiff.quant.ranges import FISHER, MIN_MAX
from fqdiff.sensitivity.plans import ENDS
from fqdiff.values import Alternative, Budget, Checkpoint, FisherTable, Plan, PlanEntry, model_description

UNLIMITED = 2**62


@dataclass(frozen=True)
class Offer:
    """What can be bought: a market, each parameter's block and Fisher value (empty without a table), and what is fixed."""

    market: Market
    blocks: Mapping[str, str]
    fisher: Mapping[str, float]
    ends: Mapping[str, str]

    @property
    def parameters(self) -> int:
        """Number of weights of the model."""
        return sum(prod(options[0].description[0]) for options in self.market.options.values())


@dataclass(frozen=True)
class Point:
    """One point of a Pareto curve; no ``file_bytes`` and no ``predicted`` rise where nothing fits the target."""

    target_bpw: float
    target_bytes: int
    file_bytes: int | None
    predicted: float | None


def make_offer(
    checkpoint: Checkpoint, table: FisherTable | None, config: PlanConfig, seed: int, context: Context
) -> Offer:
    """Every parameter in every format of ``config.formats``, valued by ``config.score``.

    Raises ConfigError where the score needs another table, LineageError for a table of another model, NumericalError and
    QuantizationError for NaN.
    """
    network = build(checkpoint.spec.architecture, "meta")
    blocks, axes = parameter_blocks(network), output_axes(network)
    for name in config.formats:
        get_format(name)
    shapes = {name: tuple(t.shape) for name, t in checkpoint.tensors.items()}
    measured = measured_importance(checkpoint, table, config, shapes)
    if config.score in ("random", "reverse"):
        importance = scores.exchanged(measured, config.score, seed)
    elif config.score == "weight-mse":
        importance = {name: torch.ones(1, dtype=torch.float64) for name in shapes}
    else:
        importance = measured
    weights = fitted_weights(table, config, checkpoint)
    options = make_options(checkpoint.tensors, axes, ways(config, bool(weights)), importance, weights, context)
    market = Market(model_description(checkpoint.spec), options)
    ends = {name: config.ends_format for name, shape in shapes.items() if len(shape) >= 2 and blocks[name] in ENDS}
    if config.ends_format:
        market = market.restricted(ends)
    fisher = {name: 2 * float(values.mean()) for name, values in measured.items()}
    return Offer(market, blocks, fisher, ends if config.ends_format else {})


def ways(config: PlanConfig, single_weights: bool) -> Ways:
    """What the settings offer. Unless named, fitted formats and ranges only where single weights' Fisher values are known.

    Fitted to nothing but the weights, they predict less rise and cause more: what they cut off is cut off in one direction.
    """
    named = config.formats or ((*INTEGERS, *FITTED) if single_weights else INTEGERS)
    ranges = config.ranges or ((MIN_MAX, FISHER) if single_weights else (MIN_MAX,))
    formats = tuple(without_zero_point(get_format(f)).name if config.symmetric else f for f in named)
    return Ways(
        tuple(dict.fromkeys(formats)), tuple(config.granularity.split(",")), ranges, config.scale, config.rounding
    )


def fitted_weights(table: FisherTable | None, config: PlanConfig, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Fisher values of single weights, to which ranges and codebooks are fitted; empty where the table has none."""
    if table is None or not table.weights or (config.ranges and FISHER not in config.ranges):
        return {}
    shapes = {name: tuple(t.shape) for name, t in checkpoint.tensors.items()}
    return scores.fisher_importance(table, config.timestep_weights, checkpoint.spec.noise_schedule(), shapes)


def measured_importance(
    checkpoint: Checkpoint, table: FisherTable | None, config: PlanConfig, shapes: scores.Shapes
) -> dict[str, Tensor]:
    """The importance that the table gives; empty without a table, which only weight-mse can do without."""
    if table is None:
        if config.score != "weight-mse":
            raise ConfigError(f"score '{config.score}' needs Fisher values", "run fqdiff fisher first")
        return {}
    score = config.score if config.score in ("fisher", "trajectory") else scores.default_score(table.kind)
    if score == "trajectory":
        if config.timestep_weights != "uniform":
            raise ConfigError("a trajectory table has no timesteps to weight", "leave --timestep-weights out")
        return scores.trajectory_importance(table, shapes)
    return scores.fisher_importance(table, config.timestep_weights, checkpoint.spec.noise_schedule(), shapes)


def target_bytes(config: PlanConfig, parameters: int) -> int | None:
    """The bytes that a file may take: as given, or whole bytes of so many bits per weight; None for a limit on the rise."""
    if config.target_bpw > 0:
        return int(config.target_bpw * parameters / 8)
    return config.target_bytes or None


def choose(offer: Offer, config: PlanConfig, target: int | None) -> budget.Choice:
    """The options that the settings lead to; ``target`` in bytes, None for a limit on the rise."""
    if config.score == "uniform":
        fixed = {name: FLOATS[0] for name, o in offer.market.options.items() if len(o[0].description[0]) < 2}
        limit = float("inf") if target is not None else config.max_loss_increase
        return budget.widest_uniform(offer.market, offer.ends, fixed, UNLIMITED if target is None else target, limit)
    if target is None:
        return budget.smallest_within(offer.market, config.max_loss_increase)
    return budget.best_within(offer.market, target)


def make_plan(offer: Offer, config: PlanConfig) -> Plan:
    """The plan, every entry with what else it could have been."""
    target = target_bytes(config, offer.parameters)
    choice = choose(offer, config, target)
    entries = []
    for name, option in offer.market.chosen(choice.positions).items():
        considered = tuple(
            Alternative(o.format, str(o.description[2]), o.span, o.bytes, o.value) for o in offer.market.options[name]
        )
        predicted = option.value
        limited = any(a.bytes < option.bytes if target is None else a.predicted < predicted for a in considered)
        shape, fmt, granularity = option.description
        entries.append(
            PlanEntry(
                parameter=name,
                block=offer.blocks[name],
                shape=shape,
                format=fmt.name,
                granularity=str(granularity),
                range=option.span,
                rounding=option.rounding,
                score=offer.fisher.get(name),
                threshold=None,
                rule=f"stem and head in {offer.ends[name]}" if name in offer.ends else RULES[config.score == "uniform"],
                bytes=option.bytes,
                predicted=predicted,
                constraint=choice.constraint if limited else "none",
                alternatives=considered,
            )
        )
    facts = Budget(
        score=config.score,
        timestep_weights=config.timestep_weights,
        target_bytes=target,
        max_loss_increase=config.max_loss_increase if target is None else None,
        predicted=total(offer.market.values, choice.positions),
        lower_bound=choice.lower_bound,
        constraint=choice.constraint,
    )
    return Plan("budget", tuple(entries), offer.market.size(choice.positions), facts)


RULES = {False: "the best plan that fits", True: "the widest single format that fits"}


def pareto(offer: Offer, config: PlanConfig, targets: Sequence[float], context: Context) -> list[Point]:
    """Size and predicted rise of the best plan for each of ``targets``, in bits per weight."""
    points = []
    with context.progress(len(targets), "pareto", "plan") as bar:
        for bpw in targets:
            target = int(bpw * offer.parameters / 8)
            try:
                positions = choose(offer, config, target).positions
            except ConfigError:  # too small for any plan
                points.append(Point(bpw, target, None, None))
            else:
                predicted = total(offer.market.values, positions)
                points.append(Point(bpw, target, offer.market.size(positions), predicted))
            bar.update()
    return points
