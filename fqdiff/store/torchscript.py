"""A user's own feature network, from a TorchScript file."""

from pathlib import Path

import torch
from torch import Tensor

from fqdiff.errors import DataError
from fqdiff.evidence.digits import in_batches
from fqdiff.evidence.features import FeatureNetwork, to_unit_range
from fqdiff.store.files import sha256_of


def load_torchscript(path: Path) -> FeatureNetwork:
    """The network in ``path``: float32 images [N, C, H, W] in [-1, 1] to features [N, D].

    TorchScript can execute: the file is only ever taken from a path that the user gave for this purpose. Raises DataError
    where it is missing, no TorchScript, or gives anything but one finite vector for each image.
    """
    if not path.is_file():
        raise DataError(f"no feature network at {path}", "give a file that torch.jit.save wrote")
    digest = sha256_of(path)
    try:
        network = torch.jit.load(str(path), map_location="cpu").eval()
    except (RuntimeError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise DataError(f"{path} is no TorchScript: {reason[:200]}", "write it with torch.jit.save") from None

    def extract(images: Tensor) -> Tensor:
        try:
            features = in_batches(network, to_unit_range(images))
        except (RuntimeError, TypeError, AttributeError) as error:
            reason = (str(error).strip().splitlines() or [""])[-1]
            raise DataError(
                f"{path} fails on images {tuple(images.shape[1:])}: {reason[:200]}",
                "it should take float32 images [N, C, H, W] in [-1, 1]",
            ) from None
        if features.ndim != 2 or len(features) != len(images) or not features.is_floating_point():
            raise DataError(
                f"{path} gives {features.dtype} of shape {tuple(features.shape)} for {len(images)} images",
                "it should give floats [N, D]",
            )
        if not torch.isfinite(features).all():
            raise DataError(f"{path} gives NaN or infinity", "check the network on images in [-1, 1]")
        return features

    return FeatureNetwork("torchscript", digest, extract)
