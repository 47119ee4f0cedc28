"""The ``fqdiff`` command. Importing this module imports no torch, so that ``--help`` answers at once."""

import os
from typing import Annotated

import typer

import fqdiff
from fqdiff.cli import (
    calibrate,
    compare,
    fid,
    fisher,
    fisher_merge,
    fisher_top,
    fisher_validate,
    import_,
    methods,
    plan,
    plan_show,
    plot,
    plot_activations,
    quantize,
    report,
    run,
    sample,
    size,
    store,
    sweep,
    train,
)
from fqdiff.cli.groups import InOrder

app = typer.Typer(
    name="fqdiff",
    cls=InOrder,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: fqdiff run demo",
)

PIPELINE = "Pipeline, in order of use"
HOUSE = "Everything else"
app.command("train", rich_help_panel=PIPELINE, epilog=train.EXAMPLE)(train.train)
app.command("import", rich_help_panel=PIPELINE, epilog=import_.EXAMPLE)(import_.import_)
fisher.app.command("top", epilog=fisher_top.EXAMPLE)(fisher_top.top)
fisher.app.command("merge", epilog="Example: fqdiff fisher merge --from node2/fqdiff-store")(fisher_merge.merge)
fisher.app.command("validate", epilog=fisher_validate.EXAMPLE)(fisher_validate.validate)
app.add_typer(fisher.app, name="fisher", rich_help_panel=PIPELINE)
plan.app.command("show", epilog=plan_show.SHOW_EXAMPLE)(plan_show.show)
plan.app.command("diff", epilog=plan_show.DIFF_EXAMPLE)(plan_show.diff)
app.add_typer(plan.app, name="plan", rich_help_panel=PIPELINE)
app.command("calibrate", rich_help_panel=PIPELINE, epilog=calibrate.EXAMPLE)(calibrate.calibrate)
app.command("quantize", rich_help_panel=PIPELINE, epilog="Example: fqdiff quantize --output small.safetensors")(
    quantize.quantize
)
app.command("size", rich_help_panel=PIPELINE, epilog="Example: fqdiff size --tensors")(size.size)
app.command("sample", rich_help_panel=PIPELINE, epilog="Example: fqdiff sample --count 1000 --steps 50")(sample.sample)
app.command("fid", rich_help_panel=PIPELINE, epilog="Example: fqdiff fid --features digits")(fid.fid)
app.command("compare", rich_help_panel=PIPELINE, epilog=compare.EXAMPLE)(compare.compare)
app.command("report", rich_help_panel=PIPELINE, epilog=report.EXAMPLE)(report.report)
plot.app.command("activations", epilog=plot_activations.EXAMPLE)(plot_activations.activations)
app.add_typer(plot.app, name="plot", rich_help_panel=HOUSE)
app.command("methods", rich_help_panel=HOUSE, epilog=methods.EXAMPLE)(methods.methods)
app.command("run", rich_help_panel=HOUSE, epilog="Example: fqdiff run demo")(run.run)
app.command("sweep", rich_help_panel=HOUSE, epilog=sweep.EXAMPLE)(sweep.sweep)
app.add_typer(store.app, name="store", rich_help_panel=HOUSE)


def _version(asked: bool) -> None:
    if asked:
        print(f"fqdiff {fqdiff.__version__}")
        raise typer.Exit


@app.callback()
def fqdiff_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make diffusion models smaller, with evidence."""


def main() -> None:
    """Entry point of the console script."""
    # libgomp's threads spin while they wait; beside any other job that makes two threads ten times slower than one.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app(prog_name="fqdiff")
