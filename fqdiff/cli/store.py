"""``fqdiff store``: look at artifacts, check them, remove them."""

import shutil
from typing import Annotated

import typer

from fqdiff.cli.session import STORE_OPTIONS, Session, common
from fqdiff.cli.show import artifact_data, mebibytes, table
from fqdiff.errors import ArtifactCorrupt, ConfigError

app = typer.Typer(no_args_is_help=True, help="Look at artifacts, check them, remove them.")


@app.command("ls", epilog="Example: fqdiff store ls --kind plan")
@common(*STORE_OPTIONS)
def ls(session: Session, kind: Annotated[str | None, typer.Option(help="Only artifacts of this kind.")] = None) -> None:
    """List artifacts, oldest first."""
    from fqdiff.store.manifest import KINDS

    if kind is not None and kind not in KINDS:
        raise ConfigError(f"unknown kind '{kind}'", f"one of: {', '.join(KINDS)}")
    names: dict[tuple[str, str], list[str]] = {}
    for name, target in session.store.names().items():
        names.setdefault(target, []).append(name)
    found = list(session.store.manifests(kind))
    rows = [
        [m.kind, m.id, m.created[:19].replace("T", " "), f"{m.bytes:,}", ", ".join(names.get((m.kind, m.id), []))]
        for m in found
    ]
    data = {"store": str(session.store.root), "artifacts": [artifact_data(session.store, m) for m in found]}
    session.result(
        data, lambda: table(("kind", "id", "made (UTC)", "bytes", "names"), rows) if rows else "no artifacts"
    )


@app.command("show", epilog="Example: fqdiff store show latest")
@common(*STORE_OPTIONS)
def show(session: Session, ref: Annotated[str, typer.Argument(help="Name, id, unique prefix or latest.")]) -> None:
    """Print an artifact's manifest: recipe, inputs, files, environment."""
    from dataclasses import asdict

    from fqdiff.store.manifest import to_json

    manifest = session.store.resolve(ref)
    folder = session.store.directory(manifest.kind, manifest.id)
    session.result({"path": str(folder), **asdict(manifest)}, lambda: f"{folder}\n{to_json(manifest).rstrip()}")


@app.command("lineage", epilog="Example: fqdiff store lineage latest")
@common(*STORE_OPTIONS)
def lineage(session: Session, ref: Annotated[str, typer.Argument(help="Name, id, unique prefix or latest.")]) -> None:
    """Print everything an artifact was made from, down to the data."""
    chain = list(session.store.lineage(session.store.resolve(ref)))
    data = {
        "lineage": [{"depth": d, "role": role, "artifact": name, "there": m is not None} for d, m, role, name in chain]
    }
    lines = []
    for depth, manifest, role, name in chain:
        state = manifest.command if manifest else ("outside the store" if name.startswith("inception/") else "gone")
        lines.append("  " * depth + (f"{role}: " if role else "") + f"{name}  [{state}]")
    session.result(data, lambda: "\n".join(lines))


@app.command("verify", epilog="Example: fqdiff store verify")
@common(*STORE_OPTIONS)
def verify(
    session: Session, ref: Annotated[str | None, typer.Argument(help="One artifact.", show_default="all")] = None
) -> None:
    """Compare every file with its recorded size and hash."""
    chosen = [session.store.resolve(ref)] if ref is not None else list(session.store.manifests())
    damaged = []
    for manifest in chosen:
        try:
            session.store.verify(manifest)
        except ArtifactCorrupt as error:
            damaged.append(error.message)
    total = sum(m.bytes for m in chosen)
    data = {"checked": len(chosen), "bytes": total, "damaged": damaged}
    session.result(
        data, lambda: "\n".join([*damaged, f"{len(chosen)} artifacts, {mebibytes(total)}: {len(damaged)} damaged"])
    )
    if damaged:
        raise ArtifactCorrupt(
            f"{len(damaged)} of {len(chosen)} artifacts are damaged", "fqdiff store rm REF --force, and make them again"
        )


@app.command("gc", epilog="Example: fqdiff store gc --dry-run")
@common("dry_run", *STORE_OPTIONS)
def gc(session: Session) -> None:
    """Remove what killed runs left behind: temporary files, and partial results of finished artifacts.

    Artifacts stay. Run it while nothing else writes to the store.
    """
    found = session.store.leftovers()
    if not session.dry_run:
        for path in found:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    verb = "would remove" if session.dry_run else "removed"
    data = {"removed": [] if session.dry_run else [str(p) for p in found], "found": [str(p) for p in found]}
    session.result(data, lambda: "\n".join([*(str(p) for p in found), f"{verb} {len(found)} leftovers"]))


@app.command("rm", epilog="Example: fqdiff store rm 3fa94b07 --force")
@common("force", "dry_run", *STORE_OPTIONS)
def rm(session: Session, refs: Annotated[list[str], typer.Argument(help="Names, ids or unique prefixes.")]) -> None:
    """Remove artifacts; refused where others were made from them, unless --force."""
    chosen = [session.store.resolve(ref) for ref in refs]
    for manifest in chosen:
        if not session.dry_run:
            session.store.remove(manifest, session.force)
    verb = "would remove" if session.dry_run else "removed"
    data = {"removed": [f"{m.kind}/{m.id}" for m in chosen], "dry_run": session.dry_run}
    session.result(data, lambda: "\n".join(f"{verb} {m.kind}/{m.id} ({mebibytes(m.bytes)})" for m in chosen))
