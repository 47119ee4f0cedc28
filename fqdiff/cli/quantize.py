"""``fqdiff quantize``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fqdiff.cli.output import copy_out
from fqdiff.cli.session import NOTHING_RANDOM, Session, common, only_input
from fqdiff.cli.show import artifact_data, mebibytes
from fqdiff.configs import QuantizeConfig

if TYPE_CHECKING:
    from fqdiff.pipeline import Step
    from fqdiff.store.manifest import Manifest


@common(*NOTHING_RANDOM)
def quantize(
    session: Session,
    source: Annotated[
        str | None, typer.Argument(help="Plan: name, id or prefix.", show_default="the latest", metavar="[PLAN]")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also copy the safetensors file here.")] = None,
) -> None:
    """Write the smaller checkpoint that a plan describes."""
    chosen = session.resolve(source, ("plan",))
    step = quantize_step(session, chosen)
    manifest = session.make(step)
    if manifest is None:
        return
    promised = session.runner.load(chosen).file_bytes
    file = manifest.file("model.safetensors")
    path = session.store.directory(manifest.kind, manifest.id) / file.name
    if output is not None:
        session.store.verify(manifest)
        copy_out(path, output)
    data = {
        **artifact_data(session.store, manifest),
        "file": str(path),
        "file_bytes": file.bytes,
        "promised_bytes": promised,
    }

    def text() -> str:
        same = "as planned" if file.bytes == promised else f"the plan said {promised:,}"
        return f"quantized {manifest.id}: {mebibytes(file.bytes)}, {same}\n{output or path}"

    session.result(data, text)


def quantize_step(session: Session, plan_manifest: "Manifest") -> "Step":
    """The step that carries out a plan on the checkpoint it was made for, with its Fisher table if that has single weights."""
    from fqdiff.pipeline import Step

    inputs = {"checkpoint": only_input(session, plan_manifest, "checkpoint"), "plan": plan_manifest}
    if plan_manifest.input("fisher") is not None:
        table = only_input(session, plan_manifest, "fisher")
        if table.recipe.config.get("granularity") == "weight":
            inputs["fisher"] = table
    return Step("quantize", inputs, QuantizeConfig())
