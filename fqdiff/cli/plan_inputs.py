"""Which checkpoint a plan is of, and which Fisher tables it reads: those named, or the latest that suit."""

from typing import TYPE_CHECKING

from fqdiff.cli.session import Session, only_input
from fqdiff.configs import PlanConfig
from fqdiff.errors import ArtifactNotFound

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fqdiff.store.manifest import Manifest

BEST_TABLE = "fqdiff fisher --kind trajectory --granularity weight --bins 1"


def plan_inputs(session: Session, ref: str | None, needs_table: bool) -> "dict[str, Manifest]":
    """Checkpoint and Fisher table of a plan: of the table named, of the checkpoint named, or the latest."""
    if not needs_table and ref is None:
        return {"checkpoint": session.resolve(ref, ("checkpoint",))}
    found = session.resolve(ref, ("checkpoint", "fisher") if ref else ("fisher",))
    if found.kind == "checkpoint":
        if not needs_table:
            return {"checkpoint": found}
        tables = [m for m in session.store.manifests("fisher") if (i := m.input("checkpoint")) and i.id == found.id]
        if not tables:
            raise ArtifactNotFound(f"no Fisher table of checkpoint {found.id}", f"fqdiff fisher {found.id}")
        found = tables[-1]
        session.note(f"fisher: the latest of that checkpoint, {found.id}")
    return {"checkpoint": only_input(session, found, "checkpoint"), "fisher": found}


def names_table(session: Session, ref: str | None) -> bool:
    """Whether ``ref`` is a Fisher table's."""
    return ref is not None and session.resolve(ref, ("checkpoint", "fisher")).kind == "fisher"


def budget_inputs(
    session: Session, ref: str | None, needs_table: bool, told: "Mapping[str, object]"
) -> "dict[str, Manifest]":
    """Checkpoint and Fisher table of a budget: of the table named, else of the checkpoint named, or that of the latest table.

    Not named, it is the latest table of the checkpoint that suits what is ``told``: of runs of the sampler for the score
    trajectory, of timesteps for other scores, timestep weights and phases; of runs where nothing is, since plans by what happens
    to the final image draw nearest to full precision (docs/results/budget.md), and of timesteps where there is none.
    """
    try:
        inputs = plan_inputs(session, ref, needs_table)
    except ArtifactNotFound as error:
        raise ArtifactNotFound(error.message, BEST_TABLE if "isher" in error.message else error.hint) from None
    if "fisher" not in inputs or names_table(session, ref):
        return inputs
    checkpoint = inputs["checkpoint"].id
    own = [m for m in session.store.manifests("fisher") if (i := m.input("checkpoint")) and i.id == checkpoint]
    of_runs = [m for m in own if is_of_runs(m)]
    of_timesteps = [m for m in own if not is_of_runs(m)]
    by_timestep = told.get("score") not in (None, "trajectory") or any(
        told.get(name) not in (None, getattr(PlanConfig, name)) for name in ("timestep_weights", "phases")
    )
    found = ((of_timesteps or of_runs) if by_timestep else (of_runs or of_timesteps))[-1]
    if found.id != inputs["fisher"].id:
        session.note(f"fisher: the latest of that checkpoint {'by timestep' if by_timestep else 'of runs'}, {found.id}")
    elif not by_timestep and not of_runs:
        session.note(
            f"fisher: by timestep; plans by whole runs of the sampler draw nearer to full precision: {BEST_TABLE}"
        )
    return {**inputs, "fisher": found}


def gain_inputs(session: Session, inputs: "dict[str, Manifest]") -> "dict[str, Manifest]":
    """The latest trajectory table of the plan's checkpoint, for the gains that it holds; of a plan without a table, its table.

    One that is the plan's table already is not given twice. Raises ArtifactNotFound.
    """
    table_of, checkpoint = inputs.get("fisher"), inputs["checkpoint"]
    if table_of is not None and is_of_runs(table_of):
        return {}
    found = [
        m
        for m in session.store.manifests("fisher")
        if is_of_runs(m)
        and m.recipe.config.get("window") in (0, m.recipe.config.get("steps"))
        and (i := m.input("checkpoint")) is not None
        and i.id == checkpoint.id
    ]
    if not found:
        raise ArtifactNotFound(
            f"no trajectory Fisher table of checkpoint {checkpoint.id} has measured the sampler's gain",
            f"fqdiff fisher {checkpoint.id} --kind trajectory",
        )
    session.note(f"gain: of the latest trajectory table of that checkpoint, {found[-1].id}")
    return {"fisher" if table_of is None else "trajectory": found[-1]}


def fits_to_table(session: Session, source: str | None, config: PlanConfig) -> bool:
    """Whether a plan of one width names a Fisher table, and fits ranges or codebooks to what it says."""
    return names_table(session, source) and ("fisher" in config.ranges or config.low.startswith("codebook"))


def is_of_runs(table: "Manifest") -> bool:
    """Whether a Fisher table is of sampler runs."""
    return bool(table.recipe.config.get("kind") == "trajectory")
