"""The report: one row per linear, folded where only layer numbers differ."""

import json
import subprocess
import sys

import torch

import sparse_compile
from sparse_compile.report import GraphReport, Report, Row


def row(module, decision="s-ste", reason=""):
    return Row(module=module, role="ffn", shape="64 x 64 -> 256", decision=decision, reason=reason)


def test_rows_that_differ_in_layer_numbers_are_folded():
    rows = (row("blocks.0.up"), row("blocks.1.up"), row("blocks.1.fc2"), row("head", "dense", "because"))
    text = str(Report([GraphReport(rows=rows, execution="kernels")]))
    assert text.splitlines()[0] == "graph 0: 3 of 4 linears rewritten, kernels"
    modules = [line.split()[0] for line in text.splitlines()[3:]]
    assert modules == ["blocks.*.up", "blocks.1.fc2", "head"]
    assert "blocks.*.up (2)" in text
    assert "because" in text


def test_json_holds_every_row():
    report = Report([GraphReport(rows=(row("blocks.0.up"), row("blocks.1.up")), execution="kernels")])
    (graph,) = json.loads(report.to_json())
    assert [r["module"] for r in graph["rows"]] == ["blocks.0.up", "blocks.1.up"]
    assert graph["execution"] == "kernels"


def test_empty_report_says_so():
    assert "no graph was compiled" in str(Report())


def test_one_graph_one_table(small_gpt, batch):
    model = torch.compile(small_gpt(), backend="sste", options={"sste.executor": "eager"})
    model(*batch)
    (graph,) = sparse_compile.report().graphs
    assert graph.rewritten == 8
    assert len(graph.rows) == 9
    assert graph.execution == "emulated: no kernels for cpu"
    by_module = {r.module: r for r in graph.rows}
    assert by_module["blocks.1.down"].decision == "s-ste (2:4 fp8, fp8, 2:4 fp8)"
    assert by_module["blocks.1.down"].shape == "64 x 256 -> 64"
    assert by_module["head"].decision == "dense"
    assert by_module["head"].reason.startswith("vocabulary head: ")


def test_written_to_stderr_when_the_process_ends():
    code = (
        "import torch; from torch import nn; import sparse_compile\n"
        "ffn = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))\n"
        "f = torch.compile(lambda x: ffn(x), backend='sste', options={'sste.executor': 'eager'})\n"
        "f(torch.randn(8, 64)).sum().backward()"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "graph 0: 2 of 2 linears rewritten, emulated: no kernels for cpu" in result.stderr
    assert result.stdout == ""
