"""The small classifier whose penultimate layer gives the ``digits`` features, trained by fqdiff itself.

Shapes: N images, C channels, H W pixels, D features, K classes.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURES = 84


class DigitClassifier(nn.Module):
    """Two convolutions and two linear layers, after LeNet-5 (LeCun et al. 1998), whose 84 features it keeps."""

    def __init__(self, image_channels: int, image_size: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(image_channels, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.hidden = nn.Linear(32 * (image_size // 4) ** 2, FEATURES)
        self.output = nn.Linear(FEATURES, classes)

    def features(self, x: Tensor) -> Tensor:
        """[N, 84] from images [N, C, H, W] in [-1, 1]."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return F.relu(self.hidden(x.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, K]."""
        out: Tensor = self.output(self.features(x))
        return out


def in_batches(function: Callable[[Tensor], Tensor], images: Tensor, batch_size: int = 250) -> Tensor:
    """``function`` over ``images`` in batches of fixed size, joined: memory stays bounded."""
    with torch.no_grad():
        return torch.cat([function(batch) for batch in images.split(batch_size)])
