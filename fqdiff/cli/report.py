"""``fqdiff report``: a comparison for people, as one HTML page or as Markdown."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fqdiff.cli.plot import write_pictures
from fqdiff.cli.session import STORE_OPTIONS, Session, common

if TYPE_CHECKING:
    from fqdiff.store.manifest import Manifest

EXAMPLE = "Example: fqdiff report demo-int8 demo-int4 --output report.html"
REFS_HELP = "A comparison; or models, samples or plans: the latest comparison that has them all."


@common(*STORE_OPTIONS)
def report(
    session: Session,
    refs: Annotated[
        list[str] | None, typer.Argument(help=REFS_HELP, show_default="the latest comparison", metavar="REF")
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Verdict and tables as Markdown, on stdout unless --output is given.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="File to write.", show_default="pictures/report-ID.html in the store")
    ] = None,
) -> None:
    """Write a comparison as one HTML page that needs nothing else, or as Markdown."""
    from fqdiff.report.data import collect, find_comparison
    from fqdiff.report.markdown import markdown as as_markdown
    from fqdiff.report.page import SECTIONS, html_page
    from fqdiff.report.words import title, verdict

    manifest: Manifest = find_comparison(session.store, refs or [])
    if not refs:
        session.note(f"comparison: the latest, {manifest.id}")
    found = collect(session.runner, manifest)
    if markdown:
        content = as_markdown(found)
    else:
        with session.progress(len(SECTIONS), "report", "section") as bar:
            content = html_page(found, bar.update)
    data = {"kind": manifest.kind, "id": manifest.id, "title": title(found), "verdict": verdict(found)}
    if markdown and output is None:
        session.result({**data, "markdown": content}, lambda: content)
        return
    path = output or session.store.inside("pictures", f"report-{manifest.id}.html")
    written = content.encode()
    write_pictures({path: written}, replace=output is None)
    session.result({**data, "file": str(path), "bytes": len(written)}, lambda: str(path))
