"""Tables of sines and cosines that are broadcast become tensors of their own; nothing else changes."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sparse_compile.kernels import ops
from sparse_compile.passes.keep_rotary_tables import keep_rotary_tables
from sparse_compile.torch_internals import inductor

TOKENS, WIDTH, HEADS = 16, 64, 4


class Rotary(nn.Module):
    """Attention-like layers that rotate their projections by a table made in forward, as Llama's do."""

    def __init__(self, depth=2, *, checkpointed=False, table_inside=False, learned=False):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))
        self.checkpointed, self.table_inside = checkpointed, table_inside
        self.frequencies = nn.Parameter(torch.rand(WIDTH // HEADS // 2), requires_grad=learned)

    def table(self):
        angles = torch.outer(torch.arange(TOKENS).float(), self.frequencies)
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * 1.5).to(torch.float32), torch.sin(angles)

    def layer(self, linear, x, table):
        cos, sin = table or self.table()
        heads = linear(x).view(*x.shape[:2], HEADS, -1).transpose(1, 2)
        first, second = heads.chunk(2, dim=-1)
        rotated = heads * cos.unsqueeze(0) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(0)
        return x + rotated.transpose(1, 2).reshape(x.shape)

    def forward(self, x):
        table = None if self.table_inside else self.table()
        for linear in self.layers:
            if self.checkpointed:
                x = checkpoint(self.layer, linear, x, table, use_reentrant=False)
            else:
                x = self.layer(linear, x, table)
        return x


def kept(graph_module):
    return [node for node in graph_module.graph.nodes if node.target is ops.materialize]


def test_the_ends_of_both_tables_are_kept(trace):
    graph = trace(Rotary(), torch.randn(2, TOKENS, WIDTH))
    keep_rotary_tables(graph)
    sources = [node.args[0].target for node in kept(graph)]
    assert sorted(map(str, sources)) == sorted(map(str, ["to", torch.sin]))
    for node in kept(graph):
        assert list(node.args[0].users) == [node]  # nothing reads the table itself any more
        assert len(node.users) == 2  # both layers


def test_a_table_in_each_checkpointed_layer(trace):
    graph = trace(Rotary(checkpointed=True, table_inside=True), torch.randn(2, TOKENS, WIDTH))
    keep_rotary_tables(graph)
    bodies = [module for module in graph.children() if isinstance(module, torch.fx.GraphModule)]
    assert [len(kept(body)) for body in bodies] == [2, 2]


def test_a_learned_table_is_left_alone(trace):
    graph = trace(Rotary(learned=True), torch.randn(2, TOKENS, WIDTH))
    keep_rotary_tables(graph)
    assert kept(graph) == []


@pytest.mark.parametrize("function", [lambda x: x.sin() + x, lambda x: torch.cos(x).sum(), torch.exp])
def test_what_is_not_broadcast_is_left_alone(trace, function):
    graph = trace(function, torch.randn(4, 8))
    keep_rotary_tables(graph)
    assert kept(graph) == []


def test_a_broadcast_of_unknown_size(trace):
    x = torch.randn(3, 8)
    torch._dynamo.mark_dynamic(x, 0)
    graph = trace(lambda x, y: y + torch.sin(x), x, torch.randn(5, 1, 8))
    keep_rotary_tables(graph)
    assert len(kept(graph)) == 1


@pytest.mark.by_day(1)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"checkpointed": True, "table_inside": True},
        pytest.param({"checkpointed": True}, marks=pytest.mark.nightly),
    ],
    ids=str,
)
def test_training_is_bit_equal(monkeypatch, options):
    """Against the same backend without the tables."""

    def train(*, tables):
        graphs = []
        run_eagerly = inductor._run_eagerly

        def keep(graph_module, inputs, **kwargs):
            graphs.append(graph_module)
            return run_eagerly(graph_module, inputs, **kwargs)

        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Rotary(**options)
        chosen = {"sste.executor": "eager", "sste.when": "always", "sste.rotary_tables": tables}
        with monkeypatch.context() as patch:
            patch.setattr(inductor, "_run_eagerly", keep)
            compiled = torch.compile(model, backend="sste", options=chosen)
            compiled(torch.randn(2, TOKENS, WIDTH)).square().sum().backward()
        calls = Counter(node.target for graph in graphs for node in graph.graph.nodes)
        return [layer.weight.grad for layer in model.layers], calls

    expected, without = train(tables="inlined")
    gradients, calls = train(tables="kept")
    assert not without[torch.ops.sparse_compile.materialize.default]
    assert all(map(torch.equal, gradients, expected))
    # At least: a checkpointed region makes its own again in backward.
    assert calls[torch.ops.sparse_compile.materialize.default] >= 2
    if not options:
        assert calls[torch.ops.aten.cos.default] == calls[torch.ops.aten.sin.default] == 1
