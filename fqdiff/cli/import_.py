"""``fqdiff import``."""

from typing import TYPE_CHECKING, Annotated

import typer

from fqdiff.cli.session import NOTHING_RANDOM, Session, common
from fqdiff.cli.train import choose_dataset, show_checkpoint
from fqdiff.configs import DatasetConfig, ImportConfig

if TYPE_CHECKING:
    from fqdiff.pipeline import Step
    from fqdiff.store.pretrained import ModelFile

EXAMPLE = "Example: fqdiff import pretrained:mnist-small"


@common(*(name for name in NOTHING_RANDOM if name != "config"))
def import_(
    session: Session,
    source: Annotated[
        str,
        typer.Argument(
            help="pretrained:NAME, or a .safetensors model file in half or full precision.", metavar="SOURCE"
        ),
    ],
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Images for Fisher and FID: mnist, mnist5k, ... or folder:PATH, as for train.",
            show_default="the pretrained model's; else mnist if it can be had, else mnist5k",
        ),
    ] = None,
) -> None:
    """Take a model that is trained already as a checkpoint."""
    from fqdiff.store.pretrained import open_model

    file = open_model(source)
    if file.description:
        session.note(f"{file.source}: {file.description}")
    data = choose_dataset(session, dataset or file.dataset, file.model.spec.image_shape[1])
    manifest = session.make(import_step(file, data), {"source": file.source, "dataset": data.name})
    if manifest is not None:
        show_checkpoint(session, manifest)


def import_step(file: "ModelFile", dataset: DatasetConfig) -> "Step":
    """The step that makes ``file`` a checkpoint, to be used with the images of ``dataset``."""
    from fqdiff.pipeline import External, Step

    inputs: dict[str, Step | External] = {
        "file": External("file", file.sha256[:16], file.model),
        "dataset": Step("dataset", {}, dataset),
    }
    return Step("import", inputs, ImportConfig(file.source, file.sha256))
