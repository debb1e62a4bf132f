"""Passes as data: what they read is there, what they return arrives, what they take and edit is shown."""

import logging
from dataclasses import fields

import pytest
import torch
from torch import nn

from sparse_compile import backend
from sparse_compile.options import read_options
from sparse_compile.pipeline import Compilation, Pass, run_passes

GIVEN = {"options", "graph", "traced", "names", "owners", "sites", "standing", "inputs"}


def test_each_pass_reads_what_was_given_or_returned_before() -> None:
    known = {field.name for field in fields(Compilation)}
    there = set(GIVEN)
    assert len({one.name for one in backend.PASSES}) == len(backend.PASSES)
    for one in backend.PASSES:
        assert set(one.reads) <= there, one.name
        assert set(one.returns) <= known, one.name
        assert not one.edits or "graph" in one.reads, one.name
        there |= set(one.returns)
    assert known - there == {"durations"}


def compilation() -> Compilation:
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    return Compilation(options=read_options(None, None), graph=graph)


def test_results_go_to_the_fields_that_are_named() -> None:
    seen = []
    passes = (
        Pass(name="one", reads=("graph",), returns=("inputs",), run=lambda graph: seen.append(graph) or [1]),
        Pass(name="two", reads=("inputs", "sites"), returns=("plans", "rejections"), run=lambda *read: read),
        Pass(name="three", reads=("plans",), run=seen.append),
    )
    begun = compilation()
    done = run_passes(passes, begun)
    assert (done.inputs, done.plans, done.rejections) == ([1], [1], ())
    assert seen == [begun.graph, [1]]
    assert begun.inputs == ()
    assert list(done.durations) == ["one", "two", "three"]
    assert all(milliseconds >= 0 for milliseconds in done.durations.values())


def test_a_pass_that_returns_another_number_of_results_is_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        run_passes((Pass(name="two", reads=(), returns=("plans", "rejections"), run=lambda: ([],)),), compilation())


def test_edits_are_logged_and_what_edits_nothing_says_so(caplog: pytest.LogCaptureFixture) -> None:
    def edit(graph: torch.fx.GraphModule) -> None:
        (relu,) = (node for node in graph.graph.nodes if node.target == "1")
        relu.replace_all_uses_with(relu.args[0])
        graph.graph.erase_node(relu)
        graph.recompile()

    caplog.set_level(logging.DEBUG, logger="sparse_compile.pipeline")
    run_passes(
        (
            Pass(name="edit", reads=("graph",), edits=True, run=edit),
            Pass(name="look", reads=("graph",), edits=True, run=lambda graph: None),
        ),
        compilation(),
    )
    logged = caplog.text
    before, after = logged[logged.index("graph before edit") : logged.index("pass look")].split("graph after edit")
    call = 'getattr(self, "1")'
    assert call in before
    assert call not in after
    assert "pass look left the graph as it was" in logged
