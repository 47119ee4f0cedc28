"""The file of a plan. Loaded, it is checked as if somebody had edited it."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fqdiff.configs import ACTIVATION_FORMATS, PREDICTORS, RANGES, ROUNDINGS, SCORES, STRATEGIES, TIMESTEP_WEIGHTS
from fqdiff.errors import ConfigError
from fqdiff.groups import PLACES
from fqdiff.quant.formats import MOST_PHASES, PerTensor, get_format, parse_granularity, scales_of
from fqdiff.quant.packed import read_bytes, stored_bytes
from fqdiff.store.fields import count, items, mapping, record, text
from fqdiff.store.files import JSON_LIMIT, read_json, readable
from fqdiff.values import (
    Budget,
    Phases,
    Plan,
    PlanEntry,
)

PLAN_SCHEMA = 3
PLUGIN = re.compile(r".+ of [^\s]+ [^\s]+")  # a strategy, its distribution and version: fqdiff.planning.plugins
CONSTRAINTS = ("none", "budget", "max-loss-increase", "traffic", "budget and traffic")


def save_plan(value: Plan, directory: Path) -> None:
    """``plan.json``."""
    budget = asdict(value.budget) if value.budget is not None else None
    head = {"schema": PLAN_SCHEMA, "strategy": value.strategy, "totals": _totals(value), "budget": budget}
    head |= {"phases": asdict(value.phases)} if value.phases is not None else {}
    head["timestep_weights"] = value.timestep_weights
    head |= {"activations": dict(value.activations)} if value.activations else {}
    # One line per entry: what was considered stays on it, and a large model's plan within what is read as JSON.
    lines = ",\n".join(json.dumps(asdict(e), allow_nan=False) for e in value.entries)
    content = json.dumps(head, indent=1, allow_nan=False).removesuffix("\n}") + f',\n "entries": [\n{lines}\n]}}\n'
    if len(content) > JSON_LIMIT:
        raise ConfigError(
            f"a plan of {len(content):,} bytes of JSON is more than the {JSON_LIMIT:,} that are read",
            "give fewer formats to choose from",
        )
    (directory / "plan.json").write_text(content)


def _totals(plan: Plan) -> dict[str, int | float]:
    return {"file_bytes": plan.file_bytes, "parameters": plan.parameters, "bits_per_weight": plan.bits_per_weight}


def load_plan(directory: Path) -> Plan:
    """A plan whose entries, totals and budget fit each other."""
    path = directory / "plan.json"
    with readable(path, "a plan"):
        data = mapping(read_json(path))
        if data["schema"] != PLAN_SCHEMA:
            raise ValueError(f"schema {str(data['schema'])[:20]}; this fqdiff reads schema {PLAN_SCHEMA}")
        entries = tuple(_plan_entry(e) for e in items(data["entries"]))
        budget = record(Budget, data["budget"]) if data["budget"] is not None else None
        phases = record(Phases, data["phases"]) if "phases" in data else None
        weights = text(data.get("timestep_weights", "uniform"))  # which plans of earlier versions lack
        if re.fullmatch(r"uniform|at:[0-9]{1,9}", weights, re.ASCII) is None:
            raise ValueError(f"its timesteps are weighted by '{weights[:20]}'")
        activations = {site: text(name) for site, name in mapping(data.get("activations", {})).items()}
        if not set(activations.values()) <= set(ACTIVATION_FORMATS):
            raise ValueError("it has activations in an unknown format")
        totals = mapping(data["totals"])
        size = count(totals["file_bytes"])
        value = Plan(text(data["strategy"]), entries, size, budget, phases, weights, activations)
        if not entries or len({e.parameter for e in entries}) < len(entries):
            raise ValueError("it has no entries, or several for one parameter")
        if value.file_bytes < sum(e.bytes for e in entries):
            raise ValueError(f"its file of {value.file_bytes} bytes is smaller than its entries")
        if totals != _totals(value):
            raise ValueError("its totals are not those of its entries")
        _check_strategy(value)
        _check_budget(budget, value)
        _check_phases(value)
        return value


def _check_phases(plan: Plan) -> None:
    described = [(e.shape, get_format(e.format), parse_granularity(e.granularity)) for e in plan.entries]
    counts = {len(fmt.phase_bits) for _, fmt, _ in described if fmt.phase_bits}
    facts = plan.phases
    if facts is None and not counts:
        return
    if facts is None or plan.budget is None or not counts <= {facts.count} or not 1 < facts.count <= MOST_PHASES:
        raise ValueError(f"its tensors have {sorted(counts)} phases, and it speaks of {facts and facts.count}")
    read = sum(read_bytes(*each) for each in described)
    if abs(read - facts.read_bytes) > 1e-6 * read or (facts.traffic_bytes is not None and read > facts.traffic_bytes):
        raise ValueError(f"a timestep reads {read:.0f} bytes; it says {facts.read_bytes:.0f}, or they are too many")
    if facts.single_predicted < 0:
        raise ValueError("it predicts something less than 0")


def _check_strategy(plan: Plan) -> None:
    if plan.strategy not in STRATEGIES and PLUGIN.fullmatch(plan.strategy) is None:
        raise ValueError(f"its strategy is '{plan.strategy[:50]}'")
    if (plan.strategy == "budget") != (plan.budget is not None):
        raise ValueError(f"it is by {plan.strategy[:50]}, and {'has' if plan.budget is not None else 'lacks'} a budget")
    for e in plan.entries:
        weighed = e.predicted is not None and e.constraint is not None and bool(e.alternatives)
        told = e.predicted is not None or e.constraint is not None or bool(e.alternatives)
        if plan.budget is None and told:
            raise ValueError(f"'{e.parameter}' was weighed against others, and there is no budget")
        if plan.budget is not None and (not weighed or e.threshold is not None):
            raise ValueError(f"'{e.parameter}' was not weighed against others, and there is a budget")


def _check_budget(budget: Budget | None, plan: Plan) -> None:
    # What a tensor does beside others may be good: only with cross terms can a prediction be less than 0.
    gram = budget is not None and budget.predictor == "gram"
    if not gram and any(a.predicted < 0 for e in plan.entries for a in e.alternatives):
        raise ValueError("it predicts something less than 0")
    if budget is None:
        return
    if budget.predictor not in PREDICTORS:
        raise ValueError(f"its predictor is '{budget.predictor[:20]}'")
    if budget.score not in SCORES or TIMESTEP_WEIGHTS.fullmatch(budget.timestep_weights) is None:
        raise ValueError(f"its score is '{budget.score[:20]}', timesteps weighted by '{budget.timestep_weights[:20]}'")
    if budget.constraint not in CONSTRAINTS or any(
        e.constraint not in ("none", budget.constraint) for e in plan.entries
    ):
        raise ValueError(f"its constraint is '{budget.constraint[:20]}', or entries name another one")
    # Plans of one width are not searched for, and have no bound, though older ones claim one; older ones by gram have none.
    bound_fits = budget.lower_bound is not None or gram or budget.score == "uniform"
    if (budget.swaps is None) == gram or (budget.diagonal is None) == gram or not bound_fits:
        raise ValueError(f"its search does not fit the predictor {budget.predictor}")
    if (budget.measured is None) != (budget.evaluations == 0) or (budget.measured or 0.0) < 0:
        raise ValueError(f"{budget.evaluations} plans were measured, the best as {budget.measured}")
    if (budget.target_bytes is None) == (budget.max_loss_increase is None):
        raise ValueError("its budget has no target, or two")
    if budget.target_bytes is not None and plan.file_bytes > budget.target_bytes:
        raise ValueError(f"its file of {plan.file_bytes} bytes is over its budget of {budget.target_bytes}")
    predicted = sum(e.predicted or 0.0 for e in plan.entries)
    if abs(predicted - budget.predicted) > 1e-6 * abs(predicted):
        raise ValueError(f"its entries are predicted {predicted:g}, the whole {budget.predicted:g}")
    if budget.max_loss_increase is not None and predicted > budget.max_loss_increase * (1 + 1e-6):
        raise ValueError(f"it is predicted {predicted:g}, over its limit of {budget.max_loss_increase:g}")
    reached = predicted if budget.max_loss_increase is None else plan.file_bytes
    if budget.lower_bound is not None and not 0 <= budget.lower_bound <= reached * (1 + 1e-6):
        raise ValueError(f"it reaches {reached:g}, below its lower bound of {budget.lower_bound:g}")


def _plan_entry(data: Any) -> PlanEntry:
    entry = record(PlanEntry, data)
    fmt, granularity = get_format(entry.format), parse_granularity(entry.granularity)
    if fmt.is_cast and scales_of(granularity) != PerTensor():
        raise ValueError(f"'{entry.parameter}' is {fmt.name}, which has no scales, by {granularity}")
    if entry.block not in PLACES or (entry.score or 0.0) < 0:
        raise ValueError(f"'{entry.parameter}' is in block {entry.block[:20]}, with a Fisher value of {entry.score}")
    if entry.range not in RANGES or entry.rounding not in ROUNDINGS:
        raise ValueError(f"'{entry.parameter}' has range {entry.range[:20]} and rounding {entry.rounding[:20]}")
    size = stored_bytes(entry.shape, fmt, granularity)
    if entry.bytes != size:
        raise ValueError(f"'{entry.parameter}' takes {size} bytes, not {entry.bytes}")
    ways = [(get_format(a.format).name, str(parse_granularity(a.granularity))) for a in entry.alternatives]
    if len(set(ways)) < len(ways) or any(a.range not in RANGES for a in entry.alternatives):
        raise ValueError(f"the alternatives of '{entry.parameter}' name a way twice, or an unknown range")
    own = [
        (a.range, a.bytes, a.predicted)
        for a, way in zip(entry.alternatives, ways, strict=True)
        if way == (entry.format, entry.granularity)
    ]
    if entry.alternatives and own != [(entry.range, entry.bytes, entry.predicted)]:
        raise ValueError(f"'{entry.parameter}' is not what it says of {entry.format}")
    return entry
