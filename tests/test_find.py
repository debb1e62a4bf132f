"""FIND and roles: graphs in, exact list of linears out."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

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


@pytest.mark.parametrize(("function", "name", "transposed", "bias"), SPELLINGS.values(), ids=SPELLINGS.keys())
def test_every_spelling_is_found(trace, function, name, transposed, bias):
    sites, rejections = found(trace(Weights(function), torch.randn(2, 8, 80)))
    assert [(s.name, s.transposed, s.bias is not None, s.in_features, s.out_features) for s in sites] == [
        (name, transposed, bias, 80, 48)
    ]
    assert rejections == []


UNSUPPORTED = {
    "einsum": (lambda m, x: torch.einsum("bti,oi->bto", x, m.w), "w"),
    "weight on the left": (lambda m, x: m.w @ x[0].t(), "w"),
    "addmm alpha": (lambda m, x: torch.addmm(m.b, x.view(-1, 80), m.wt, alpha=2), "wt"),
    "addmm adds a matrix": (lambda m, x: torch.addmm(x.view(-1, 80)[:, :48], x.view(-1, 80), m.wt), "wt"),
}


@pytest.mark.parametrize(("function", "name"), UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_forms_not_rewritten_are_reported(trace, function, name):
    sites, rejections = found(trace(Weights(function), torch.randn(2, 8, 80)))
    assert sites == []
    assert [(r.name, r.reason) for r in rejections] == [(name, Reason.UNSUPPORTED_FORM)]


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
    assert found(trace(lambda x: x @ x.transpose(-1, -2), torch.randn(2, 8, 8))) == ([], [])


def roles(sites):
    return {site.name: site.role for site in sites}


@pytest.mark.parametrize("kind", ["linear", "conv1d", "gated", "checkpoint"])
def test_roles_in_a_transformer(trace, small_gpt, conv1d, batch, kind):
    layer = conv1d if kind == "conv1d" else nn.Linear
    model = small_gpt(layer, gated=kind == "gated", checkpoint=kind == "checkpoint")
    sites, rejections = found(trace(model, *batch))
    ffn = ("up", "down", "gate") if kind == "gated" else ("up", "down")
    expected = {f"blocks.{i}.{name}": Role.DOWN if name == "down" else Role.UP for i in range(2) for name in ffn}
    expected |= {f"blocks.{i}.{name}": Role.OTHER for i in range(2) for name in ("qkv", "proj")}
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


def test_linears_that_share_a_weight_are_counted(trace):
    layer = nn.Linear(64, 64)
    sites, _ = found(trace(lambda x: layer(F.relu(layer(x))) + x, torch.randn(8, 64)))
    assert [(site.uses, site.other_uses) for site in sites] == [(2, ()), (2, ())]


def test_what_else_reads_a_weight_is_named(trace):
    layer = nn.Linear(64, 64)
    sites, _ = found(trace(lambda x: layer(x) + layer.weight.t().sum(), torch.randn(8, 64)))
    assert [(site.uses, site.other_uses) for site in sites] == [(1, ("sum",))]


def test_the_transpose_of_a_weight_is_another_use(trace):
    """An autoencoder with tied weights: pruned along in_features of one is not along those of the other."""
    w = nn.Parameter(torch.randn(64, 128))
    sites, _ = found(trace(lambda x: F.relu(x @ w) @ w.t(), torch.randn(8, 64)))
    assert [(site.uses, site.other_uses) for site in sites] == [(1, ("matmul",)), (1, ("matmul",))]
