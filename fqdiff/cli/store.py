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
    from fqdiff.store.manifest import KINDS

    chain = list(session.store.lineage(session.store.resolve(ref)))
    data = {
        "lineage": [{"depth": d, "role": role, "artifact": name, "there": m is not None} for d, m, role, name in chain]
    }
    lines = []
    for depth, manifest, role, name in chain:
        state = manifest.command if manifest else ("gone" if name.partition("/")[0] in KINDS else "outside the store")
        lines.append("  " * depth + (f"{role}: " if role else "") + f"{name}  [{state}]")
    session.result(data, lambda: "\n".join(lines))


@app.command("verify", epilog="Example: fqdiff store verify")
@common(*STORE_OPTIONS)
def verify(
    session: Session, ref: Annotated[str | None, typer.Argument(help="One artifact.", show_default="all")] = None
) -> None:
    """Compare every file with its recorded size and hash."""
    if ref is not None:
        found = session.store.resolve(ref)
        chosen = [(found.kind, found.id)]
    else:
        chosen = list(session.store.entries())
    damaged, total = [], 0
    for kind, artifact_id in chosen:
        try:
            manifest = session.store.find(kind, artifact_id)
            if manifest is not None:
                session.store.verify(manifest)
                total += manifest.bytes
        except ArtifactCorrupt as error:
            damaged.append(error.message)
    data = {"checked": len(chosen), "bytes": total, "damaged": damaged}
    session.result(
        data,
        lambda: "\n".join([*damaged, f"{len(chosen)} artifacts: {len(damaged)} damaged, {mebibytes(total)} sound"]),
    )
    if damaged:
        raise ArtifactCorrupt(
            f"{len(damaged)} of {len(chosen)} artifacts are damaged",
            "fqdiff store rm KIND/ID --force, and make them again",
        )


@app.command("gc", epilog="Example: fqdiff store gc --dry-run")
@common(*STORE_OPTIONS)
def gc(session: Session, dry_run: Annotated[bool, typer.Option(help="Only say what would go.")] = False) -> None:
    """Remove what killed runs left behind: temporary files, and partial results of finished artifacts.

    Artifacts stay. Run it while nothing else writes to the store.
    """
    found = session.store.leftovers()
    if not dry_run:
        for path in found:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    verb = "would remove" if dry_run else "removed"
    data = {"removed": [] if dry_run else [str(p) for p in found], "found": [str(p) for p in found]}
    session.result(data, lambda: "\n".join([*(str(p) for p in found), f"{verb} {len(found)} leftovers"]))


@app.command("rm", epilog="Example: fqdiff store rm 3fa94b07 --force")
@common(*STORE_OPTIONS)
def rm(
    session: Session,
    refs: Annotated[list[str], typer.Argument(help="Names, ids, unique prefixes, or KIND/ID.")],
    force: Annotated[
        bool, typer.Option(help="Also what others were made from; a damaged artifact is named as KIND/ID.")
    ] = False,
    dry_run: Annotated[bool, typer.Option(help="Only say what would go.")] = False,
) -> None:
    """Remove artifacts; refused where others were made from them, unless --force."""
    chosen = list(dict.fromkeys(_target(session, ref, force) for ref in refs))
    if not force:
        session.store.check_unused(chosen)
    if not dry_run:
        for kind, artifact_id in chosen:
            session.store.remove(kind, artifact_id)
    verb = "would remove" if dry_run else "removed"
    data = {"removed": [f"{kind}/{artifact_id}" for kind, artifact_id in chosen], "dry_run": dry_run}
    session.result(data, lambda: "\n".join(f"{verb} {kind}/{artifact_id}" for kind, artifact_id in chosen))


def _target(session: Session, ref: str, force: bool) -> tuple[str, str]:
    """Kind and id that ``ref`` stands for; with ``force`` KIND/ID needs no readable manifest."""
    kind, _, artifact_id = ref.partition("/")
    if force and (kind, artifact_id) in set(session.store.entries()):
        return kind, artifact_id
    found = session.store.resolve(ref)
    return found.kind, found.id
