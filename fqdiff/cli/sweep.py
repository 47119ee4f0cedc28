"""``fqdiff sweep``: a grid of plans, ways to quantize and seeds, from a file."""

import hashlib
import json
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fqdiff.cli.fid import InceptionOption
from fqdiff.cli.output import copy_out
from fqdiff.cli.run import slug
from fqdiff.cli.session import STORE_OPTIONS, Session, common, read_settings
from fqdiff.cli.show import duration, table
from fqdiff.cli.sweep_file import PRETRAINED, SweepFile, make_cells, read_sweep
from fqdiff.errors import ConfigError
from fqdiff.report.words import NOISE_ERROR

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    import pyarrow as pa

    from fqdiff.errors import FqdiffError
    from fqdiff.sweep.cells import Cell
    from fqdiff.sweep.cost import Rates
    from fqdiff.sweep.numbers import Row

EXAMPLE = "Example: fqdiff sweep examples/sweeps/paper.toml --dry-run"
ENDINGS = (".parquet", ".csv")
FOLDER = "sweeps"


@common(*STORE_OPTIONS, "device", "dry_run")
def sweep(
    session: Session,
    file: Annotated[Path, typer.Argument(help="TOML file of plans, ways to quantize and seeds.", metavar="FILE")],
    jobs: Annotated[int, typer.Option(min=1, max=256, help="Cells at the same time, each in its own process.")] = 1,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also copy the table here, as .parquet or .csv.")
    ] = None,
    inception_weights: InceptionOption = None,
) -> None:
    """Make and compare every plan of a grid; what is there is reused, and a cell that fails stops no other."""
    from fqdiff.distributed import processes_launched
    from fqdiff.sweep.table import make_table

    if processes_launched() > 1:
        raise ConfigError("a sweep starts its own processes", "use --jobs instead of torchrun")
    if output is not None and output.suffix not in ENDINGS:
        raise ConfigError(f"cannot tell what to write into {output}", f"end it in {' or '.join(ENDINGS)}")
    if output is not None and (output.exists() or not output.parent.is_dir()):
        problem = f"{output} exists" if output.exists() else f"there is no folder {output.parent}"
        raise ConfigError(problem, "choose another --output")
    settings = read_sweep(file)
    session.runner.settings = read_settings(file)
    cells = make_cells(session, settings, inception_weights)
    if session.dry_run:
        show_cells(session, cells)
        return
    started = time.monotonic()
    rows: list[Row] = []

    made = run_here(session, cells) if jobs == 1 else run_apart(session, settings, cells, jobs, inception_weights)
    for row in made:
        rows.append(row)
        session.note(f"[{len(rows)}/{len(cells)}] {cells[row['cell'] - 1].label}: {outcome(row)}")
    made_table = make_table(rows, settings.name)
    paths = save_table(session, settings.name, cells, made_table)
    if output is not None:
        copy_out(paths[output.suffix], output)
    failed = [row for row in rows if row["error"] is not None]
    data = {
        "sweep": settings.name,
        "cells": made_table.to_pylist(),
        "failed": len(failed),
        "parquet": str(paths[".parquet"]),
        "csv": str(paths[".csv"]),
        "seconds": round(time.monotonic() - started, 1),
    }
    session.result(data, lambda: sweep_text(data))
    if failed:
        raise typer.Exit(1)


def run_here(session: Session, cells: "list[Cell]") -> "Iterator[Row]":
    """The rows of ``cells``, made one after the other in this process."""
    from fqdiff.sweep.cells import run_cell

    failed: dict[str, FqdiffError] = {}
    for cell in cells:
        session.note(f"cell {cell.number} of {len(cells)}: {cell.label}")
        yield run_cell(cell, session.runner, failed)


def run_apart(
    session: Session, file: SweepFile, cells: "list[Cell]", jobs: int, inception_weights: Path | None
) -> "Iterator[Row]":
    """The rows of ``cells`` as they finish, ``jobs`` at a time in processes that share this one's threads."""
    import torch

    from fqdiff.sweep.cells import cell_row
    from fqdiff.sweep.processes import Died, run_in_processes

    threads = max(1, torch.get_num_threads() // jobs)
    pinned_file, written = pinned(file, cells[0]), session.runner.settings
    arguments = (session.store_path, session.device_name, pinned_file, written, inception_weights, threads)
    numbers = [cell.number for cell in cells]
    with session.progress(len(cells), "sweep", "cell") as bar:
        for number, result in run_in_processes(numbers, jobs, work, arguments):
            bar.update()
            if isinstance(result, Died):
                why = f"its process ended with exit code {result.exit_code}" + (
                    " (killed: out of memory?)" if result.exit_code == -signal.SIGKILL else ""
                )
                result = cell_row(cells[number - 1], session.runner, why)
            yield result


def pinned(file: SweepFile, cell: "Cell") -> SweepFile:
    """``file`` with ids for references and a name for the default features: what they mean may change while it runs."""
    from fqdiff.pipeline import Step

    model = file.sweep.model
    if not model.startswith(PRETRAINED):
        model = f"checkpoint/{cell.artifacts['checkpoint'].id}"
    features = file.sweep.features or ("digits" if isinstance(cell.artifacts["features"], Step) else "inception")
    return replace(file, sweep=replace(file.sweep, model=model, features=features))


def work(
    connection: "Connection",
    store: Path,
    device: str,
    file: SweepFile,
    written: str,
    inception_weights: Path | None,
    threads: int,
) -> None:
    """A process's life: numbers of cells come in, rows go out. SIGTERM stops it as Ctrl-C would, with everything saved.

    ``written``: the text of the file.
    """
    import torch

    from fqdiff.sweep.cells import run_cell

    session = Session(store, device, quiet=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, session.interrupt)
    torch.set_num_threads(threads)
    try:
        session.runner.settings = written
        cells = make_cells(session, file, inception_weights)
        failed: dict[str, FqdiffError] = {}
        while (number := connection.recv()) is not None:
            connection.send(run_cell(cells[number - 1], session.runner, failed))
    except (KeyboardInterrupt, EOFError, BrokenPipeError):  # asked to stop, or nobody waits for the row any more
        return


def outcome(row: "Row") -> str:
    """A cell's result in a few words."""
    if row["error"] is not None:
        return f"failed: {row['error']}"
    return f"{row['bits_per_weight']:.2f} bits/weight, image MSE {row['image_mse']:.2e}, FID {row['fid']:.2f}"


def save_table(session: Session, name: str, cells: "list[Cell]", made: "pa.Table") -> dict[str, Path]:
    """Parquet and CSV in the store, by ending. The same cells have the same file names, whatever they came to."""
    from fqdiff.store.files import disk_error, write_atomically
    from fqdiff.sweep.table import comma_separated, parquet

    recipe = [[cell.plan_label, cell.quantize_label, cell.seed, cell.artifacts["comparison"].id] for cell in cells]
    digest = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]
    contents = {".parquet": parquet(made), ".csv": comma_separated(made)}
    paths = {
        ending: session.store.inside(FOLDER, f"{slug(name)[:80] or 'sweep'}-{digest}{ending}") for ending in contents
    }
    for ending, content in contents.items():
        try:
            write_atomically(paths[ending], content)
        except OSError as error:
            raise disk_error(error, f"cannot write {paths[ending]}") from error
    return paths


# --- what would be made ----------------------------------------------------------------------------------------------


def show_cells(session: Session, cells: "list[Cell]") -> None:
    """Every cell with its comparison's id, what of it is there, and how long the rest may take."""
    rates = known_rates(session, cells[0])
    counted: set[str] = set()
    rows = [planned_row(session, cell, rates, counted) for cell in cells]
    missing = {str(step["id"]): step for row in rows for step in row["steps"] if not step["exists"]}
    unknown = sorted({str(step["stage"]) for step in missing.values() if step["estimated_seconds"] is None})
    seconds = sum(step["estimated_seconds"] or 0.0 for step in missing.values())
    total = len({step["id"] for row in rows for step in row["steps"]})
    data = {
        "cells": rows,
        "artifacts": total,
        "missing": len(missing),
        "estimated_seconds": round(seconds, 1),
        "not_estimated": unknown,
    }

    def text() -> str:
        header = ("cell", "plan", "quantize", "seed", "comparison", "there", "to make", "about")
        lines = [
            [
                str(row["cell"]),
                row["plan"],
                row["quantize"],
                str(row["seed"]),
                row["comparison_id"],
                f"{sum(step['exists'] for step in row['steps'])} of {len(row['steps'])}",
                ", ".join(row["to_make"]),
                about(row),
            ]
            for row in rows
        ]
        done = sum(all(step["exists"] for step in row["steps"]) for row in rows)
        cost = f", about {duration(seconds)} with one job" if missing else ""
        cost += f", and what {', '.join(unknown)} take: nothing in this store tells" if unknown else ""
        return "\n".join(
            [
                table(header, lines),
                f"{len(rows)} cells, {done} of them done; {len(missing)} of {total} artifacts to make{cost}",
                "What several cells need is counted for the first of them.",
            ]
        )

    session.result(data, text)


def known_rates(session: Session, cell: "Cell") -> "Rates":
    """How long stages take: from what is in the store, and a few steps of the sampler where it has no samples to go by."""
    from fqdiff.context import Context
    from fqdiff.pipeline import External, Step
    from fqdiff.sweep.cost import measured_rates, sampling_rate

    rates, source = measured_rates(session.store), cell.artifacts["checkpoint"]
    if ("sample", source.id) in rates:
        return rates
    found = session.store.find(source.kind, source.id)
    if found is not None:
        model = session.runner.load(found)
    else:
        assert isinstance(source, Step)
        file = source.inputs["file"]
        assert isinstance(file, External)
        model = file.value
    return {**rates, ("sample", source.id): [sampling_rate(model, Context(device=session.device))]}


def about(row: dict[str, Any]) -> str:
    """How long a row's artifacts take in all, as far as that is known."""
    known = duration(row["estimated_seconds"]) if row["estimated_seconds"] else ""
    return f"{known} + ?".lstrip(" +") if row["not_estimated"] else known


def planned_row(session: Session, cell: "Cell", rates: "Rates", counted: set[str]) -> dict[str, Any]:
    """What a cell would take; ``counted``: ids that an earlier cell makes, to which this one's are added."""
    from fqdiff.sweep.cost import estimated_seconds

    steps, to_make, open_, seconds = [], [], [], 0.0
    checkpoint = cell.artifacts["checkpoint"].id
    for name, step in cell.steps():
        exists = session.store.find(step.kind, step.id) is not None
        estimate = None if exists else estimated_seconds(step, checkpoint, rates)
        if not exists and step.id not in counted:
            counted.add(step.id)
            to_make.append(name.replace("_", " "))
            seconds += estimate or 0.0
            open_ += [step.stage] if estimate is None else []
        steps.append(
            {"name": name, "stage": step.stage, "kind": step.kind, "id": step.id, "exists": exists}
            | {"estimated_seconds": None if estimate is None else round(estimate, 2)}
        )
    return {
        "cell": cell.number,
        "plan": cell.plan_label,
        "quantize": cell.quantize_label,
        "seed": cell.seed,
        **cell.settings,
        "comparison_id": cell.artifacts["comparison"].id,
        "steps": steps,
        "to_make": to_make,
        "estimated_seconds": round(seconds, 2),
        "not_estimated": open_,
    }


# --- what was made ---------------------------------------------------------------------------------------------------


def sweep_text(data: dict[str, Any]) -> str:
    """The table for people, what its numbers rest on, and every failure."""
    rows = data["cells"]
    done, failed = ([r for r in rows if (r["error"] is None) == wanted] for wanted in (True, False))
    lines = []
    if done:
        first = done[0]
        level = f"{100 * first['level']:g} %"
        about = ("bytes", "bits/weight", f"noise error [{level}]", f"image MSE [{level}]")
        fid = (f"FID {first['feature_network']} [{level}]", "to full precision", "verdict")
        header = ("cell", "plan", "quantize", "seed", *about, *fid)
        lines += [table(header, [cells_of(row) for row in done])]
        lines += [
            f"N = {first['n']} images of each; image MSE: against full precision's image of the same noise; noise error: "
            f"{NOISE_ERROR}.",
            f"Verdicts on the FID against full precision, by Holm's correction over the {len(done)} cells that are done.",
            *(floor_line(next(r for r in done if r["seed"] == seed)) for seed in sorted({r["seed"] for r in done})),
        ]
    for r in failed:
        which = "; ".join(filter(None, (r["plan"], r["quantize"], f"seed {r['seed']}")))
        lines.append(f"failed: cell {r['cell']} ({which}): {r['error']}")
    lines.append(f"{len(done)} of {len(rows)} cells done, in {duration(data['seconds'])}")
    return "\n".join([*lines, f"table: {data['parquet']}", f"       {data['csv']}"])


def cells_of(row: "Row") -> list[str]:
    """One line of the table."""
    return [
        str(row["cell"]),
        row["plan"],
        row["quantize"],
        str(row["seed"]),
        f"{row['bytes']:,}",
        f"{row['bits_per_weight']:.2f}",
        "" if row["noise_error"] is None else between(row, "noise_error", ".2e"),
        between(row, "image_mse", ".2e"),
        between(row, "fid", ".2f"),
        between(row, "fid_difference", "+.2f"),
        row["verdict"],
    ]


def between(row: "Row", name: str, form: str) -> str:
    """A number with its interval."""
    return f"{row[name]:{form}} [{row[f'{name}_low']:{form}}, {row[f'{name}_high']:{form}}]"


def floor_line(row: "Row") -> str:
    """What full precision itself comes to, and what other noise does to it."""
    return (
        f"Seed {row['seed']}: full precision has FID {row['fid_full']:.2f}; with other noise {row['fid_floor']:.2f} "
        f"({between(row, 'fid_floor_difference', '+.2f')}), and an image MSE of {row['image_mse_floor']:.2e}."
    )
