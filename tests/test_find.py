"""FIND and roles: graphs in, exact list of linears out."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from libraries import library
from sparse_compile.passes.find import find
from sparse_compile.passes.flow import Flow
from sparse_compile.passes.roles import Role
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


ROLES_OF_EXPERTS = {
    "gated": lambda h: F.silu(h[:, ::2]) * h[:, 1::2],
    "halves": lambda h: F.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1],
    "with a bias of each expert": lambda h: F.silu(h.chunk(2, -1)[0] + BIAS[IDS]) * h.chunk(2, -1)[1],
    "masked, in place": lambda h: F.gelu(h.masked_fill_(h[:, :1] > 2, 0.0)[:, :64]),
}
BIAS, IDS = nn.Parameter(torch.ones(4, 64).bfloat16()), torch.arange(8) // 2


@pytest.mark.parametrize("activation", ROLES_OF_EXPERTS.values(), ids=ROLES_OF_EXPERTS.keys())
def test_experts_are_ffns(trace, activation):
    """Between the sort of the tokens, the router's factors, and the sum over experts."""
    module, router = nn.Module(), nn.Linear(64, 4).bfloat16()
    module.up = nn.Parameter(torch.randn(4, 128, 64).bfloat16())
    module.down = nn.Parameter(torch.randn(4, 64, 64).bfloat16())

    def function(x):
        weights, ids = router(x).softmax(-1).max(-1)
        ids, order = ids.sort()
        offsets = torch.histc(ids.float(), 4, 0, 3).cumsum(0, dtype=torch.int32)
        hidden = torch._grouped_mm(x[order], module.up.mT, offs=offsets)
        out = torch._grouped_mm(activation(hidden), module.down.mT, offs=offsets) * weights[order, None]
        return torch.zeros_like(x).index_add(0, order, out)

    sites, _ = found(trace(function, torch.randn(8, 64).bfloat16()))
    assert roles(sites) == {"router": Role.OTHER, "module.up": Role.UP, "module.down": Role.DOWN}


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


def roles(sites):
    return {site.name: site.role for site in sites}


@pytest.mark.parametrize("kind", ["linear", "conv1d", "gated", "checkpoint"])
def test_roles_in_a_transformer(trace, small_gpt, conv1d, batch, kind):
    layer = conv1d if kind == "conv1d" else nn.Linear
    model = small_gpt(layer, gated=kind == "gated", checkpoint=kind == "checkpoint")
    sites, rejections = found(trace(model, *batch))
    ffn = ("up", "down", "gate") if kind == "gated" else ("up", "down")
    expected = {f"blocks.0.{name}": Role.DOWN if name == "down" else Role.UP for name in ffn}
    expected |= {f"blocks.0.{name}": Role.OTHER for name in ("qkv", "proj")}
    assert roles(sites) == expected | {"head": Role.HEAD}
    assert rejections == []


def test_head_without_loss_in_the_graph(trace, small_gpt, batch):
    sites, _ = found(trace(small_gpt(), batch[0]))
    assert [site.name for site in sites if site.role is Role.LAST] == ["head"]
    assert Role.HEAD not in roles(sites).values()


def test_a_block_on_its_own_has_no_head(trace, small_gpt):
    sites, _ = found(trace(small_gpt().blocks[0], torch.randn(2, 8, 64)))
    assert set(roles(sites).values()) == {Role.UP, Role.DOWN, Role.OTHER}


def test_not_the_last_if_more_leaves_the_graph(trace, small_gpt):
    """Half a block returns the hidden activation and the residual stream."""
    block = small_gpt().blocks[0]
    sites, _ = found(trace(lambda x: (block.up(block.ffn_norm(x)), x * 2), torch.randn(2, 8, 64)))
    assert [site.role for site in sites] == [Role.OTHER]


def test_head_whose_output_is_changed_alone(trace, small_gpt, batch):
    """Soft-capped and sliced logits are logits."""
    model = small_gpt(depth=1)
    sites, _ = found(trace(lambda ids: 30 * torch.tanh(model(ids)[:, :-1] / 30), batch[0]))
    assert [site.name for site in sites if site.role is Role.LAST] == ["model.head"]


def test_ffn_on_its_own_is_ffn(trace):
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 64))
    sites, _ = found(trace(lambda x: model(x), torch.randn(8, 64)))
    assert [site.role for site in sites] == [Role.UP, Role.DOWN]


def test_between_two_activation_functions_it_is_down(trace):
    """Of three linears in a row only the first reads what no linear of the FFN has made."""
    first, second, third = nn.Linear(64, 128), nn.Linear(128, 128), nn.Linear(128, 64)
    sites, _ = found(trace(lambda x: third(F.relu(second(F.relu(first(x))))), torch.randn(8, 64)))
    assert [site.role for site in sites] == [Role.UP, Role.DOWN, Role.DOWN]


def test_fused_gate_and_up_is_ffn(trace):
    fused, down = nn.Linear(64, 256), nn.Linear(128, 64)

    def ffn(x):
        gate, up = fused(x).chunk(2, dim=-1)
        return down(F.silu(gate) * up) + x

    sites, _ = found(trace(ffn, torch.randn(8, 64)))
    assert [site.role for site in sites] == [Role.UP, Role.DOWN]


def test_norm_written_by_hand_is_not_pointwise(trace):
    """An RMS norm is multiplications but for its mean: proj -> norm -> up must not make proj an FFN linear."""
    proj, up, down = nn.Linear(64, 64), nn.Linear(64, 128), nn.Linear(128, 64)

    def layer(x):
        h = x + proj(x)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x + down(F.relu(up(h)).square())

    sites, _ = found(trace(layer, torch.randn(8, 64)))
    assert [site.role for site in sites] == [Role.OTHER, Role.UP, Role.DOWN]


def test_factors_of_one_matrix_are_no_ffn(trace):
    """Two linears in a row, as in a low-rank adapter, have no activation function between them."""
    a, b = nn.Linear(64, 64), nn.Linear(64, 64)
    sites, _ = found(trace(lambda x: x + b(a(x)), torch.randn(8, 64)))
    assert [site.role for site in sites] == [Role.OTHER, Role.OTHER]


def test_linears_that_share_a_weight_are_no_other_uses(trace):
    layer = nn.Linear(64, 64)
    sites, _ = found(trace(lambda x: layer(F.relu(layer(x))) + x, torch.randn(8, 64)))
    assert [site.other_uses for site in sites] == [(), ()]
    assert sites[0].weight is sites[1].weight


def test_what_else_reads_a_weight_is_named(trace):
    layer = nn.Linear(64, 64)
    sites, _ = found(trace(lambda x: layer(x) + layer.weight.t().sum(), torch.randn(8, 64)))
    assert [site.other_uses for site in sites] == [("sum",)]


def test_the_transpose_of_a_weight_is_another_use(trace):
    """An autoencoder with tied weights: pruned along in_features of one is not along those of the other."""
    w = nn.Parameter(torch.randn(64, 128))
    sites, _ = found(trace(lambda x: F.relu(x @ w) @ w.t(), torch.randn(8, 64)))
    assert [site.other_uses for site in sites] == [("matmul",), ("matmul",)]


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        s = gate.sigmoid()
        return grad * up * s * (1 + gate * (1 - s)), grad * gate * s


def dropped(h):
    return h * (torch.rand_like(h) > 0.1) / 0.9


def set_in_place(h):
    h = F.relu(h)
    h[:, 0] = 0
    return h


def changed_without_use(h):
    h.relu_()
    return h


ACTIVATIONS = {
    "autograd.Function": lambda gate, up: Swish.apply(gate, up),
    "compares": lambda gate, up: gate * (gate > 0) * up,
    "where": lambda gate, up: torch.where(gate > 0, gate, 0.0) * up,
    "checkpointed": lambda gate, up: checkpoint(lambda a, b: F.gelu(a) * b, gate, up, use_reentrant=False),
    "checkpointed, several results": lambda gate, up: torch.mul(
        *checkpoint(lambda a, b: (F.gelu(a), b * 2), gate, up, use_reentrant=False)
    ),
    "rand_like": lambda gate, up: dropped(F.silu(gate) * up),
    "bernoulli": lambda gate, up: gate.relu() * up * torch.bernoulli(torch.full_like(up, 0.9)),
    "lerp": lambda gate, up: torch.lerp(gate, gate.sigmoid(), 0.5) * up,
    "addcmul": lambda gate, up: torch.addcmul(gate, gate, up),
    "transposed on the way": lambda gate, up: (F.gelu(gate.t()) * up.t()).t(),
    "permuted": lambda gate, up: (F.gelu(gate) * up).view(8, 2, 64).permute(1, 0, 2).permute(1, 0, 2).flatten(1),
    "special function": lambda gate, up: torch.special.expit(gate) * up,
    "written to in place": lambda gate, up: set_in_place(gate) * up,
    "changed in place": lambda gate, up: changed_without_use(gate) * up,
    "a factor for each token": lambda gate, up: F.silu(gate) * up * torch.rand(8, 1).softmax(0),
    "a mask": lambda gate, up: (F.silu(gate) * up).masked_fill(torch.rand(8, 1) > 0.9, 0.0),
    "detached gate": lambda gate, up: F.silu(gate).detach() * up,
    "cast and back": lambda gate, up: (F.silu(gate.bfloat16()) * up.bfloat16()).float(),
}
NO_ACTIVATIONS = {
    "softmax": lambda gate, up: gate.softmax(-1) * up,
    "norm": lambda gate, up: F.layer_norm(gate * up, (128,)),
    "RMS norm by hand": lambda gate, up: gate * up * (gate * up).square().mean(-1, keepdim=True).rsqrt(),
    "largest only": lambda gate, up: gate * (gate >= gate.topk(8, -1).values[:, -1:]) * up,
    "mean over tokens": lambda gate, up: F.silu(gate) * up.mean(0),
    "attention": lambda gate, up: F.scaled_dot_product_attention(gate, up, up),
}


class Gated(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(64, 128), nn.Linear(64, 128), nn.Linear(128, 64)
        self.function = function

    def forward(self, x):
        return x + self.down(self.function(self.gate(x), self.up(x)))


SCALE = nn.Parameter(torch.ones(128))
LINEAR = {
    "nothing": lambda h: h,
    "dropout": lambda h: F.dropout(h, 0.1),
    "dropout by hand": lambda h: dropped(h),
    "a scale and a shift": lambda h: h * SCALE + torch.ones(128),
    "a mask of tokens": lambda h: h.masked_fill(torch.rand(8, 1) > 0.9, 0.0),
    "a residual": lambda h: h + h.roll(1, 0) / 2,
    "casts": lambda h: h.bfloat16().float(),
}


@pytest.mark.parametrize("function", LINEAR.values(), ids=LINEAR.keys())
def test_without_an_activation_function_it_is_no_ffn(trace, function):
    first, second = nn.Linear(64, 128), nn.Linear(128, 64)
    sites, _ = found(trace(lambda x: x + second(function(first(x))), torch.randn(8, 64)))
    assert [site.role for site in sites] == [Role.OTHER, Role.OTHER]


@pytest.mark.parametrize("function", ACTIVATIONS.values(), ids=ACTIVATIONS.keys())
def test_an_ffn_is_told_by_what_its_activation_does(trace, function):
    sites, _ = found(trace(Gated(function), torch.randn(8, 64)))
    assert roles(sites) == {"gate": Role.UP, "up": Role.UP, "down": Role.DOWN}


@pytest.mark.parametrize("function", NO_ACTIVATIONS.values(), ids=NO_ACTIVATIONS.keys())
def test_what_mixes_elements_is_no_ffn(trace, function):
    sites, _ = found(trace(Gated(function), torch.randn(8, 64)))
    assert Role.DOWN not in roles(sites).values()


def test_a_factor_by_a_router_leaves_experts_ffns(trace):
    router, up, down = nn.Linear(64, 4), nn.Linear(64, 128), nn.Linear(128, 64)

    def expert(x):
        return x + down(F.gelu(up(x)) * router(x).softmax(-1)[:, :1])

    sites, _ = found(trace(expert, torch.randn(8, 64)))
    assert [site.role for site in sites] == [Role.UP, Role.OTHER, Role.DOWN]


class Adapted(nn.Module):
    """A frozen linear and what is trained beside it."""

    def __init__(self, in_features, out_features, rank, activation=nn.Identity):
        super().__init__()
        self.base = nn.Linear(in_features, out_features).requires_grad_(False)
        self.a, self.b = nn.Linear(in_features, rank, bias=False), nn.Linear(rank, out_features, bias=False)
        self.activation = activation()

    def forward(self, x):
        return self.base(x) + self.b(self.activation(self.a(F.dropout(x, 0.1)))) * 2.0


@pytest.mark.parametrize("activation", [nn.Identity, nn.ReLU])
def test_adapters_are_no_ffn(trace, activation):
    """Neither between the matrices of one, nor from one to the next across the frozen activation function."""
    up, down = Adapted(64, 256, 48, activation), Adapted(256, 64, 48, activation)
    sites, _ = found(trace(lambda x: x + down(F.gelu(up(x))), torch.randn(8, 64)))
    part = {site.name: site.role for site in sites}
    assert {part[f"{layer}.{name}"] for layer in ("up", "down") for name in "ab"} == {Role.ADAPTER}
    assert (part["up.base"], part["down.base"]) == (Role.UP, Role.DOWN)


def test_a_trained_ffn_beside_frozen_attention_is_one(trace):
    proj = nn.Linear(64, 64).requires_grad_(False)
    up, down = nn.Linear(64, 128), nn.Linear(128, 64)

    def block(x):
        x = x + proj(x.softmax(-1))
        return x + down(F.gelu(up(x)))

    sites, _ = found(trace(block, torch.randn(8, 64)))
    assert [site.role for site in sites] == [Role.OTHER, Role.UP, Role.DOWN]


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
