"""``fqdiff methods``."""

import textwrap
from dataclasses import asdict
from typing import Annotated

import typer

from fqdiff.cli.session import Session, common
from fqdiff.errors import ConfigError
from fqdiff.methods import METHODS, Method

EXAMPLE = "Example: fqdiff methods ptqd"
WIDTH = 110


@common("json", "debug")
def methods(
    session: Session,
    name: Annotated[
        str | None, typer.Argument(help="One method.", show_default="all of them", metavar="[NAME]")
    ] = None,
) -> None:
    """List the published methods: what of each is here, which flags make it, and what differs."""
    if name is not None and name not in METHODS:
        raise ConfigError(f"unknown method '{name}'", f"one of: {', '.join(METHODS)}")
    chosen = [m for m in METHODS.values() if name in (None, m.name)]
    session.result({"methods": [asdict(m) for m in chosen]}, lambda: "\n\n".join(method_text(m) for m in chosen))


def method_text(method: Method) -> str:
    """One method for people."""
    parts = {"here": method.implemented, "differs": method.differs, "not there": method.missing}
    lines = [f"{method.name}: {method.title} ({method.paper})"]
    lines += [f"{'made by' if i == 0 else '':>11}  {command}" for i, command in enumerate(method.made_by)]
    for label, text in parts.items():
        if text:
            lines += textwrap.wrap(text, WIDTH, initial_indent=f"{label:>11}  ", subsequent_indent=" " * 13)
    return "\n".join(lines)
