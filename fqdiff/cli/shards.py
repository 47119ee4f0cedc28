"""``--shard k/N``: one share of a stage's work, kept as parts."""

from typing import TYPE_CHECKING

from fqdiff.cli.session import Session
from fqdiff.errors import ConfigError

if TYPE_CHECKING:
    from fqdiff.pipeline import Step


def make_shard(session: Session, step: "Step", shard: tuple[int, int], verb: tuple[str, str], join: str) -> None:
    """One share of the work of ``step``; what it leaves are parts, no artifact.

    ``verb``: what is done to it, as in ("measure", "measured"). ``join``: the command that joins all shares.
    """
    if session.name is not None:
        raise ConfigError("a shard is no artifact and takes no --name", f"give the name to {join}")
    data = {"kind": step.kind, "id": step.id, "shard": shard[0], "of": shard[1], "done": not session.dry_run}
    if not session.dry_run:
        session.runner.run_shard(step, shard)
    word = f"would {verb[0]}" if session.dry_run else verb[1]
    session.result(
        data,
        lambda: f"{word} shard {shard[0]} of {shard[1]} of {step.kind} {step.id}\nwhen all are there: {join}",
    )


def parse_shard(text: str) -> tuple[int, int]:
    """``2/8`` -> (2, 8). Raises ConfigError."""
    number, _, count = text.partition("/")
    if not (number.isascii() and number.isdigit() and count.isascii() and count.isdigit()):
        raise ConfigError(f"cannot read the shard '{text}'", "k/N, such as 1/4 for the first of four")
    if not 1 <= int(number) <= int(count):
        raise ConfigError(f"there is no shard {number} of {count}", f"use 1/{count} to {count}/{count}")
    return int(number), int(count)
