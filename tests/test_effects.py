"""EFFECTS and FLOW: what a node does, told by running it on fake tensors, and how values flow between nodes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from sparse_compile.passes.flow import Flow, Kind
from sparse_compile.passes.record_operations import Effect
from sparse_compile.passes.run_nodes import Layout


@pytest.fixture
def effect(trace):
    """The effect of the last call of a function of one tensor ``[8, 64]``."""

    def run(function):
        graph = trace(function, torch.randn(8, 64))
        flow = Flow(graph)
        return flow.effect([node for node in graph.graph.nodes if node.op.startswith("call")][-1])

    return run


ELEMENTWISE = {
    "comparison": lambda x: x > 0,
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "in place": lambda x: x.clone().relu_(),
    "lerp": lambda x: torch.lerp(x, x * 2, 0.3),
    "addcmul": lambda x: torch.addcmul(x, x, x),
    "special function": lambda x: torch.special.erfcx(x),
    "dropout": lambda x: F.dropout(x, 0.1),
    "alpha dropout": lambda x: F.alpha_dropout(x, 0.1, training=True),
    "rrelu": lambda x: F.rrelu(x, training=True),
    "glu, made of others": lambda x: F.glu(x),
    "prelu, made of others": lambda x: F.prelu(x, torch.full((1,), 0.2)),
    "hardswish, made of others": lambda x: F.hardswish(x),
    "logsigmoid, made of others": lambda x: F.logsigmoid(x),
    "quick gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
MOVES = {
    "transpose": lambda x: x.transpose(0, 1),
    "permute": lambda x: x.view(8, 4, 16).permute(1, 0, 2),
    "chunk": lambda x: x.chunk(2, -1),
    "cat": lambda x: torch.cat([x, x]),
    "roll": lambda x: x.roll(1, 0),
    "pad": lambda x: F.pad(x, (0, 0, 1, 0)),
    "index": lambda x: x[torch.tensor([0, 3])],
    "cast": lambda x: x.bfloat16(),
    "clone": lambda x: x.clone(),
    "written slice": lambda x: x.clone().__setitem__((slice(None), 0), 0.0),
}
MIXES = {
    "softmax": lambda x: x.softmax(-1),
    "sum": lambda x: x.sum(-1),
    "layer norm": lambda x: F.layer_norm(x, (64,)),
    "cumsum": lambda x: x.cumsum(-1),
    "logsumexp": lambda x: x.logsumexp(-1),
    "matmul": lambda x: x @ x.T,
    "pooling": lambda x: F.avg_pool1d(x, 2),
}


KINDS = {Effect.COMPUTES: ELEMENTWISE, Effect.MOVES: MOVES, Effect.MIXES: MIXES}


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        pytest.param(function, kind, id=name)
        for kind, functions in KINDS.items()
        for name, function in functions.items()
    ],
)
def test_what_is_done_to_elements(effect, function, expected):
    assert effect(function).effect is expected


def test_random_numbers_depend_on_no_input(effect):
    assert effect(lambda x: torch.rand_like(x)).sources == frozenset()
    assert effect(lambda x: torch.empty_like(x).bernoulli_(0.5)).effect is not Effect.MIXES


LAYOUTS = {
    "t": (lambda x: x.t(), Layout.TRANSPOSED),
    "mT": (lambda x: x.mT, Layout.TRANSPOSED),
    "movedim": (lambda x: x.movedim(0, 1), Layout.TRANSPOSED),
    "adjoint": (lambda x: x.adjoint(), Layout.TRANSPOSED),
    "cast": (lambda x: x.to(torch.float16), Layout.SAME),
    "view": (lambda x: x.view(8, 64), Layout.SAME),
    "clone": (lambda x: x.clone(), Layout.SAME),
    "int8": (lambda x: x.to(torch.int8), Layout.OTHER),
    "float8": (lambda x: x.to(torch.float8_e5m2), Layout.OTHER),
    "part": (lambda x: x[:4], Layout.OTHER),
    "flip": (lambda x: x.flip(0), Layout.OTHER),
    "another shape": (lambda x: x.view(64, 8), Layout.OTHER),
    "computed": (lambda x: x * 2, Layout.OTHER),
}


@pytest.mark.parametrize(("function", "expected"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_how_a_matrix_lies(effect, function, expected):
    assert effect(function).layout is expected


class OwnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad @ w, grad.t() @ x


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: F.linear(x, w),
        lambda x, w: torch.einsum("tk,nk->tn", x, w),
        lambda x, w: torch.inner(x, w),
        lambda x, w: torch.baddbmm(x[None, :, :32], x[None], w.t()[None]),
        lambda x, w: OwnLinear.apply(x, w),
    ],
    ids=["linear", "einsum", "inner", "baddbmm", "autograd.Function"],
)
def test_flops_are_those_of_pytorchs_counter(trace, function):
    x, w = torch.randn(8, 64, requires_grad=True), nn.Parameter(torch.randn(32, 64))
    flow = Flow(trace(lambda x: function(x, w), x))
    effects = [flow.effect(node) for node in flow.nodes]
    forward = sum(product.flops for effect in effects for product in effect.products)
    backward = sum(effect.backward_flops for effect in effects)
    with FlopCounterMode(display=False) as counter:
        y = function(x, w)
        assert forward == counter.get_total_flops() == 2 * 8 * 64 * 32
        y.sum().backward()
    assert forward + backward == counter.get_total_flops()


def test_hooks_of_the_user_see_nothing(trace):
    graph = trace(lambda x: x @ x.T, torch.randn(8, 64, requires_grad=True))
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(seen.append, lambda saved: saved):
        flow = Flow(graph)
    assert sum(flow.effect(node).backward_flops for node in flow.nodes) == 2 * 2 * 8 * 64 * 8
    assert seen == []


@pytest.mark.filterwarnings("error")
def test_a_search_for_nan_sees_nothing(trace):
    graph = trace(lambda x: x @ x.T, torch.randn(8, 64, requires_grad=True))
    torch.autograd.set_detect_anomaly(True)
    try:
        flow = Flow(graph)
    finally:
        torch.autograd.set_detect_anomaly(False)
    assert sum(flow.effect(node).backward_flops for node in flow.nodes) == 2 * 2 * 8 * 64 * 8


def test_unknown_sizes_have_no_flops_and_no_guards(trace):
    w = nn.Parameter(torch.randn(64, 64))
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        graph = trace(lambda x: x[torch.where(x[:, 0] > 0)[0]] @ w, torch.randn(8, 64))
    flow = Flow(graph)
    (product,) = [product for node in flow.nodes for product in flow.effect(node).products]
    assert (product.op, product.flops) == ("mm", None)


def test_what_cannot_run_is_said(trace):
    """The size of its result depends on data."""
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        graph = trace(lambda x: x.nonzero() * 2, torch.randn(8, 64))
    flow = Flow(graph)
    effects = [flow.effect(node) for node in graph.graph.nodes if node.target == "nonzero"]
    assert [(e.effect, e.unknown.split(":")[0]) for e in effects] == [(Effect.MIXES, "DynamicOutputShapeException")]


def test_equal_nodes_run_once(trace, monkeypatch):
    from sparse_compile.passes import run_nodes

    runs = []
    run = run_nodes._run
    monkeypatch.setattr(run_nodes, "_run", lambda node, *rest: runs.append(node.target) or run(node, *rest))
    Flow(trace(lambda x: x.sin().sin().sin() + x.cos(), torch.randn(8, 64)))
    assert runs.count("sin") == 1
    assert runs.count("cos") == 1


class TestFlow:
    def test_a_write_in_place_is_read_by_later_readers_of_its_memory(self, trace):
        def function(x):
            y = x + 1
            y.view(-1).mul_(x.sum())
            return y * 2

        graph = trace(function, torch.randn(8, 64))
        flow = Flow(graph)
        add, _, _, mul_, mul = [node for node in graph.graph.nodes if node.op.startswith("call")]
        assert set(flow.sources(mul)) == {add, mul_}

    def test_what_is_written_to_a_part_is_of_the_whole(self, trace):
        """A recurrence that writes its states one by one: of all of them depends what reads the whole."""

        def function(x):
            states = torch.zeros_like(x)
            for token in range(2):
                states[token] = x[token].softmax(-1)
            return states * 2

        graph = trace(function, torch.randn(8, 64))
        flow = Flow(graph)
        (mul,) = [node for node in graph.graph.nodes if getattr(node.target, "__name__", "") == "mul"]
        assert flow.origin(mul).kind is Kind.ACTIVATION
        softmaxes = [node for node in graph.graph.nodes if node.target == "softmax"]
        assert len(softmaxes) == 2
        assert all(flow.depends(mul, [node]) for node in softmaxes)

    def test_values_cross_checkpointed_regions(self, trace):
        w = nn.Parameter(torch.randn(64, 64))
        graph = trace(lambda x: checkpoint(lambda v, t: v @ t, x * 2, w.T, use_reentrant=False) + 1, torch.randn(8, 64))
        flow = Flow(graph)
        (product,) = [node for node in flow.nodes if flow.effect(node).products]
        (placeholder,) = [node for node in graph.graph.nodes if node.op == "placeholder" and flow.origin(node).weights]
        assert flow.matrix(product.all_input_nodes[1]) == (placeholder, True)
        (add,) = [node for node in graph.graph.nodes if getattr(node.target, "__name__", "") == "add"]
        assert flow.depends(add, [product])

    def test_origins(self, trace):
        experts, w = nn.Parameter(torch.randn(4, 64, 64)), nn.Parameter(torch.randn(64, 64))
        module = nn.Module()
        module.register_buffer("mask", torch.ones(64))

        def function(x, ids):
            return torch.bmm(x[:, None], experts[ids]), x @ (w * module.mask), x @ (w * x.mean())

        graph = trace(function, torch.randn(8, 64), torch.zeros(8, dtype=torch.long))
        flow = Flow(graph)
        operands = [
            flow.operand(node, node_product.operands[1])
            for node in flow.nodes
            for node_product in flow.effect(node).products
        ]
        assert [(operand.kind, len(operand.weights), operand.computed) for operand in operands] == [
            (Kind.GATHERED, 1, False), (Kind.WEIGHT, 1, True), (Kind.ACTIVATION, 1, True)
        ]  # fmt: skip
