"""``[[quantize]]`` of a sweep's file: what is done when its plans are carried out, and which plans each way is for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fqdiff.cli.quantize_steps import CORRECTION, RECONSTRUCT, STEPS, TEMPORAL
from fqdiff.cli.session import checked_settings
from fqdiff.cli.sweep_inputs import chosen
from fqdiff.cli.sweep_words import MOST_CELLS, blaming, in_words
from fqdiff.configs import (
    ActivationConfig,
    NoiseCorrectionConfig,
    QuantizeConfig,
    ReconstructConfig,
    StepsConfig,
    TemporalConfig,
)
from fqdiff.errors import ConfigError, require
from fqdiff.treatment.request import Request, Wish, make_treatment
from fqdiff.treatment.treatment import refuse_calibration

if TYPE_CHECKING:
    from fqdiff.sweep.cells import Source, Way

STAGES: Mapping[str, type[Any]] = {  # tables that ask for a stage by being there, as in settings files
    **dict.fromkeys(RECONSTRUCT, ReconstructConfig),
    TEMPORAL: TemporalConfig,
    STEPS: StepsConfig,
    CORRECTION: NoiseCorrectionConfig,
}
TEXTS, ACTIVATIONS, REPARAMETERIZE = ("method", "calibration"), "activations", "reparameterize"
FLOAT32 = ("", "float32")


@dataclass(frozen=True)
class GivenWay:
    """A point of the grid of the file's ``entry``, counted from 1; ``plans``: names of those it is for, empty for all."""

    entry: int
    plans: tuple[str, ...]
    settings: Mapping[str, object]


def read_ways(entries: Sequence[Mapping[str, object]], path: Path) -> tuple[GivenWay, ...]:
    """Every point of every ``[[quantize]]``, what it says checked for type. Raises ConfigError."""
    from fqdiff.sweep.grid import expand

    found = []
    for number, entry in enumerate(entries, start=1):
        label = f"quantize[{number}]"
        plans = entry.get("plans", [])
        names = [plans] if isinstance(plans, str) else plans
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"{label}.plans is {plans!r}"[:200], "a name of [[plans]], or a list of some")
        for point in expand({key: value for key, value in entry.items() if key != "plans"}, frozenset(), label):
            where = f"[[quantize]] number {number} of {path}"
            found.append(GivenWay(number, tuple(names), _checked(point, label, where)))
            most = f"quantize in {path} stand for more than {MOST_CELLS:,}"
            require(len(found) <= MOST_CELLS, most, "list fewer values")
    return tuple(found)


def _checked(point: Mapping[str, object], label: str, where: str) -> dict[str, object]:
    """``point`` with its values as settings; what it says of stages is a table, or whether they are there at all."""
    checked: dict[str, object] = {}
    for name, value in point.items():
        own = f"{label}.{name}"
        if name in STAGES or name == ACTIVATIONS:
            kind = STAGES.get(name, ActivationConfig)
            simple: type[Any] = str if name == ACTIVATIONS else bool
            hint = "a format, or a table of settings" if simple is str else "true, false, or a table of settings"
            require(isinstance(value, simple | dict), f"{own} is {value!r}"[:200], hint)
            checked[name] = (
                checked_settings(kind, value, own, f"{name} of {where}") if isinstance(value, dict) else value
            )
            checked[name] = FLOAT32[1] if value == FLOAT32[0] else checked[name]
        elif name in TEXTS or name == REPARAMETERIZE:
            wanted, hint = (str, "a text in quotes") if name in TEXTS else (bool, "true or false")
            require(isinstance(value, wanted), f"{own} is {value!r}"[:200], hint)
            checked[name] = value
        else:
            checked |= checked_settings(QuantizeConfig, {name: value}, label, where)
    return checked


def request_of(settings: Mapping[str, object]) -> Request:
    """What a way's settings ask of every stage. Raises ConfigError where two say how weights are reconstructed."""
    tables = [name for name in RECONSTRUCT if settings.get(name, False) is not False]
    if len(tables) > 1:
        raise ConfigError("tables for reconstruct and reconstruct-temporal", "one of them: it says how")

    def wish(*names: str) -> Wish:
        given = [settings[name] for name in names if name in settings]
        asked = [value for value in given if value is not False]
        if not asked:
            return Wish(False if given else None)
        return Wish(True, asked[0] if isinstance(asked[0], Mapping) else {})

    value = settings.get(ACTIVATIONS, FLOAT32[1])
    activations = dict(value) if isinstance(value, Mapping) else {"format": value}
    if activations.get("format") in FLOAT32:
        del activations["format"]
    known = (*STAGES, *TEXTS, ACTIVATIONS, REPARAMETERIZE)
    reparameterize = settings.get(REPARAMETERIZE)
    return Request(
        quantize={name: value for name, value in settings.items() if name not in known},
        reparameterize=None if reparameterize is None else bool(reparameterize),
        reconstruct=wish(*RECONSTRUCT),
        temporal_first=True if "reconstruct-temporal" in tables else None,
        activations=activations,
        temporal_scales=wish(TEMPORAL),
        activation_steps=wish(STEPS),
        noise_correction=wish(CORRECTION),
    )


def ways_of(given: Sequence[GivenWay], sets: "Mapping[str, Source]") -> "list[tuple[GivenWay, Way]]":
    """Each way with its treatment and the calibration set of the file that it learns from.

    A set may be named for ways of which only some learn from one; the others' settings leave it out. Raises ConfigError where
    none does, or it is not clear which set is meant.
    """
    from fqdiff.sweep.cells import Way

    found: list[tuple[GivenWay, Way]] = []
    unused: dict[int, GivenWay] = {}
    for one in given:
        where, method = f"quantize ({in_words(one.settings)})", str(one.settings.get("method", ""))
        with blaming(where):
            treatment = make_treatment(request_of(one.settings), method or None)
        name = str(one.settings.get("calibration", ""))
        learned = sets[chosen("calibration", name, sets, where)] if name or treatment.is_calibrated else None
        if learned is not None and not treatment.is_calibrated:
            unused.setdefault(one.entry, one)
            settings = {key: value for key, value in one.settings.items() if key != "calibration"}
            found.append((GivenWay(one.entry, one.plans, settings), Way(treatment, None, method)))
        else:
            found.append((one, Way(treatment, learned, method)))
    learning = {one.entry for one, way in found if way.calibration is not None}
    for entry, one in unused.items():
        if entry not in learning:
            with blaming(f"quantize ({in_words(one.settings)})"):
                refuse_calibration(next(way.treatment for other, way in found if other.entry == entry))
    return found
