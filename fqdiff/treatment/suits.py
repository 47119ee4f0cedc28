"""Whether a plan and a calibration set are what a published method asks for."""

from collections.abc import Set
from dataclasses import dataclass

from fqdiff.configs import PlanConfig
from fqdiff.errors import ConfigError
from fqdiff.methods import METHODS
from fqdiff.quant.formats import PerChannel, PerSplit, get_format, parse_granularity
from fqdiff.quant.ranges import MIN_MAX
from fqdiff.treatment.steps import Source
from fqdiff.values import Plan


@dataclass(frozen=True)
class Traits:
    """What methods ask of a plan: its strategy, and of its integers the ranges, the roundings, whether any of them is split,
    and whether all have one scale for each channel.

    None where that cannot be told.
    """

    strategy: str
    ranges: Set[str] | None
    roundings: Set[str] | None
    split: bool | None
    by_channel: bool | None


def traits_of_plan(plan: Plan) -> Traits:
    """The traits of a plan that is made: all of them are known."""
    integers = [e for e in plan.entries if get_format(e.format).is_integer]
    scales = [parse_granularity(e.granularity) for e in integers]
    return Traits(
        plan.strategy,
        {e.range for e in integers},
        {e.rounding for e in integers},
        any(isinstance(scale, PerSplit) for scale in scales),
        all(isinstance(scale, PerChannel) for scale in scales),
    )


def traits_of_config(config: PlanConfig) -> Traits:
    """The traits that all plans of ``config`` have; a budget's formats, and with them its ranges, are chosen later."""
    may_split = "split" in config.scale_granularities
    if config.strategy == "budget":
        return Traits(config.strategy, None, None, None if may_split else False, None)
    formats = (config.low,) if config.strategy == "uniform" else config.formats_by_rank
    if not any(get_format(name).is_integer for name in formats):
        return Traits(config.strategy, set(), set(), False, True)
    ranges, split = set(config.ranges or (MIN_MAX,)), None if may_split else False
    return Traits(config.strategy, ranges, {config.rounding}, split, None)


def check_method(method: str, traits: Traits, calibration: Source | None) -> None:
    """Raise ConfigError where the plan, as far as is known, or the set that is learned from is not what ``method`` asks for."""
    bundle, how = METHODS[method].bundle, "; ".join(METHODS[method].made_by)
    if bundle.strategy not in ("", traits.strategy):
        raise ConfigError(f"{method} is a plan by {bundle.strategy}; this is one by {traits.strategy}", how)
    for what, wanted, got in (
        ("range", bundle.ranges, traits.ranges),
        ("rounding", bundle.roundings, traits.roundings),
    ):
        if wanted and got is not None and not got:
            raise ConfigError(f"{method} is about integers, of which the plan has none", how)
        if wanted and got is not None and not got <= set(wanted):
            raise ConfigError(
                f"{method} has the {what} {', '.join(wanted)}; the plan has {', '.join(sorted(got))}", how
            )
    if bundle.split_weights and traits.split is False:
        raise ConfigError(f"{method} splits the weights of layers that are given a joined skip; the plan does not", how)
    if bundle.by_channel and traits.by_channel is False:
        raise ConfigError(f"{method} has one scale for each channel; the plan has others", how)
    scheme = calibration.recipe.config.get("scheme") if calibration is not None else None
    if calibration is not None and bundle.scheme not in ("", scheme):
        raise ConfigError(f"{method} calibrates by {bundle.scheme}; {calibration.id} was recorded by {scheme}", how)
