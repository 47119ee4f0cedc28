"""``fqdiff fisher merge``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fqdiff.cli.fisher import show_fisher
from fqdiff.cli.session import Session, common
from fqdiff.configs import FisherConfig, config_from_data
from fqdiff.errors import ArtifactNotFound, LineageError

if TYPE_CHECKING:
    from fqdiff.pipeline import Step
    from fqdiff.store.manifest import Recipe
    from fqdiff.values import ModelSpec


@common("store", "name", "json", "quiet", "verbose", "dry_run", "debug")  # --force would measure all again
def merge(
    session: Session,
    ref: Annotated[
        str | None, typer.Argument(help="Id or prefix that the shards printed.", show_default="the latest unfinished")
    ] = None,
    other: Annotated[
        list[Path] | None,
        typer.Option("--from", help="Another store that holds shards, e.g. of another machine; repeatable."),
    ] = None,
) -> None:
    """Join shards to the Fisher table that one run would have made; nothing is measured."""
    from fqdiff.stages.fisher import missing_units
    from fqdiff.store.parts import StoredParts, adopt_parts, last_unfinished, unfinished
    from fqdiff.store.store import Store

    stores = [session.store, *(Store(path) for path in other or [])]
    candidates = [r for store in stores for r in unfinished(store, "fisher") if r.id.startswith(ref or "")]
    if not candidates:
        raise ArtifactNotFound(
            f"no unfinished Fisher table {ref or ''} in {', '.join(str(s.root) for s in stores)}".replace("  ", " "),
            "make its shards first, e.g. fqdiff fisher --shard 1/2; a finished table needs no merge",
        )
    ids = {r.id for r in candidates}
    latest = last_unfinished(session.store, "fisher")
    recipe = latest if ref is None and latest is not None else candidates[0]
    if len(ids) > 1 and (ref is not None or latest is None):
        raise LineageError(f"shards of {len(ids)} tables: {', '.join(sorted(ids))}", "name the one to merge")
    step = recorded_step(session, recipe)
    if session.store.find(recipe.kind, recipe.id) is not None:  # another store's shards are of no use any more
        show_fisher(session, session.make(step))
        return
    taken = [] if session.dry_run else [adopt_parts(store, session.store, recipe) for store in stores[1:]]
    spec: ModelSpec = session.runner.load(step.inputs["checkpoint"]).spec  # type: ignore[arg-type]
    everywhere = [StoredParts(store.parts_folder(recipe.kind, recipe.id), recipe) for store in stores]
    missing = missing_units(spec, step.config, everywhere[0])
    missing = [name for name in missing if all(parts.load(name) is None for parts in everywhere[1:])]  # a dry run
    if missing and not session.dry_run:
        raise ArtifactNotFound(
            f"{len(missing)} units of fisher {recipe.id} are missing, the first {missing[0]}",
            "run the shards that lack; those that are there are kept",
        )
    session.note(
        f"fisher {recipe.id}: {sum(taken)} units taken over from other stores" if taken else "all units are here"
    )
    show_fisher(session, session.make(step, {"missing": missing}))


def recorded_step(session: Session, recipe: "Recipe") -> "Step":
    """The step that ``recipe`` records. Raises ArtifactNotFound where an input is gone."""
    from fqdiff.pipeline import Step

    inputs = {}
    for source in recipe.inputs:
        found = session.store.find(source.kind, source.id)
        if found is None:
            raise ArtifactNotFound(
                f"fisher {recipe.id} needs {source.kind} {source.id}, which is not in {session.store.root}",
                "merge in the store that holds the checkpoint",
            )
        inputs[source.role] = found
    step = Step("fisher", inputs, config_from_data(FisherConfig, recipe.config), recipe.seed)
    if step.id != recipe.id:
        raise LineageError(f"fisher {recipe.id} was begun by another version of fqdiff", "measure its shards again")
    return step
