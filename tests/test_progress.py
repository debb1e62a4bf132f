"""Progress is shown in a terminal, after a while, and nowhere else; decisions are logged; graphs are traced."""

import json
import os
import sys
from pathlib import Path
from time import sleep

import pytest

import warm
from sparse_compile import backend, progress

ROOT = Path(__file__).parents[1]
# PyTorch reads the variables when it is imported, which a warm process did before it was given them.  The rewritten
# graph runs as it is.
STEP = (
    "import torch._logging._internal as logs; logs.LOG_TRACE_HANDLER = None; logs._init_logs()\n"
    "import torch; from torch import nn; import sparse_compile; from sparse_compile import backend\n"
    "backend.compile_graph = lambda graph, *args, **named: graph.forward\n"
    "ffn = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 70))\n"
    "options = {'sste.executor': 'eager', 'sste.when': 'always'}\n"
    "torch.compile(lambda x: ffn(x), backend='sste', options=options)(torch.randn(8, 64))\n"
    "sparse_compile.report()"
)


@pytest.fixture
def terminal(monkeypatch, capsys):
    """The captured stderr is one, and patience is short."""
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda stream: True)
    monkeypatch.setattr(progress, "_PATIENCE", 0.02)


def slowly(items):
    for item in items:
        sleep(0.03)
        yield item


def test_a_bar_counts(terminal, capsys):
    items = list(range(10))  # tqdm shows itself ten times a second at most
    assert list(slowly(progress.tracked(items, "counting"))) == items
    shown = capsys.readouterr().err
    assert "sparse_compile: counting" in shown
    assert "/10" in shown


def test_what_is_quick_shows_nothing(terminal, monkeypatch, capsys):
    monkeypatch.setattr(progress, "_PATIENCE", 10)
    assert list(progress.tracked([1, 2, 3], "counting")) == [1, 2, 3]
    with progress.announced("acting"):
        pass
    assert capsys.readouterr().err == ""


def test_one_action_is_announced(terminal, capsys):
    with progress.announced("acting"):
        sleep(0.1)
    assert capsys.readouterr().err == "sparse_compile: acting ...\n"


def test_no_terminal_no_progress(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_PATIENCE", 0.01)
    assert list(slowly(progress.tracked([1, 2], "counting"))) == [1, 2]
    with progress.announced("acting"):
        sleep(0.05)
    assert capsys.readouterr().err == ""


def test_decisions_in_the_log_and_the_graph_in_the_trace(tmp_path):
    variables = {"TORCH_LOGS": "+sparse_compile", "TORCH_TRACE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = warm.python("-c", STEP, check=True, env={**os.environ, **variables})
    for line in ("rewrote 0 to s-ste", "left 2 dense: shape: out_features = 70", "rewrote 1 of 2 linears"):
        assert line in done.stderr
    (trace,) = tmp_path.iterdir()
    artifacts = {}
    lines = trace.read_text().splitlines()
    for number, line in enumerate(lines):
        named = json.loads(line[line.index("{") :]) if line.startswith("V") else {}
        if "artifact" in named:
            payload = []
            for following in lines[number + 1 :]:
                if not following.startswith("\t"):
                    break
                payload.append(following[1:])
            artifacts[named["artifact"]["name"]] = "\n".join(payload)
    assert "sparse_compile_linear_function_linear(" in artifacts["sparse_compile_graph"]
    assert "sparse_compile_linear_function_linear(" in artifacts["sparse_compile_rewrite_after"]
    assert "sparse_compile_linear_function_linear(" not in artifacts["sparse_compile_rewrite_before"]
    assert "sparse_compile_expand_before" not in artifacts, "it left the graph as it was"
    assert list(json.loads(artifacts["sparse_compile_passes"])) == [one.name for one in backend.PASSES]
    assert "passes: expand " in done.stderr
    assert "graph before rewrite:" in done.stderr
    graph = json.loads(artifacts["sparse_compile_report"])
    assert [row["module"] for row in graph["rows"]] == ["0", "2"]
