"""Settings as the plain data of a recipe, and out of it."""

from collections.abc import Mapping
from dataclasses import asdict, field, fields
from typing import Any, TypeVar

from fqdiff.errors import ConfigError

Config = TypeVar("Config")
Value = TypeVar("Value")
LATER = "later"


def later(default: Value, before: Value | None = None) -> Value:
    """A field that came after artifacts had been made: as it was ``before`` it is in no recipe, so that they keep their ids.

    Before it came all was as its ``default`` has it, unless ``before`` says otherwise.
    """
    return field(default=default, metadata={LATER: default if before is None else before})


def config_data(config: Any) -> dict[str, Any]:
    """``config`` as the plain data of a recipe."""
    before = values_before(type(config))
    unsaid = {name for name, value in before.items() if getattr(config, name) == value}
    return {name: value for name, value in asdict(config).items() if name not in unsaid}


def values_before(kind: type[Any]) -> dict[str, Any]:
    """What the fields that came later were before they came, by name."""
    return {f.name: f.metadata[LATER] for f in fields(kind) if LATER in f.metadata}


def config_from_data(kind: type[Config], data: Mapping[str, Any]) -> Config:
    """The config that a recipe holds as plain data. Raises ConfigError where it does not fit: it may come from a stranger."""
    try:
        given = {**values_before(kind), **data}
        return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in given.items()})
    except TypeError as error:
        raise ConfigError(f"settings of another fqdiff: {error}", "make the artifact again") from None
