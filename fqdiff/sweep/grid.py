"""Settings of which some have several values, as the grid of all combinations."""

from collections.abc import Iterator, Mapping, Set
from itertools import product

from fqdiff.errors import ConfigError


def expand(settings: Mapping[str, object], lists: Set[str], label: str) -> Iterator[dict[str, object]]:
    """Every combination of values, the first setting varying slowest.

    A list stands for several values; of the settings in ``lists``, whose values are lists themselves, a list of lists does.
    A table stands for all combinations of its own settings. Raises ConfigError for an empty list; ``label`` is what messages
    call the settings.
    """
    axes = [_values(f"{label}.{name}", value, name in lists) for name, value in settings.items()]
    for chosen in product(*axes):
        yield dict(zip(settings, chosen, strict=True))


def _values(name: str, value: object, is_list: bool) -> list[object]:
    if isinstance(value, Mapping):
        return list(expand(value, frozenset(), name))
    if not isinstance(value, list):
        return [value]
    if not value:
        raise ConfigError(f"{name} is an empty list", "leave it out, or list a value or more")
    if is_list:
        return value if all(isinstance(one, list) for one in value) else [value]
    return [point for one in value for point in (_values(name, one, False) if isinstance(one, Mapping) else [one])]
