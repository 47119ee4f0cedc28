"""Images of several models side by side, each column from the same noise.

Shapes: N images, C channels, H W pixels.
"""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from fqdiff.viz.figures import new_figure, plain
from fqdiff.viz.grids import image_grid

ROW, MARGIN = 0.95, 0.5  # inches


def side_by_side(rows: Sequence[tuple[str, Tensor]], columns: int, artifact: str) -> Figure:
    """One row of ``columns`` images [N, C, H, W] per label."""
    figure = new_figure(10, MARGIN + ROW * len(rows), artifact)
    for axes, (label, images) in zip(figure.subplots(len(rows), 1, squeeze=False).flat, rows, strict=True):
        axes.imshow(np.asarray(image_grid(images[:columns], columns, 1).convert("RGB")), interpolation="nearest")
        axes.set_axis_off()
        axes.set_title(plain(label), fontsize=9, loc="left", pad=2)
    return figure


def magnified_difference(images: Tensor, others: Tensor, times: int) -> Tensor:
    """|images - others| of uint8 [N, C, H, W], so many times as strong, cut at white."""
    return ((images.int() - others.int()).abs() * times).clamp(max=255).to(torch.uint8)
