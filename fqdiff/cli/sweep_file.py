"""The TOML file of a sweep: read and checked, and the cells that it stands for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_origin, get_type_hints

from fqdiff.cli.fid import choose_features
from fqdiff.cli.import_ import import_step
from fqdiff.cli.plan import choose_strategy
from fqdiff.cli.plan_budget import budget_defaults
from fqdiff.cli.session import Session, checked_settings, only_input, read_toml
from fqdiff.cli.show import byte_count
from fqdiff.cli.sweep_inputs import (
    CalibrationSettings,
    FisherSettings,
    calibration_set,
    chosen,
    fisher_table,
    read_calibration,
    read_fisher,
)
from fqdiff.cli.sweep_ways import GivenWay, read_ways, ways_of
from fqdiff.cli.sweep_words import MOST_CELLS, blaming, in_words
from fqdiff.cli.train import choose_dataset
from fqdiff.configs import (
    RIVALS,
    ClassifierConfig,
    CompareConfig,
    PlanConfig,
    SampleConfig,
)
from fqdiff.errors import ConfigError, require

if TYPE_CHECKING:
    from fqdiff.store.manifest import Manifest
    from fqdiff.sweep.cells import Cell, Source, Subject, Tables, Way
    from fqdiff.values import ModelSpec

HINT = "a TOML file as docs/sweeps.md describes it"
STAGES = {"sample": SampleConfig, "classifier": ClassifierConfig, "compare": CompareConfig}
LISTS = ("plans", "quantize")
NAMED = ("fisher", "calibration")
PRETRAINED = "pretrained:"
PLAN_WORDS = ("name", "fisher", "trajectory", "uniform", "target_size")  # beside the fields of a PlanConfig


@dataclass(frozen=True)
class SweepSettings:
    """What all cells share. ``model``: a checkpoint's name or id, or ``pretrained:NAME``; ``features``: empty for the default.

    ``dataset``: the images that a pretrained model is measured with, empty for its own.
    """

    model: str = ""
    dataset: str = ""
    seeds: tuple[int, ...] = (0,)
    features: str = ""

    def __post_init__(self) -> None:
        require(self.model != "", "the sweep names no model", 'model = "NAME" in [sweep], or "pretrained:mnist-small"')
        require(bool(self.seeds), "no seeds to sample with", "e.g. seeds = [0, 1]")
        require(len(set(self.seeds)) == len(self.seeds), f"seeds {list(self.seeds)} name one twice", "list each once")
        require(all(seed >= 0 for seed in self.seeds), f"seeds {list(self.seeds)}", "use 0 or more")


@dataclass(frozen=True)
class SweepFile:
    """A file, checked. ``fisher``, ``calibration``: tables and sets by the name that the file calls them by, as settings or as
    a reference to the store.

    ``plans``: settings of every plan of the grid, with the words that are no setting of a plan; ``quantize``: every way to
    quantize. ``stages``: settings given for sampling, the classifier and comparisons.
    """

    name: str
    sweep: SweepSettings
    fisher: Mapping[str, FisherSettings | str]
    calibration: Mapping[str, CalibrationSettings | str]
    plans: tuple[Mapping[str, object], ...]
    quantize: tuple[GivenWay, ...]
    stages: Mapping[str, Mapping[str, object]]


def read_sweep(path: Path) -> SweepFile:
    """The sweep in a file. Raises ConfigError naming what is unknown, missing or of another type."""
    data = read_toml(path, HINT)
    known = ("sweep", *NAMED, *LISTS, *STAGES)
    for name, value in data.items():
        if name not in known:
            raise ConfigError(f"'{name}' in {path} is no part of a sweep", f"known: {', '.join(known)}")
        if not isinstance(value, list if name in LISTS else dict) or (
            name in LISTS and not all(isinstance(one, dict) for one in value)
        ):
            written = f"[[{name}]]" if name in LISTS else f"[{name}]"
            raise ConfigError(f"{name} in {path} is {value!r}"[:200], f"write tables, as in {written}")
    if "sweep" not in data or not data.get("plans"):
        raise ConfigError(f"{path} has no {'[sweep]' if 'sweep' not in data else '[[plans]]'}", HINT)
    sweep = SweepSettings(**checked_settings(SweepSettings, data["sweep"], "sweep", f"[sweep] of {path}"))  # type: ignore[arg-type]
    stages = {
        name: checked_settings(kind, data.get(name, {}), name, f"[{name}] of {path}") for name, kind in STAGES.items()
    }
    fisher = {name: read_fisher(name, value, path) for name, value in data.get("fisher", {}).items()}
    sets = {name: read_calibration(name, value, path) for name, value in data.get("calibration", {}).items()}
    plans, ways = read_plans(data["plans"], path), read_ways(data.get("quantize", [{}]), path)
    names = list(dict.fromkeys(str(point["name"]) for point in plans if "name" in point))
    for way in ways:
        for name in way.plans:
            known_names = f"the file has: {', '.join(names) or 'none'}"
            require(name in names, f"quantize[{way.entry}].plans: no [[plans]] have the name '{name}'", known_names)
    return SweepFile(path.stem, sweep, fisher, sets, plans, ways, stages)


def read_plans(entries: list[dict[str, object]], path: Path) -> tuple[dict[str, object], ...]:
    """The settings of every point of every ``[[plans]]``, their types checked."""
    from fqdiff.sweep.grid import expand

    hints = get_type_hints(PlanConfig)
    lists = {f.name for f in fields(PlanConfig) if get_origin(hints[f.name]) is tuple}
    found: list[dict[str, object]] = []
    for number, entry in enumerate(entries, start=1):
        name = f"plans[{number}]"
        for point in expand(entry, lists, name):
            for word in PLAN_WORDS:
                require(
                    isinstance(point.get(word, ""), str), f"{name}.{word} is {point.get(word)!r}", "a text in quotes"
                )
            settings = {key: value for key, value in point.items() if key not in PLAN_WORDS}
            checked = checked_settings(PlanConfig, settings, name, f"[[plans]] number {number} of {path}")
            found.append({**point, **checked})
            require(
                len(found) <= MOST_CELLS, f"plans in {path} stand for more than {MOST_CELLS:,}", "list fewer values"
            )
    _check_distinct("plans", [nameless(point) for point in found])
    return tuple(found)


def nameless(point: Mapping[str, object]) -> dict[str, object]:
    """What ``point`` says of a plan, without what the file calls it."""
    return {key: value for key, value in point.items() if key != "name"}


def _check_distinct(label: str, points: Sequence[Mapping[str, object]]) -> None:
    seen: list[Mapping[str, object]] = []
    for point in points:
        require(point not in seen, f"{label} name {in_words(point) or 'the default'} twice", "list each once")
        seen.append(point)


def _built(kind: type[Any], settings: Mapping[str, object], label: str) -> Any:
    """A config, its refusals prefixed with where in the file they come from."""
    with blaming(label):
        return kind(**settings)


# --- from settings to cells ------------------------------------------------------------------------------------------


def make_cells(session: Session, file: SweepFile, inception_weights: Path | None) -> "list[Cell]":
    """Every cell of the sweep: plan by plan, way to quantize by way, seed by seed. Makes nothing.

    Raises the error of whatever would be refused by the single commands before they work.
    """
    from fqdiff.sweep.cells import make_cell
    from fqdiff.sweep.settings import settings_of

    subject = make_subject(session, file, inception_weights)
    tables = {name: fisher_table(session, name, value, subject) for name, value in file.fisher.items()}
    sets = {name: calibration_set(session, name, value, subject, tables) for name, value in file.calibration.items()}
    ways = ways_of(file.quantize, sets)
    chosen_ways = [ways_for(point, ways) for point in file.plans]
    total = sum(map(len, chosen_ways)) * len(file.sweep.seeds)
    require(total <= MOST_CELLS, f"the sweep has {total:,} cells", f"at most {MOST_CELLS:,}")
    cells: list[Cell] = []
    for point, own in zip(file.plans, chosen_ways, strict=True):
        read, plan = plan_of(point, tables)
        _check_distinct("quantize", [given.settings for given, _ in own])
        for given, way in own:
            settings = settings_of("plan", plan, point) | settings_of(
                "quantize", way.treatment.quantize, given.settings
            )
            labels = in_words(nameless(point)) or plan.strategy, in_words(given.settings)
            for seed in file.sweep.seeds:
                with blaming(f"quantize ({labels[1]}) with plans ({labels[0]})"):
                    cells.append(make_cell(len(cells) + 1, labels, settings, subject, read, plan, way, seed))
    return cells


def ways_for(point: Mapping[str, object], ways: "list[tuple[GivenWay, Way]]") -> "list[tuple[GivenWay, Way]]":
    """Those of ``ways`` that are for a plan. Raises ConfigError where there are none."""
    own = [(given, way) for given, way in ways if not given.plans or point.get("name") in given.plans]
    words = in_words(nameless(point))
    require(bool(own), f"no [[quantize]] is for plans ({words})", "name them in its plans, or leave plans out")
    return own


def make_subject(session: Session, file: SweepFile, inception_weights: Path | None) -> "Subject":
    """The model with its images, and how all cells are sampled and compared."""
    from fqdiff.pipeline import Step
    from fqdiff.store.pretrained import open_model
    from fqdiff.store.sources import load_dataset
    from fqdiff.sweep.cells import Subject

    checkpoint: Step | Manifest
    dataset: Step | Manifest
    spec: ModelSpec
    runner, ref = session.runner, file.sweep.model
    if ref.startswith(PRETRAINED):
        model = open_model(ref)
        spec, name = model.model.spec, file.sweep.dataset or model.dataset
        images = choose_dataset(session, name, spec.image_shape[1])
        checkpoint, dataset = import_step(model, images), Step("dataset", {}, images)
        held_out = len(load_dataset(images, 0, runner.context).reference)
    else:
        require(not file.sweep.dataset, f"'{ref}' has a data set of its own", "leave dataset out of [sweep]")
        checkpoint = session.resolve(ref, ("checkpoint",))
        dataset = only_input(session, checkpoint, "dataset")
        spec, held_out = runner.load(checkpoint).spec, len(runner.load(dataset).reference)
    features = choose_features(session, file.sweep.features or None, inception_weights, dataset)
    if isinstance(features, Step):
        config = _built(ClassifierConfig, file.stages["classifier"], "classifier")
        features = Step("classifier", {"dataset": dataset}, config)
    elif file.stages["classifier"]:
        raise ConfigError(f"features are {features.value.name}: no classifier is trained", "leave [classifier] out")
    defaults: dict[str, object] = {"count": min(SampleConfig.count, held_out)}
    total = spec.noise_schedule().num_train_timesteps
    if file.stages["sample"].get("sampler") == "ddpm":
        defaults["steps"] = total
    sample: SampleConfig = _built(SampleConfig, {**defaults, **file.stages["sample"]}, "sample")
    compare: CompareConfig = _built(CompareConfig, file.stages["compare"], "compare")
    for asked, name in ((compare.count, "compare.count"), (sample.count, "sample.count")):
        require(asked <= held_out, f"{name} is {asked}; there are {held_out} held-out images", "lower it")
    require(compare.count <= sample.count, f"compare.count is {compare.count}, of {sample.count} samples", "lower it")
    return Subject(checkpoint, dataset, features, sample, compare, total)


def plan_of(point: Mapping[str, object], tables: "Mapping[str, Source]") -> "tuple[Tables, PlanConfig]":
    """A plan's settings as the command would resolve them, and the tables that it reads."""
    from fqdiff.sweep.cells import Tables

    where = f"plans ({in_words(nameless(point))})" if nameless(point) else "plans"
    settings = {key: value for key, value in point.items() if key not in PLAN_WORDS}
    given = point.keys() - {"name", "fisher", "trajectory", "strategy"}
    with blaming(where):
        implied = choose_strategy(set(given), set())
    strategy = str(settings.pop("strategy", implied or PlanConfig.strategy))
    require(
        implied in (None, strategy), f"{where}: these settings belong to strategy '{implied}'", "leave strategy out"
    )
    if "uniform" in point:
        require("low" not in settings, f"{where}: uniform and low", "leave low out")
        settings["low"] = point["uniform"]
    if "target_size" in point:
        settings["target_bytes"] = byte_count("target_size", str(point["target_size"]))
    budget = strategy == "budget"
    needs_table = strategy != "uniform" and not (budget and settings.get("score") in ("weight-mse", *RIVALS))
    named = point.get("fisher")
    if named is None and needs_table:
        named = chosen("fisher", "", tables, where)
    require(named is None or strategy != "uniform", f"{where}: uniform plans read no Fisher table", "leave fisher out")
    other = point.get("trajectory")
    for name in filter(None, (named, other)):
        chosen("fisher", str(name), tables, where)
    table = tables[str(named)] if named is not None else None
    kind = str(table.recipe.config.get("kind")) if table is not None else ""
    defaults = budget_defaults(table.recipe.config if table is not None else {}, settings) if budget else {}
    config: PlanConfig = _built(PlanConfig, {**defaults, "strategy": strategy, **settings}, where)
    gain = config.timestep_weights == "gain" and kind != "trajectory"
    require(gain or other is None, f"{where}: trajectory is for timestep_weights gain alone", "leave it out")
    if not gain:
        return Tables(table), config
    require(other is not None, f"{where}: whose gain?", 'trajectory = "NAME", of a [fisher.NAME] of kind trajectory')
    runs = tables[str(other)]
    require(
        runs.recipe.config.get("kind") == "trajectory"
        and runs.recipe.config.get("window") in (0, runs.recipe.config.get("steps")),
        f"{where}: the Fisher table '{other}' has not measured the sampler's gain",
        "one of kind trajectory, without a window",
    )
    return (Tables(runs) if table is None else Tables(table, runs)), config
