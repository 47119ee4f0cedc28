"""Samples in a report: the baseline's beside one model's, which a slider chooses."""

import base64

from PIL import Image
from torch import Tensor

from fqdiff.evidence.comparison import BASELINE
from fqdiff.report.data import Report
from fqdiff.report.html import text
from fqdiff.viz.grids import image_grid, png
from fqdiff.viz.samples import magnified_difference

GRIDS = (
    (6, 1),
    (5, 1),
    (4, 1),
    (3, 1),
    (2, 1),
    (2, 2),
    (1, 2),
    (1, 4),
    (1, 8),
)  # columns, and by how much each is shrunk
MAGNIFIED = 8


def sample_section(report: Report, room: int) -> str:
    """The baseline's images, each model's of the same noise, and how they differ, in as many columns as ``room`` bytes allow.

    Empty where the baseline's samples, or those of all models, are gone.
    """
    models = [row for row in report.models if row.role in report.images]
    if BASELINE not in report.images or not models:
        return ""
    for columns, shrunk in GRIDS:
        # Models' images take about as many bytes as the baseline's: what cannot fit is not drawn for all of them.
        base = _encoded(_grid(report.images[BASELINE][: columns**2], columns, shrunk))
        if (1 + len(models)) * len(base) > room:
            continue
        html = _viewer(report, columns, shrunk)
        if len(html.encode()) <= room:
            return html
    return ""


def _viewer(report: Report, columns: int, shrunk: int) -> str:
    count = min(columns**2, *(len(images) for images in report.images.values()))
    name, seed = report.labels[BASELINE], report.comparison.seed
    base = report.images[BASELINE][:count]
    several = f"{count} images" if count > 1 else "An image"

    slides = []
    for row in report.models:
        if row.role not in report.images:
            continue
        images = report.images[row.role][:count]
        same = _image(
            row.label,
            f"{several} of {row.label} from the same noise as those of {name}",
            _grid(images, columns, shrunk),
        )
        shift = _grid(magnified_difference(images, base, MAGNIFIED), columns, shrunk)
        times = f"{MAGNIFIED} times as strong"
        other = _image(f"difference, {times}", f"Pixel differences between {row.label} and {name}, {times}", shift)
        slides.append(f'<div class="slide" data-label="{text(row.label)}">{same}{other}</div>')
    first = _image(f"{name}, the baseline", f"{several} of {name}, seed {seed}", _grid(base, columns, shrunk))
    note = f"Images 0 to {count - 1} of seed {seed}: the same place is the same noise."
    shrinking = f" Shrunk {shrunk} times." if shrunk > 1 else ""
    return "\n".join(
        [
            '<div class="control" id="samples-control" hidden><label for="samples-slider">Model</label>',
            f'<input type="range" id="samples-slider" min="0" max="{len(slides) - 1}" value="0" step="1">',
            '<output for="samples-slider"></output></div>',
            f'<div class="viewer" data-control="samples-control">{first}{"".join(slides)}</div>',
            f'<p class="note">{note}{shrinking}</p>',
        ]
    )


def _grid(images: Tensor, columns: int, shrunk: int) -> Image.Image:
    return image_grid(images, columns, 1).reduce(shrunk)


def _encoded(picture: Image.Image) -> str:
    return base64.b64encode(png(picture)).decode()


def _image(caption: str, alt: str, picture: Image.Image) -> str:
    image = f'<img alt="{text(alt)}" src="data:image/png;base64,{_encoded(picture)}">'
    return f"<figure><figcaption>{text(caption)}</figcaption>{image}</figure>"
