"""Plans: from Fisher values to one format per parameter, for a byte budget or by the rules of the layer-adaptive paper.

Of the rules, candidates are the weight tensors (two axes or more) of the six blocks. Biases and norms, being few, stay
float32; the stem and the head stay high: they belong to no block group, and low precision at the image is known to ruin it.
Only ``uniform`` lowers their weights too.

Where single elements or output channels are held against thresholds, those of one tensor may ask for many formats, and a tensor
is stored in two at most: :func:`ways_of_storing` gives none of them a narrower one than it asks for.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fqdiff.configs import WHOLE_RUN, PlanConfig, PluginPlanConfig
from fqdiff.context import Context
from fqdiff.errors import ConfigError, LineageError, NumericalError, QuantizationError
from fqdiff.groups import format_groups, parse_groups
from fqdiff.models.registry import build, output_axes, parameter_blocks, split_weights
from fqdiff.planning.activations import activation_formats
from fqdiff.planning.phases import make_phased_plan
from fqdiff.planning.plans import check_target, find_measured, make_offer, make_plan
from fqdiff.planning.plugins import chosen_formats, find_plugin
from fqdiff.planning.scores import fisher_importance, trajectory_importance, with_gain
from fqdiff.quant.formats import (
    CASTS,
    Format,
    Grain,
    Granularity,
    PerChannel,
    PerElement,
    PerGroup,
    PerOutput,
    PerTensor,
    get_format,
    without_zero_point,
)
from fqdiff.quant.granularity import granularities
from fqdiff.quant.packed import pack_tensor, stored_bytes
from fqdiff.quant.ranges import FISHER, MIN_MAX
from fqdiff.quant.rounding import NEAREST, SQUANT, check_ranges
from fqdiff.values import Checkpoint, Dataset, FisherTable, Plan, PlanEntry, planned_bytes

BLOCKS = ("1", "2", "3", "4", "5", "6")
INFINITE = float("inf")
Scores = Mapping[str, float]
Values = Mapping[str, Tensor]  # Fisher values that a threshold is held against: of the tensor, [1], or of each element
Asked = Mapping[Format, int]  # formats, widest first, and how many of a tensor's values ask for each


class Rule(NamedTuple):
    """``thresholds``, falling, one fewer than formats, and in ``words`` where they come from.

    ``top``: how many of the parameter's values go to the widest format, where a rule counts them: with values that are equal
    to the threshold it keeps some and not others.
    """

    thresholds: tuple[float, ...]
    words: str
    top: int | None = None


def plan_by_gain(
    checkpoint: Checkpoint,
    fisher: FisherTable | None,
    dataset: Dataset | None,
    trajectory: FisherTable | None,
    config: PlanConfig,
    seed: int,
    context: Context,
) -> Plan:
    """:func:`plan`, with formats of activations where ``config`` has some.

    For timestep weights by gain, ``trajectory`` is the table that has measured it.
    """
    made = plan(checkpoint, with_gain(fisher, trajectory), dataset, config, seed, context)
    if not config.activations:
        return made
    return replace(made, activations=activation_formats(build(checkpoint.spec.architecture, "meta"), fisher, config))


def plan(
    checkpoint: Checkpoint,
    fisher: FisherTable | None,
    dataset: Dataset | None,
    config: PlanConfig,
    seed: int,
    context: Context,
) -> Plan:
    """One entry per parameter of ``checkpoint``: what fits a budget best, or, by a rule, narrower under thresholds.

    Raises QuantizationError where a weight overflows its format, ConfigError for a timestep that the table lacks, a group size
    that does not divide or a budget that nothing fits, LineageError for a table of other parameters. ``seed`` shuffles the random
    score. ``dataset`` is only looked at by predictor gram, refine and the rival scores; its training images and ``seed`` make
    their calibration inputs.
    """
    if config.strategy == "budget":
        check_target(checkpoint, config, fisher is not None and bool(fisher.weights))
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
    formats = planned_formats(config)
    span = config.ranges[0] if config.ranges else MIN_MAX
    if (span == FISHER or config.by_element) and (fisher is None or not fisher.weights):
        what = "a range by Fisher values" if span == FISHER else "granularity element"
        raise ConfigError(f"{what} needs those of single weights", "fqdiff fisher --granularity weight")
    (scales,) = config.scale_granularities
    if config.rounding == SQUANT and scales != "channel":
        raise ConfigError(f"squant with scales by {scales}", "its sums are over channels: --granularity channel")
    values: Values = {}
    if config.strategy == "uniform":
        scores: Scores = {}
        rules: Mapping[str, Rule] = dict.fromkeys(weights, Rule((INFINITE,), "uniform: every weight tensor goes low"))
    else:
        if fisher is None:
            raise ConfigError(f"strategy '{config.strategy}' needs Fisher values", "run fqdiff fisher first")
        scores = read_scores(fisher, config.at)
        if scores.keys() != shapes.keys():
            raise LineageError("the Fisher table is of another model", "run fqdiff fisher on this checkpoint")
        candidates = [name for name in weights if blocks[name] in BLOCKS]
        if config.by_element or config.by_output:
            if config.at == WHOLE_RUN:
                importance = trajectory_importance(fisher, shapes)
            else:
                importance = fisher_importance(fisher, part_weighting(config), checkpoint.spec.noise_schedule(), shapes)
            values = {name: 2 * importance[name].flatten() for name in candidates}
            if config.by_output:
                values = {name: channel_means(2 * importance[name], axes[name]) for name in candidates}
        else:
            values = {name: torch.tensor([scores[name]], dtype=torch.float64) for name in candidates}
        rules = RULES[config.strategy](values, blocks, config)

    decisions = {name: decide(name, shape, values, rules, formats) for name, shape in shapes.items()}
    scaled = {
        name: (shapes[name], axes[name])
        for name, (asked, *_) in decisions.items()
        if not all(fmt.is_cast for fmt in asked)
    }
    grains = granularities(scales, config.scale, scaled, split_weights(network))
    entries = []
    for name, (asked, thresholds, rule) in decisions.items():
        scale = grains.get(name, PerTensor())
        casts = [fmt for fmt in formats if fmt.is_cast] if config.by_element else []
        ways = [
            (stored_bytes(shapes[name], fmt, granularity), fmt, granularity)
            for fmt, granularity in ways_of_storing(asked, scale, PerChannel(axes[name]), casts)
        ]
        size, chosen, granularity = min(ways, key=lambda way: way[0])  # of equals the first: all of it in one format
        finite = thresholds[0] if thresholds and thresholds[0] != INFINITE else None
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
    check_casts(checkpoint, entries)
    weighting = part_weighting(config) if config.by_element or config.by_output else Plan.timestep_weights
    return Plan(config.strategy, tuple(entries), planned_bytes(checkpoint.spec, entries), timestep_weights=weighting)


def check_casts(checkpoint: Checkpoint, entries: Iterable[PlanEntry]) -> None:
    """Raise QuantizationError, which names the tensor, where a cast overflows: no size is promised of what cannot be stored."""
    for e in entries:
        if (fmt := get_format(e.format)).is_cast:
            try:
                pack_tensor(checkpoint.tensors[e.parameter], fmt, PerTensor())
            except QuantizationError as error:
                raise QuantizationError(f"'{e.parameter}': {error.message}", error.hint) from None


def plan_by_plugin(
    checkpoint: Checkpoint, fisher: FisherTable | None, config: PluginPlanConfig, seed: int, context: Context
) -> Plan:
    """The formats that a plug-in chooses for all weight tensors, those of stem and head among them.

    Raises ConfigError where the plug-in fails, says something else than formats, or is installed in another version than
    ``config`` names; LineageError for a table of other parameters.
    """
    plugin = find_plugin(config.strategy)
    if (plugin.distribution, plugin.version) != (config.distribution, config.version):
        raise ConfigError(
            f"strategy {plugin.words} is installed; this plan is of {config.distribution} {config.version}",
            f"install {config.distribution} {config.version}, or make a new plan",
        )
    network = build(checkpoint.spec.architecture, "meta")
    blocks, axes = parameter_blocks(network), output_axes(network)
    scores = read_scores(fisher, config.at) if fisher is not None else {}
    if scores and scores.keys() != checkpoint.tensors.keys():
        raise LineageError("the Fisher table is of another model", "run fqdiff fisher on this checkpoint")
    weights = {name: tensor for name, tensor in checkpoint.tensors.items() if tensor.ndim >= 2}
    settings = dict(setting.split("=", 1) for setting in config.settings)
    named = chosen_formats(plugin, weights, {name: scores[name] for name in weights if scores}, settings)
    float32, formats = get_format("float32"), {}
    for name, fmt in named.items():
        try:
            formats[name] = get_format(fmt)
        except ConfigError as error:
            raise ConfigError(f"strategy {plugin.words} chose for '{name}': {error.message}", error.hint) from None
        if formats[name].phase_bits:
            raise ConfigError(f"strategy {plugin.words} chose '{fmt}' for '{name}'", "phases belong to a budget")
    scaled = {n: (tuple(weights[n].shape), axes[n]) for n, fmt in formats.items() if not fmt.is_cast}
    grains = granularities(config.granularity, config.scale, scaled, split_weights(network))
    entries = []
    for name, tensor in checkpoint.tensors.items():
        chosen, granularity = formats.get(name, float32), grains.get(name, PerTensor())
        entries.append(
            PlanEntry(
                parameter=name,
                block=blocks[name],
                shape=tuple(tensor.shape),
                format=chosen.name,
                granularity=str(granularity),
                range=MIN_MAX,
                rounding=NEAREST,
                score=scores.get(name),
                threshold=None,
                rule=f"strategy {plugin.words}" if name in formats else "biases and norms stay float32",
                bytes=stored_bytes(tuple(tensor.shape), chosen, granularity),
            )
        )
    return Plan(plugin.words, tuple(entries), planned_bytes(checkpoint.spec, entries))


def planned_formats(config: PlanConfig) -> tuple[Format, ...]:
    """The formats of the rules, widest first. Raises ConfigError for settings that say nothing about any of them."""
    formats = tuple(get_format(name) for name in config.formats_by_rank)
    used = formats[-1:] if config.strategy == "uniform" else formats
    names = " and ".join(f.name for f in reversed(used))
    if config.ladder and any(a.bits <= b.bits for a, b in pairwise(formats)):
        raise ConfigError(f"ladder {','.join(config.ladder)}", "each format narrower than the one before")
    if not config.ladder and len(used) == 2 and formats[0].bits < formats[1].bits:
        raise ConfigError(
            f"low {formats[1].name} has more bits than high {formats[0].name}", "important tensors go high: swap them"
        )
    if not config.ladder and len(used) == 2 and formats[0] == formats[1]:
        raise ConfigError(f"low and high are {formats[0].name}, both", f"--uniform {formats[0].name} needs no rule")
    if config.symmetric and not any(f.is_integer for f in used):
        raise ConfigError(
            f"symmetric says nothing about {names}", "leave it out, or use an integer format such as int4"
        )
    if config.scale != PlanConfig.scale and all(f.is_cast for f in used):
        raise ConfigError(f"{names} have no scales to store in {config.scale}", "leave it out, or use e.g. int4")
    shared = ",".join(config.scale_granularities)
    if shared != PlanConfig.granularity and all(f.is_cast for f in used):
        raise ConfigError(f"{names} have no scales to share by {shared}", "leave it out, or use e.g. int4")
    if not any(f.is_integer for f in used):
        for setting, told in (("--rounding", config.rounding != NEAREST), ("--range", bool(config.ranges))):
            if told:
                raise ConfigError(
                    f"{setting} is about integer codes, and says nothing about {names}",
                    "leave it out, or use an integer format such as int4",
                )
    check_ranges(config.rounding, config.ranges)
    if config.by_element and not formats[0].is_cast:
        where = "begin the ladder with" if config.ladder else "--high,"
        raise ConfigError(f"single elements kept in {formats[0].name}", f"{where} a cast: {', '.join(CASTS)}")
    return tuple(map(without_zero_point, formats)) if config.symmetric else formats


def channel_means(values: Tensor, axis: int) -> Tensor:
    """Mean over each output channel, [O], of ``values`` that are single weights' or channels' already."""
    return values.movedim(axis, 0).flatten(1).mean(dim=1) if values.ndim > 1 else values


def part_weighting(config: PlanConfig) -> str:
    """The timestep weights that average the Fisher values of elements or channels as ``config.at`` says."""
    return "uniform" if config.at in ("mean", WHOLE_RUN) else f"at:{config.at}"


def decide(
    name: str, shape: tuple[int, ...], values: Values, rules: Mapping[str, Rule], formats: tuple[Format, ...]
) -> tuple[Asked, tuple[float, ...], str]:
    """The formats that one parameter asks for, the thresholds and the rule in words.

    Each of its values, one for the tensor or one for each element or channel, asks for the widest format whose threshold it
    reaches, or, where the rule counts them, so many of the largest do for the widest. No thresholds where none decided.
    """
    if name in rules:
        thresholds, rule, top = rules[name]
        if name not in values:
            return {formats[-1]: 1}, thresholds, rule
        below = [int((values[name].double() < threshold).sum()) for threshold in thresholds]
        if top is not None:
            below[0] = values[name].numel() - top
        counts = [more - less for more, less in pairwise([values[name].numel(), *below, 0])]
        return {fmt: n for fmt, n in zip(formats, counts, strict=True) if n}, thresholds, rule
    if len(shape) >= 2:
        return {formats[0]: 1}, (), "stem and head stay high"
    return {get_format("float32"): 1}, (), "biases and norms stay float32"


def ways_of_storing(
    asked: Asked, scale: Granularity, by_channel: PerChannel, casts: Sequence[Format]
) -> Iterator[tuple[Format, Grain]]:
    """Formats and granularities in which no element or output channel gets a narrower format than it asks for.

    All in the widest one that is asked for; or, for each narrower one, those that ask for no more in it, and the others in a
    wider one: the widest asked for, of elements, given ``casts`` (widest first), the narrowest of these that is no narrower.
    ``by_channel``: the scales of output channels where ``scale`` is one that two formats cannot share.
    """
    widest, *others = asked
    yield widest, PerTensor() if widest.is_cast else scale
    wider = 0
    for above, fmt in zip(asked, others, strict=False):
        wider += asked[above]
        if casts:
            high = [cast for cast in casts if cast.bits >= widest.bits][-1]
            yield fmt, PerElement(wider, high.name, PerTensor() if fmt.is_cast else scale)
        else:
            yield fmt, PerOutput(wider, widest.name, scale if isinstance(scale, PerChannel | PerGroup) else by_channel)


def read_scores(table: FisherTable, at: str) -> dict[str, float]:
    """Fisher value of each parameter, mean over its elements: at one timestep, over all, or of a sampler's whole run."""
    if at == WHOLE_RUN:
        if not table.trajectory:
            raise ConfigError(
                f"the {table.kind} Fisher table holds no sampler run", "--at mean, or fqdiff fisher --kind trajectory"
            )
        scores = {name: entry.mean for name, entry in table.trajectory.items()}
    elif at == "mean":
        scores = {name: float(entry.mean.mean()) for name, entry in table.entries.items()}
    else:
        found = (table.timesteps == int(at)).nonzero().flatten()
        if not len(found):
            near = int(table.timesteps[(table.timesteps - int(at)).abs().argmin()])
            raise ConfigError(
                f"the Fisher table has no timestep {at}",
                f"the nearest is {near}: --at {near}, "
                + ("or --at run" if table.trajectory else "or fqdiff fisher with more timesteps"),
            )
        scores = {name: float(entry.mean[found[0]]) for name, entry in table.entries.items()}
    for name, score in scores.items():
        if not 0 <= score < float("inf"):
            raise NumericalError(f"the Fisher value of '{name}' is {score}", "run fqdiff fisher again")
    return scores


def falling(first: float, config: PlanConfig) -> tuple[float, ...]:
    """The thresholds between neighbours of the ladder: ``first``, then the given ones, or each ``ladder_step`` times smaller."""
    if config.lower_thresholds:
        return (first, *config.lower_thresholds)
    return tuple(first / config.ladder_step**k for k in range(len(config.formats_by_rank) - 1))


def ladder_words(config: PlanConfig) -> str:
    """What the words of a rule, which tell of its first threshold, lack."""
    if len(config.formats_by_rank) == 2:
        return ""
    if config.lower_thresholds:
        return f", then {', '.join(f'{t:g}' for t in config.lower_thresholds)}"
    return f", each next threshold {config.ladder_step:g} times smaller"


def pooled(values: Values, members: Iterable[str]) -> Tensor:
    """All Fisher values of ``members``, float64."""
    return torch.cat([values[name].double() for name in members])


def single_threshold(values: Values, blocks: Mapping[str, str], config: PlanConfig) -> dict[str, Rule]:
    """One threshold for the whole model."""
    words = f"threshold {config.threshold:g} for the whole model{ladder_words(config)}"
    return dict.fromkeys(values, Rule(falling(config.threshold, config), words))


def group_thresholds(values: Values, blocks: Mapping[str, str], config: PlanConfig) -> dict[str, Rule]:
    """One threshold per block group: given, or the mean of the group's Fisher values."""
    groups = parse_groups(config.groups)
    rules: dict[str, Rule] = {}
    for index, group in enumerate(groups):
        members = [name for name in values if int(blocks[name]) in group]
        threshold = config.thresholds[index] if config.thresholds else float(pooled(values, members).mean())
        words = f"group {format_groups((group,))}: {'given' if config.thresholds else 'its mean Fisher value'}"
        rules |= dict.fromkeys(members, Rule(falling(threshold, config), words + ladder_words(config)))
    return rules


def block_ratio(values: Values, blocks: Mapping[str, str], config: PlanConfig) -> dict[str, Rule]:
    """In each block the share ``ratio`` with the highest Fisher values stays, of tensors or of their parts (rounded).

    Of equals the first.
    """
    rules: dict[str, Rule] = {}
    for block in BLOCKS:
        members = [name for name in values if blocks[name] == block]
        ordered = pooled(values, members).sort(descending=True, stable=True)
        keep = round(config.ratio * len(ordered.values))
        threshold = float(ordered.values[keep - 1]) if keep else INFINITE
        words = f"block {block}: the top {keep} of {len(ordered.values)} stay{ladder_words(config)}"
        stays = torch.zeros(len(ordered.values), dtype=torch.bool).index_fill(0, ordered.indices[:keep], True)
        parts = stays.split([values[name].numel() for name in members])
        for name, part in zip(members, parts, strict=True):
            rules[name] = Rule(falling(threshold, config), words, int(part.sum()))
    return rules


def mean_minus_deviations(values: Values, blocks: Mapping[str, str], config: PlanConfig) -> dict[str, Rule]:
    """Threshold mean - k * std per block, k = clamp(A * mean / std, 0.1, 2.0)."""
    rules: dict[str, Rule] = {}
    for block in BLOCKS:
        members = [name for name in values if blocks[name] == block]
        pool = pooled(values, members)
        mean, std = float(pool.mean()), float(pool.std(correction=0))
        k = min(max(config.mean_std * mean / std, 0.1), 2.0) if std > 0 else 0.1
        words = f"block {block}: mean - {k:.2f} std{ladder_words(config)}"
        rules |= dict.fromkeys(members, Rule(falling(mean - k * std, config), words))
    return rules


RULES: Mapping[str, Callable[[Values, Mapping[str, str], PlanConfig], dict[str, Rule]]] = {
    "threshold": single_threshold,
    "groups": group_thresholds,
    "ratio": block_ratio,
    "mean-std": mean_minus_deviations,
}
