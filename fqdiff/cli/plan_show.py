"""``fqdiff plan show`` and ``fqdiff plan diff``: look at plans."""

from math import prod
from typing import TYPE_CHECKING, Annotated

import typer

from fqdiff.cli.plan_budget import activations_text, entry_rows, facts_text, next_better, title
from fqdiff.cli.session import STORE_OPTIONS, Session, common
from fqdiff.cli.show import artifact_data, table
from fqdiff.errors import LineageError

if TYPE_CHECKING:
    from fqdiff.store.manifest import Manifest
    from fqdiff.values import Plan

SHOW_EXAMPLE = "Example: fqdiff plan show"
DIFF_EXAMPLE = "Example: fqdiff plan diff by-fisher by-chance"


@common(*STORE_OPTIONS)
def show(
    session: Session,
    ref: Annotated[
        str | None, typer.Argument(help="Plan: name, id or prefix.", show_default="the latest", metavar="REF")
    ] = None,
) -> None:
    """Print a plan tensor by tensor: what was chosen, why, and what would be next."""
    manifest = session.resolve(ref, ("plan",))
    value: Plan = session.runner.load(manifest)
    totals = {"strategy": value.strategy, "file_bytes": value.file_bytes, "bits_per_weight": value.bits_per_weight}
    facts = vars(value.budget) if value.budget is not None else None
    phases = {"phases": vars(value.phases)} if value.phases is not None else {}
    phases |= {"activations": dict(value.activations)} if value.activations else {}
    data = {**artifact_data(session.store, manifest), **totals, "budget": facts, **phases, "entries": entry_rows(value)}
    session.result(data, lambda: show_text(manifest, value))


def show_text(manifest: "Manifest", value: "Plan") -> str:
    """The plan for people; rules are told once, below the table."""
    from fqdiff.quant.formats import get_format

    header = ["parameter", "block", "weights", "format", "scales by", "range", "bytes", "Fisher value"]
    if value.budget is not None:
        header += ["predicted", "next better", "for bytes more"]
    cells = []
    for e in value.entries:
        cast = get_format(e.format).is_cast and e.granularity == "tensor"
        how = [e.format, *(("", "") if cast else (e.granularity, e.range))]
        row = [e.parameter, e.block, f"{prod(e.shape):,}", *how, f"{e.bytes:,}", _number(e.score)]
        if value.budget is not None:
            better = next_better(e)
            row += [_number(e.predicted)]
            row += [f"{better['format']} {better['granularity']}", f"{better['more_bytes']:,}"] if better else ["", ""]
        cells.append(row)
    rules: dict[str, int] = {}
    for e in value.entries:
        rules[e.rule] = rules.get(e.rule, 0) + 1
    lines = [f"{rule}: {count} parameters" for rule, count in rules.items()]
    return "\n".join(
        [
            title(manifest, value),
            table(header, cells),
            *facts_text(value),
            *lines,
            *activations_text(value, listed=True),
        ]
    )


@common(*STORE_OPTIONS)
def diff(
    session: Session,
    first: Annotated[str, typer.Argument(help="Plan: name, id or prefix.", metavar="A")],
    second: Annotated[str, typer.Argument(help="Plan to compare with it.", metavar="B")],
) -> None:
    """Compare two plans of one model: which parameters are stored in another way, and what that does to the size."""
    manifests = [session.store.resolve(ref, ("plan",)) for ref in (first, second)]
    a, b = (session.runner.load(m) for m in manifests)
    rows = diff_rows(a, b)
    data = {
        "a": {"id": manifests[0].id, "file_bytes": a.file_bytes, "bits_per_weight": a.bits_per_weight},
        "b": {"id": manifests[1].id, "file_bytes": b.file_bytes, "bits_per_weight": b.bits_per_weight},
        "changed": rows,
    }
    session.result(data, lambda: diff_text(manifests, a, b, rows))


def diff_rows(a: "Plan", b: "Plan") -> list[dict[str, object]]:
    """The parameters whose format, granularity, range or rounding differs. Raises LineageError for plans of different models.

    Predictions are those of the plan that has them for both ways, so that both are in one unit; a's before b's. Where
    roundings differ there are none: a plan predicts for its own.
    """
    others = {e.parameter: e for e in b.entries}
    if {e.parameter: e.shape for e in a.entries} != {e.parameter: e.shape for e in b.entries}:
        raise LineageError("the plans are of different models", "compare two plans of one checkpoint")
    rows: list[dict[str, object]] = []
    for one in a.entries:
        two = others[one.parameter]
        ways = [(e.format, e.granularity, e.range) for e in (one, two)]
        if ways[0] == ways[1] and one.rounding == two.rounding:
            continue
        known = [{(x.format, x.granularity, x.range): x.predicted for x in e.alternatives} for e in (one, two)]
        able = (k for k in known if ways[0] in k and ways[1] in k and one.rounding == two.rounding)
        prices = next(able, {})
        rows.append(
            {
                "parameter": one.parameter,
                "block": one.block,
                "weights": prod(one.shape),
                "a": one.format,
                "b": two.format,
                "granularity_a": one.granularity,
                "granularity_b": two.granularity,
                "range_a": one.range,
                "range_b": two.range,
                "rounding_a": one.rounding,
                "rounding_b": two.rounding,
                "bytes": two.bytes - one.bytes,
                "predicted_a": prices.get(ways[0]),
                "predicted_b": prices.get(ways[1]),
            }
        )
    return rows


def stored_how(row: dict[str, object], side: str) -> str:
    """Format and granularity of one side of a row, and of range and rounding what differs from the other side."""
    differing = [key for key in ("range", "rounding") if row[f"{key}_a"] != row[f"{key}_b"]]
    return " ".join(str(row[key]) for key in (side, *(f"{key}_{side}" for key in ("granularity", *differing))))


def diff_text(manifests: "list[Manifest]", a: "Plan", b: "Plan", rows: list[dict[str, object]]) -> str:
    """The table of :func:`diff_rows` for people."""
    cells = [
        [
            str(r["parameter"]),
            str(r["block"]),
            f"{r['weights']:,}",
            *(stored_how(r, side) for side in "ab"),
            f"{r['bytes']:+,}",
            _number(r["predicted_a"]),
            _number(r["predicted_b"]),
        ]
        for r in rows
    ]
    header = ("parameter", "block", "weights", "A", "B", "bytes", "predicted, A", "predicted, B")
    heads = [f"{name}: {title(m, p)}" for name, m, p in zip("AB", manifests, (a, b), strict=True)]
    foot = f"{len(rows)} of {len(a.entries)} parameters differ; B's file has {b.file_bytes - a.file_bytes:+,} bytes"
    return "\n".join([*heads, *([table(header, cells)] if rows else []), foot])


def _number(value: object) -> str:
    return f"{value:.2e}" if isinstance(value, float) else ""
