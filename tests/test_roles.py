"""Roles: which linears are those of FFNs, heads and adapters."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from sparse_compile.passes.find import find
from sparse_compile.passes.flow import Flow
from sparse_compile.passes.roles import Role


def found(graph):
    result = find(Flow(graph))
    return result.sites, result.rejections


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
    assert roles(sites) == {"router": Role.ROUTER, "module.up": Role.UP, "module.down": Role.DOWN}


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


def test_the_last_may_leave_beside_others(trace, small_gpt):
    """Logits beside hidden states, or those of a second head."""
    layer, second = nn.Linear(64, 128), nn.Linear(64, 128)
    sites, _ = found(trace(lambda x: (layer(x), x * 2), torch.randn(8, 64)))
    assert [site.role for site in sites] == [Role.LAST]
    sites, _ = found(trace(lambda x: {"next": layer(x), "after": second(x)}, torch.randn(8, 64)))
    assert [site.role for site in sites] == [Role.LAST, Role.LAST]


def test_what_leaves_as_a_cache_is_not_the_last(trace):
    """Others read it: their attention."""
    keys, out = nn.Linear(64, 64), nn.Linear(64, 64)

    def attend(x):
        k = keys(x)
        return out(F.scaled_dot_product_attention(x, k, k)), k

    sites, _ = found(trace(attend, torch.randn(2, 8, 64)))
    assert [site.role for site in sites] == [Role.OTHER, Role.LAST]


@pytest.mark.parametrize(
    "given",
    [torch.rand(8, 128) > 0.5, torch.rand(8, 1) > 0.5, torch.rand(8, 1), torch.tensor(1.5)],
    ids=["mask of tokens", "mask of padding", "temperature of each", "temperature"],
)
def test_what_masks_logits_or_scales_them_is_no_other_activation(trace, given):
    layer = nn.Linear(64, 128)

    def function(x, given):
        logits = layer(x)
        logits = logits.masked_fill(given, -1e4) if given.dtype is torch.bool else logits / given
        return F.cross_entropy(logits, torch.arange(8))

    sites, _ = found(trace(function, torch.randn(8, 64), given))
    assert [site.role for site in sites] == [Role.HEAD]


def test_head_whose_output_is_changed_alone(trace, small_gpt, batch):
    """Soft-capped and sliced logits are logits."""
    model = small_gpt(depth=1)
    sites, _ = found(trace(lambda ids: 30 * torch.tanh(model(ids)[:, :-1] / 30), batch[0]))
    assert [site.name for site in sites if site.role is Role.LAST] == ["model.head"]


def written(parts):
    out = torch.empty(8, 64)
    for index, part in enumerate(parts):
        out[4 * index : 4 * index + 4] = part
    return out


JOINED = {"concatenated": torch.cat, "stacked": torch.stack, "written": written}


@pytest.mark.parametrize("joined", JOINED.values(), ids=JOINED.keys())
def test_heads_whose_logits_lie_side_by_side_are_heads(trace, joined):
    """Several heads, as of codebooks, or one that runs over parts of a batch."""
    one, other = nn.Linear(64, 64), nn.Linear(64, 64)

    def logits(x):
        return joined([one(x[:4]), other(x[4:])])

    sites, _ = found(trace(logits, torch.randn(8, 64)))
    assert [site.role for site in sites] == [Role.LAST, Role.LAST]
    sites, _ = found(trace(lambda x: F.cross_entropy(logits(x).flatten(0, -2), torch.arange(8)), torch.randn(8, 64)))
    assert [site.role for site in sites] == [Role.HEAD, Role.HEAD]


def test_not_the_last_if_its_output_was_added_to(trace):
    layer = nn.Linear(64, 64)

    def function(x):
        h = layer(x)
        h.add_(x)
        return h

    sites, _ = found(trace(function, torch.randn(8, 64)))
    assert [site.role for site in sites] == [Role.OTHER]


CROSS_ENTROPIES = {
    "cross_entropy": lambda x: F.cross_entropy(x, torch.arange(8)),
    "nll_loss": lambda x: F.nll_loss(x.log_softmax(-1), torch.arange(8)),
    "kl_div": lambda x: F.kl_div(x.log_softmax(-1), torch.full((8, 64), 1 / 64)),
    "logsumexp": lambda x: (x.logsumexp(-1) - x[:, 0]).mean(),
}
OTHER_LOSSES = {
    "mse_loss": lambda x: F.mse_loss(x, torch.ones(8, 64)),
    "binary_cross_entropy": lambda x: F.binary_cross_entropy(x.sigmoid(), torch.zeros(8, 64)),
    "poisson_nll_loss": lambda x: F.poisson_nll_loss(x, torch.ones(8, 64)),
    "soft_margin_loss": lambda x: F.soft_margin_loss(x, torch.ones(8, 64)),
    "multi_margin_loss": lambda x: F.multi_margin_loss(x, torch.arange(8)),
    "multilabel_margin_loss": lambda x: F.multilabel_margin_loss(x, torch.zeros(8, 64, dtype=torch.int64)),
    "multilabel_soft_margin_loss": lambda x: F.multilabel_soft_margin_loss(x, torch.zeros(8, 64)),
}


@pytest.mark.parametrize("loss", CROSS_ENTROPIES.values(), ids=CROSS_ENTROPIES.keys())
def test_what_a_cross_entropy_reads_is_a_head(trace, loss):
    layer = nn.Linear(64, 64)
    sites, _ = found(trace(lambda x: loss(layer(x)), torch.randn(8, 64)))
    assert [site.role for site in sites] == [Role.HEAD]


@pytest.mark.parametrize("loss", OTHER_LOSSES.values(), ids=OTHER_LOSSES.keys())
def test_what_another_loss_reads_is_an_output(trace, loss):
    layer = nn.Linear(64, 64)
    sites, _ = found(trace(lambda x: loss(layer(x)), torch.randn(8, 64)))
    assert [site.role for site in sites] == [Role.OUTPUT]


NOISE = nn.Linear(64, 128)
ROUTERS = {
    "topk": lambda x: x.topk(2).indices,
    "softmax, topk": lambda x: x.softmax(-1, dtype=torch.float32).topk(2).values,
    "noise, log_softmax, argmax": lambda x: (x + torch.randn(8, 128)).log_softmax(-1).argmax(-1),
    "sigmoid, a bias, groups": lambda x: (x.sigmoid() + torch.ones(128)).view(8, 4, 32).topk(2).values.sum(-1),
    "max along a dimension": lambda x: x.max(dim=-1),
    "noise with a learned scale": lambda x: (x + torch.randn(8, 128) * F.softplus(NOISE(x[:, :64]))).topk(2).indices,
    "gumbel_softmax": lambda x: F.gumbel_softmax(x, hard=True),
    "multinomial": lambda x: x.softmax(-1).multinomial(2),
    "sort": lambda x: x.sort(descending=True).indices[:, :2],
}


@pytest.mark.parametrize("choose", ROUTERS.values(), ids=ROUTERS.keys())
def test_what_chooses_by_its_largest_elements_is_a_router(trace, choose):
    layer = nn.Linear(64, 128)
    sites, _ = found(trace(lambda x: choose(layer(x)), torch.randn(8, 64)))
    assert {site.role for site in sites} == {Role.ROUTER}


def test_a_router_may_be_the_end_of_an_ffn(trace):
    up, down = nn.Linear(64, 128), nn.Linear(128, 96)
    sites, _ = found(trace(lambda x: down(torch.tanh(up(x))).softmax(-1).topk(2), torch.randn(8, 64)))
    assert [site.role for site in sites] == [Role.UP, Role.ROUTER]


@pytest.mark.parametrize("largest", [lambda y: y.abs().max(), lambda y: y.abs().max(dim=-1, keepdim=True).values])
def test_the_largest_element_as_a_scale_chooses_nothing(trace, largest):
    """As models do that quantize their activations."""
    layer = nn.Linear(64, 128)

    def function(x):
        y = layer(x)
        return (y / largest(y)).cumsum(-1)

    sites, _ = found(trace(function, torch.randn(8, 64)))
    assert [site.role for site in sites] == [Role.OTHER]


def test_a_router_whose_logits_a_loss_balances_is_no_head(trace):
    """Its z-loss is a logsumexp."""
    layer = nn.Linear(64, 128)

    def function(x):
        logits = layer(x)
        return logits.topk(2).values.sum() + logits.logsumexp(-1).square().mean()

    sites, _ = found(trace(function, torch.randn(8, 64)))
    assert [site.role for site in sites] == [Role.ROUTER]


def test_a_factor_made_of_the_output_itself_is_no_mask(trace):
    """Normalised by hand or not: what ends an FFN is no output of the model."""
    up, down = nn.Linear(64, 128), nn.Linear(128, 64)

    def function(x):
        z = down(F.gelu(up(x)))
        return F.mse_loss(z / z.norm(dim=-1, keepdim=True), x)

    sites, _ = found(trace(function, torch.randn(8, 64)))
    assert [site.role for site in sites] == [Role.UP, Role.DOWN]


def test_a_head_whose_accuracy_is_counted_is_no_router(trace):
    layer = nn.Linear(64, 128)

    def function(x):
        logits = layer(x)
        return F.nll_loss(logits.log_softmax(-1), torch.arange(8)), (logits.argmax(-1) == torch.arange(8)).sum()

    sites, _ = found(trace(function, torch.randn(8, 64)))
    assert [site.role for site in sites] == [Role.HEAD]


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


def half_changed(h):
    h.t()[:64].relu_()
    return h


def in_a_new_tensor(h):
    out = torch.zeros(8, 128)
    out[:4] = F.gelu(h[:4])
    out[4:] = F.relu(h[4:])
    return out


def zeroed(h):
    h = F.relu(h)
    h[:, :1].zero_()
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


@pytest.mark.by_day(9)
@pytest.mark.parametrize("function", ACTIVATIONS.values(), ids=ACTIVATIONS.keys())
def test_an_ffn_is_told_by_what_its_activation_does(trace, function):
    sites, _ = found(trace(Gated(function), torch.randn(8, 64)))
    assert roles(sites) == {"gate": Role.UP, "up": Role.UP, "down": Role.DOWN}


@pytest.mark.parametrize("function", [changed_without_use, half_changed, in_a_new_tensor, zeroed])
def test_what_was_written_counts_where_the_next_linear_reads_it(trace, function):
    up, down = nn.Linear(64, 128), nn.Linear(128, 64)
    sites, _ = found(trace(lambda x: x + down(function(up(x))), torch.randn(8, 64)))
    assert {(site.name, site.role) for site in sites} == {("up", Role.UP), ("down", Role.DOWN)}


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
