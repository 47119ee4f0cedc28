"""Figures as SVG inside a page: colours that follow its theme, ids of their own, and parts that say what they show."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from xml.etree import ElementTree

from matplotlib.figure import Figure

from fqdiff.viz.figures import render

SVG = "{http://www.w3.org/2000/svg}"
XLINK = "{http://www.w3.org/1999/xlink}href"
# The colours that all figures share, as the page calls them.
THEME = {
    "#000000": "var(--ink)",
    "#ffffff": "var(--card)",
    "#606060": "var(--muted)",
    "#808080": "var(--muted)",
    "#c8c8c8": "var(--band)",
    "#d0d0d0": "var(--line)",
    "#e8e8e8": "var(--line)",
    "#0072b2": "var(--blue)",
    "#d55e00": "var(--orange)",
}
SMALLEST = 0.95  # pixels per point, below which a figure scrolls instead of shrinking further
COLOUR = re.compile("|".join(THEME))


@dataclass(frozen=True)
class Placed:
    """An ``<svg>`` element, and where its first axes are: left, top, width and height as shares of the whole.

    ``smallest``: pixels that it is wide at least, to be readable.
    """

    svg: str
    axes: tuple[float, float, float, float]
    smallest: int


def inline_svg(figure: Figure, prefix: str, label: str, tips: Mapping[str, str] | None = None) -> Placed:
    """``figure`` for a page. ``prefix`` begins all ids; ``label`` says what it shows to who cannot see it.

    ``tips``: by gid of an artist, what is shown when it is pointed at or has the focus.
    """
    root = ElementTree.fromstring(render(figure, "svg"))  # noqa: S314 (written by matplotlib just now)
    for parent in list(root.iter()):
        for child in list(parent):
            # matplotlib's style sheet would hold for the whole page; its metadata names outside addresses.
            if child.tag in (f"{SVG}metadata", f"{SVG}style"):
                parent.remove(child)
    for element in root.iter():
        _adapt(element, prefix, tips or {})
    role = "group" if tips else "img"
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": role, "aria-label": label}
    left, bottom, width, height = figure.axes[0].get_position().bounds
    smallest = round(SMALLEST * 72 * figure.get_figwidth())
    return Placed(ElementTree.tostring(root, encoding="unicode"), (left, 1 - bottom - height, width, height), smallest)


def _adapt(element: ElementTree.Element, prefix: str, tips: Mapping[str, str]) -> None:
    element.tag = element.tag.removeprefix(SVG)
    tip = tips.get(element.attrib.get("id", ""))
    if tip is not None:
        element.attrib |= {"tabindex": "0", "role": "img", "aria-label": tip, "data-tip": tip}
    if "id" in element.attrib:
        element.attrib["id"] = f"{prefix}-{element.attrib['id']}"
    for name, value in list(element.attrib.items()):
        if name == XLINK:
            del element.attrib[name]
            element.attrib["href"] = f"#{prefix}-{value[1:]}" if value.startswith("#") else value
        elif name in ("style", "fill", "stroke"):
            element.attrib[name] = re.sub(r"font-family: [^;]*|(?<=px) 'DejaVu.*?(?=;|$)", "", themed(value))
        if "url(#" in value:
            element.attrib[name] = element.attrib[name].replace("url(#", f"url(#{prefix}-")


def themed(style: str) -> str:
    """``style`` with the page's colours in the place of those that figures share."""
    return COLOUR.sub(lambda found: THEME[found[0]], style)
