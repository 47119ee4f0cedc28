"""How numbers, tables and artifacts look on a terminal."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fqdiff.errors import ConfigError
from fqdiff.groups import PLACES

if TYPE_CHECKING:
    from fqdiff.store.manifest import Manifest
    from fqdiff.store.store import Store

BLOCKS = PLACES


def duration(seconds: float) -> str:
    """``90`` -> ``1.5 min``."""
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size or (unit == "min" and seconds >= size):
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def mebibytes(count: int) -> str:
    """Bytes as MiB or KiB, with the exact number."""
    size = f"{count / 2**20:.2f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
    return f"{size} ({count:,} bytes)"


def byte_count(option: str, text: str) -> int:
    """``4GiB``, ``500MB`` or ``1000000`` as bytes. Raises ConfigError naming ``option``.

    So does a number without a unit that is less than a KiB: 100 is more likely meant to be another unit's.
    """
    units = {"": 1, "B": 1} | {f"{p}B": 1000**k for k, p in enumerate("KMGT", 1)}
    units |= {f"{p}iB": 1024**k for k, p in enumerate("KMGT", 1)}
    digits = text.rstrip("KMGTiBkmgtb ")
    unit = {name.lower(): size for name, size in units.items()}.get(text[len(digits) :].strip().lower())
    try:
        size = float(digits)
    except ValueError:
        size = -1.0
    if unit is None or not 0 <= size * unit < 2**63:
        raise ConfigError(f"cannot read {option} '{text}'", "a size such as 500MB, 4GiB or 1000000")
    if 0 < size < 1024 and text.strip() == digits.strip():
        raise ConfigError(
            f"{option} {text} would be {digits.strip()} bytes", "give it a unit, such as MiB or GB, or B for bytes"
        )
    return int(size * unit)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain columns: the first left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *(line(row) for row in rows)])


def artifact_data(store: "Store", manifest: "Manifest") -> dict[str, Any]:
    """The keys that every ``--json`` result has."""
    return {
        "kind": manifest.kind,
        "id": manifest.id,
        "path": str(store.directory(manifest.kind, manifest.id)),
        "bytes": manifest.bytes,
        "seconds": manifest.seconds,
        "inputs": {i.role: f"{i.kind}/{i.id}" for i in manifest.recipe.inputs},
    }
