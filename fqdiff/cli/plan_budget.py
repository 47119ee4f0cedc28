"""What ``fqdiff plan`` has for budgets: targets as flags, the table of a plan, and Pareto curves."""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any

from fqdiff.cli.session import Session
from fqdiff.cli.show import BLOCKS, byte_count, mebibytes, table
from fqdiff.configs import OUTPUT, RIVALS, PlanConfig
from fqdiff.errors import ConfigError

if TYPE_CHECKING:
    from fqdiff.planning.plans import Point
    from fqdiff.store.manifest import Manifest
    from fqdiff.values import Plan, PlanEntry

TARGETS = {"target_bpw", "target_size", "target_bytes", "max_loss_increase", "pareto"}
MOST_POINTS = 1000
LEAST_BPW = 1e-9
PROVEN = 1e-9  # a gap that is no more than float64 sums in another order
ACTIVATIONS = ("activations", "wide_activations", "activation_ratio")
GRAINS = ("tensor", "channel", "group-near:64")  # what a budget chooses from unless it is told otherwise
PLAIN = {"phases": 1, "rounding": "nearest", "predictor": "diagonal"}  # with which output channels may differ in format
ONE_FORMAT = ("uniform", "modelopt", "autoround")  # scores of tensors in one format each


def budget_config(session: Session, given_flags: dict[str, Any], fisher: "Manifest | None") -> PlanConfig:
    """The settings of a budget: flags, then the file, then the score that suits the Fisher table; a flag may be missing.

    A target among the flags replaces that of the file; a grid of targets stands for its first. Raises ConfigError for formats
    that there are not.
    """
    from fqdiff.quant.formats import get_format

    flags = defaultdict(lambda: None, given_flags)
    size, pareto = flags["target_size"], flags["pareto"]
    names = ("score", "timestep_weights", "formats", "ends", "granularity", "scale", "symmetric", "ranges", "rounding")
    others = ("predictor", "refine", "calibration_timesteps", "calibration_samples", "phases", "traffic_bpw")
    chosen = {name: flags[name] for name in (*names, *others, *ACTIVATIONS)}
    for name in (*(chosen["formats"] or ()), *([chosen["ends"]] if chosen["ends"] else [])):
        get_format(name)
    targets = {
        "target_bpw": asked_for(flags["target_bpw"], LEAST_BPW) if pareto is None else parse_grid(pareto)[0],
        "target_bytes": asked_for(byte_count("--target-size", size), 1) if size is not None else None,
        "max_loss_increase": flags["max_loss_increase"],
    }
    if any(value is not None for value in targets.values()):
        chosen |= {name: getattr(PlanConfig, name) if v is None else v for name, v in targets.items()}
    given = session.tables().get("plan", {}) | {name: value for name, value in chosen.items() if value is not None}
    table = fisher.recipe.config if fisher is not None else {}
    return session.settings("plan", PlanConfig, budget_defaults(table, given), strategy="budget", **chosen)


def asked_for(target: Any, least: Any) -> Any:
    """``target``, and ``least`` where that is 0: settings hold 0 for none, and so little is refused with the size that is not."""
    return least if target == 0 else target


def budget_defaults(table: "Mapping[str, object]", given: "Mapping[str, object]") -> dict[str, object]:
    """What a budget takes unless it is told otherwise, with a Fisher table of the settings ``table``, empty for none.

    ``given``: what it is told. Output channels may differ in format where single weights' values tell them apart, and nothing
    that is given forbids it.
    """
    from fqdiff.planning.scores import default_score

    score = default_score(str(table.get("kind", "")))
    told = {"score": score} | {name: given[name] for name in (*PLAIN, "score") if name in given}
    plain = all(told.get(name, value) == value for name, value in PLAIN.items())
    mixed = table.get("granularity") == "weight" and plain and told["score"] not in ONE_FORMAT
    return {"score": score, "granularity": ",".join((*GRAINS, OUTPUT) if mixed else GRAINS), "scale": "float16"}


def check_dry(session: Session, inputs: "Mapping[str, Manifest]", config: PlanConfig) -> None:
    """Raise ConfigError where the plan would be refused for its formats, or for a target that no file fits."""
    from fqdiff.planning.plans import check_target
    from fqdiff.quant.formats import get_format

    for name in (*config.formats, *([config.ends] if config.ends else [])):
        get_format(name)
    table = inputs.get("fisher")
    single_weights = table is not None and table.recipe.config.get("granularity") == "weight"
    check_target(session.runner.load(inputs["checkpoint"]), config, single_weights)


def parse_grid(text: str) -> list[float]:
    """``2:8:0.25`` -> 2.0, 2.25, ... 8.0. Raises ConfigError."""
    try:
        start, stop, step = (float(part) for part in text.split(":"))
    except ValueError:
        raise ConfigError(f"cannot read the grid '{text}'", "from:to:step in bits per weight, e.g. 2:8:0.25") from None
    if not (0 < start <= stop <= 64 and 0 < step <= 64) or (stop - start) / step >= MOST_POINTS:
        raise ConfigError(
            f"the grid '{text}' is empty, endless or beyond 64 bits", "from:to:step in bits per weight, e.g. 2:8:0.25"
        )
    return [start + k * step for k in range(math.floor((stop - start) / step + 1e-9) + 1)]


def show_pareto(session: Session, inputs: "Mapping[str, Manifest]", config: PlanConfig, grid: list[float]) -> None:
    """Predicted rise and size of the best plan at every point of ``grid``; no artifact."""
    from fqdiff.planning.plans import make_offer, pareto
    from fqdiff.planning.scores import with_gain

    if session.name is not None or session.dry_run:
        raise ConfigError("--pareto makes no artifact", "leave --name and --dry-run out")
    if config.phases > 1:
        raise ConfigError("--pareto knows no phases", "leave --phases out")
    if config.is_measured:
        raise ConfigError("--pareto shows the diagonal's predictions", "leave --predictor and --refine out")
    runner = session.runner
    values = {role: runner.load(manifest) for role, manifest in inputs.items()}
    table_of = with_gain(values.get("fisher"), values.get("trajectory"))
    offer = make_offer(values["checkpoint"], table_of, config, session.seed, runner.context, values.get("dataset"))
    points = pareto(offer, config, grid, runner.context)
    data = {
        "checkpoint": inputs["checkpoint"].id,
        "fisher": inputs["fisher"].id if "fisher" in inputs else None,
        "score": config.score,
        "timestep_weights": config.timestep_weights,
        "points": [vars(point) for point in points],
    }
    session.result(data, lambda: pareto_text(config, points))


def pareto_text(config: PlanConfig, points: "list[Point]") -> str:
    """The table of :func:`show_pareto` for people."""
    cells = [
        [
            f"{p.target_bpw:g}",
            f"{p.target_bytes:,}",
            f"{p.file_bytes:,}" if p.file_bytes is not None else "too small",
            f"{p.predicted:.3e}" if p.predicted is not None else "",
        ]
        for p in points
    ]
    title = f"best plans by predicted rise: score {config.score}, timestep weights {config.timestep_weights}"
    return title + "\n" + table(("bits per weight", "target bytes", "file bytes", "predicted rise"), cells)


def entry_rows(value: "Plan") -> list[dict[str, object]]:
    """One row per parameter: format, bytes, Fisher value, what it is predicted to do, and the next better format."""
    return [
        {
            "parameter": e.parameter,
            "block": e.block,
            "weights": prod(e.shape),
            "format": e.format,
            "granularity": e.granularity,
            "range": e.range,
            "rounding": e.rounding,
            "bytes": e.bytes,
            "score": e.score,
            "predicted": e.predicted,
            "constraint": e.constraint,
            "rule": e.rule,
            "next": next_better(e),
        }
        for e in value.entries
    ]


def next_better(entry: "PlanEntry") -> dict[str, object] | None:
    """The cheapest alternative that is predicted less, with the bytes that it takes more."""
    if entry.predicted is None:
        return None
    better = [a for a in entry.alternatives if a.predicted < entry.predicted]
    if not better:
        return None
    best = min(better, key=lambda a: a.bytes)
    return {
        "format": best.format,
        "granularity": best.granularity,
        "more_bytes": best.bytes - entry.bytes,
        "predicted": best.predicted,
    }


def title(manifest: "Manifest", value: "Plan") -> str:
    """One line: what the plan is and how large its file will be."""
    size = f"{value.bits_per_weight:.3f} bits per weight, {mebibytes(value.file_bytes)}"
    return f"plan {manifest.id}: {value.strategy}, {size}"


def activations_text(value: "Plan", listed: bool = False) -> list[str]:
    """How many sites are in which format of activations; ``listed``: also which are in the rarer one."""
    counts = Counter(value.activations.values()).most_common()
    if not counts:
        return []
    total = f"activations: {', '.join(f'{name} at {count} sites' for name, count in counts)}; their scales come on top"
    rare = [site for site, name in value.activations.items() if name != counts[0][0]]
    return [total, *([f"{counts[-1][0]}: {', '.join(rare)}"] if rare and listed else [])]


def less_than(bound: float, predicted: float) -> str:
    """How near to the best a plan is known to be."""
    gap = 1 - bound / predicted if predicted > 0 else 0.0
    if gap < PROVEN:
        return "; no plan that fits is predicted less"
    return f"; no plan that fits is predicted less than {bound:.4g}, {100 * gap:.2g} % below"


def facts_text(value: "Plan") -> list[str]:
    """What the budget was, how much of it is used, and how good the plan is known to be."""
    from fqdiff.planning.refine import AGREEMENT

    b = value.budget
    if b is None:
        return []
    bound = b.lower_bound if b.score != "uniform" else None  # older plans of one width have one that is none
    if b.target_bytes is not None:
        asked = f"target {b.target_bytes:,} bytes, {b.target_bytes - value.file_bytes:,} of them unused"
        best = "" if bound is None else less_than(bound, b.predicted)
        if bound is not None and b.constraint == "none" and b.predictor == "diagonal":
            best = "; no plan is predicted less"
    else:
        asked = f"predicted rise at most {b.max_loss_increase:g}"
        best = f"; no plan that keeps it is smaller than {math.ceil(bound):,} bytes" if bound is not None else ""
    weights = f", timestep weights {b.timestep_weights}" if b.score not in ("trajectory", "weight-mse") else ""
    facts = [f"{asked}; constraint: {b.constraint}", f"score {b.score}{weights}: predicted {b.predicted:.4g}{best}"]
    unit = "steps x {} sampler runs" if b.score == "trajectory" else "timesteps x {} training images"
    calibration = f"{b.calibration_timesteps} {unit.format(b.calibration_samples)}"
    if b.score in RIVALS:
        facts.append(f"score {b.score} looked at {calibration}")
    if b.swaps is not None and b.diagonal is not None:
        gain = 1 - b.predicted / b.diagonal if b.diagonal > 0 else 0.0
        facts.append(
            f"predictor {b.predictor}, {calibration}: local optimum, {b.swaps} swaps; predicted {100 * gain:.1f} % less than "
            f"the diagonal's plan ({b.diagonal:.4g})"
        )
    if b.measured is not None:
        ratio = f", {b.predicted / b.measured:.3f} of it predicted" if b.measured > 0 else ""
        apart = abs(b.predicted - b.measured) > AGREEMENT * b.measured
        end = ": they do not agree, for a plan came back or no more were to be measured" if apart else ""
        facts.append(f"measured {b.measured:.4g} on {calibration}{ratio}; the best of {b.evaluations} plans tried{end}")
    return [*facts, *phases_text(value)]


def phases_text(value: "Plan") -> list[str]:
    """What phases of timesteps bring, and what the best plan without them is predicted to do."""
    p, b = value.phases, value.budget
    if p is None or b is None:
        return []
    bits = 8 * p.read_bytes / value.parameters
    limit = f", at most {p.traffic_bytes:,}" if p.traffic_bytes is not None else ""
    read = f"a timestep reads {p.read_bytes:,.0f} bytes of payload on average ({bits:.3f} bits per weight){limit}"
    phased = sum(base_format(e.format) != e.format for e in value.entries)
    if not phased:
        why = "every stored bit is worth reading at every timestep, so that they save no byte of the file"
        return [f"{p.count} phases change nothing: {why}", f"{read}; --traffic-bpw limits it"]
    gain = 1 - b.predicted / p.single_predicted if p.single_predicted > 0 else 0.0
    return [
        f"{p.count} phases: {phased} tensors are read with fewer bits in some; {read}",
        f"without phases, within the same limits: predicted {p.single_predicted:.4g} with a file of {p.single_bytes:,} bytes; "
        f"phases are predicted {100 * gain:.1f} % less, for {value.file_bytes - p.single_bytes:+,} bytes of file",
    ]


def base_format(name: str) -> str:
    """A format's name without the bits of its phases."""
    return name.partition(":")[0]


def block_rows(value: "Plan") -> list[dict[str, object]]:
    """Block by block: how many weights go to which format, payload bytes before and after, the predicted rise."""
    rows: list[dict[str, object]] = []
    for block in BLOCKS:
        entries = [e for e in value.entries if e.block == block]
        formats: dict[str, int] = {}
        for e in entries:
            for name, count in e.weights_by_format.items():
                stored = base_format(name)
                formats[stored] = formats.get(stored, 0) + count
        rows.append(
            {
                "block": block,
                "tensors": sum(len(e.shape) >= 2 for e in entries),
                "weights": sum(prod(e.shape) for e in entries),
                "formats": formats,
                "bytes_float32": sum(4 * prod(e.shape) for e in entries),
                "bytes_planned": sum(e.bytes for e in entries),
                "predicted": sum(e.predicted or 0.0 for e in entries),
            }
        )
    return rows


def budget_text(manifest: "Manifest", value: "Plan") -> str:
    """The table of :func:`block_rows` for people, and how good the plan is known to be."""
    from fqdiff.quant.formats import FORMATS

    stored = {base_format(name) for e in value.entries for name in e.weights_by_format}
    used = [name for name in FORMATS if name in stored]
    cells = []
    for row in block_rows(value):
        formats, weights, size = row["formats"], row["weights"], row["bytes_planned"]
        assert isinstance(formats, dict)
        assert isinstance(weights, int)
        assert isinstance(size, int)
        counts = [f"{formats[f]:,}" if f in formats else "" for f in used]
        bits = f"{8 * size / weights:.2f}" if weights else ""
        cells.append([str(row["block"]), *counts, bits, f"{size:,}", f"{row['predicted']:.2e}"])
    payload = sum(e.bytes for e in value.entries)
    cells.append(["header", *([""] * (len(used) + 1)), f"{value.file_bytes - payload:,}", ""])
    cells.append(["file", *([""] * len(used)), f"{value.bits_per_weight:.2f}", f"{value.file_bytes:,}", ""])
    header = ("block", *(f"in {f}" for f in used), "bits per weight", "bytes", "predicted")
    return "\n".join([title(manifest, value), table(header, cells), *facts_text(value), *activations_text(value)])
