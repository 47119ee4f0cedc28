"""Settings of a sweep's file as columns of its table."""

from collections.abc import Mapping
from dataclasses import asdict

from fqdiff.configs import PlanConfig, QuantizeConfig


def settings_of(prefix: str, config: PlanConfig | QuantizeConfig, given: Mapping[str, object]) -> dict[str, object]:
    """Columns of a table for the settings that a sweep's file gives, as the config holds them; lists with commas."""
    named = flat(given)
    resolved = {**named, **asdict(config)}
    names = dict.fromkeys(["strategy", *named] if prefix == "plan" else named)
    return {f"{prefix}_{column(name)}": plain(resolved[name]) for name in names}


def flat(settings: Mapping[str, object]) -> dict[str, object]:
    """``settings`` with those of tables under ``table.setting``; a table without any is there, True."""
    found: dict[str, object] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{key}": one for key, one in value.items()} or {name: True}
        else:
            found[name] = value
    return found


def column(name: str) -> str:
    """``activation-steps.rate`` as a part of a column's name."""
    return name.replace("-", "_").replace(".", "_")


def plain(value: object) -> object:
    """``value`` as a cell of a table."""
    return ",".join(str(one) for one in value) if isinstance(value, list | tuple) else value
