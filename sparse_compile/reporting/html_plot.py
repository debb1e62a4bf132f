"""Plots of a page of HTML: lines in an SVG that stretches with the page; text stays outside of it, where it is text."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sparse_compile.reporting.html_page import Markup, tag


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """Points in order, and their colour: a variable of the page as ``var(--dense)``, or any other of CSS."""

    points: Sequence[tuple[float, float]]
    colour: str
    dashed: bool = False
    dots: bool = False  # one at each point, too


def plot(lines: Sequence[Line], title: str, *, top: float, labels: tuple[str, str, str]) -> Markup:
    """The vertical axis is that from 0 to ``top``, the horizontal one what the lines take together.

    Args:
        title: what is shown to those who cannot see it.
        labels: of the top, of the left end and the right end.
    """
    across = [x for line in lines for x, _ in line.points]
    first, last = min(across), max(across)

    def place(x: float, y: float) -> str:
        return f"{1000 * (x - first) / ((last - first) or 1):.1f},{100 * (1 - y / top):.2f}"

    def drawn(points: Iterable[str], **attributes: str) -> Markup:
        return tag("polyline", points=" ".join(points), fill="none", vector_effect="non-scaling-stroke", **attributes)

    shapes = []
    for line in lines:
        points = [place(x, y) for x, y in line.points]
        style = {"stroke_dasharray": "6 4"} if line.dashed else {"stroke_width": "2"}
        shapes.append(drawn(points, stroke=line.colour, **style))
        # A line of no length with round ends, which no stretching distorts.
        dots = points if line.dots else []
        shapes += [drawn([p, p], stroke=line.colour, stroke_width="9", stroke_linecap="round") for p in dots]
    frame = {"viewBox": "0 0 1000 100", "preserveAspectRatio": "none", "overflow": "visible", "role": "img"}
    svg = tag("svg", tag("title", title), *shapes, **frame)
    height = tag("div", tag("span", labels[0]), class_="axis")
    axis = tag("div", *(tag("span", label) for label in labels[1:]), class_="axis")
    return tag("div", height, svg, axis)


def keys(keys: Iterable[tuple[str, str]]) -> Markup:
    """What the colours of a plot mean."""
    items = (tag("li", tag("span", class_="key", style=f"background:{colour}"), text) for colour, text in keys)
    return tag("ul", *items, class_="keys")
