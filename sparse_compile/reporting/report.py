"""The report as users have it: shown, written and read."""

import json
import os
from pathlib import Path
from typing import Any

from sparse_compile.reporting.health import Health
from sparse_compile.reporting.model import VERSION, GraphReport, Measurement, Passes, ReportData, Row, Spread
from sparse_compile.reporting.report_file import check_file


class Report(ReportData):
    """``ReportData`` that prints as text, and goes to files and comes from them."""

    __slots__ = ()

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """The report that ``to_json`` wrote.

        Raises:
            ValueError: it is none, or of another version.
        """
        try:
            read = json.loads(text)
            version = read["version"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"this is no report of sparse_compile: {error!r}") from error
        if version != VERSION:
            raise ValueError(f"the report is of version {version}; this sparse_compile reads version {VERSION}")
        try:
            health = {name: [Health(**sample) for sample in samples] for name, samples in read["health"].items()}
            graphs = [_graph(graph) for graph in read["graphs"]]
            fallbacks = read.get("fallbacks", [])
            return cls(graphs, health, read["step_ms"], fallbacks, torch=read["torch"], device=read["device"])
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"the report is damaged: {error!r}") from error

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write one self-contained HTML file."""
        from sparse_compile.reporting.html import as_html

        Path(path).write_text(as_html(self), encoding="utf-8")

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the report in the format that the file's name ends in.

        Raises:
            ValueError: see ``check_file``.
        """
        path = Path(path)
        check_file(path)
        if path.suffix == ".html":
            self.to_html(path)
        else:
            path.write_text(self.to_json() if path.suffix == ".json" else f"{self}\n", encoding="utf-8")

    def __str__(self) -> str:
        from sparse_compile.reporting.text import as_text

        return as_text(self)


def _graph(read: dict[str, Any]) -> GraphReport:
    rows = tuple(Row(**row) for row in read["rows"])
    measured = read["measured"]
    if measured is not None:
        passes = {name: _passes(measured[name]) for name in ("dense", "rewritten")}
        measured = Measurement(**(measured | passes))
    return GraphReport(**(read | {"rows": rows, "measured": measured, "dynamic": tuple(read["dynamic"])}))


def _passes(read: dict[str, Any]) -> Passes:
    backward = read["backward"]
    return Passes(
        forward=Spread(**read["forward"]),
        backward=Spread(**backward) if backward else None,
        peak_bytes=read["peak_bytes"],
    )
