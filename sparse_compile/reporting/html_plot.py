"""Plots of a page of HTML: lines over one horizontal axis."""

from collections.abc import Sequence
from dataclasses import dataclass

# Of the plot in its own units, see ``plot.html``.
_WIDTH, _HEIGHT = 1000, 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """Points in order, and their colour: a variable of the page as ``var(--dense)``, or any other of CSS."""

    points: Sequence[tuple[float, float]]
    colour: str
    dashed: bool = False
    dots: bool = False  # one at each point, too


@dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    """The vertical axis goes from 0 to ``top``, the horizontal one over what the lines take together.

    Attributes:
        title: what is shown to those who cannot see the plot.
        top_label, left_label, right_label: of the top, and of the ends of the horizontal axis.
    """

    lines: Sequence[Line]
    title: str
    top: float
    top_label: str
    left_label: str
    right_label: str

    def coordinates(self, line: Line) -> list[str]:
        """``x,y`` of each point, from the upper left corner."""
        across = [x for other in self.lines for x, _ in other.points]
        first, span = min(across), (max(across) - min(across)) or 1
        return [f"{_WIDTH * (x - first) / span:.1f},{_HEIGHT * (1 - y / self.top):.2f}" for x, y in line.points]
