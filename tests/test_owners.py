"""Who holds a weight: modules that compute with it, not what stands for them; and what a frozen collector hides."""

import gc
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import shared_graphs
import sparse_compile
from sparse_compile.passes.parameter_owners import ParameterOwners
from sparse_compile.torch_internals import fsdp2, heap
from sparse_compile.weights import attach

uncompiled = shared_graphs.uncompiled

EAGER = {"sste.executor": "eager", "sste.when": "always"}


def compiled(model):
    return torch.compile(model, backend="sste", options=EAGER)


def by_dynamo(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model(torch.randn(8, 64)).sum().backward()
    step = torch.compile(optimizer.step, backend="aot_eager")
    step()
    return step


def unflattened(model):
    return torch.export.unflatten(torch.export.export(model, (torch.randn(8, 64),)))


TRACES = {
    "dynamo": by_dynamo,
    "jit.trace": lambda model: torch.jit.trace(model, torch.randn(8, 64)),
    "jit.script": torch.jit.script,
    "fx": torch.fx.symbolic_trace,
    "export": lambda model: torch.export.export(model, (torch.randn(8, 64),)).module(),
    "unflatten": unflattened,
    "compile": lambda model: torch.compile(model, backend="aot_eager"),
}


@pytest.mark.by_day(3)
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("trace", TRACES.values(), ids=TRACES.keys())
def test_what_stands_for_a_module_is_no_second_owner(trace, ffn):
    model = ffn()
    kept = trace(model)
    assert ParameterOwners().holders(model.up.weight) == ["Linear.weight"]
    compiled(model)(torch.randn(8, 64))
    assert [row.module for row in sparse_compile.report().rows] == ["up", "down"]
    assert sparse_compile.report().rows[0].decision.startswith("s-ste")
    del kept


def test_what_was_trained_pruned_stays_so_when_another_module_holds_it(ffn):
    model, x = ffn(), torch.randn(8, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = compiled(model)
    run(x).square().mean().backward()
    optimizer.step()
    trained = run(x).detach()
    second = nn.Linear(64, 128)
    second.weight = model.up.weight
    with torch.no_grad():
        assert torch.equal(run(x), trained)


@pytest.mark.usefixtures("uncompiled")
def test_a_tied_embedding_that_another_graph_reads_is_shared(ffn):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.ffn = nn.Embedding(128, 64), ffn()

        def forward(self, ids):
            x = self.ffn(self.embedding(ids))
            torch._dynamo.graph_break()
            return F.linear(x, self.embedding.weight).relu() @ torch.ones(128, 64)

    compiled(Tied())(torch.randint(0, 128, (4, 8)))
    rows = {row.module: row for graph in sparse_compile.report().graphs for row in graph.rows}
    (reason,) = {row.reason for name, row in rows.items() if "embedding" in name}
    assert reason.startswith("weight is shared: held by Embedding.weight")


def test_a_frozen_collector_hides_neither_owners_nor_optimizers():
    """nanoGPT-style scripts call gc.freeze()."""
    embedding = nn.Embedding(128, 64)
    head = nn.Linear(64, 128, bias=False)
    head.weight = embedding.weight
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    try:
        gc.freeze()
        assert not any(found is head for found in gc.get_objects())
        assert sorted(ParameterOwners().holders(head.weight)) == ["Embedding.weight", "Linear.weight"]
        assert any(found is optimizer for found in heap.instances_of(torch.optim.Optimizer))
    finally:
        gc.unfreeze()
        gc.collect()
        gc.freeze()


def test_attach_says_which_optimizer_trains_a_model(ffn):
    model, x = ffn(), torch.randn(8, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run = compiled(model)
    run(x).square().mean().backward()
    optimizer.step()
    kept = optimizer.state_dict()
    resumed = ffn()
    resumed.load_state_dict(model.state_dict())
    later = torch.optim.AdamW(resumed.parameters(), lr=1e-2)
    # Loaded past its own method.
    later.state.update(
        {weight: dict(kept["state"][index]) for index, weight in enumerate(later.param_groups[0]["params"])}
    )
    attach(resumed, later)
    assert sparse_compile.beta(resumed) == sparse_compile.beta(model)


def test_attach_takes_the_optimizer_of_the_model(ffn):
    with pytest.raises(ValueError, match="holds no parameter of the model"):
        attach(ffn(), torch.optim.SGD(ffn().parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"is a object, not a torch\.optim\.Optimizer"):
        attach(ffn(), object())


def test_weights_that_fsdp2_does_not_manage_are_looked_up_once(monkeypatch):
    """With FSDP2 in the process, each of 400 weights walked over the heap."""
    from torch.distributed.fsdp import FSDPModule

    class Managed(FSDPModule):  # what fully_shard makes of a class
        pass

    fsdp2.sharded_parameter(nn.Parameter(torch.zeros(1)))
    walks = []
    monkeypatch.setattr(fsdp2, "instances_of", lambda kind: walks.append(kind) or iter(()))
    start = time.perf_counter()
    for _ in range(400):
        assert fsdp2.sharded_parameter(nn.Parameter(torch.zeros(1))) is None
    assert walks == []
    assert time.perf_counter() - start < 1.0
    del Managed


# A pattern of sste.targets.


def train_with(targets, model):
    run = torch.compile(model, backend="sste", options=EAGER | {"sste.targets": targets})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        run(torch.randn(8, 64)).square().mean().backward()
        optimizer.step()


@pytest.mark.usefixtures("uncompiled")
def test_a_pattern_that_matches_nothing_is_an_error_after_the_first_step(ffn):
    with pytest.raises(ValueError, match=r"'sste.targets': '\*.mlp.\*'} matches no linear of this model.*are down, up"):
        train_with("*.mlp.*", ffn())


@pytest.mark.usefixtures("uncompiled")
def test_a_pattern_need_not_match_in_every_graph(ffn):
    class Broken(ffn):
        def forward(self, x):
            hidden = F.gelu(self.up(x))
            torch._dynamo.graph_break()
            return self.down(hidden)

    train_with("down", Broken())
    assert any(row.decision.startswith("s-ste") for graph in sparse_compile.report().graphs for row in graph.rows)
