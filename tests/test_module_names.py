"""Names in rows and patterns are the model's own, whatever part of it dynamo traced."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

import shared_graphs
import sparse_compile

uncompiled = shared_graphs.uncompiled
pytestmark = pytest.mark.usefixtures("uncompiled")

OPTIONS = {"sste.executor": "eager", "sste.when": "always"}


class Model(nn.Module):
    def __init__(self, block, call=lambda block, x: block(x)):
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(2))
        self.last = self.blocks[1]  # another name of the same module
        self.call = call

    def forward(self, x):
        for block in self.blocks:
            x = x + self.call(block, x)
        return x


EXPECTED = {f"blocks.{i}.{name}" for i in range(2) for name in ("up", "down")}


def broken(block, x):
    torch._dynamo.graph_break()
    return block(x)


def broken_inside(block, x):
    h = block.up(x)
    torch._dynamo.graph_break()
    return block.down(F.gelu(h))


def whole(model):
    return torch.compile(model, backend="sste", options=OPTIONS)


def in_place(model):
    model.compile(backend="sste", options=OPTIONS)
    return model


def regional(model):
    for block in model.blocks:
        block.compile(backend="sste", options=OPTIONS)
    return model


def wrapped_blocks(model):
    for index, block in enumerate(model.blocks):
        model.blocks[index] = checkpoint_wrapper(block)
    return whole(model)


def compiled_blocks(model):
    for index, block in enumerate(model.blocks):
        model.blocks[index] = whole(block)
    return model


def data_parallel(model):
    return whole(nn.DataParallel(model))


def a_function(model):
    return torch.compile(lambda x: model(x), backend="sste", options=OPTIONS)


CALLS = {
    "a graph break between": broken,
    "a graph break inside": broken_inside,
    "checkpointed": lambda block, x: checkpoint(block, x, use_reentrant=False),
    "checkpointed by recomputing": lambda block, x: checkpoint(block, x, use_reentrant=True),
    "disabled between": lambda block, x: block(torch.compiler.disable(lambda y: y * 1)(x)),
}
WAYS = (
    pytest.param(whole, marks=pytest.mark.nightly),  # as other tests here compile
    pytest.param(in_place, marks=pytest.mark.nightly),  # in test_what_holds_the_compiled_model...
    regional, wrapped_blocks, compiled_blocks, data_parallel, a_function,
)  # fmt: skip


def names():
    return {row.module for row in sparse_compile.report().rows}


@pytest.mark.by_day(3)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_whatever_is_compiled(way, ffn):
    model = Model(ffn)
    del model.last
    way(model)(torch.randn(4, 64, requires_grad=True)).sum().backward()
    # Blocks that are alike share the graph that was compiled for the first of them.
    expected = {"blocks.0.up", "blocks.0.down"} if way in (regional, compiled_blocks) else EXPECTED
    assert names() == expected


# Ways to leave the graph between blocks, of which one is tried by day.
BREAKS = {"checkpointed by recomputing", "disabled between"}


@pytest.mark.parametrize(
    "call",
    [pytest.param(call, id=name, marks=pytest.mark.nightly if name in BREAKS else ()) for name, call in CALLS.items()],
)
def test_whatever_lies_between(call, ffn):
    """Blocks that dynamo traces apart share the graph that it compiled for the first of them."""
    model = Model(ffn, call)
    whole(model)(torch.randn(4, 64, requires_grad=True)).sum().backward()
    assert names() in (EXPECTED, {"blocks.0.up", "blocks.0.down"})


def test_patterns_match_the_models_own_names(ffn):
    """Of a block that is compiled alone too, and its name within the block as well."""
    for pattern in ("blocks.*.up", "up"):
        model = Model(ffn)
        torch._dynamo.reset()
        sparse_compile.report().graphs.clear()
        for block in model.blocks:
            block.compile(backend="sste", options={**OPTIONS, "sste.targets": pattern})
        model(torch.randn(4, 64)).sum().backward()
        pruned = {row.module: row.fprop == "2:4 fp8" for row in sparse_compile.report().rows}
        assert pruned.items() >= {("blocks.0.up", True), ("blocks.0.down", False)}
        assert all(name.endswith("up") == is_pruned for name, is_pruned in pruned.items())


@pytest.mark.by_day(1)
@pytest.mark.parametrize("way", [whole, in_place], ids=lambda way: way.__name__)
def test_what_holds_the_compiled_model_is_not_part_of_its_names(way, ffn):
    """A LightningModule or a loss around it."""
    outer = nn.Module()
    outer.model = Model(ffn)
    run = way(outer.model)
    outer.model = run
    run(torch.randn(4, 64)).sum().backward()
    assert names() == EXPECTED


def test_a_parameter_that_no_module_holds_is_named_by_its_place():
    weights = [nn.Parameter(torch.randn(64, 64)) for _ in range(2)]
    run = torch.compile(lambda x: F.linear(F.linear(x, weights[0]), weights[1]), backend="sste", options=OPTIONS)
    run(torch.randn(4, 64)).sum().backward()
    assert names() == {"weights.0", "weights.1"}


TRACES = {
    "fx": torch.fx.symbolic_trace,
    "export": lambda model: torch.export.export(model, (torch.randn(4, 64),)).module(),
}


@pytest.mark.nightly
@pytest.mark.parametrize("trace", TRACES.values(), ids=TRACES.keys())
def test_a_trace_has_its_own_names_once_the_model_is_gone(trace, ffn):
    """And does not change the names of the model as long as that is there."""
    model = Model(ffn)
    traced = trace(model)
    whole(model)(torch.randn(4, 64)).sum().backward()
    assert names() == EXPECTED
    del model
    torch._dynamo.reset()
    sparse_compile.report().graphs.clear()
    gc.collect()
    whole(traced)(torch.randn(4, 64)).sum().backward()
    assert names() == EXPECTED
