"""Feature networks: images in the fixed range [0, 255] to vectors, each with a name and a hash that travel with results."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fqdiff.errors import DataError


@dataclass(frozen=True)
class FeatureNetwork:
    """``extract`` maps uint8 images [N, C, H, W] to features [N, D]; ``sha256`` identifies the weights behind it.

    ``confidence``, where the network classifies: mean top-1 probability over images. ``probabilities``, there too: from images
    and the features that ``extract`` gave of them to those of all classes, [N, K].
    """

    name: str
    sha256: str
    extract: Callable[[Tensor], Tensor]
    confidence: Callable[[Tensor], float] | None = None
    probabilities: Callable[[Tensor, Tensor], Tensor] | None = None


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 [N, C, H, W] -> float32 in [-1, 1]: one fixed map for every image, never a stretch per image."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Float images in [-1, 1] -> uint8 by the inverse of :func:`to_unit_range`, out-of-range values clamped."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def as_rgb(images: Tensor) -> Tensor:
    """One channel becomes three equal ones; three stay."""
    if images.shape[1] == 3:
        return images
    if images.shape[1] == 1:
        return images.expand(-1, 3, -1, -1)
    raise DataError(f"{images.shape[1]} image channels for a network of RGB images", "use 1 or 3, or --features digits")


def inception_features(network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """2048 features of uint8 images [N, C, H, W] by clean-fid's rule (Parmar et al. 2022): PIL bicubic to 299 x 299.

    ``network`` is clean-fid's Inception, called with float images [N, 3, 299, 299] in [0, 255].
    """
    from cleanfid.resize import build_resizer

    resize = build_resizer("clean")
    resized = np.stack([resize(image.permute(1, 2, 0).numpy()) for image in as_rgb(images)])
    return network(torch.from_numpy(resized).permute(0, 3, 1, 2))
