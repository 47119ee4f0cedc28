"""Image grids as PNG bytes.

Shapes: N images, C channels, H W pixels.
"""

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GAP = 1


def image_grid(images: Tensor, columns: int, scale: int = 2) -> Image.Image:
    """uint8 images [N, C, H, W] in rows of ``columns``, each pixel ``scale`` pixels wide, on a mid-grey ground.

    One and three channels are shown as they are; of any other number, the first.
    """
    n, channels, height, width = images.shape
    shown = images if channels in (1, 3) else images[:, :1]
    rows = -(-n // columns)
    canvas = np.full((rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, shown.shape[1]), 110, np.uint8)
    for k, image in enumerate(shown.permute(0, 2, 3, 1).numpy()):
        top, left = (k // columns) * (height + GAP) + GAP, (k % columns) * (width + GAP) + GAP
        canvas[top : top + height, left : left + width] = image
    picture = Image.fromarray(canvas.squeeze(2) if canvas.shape[2] == 1 else canvas)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def png(picture: Image.Image) -> bytes:
    """``picture`` as a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def labelled_rows(rows: list[tuple[str, Tensor]], scale: int = 3) -> Image.Image:
    """One row of images [N, C, H, W] per label, the label above it; equal N puts the same image index in each column."""
    strips = [(label, image_grid(images, len(images), scale)) for label, images in rows]
    font = ImageFont.load_default(16)
    line = 24
    width = max(strip.width for _, strip in strips)
    canvas = Image.new("RGB", (width, sum(strip.height + line for _, strip in strips)), "white")
    draw, top = ImageDraw.Draw(canvas), 0
    for label, strip in strips:
        draw.text((4, top + 2), label, fill="black", font=font)
        canvas.paste(strip, (0, top + line))
        top += strip.height + line
    return canvas
