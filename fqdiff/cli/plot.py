"""``fqdiff plot``: pictures of artifacts."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fqdiff.cli.session import STORE_OPTIONS, Session, common, only_input
from fqdiff.errors import ArtifactNotFound, ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.figure import Figure

    from fqdiff.store.manifest import Manifest

app = typer.Typer(no_args_is_help=True, help="Draw pictures of artifacts.")
ComparisonRefs = Annotated[
    list[str] | None,
    typer.Argument(
        help="A comparison; or models, samples or plans: the latest comparison that has them all.",
        show_default="the latest comparison",
        metavar="REF",
    ),
]
ImageFormat = Annotated[str, typer.Option("--format", help="png, svg or both.")]
Output = Annotated[
    Path | None, typer.Option(help="Folder for the files.", show_default="pictures/KIND-ID in the store")
]


@app.command("fisher", epilog="Example: fqdiff plot fisher --picture heatmap-log --format png")
@common(*STORE_OPTIONS)
def fisher(
    session: Session,
    table: Annotated[
        str | None,
        typer.Argument(help="Fisher table: name, id or prefix.", show_default="the latest", metavar="REF"),
    ] = None,
    picture: Annotated[
        list[str] | None,
        typer.Option(help="Draw only this one, e.g. heatmap-log; may be given again.", show_default="all that apply"),
    ] = None,
    image_format: ImageFormat = "both",
    output: Output = None,
) -> None:
    """Draw a Fisher table: heat maps, curves, weights, errors."""
    from fqdiff.viz.figures import render
    from fqdiff.viz.fisher import DRAW, Subject, applicable

    formats = image_formats(image_format)
    for name in picture or []:
        if name not in DRAW:
            raise ConfigError(f"unknown picture '{name}'", f"one of: {', '.join(DRAW)}")
    manifest = session.resolve(table, ("fisher",))
    checkpoint = only_input(session, manifest, "checkpoint")
    value = session.runner.load(manifest)
    subject = Subject(value, session.runner.load(checkpoint), f"fisher {manifest.id} of checkpoint {checkpoint.id}")
    drawable = applicable(value)
    chosen = list(dict.fromkeys(picture or drawable))
    for name in chosen:
        if name not in drawable:
            raise ConfigError(
                f"fisher {manifest.id} has no values for '{name}'", f"it has those for: {', '.join(drawable)}"
            )
    files: dict[str, bytes] = {}
    with session.progress(len(chosen), "plot", "picture") as bar:
        for name in chosen:
            figure = DRAW[name](subject)
            files |= {f"{name}.{one}": render(figure, one) for one in formats}
            bar.update()
    save_pictures(session, "fisher", manifest.id, chosen, files, output)


@app.command("plan", epilog="Example: fqdiff plot plan --format png")
@common(*STORE_OPTIONS)
def plan(
    session: Session,
    ref: Annotated[
        str | None, typer.Argument(help="Plan: name, id or prefix.", show_default="the latest", metavar="REF")
    ] = None,
    image_format: ImageFormat = "both",
    output: Output = None,
) -> None:
    """Draw a plan: bits of every weight tensor beside its Fisher value."""
    from fqdiff.viz.plan import bits_and_fisher

    formats = image_formats(image_format)
    manifest = session.resolve(ref, ("plan",))
    figure = bits_and_fisher(session.runner.load(manifest), f"plan {manifest.id}")
    save_figure(session, manifest, "bits", figure, formats, output)


@app.command("compare", epilog="Example: fqdiff plot compare --format png")
@common(*STORE_OPTIONS)
def compare(
    session: Session,
    ref: Annotated[
        str | None, typer.Argument(help="Comparison: name, id or prefix.", show_default="the latest", metavar="REF")
    ] = None,
    image_format: ImageFormat = "both",
    output: Output = None,
) -> None:
    """Draw a comparison: image errors and FID with intervals; errors by timestep and by sampler step."""
    from fqdiff.report.data import role_labels
    from fqdiff.viz.comparison import intervals
    from fqdiff.viz.error_curves import both_curves
    from fqdiff.viz.figures import render

    formats = image_formats(image_format)
    manifest = session.resolve(ref, ("comparison",))
    value, labels, title = (
        session.runner.load(manifest),
        role_labels(session.store, manifest),
        f"comparison {manifest.id}",
    )
    figures = {"intervals": intervals(value, labels, title)}
    if value.noise_error or value.divergence:
        figures["curves"] = both_curves(value, labels, title)
    files = {f"{name}.{one}": render(figure, one) for name, figure in figures.items() for one in formats}
    save_pictures(session, "comparison", manifest.id, list(figures), files, output)


@app.command("pareto", epilog="Example: fqdiff plot pareto --format svg")
@common(*STORE_OPTIONS)
def pareto(
    session: Session,
    refs: ComparisonRefs = None,
    image_format: ImageFormat = "both",
    output: Output = None,
) -> None:
    """Draw file sizes against image error and FID, with intervals."""
    from fqdiff.report.data import collect, find_comparison
    from fqdiff.viz.pareto import pareto as draw

    formats = image_formats(image_format)
    manifest = find_comparison(session.store, refs or [])
    found = collect(session.runner, manifest)
    sizes = {row.role: row.file_bytes for row in found.rows if row.file_bytes is not None and row.role != "floor"}
    if not sizes:
        raise ArtifactNotFound(f"all models of comparison {manifest.id} are gone", "make them again: fqdiff compare")
    figure = draw(found.comparison, found.labels, sizes, f"comparison {manifest.id}")
    save_figure(session, manifest, "pareto", figure, formats, output)


@app.command("samples", epilog="Example: fqdiff plot samples --columns 12 --format png")
@common(*STORE_OPTIONS)
def samples(
    session: Session,
    refs: ComparisonRefs = None,
    columns: Annotated[int, typer.Option(min=1, max=64, help="Images of each model.")] = 12,
    image_format: ImageFormat = "both",
    output: Output = None,
) -> None:
    """Draw samples of a comparison's models side by side, each column from the same noise."""
    from fqdiff.report.data import collect, find_comparison
    from fqdiff.viz.samples import side_by_side

    formats = image_formats(image_format)
    manifest = find_comparison(session.store, refs or [])
    found = collect(session.runner, manifest)
    rows = [
        (row.label, found.images[row.role]) for row in found.rows if row.role in found.images and row.role != "floor"
    ]
    if not rows:
        raise ArtifactNotFound(f"all samples of comparison {manifest.id} are gone", "make them again: fqdiff compare")
    figure = side_by_side(rows, columns, f"comparison {manifest.id}")
    save_figure(session, manifest, "samples", figure, formats, output)


def image_formats(name: str) -> tuple[str, ...]:
    """``png``, ``svg`` or ``both`` as file formats. Raises ConfigError."""
    from fqdiff.viz.figures import FORMATS

    formats = FORMATS if name == "both" else (name,)
    if not set(formats) <= set(FORMATS):
        raise ConfigError(f"unknown format '{name}'", f"one of: {', '.join(FORMATS)}, both")
    return formats


def save_figure(
    session: Session, manifest: "Manifest", name: str, figure: "Figure", formats: tuple[str, ...], output: Path | None
) -> None:
    """Write one picture of an artifact in every format."""
    from fqdiff.viz.figures import render

    files = {f"{name}.{one}": render(figure, one) for one in formats}
    save_pictures(session, manifest.kind, manifest.id, [name], files, output)


def save_pictures(
    session: Session, kind: str, artifact: str, names: list[str], files: dict[str, bytes], output: Path | None
) -> None:
    """Write ``files`` to the folder ``output``, or to the artifact's own among the store's pictures, and say where."""
    if output is None:
        folder = f"{kind}-{artifact}"
        paths = {session.store.inside("pictures", folder, name): content for name, content in files.items()}
    else:
        paths = {output / name: content for name, content in files.items()}
    write_pictures(paths, replace=output is None)
    data = {"kind": kind, "id": artifact, "pictures": names, "files": [str(path) for path in paths]}
    session.result(data, lambda: "\n".join(str(path) for path in paths))


def write_pictures(files: "Mapping[Path, bytes]", replace: bool) -> None:
    """Write every file; unless ``replace``, none where one is there already with another content."""
    from fqdiff.store.files import write_atomically

    path = Path()
    try:
        for path, content in files.items():
            if not replace and path.exists() and path.read_bytes() != content:
                raise ConfigError(f"{path} exists, and is another file", "choose another --output")
        for path, content in files.items():
            write_atomically(path, content)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}", "choose another --output") from None
