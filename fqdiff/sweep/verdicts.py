"""What may be said of the cells of a sweep against full precision, all of them together."""

from collections.abc import Sequence

from fqdiff.evidence.decisions import holm, verdict
from fqdiff.sweep.numbers import Row


def with_verdicts(rows: Sequence[Row]) -> list[Row]:
    """``rows`` with ``fid_p_adjusted`` and ``verdict``: Holm's correction over all cells that are done, of all seeds.

    The more cells, the larger a difference has to be. As in a comparison, an FID below full precision's own is no merit: a
    quantized model with one moved away from what it is to reproduce. Rows of cells that failed stay as they are.
    """
    done = [k for k, row in enumerate(rows) if row["error"] is None]
    found = [dict(row) for row in rows]
    for k, p in zip(done, holm([rows[k]["fid_p"] for k in done]), strict=True):
        difference = rows[k]["fid_difference"]
        word = verdict(-difference, p, rows[k]["level"], beyond=difference < 0)
        found[k] |= {"fid_p_adjusted": p, "verdict": word}
    return found
