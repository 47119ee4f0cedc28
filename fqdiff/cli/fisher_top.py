"""``fqdiff fisher top``."""

from typing import TYPE_CHECKING, Annotated

import typer

from fqdiff.cli.session import STORE_OPTIONS, Session, common
from fqdiff.cli.show import artifact_data, table
from fqdiff.errors import ConfigError

if TYPE_CHECKING:
    from fqdiff.store.manifest import Manifest
    from fqdiff.values import FisherTable

EXAMPLE = "Example: fqdiff fisher top --k 20"
ORDERS = ("mean", "sum", "max", "relative-error")
Row = dict[str, str | int | float]


@common(*STORE_OPTIONS)
def top(
    session: Session,
    ref: Annotated[
        str | None,
        typer.Argument(help="Fisher table: name, id or prefix.", show_default="the latest", metavar="REF"),
    ] = None,
    k: Annotated[int, typer.Option("--k", min=1, help="How many parameters.")] = 20,
    at: Annotated[
        str | None,
        typer.Option(
            help="'mean' over timesteps, one timestep, or 'run': the sampler's whole run, of a trajectory table.",
            show_default="run where there is one, else mean",
        ),
    ] = None,
    by: Annotated[str, typer.Option(help=f"What is ranked: {', '.join(ORDERS)}.")] = "mean",
) -> None:
    """List the parameters with the highest Fisher values."""
    if by not in ORDERS:
        raise ConfigError(f"cannot rank by '{by}'", f"one of: {', '.join(ORDERS)}")
    manifest = session.resolve(ref, ("fisher",))
    value: FisherTable = session.runner.load(manifest)
    at = at or ("run" if value.trajectory else "mean")
    rows = ranked(parameter_rows(value, at), by)
    data = {**artifact_data(session.store, manifest), "at": at, "by": by, "parameters": rows[:k]}
    session.result(data, lambda: top_text(manifest, value, at, by, rows, k))


def parameter_rows(value: "FisherTable", at: str) -> list[Row]:
    """Every parameter's mean Fisher value, its standard error, the largest element's, the sum, and its share of all sums.

    Averaged over timesteps the standard error is the mean of the timesteps' own: the largest possible, that of samples which
    rise and fall together at all timesteps. How far they do is not in the table.
    """
    if at == "run" and not value.trajectory:
        raise ConfigError(f"the {value.kind} table holds no sampler run", "use --at mean, or a timestep")
    if at != "run" and not value.entries:
        raise ConfigError(f"the {value.kind} table holds no single timesteps", "use --at run")
    measured: list[tuple[str, str, int, float, float, float]]
    if at == "run":
        runs = value.trajectory.items()
        measured = [(name, e.block, e.numel, e.mean, e.standard_error, e.maximum) for name, e in runs]
    else:
        rows = slice(None) if at == "mean" else timestep_row(value, at)
        measured = [
            (
                name,
                e.block,
                e.numel,
                float(e.mean[rows].mean()),
                float(e.standard_error[rows].mean()),
                float(e.maximum[rows].mean()),
            )
            for name, e in value.entries.items()
        ]
    whole = sum(mean * numel for _, _, numel, mean, _, _ in measured)
    return [
        {
            "parameter": name,
            "block": block,
            "numel": numel,
            "mean": mean,
            "standard_error": error,
            "relative_error": error / mean if mean else 0.0,
            "max": largest,
            "sum": mean * numel,
            "share": mean * numel / whole if whole else 0.0,
        }
        for name, block, numel, mean, error, largest in measured
    ]


def timestep_row(value: "FisherTable", at: str) -> slice:
    """Where the table holds timestep ``at``."""
    timesteps = value.timesteps.tolist()
    if not (at.isascii() and at.isdigit() and len(at) < 10):
        raise ConfigError(f"cannot read the Fisher table at '{at}'", "a timestep such as 1, 'mean' or 'run'")
    if int(at) not in timesteps:
        near = min(timesteps, key=lambda t: abs(t - int(at)))
        raise ConfigError(f"the Fisher table has no timestep {at}", f"the nearest is {near}: --at {near}")
    row = timesteps.index(int(at))
    return slice(row, row + 1)


def ranked(rows: list[Row], by: str) -> list[Row]:
    """``rows``, the highest first."""
    return sorted(rows, key=lambda row: float(row[by.replace("-", "_")]), reverse=True)


def top_text(manifest: "Manifest", value: "FisherTable", at: str, by: str, rows: list[Row], k: int) -> str:
    """The table for people, and what its rows hold together."""
    where = {
        "mean": f"averaged over {len(value.timesteps)} timesteps x {value.samples} samples",
        "run": "of the sampler's whole run",
    }.get(at, f"at t={at}, {value.samples} samples")
    shown = rows[:k]
    header = ("parameter", "block", "numel", "mean", "standard error", "relative", "max", "sum", "share")
    cells = [
        [
            str(r["parameter"]),
            str(r["block"]),
            f"{r['numel']:,}",
            f"{r['mean']:.3e}",
            f"{r['standard_error']:.1e}",
            f"{r['relative_error']:.0%}",
            f"{r['max']:.2e}",
            f"{r['sum']:.2e}",
            f"{r['share']:.1%}",
        ]
        for r in shown
    ]
    held, of_weights = sum(float(r["share"]) for r in shown), sum(int(r["numel"]) for r in shown)
    weights = sum(int(r["numel"]) for r in rows)
    title = f"fisher {manifest.id}: highest {by} of {len(rows)} parameters, {where}"
    foot = f"together {held:.1%} of the sum over all elements, with {of_weights / weights:.2%} of the weights"
    return "\n".join([title, table(header, cells), foot])
