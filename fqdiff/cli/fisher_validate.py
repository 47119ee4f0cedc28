"""``fqdiff fisher validate``."""

from typing import TYPE_CHECKING, Annotated

import typer

from fqdiff.cli.session import Session, common, only_input
from fqdiff.cli.show import artifact_data, table
from fqdiff.configs import FISHER_KINDS, ValidateConfig
from fqdiff.errors import ArtifactNotFound, ConfigError, LineageError

if TYPE_CHECKING:
    from fqdiff.store.manifest import Manifest
    from fqdiff.values import Correlation, Validation, Verdict

EXAMPLE = "Example: fqdiff fisher validate --formats int8,int4,int2"
WORDS = {"output_error": "output error", "image_error": "image error"}


@common()
def validate(
    session: Session,
    checkpoint: Annotated[
        str | None, typer.Argument(help="Checkpoint: name, id or prefix.", show_default="the latest")
    ] = None,
    fisher: Annotated[
        list[str] | None,
        typer.Option(help="Fisher table to test; repeat for several kinds.", show_default="the latest of each kind"),
    ] = None,
    formats: Annotated[
        str | None,
        typer.Option(help="Formats to try each tensor in.", show_default=",".join(ValidateConfig.formats)),
    ] = None,
    timesteps: Annotated[
        int | None,
        typer.Option(min=1, help="Timesteps, denser near 0.", show_default=f"{ValidateConfig.timesteps}"),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="Held-out images at each timestep.", show_default=f"{ValidateConfig.samples}"),
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(min=0, help="Pairs of final images, 0 for none.", show_default=f"{ValidateConfig.images}"),
    ] = None,
    plans: Annotated[
        int | None,
        typer.Option(min=0, help="Random whole plans, 0 for no plans.", show_default=f"{ValidateConfig.plans}"),
    ] = None,
) -> None:
    """Test what Fisher tables foretell: quantize each tensor alone, and compare with other scores."""
    from fqdiff.pipeline import Step

    source, tables = validation_inputs(session, checkpoint, fisher or [])
    chosen = tuple(part.strip() for part in formats.split(",") if part.strip()) if formats is not None else None
    config = session.settings(
        "validate",
        ValidateConfig,
        {},
        formats=chosen,
        timesteps=timesteps,
        samples=samples,
        images=images,
        plans=plans,
    )
    inputs = {"checkpoint": source, "dataset": only_input(session, source, "dataset"), **tables}
    manifest = session.make(Step("validate", inputs, config, session.seed))
    if manifest is None:
        return
    value: Validation = session.runner.load(manifest)
    data = {
        **artifact_data(session.store, manifest),
        "candidates": len(value.candidates),
        "timesteps": value.timesteps.tolist(),
        "scores": score_rows(value),
        "correlations": [vars(row) for row in value.correlations],
        "verdicts": [vars(row) for row in value.verdicts],
        "errors": [vars(row) for row in value.errors],
    }
    session.result(data, lambda: validation_text(session, manifest, value))


def validation_inputs(
    session: Session, checkpoint: str | None, refs: list[str]
) -> "tuple[Manifest, dict[str, Manifest]]":
    """The checkpoint and its Fisher tables by kind: those named, or the latest of each kind."""
    named = [session.store.resolve(ref, ("fisher",)) for ref in refs]
    if checkpoint is None and named:
        source = only_input(session, named[0], "checkpoint")
    else:
        source = session.resolve(checkpoint, ("checkpoint",))
    own = [m for m in session.store.manifests("fisher") if (i := m.input("checkpoint")) and i.id == source.id]
    tables: dict[str, Manifest] = {}
    for manifest in named or own:
        kind = str(manifest.recipe.config.get("kind"))
        if kind not in FISHER_KINDS:
            raise ConfigError(f"Fisher table {manifest.id} is of kind '{kind[:50]}'", "make it again: fqdiff fisher")
        if named and kind in tables:
            raise ConfigError(f"two {kind} Fisher tables", "give one of each kind")
        if manifest not in own:
            raise LineageError(
                f"Fisher table {manifest.id} is not of checkpoint {source.id}", f"fqdiff fisher {source.id}"
            )
        tables[kind] = manifest
    if not tables:
        raise ArtifactNotFound(f"no Fisher table of checkpoint {source.id}", f"fqdiff fisher {source.id}")
    for kind, manifest in tables.items():
        if not named:
            session.note(f"fisher: the latest {kind} table of that checkpoint, {manifest.id}")
    return source, tables


def score_rows(value: "Validation") -> list[dict[str, object]]:
    """One row per score: rho with its interval for both targets, the worst rho for output error within a bit width, and
    measured over predicted: median, 5 % and 95 % quantiles.
    """
    ways = [shape.way for shape in value.errors if " " not in shape.way]
    found = {(r.score, r.target, r.subset): r for r in value.correlations}
    rows: list[dict[str, object]] = []
    for score in dict.fromkeys(r.score for r in value.correlations if r.subset == "all"):
        row: dict[str, object] = {"score": score}
        for target in WORDS:
            overall = found.get((score, target, "all"))
            row[target] = overall.rho if overall else None
            row[f"{target}_interval"] = overall.interval if overall else None
        within = [r.rho for r in (found.get((score, "output_error", way)) for way in ways) if r and r.rho is not None]
        in_unit = next((r for t in WORDS if (r := found.get((score, t, "all"))) and r.ratio is not None), None)
        row["worst_rho"] = min(within, default=None)
        row["ratio"] = in_unit.ratio if in_unit else None
        row["spread"] = in_unit.spread if in_unit else None
        rows.append(row)
    return rows


def validation_text(session: Session, manifest: "Manifest", value: "Validation") -> str:
    """Scores, what the errors look like, whole plans, and in words who wins."""
    rows = score_rows(value)
    header = ("score", "rho, output error", "rho, image error", "worst within bits", "measured / predicted")
    cells = [
        [
            str(r["score"]),
            _rho(r["output_error"], r["output_error_interval"]),
            _rho(r["image_error"], r["image_error_interval"]),
            f"{r['worst_rho']:.3f}" if r["worst_rho"] is not None else "",
            _ratio(r["ratio"], r["spread"]),
        ]
        for r in sorted(rows, key=lambda r: -_order(r["output_error"]))
    ]
    t = value.timesteps
    title = (
        f"validation {manifest.id}: {len(value.candidates)} candidates, "
        f"{len(t)} timesteps {int(t[0])}-{int(t[-1])}; Spearman's rho, 95 % intervals over tensors"
    )
    parts = [title, table(header, cells), "", error_text(value)]
    if value.plans.labels:
        parts += ["", plan_text(value)]
    parts += ["", *(verdict_text(v) for v in value.verdicts)]
    return "\n".join([*parts, f"look at {session.store.directory(manifest.kind, manifest.id) / 'scatter.png'}"])


def error_text(value: "Validation") -> str:
    """By way of storing: measured over predicted, and what the errors have in common."""
    scored = [s for s in value.scores if s.endswith("_mean") or s == "gram"]
    found = {(r.score, r.subset): r for r in value.correlations if r.target == "output_error"}
    header = ("stored as", *(f"/ {s}" for s in scored), "shift of the mean", "cosine between tensors")
    cells = []
    for e in value.errors:
        ratios = [_ratio(r.ratio, r.spread) if (r := found.get((s, e.way))) else "" for s in scored]
        cells.append([e.way, *ratios, f"{100 * e.shift_share:.1f} %", f"{e.low:+.2f} to {e.high:+.2f}"])
    title = "measured / predicted output error, median (5 to 95 % of tensors), and what the errors look like"
    return title + "\n" + table(header, cells)


def plan_text(value: "Validation") -> str:
    """Whole plans: rho of every sum of scores with both errors."""
    rows: dict[str, dict[str, Correlation]] = {}
    for row in value.correlations:
        if row.subset == "plans":
            rows.setdefault(row.score, {})[row.target] = row
    header = ("sum over the plan", *(f"rho, {WORDS[t]}" for t in WORDS), "measured / predicted")
    cells = []
    for score, found in rows.items():
        ratio = next((_ratio(r.ratio, r.spread) for r in found.values() if r.ratio is not None), "")
        shown = [_rho(found[t].rho, found[t].interval) if t in found else "" for t in WORDS]
        cells.append([score, *shown, ratio])
    return f"{len(value.plans.labels)} whole plans, 95 % intervals over plans\n" + table(header, cells)


def verdict_text(verdict: "Verdict") -> str:
    """One sentence: which score is better, or that the two cannot be told apart."""
    target = WORDS[verdict.target]
    pair = f"{verdict.better} and {verdict.other}"
    if verdict.interval is None:
        return f"{target}, {verdict.question}: too few tensors to tell {pair} apart"
    low, high = verdict.interval
    span = f"difference {verdict.difference:+.4f} [{low:+.4f}, {high:+.4f}]"
    if low <= 0 <= high:
        return f"{target}, {verdict.question}: {pair} cannot be told apart, {span}"
    return f"{target}, {verdict.question}: {verdict.better} beats {verdict.other}, {span}"


def _order(rho: object) -> float:
    return rho if isinstance(rho, float) else -2.0


def _ratio(ratio: object, spread: object) -> str:
    if not isinstance(ratio, float):
        return ""
    return f"{ratio:.2f}" + (f" ({spread[0]:.2f}-{spread[1]:.2f})" if isinstance(spread, tuple) else "")


def _rho(rho: object, interval: object) -> str:
    if not isinstance(rho, float):
        return ""
    return f"{rho:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]" if isinstance(interval, tuple) else f"{rho:.3f}"
