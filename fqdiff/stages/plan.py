"""Plans: from Fisher values to one format per parameter, for a byte budget or by the rules of the layer-adaptive paper.

Of the rules, candidates are the weight tensors (two axes or more) of the six blocks. Biases and norms, being few, stay
float32; the stem and the head stay high: they belong to no block group, and low precision at the image is known to ruin it.
Only ``uniform`` lowers their weights too.
"""

from collections.abc import Callable, Iterable, Mapping

import torch

from fqdiff.configs import PlanConfig
from fqdiff.context import Context
from fqdiff.errors import ConfigError, LineageError, NumericalError
from fqdiff.groups import format_groups, parse_groups
from fqdiff.models.registry import build, output_axes, parameter_blocks
from fqdiff.planning.phases import make_phased_plan
from fqdiff.planning.plans import find_measured, make_offer, make_plan
from fqdiff.planning.scores import with_gain
from fqdiff.quant.container import file_bytes, metadata, stored_tensors
from fqdiff.quant.formats import Format, PerTensor, get_format, parse_granularity, without_zero_point
from fqdiff.quant.granularity import granularities
from fqdiff.quant.packed import stored_bytes
from fqdiff.quant.ranges import FISHER, MIN_MAX
from fqdiff.quant.rounding import NEAREST, SQUANT
from fqdiff.values import Checkpoint, Dataset, FisherTable, Plan, PlanEntry, model_description

BLOCKS = ("1", "2", "3", "4", "5", "6")
Scores = Mapping[str, float]
Rule = tuple[float, str]  # a threshold, and where it comes from


def plan_by_gain(
    checkpoint: Checkpoint,
    fisher: FisherTable | None,
    dataset: Dataset | None,
    trajectory: FisherTable | None,
    config: PlanConfig,
    seed: int,
    context: Context,
) -> Plan:
    """:func:`plan`; for timestep weights by gain, ``trajectory`` is the table that has measured it."""
    return plan(checkpoint, with_gain(fisher, trajectory), dataset, config, seed, context)


def plan(
    checkpoint: Checkpoint,
    fisher: FisherTable | None,
    dataset: Dataset | None,
    config: PlanConfig,
    seed: int,
    context: Context,
) -> Plan:
    """One entry per parameter of ``checkpoint``: what fits a budget best, or, by a rule, ``config.low`` under a threshold.

    Raises ConfigError for a timestep that the table lacks, a group size that does not divide or a budget that nothing fits,
    LineageError for a table of other parameters. ``seed`` shuffles the random score. ``dataset`` is only looked at by predictor
    gram, refine and the rival scores; its training images and ``seed`` make their calibration inputs.
    """
    if config.strategy == "budget":
        offer = make_offer(checkpoint, fisher, config, seed, context, dataset)
        if config.phases > 1:
            assert fisher is not None
            return make_phased_plan(checkpoint, fisher, offer, config, context)
        if not config.is_measured:
            return make_plan(offer, config)
        return make_plan(offer, config, find_measured(checkpoint, fisher, dataset, offer, config, seed, context))
    network = build(checkpoint.spec.architecture, "meta")
    blocks, axes = parameter_blocks(network), output_axes(network)
    shapes = {name: tuple(t.shape) for name, t in checkpoint.tensors.items()}
    weights = [name for name, shape in shapes.items() if len(shape) >= 2]
    low, high = planned_formats(config)
    span = config.ranges[0] if config.ranges else MIN_MAX
    if span == FISHER and (fisher is None or not fisher.weights):
        raise ConfigError(
            "a range by Fisher values needs those of single weights", "fqdiff fisher --granularity weight"
        )
    if config.rounding == SQUANT and config.granularity != "channel":
        raise ConfigError(
            f"squant with scales by {config.granularity}", "its sums are over channels: --granularity channel"
        )
    if config.strategy == "uniform":
        scores: Scores = {}
        rules: Mapping[str, Rule] = {name: (float("inf"), "uniform: every weight tensor goes low") for name in weights}
    else:
        if fisher is None:
            raise ConfigError(f"strategy '{config.strategy}' needs Fisher values", "run fqdiff fisher first")
        scores = read_scores(fisher, config.at)
        if scores.keys() != shapes.keys():
            raise LineageError("the Fisher table is of another model", "run fqdiff fisher on this checkpoint")
        candidates = {name: scores[name] for name in weights if blocks[name] in BLOCKS}
        rules = RULES[config.strategy](candidates, blocks, config)

    decisions = {name: decide(name, shape, scores, rules, (low, high)) for name, shape in shapes.items()}
    scaled = {name: (shapes[name], axes[name]) for name, (fmt, _, _) in decisions.items() if not fmt.is_cast}
    grains = granularities(config.granularity, config.scale, scaled)
    entries = []
    for name, (chosen, threshold, rule) in decisions.items():
        granularity = grains.get(name, PerTensor())
        size = stored_bytes(shapes[name], chosen, granularity)
        finite = threshold if threshold is not None and threshold != float("inf") else None
        entries.append(
            PlanEntry(
                parameter=name,
                block=blocks[name],
                shape=shapes[name],
                format=chosen.name,
                granularity=str(granularity),
                range=span if chosen.is_integer else MIN_MAX,
                rounding=config.rounding if chosen.is_integer else NEAREST,
                score=scores.get(name),
                threshold=finite,
                rule=rule,
                bytes=size,
            )
        )
    return Plan(config.strategy, tuple(entries), predicted_file_bytes(checkpoint, entries))


def planned_formats(config: PlanConfig) -> tuple[Format, Format]:
    """The low and the high format. Raises ConfigError for settings that say nothing about either."""
    low, high = get_format(config.low), get_format(config.high)
    used = (low,) if config.strategy == "uniform" else (low, high)
    names = " and ".join(f.name for f in used)
    if config.symmetric and not any(f.is_integer for f in used):
        raise ConfigError(
            f"symmetric says nothing about {names}", "leave it out, or use an integer format such as int4"
        )
    if config.scale != PlanConfig.scale and all(f.is_cast for f in used):
        raise ConfigError(f"{names} have no scales to store in {config.scale}", "leave it out, or use e.g. int4")
    return (without_zero_point(low), without_zero_point(high)) if config.symmetric else (low, high)


def decide(
    name: str, shape: tuple[int, ...], scores: Scores, rules: Mapping[str, Rule], formats: tuple[Format, Format]
) -> tuple[Format, float | None, str]:
    """Format of one parameter, the threshold that decided (None where none did), and the rule in words."""
    low, high = formats
    if name in rules:
        threshold, rule = rules[name]
        return (low if name not in scores or scores[name] < threshold else high), threshold, rule
    if len(shape) >= 2:
        return high, None, "stem and head stay high"
    return get_format("float32"), None, "biases and norms stay float32"


def predicted_file_bytes(checkpoint: Checkpoint, entries: Iterable[PlanEntry]) -> int:
    """Size of the file that holds ``entries``, header included, to the byte."""
    described = {e.parameter: (e.shape, get_format(e.format), parse_granularity(e.granularity)) for e in entries}
    return file_bytes(stored_tensors(described), metadata(model_description(checkpoint.spec), described))


def read_scores(table: FisherTable, at: str) -> dict[str, float]:
    """Fisher value of each parameter (mean over its elements) at one timestep, or averaged over all of them."""
    if at == "mean":
        scores = {name: float(entry.mean.mean()) for name, entry in table.entries.items()}
    else:
        found = (table.timesteps == int(at)).nonzero().flatten()
        if not len(found):
            near = int(table.timesteps[(table.timesteps - int(at)).abs().argmin()])
            raise ConfigError(
                f"the Fisher table has no timestep {at}",
                f"the nearest is {near}: --at {near}, or fqdiff fisher with more timesteps",
            )
        scores = {name: float(entry.mean[found[0]]) for name, entry in table.entries.items()}
    for name, score in scores.items():
        if not 0 <= score < float("inf"):
            raise NumericalError(f"the Fisher value of '{name}' is {score}", "run fqdiff fisher again")
    return scores


def single_threshold(scores: Scores, blocks: Mapping[str, str], config: PlanConfig) -> dict[str, Rule]:
    """One threshold for the whole model."""
    return dict.fromkeys(scores, (config.threshold, f"threshold {config.threshold:g} for the whole model"))


def group_thresholds(scores: Scores, blocks: Mapping[str, str], config: PlanConfig) -> dict[str, Rule]:
    """One threshold per block group: given, or the mean Fisher value of the group's weight tensors."""
    groups = parse_groups(config.groups)
    rules: dict[str, Rule] = {}
    for index, group in enumerate(groups):
        members = [name for name in scores if int(blocks[name]) in group]
        mean = sum(scores[name] for name in members) / len(members)
        given = config.thresholds[index] if config.thresholds else None
        source = "given" if given is not None else "its mean Fisher value"
        rules |= dict.fromkeys(
            members, (mean if given is None else given, f"group {format_groups((group,))}: {source}")
        )
    return rules


def block_ratio(scores: Scores, blocks: Mapping[str, str], config: PlanConfig) -> dict[str, Rule]:
    """In each block the share ``ratio`` of tensors with the highest Fisher values stays (rounded to whole tensors)."""
    rules: dict[str, Rule] = {}
    for block in BLOCKS:
        members = sorted((name for name in scores if blocks[name] == block), key=lambda name: -scores[name])
        keep = round(config.ratio * len(members))
        threshold = scores[members[keep - 1]] if keep else float("inf")
        rules |= dict.fromkeys(members, (threshold, f"block {block}: the top {keep} of {len(members)} stay"))
    return rules


def mean_minus_deviations(scores: Scores, blocks: Mapping[str, str], config: PlanConfig) -> dict[str, Rule]:
    """Threshold mean - k * std per block, k = clamp(A * mean / std, 0.1, 2.0)."""
    rules: dict[str, Rule] = {}
    for block in BLOCKS:
        members = [name for name in scores if blocks[name] == block]
        values = torch.tensor([scores[name] for name in members], dtype=torch.float64)
        mean, std = float(values.mean()), float(values.std(correction=0))
        k = min(max(config.mean_std * mean / std, 0.1), 2.0) if std > 0 else 0.1
        rules |= dict.fromkeys(members, (mean - k * std, f"block {block}: mean - {k:.2f} std"))
    return rules


RULES: Mapping[str, Callable[[Scores, Mapping[str, str], PlanConfig], dict[str, Rule]]] = {
    "threshold": single_threshold,
    "groups": group_thresholds,
    "ratio": block_ratio,
    "mean-std": mean_minus_deviations,
}
