"""FIND: graphs in, exact list of linears out."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from libraries import library
from sparse_compile.passes.find import find
from sparse_compile.passes.flow import Flow
from sparse_compile.passes.report_rows import rejected_row
from sparse_compile.passes.sites import Reason


def found(graph):
    result = find(Flow(graph))
    return result.sites, result.rejections


class Weights(nn.Module):
    """A function of an input and of a weight ``[48, 80]``, its transpose ``[80, 48]`` and a bias."""

    def __init__(self, function) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(48, 80))
        self.wt = nn.Parameter(torch.randn(80, 48))
        self.b = nn.Parameter(torch.randn(48))
        self.function = function

    def forward(self, x):
        return self.function(self, x)


SPELLINGS = {
    "F.linear": (lambda m, x: F.linear(x, m.w, m.b), "w", False, True),
    "F.linear keyword": (lambda m, x: F.linear(input=x, weight=m.w, bias=None), "w", False, False),
    "F.linear of a transpose": (lambda m, x: F.linear(x, m.wt.t()), "wt", True, False),
    "addmm": (lambda m, x: torch.addmm(m.b, x.view(-1, 80), m.wt), "wt", True, True),
    "addmm of a transpose": (lambda m, x: torch.addmm(m.b, x.view(-1, 80), m.w.t()), "w", False, True),
    "addmm method": (lambda m, x: m.b.addmm(x.view(-1, 80), m.wt), "wt", True, True),
    "mm": (lambda m, x: torch.mm(x.view(-1, 80), m.wt), "wt", True, False),
    "mm method": (lambda m, x: x.view(-1, 80).mm(m.w.T), "w", False, False),
    "matmul": (lambda m, x: torch.matmul(x, m.wt), "wt", True, False),
    "matmul method": (lambda m, x: x.matmul(m.w.mT), "w", False, False),
    "@": (lambda m, x: x @ m.wt, "wt", True, False),
    "@ transpose": (lambda m, x: x @ m.w.transpose(0, 1), "w", False, False),
    "@ permute": (lambda m, x: x @ m.w.permute(1, 0), "w", False, False),
    "@ two transposes": (lambda m, x: x @ m.wt.t().transpose(-1, -2), "wt", True, False),
    "@ cast": (lambda m, x: x @ m.w.to(torch.float64).float().t(), "w", False, False),
    "one token": (lambda m, x: x[0, 0] @ m.wt, "wt", True, False),
}


HALF = torch.full((48, 80), 0.5)


def in_a_new_tensor(rows, function=lambda part: part, width=None):
    """``function`` of both halves of some rows, written one after the other."""
    out, half = torch.zeros(len(rows), width or rows.shape[1]), len(rows) // 2
    out[:half] = function(rows[:half])
    out[half:] = function(rows[half:])
    return out


UNSUPPORTED = {
    "einsum": (lambda m, x: torch.einsum("bti,oi->bto", x, m.w), "w"),
    "weight on the left": (lambda m, x: m.w @ x[0].t(), "w"),
    "addmm alpha": (lambda m, x: torch.addmm(m.b, x.view(-1, 80), m.wt, alpha=2), "wt"),
    "addmm adds a matrix": (lambda m, x: torch.addmm(x.view(-1, 80)[:, :48], x.view(-1, 80), m.wt), "wt"),
    "a part": (lambda m, x: x @ m.w[:32].t(), "w"),
    "a chunk": (lambda m, x: x @ m.w.chunk(2)[0].t(), "w"),
    "another shape": (lambda m, x: x[..., :40] @ m.w.view(96, 40).t(), "w"),
    "flipped": (lambda m, x: x @ m.w.flip(0).t(), "w"),
    "lossy cast": (lambda m, x: x @ m.w.to(torch.int8).to(x.dtype).t(), "w"),
    "a float8 cast": (lambda m, x: F.linear(x, m.w.to(torch.float8_e5m2).to(x.dtype)), "w"),
    "detached": (lambda m, x: F.linear(x, m.w.detach()), "w"),
    "inner": (lambda m, x: torch.inner(x, m.w), "w"),
    "multi_dot": (lambda m, x: torch.linalg.multi_dot([x[0], m.wt]), "wt"),
    "tensordot": (lambda m, x: torch.tensordot(x, m.wt, 1), "wt"),
    "bmm": (lambda m, x: torch.bmm(x[:1], m.wt[None]), "wt"),
    "addbmm": (lambda m, x: torch.addbmm(m.b, x[:1], m.wt[None]), "wt"),
    "addmm_": (lambda m, x: x.new_zeros(8, 48).addmm_(x[0], m.wt), "wt"),
    "matrix times vector": (lambda m, x: m.w.mv(x[0, 0]), "w"),
    "bilinear": (lambda m, x: F.bilinear(x[0, :, :8], x[0, :, :10], m.w.view(48, 8, 10)), "w"),
    "convolution": (lambda m, x: F.conv1d(x.mT, m.w[..., None]), "w"),
    "parts in a new tensor": (lambda m, x: x @ in_a_new_tensor(m.wt), "wt"),
}  # fmt: skip


COMPUTED = {
    "scaled": (lambda m, x: x @ (m.w * 2).t(), "w"),
    "masked": (lambda m, x: x @ (m.w * HALF).t(), "w"),
    "noisy": (lambda m, x: F.linear(x, m.w + torch.randn_like(m.w)), "w"),
    "normalised": (lambda m, x: F.linear(x, F.normalize(m.w)), "w"),
    "masked by an input": (lambda m, x: x @ (m.w * x.mean((0, 1))).t(), "w"),
    "symmetric": (lambda m, x: x @ (m.w.t() @ m.w), "w"),
}


SPELLINGS |= {
    "linalg.matmul": (lambda m, x: torch.linalg.matmul(x, m.wt), "wt", True, False),
    "aten.mm": (lambda m, x: torch.ops.aten.mm(x[0], m.wt), "wt", True, False),
    "aten.linear": (lambda m, x: torch.ops.aten.linear(x, m.w, m.b), "w", False, True),
    "aten.addmm.default": (lambda m, x: torch.ops.aten.addmm.default(m.b, x[0], m.wt), "wt", True, True),
    "@ H": (lambda m, x: x @ m.w.H, "w", False, False),
    "@ adjoint": (lambda m, x: x @ m.w.adjoint(), "w", False, False),
    "@ swapdims": (lambda m, x: x @ m.w.swapdims(0, 1), "w", False, False),
    "@ movedim": (lambda m, x: x @ m.w.movedim(0, 1), "w", False, False),
    "@ transpose by keywords": (lambda m, x: x @ m.w.transpose(dim0=0, dim1=1), "w", False, False),
    "@ permute by keyword": (lambda m, x: x @ m.w.permute(dims=(1, 0)), "w", False, False),
    "@ t by keyword": (lambda m, x: x @ torch.t(input=m.w), "w", False, False),
    "@ view": (lambda m, x: x @ m.wt.view(80, 48), "wt", True, False),
    "@ clone": (lambda m, x: x @ m.wt.clone(), "wt", True, False),
    "@ type": (lambda m, x: x @ m.wt.type(torch.float32), "wt", True, False),
    "@ T in a checkpointed region": (
        lambda m, x: checkpoint(lambda v: v @ m.w.T, x, use_reentrant=False), "w", False, False
    ),
    "cast before a checkpointed region": (
        lambda m, x: checkpoint(lambda v, w: v.bfloat16() @ w.t(), x, m.w.bfloat16(), use_reentrant=False),
        "w", False, False,
    ),
}  # fmt: skip


def test_every_spelling_is_found(trace):
    """All in one graph, which is traced faster than one for each."""
    together = Weights(lambda m, x: [function(m, x) for function, *_ in SPELLINGS.values()])
    sites, rejections = found(trace(together, torch.randn(2, 8, 80)))
    seen = [(s.name, s.transposed, s.bias is not None, s.in_features, s.out_features) for s in sites]
    for spelling, site, (_, *expected) in zip(SPELLINGS, seen, SPELLINGS.values(), strict=True):
        assert site == (*expected, 80, 48), spelling
    assert rejections == []


@pytest.mark.by_day(12)
@pytest.mark.parametrize(("function", "name"), UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_forms_not_rewritten_are_reported(trace, function, name):
    sites, rejections = found(trace(Weights(function), torch.randn(2, 8, 80)))
    assert sites == []
    reason = Reason.CONVOLUTION if "convolutions" in rejections[0].detail else Reason.UNSUPPORTED_FORM
    assert [(r.name, r.reason) for r in rejections] == [(name, reason)]


@pytest.mark.parametrize(("function", "name"), COMPUTED.values(), ids=COMPUTED.keys())
def test_a_computed_weight_is_reported_by_the_parameter(trace, function, name):
    sites, rejections = found(trace(Weights(function), torch.randn(2, 8, 80)))
    assert sites == []
    assert {r.name for r in rejections} == {name}
    assert rejections[-1].reason is Reason.NOT_A_PARAMETER
    assert f"from {name}" in rejections[-1].detail


def experts(function):
    module = nn.Module()
    module.up = nn.Parameter(torch.randn(4, 64, 128))
    return lambda x, ids: function(x, module.up, ids)


GROUPED = {
    "grouped_mm": lambda x, w, ids: F.grouped_mm(x, w, offs=ids.cumsum(0).int()),
    "private": lambda x, w, ids: torch._grouped_mm(x, w, ids.cumsum(0).int()),
    "the op": lambda x, w, ids: torch.ops.aten._grouped_mm(x, w, offs=ids.cumsum(0).int()),
    "its dtype": lambda x, w, ids: torch._grouped_mm(x, w, ids.cumsum(0).int(), out_dtype=torch.bfloat16),
    "bmm": lambda x, w, ids: torch.bmm(x.view(4, 2, 64), w),
    "a method": lambda x, w, ids: x.view(4, 2, 64).bmm(w),
    "matmul": lambda x, w, ids: x.view(4, 2, 64) @ w,
    "transposed twice": lambda x, w, ids: torch.bmm(x.view(4, 2, 64), w.mT.contiguous().transpose(1, 2)),
    "checkpointed": lambda x, w, ids: checkpoint(
        lambda v, m: torch._grouped_mm(v, m, ids.cumsum(0).int()), x, w, use_reentrant=False
    ),
}


GROUPED_TRANSPOSED = {
    "grouped_mm": lambda x, w, ids: F.grouped_mm(x, w.transpose(-2, -1), offs=ids.cumsum(0).int()),
    "mT": lambda x, w, ids: torch._grouped_mm(x, w.mT, offs=ids.cumsum(0).int()),
    "cast": lambda x, w, ids: torch._grouped_mm(x, w.float().bfloat16().mT, offs=ids.cumsum(0).int()),
    "bmm": lambda x, w, ids: torch.bmm(x.view(4, 2, 64), w.permute(0, 2, 1)),
}


@pytest.mark.nightly
def test_transformers_own_grouped_product_is_found(trace):
    """In fp32, by its name; its backward reads the offsets on the host, which fake tensors can't tell."""
    library("transformers.integrations.moe")
    module = nn.Module()
    module.up = nn.Parameter(torch.randn(4, 128, 64))

    def function(x, ids):
        multiply = torch.ops.transformers.grouped_mm_fallback
        return multiply(x, module.up.mT, ids.cumsum(0)), multiply.default(x, module.up.mT, offs=ids.cumsum(0))

    result = find(Flow(trace(function, torch.randn(8, 64), torch.full((4,), 2))))
    assert [(site.name, site.transposed, site.shape) for site in result.sites] == [
        ("module.up", False, "8 x 64 -> 128, 4 experts")
    ] * 2
    assert result.rejections == []


@pytest.mark.parametrize(("functions", "transposed"), [(GROUPED, True), (GROUPED_TRANSPOSED, False)])
def test_experts_are_found_in_every_spelling(trace, functions, transposed):
    module = nn.Module()
    module.up = nn.Parameter((torch.randn(4, 64, 128) if transposed else torch.randn(4, 128, 64)).bfloat16())
    x, ids = torch.randn(8, 64).bfloat16(), torch.full((4,), 2)
    together = trace(lambda x, ids: [f(x, module.up, ids) for f in functions.values()], x, ids)
    result = find(Flow(together))
    assert result.rejections == []
    seen = [(s.name, s.transposed, s.in_features, s.out_features, s.shape) for s in result.sites]
    assert seen == len(functions) * [("module.up", transposed, 64, 128, "8 x 64 -> 128, 4 experts")]
    assert {site.other_uses for site in result.sites} == {()}


EXPERTS = {
    "one of them": (lambda x, w, ids: x @ w[1], "matmul multiplies"),
    "one after the other": (lambda x, w, ids: F.linear(x[:, :64], w[2].t()), "linear multiplies"),
    "all with the same tokens": (lambda x, w, ids: x @ w, "matmul multiplies"),
    "einsum": (lambda x, w, ids: torch.einsum("etk,ekn->etn", x.view(4, 2, 64), w), "einsum multiplies"),
    "gathered": (lambda x, w, ids: torch.bmm(x[:4, None], w[ids]), "data choose a matrix"),
    "gathered by index_select": (
        lambda x, w, ids: torch.bmm(x[:4, None], w.index_select(0, ids)), "data choose a matrix"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("function", "why"), EXPERTS.values(), ids=EXPERTS.keys())
def test_experts_in_one_parameter_are_reported(trace, function, why):
    ids = torch.full((4,), 2)
    result = find(Flow(trace(experts(function), torch.randn(8, 64), ids)))
    assert result.sites == []
    assert [(r.name, r.reason) for r in result.rejections] == [("module.up", Reason.NOT_2D)]
    assert why in result.rejections[0].detail
    assert result.rejections[0].flops
    assert "grouped_mm" in result.rejections[0].advice


class GroupedExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 64, 128).bfloat16())

    def forward(self, x, ids):
        return torch._grouped_mm(x, self.up, ids.cumsum(0).int())


def test_a_grouped_product_with_more_is_reported(trace):
    graph = trace(GroupedExperts(), torch.randn(8, 64).bfloat16(), torch.full((4,), 2))
    (node,) = graph.graph.find_nodes(op="call_function", target=torch._grouped_mm)
    node.kwargs = {**node.kwargs, "bias": graph.graph.create_node("call_function", torch.zeros, (4, 128))}
    node.prepend(node.kwargs["bias"])
    result = find(Flow(graph))
    assert result.sites == []
    assert [(r.name, r.reason) for r in result.rejections] == [("up", Reason.UNSUPPORTED_FORM)]
    assert "bias" in result.rejections[0].detail


def test_products_of_one_matrix_in_groups_are_no_linear_of_experts(trace):
    """Columns grouped, as in a gradient, and a parameter on the left."""
    module = nn.Module()
    module.up = nn.Parameter(torch.randn(64, 8).bfloat16())

    def function(x, ids):
        return torch._grouped_mm(module.up, x, ids.cumsum(0).int())

    result = find(Flow(trace(function, torch.randn(8, 64).bfloat16(), torch.full((4,), 2))))
    assert result.sites == []
    assert [r.name for r in result.rejections] == ["module.up"]


def test_computed_weight_is_reported(trace):
    sites, rejections = found(trace(Weights(lambda m, x: F.linear(x, m.w * 2)), torch.randn(2, 8, 80)))
    assert sites == []
    assert [r.reason for r in rejections] == [Reason.NOT_A_PARAMETER]


def test_multi_head_attention_is_reported(trace):
    attention = nn.MultiheadAttention(64, 4, batch_first=True)
    x = torch.randn(2, 8, 64)
    sites, rejections = found(trace(lambda y: attention(y, y, y)[0], x))
    assert sites == []
    assert [(r.name, r.reason) for r in rejections] == [
        ("attention.in_proj_weight", Reason.UNSUPPORTED_FORM),
        ("attention.out_proj", Reason.UNSUPPORTED_FORM),
    ]


def test_products_of_activations_are_no_linears(trace):
    result = find(Flow(trace(lambda x: x @ x.transpose(-1, -2), torch.randn(2, 8, 8))))
    assert (result.sites, result.rejections) == ([], [])
    assert result.others == {"products of activations": 2 * 2 * 8 * 8 * 8}


def test_attention_is_no_product_of_activations(trace):
    q = torch.randn(2, 4, 16, 8, requires_grad=True)
    result = find(Flow(trace(lambda q: F.scaled_dot_product_attention(q, q, q), q)))
    product = 2 * 2 * 4 * 16 * 16 * 8
    assert result.others == {"attention": (2 + 5) * product}


def test_linears_that_share_a_weight_are_no_other_uses(trace):
    layer = nn.Linear(64, 64)
    sites, _ = found(trace(lambda x: layer(F.relu(layer(x))) + x, torch.randn(8, 64)))
    assert [site.other_uses for site in sites] == [(), ()]
    assert sites[0].weight is sites[1].weight


def test_what_else_reads_a_weight_is_named(trace):
    layer = nn.Linear(64, 64)
    sites, _ = found(trace(lambda x: layer(x) + layer.weight.t().sum(), torch.randn(8, 64)))
    assert [site.other_uses for site in sites] == [("sum",)]


@pytest.mark.parametrize(
    ("function", "writers"),
    [
        (lambda m, x: (m.w.mul_(0.5), F.linear(x, m.w))[1], ("mul_",)),
        (lambda m, x: F.linear(x, m.w.mul_(0.5)), ("mul_",)),
        (lambda m, x: (m.w.data.clamp_(-1, 1), x @ m.w.t())[1], ("clamp_",)),
        (lambda m, x: (m.w[:8].zero_(), F.linear(x, m.w.double().float()))[1], ("zero_",)),
        (lambda m, x: (m.w.copy_(m.wt.t()), F.linear(x, m.w))[1], ("copy_",)),
        (lambda m, x: (m.w.mul_(0.5), checkpoint(lambda y: F.linear(y, m.w), x, use_reentrant=False))[1], ("mul_",)),
        (lambda m, x: checkpoint(lambda y: (m.w.mul_(0.5), F.linear(y, m.w))[1], x, use_reentrant=False), ("mul_",)),
        (lambda m, x: (F.linear(x, m.w), m.w.mul_(0.5))[0], ()),
        (lambda m, x: (m.wt.mul_(0.5), x.mul_(2.0), F.linear(x, m.w))[2], ()),
    ],
    ids=["first", "handed on", "data", "a part", "replaced", "around", "inside", "afterwards", "another"],
)
def test_what_writes_to_a_weight_before_it_is_read_is_named(trace, function, writers):
    with torch.no_grad():
        sites, _ = found(trace(Weights(function), torch.randn(2, 3, 80)))
    assert [site.writers for site in sites] == [writers]


def test_the_transpose_of_a_weight_is_another_use(trace):
    """An autoencoder with tied weights: pruned along in_features of one is not along those of the other."""
    w = nn.Parameter(torch.randn(64, 128))
    sites, _ = found(trace(lambda x: F.relu(x @ w) @ w.t(), torch.randn(8, 64)))
    assert [site.other_uses for site in sites] == [("matmul",), ("matmul",)]


def test_a_checkpointed_region_runs_again_what_its_backward_needs(trace):
    """Not its last linear: the gradient of a sum needs none of its terms."""
    up, down = nn.Linear(64, 128), nn.Linear(128, 64)
    x = torch.randn(8, 64, requires_grad=True)

    def block(x):
        return x + down(F.gelu(up(x)))

    sites, _ = found(trace(lambda x: checkpoint(block, x, use_reentrant=False), x))
    assert [site.forwards for site in sites] == [2, 1]
    sites, _ = found(trace(lambda x: checkpoint(lambda v: block(v).tanh(), x, use_reentrant=False), x))
    assert [site.forwards for site in sites] == [2, 2]


def test_what_nothing_returned_is_made_of_has_no_backward(trace):
    """A pooler whose result the loss does not read."""
    layer, pooler = nn.Linear(64, 64), nn.Linear(64, 64)

    def function(x):
        h = layer(x)
        pooler(h)
        return h

    sites, _ = found(trace(function, torch.randn(8, 64, requires_grad=True)))
    assert {site.name: site.products for site in sites} == {
        "layer": ("fprop", "dgrad", "wgrad"), "pooler": ("fprop",)
    }  # fmt: skip


RESULTS = {
    "in a new tensor": lambda layer, x: in_a_new_tensor(x, layer),
    "copied": lambda layer, x: torch.empty(8, 64).copy_(layer(x)),
    "in a checkpointed region": lambda layer, x: checkpoint(in_a_new_tensor, x, layer, use_reentrant=False),
    "read again": lambda layer, x: in_a_new_tensor(x, layer) * 2,
}


@pytest.mark.parametrize("function", RESULTS.values(), ids=RESULTS.keys())
def test_what_is_written_to_a_tensor_that_is_returned_has_a_backward(trace, function):
    layer = nn.Linear(64, 64)
    sites, _ = found(trace(lambda x: function(layer, x), torch.randn(8, 64, requires_grad=True)))
    assert {site.products for site in sites} == {("fprop", "dgrad", "wgrad")}


def test_what_is_written_to_an_input_has_a_backward(trace):
    layer = nn.Linear(64, 64)
    sites, _ = found(trace(lambda x, out: (out.copy_(layer(x)), None)[1], torch.randn(8, 64), torch.zeros(8, 64)))
    assert [site.products for site in sites] == [("fprop", "wgrad")]


CUTS = {
    "detached": lambda layer, x: layer(x).detach() + x,
    "compared": lambda layer, x: torch.where(layer(x) > 0, x, 0.0),
    "an index": lambda layer, x: x + layer(x).max(-1).indices[:, None],
    "rounded straight through": lambda layer, x: x + (layer(x).round() - x).detach(),
}


@pytest.mark.parametrize("function", CUTS.values(), ids=CUTS.keys())
def test_what_is_cut_off_has_no_backward(trace, function):
    """The FLOPs of the report are those that PyTorch counts."""
    layer = nn.Linear(64, 64)
    sites, _ = found(trace(lambda x: function(layer, x), torch.randn(8, 64, requires_grad=True)))
    assert [site.products for site in sites] == [("fprop",)]


def test_each_parameter_in_a_branch_is_reported(trace):
    """Nobody looks into the body of torch.cond: which of its operands are multiplied is not known."""
    up, down = nn.Linear(64, 128), nn.Linear(128, 64)
    graph = trace(
        lambda x: torch.cond(x.sum() > 0, lambda x: down(F.gelu(up(x))), lambda x: x * 2, (x,)), torch.randn(8, 64)
    )
    sites, rejections = found(graph)
    assert sites == []
    assert {(r.name, r.detail) for r in rejections} == {(name, "cond is not rewritten yet") for name in ("up", "down")}


def test_products_of_a_node_with_several_results_are_counted(trace):
    cell = nn.LSTMCell(64, 64)
    graph = trace(lambda x: cell(x)[0], torch.randn(8, 64))
    sites, rejections = found(graph)
    assert sites == []
    counted = sum((rejected_row(rejection).flops() for rejection in rejections), Counter())
    # Two products with 4 x 64 features; no gradient of the first state, nor of the input.
    assert counted == {"fp32": (2 + 2) * 2 * 8 * 64 * 256}


def test_a_nested_region_counts_as_what_it_runs(trace):
    """Where gradients are recorded the region's operation traces a backward, which is none of its products."""
    layer = nn.Linear(64, 64)
    region = torch.compiler.nested_compile_region(lambda x: F.gelu(layer(x)))
    result = find(Flow(trace(lambda x: region(region(x)), torch.randn(8, 64, requires_grad=True))))
    assert result.sites == []
    assert result.others == {}
    assert sum(rejection.flops for rejection in result.rejections) == 2 * 3 * 2 * 8 * 64 * 64
