"""Write a checkpoint as a pretrained model: NAME.safetensors in float16, and NAME.json, which says where it comes from.

    python examples/export_checkpoint.py mnist-small latest --store fqdiff-store --metrics METRICS

Metrics may be those of the checkpoint or, better, of the very file: export, import the file, measure it, export again. The
file's bytes stay the same.
"""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from fqdiff.context import Context
from fqdiff.errors import LineageError
from fqdiff.pipeline import Runner
from fqdiff.quant.formats import PerTensor, get_format
from fqdiff.quant.packed import pack_tensor
from fqdiff.store.files import sha256_of, write_atomically
from fqdiff.store.manifest import Manifest
from fqdiff.store.model_files import write_model
from fqdiff.store.sources import dataset_config, load_dataset
from fqdiff.store.store import Store
from fqdiff.values import Checkpoint, Dataset, QuantizedCheckpoint

CHECKPOINTS = Path(__file__).parent / "checkpoints"
LICENCE = (
    "Apache-2.0. The weights are derived from the images of the data set; for MNIST's origin and licence see NOTICE."
)
PRECISION = (
    "Every parameter was rounded to float16, so that the float32 weights that an import gives are exactly representable in "
    "float16: casting them to float16 again costs nothing."
)


def main(
    name: Annotated[str, typer.Argument(help="Name of the pretrained model.")],
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint: name, id, prefix or latest.")],
    store: Annotated[Path, typer.Option(help="Folder of the artifact store.")] = Path("fqdiff-store"),
    metrics: Annotated[list[str] | None, typer.Option(help="Metrics of its samples; may be given again.")] = None,
    dataset: Annotated[str, typer.Option(help="Whose images Fisher and FID take by default.")] = "mnist5k",
    folder: Annotated[Path, typer.Option(help="Where the two files go.")] = CHECKPOINTS,
) -> None:
    """Write NAME.safetensors and NAME.json."""
    opened = Store(store)
    runner = Runner(opened)
    manifest = opened.resolve(checkpoint, ("checkpoint",))
    model: Checkpoint = runner.load(manifest)
    trained_on = parent(opened, manifest, "dataset")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.safetensors"
    packed = {key: pack_tensor(value, get_format("float16"), PerTensor()) for key, value in model.tensors.items()}
    write_model(QuantizedCheckpoint(model.spec, packed), path)
    digest = sha256_of(path)
    default = load_dataset(dataset_config(dataset, model.spec.image_shape[1]), 0, Context())
    facts = {
        "schema": 1,
        "name": name,
        "file": path.name,
        "bytes": path.stat().st_size,
        "sha256": digest,
        "description": describe(model, manifest, runner.load(trained_on)),
        "precision": PRECISION,
        "licence": LICENCE,
        "dataset": dataset,
        "overlap": overlap(default, runner.load(trained_on)),
        "metrics": [quality(runner, ref, manifest, digest) for ref in metrics or []],
        "checkpoint": plain(manifest),
        "trained_on": plain(trained_on),
    }
    write_atomically(folder / f"{name}.json", (json.dumps(facts, indent=1) + "\n").encode())
    print(f"{path}: {facts['bytes']:,} bytes, sha256 {digest}\n{facts['description']}")


def describe(model: Checkpoint, manifest: Manifest, trained_on: Dataset) -> str:
    """The model in one sentence, every number taken from the artifacts."""
    config, spec = manifest.recipe.config, model.spec
    parameters = sum(t.numel() for t in model.tensors.values())
    shape = " x ".join(map(str, spec.image_shape))
    return (
        f"U-Net of {parameters:,} parameters for images of {shape}, {spec.prediction} prediction, {spec.schedule} schedule; "
        f"trained for {config['steps']:,} steps of {config['batch_size']} on the {len(trained_on.train):,} training images of "
        f"{trained_on.name}; averaged weights"
    )


def overlap(default: Dataset, trained_on: Dataset) -> dict[str, int]:
    """How many images of the default data set the model was trained on, image by image and pixel by pixel."""
    seen = {image.numpy().tobytes() for image in trained_on.train}

    def count(images: Any) -> int:
        return sum(image.numpy().tobytes() in seen for image in images)

    return {
        "train_images": len(default.train),
        "train_images_trained_on": count(default.train),
        "held_out_images": len(default.reference),
        "held_out_images_trained_on": count(default.reference),
    }


def quality(runner: Runner, ref: str, checkpoint: Manifest, digest: str) -> dict[str, Any]:
    """The result of ``ref`` with the ids, sampler and seed behind it. Raises LineageError where it is another model's."""
    store = runner.store
    metrics = store.resolve(ref, ("metrics",))
    samples = parent(store, metrics, "samples")
    model = parent(store, samples, "model")
    if model.id != checkpoint.id and model.recipe.config.get("content") != digest:
        raise LineageError(
            f"metrics {metrics.id} are those of {model.kind} {model.id}", "name metrics of this checkpoint"
        )
    return {
        **asdict(runner.load(metrics)),
        "sampler": dict(samples.recipe.config),
        "weights": "as in the file" if model.id != checkpoint.id else "before rounding to float16",
        "ids": {m.kind: m.id for m in (metrics, samples, model)} | {i.role: i.id for i in metrics.recipe.inputs[1:]},
    }


def parent(store: Store, manifest: Manifest, role: str) -> Manifest:
    """The artifact that fills ``role`` in the recipe of ``manifest``."""
    found = manifest.input(role)
    source = store.find(found.kind, found.id) if found else None
    if source is None:
        raise LineageError(f"the {role} of {manifest.kind} {manifest.id} is gone", "export from the store that made it")
    return source


def plain(manifest: Manifest) -> dict[str, Any]:
    """``manifest`` as JSON data; only the folder of the store, which means nothing elsewhere, is left out of the command."""
    return {**asdict(manifest), "command": re.sub(r" --store[ =]\S+", "", manifest.command)}


if __name__ == "__main__":
    typer.run(main)
