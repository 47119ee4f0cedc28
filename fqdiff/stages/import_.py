"""A model that was trained elsewhere becomes a checkpoint, which every other stage takes as it takes a trained one."""

from fqdiff.configs import ImportConfig
from fqdiff.context import Context
from fqdiff.errors import DataError
from fqdiff.preview import preview
from fqdiff.quant.packed import unpack_tensor
from fqdiff.values import Checkpoint, Dataset, QuantizedCheckpoint

# Sampled from the imported weights themselves, not shipped beside them: so few, in so few steps (a twentieth of what training
# affords) that an import of 2 million parameters is done in about a second.
PREVIEW_IMAGES = 16
PREVIEW_STEPS = 10


def import_checkpoint(
    file: QuantizedCheckpoint, dataset: Dataset, config: ImportConfig, seed: int, context: Context
) -> Checkpoint:
    """The weights of ``file`` in float32, with the data set that later stages take their images from.

    There is no training loss: it was not seen here. Raises DataError where the images are not of the model's shape.
    """
    shape = tuple(dataset.images.shape[1:])
    if shape != file.spec.image_shape:
        raise DataError(
            f"images of shape {shape} for {config.source}, a model of {file.spec.image_shape}",
            "choose another --dataset",
        )
    tensors = {name: unpack_tensor(packed) for name, packed in file.packed.items()}
    images = preview(file.spec, tensors, seed, context.device, PREVIEW_IMAGES, PREVIEW_STEPS)
    return Checkpoint(file.spec, tensors, None, images)
