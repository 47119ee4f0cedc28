"""How commands are grouped: in the order of their use, and some with subcommands."""

from typing import Any

from typer.core import TyperGroup

ORDER = (
    "train", "import", "fisher", "plan", "calibrate", "quantize", "size", "sample", "fid", "compare", "report", "plot",
    "methods", "run", "sweep", "store",
)  # fmt: skip


class InOrder(TyperGroup):
    """Help lists commands in the order of ORDER; typer itself puts groups after single commands."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(self.commands, key=ORDER.index)


class DefaultCommand(TyperGroup):
    """``fqdiff fisher --timesteps 1000`` measures, ``fqdiff fisher top`` looks.

    Without the name of a subcommand the first one runs; with all arguments as they are.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in self.commands:
            args = [next(iter(self.commands)), *args]
        return super().parse_args(ctx, args)
