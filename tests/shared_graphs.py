"""Compiled graphs that the tests of one file share: what is alike, in code, sizes and options, is compiled once.

A file does so with ``clean_slate = shared_graphs.kept``, in place of the fixture of that name in ``conftest.py``.  A
test that asks what was compiled, or what the report says of it, begins with ``torch._dynamo.reset()``.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch._dynamo.config

import sparse_compile
from sparse_compile import backend

# Whose graphs dynamo has.
_owner: Path | None = None


@pytest.fixture(autouse=True)
def kept(request: pytest.FixtureRequest) -> Iterator[None]:
    """A clean slate, but for the graphs of the tests of this file that ran before."""
    global _owner
    if request.path != _owner:
        torch._dynamo.reset()
        _owner = request.path
    report = sparse_compile.report()
    for kept_of_graphs in (report.graphs, report.health, report.step_ms, report.fallbacks, report.choices):
        kept_of_graphs.clear()
    torch.manual_seed(0)
    # Graphs of another test are no reason to let sizes vary, nor to compile no more.
    with torch._dynamo.config.patch(
        automatic_dynamic_shapes=False, recompile_limit=64, fail_on_recompile_limit_hit=True
    ):
        yield
    sparse_compile.report()  # keeps it from being written when the tests end


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewritten graphs run as they are: where it is asked what becomes of linears, and not what is compiled of that."""
    monkeypatch.setattr(backend, "compile_graph", lambda graph, *_, **__: graph.forward)
