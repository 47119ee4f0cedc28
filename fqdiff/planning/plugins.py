"""Strategies of other packages: functions that choose a format for every weight tensor, found by their entry points.

A package offers one in its ``pyproject.toml``:

    [project.entry-points."fqdiff.strategies"]
    my-strategy = "my_package.strategies:choose"

and ``choose(tensors, importance, settings)`` returns the name of a format for every one of ``tensors``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from fqdiff.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    # Weights float32 by parameter name; their Fisher values, empty without a table; what --setting gives, as text.
    Strategy = Callable[[Mapping[str, Tensor], Mapping[str, float], Mapping[str, str]], Mapping[str, str]]

GROUP = "fqdiff.strategies"


@dataclass(frozen=True)
class Plugin:
    """A strategy, the distribution that brings it, and that one's version."""

    name: str
    distribution: str
    version: str
    entry: EntryPoint

    @property
    def words(self) -> str:
        """``my-strategy of my-package 1.0``."""
        return f"{self.name} of {self.distribution} {self.version}"

    def load(self) -> "Strategy":
        """The function. Raises ConfigError where it cannot be imported."""
        try:
            found: Any = self.entry.load()
        except Exception as error:  # whatever the plug-in's own module does when it is imported
            raise ConfigError(
                f"strategy {self.words} cannot be imported: {type(error).__name__}: {error}", "mend or reinstall it"
            ) from error
        if not callable(found):
            raise ConfigError(f"strategy {self.words} is no function", f"see the entry point {self.entry.value}")
        strategy: Strategy = found
        return strategy


def installed() -> list[Plugin]:
    """All strategies that installed distributions offer, by name; none of them imported yet."""
    found = [
        Plugin(entry.name, entry.dist.name, entry.dist.version, entry)
        for entry in entry_points(group=GROUP)
        if entry.dist is not None
    ]
    return sorted(found, key=lambda plugin: (plugin.name, plugin.distribution))


def find_plugin(name: str) -> Plugin:
    """The strategy called ``name``. Raises ConfigError where there is none, or where two distributions offer it."""
    every = installed()
    found = [plugin for plugin in every if plugin.name == name]
    if len(found) > 1:
        raise ConfigError(
            f"strategy '{name}' is offered twice: {', '.join(p.words for p in found)}", "uninstall all but one of them"
        )
    if not found:
        there = ", ".join(p.words for p in every) or "none is installed"
        raise ConfigError(
            f"no plug-in offers a strategy '{name}'",
            f"strategies of plug-ins: {there}; others have options of their own",
        )
    return found[0]


def chosen_formats(
    plugin: Plugin, tensors: "Mapping[str, Tensor]", importance: Mapping[str, float], settings: Mapping[str, str]
) -> dict[str, str]:
    """The name of a format for each of ``tensors``, as the plug-in says; names of formats are not looked up yet.

    It gets copies: what it does to them changes nothing. Raises ConfigError where it raises, leaves a tensor out, names one
    that there is not, or returns anything but names.
    """
    strategy = plugin.load()
    try:
        answer = strategy({name: t.clone() for name, t in tensors.items()}, dict(importance), dict(settings))
    except Exception as error:
        raise ConfigError(
            f"strategy {plugin.words} failed: {type(error).__name__}: {error}", "--debug shows where"
        ) from error
    if not isinstance(answer, Mapping) or not all(isinstance(v, str) for pair in answer.items() for v in pair):
        raise ConfigError(
            f"strategy {plugin.words} returned {type(answer).__name__}: not a format's name for each tensor's name",
            "return a dict such as {'block1.conv.weight': 'int4'}",
        )
    for what, names in (
        ("no format for", tensors.keys() - answer.keys()),
        ("a format for", answer.keys() - tensors.keys()),
    ):
        if names:
            unknown = ", unknown tensors" if what == "a format for" else ""
            raise ConfigError(
                f"strategy {plugin.words} gave {what} {', '.join(sorted(names)[:3])[:200]}{unknown}",
                f"return one for each of the {len(tensors)} tensors given, and for no other",
            )
    return dict(answer)
