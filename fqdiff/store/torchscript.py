"""A user's own feature network, from a TorchScript file."""

from pathlib import Path

import torch
from torch import Tensor

from fqdiff.errors import DataError
from fqdiff.evidence.digits import in_batches
from fqdiff.evidence.features import FeatureNetwork, to_unit_range
from fqdiff.store.files import sha256_of


def load_torchscript(path: Path) -> FeatureNetwork:
    """The network in ``path``: float32 images [N, C, H, W] in [-1, 1] to features [N, D], or to features and logits [N, K].

    With logits its class probabilities are known, and with them the Inception score. TorchScript can execute: the file is only
    ever taken from a path that the user gave for this purpose. Raises DataError where it is missing, no TorchScript, or gives
    anything but finite numbers, one row for each image.
    """
    if not path.is_file():
        raise DataError(f"no feature network at {path}", "give a file that torch.jit.save wrote")
    digest = sha256_of(path)
    try:
        network = torch.jit.load(str(path), map_location="cpu").eval()
        pair = network.forward.schema.returns[0].type.kind() == "TupleType"
    except (RuntimeError, ValueError, AttributeError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise DataError(f"{path} is no TorchScript: {reason[:200]}", "write it with torch.jit.save") from None

    def outputs(images: Tensor, number: int) -> Tensor:
        """The features are output 0, the logits 1."""
        try:
            found = in_batches(lambda x: network(x)[number] if pair else network(x), to_unit_range(images))
        except (RuntimeError, TypeError, AttributeError, IndexError) as error:
            reason = (str(error).strip().splitlines() or [""])[-1]
            raise DataError(
                f"{path} fails on images {tuple(images.shape[1:])}: {reason[:200]}",
                "it should take float32 images [N, C, H, W] in [-1, 1], and give features, or features and logits",
            ) from None
        if found.ndim != 2 or len(found) != len(images) or not found.is_floating_point():
            raise DataError(
                f"{path} gives {found.dtype} of shape {tuple(found.shape)} for {len(images)} images",
                "it should give floats [N, D], or those and logits [N, K]",
            )
        if not torch.isfinite(found).all():
            raise DataError(f"{path} gives NaN or infinity", "check the network on images in [-1, 1]")
        return found

    def probabilities(images: Tensor, features: Tensor) -> Tensor:
        return outputs(images, 1).softmax(dim=1)

    return FeatureNetwork(
        "torchscript", digest, lambda images: outputs(images, 0), probabilities=probabilities if pair else None
    )
