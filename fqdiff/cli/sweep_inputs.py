"""What a sweep's file has by name: Fisher tables and calibration sets, as settings or as references to the store."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fqdiff.cli.fisher import TRAJECTORY_RUNS
from fqdiff.cli.session import Session, checked_settings
from fqdiff.cli.sweep_words import blaming
from fqdiff.configs import CalibrateConfig, FisherConfig, calibration_settings
from fqdiff.errors import ConfigError, LineageError, require

if TYPE_CHECKING:
    from fqdiff.store.manifest import Manifest
    from fqdiff.sweep.cells import Source, Subject

KINDS = {"fisher": "Fisher table", "calibration": "calibration set"}


@dataclass(frozen=True)
class FisherSettings:
    """A Fisher table to measure, and its seed."""

    config: FisherConfig
    seed: int


@dataclass(frozen=True)
class CalibrationSettings:
    """Settings of a calibration set to record, its seed, and the name of the table that weighs its timesteps, empty for none."""

    settings: Mapping[str, object]
    seed: int
    fisher: str


def read_fisher(name: str, value: object, path: Path) -> FisherSettings | str:
    """``[fisher.NAME]`` of a file, its settings checked; a reference as it is."""
    if isinstance(value, str):
        return value
    given, seed = _with_seed("fisher", name, value, path)
    runs = {"samples": TRAJECTORY_RUNS} if given.get("kind") == "trajectory" else {}
    settings = checked_settings(FisherConfig, given, f"fisher.{name}", f"[fisher.{name}] of {path}")
    with blaming(f"fisher.{name}"):
        return FisherSettings(FisherConfig(**{**runs, **settings}), seed)  # type: ignore[arg-type]


def read_calibration(name: str, value: object, path: Path) -> CalibrationSettings | str:
    """``[calibration.NAME]`` of a file, the types of its settings checked; a reference as it is."""
    if isinstance(value, str):
        return value
    given, seed = _with_seed("calibration", name, value, path)
    fisher = given.pop("fisher", "")
    require(isinstance(fisher, str), f"calibration.{name}.fisher is {fisher!r}", "a text in quotes")
    settings = checked_settings(CalibrateConfig, given, f"calibration.{name}", f"[calibration.{name}] of {path}")
    return CalibrationSettings(settings, seed, str(fisher))


def _with_seed(kind: str, name: str, value: object, path: Path) -> tuple[dict[str, object], int]:
    """The settings of a table of the file, and its seed. Raises ConfigError where it is no table, or the seed no number."""
    if not isinstance(value, dict):
        raise ConfigError(
            f"{kind}.{name} in {path} is {value!r}"[:200], f"settings of a {KINDS[kind]}, or the name of a stored one"
        )
    seed = value.get("seed", 0)
    if type(seed) is not int or seed < 0:
        raise ConfigError(f"{kind}.{name}.seed is {seed!r}", "a whole number, 0 or more")
    return {key: one for key, one in value.items() if key != "seed"}, seed


def fisher_table(session: Session, name: str, value: FisherSettings | str, subject: "Subject") -> "Source":
    """The step that measures a table, or the stored table that ``value`` names, which must be of the sweep's model."""
    from fqdiff.pipeline import Step

    if isinstance(value, str):
        return _stored(session, "fisher", name, value, subject)
    inputs = {"checkpoint": subject.checkpoint, "dataset": subject.dataset}
    return Step("fisher", inputs, value.config, value.seed)


def calibration_set(
    session: Session,
    name: str,
    value: CalibrationSettings | str,
    subject: "Subject",
    tables: "Mapping[str, Source]",
) -> "Source":
    """The step that records a calibration set, or the stored set that ``value`` names, which must be of the sweep's model.

    With the defaults of ``fqdiff calibrate``. ``tables``: the file's Fisher tables.
    """
    from fqdiff.pipeline import Step

    if isinstance(value, str):
        return _stored(session, "calibration", name, value, subject)
    where = f"calibration.{name}"
    with blaming(where):
        config = CalibrateConfig(**calibration_settings(value.settings, subject.num_train_timesteps))
    inputs = {"checkpoint": subject.checkpoint}
    if config.scheme == "fisher":
        inputs["fisher"] = tables[chosen("fisher", value.fisher, tables, where)]
    elif value.fisher:
        raise ConfigError(f"{where}: '{config.scheme}' has no use for a Fisher table", 'add scheme = "fisher"')
    if config.source == "data":
        inputs["dataset"] = subject.dataset
    return Step("calibrate", inputs, config, value.seed)


def chosen(kind: str, name: str, known: Mapping[str, object], where: str) -> str:
    """``name``, or that of the only one there is of ``known``. Raises ConfigError for names that the file does not have."""
    what = KINDS[kind]
    if not name:
        hint = f'{kind} = "NAME", of a [{kind}.NAME]'
        require(len(known) == 1, f"{where}: which of {len(known)} {what}s?", hint)
        return next(iter(known))
    require(name in known, f"{where}: no {what} is called '{name}'", f"the file has: {', '.join(known) or 'none'}")
    return name


def _stored(session: Session, kind: str, name: str, ref: str, subject: "Subject") -> "Manifest":
    found = session.store.resolve(ref, (kind,))
    source = found.input("checkpoint")
    if source is None or source.id != subject.checkpoint.id:
        raise LineageError(
            f"the {KINDS[kind]} {found.id}, '{name}', is of another model than the sweep's {subject.checkpoint.id}",
            "name one of that model, or give settings: it is then made",
        )
    return found
