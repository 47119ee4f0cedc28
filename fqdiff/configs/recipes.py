"""Settings as the plain data of a recipe, and out of it."""

from collections.abc import Mapping
from dataclasses import asdict, field, fields
from typing import Any, TypeVar

from fqdiff.errors import ConfigError

Config = TypeVar("Config")
Value = TypeVar("Value")
LATER = "later"


def later(default: Value) -> Value:
    """A field that came after artifacts had been made: at its ``default`` it is in no recipe, so that they keep their ids."""
    return field(default=default, metadata={LATER: True})


def config_data(config: Any) -> dict[str, Any]:
    """``config`` as the plain data of a recipe."""
    unsaid = {f.name for f in fields(config) if f.metadata.get(LATER) and getattr(config, f.name) == f.default}
    return {name: value for name, value in asdict(config).items() if name not in unsaid}


def config_from_data(kind: type[Config], data: Mapping[str, Any]) -> Config:
    """The config that a recipe holds as plain data. Raises ConfigError where it does not fit: it may come from a stranger."""
    try:
        return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in data.items()})
    except TypeError as error:
        raise ConfigError(f"settings of another fqdiff: {error}", "make the artifact again") from None
