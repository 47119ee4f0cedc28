"""The TOML file of a sweep: read and checked, and the cells that it stands for."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_origin, get_type_hints

from fqdiff.cli.fid import choose_features
from fqdiff.cli.fisher import TRAJECTORY_RUNS
from fqdiff.cli.import_ import import_step
from fqdiff.cli.plan import choose_strategy
from fqdiff.cli.plan_budget import budget_defaults
from fqdiff.cli.session import Session, checked_settings, only_input, read_toml
from fqdiff.cli.show import byte_count
from fqdiff.cli.train import choose_dataset
from fqdiff.configs import (
    RIVALS,
    ClassifierConfig,
    CompareConfig,
    FisherConfig,
    PlanConfig,
    QuantizeConfig,
    SampleConfig,
)
from fqdiff.errors import ConfigError, LineageError, require

if TYPE_CHECKING:
    from fqdiff.store.manifest import Manifest
    from fqdiff.sweep.cells import Cell, Source, Subject, Tables
    from fqdiff.values import ModelSpec

HINT = "a TOML file as docs/sweeps.md describes it"
STAGES = {"sample": SampleConfig, "classifier": ClassifierConfig, "compare": CompareConfig}
LISTS = ("plans", "quantize")
PRETRAINED = "pretrained:"
PLAN_WORDS = ("fisher", "trajectory", "uniform", "target_size")  # what a plan may say beside the fields of a PlanConfig
MOST_CELLS = 10_000


@dataclass(frozen=True)
class SweepSettings:
    """What all cells share. ``model``: a checkpoint's name or id, or ``pretrained:NAME``; ``features``: empty for the default."""

    model: str = ""
    seeds: tuple[int, ...] = (0,)
    features: str = ""

    def __post_init__(self) -> None:
        require(self.model != "", "the sweep names no model", 'model = "NAME" in [sweep], or "pretrained:mnist-small"')
        require(bool(self.seeds), "no seeds to sample with", "e.g. seeds = [0, 1]")
        require(len(set(self.seeds)) == len(self.seeds), f"seeds {list(self.seeds)} name one twice", "list each once")
        require(all(seed >= 0 for seed in self.seeds), f"seeds {list(self.seeds)}", "use 0 or more")


@dataclass(frozen=True)
class FisherSettings:
    """A Fisher table to measure, and its seed."""

    config: FisherConfig
    seed: int


@dataclass(frozen=True)
class SweepFile:
    """A file, checked. ``fisher``: tables by the name that plans call them by, as settings or as a reference to the store.

    ``plans``: settings of every plan of the grid, with the words that are no setting of a plan; ``quantize``: those of every
    way to quantize. ``stages``: settings given for sampling, the classifier and comparisons.
    """

    name: str
    sweep: SweepSettings
    fisher: Mapping[str, FisherSettings | str]
    plans: tuple[Mapping[str, object], ...]
    quantize: tuple[Mapping[str, object], ...]
    stages: Mapping[str, Mapping[str, object]]


def read_sweep(path: Path) -> SweepFile:
    """The sweep in a file. Raises ConfigError naming what is unknown, missing or of another type."""
    data = read_toml(path, HINT)
    known = ("sweep", "fisher", *LISTS, *STAGES)
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
    tables = {name: _fisher(name, value, path) for name, value in data.get("fisher", {}).items()}
    plans = _grid(PlanConfig, "plans", data["plans"], path)
    quantize = _grid(QuantizeConfig, "quantize", data.get("quantize", [{}]), path)
    _check_distinct("plans", plans)
    _check_distinct("quantize", quantize)
    return SweepFile(path.stem, sweep, tables, plans, quantize, stages)


def _fisher(name: str, value: object, path: Path) -> FisherSettings | str:
    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        raise ConfigError(
            f"fisher.{name} in {path} is {value!r}"[:200], "settings of a Fisher table, or a stored table's name"
        )
    given = {key: one for key, one in value.items() if key != "seed"}
    seed = value.get("seed", 0)
    require(type(seed) is int and seed >= 0, f"fisher.{name}.seed is {seed!r}", "a whole number, 0 or more")
    runs = {"samples": TRAJECTORY_RUNS} if value.get("kind") == "trajectory" else {}
    settings = checked_settings(FisherConfig, given, f"fisher.{name}", f"[fisher.{name}] of {path}")
    return FisherSettings(_built(FisherConfig, {**runs, **settings}, f"fisher.{name}"), seed)


def _grid(kind: type[Any], label: str, entries: list[dict[str, object]], path: Path) -> tuple[dict[str, object], ...]:
    """The settings of every point of every entry, their types checked."""
    from fqdiff.sweep.grid import expand

    hints = get_type_hints(kind)
    lists = {f.name for f in fields(kind) if get_origin(hints[f.name]) is tuple}
    words = PLAN_WORDS if kind is PlanConfig else ()
    found = []
    for number, entry in enumerate(entries, start=1):
        name = f"{label}[{number}]"
        for point in expand(entry, lists, name):
            for word in words:
                require(
                    isinstance(point.get(word, ""), str), f"{name}.{word} is {point.get(word)!r}", "a text in quotes"
                )
            settings = {key: value for key, value in point.items() if key not in words}
            checked = checked_settings(kind, settings, name, f"[[{label}]] number {number} of {path}")
            found.append({**point, **checked})
            require(
                len(found) <= MOST_CELLS, f"{label} in {path} stand for more than {MOST_CELLS:,}", "list fewer values"
            )
    return tuple(found)


def _check_distinct(label: str, points: tuple[Mapping[str, object], ...]) -> None:
    seen: list[Mapping[str, object]] = []
    for point in points:
        require(point not in seen, f"{label} name {in_words(point) or 'the default'} twice", "list each once")
        seen.append(point)


def _built(kind: type[Any], settings: Mapping[str, object], label: str) -> Any:
    """A config, its refusals prefixed with where in the file they come from."""
    try:
        return kind(**settings)
    except ConfigError as error:
        raise ConfigError(f"{label}: {error.message}", error.hint) from None


def in_words(settings: Mapping[str, object]) -> str:
    """``ratio 0.1, low int8``."""
    from fqdiff.sweep.cells import plain

    return ", ".join(f"{name} {plain(value)}" for name, value in settings.items())


# --- from settings to cells ------------------------------------------------------------------------------------------


def make_cells(session: Session, file: SweepFile, inception_weights: Path | None) -> "list[Cell]":
    """Every cell of the sweep: plan by plan, way to quantize by way, seed by seed. Makes nothing.

    Raises the error of whatever would be refused by the single commands before they work.
    """
    from fqdiff.sweep.cells import make_cell, settings_of

    total = len(file.plans) * len(file.quantize) * len(file.sweep.seeds)
    require(total <= MOST_CELLS, f"the sweep has {total:,} cells", f"at most {MOST_CELLS:,}")
    subject = make_subject(session, file, inception_weights)
    tables = {name: fisher_table(session, name, value, subject) for name, value in file.fisher.items()}
    ways = [(given, _built(QuantizeConfig, given, f"quantize ({in_words(given)})")) for given in file.quantize]
    cells: list[Cell] = []
    for point in file.plans:
        read, plan = plan_of(point, tables)
        for given, quantize in ways:
            settings = settings_of("plan", plan, point) | settings_of("quantize", quantize, given)
            labels = in_words(point) or plan.strategy, in_words(given)
            for seed in file.sweep.seeds:
                cells.append(make_cell(len(cells) + 1, labels, settings, subject, read, plan, quantize, seed))
    return cells


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
        spec, images = model.model.spec, choose_dataset(session, model.dataset, model.model.spec.image_shape[1])
        checkpoint, dataset = import_step(model, images), Step("dataset", {}, images)
        held_out = len(load_dataset(images, 0, runner.context).reference)
    else:
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
    if file.stages["sample"].get("sampler") == "ddpm":
        defaults["steps"] = spec.noise_schedule().num_train_timesteps
    sample: SampleConfig = _built(SampleConfig, {**defaults, **file.stages["sample"]}, "sample")
    compare: CompareConfig = _built(CompareConfig, file.stages["compare"], "compare")
    for asked, name in ((compare.count, "compare.count"), (sample.count, "sample.count")):
        require(asked <= held_out, f"{name} is {asked}; there are {held_out} held-out images", "lower it")
    require(compare.count <= sample.count, f"compare.count is {compare.count}, of {sample.count} samples", "lower it")
    return Subject(checkpoint, dataset, features, sample, compare)


def fisher_table(session: Session, name: str, value: FisherSettings | str, subject: "Subject") -> "Source":
    """The step that measures a table, or the stored table that ``value`` names, which must be of the sweep's model."""
    from fqdiff.pipeline import Step

    if isinstance(value, FisherSettings):
        inputs = {"checkpoint": subject.checkpoint, "dataset": subject.dataset}
        return Step("fisher", inputs, value.config, value.seed)
    found = session.store.resolve(value, ("fisher",))
    source = found.input("checkpoint")
    if source is None or source.id != subject.checkpoint.id:
        raise LineageError(
            f"the Fisher table {found.id}, '{name}', is of another model than the sweep's {subject.checkpoint.id}",
            "name a table of that model, or give settings: it is then measured",
        )
    return found


def plan_of(point: Mapping[str, object], tables: "Mapping[str, Source]") -> "tuple[Tables, PlanConfig]":
    """A plan's settings as the command would resolve them, and the tables that it reads."""
    from fqdiff.sweep.cells import Tables

    where = f"plans ({in_words(point)})" if point else "plans"
    settings = {key: value for key, value in point.items() if key not in PLAN_WORDS}
    given = point.keys() - {"fisher", "trajectory"}
    try:
        implied = choose_strategy(set(given) - {"strategy"}, set())
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.message}", error.hint) from None
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
        require(
            len(tables) == 1, f"{where}: which of {len(tables)} Fisher tables?", 'fisher = "NAME", of a [fisher.NAME]'
        )
        named = next(iter(tables))
    require(named is None or strategy != "uniform", f"{where}: uniform plans read no Fisher table", "leave fisher out")
    for name in (named, point.get("trajectory")):
        known = ", ".join(tables) or "none"
        require(
            name is None or name in tables, f"{where}: no Fisher table is called '{name}'", f"the file has: {known}"
        )
    table = tables[str(named)] if named is not None else None
    kind = str(table.recipe.config.get("kind")) if table is not None else ""
    defaults = budget_defaults(table.recipe.config if table is not None else {}, settings) if budget else {}
    config: PlanConfig = _built(PlanConfig, {**defaults, "strategy": strategy, **settings}, where)
    other = point.get("trajectory")
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
