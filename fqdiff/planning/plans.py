"""A checkpoint and its Fisher table as a market of options, and the plans bought there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from fqdiff.configs import FITTED, INTEGERS, RIVALS, PlanConfig
from fqdiff.context import Context
from fqdiff.errors import ConfigError
from fqdiff.models.registry import build, output_axes, parameter_blocks, split_weights
from fqdiff.planning import budget, rivals, scores
from fqdiff.planning.calibration import Calibration, calibration_inputs, make_probe
from fqdiff.planning.candidates import (
    FLOATS,
    KEPT_SHARES,
    Market,
    Option,
    Ways,
    best_ranges,
    every_option,
    tensor_ways,
)
from fqdiff.planning.knapsack import total
from fqdiff.planning.outputs import with_outputs
from fqdiff.planning.quadratic import separate
from fqdiff.planning.refine import Found, refine, solve
from fqdiff.quant.formats import get_format, without_zero_point
from fqdiff.quant.packed import stored_bytes
from fqdiff.quant.ranges import FISHER, MIN_MAX
from fqdiff.quant.rounding import SQUANT, check_ranges
from fqdiff.sensitivity.ledger import Ledger
from fqdiff.sensitivity.plans import ENDS
from fqdiff.values import Alternative, Budget, Checkpoint, Dataset, FisherTable, Plan, PlanEntry, model_description

UNLIMITED = 2**62
ONE_BIT = "codebook1"  # chosen only where it is named


@dataclass(frozen=True)
class Offer:
    """What can be bought: a market, each parameter's block and Fisher value (empty without a table), and what is fixed.

    ``weights``: Fisher values of single weights that ranges and codebooks are fitted to, where they are known. ``timesteps``:
    how many the score has looked at, 0 for one that has not.
    """

    market: Market
    blocks: Mapping[str, str]
    fisher: Mapping[str, float]
    ends: Mapping[str, str]
    weights: Mapping[str, Tensor]
    timesteps: int = 0

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
    checkpoint: Checkpoint,
    table: FisherTable | None,
    config: PlanConfig,
    seed: int,
    context: Context,
    dataset: Dataset | None = None,
) -> Offer:
    """Every parameter in every format of ``config.formats``, valued by ``config.score``.

    The scores in RIVALS look at training images of ``dataset``, drawn by ``seed``. Raises ConfigError where the score needs
    another table or images, LineageError for a table of another model, NumericalError and QuantizationError for NaN.
    """
    network = build(checkpoint.spec.architecture, "meta")
    blocks, axes = parameter_blocks(network), output_axes(network)
    for name in config.formats:
        get_format(name)
    shapes = {name: tuple(t.shape) for name, t in checkpoint.tensors.items()}
    measured = measured_importance(checkpoint, table, config, shapes)
    weights = fitted_weights(table, config, checkpoint)
    if config.by_element and not weights:
        raise ConfigError("elements cannot be told apart by this table", "fqdiff fisher --granularity weight")
    if config.by_output and not weights:
        raise ConfigError(
            "a budget for output channels needs Fisher values of single weights", "fqdiff fisher --granularity weight"
        )
    offered = ways(config, bool(weights), split_weights(network))
    timesteps = 0
    if config.score in RIVALS:
        inputs = calibration_inputs(checkpoint, dataset, table, config, seed)
        timesteps = len(inputs.t.unique())
        bench = rivals.Bench(checkpoint, inputs, config.calibration_samples, weights, seed, context)
    if config.score in rivals.VALUED:
        options = rival_options(bench, axes, offered, config.score)
    else:
        if config.score == "hawq":
            importance = rivals.hawq_importance(bench)
        elif config.score in ("random", "reverse"):
            importance = scores.exchanged(measured, config.score, seed)
        elif config.score == "weight-mse":
            importance = {name: torch.ones(1, dtype=torch.float64) for name in shapes}
        else:
            importance = measured
        options = any_options(checkpoint.tensors, axes, offered, config.by_output, importance, weights, context)
    market = Market(model_description(checkpoint.spec), options)
    ends = fixed_ends(config, blocks, shapes)
    market = market.restricted(ends)
    fisher = {name: 2 * float(values.mean()) for name, values in measured.items()}
    if config.predictor == "gram":
        market = market.worthwhile()
    return Offer(market, blocks, fisher, ends, weights, timesteps)


def fixed_ends(config: PlanConfig, blocks: Mapping[str, str], shapes: scores.Shapes) -> dict[str, str]:
    """The format of each weight tensor of stem and head, where the settings fix it."""
    ends = [name for name, shape in shapes.items() if len(shape) >= 2 and blocks[name] in ENDS]
    return dict.fromkeys(ends, config.ends_format) if config.ends_format else {}


def smallest_bytes(checkpoint: Checkpoint, config: PlanConfig, single_weights: bool) -> int:
    """Size of the smallest file that the settings offer, known from shapes alone: what overflows is not looked for."""
    network = build(checkpoint.spec.architecture, "meta")
    axes, offered = output_axes(network), ways(config, single_weights, split_weights(network))
    options = {
        name: tuple(
            Option(description, MIN_MAX, config.rounding, stored_bytes(*description), 0.0)
            for description in dict.fromkeys(way for way, _ in tensor_ways(name, tensor, axes[name], offered))
        )
        for name, tensor in checkpoint.tensors.items()
    }
    blocks, shapes = parameter_blocks(network), {name: tuple(t.shape) for name, t in checkpoint.tensors.items()}
    ends = fixed_ends(config, blocks, shapes)
    market = Market(model_description(checkpoint.spec), options).restricted(ends)
    try:
        choose(Offer(market, blocks, {}, ends, {}), config, 0)
    except budget.TargetTooSmall as error:
        return error.smallest
    raise AssertionError("a file of no bytes")


def beyond(checkpoint: Checkpoint, config: PlanConfig, single_weights: bool, smallest: int) -> str:
    """What would reach below ``smallest`` bytes, and how far: one-bit codes, or formats that are fitted to single weights."""
    found = ""
    formats = offered_formats(config, single_weights)
    if ONE_BIT not in formats:
        wider = (*formats, ONE_BIT)
        size = smallest_bytes(checkpoint, replace(config, formats=wider), single_weights)
        found += f"; with --formats {','.join(wider)} {size:,}" if size < smallest else ""
    if not single_weights:
        size = smallest_bytes(checkpoint, config, True)
        found += f"; with fqdiff fisher --granularity weight {size:,}" if size < smallest else ""
    return found


def check_target(checkpoint: Checkpoint, config: PlanConfig, single_weights: bool) -> None:
    """Raise TargetTooSmall where the smallest file is larger than the target: before anything is quantized to find out."""
    target = target_bytes(config, sum(t.numel() for t in checkpoint.tensors.values()))
    if target is None or target >= (smallest := smallest_bytes(checkpoint, config, single_weights)):
        return
    raise budget.TargetTooSmall(target, smallest, beyond(checkpoint, config, single_weights, smallest))


def any_options(
    tensors: Mapping[str, Tensor],
    axes: Mapping[str, int],
    offered: Ways,
    by_output: bool,
    importance: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    context: Context,
) -> dict[str, tuple[Option, ...]]:
    """Every option that is ``offered``: a format for each tensor, or two for its output channels; of several ranges the best."""
    every = every_option(tensors, axes, offered, importance, weights, context)
    best = {name: best_ranges(options) for name, options in every.items()}
    if not by_output:
        return best
    mixed = with_outputs(every, tensors, axes, importance, weights, context)
    return {name: (*options, *mixed[name]) for name, options in best.items()}


def rival_options(
    bench: rivals.Bench, axes: Mapping[str, int], offered: Ways, score: str
) -> dict[str, tuple[Option, ...]]:
    """Options valued one by one, by modelopt or autoround."""
    tensors, context = bench.checkpoint.tensors, bench.context
    equal = {name: torch.ones(1, dtype=torch.float64) for name in tensors}
    every = every_option(tensors, axes, offered, equal, bench.weights, context)
    return {name: best_ranges(options) for name, options in rivals.VALUED[score](bench, every).items()}


def offered_formats(config: PlanConfig, single_weights: bool) -> tuple[str, ...]:
    """The formats there are to choose from, as settings name them."""
    return config.formats or ((*INTEGERS, *FITTED) if single_weights else INTEGERS)


def ways(config: PlanConfig, single_weights: bool, boundaries: Mapping[str, int]) -> Ways:
    """What the settings offer. Unless named, fitted formats and ranges only where single weights' Fisher values are known,
    and with squant no ranges but min-max; raises ConfigError where it has others.

    Fitted to nothing but the weights, they predict less rise and cause more: what they cut off is cut off in one direction.
    ``boundaries``: see :func:`fqdiff.quant.granularity.granularities`.
    """
    named = offered_formats(config, single_weights)
    check_ranges(config.rounding, config.ranges)
    fitted = single_weights and config.rounding != SQUANT
    ranges = config.ranges or ((MIN_MAX, FISHER) if fitted else (MIN_MAX,))
    formats = tuple(without_zero_point(get_format(f)).name if config.symmetric else f for f in named)
    return Ways(
        tuple(dict.fromkeys(formats)),
        config.scale_granularities,
        ranges,
        config.scale,
        config.rounding,
        KEPT_SHARES if config.by_element else (),
        boundaries,
    )


def fitted_weights(table: FisherTable | None, config: PlanConfig, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Fisher values of single weights, to which ranges and codebooks are fitted, and which tell what elements to keep.

    Empty where the table has none.
    """
    unused = config.ranges and FISHER not in config.ranges and not config.by_element and not config.by_output
    if table is None or not table.weights or unused:
        return {}
    shapes = {name: tuple(t.shape) for name, t in checkpoint.tensors.items()}
    return scores.table_importance(table, table_weighting(table, config), checkpoint.spec.noise_schedule(), shapes)


def table_weighting(table: FisherTable, config: PlanConfig) -> str:
    """The timestep weights that ``table`` is read with; those of a rival score are no matter of a trajectory table's."""
    rival_beside_runs = config.score in RIVALS and scores.default_score(table.kind) == "trajectory"
    return "uniform" if rival_beside_runs else config.timestep_weights


def measured_importance(
    checkpoint: Checkpoint, table: FisherTable | None, config: PlanConfig, shapes: scores.Shapes
) -> dict[str, Tensor]:
    """The importance that the table gives; empty without a table, which only weight-mse and RIVALS can do without."""
    if table is None:
        if config.score not in ("weight-mse", *RIVALS):
            raise ConfigError(f"score '{config.score}' needs Fisher values", "run fqdiff fisher first")
        return {}
    schedule = checkpoint.spec.noise_schedule()
    if config.score == "trajectory":
        return scores.trajectory_importance(table, shapes)
    if config.score == "fisher":
        return scores.fisher_importance(table, config.timestep_weights, schedule, shapes)
    return scores.table_importance(table, table_weighting(table, config), schedule, shapes)


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


@dataclass(frozen=True)
class Measured:
    """What was ``found`` by running the network at so many ``timesteps``. ``rise``: of the best of ``evaluations`` plans."""

    found: Found
    timesteps: int
    rise: float | None
    evaluations: int


def samples_of(config: PlanConfig) -> int:
    """How many training images at each timestep a score looks at."""
    return (
        min(config.calibration_samples, rivals.HESSIAN_SAMPLES)
        if config.score == "hawq"
        else config.calibration_samples
    )


def make_plan(
    offer: Offer, config: PlanConfig, measured: Measured | None = None, choice: budget.Choice | None = None
) -> Plan:
    """The plan, every entry with what else it could have been; ``measured``: one that was found by running the network.

    ``choice``: one that was made already.
    """
    target = target_bytes(config, offer.parameters)
    if choice is None:
        choice = choose(offer, config, target) if measured is None else measured.found.choice
    table = offer.market.values if measured is None else measured.found.problem.table(choice.positions)
    entries = []
    for (name, options), j, row in zip(offer.market.options.items(), choice.positions, table, strict=True):
        considered = tuple(
            Alternative(o.format, str(o.description[2]), o.span, o.bytes, float(v))
            for o, v in zip(options, row, strict=False)
        )
        option, predicted = options[j], float(row[j])
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
        predicted=total(table, choice.positions),
        lower_bound=choice.lower_bound,
        constraint=choice.constraint,
        predictor=config.predictor,
        calibration_timesteps=offer.timesteps,
        calibration_samples=samples_of(config) if offer.timesteps else 0,
    )
    if measured is not None:
        facts = replace(
            facts,
            swaps=measured.found.swaps if config.predictor == "gram" else None,
            diagonal=measured.found.diagonal if config.predictor == "gram" else None,
            calibration_timesteps=measured.timesteps,
            calibration_samples=config.calibration_samples,
            measured=measured.rise,
            evaluations=measured.evaluations,
        )
    return Plan("budget", tuple(entries), offer.market.size(choice.positions), facts)


def find_measured(
    checkpoint: Checkpoint,
    table: FisherTable | None,
    dataset: Dataset | None,
    offer: Offer,
    config: PlanConfig,
    seed: int,
    context: Context,
) -> Measured:
    """The plan of predictor gram, or the one that did least of those that refining led to. A stopped run goes on.

    Raises ConfigError without a size to fit or without images, DataError for images that do not fit.
    """
    target = target_bytes(config, offer.parameters)
    assert target is not None
    probe = make_probe(checkpoint, dataset, table, config, seed, context.device)
    calibration = Calibration(checkpoint, offer.market, offer.weights, probe, context)
    with context.soft_stop() as stop_requested:
        ledger = Ledger(context, stop_requested)
        gram = config.predictor == "gram"
        problem = calibration.quadratic(ledger) if gram else separate(offer.market.values)
        if not config.refine:
            return Measured(solve(offer.market, target, problem), probe.timesteps, None, 0)
        trials = refine(offer.market, target, problem, calibration.measure, config.refine, ledger)
    best = min(trials, key=lambda trial: trial.measured)
    return Measured(best.found, probe.timesteps, best.measured, len(trials))


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
