"""What was rewritten, what was not, and why: one row per linear of every compiled graph."""

import atexit
import json
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One linear.

    Attributes:
        module: dotted name of the module, or of the parameter.
        role: ``ffn``, ``head``, ``last`` or ``other``, see ``Role``.
        shape: ``tokens x in_features -> out_features``.
        decision: the recipe and its three GEMMs, or ``dense``.
        reason: why it stays dense; empty for a rewritten linear.
        dense_us, rewritten_us: predicted microseconds in a step, without and with the rewrite; None if not measured.
    """

    module: str
    role: str
    shape: str
    decision: str
    reason: str
    dense_us: float | None = None
    rewritten_us: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphReport:
    """The linears of one compiled graph.

    Attributes:
        execution: ``kernels``; ``emulated: <why>`` where the eager reference runs; ``dense`` if nothing is rewritten.
    """

    rows: tuple[Row, ...]
    execution: str

    @property
    def rewritten(self) -> int:
        return sum(row.decision != "dense" for row in self.rows)

    @property
    def predicted_gain_ms(self) -> float:
        """Milliseconds that a step is predicted to save; of linears that were measured."""
        return sum(row.dense_us - row.rewritten_us for row in self.rows if row.dense_us and row.rewritten_us) / 1e3


@dataclass(slots=True)
class Report:
    """All graphs compiled so far in this process."""

    graphs: list[GraphReport] = field(default_factory=list)

    @property
    def rows(self) -> list[Row]:
        return [row for graph in self.graphs for row in graph.rows]

    def to_json(self) -> str:
        return json.dumps([asdict(graph) for graph in self.graphs], indent=1)

    def __str__(self) -> str:
        if not self.graphs:
            return "sparse_compile: no graph was compiled with backend 'sste'"
        return "\n\n".join(_table(number, graph) for number, graph in enumerate(self.graphs))


_report = Report()
_destined = False  # to a file, or to nowhere


def report() -> Report:
    """The report of this process.  A program that asks for it is not shown it again when it ends."""
    atexit.unregister(_write_to_stderr)
    return _report


def record(graph: GraphReport) -> None:
    """Add a graph; from the first one on, the report is written when the process ends, to stderr if not to a file."""
    if not (_report.graphs or _destined):
        atexit.register(_write_to_stderr)
    _report.graphs.append(graph)


def recorded() -> int:
    """How many graphs were compiled so far."""
    return len(_report.graphs)


def write_to(path: Path | None, when: Callable[[], bool] = lambda: True) -> None:
    """Write the report to a file when the process ends: JSON if its name ends in .json, a table otherwise.

    Args:
        path: None to write it nowhere.
        when: asked at the end whether there is something to say.
    """
    global _destined
    _destined = True
    if path is not None:
        atexit.register(_write_to_file, path.absolute(), when)  # the script may go to another folder


def _write_to_file(path: Path, when: Callable[[], bool]) -> None:
    if when():
        path.write_text(_report.to_json() if path.suffix == ".json" else f"{_report}\n")


def _write_to_stderr() -> None:
    sys.stderr.write(f"\n{_report}\n")


def _table(number: int, graph: GraphReport) -> str:
    from tabulate import tabulate  # here, because this module is imported with torch itself

    title = f"graph {number}: {graph.rewritten} of {len(graph.rows)} linears rewritten, {graph.execution}"
    if not graph.rows:
        return title
    if any(row.dense_us for row in graph.rows):
        title += f", {graph.predicted_gain_ms:.1f} ms less a step predicted"
    lines = [(r.module, r.role, r.shape, r.decision, r.reason, r.dense_us, r.rewritten_us) for r in _fold(graph.rows)]
    headers = ("module", "role", "shape", "decision", "reason", "dense us", "us")
    return f"{title}\n{tabulate(lines, headers=headers, floatfmt='.0f')}"


def _fold(rows: Iterable[Row]) -> list[Row]:
    """Rows that differ only in the numbers of their module names, as one row: ``blocks.*.fc (12)``."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", row.module)
        groups.setdefault((pattern, *list(asdict(row).values())[1:]), []).append(row)
    folded = []
    for (pattern, *_), members in groups.items():
        name = members[0].module if len(members) == 1 else f"{pattern} ({len(members)})"
        folded.append(Row(**(asdict(members[0]) | {"module": name})))
    return folded
