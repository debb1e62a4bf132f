"""The report as users have it: shown, written and read."""

import json
import os
from dataclasses import fields
from pathlib import Path

from sparse_compile.from_json import build
from sparse_compile.reporting.model import VERSION, ReportData
from sparse_compile.reporting.report_file import check_file


class Report(ReportData):
    """What was done to the models of a process, and what it gained.  ``print`` shows it as text.

    Attributes:
        graphs: a ``GraphReport`` for each graph that was compiled; its ``rows`` are the products with a parameter.
        health: samples of the pruned weights, by their names, see ``sparse_compile.health``.
        step_ms: milliseconds of the last training steps, from a step of an optimizer to its next; without those in
            which a graph was compiled or measured.
        gpu_lag_ms: of a few steps, how long the GPU still worked when the host had started all of the step.
        recorded_a_step: how many CUDA graphs Inductor recorded in each of the steps behind the 32nd, on average.
        fallbacks: what dynamo runs eagerly of the modules that were compiled, a sentence each.
        torch: the version of PyTorch.
        device: the name of the GPU; empty without one.
        choices: what was chosen by measured time, for each question and number of tokens, see option ``sste.plan``.
    """

    __slots__ = ()

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """The report that ``to_json`` wrote.

        Args:
            text: the JSON.

        Returns:
            An equal report.

        Raises:
            ValueError: it is none, or of another version.
        """
        try:
            read = json.loads(text)
            version = read["version"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"this is not a report of sparse_compile: {error!r}") from error
        if version != VERSION:
            raise ValueError(f"the report has version {version}; this sparse_compile reads version {VERSION}")
        # Older files of this version have none.
        read.setdefault("fallbacks", [])
        read.setdefault("choices", {})
        names = [field.name for field in fields(cls)]  # what else is there follows from these
        if missing := [name for name in names if name not in read]:
            raise ValueError(f"the report is damaged: {missing[0]!r} is missing")
        try:
            return build(cls, {name: read[name] for name in names})
        except ValueError as error:
            raise ValueError(f"the report is damaged: {error}") from error

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write one self-contained HTML file.

        Args:
            path: of the file; one that is there is replaced.
        """
        from sparse_compile.reporting.html import as_html

        Path(path).write_text(as_html(self), encoding="utf-8")

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the report in the format that the file's name ends in.

        Args:
            path: of the file, which ends in .txt, .json or .html; one that is there is replaced.

        Raises:
            ValueError: it ends in something else, or its folder does not exist.
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
