"""``fqdiff plan``."""

import re
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Annotated

import typer

from fqdiff.cli.groups import DefaultCommand
from fqdiff.cli.plan_budget import (
    GRAINS,
    TARGETS,
    activations_text,
    block_rows,
    budget_config,
    budget_text,
    check_dry,
    parse_grid,
    show_pareto,
    title,
)
from fqdiff.cli.plan_inputs import budget_inputs, fits_to_table, gain_inputs, is_of_runs, plan_inputs
from fqdiff.cli.plan_plugin import make_by_plugin
from fqdiff.cli.session import Session, common, only_input
from fqdiff.cli.show import BLOCKS, artifact_data, table
from fqdiff.configs import (
    ACTIVATION_FORMATS,
    FITTED,
    INTEGERS,
    OUTPUT,
    RANGES,
    RIVALS,
    ROUNDINGS,
    SCALES,
    WHOLE_RUN,
    PlanConfig,
)
from fqdiff.errors import ConfigError, require

if TYPE_CHECKING:
    from fqdiff.store.manifest import Manifest
    from fqdiff.values import Plan

READS_FISHER = {"at", "low", "high", "ladder", "ladder_step"}
OF_ACTIVATIONS = {"activations", "wide_activations", "activation_ratio"}
ANY_STRATEGY = {"granularity", "scale", "symmetric", "ranges", "rounding"} | OF_ACTIVATIONS
CALIBRATION = {"predictor", "refine", "calibration_timesteps", "calibration_samples"}
READS_BUDGET = {"score", "timestep_weights", "formats", "ends", "phases", "traffic_bpw"} | CALIBRATION
OWN_SETTINGS = {  # the setting that stands for a strategy, and what else that strategy reads
    "groups": READS_FISHER | {"thresholds"},
    "threshold": READS_FISHER | {"lower_thresholds"},
    "ratio": READS_FISHER,
    "mean_std": READS_FISHER,
    "uniform": set(),
    **dict.fromkeys(("target_bpw", "target_size", "target_bytes", "max_loss_increase", "pareto"), READS_BUDGET),
}
BUDGET = "A byte budget"
RULES = "Rules of the layer-adaptive paper"
PLUGINS = "Plug-ins"
ACTIVATIONS = "Activations"

app = typer.Typer(cls=DefaultCommand, help="Choose a format for every parameter.")


@app.command("make", epilog="Example: fqdiff plan --groups 12/345/6")
@common()
def make(
    session: Session,
    source: Annotated[
        str | None,
        typer.Argument(
            help="Fisher table, or checkpoint (enough for --uniform, and for the scores weight-mse, hawq, modelopt, autoround).",
            show_default="the latest",
            metavar="[REF]",
        ),
    ] = None,
    target_bpw: Annotated[
        float | None,
        typer.Option(
            min=0, max=64, help="Best plan of so many bits per weight, everything counted.", rich_help_panel=BUDGET
        ),
    ] = None,
    target_size: Annotated[
        str | None,
        typer.Option(
            help="Best plan whose file takes no more than this, e.g. 1.2MiB.", metavar="SIZE", rich_help_panel=BUDGET
        ),
    ] = None,
    max_loss_increase: Annotated[
        float | None,
        typer.Option(min=0, help="Smallest file whose predicted rise is no more than this.", rich_help_panel=BUDGET),
    ] = None,
    pareto: Annotated[
        str | None,
        typer.Option(
            help="Only show the predicted rise over a grid of bits per weight, e.g. 2:8:0.25; makes no artifact.",
            metavar="FROM:TO:STEP",
            rich_help_panel=BUDGET,
        ),
    ] = None,
    score: Annotated[
        str | None,
        typer.Option(
            help="What is kept small: fisher, trajectory; or, for comparison, weight-mse, hawq, modelopt, autoround, random, "
            "reverse, uniform.",
            show_default="trajectory for a trajectory table, else fisher",
            rich_help_panel=BUDGET,
        ),
    ] = None,
    timestep_weights: Annotated[
        str | None,
        typer.Option(
            help="How timesteps count: uniform, snr, sampler or sampler:ddimN, gain (of a trajectory table) or at:T.",
            show_default=PlanConfig.timestep_weights,
            rich_help_panel=BUDGET,
        ),
    ] = None,
    formats: Annotated[
        str | None,
        typer.Option(
            help="Formats to choose from.",
            show_default=f"{','.join(INTEGERS)}; if the table has single weights also {','.join(FITTED)}",
            rich_help_panel=BUDGET,
        ),
    ] = None,
    ends: Annotated[
        str | None,
        typer.Option(
            help="Format of stem and head.",
            show_default="chosen like all others; int8 for --score uniform",
            rich_help_panel=BUDGET,
        ),
    ] = None,
    predictor: Annotated[
        str | None,
        typer.Option(
            help="diagonal: errors add up; gram: with all that tensors do together, measured on calibration inputs.",
            show_default=PlanConfig.predictor,
            rich_help_panel=BUDGET,
        ),
    ] = None,
    refine: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=1000,
            help="Measure up to so many whole plans, correct the prediction by each, keep the best.",
            show_default=f"{PlanConfig.refine}",
            rich_help_panel=BUDGET,
        ),
    ] = None,
    calibration_timesteps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Timesteps that gram, --refine and the scores hawq, modelopt and autoround look at, denser near 0.",
            show_default=f"{PlanConfig.calibration_timesteps}",
            rich_help_panel=BUDGET,
        ),
    ] = None,
    calibration_samples: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Training images at each of them; sampler runs for --score trajectory.",
            show_default=f"{PlanConfig.calibration_samples}",
            rich_help_panel=BUDGET,
        ),
    ] = None,
    phases: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=4,
            help="Equal phases of timesteps in which tensors may be read with bits of their own.",
            show_default=f"{PlanConfig.phases}",
            rich_help_panel=BUDGET,
        ),
    ] = None,
    traffic_bpw: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=64,
            help="With --phases: bits per weight that a timestep may read, averaged over all.",
            show_default="no limit",
            rich_help_panel=BUDGET,
        ),
    ] = None,
    groups: Annotated[
        str | None, typer.Option(help="Block groups, one threshold each, e.g. 12/345/6.", rich_help_panel=RULES)
    ] = None,
    thresholds: Annotated[
        str | None,
        typer.Option(
            help="The groups' thresholds, e.g. 0.1/0.01/0.1.", show_default="mean of each", rich_help_panel=RULES
        ),
    ] = None,
    threshold: Annotated[
        str | None,
        typer.Option(
            help="One threshold for the whole model; of a ladder also all of them, falling: 0.1,0.01.",
            rich_help_panel=RULES,
        ),
    ] = None,
    ratio: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Share of each block's tensors that stays high.", rich_help_panel=RULES),
    ] = None,
    mean_std: Annotated[
        float | None,
        typer.Option(
            min=0, help="Threshold mean - k std per block, k = clamp(A mean/std, 0.1, 2).", rich_help_panel=RULES
        ),
    ] = None,
    uniform: Annotated[
        str | None,
        typer.Option(
            help="Every weight tensor in this format, or W4A8: activations too; needs no Fisher values.",
            rich_help_panel=RULES,
        ),
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(
            help="Read Fisher values at this timestep, their 'mean', or those of a trajectory's whole 'run'.",
            show_default=f"{PlanConfig.at}; run for a trajectory table",
            rich_help_panel=RULES,
        ),
    ] = None,
    low: Annotated[
        str | None,
        typer.Option(help="Format below the threshold.", show_default=f"{PlanConfig.low}", rich_help_panel=RULES),
    ] = None,
    high: Annotated[
        str | None, typer.Option(help="Format above it.", show_default=f"{PlanConfig.high}", rich_help_panel=RULES)
    ] = None,
    ladder: Annotated[
        str | None,
        typer.Option(
            help="Formats instead of --high and --low, widest first, e.g. float16,int8,int4,int2.",
            rich_help_panel=RULES,
        ),
    ] = None,
    ladder_step: Annotated[
        float | None,
        typer.Option(
            min=1,
            help="The thresholds below a ladder's first are so many times smaller each.",
            show_default=f"{PlanConfig.ladder_step:g}",
            rich_help_panel=RULES,
        ),
    ] = None,
    strategy_name: Annotated[
        str | None,
        typer.Option(
            "--strategy", help="A strategy that an installed plug-in offers.", metavar="NAME", rich_help_panel=PLUGINS
        ),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(help="What the plug-in reads, NAME=VALUE; may be given again.", rich_help_panel=PLUGINS),
    ] = None,
    granularity: Annotated[
        str | None,
        typer.Option(
            help="One scale per tensor, per channel, per group:SIZE of a channel's weights, or group-near:SIZE; split is "
            "per channel and apart for joined skips; with ,element single elements may stay high, with ,output single output "
            "channels.",
            show_default=f"{PlanConfig.granularity}; for a budget {','.join(GRAINS)}, and output where the Fisher table "
            "has single weights",
        ),
    ] = None,
    scale: Annotated[
        str | None,
        typer.Option(
            help=f"Store scales in {' or '.join(SCALES)}.", show_default=f"{PlanConfig.scale}; for a budget float16"
        ),
    ] = None,
    range_: Annotated[
        str | None,
        typer.Option(
            "--range",
            help=f"What integer codes span: {', '.join(RANGES)}; of a budget several, with commas.",
            show_default="min-max; for a budget also fisher, if the table has single weights",
        ),
    ] = None,
    rounding: Annotated[
        str | None,
        typer.Option(help=f"How codes are chosen: {' or '.join(ROUNDINGS)}.", show_default=f"{PlanConfig.rounding}"),
    ] = None,
    activations: Annotated[
        str | None,
        typer.Option(
            help=f"Also the format of activations: {', '.join(ACTIVATION_FORMATS)}.",
            show_default="told to fqdiff quantize",
            rich_help_panel=ACTIVATIONS,
        ),
    ] = None,
    wide_activations: Annotated[
        str | None,
        typer.Option(
            help="Format of the share whose layers have the highest Fisher values.", rich_help_panel=ACTIVATIONS
        ),
    ] = None,
    activation_ratio: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="That share of all that is quantized.", rich_help_panel=ACTIVATIONS),
    ] = None,
    symmetric: Annotated[
        bool, typer.Option("--symmetric", help="Integers without zero points: int4 becomes int4sym.")
    ] = False,
) -> None:
    """Choose a format for every parameter, for a byte budget or by a rule on its Fisher value; see also show, diff."""
    from fqdiff.pipeline import Step
    from fqdiff.stages.plan import planned_formats

    flags: dict[str, object] = {
        "target_bpw": target_bpw,
        "target_size": target_size,
        "max_loss_increase": max_loss_increase,
        "pareto": pareto,
        "score": score,
        "timestep_weights": timestep_weights,
        "formats": parse_names("--formats", formats) if formats is not None else None,
        "ends": ends,
        "predictor": predictor,
        "refine": refine,
        "calibration_timesteps": calibration_timesteps,
        "calibration_samples": calibration_samples,
        "phases": phases,
        "traffic_bpw": traffic_bpw,
        "groups": groups,
        "thresholds": parse_thresholds(thresholds) if thresholds is not None else None,
        **(parse_ladder_thresholds(threshold) if threshold is not None else {}),
        "ratio": ratio,
        "mean_std": mean_std,
        "uniform": uniform,
        "at": at,
        "low": low,
        "high": high,
        "ladder": parse_names("--ladder", ladder) if ladder is not None else None,
        "ladder_step": ladder_step,
        "granularity": granularity,
        "scale": scale,
        "symmetric": symmetric or None,
        "ranges": parse_names("--range", range_) if range_ is not None else None,
        "rounding": rounding,
        "activations": activations,
        "wide_activations": wide_activations,
        "activation_ratio": activation_ratio,
    }
    if uniform is not None:
        flags |= parse_uniform(uniform, activations)
    given = {name for name, value in flags.items() if value is not None}
    if strategy_name is not None:
        make_by_plugin(session, source, strategy_name, tuple(setting or ()), {name: flags[name] for name in given})
        return
    if setting:
        raise ConfigError("--setting without a plug-in", "add --strategy NAME")
    from_file = session.tables().get("plan", {})
    strategy = choose_strategy(given, set(from_file))
    if (strategy or from_file.get("strategy")) == "budget":
        told = from_file | {name: flags[name] for name in given}
        inputs = budget_inputs(session, source, told.get("score") not in ("weight-mse", *RIVALS), told)
        config = budget_config(session, flags, inputs.get("fisher"))
        if config.timestep_weights == "gain":
            inputs |= gain_inputs(session, inputs)
        if config.is_calibrated and config.score != "trajectory":
            inputs["dataset"] = only_input(session, inputs.get("fisher") or inputs["checkpoint"], "dataset")
        if pareto is not None:
            show_pareto(session, inputs, config, parse_grid(pareto))
            return
        if session.dry_run:
            check_dry(session, inputs, config)
    else:
        foreign = sorted(given & READS_BUDGET)
        if foreign:
            options = ", ".join(map(flag, foreign))
            raise ConfigError(f"{options} without a budget", "add --target-bpw, --target-size or --max-loss-increase")
        rules = {name: value for name, value in flags.items() if name not in (*TARGETS, *READS_BUDGET)}
        rules |= {"strategy": strategy, "low": rules.pop("uniform") or low}
        config = session.settings("plan", PlanConfig, {}, **rules)
        reads_table = (
            config.strategy != "uniform" or config.activation_ratio > 0 or fits_to_table(session, source, config)
        )
        inputs = plan_inputs(session, source, reads_table)
        if not reads_table:
            inputs.pop("fisher", None)
        elif config.strategy != "uniform" and "at" not in given | from_file.keys() and is_of_runs(inputs["fisher"]):
            config = replace(config, at=WHOLE_RUN)  # the errors of all steps together are what such a table is about
        planned_formats(config)  # so that a dry run refuses what the plan would
    random = config.score == "random" or config.is_calibrated
    step = Step("plan", inputs, config, session.seed if random else 0)
    manifest = session.make(step)
    if manifest is None:
        return
    value: Plan = session.runner.load(manifest)
    chosen = () if value.budget is not None else tuple(f.name for f in planned_formats(config))
    rows = block_rows(value) if value.budget is not None else plan_rows(value, chosen[1:])
    full_bytes = only_input(session, manifest, "checkpoint").file("model.safetensors").bytes
    totals = {"strategy": value.strategy, "file_bytes": value.file_bytes, "bits_per_weight": value.bits_per_weight}
    facts: dict[str, object] = {"budget": vars(value.budget)} if value.budget is not None else {}
    facts |= {"phases": vars(value.phases)} if value.phases is not None else {}
    facts |= {"activations": dict(value.activations)} if value.activations else {}
    session.result(
        {**artifact_data(session.store, manifest), **totals, **facts, "blocks": rows},
        lambda: (
            budget_text(manifest, value)
            if value.budget is not None
            else plan_text(manifest, value, chosen, rows, full_bytes)
        ),
    )


def choose_strategy(flags: set[str], in_file: set[str]) -> str | None:
    """The strategy that the given settings belong to; flags decide before the file. None leaves it to the file or default.

    Raises ConfigError for settings of two strategies, and for flags that the strategy does not read.
    """
    for given in (flags, in_file):
        named = sorted(given & OWN_SETTINGS.keys())
        if len(named) > 1:
            alike = "different targets" if set(named) <= TARGETS else "different strategies"
            words = [flag(name) if given is flags else name for name in named]
            raise ConfigError(f"{' and '.join(words)} belong to {alike}", "give one of them")
        if named:
            strategy = "budget" if named[0] in TARGETS else named[0].replace("_", "-")
            foreign = sorted(flags - OWN_SETTINGS[named[0]] - {named[0]} - ANY_STRATEGY)
            if foreign:
                raise ConfigError(
                    f"strategy '{strategy}' has no use for {', '.join(map(flag, foreign))}", "leave it out"
                )
            return strategy if "strategy" not in in_file or given is flags else None
    return None


def parse_uniform(text: str, activations: str | None) -> dict[str, object]:
    """``int4``, or ``W4A8``: weights in 4 bits, activations in 8; 32 stands for float32."""
    both = re.fullmatch(r"W([0-9]+)A([0-9]+)", text, re.IGNORECASE)
    if both is None:
        return {"uniform": text}
    require(activations is None, f"--activations beside {text}, which has its own", "leave it out")
    weights, codes = both.groups()
    return {
        "uniform": "float32" if weights == "32" else f"int{weights}",
        "activations": None if codes == "32" else f"int{codes}",
    }


def flag(name: str) -> str:
    """The flag that gives the setting ``name``."""
    return {"ranges": "--range", "lower_thresholds": "--threshold"}.get(name, f"--{name.replace('_', '-')}")


def parse_names(option: str, text: str) -> tuple[str, ...]:
    """``min-max,fisher`` as names. Raises ConfigError where there are none."""
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    if not names:
        raise ConfigError(f"{option} names nothing", "leave it out for the default, or give names with commas between")
    return names


def parse_ladder_thresholds(text: str) -> dict[str, object]:
    """``0.1,0.01`` as the first threshold and those below it, if there are any."""
    try:
        first, *lower = (float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"threshold '{text}' is no number", "e.g. 0.1, or 0.1,0.01 for a ladder of three") from None
    return {"threshold": first, **({"lower_thresholds": tuple(lower)} if lower else {})}


def parse_thresholds(text: str) -> tuple[float, ...]:
    """``0.1/0.01/0.1`` as numbers."""
    try:
        return tuple(float(part) for part in text.split("/"))
    except ValueError:
        raise ConfigError(f"thresholds '{text}' are not numbers", "one per group, e.g. 0.1/0.01/0.1") from None


def plan_rows(value: "Plan", lower: tuple[str, ...]) -> list[dict[str, object]]:
    """Block by block: weight tensors and weights in all and in the formats below the widest, payload bytes before and after.

    Kept elements are no lowered weights.
    """
    rows: list[dict[str, object]] = []
    for block in BLOCKS:
        entries = [e for e in value.entries if e.block == block]
        tensors = [e for e in entries if len(e.shape) >= 2]
        weights = {name: sum(e.weights_by_format.get(name, 0) for e in tensors) for name in lower}
        rows.append(
            {
                "block": block,
                "tensors": len(tensors),
                "tensors_low": sum(e.format in lower for e in tensors),
                "weights": sum(prod(e.shape) for e in tensors),
                "weights_low": sum(weights.values()),
                "formats": weights,
                "bytes_float32": sum(4 * prod(e.shape) for e in entries),
                "bytes_planned": sum(e.bytes for e in entries),
            }
        )
    return rows


def plan_text(
    manifest: "Manifest", value: "Plan", formats: tuple[str, ...], rows: list[dict[str, object]], full_bytes: int
) -> str:
    """The table of :func:`plan_rows` for people; ``full_bytes`` is the size of the full-precision file."""
    high, *lower = formats
    cells = []
    for r in rows:
        counts = r["formats"]
        assert isinstance(counts, dict)
        to_each = [f"{counts[name]:,}" for name in lower]
        to_each[-1] += f" of {r['weights']:,}"
        sizes = (f"{r['bytes_float32']:,}", f"{r['bytes_planned']:,}")
        cells.append([str(r["block"]), f"{r['tensors_low']} of {r['tensors']}", *to_each, *sizes])
    payload, full_payload = (sum(int(str(r[key])) for r in rows) for key in ("bytes_planned", "bytes_float32"))
    blank = [""] * (1 + len(lower))
    cells.append(["header", *blank, f"{full_bytes - full_payload:,}", f"{value.file_bytes - payload:,}"])
    cells.append(["file", *blank, f"{full_bytes:,}", f"{value.file_bytes:,}"])
    to_lower = f"tensors to {lower[0]}" if len(lower) == 1 else "tensors lowered"
    header = ("block", to_lower, *(f"weights to {name}" for name in lower), "bytes in float32", "bytes planned")

    rest = "everything else stays float32"
    if high != "float32":
        rest = "biases and norms stay float32" + (
            "" if value.strategy == "uniform" else f", all other weights are {high}"
        )
    kept = sum(e.weights_by_format.get(high, 0) for e in value.entries if e.format != high)
    if kept:
        outputs = any(e.granularity.startswith(OUTPUT) for e in value.entries)
        rest += f"; {kept:,} {'weights of single output channels' if outputs else 'single elements'} stay {high}"
    rules = dict.fromkeys(f"{e.rule} (threshold {e.threshold:.3g})" for e in value.entries if e.threshold is not None)
    return "\n".join([title(manifest, value), table(header, cells), rest, *rules, *activations_text(value)])
