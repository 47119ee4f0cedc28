"""Settings out of the plain data of a recipe."""

from collections.abc import Mapping
from typing import Any, TypeVar

from fqdiff.errors import ConfigError

Config = TypeVar("Config")


def config_from_data(kind: type[Config], data: Mapping[str, Any]) -> Config:
    """The config that a recipe holds as plain data. Raises ConfigError where it does not fit: it may come from a stranger."""
    try:
        return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in data.items()})
    except TypeError as error:
        raise ConfigError(f"settings of another fqdiff: {error}", "make the artifact again") from None
