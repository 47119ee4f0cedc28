"""How far two images of the same noise are apart, image by image. All in float64.

Shapes: N images, C channels, H W pixels, D features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fqdiff.evidence.features import to_unit_range

WINDOW, SIGMA = 11, 1.5
K1, K2, LEVELS = 0.01, 0.03, 255
PEAK = 2.0  # width of the range [-1, 1]
BATCH = 250


def image_mse(a: Tensor, b: Tensor) -> Tensor:
    """[N]: mean squared difference of pixels in [-1, 1]; ``a``, ``b`` uint8 [N, C, H, W]."""
    return (to_unit_range(a).double() - to_unit_range(b).double()).square().flatten(1).mean(dim=1)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """[N] decibel: 10 log10(peak^2 / MSE), the peak being the whole range.

    Equal images count as one level off in one pixel, the smallest difference there can be: infinity has no mean.
    """
    smallest = (PEAK / LEVELS) ** 2 / a[0].numel()
    return 10 * (PEAK**2 / image_mse(a, b).clamp(min=smallest)).log10()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """[N]: structural similarity (Wang et al. 2004, eq. 13), at most 1; ``a``, ``b`` uint8 [N, C, H, W].

    A Gaussian window of 11 x 11 pixels, sigma 1.5, at every place where it fits; the mean over places and channels. Images
    smaller than that have the largest odd window that fits.
    """
    side = min(WINDOW, *(n - 1 + n % 2 for n in a.shape[2:]))
    place = torch.arange(side, dtype=torch.float64, device=a.device) - side // 2
    line = (-place.square() / (2 * SIGMA**2)).exp()
    line = line / line.sum()

    def local_mean(x: Tensor) -> Tensor:
        mean: Tensor = F.conv2d(F.conv2d(x, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))
        return mean

    c1, c2 = (K1 * LEVELS) ** 2, (K2 * LEVELS) ** 2
    done = []
    for x, y in zip(a.split(BATCH), b.split(BATCH), strict=True):
        x, y = (t.double().flatten(0, 1)[:, None] for t in (x, y))
        mean_x, mean_y = local_mean(x), local_mean(y)
        var_x, var_y = local_mean(x * x) - mean_x**2, local_mean(y * y) - mean_y**2
        covariance = local_mean(x * y) - mean_x * mean_y
        luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
        structure = (2 * covariance + c2) / (var_x + var_y + c2)
        done.append((luminance * structure).flatten(1).mean(dim=1).view(-1, a.shape[1]).mean(dim=1))
    return torch.cat(done)


def feature_distance(a: Tensor, b: Tensor) -> Tensor:
    """[N]: Euclidean distance of the features ``a`` [N, D] of one set from ``b`` of the other."""
    return (a.double() - b.double()).square().sum(dim=1).sqrt()
