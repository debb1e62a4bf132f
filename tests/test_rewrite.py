"""REWRITE and VERIFY: op counts, inputs and metadata before and after; verify catches a broken edit."""

import pytest
import torch

from sparse_compile.errors import SparseCompileError
from sparse_compile.linear.function import linear
from sparse_compile.passes.decide import decide
from sparse_compile.passes.find import find
from sparse_compile.passes.flow import Flow
from sparse_compile.passes.parameter_owners import ParameterOwners
from sparse_compile.passes.rewrite import rewrite, seed_devices
from sparse_compile.passes.verify import verify
from sparse_compile.projections.groups_of_four import SOFT
from sparse_compile.projections.identity import IDENTITY
from sparse_compile.recipe import FP8, SSTE
from sparse_compile.torch_internals.graph import clone_graph_module, is_checkpoint


def planned(graph, recipe=SSTE):
    clone = clone_graph_module(graph)
    plans, _ = decide(find(Flow(clone)).sites, recipe, "ffn", ParameterOwners())
    return clone, plans


def count(graph_module, target):
    found = sum(node.op == "call_function" and node.target is target for node in graph_module.graph.nodes)
    bodies = [getattr(graph_module, n.args[0].target) for n in graph_module.graph.nodes if is_checkpoint(n)]
    return found + sum(count(body, target) for body in bodies)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_counts_before_and_after(trace, small_gpt, batch, checkpoint):
    graph = trace(small_gpt(checkpoint=checkpoint), *batch)
    assert count(graph, torch._C._nn.linear) == 5
    clone, plans = planned(graph)
    slots = rewrite(clone, plans)
    verify(clone, plans)
    assert count(clone, linear) == 4
    assert count(clone, torch._C._nn.linear) == 1
    # The seed is an input, one for all linears: what is saved for backward was drawn when the graph was called.
    assert count(clone, torch.randint) == 0
    assert sum(n.op == "placeholder" and n.name.startswith("seed_") for n in clone.graph.nodes) == 1
    # The graph that dynamo still needs is untouched.
    assert count(graph, torch._C._nn.linear) == 5
    assert count(graph, linear) == 0
    added = [n.name for n in clone.graph.nodes if n.op == "placeholder" and n.name.startswith("sste_")]
    assert len(added) == sum({SOFT: 4, IDENTITY: 3}[slot.projection] for slot in slots)


def test_slots_name_the_weights_in_the_order_of_the_inputs(trace, small_gpt, conv1d, batch):
    graph = trace(small_gpt(conv1d, depth=1), *batch)
    placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
    clone, plans = planned(graph)
    for slot in rewrite(clone, plans):
        weight = placeholders[slot.position].meta["example_value"]
        assert weight.shape == (slot.in_features, slot.out_features)
        assert slot.transposed
        assert slot.projection is (SOFT if "up" in slot.name or "down" in slot.name else IDENTITY)


def test_a_linear_may_read_another(trace):
    clone, plans = planned(trace(torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(3))), torch.randn(8, 64)))
    rewrite(clone, plans)
    verify(clone, plans)
    first, second, third = clone.graph.find_nodes(op="call_function", target=linear)
    assert (second.args[0], third.args[0]) == (first, second)


def test_no_seed_without_an_estimator(trace, small_gpt, batch):
    clone, plans = planned(trace(small_gpt(), *batch), FP8)
    rewrite(clone, plans)
    verify(clone, plans)
    assert count(clone, torch.randint) == 0


def test_metadata_is_kept(trace, small_gpt, batch):
    graph = trace(small_gpt(depth=1), *batch)
    before = [n.meta for n in graph.graph.nodes if n.target is torch._C._nn.linear]
    clone, plans = planned(graph)
    rewrite(clone, plans)
    after = [n.meta for n in clone.graph.nodes if n.target is linear]
    assert [set(meta) for meta in after] == [set(meta) for meta in before[: len(after)]]


def test_nothing_to_do(trace):
    graph = trace(lambda x: x.sin(), torch.randn(4))
    clone, plans = planned(graph)
    assert plans == []
    assert rewrite(clone, plans) == []
    verify(clone, plans)


def test_verify_catches_a_lost_rewrite(trace, small_gpt, batch):
    clone, plans = planned(trace(small_gpt(), *batch))
    rewrite(clone, plans)
    node = next(n for n in clone.graph.nodes if n.target is linear)
    node.target = torch.relu
    with pytest.raises(SparseCompileError, match="3 rewritten nodes for 4 plans"):
        verify(clone, plans)


def test_verify_catches_another_output(trace, small_gpt, batch):
    clone, plans = planned(trace(small_gpt(), *batch))
    rewrite(clone, plans)
    node = next(n for n in clone.graph.nodes if n.target is linear)
    *before, spec, operands = node.args
    node.args = (*before, spec._replace(out_dtype=torch.bfloat16), operands)
    with pytest.raises(SparseCompileError, match=r"output dtype was torch.float32, is torch.bfloat16"):
        verify(clone, plans)


def test_verify_catches_other_strides(trace, small_gpt, batch):
    clone, plans = planned(trace(small_gpt(), *batch))
    rewrite(clone, plans)
    node = next(n for n in clone.graph.nodes if n.target is linear)
    before = node.meta["example_value"]
    with before.fake_mode:
        node.meta["example_value"] = before.transpose(0, 1).contiguous().transpose(0, 1)
    with pytest.raises(SparseCompileError, match=r"output stride was \(192, 384, 1\), is \(6144, 192, 1\)"):
        verify(clone, plans)


def test_linears_without_gradients_need_no_seed(trace, small_gpt, batch):
    with torch.no_grad():
        clone, plans = planned(trace(small_gpt(), *batch))
    rewrite(clone, plans)
    assert seed_devices(plans) == []
    assert not [n for n in clone.graph.nodes if n.name.startswith("seed_")]


def test_verify_catches_an_ill_formed_graph(trace, small_gpt, batch):
    clone, plans = planned(trace(small_gpt(), *batch))
    rewrite(clone, plans)
    nodes = [n for n in clone.graph.nodes if n.target is linear]
    nodes[0].args = (nodes[1], *nodes[0].args[1:])
    with pytest.raises(RuntimeError, match="used before it has been defined"):
        verify(clone, plans)
