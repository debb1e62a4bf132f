"""Operations that hide several linears compute the same after they are expanded; evaluation computes as training."""

import copy
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import sparse_compile
from sparse_compile.passes.expand import encoder_layer, expand, multi_head_attention
from sparse_compile.torch_internals.graph import clone_graph_module, example_value
from sparse_compile.torch_internals.operations import encoder_layer_fast_path

BATCH, TOKENS, KEYS, WIDTH, HEADS = 3, 7, 5, 32, 4
FUSED = {F.multi_head_attention_forward, encoder_layer_fast_path}


def compiled(model, **options):
    options = {"sste.executor": "eager", "sste.when": "always"} | {f"sste.{name}": o for name, o in options.items()}
    return torch.compile(model, backend="sste", options=options)


def masks(kind, queries, keys):
    """``attn_mask`` and ``key_padding_mask`` by name: each is bool, of zeros and minus infinity, or of any numbers."""
    attention, padding, _, dtype = kind.split()
    shapes = {"no": None, "2d": (queries, keys), "3d": (BATCH * HEADS, queries, keys), "keys": (BATCH, keys)}
    made = []
    for shape in (shapes[attention], shapes[padding]):
        mask = None
        if shape is not None:
            mask = torch.rand(shape) < 0.4
            mask[..., 0] = False  # every query has a key
            if dtype == "float":
                mask = torch.where(mask, float("-inf"), torch.randn(shape))
        made.append(mask)
    return dict(zip(("attn_mask", "key_padding_mask"), made, strict=True))


MASKS = ["no no of bool", "2d no of bool", "3d no of float", "no keys of bool", "2d keys of float", "3d keys of bool"]
MODULES = {
    "plain": {},
    "no bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero attention": {"add_zero_attn": True},
    "bias_kv and zero attention": {"add_bias_kv": True, "add_zero_attn": True, "bias": False},
    "other features": {"kdim": 16, "vdim": 48},
    "dropout": {"dropout": 0.3},
}


def attentions():
    """In a night all; by day a third, in which any two of the values meet."""
    for (turn, name), (step, reads) in product(enumerate(MODULES), enumerate(("itself", "one memory", "two"))):
        # Keys and values of other features than the queries' can't be the queries.
        if name == "other features" and reads != "two":
            continue
        for index, kind in enumerate(MASKS):
            # Of one way to read, whatever it meets is with it.
            by_day = name == "other features" or (turn + step + index) % 3 == 0
            yield pytest.param(
                name, reads, kind, id=f"{name}-{reads}-{kind}", marks=() if by_day else pytest.mark.nightly
            )


@pytest.mark.parametrize(("name", "reads", "kind"), list(attentions()))
def test_attention_is_that_of_pytorch(monkeypatch, name, reads, kind):
    """Output, probabilities and all gradients, in every argument of nn.MultiheadAttention."""
    module = MODULES[name]
    attention = nn.MultiheadAttention(WIDTH, HEADS, **module)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.2)  # biases are zero otherwise
    query = torch.randn(TOKENS, BATCH, WIDTH, requires_grad=True)
    if reads == "itself":
        inputs, keys = [query], TOKENS
    else:
        widths = [WIDTH] if reads == "one memory" else [module.get("kdim", WIDTH), module.get("vdim", WIDTH)]
        inputs, keys = [query, *(torch.randn(KEYS, BATCH, width, requires_grad=True) for width in widths)], KEYS
    given = [inputs[0], inputs[min(1, len(inputs) - 1)], inputs[-1]]
    settings = masks(kind, TOKENS, keys)
    for need_weights, average in ((True, True), (True, False), (False, True)):
        results = []
        for function in (F.multi_head_attention_forward, multi_head_attention):
            monkeypatch.setattr(F, "multi_head_attention_forward", function)
            torch.manual_seed(1)
            out, probabilities = attention(*given, need_weights=need_weights, average_attn_weights=average, **settings)
            total = out.square().sum() + (probabilities.square().sum() if need_weights else 0)
            results.append([out, *([probabilities] if need_weights else [])])
            results[-1] += torch.autograd.grad(total, [*inputs, *attention.parameters()])
            monkeypatch.undo()
        torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("padding", [None, "keys"])
def test_causal_and_unbatched(monkeypatch, need_weights, padding):
    attention = nn.MultiheadAttention(WIDTH, HEADS)
    x = torch.randn(TOKENS, WIDTH)
    settings = {"attn_mask": nn.Transformer.generate_square_subsequent_mask(TOKENS), "is_causal": True}
    if padding:
        settings["key_padding_mask"] = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 1.0, float("-inf")])
    results = []
    for function in (F.multi_head_attention_forward, multi_head_attention):
        monkeypatch.setattr(F, "multi_head_attention_forward", function)
        results.append(attention(x, x, x, need_weights=need_weights, **settings))
        monkeypatch.undo()
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("kind", ["static_k", "static_v", "both"])
def test_static_keys_and_values(kind):
    x, size = torch.randn(TOKENS, BATCH, WIDTH), (BATCH * HEADS, TOKENS, WIDTH // HEADS)
    projections = torch.randn(3 * WIDTH, WIDTH), None, None, None, False, 0.0, torch.randn(WIDTH, WIDTH), None
    static = {name: torch.randn(size) for name in ("static_k", "static_v") if kind in (name, "both")}
    results = [
        f(x, x, x, WIDTH, HEADS, *projections, **static) for f in (F.multi_head_attention_forward, multi_head_attention)
    ]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(("activation", "norm_first"), list(product(["relu", "gelu"], [False, True])))
@pytest.mark.parametrize("kind", MASKS)
def test_encoder_layer_is_that_of_pytorch(kind, activation, norm_first):
    """The composition equals the module where it trains, and the fused operation where that takes the mask."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, 0.0, activation, norm_first=norm_first, batch_first=True)
    layer.requires_grad_(False)  # masks need no gradients: the fast path would be taken
    x, settings = torch.randn(BATCH, TOKENS, WIDTH), masks(kind, TOKENS, TOKENS)
    settings = {
        {"attn_mask": "src_mask", "key_padding_mask": "src_key_padding_mask"}[k]: v for k, v in settings.items()
    }
    expected = layer.train()(x, **settings)
    attention = layer.self_attn
    float_masks = [F._canonical_mask(m, "", None, "", x.dtype, False) for m in settings.values()]
    mask, mask_type = attention.merge_masks(*float_masks, x)
    arguments = (
        x, WIDTH, HEADS, attention.in_proj_weight, attention.in_proj_bias, attention.out_proj.weight,
        attention.out_proj.bias, activation == "gelu", norm_first, layer.norm1.eps, layer.norm1.weight,
        layer.norm1.bias, layer.norm2.weight, layer.norm2.bias, layer.linear1.weight, layer.linear1.bias,
        layer.linear2.weight, layer.linear2.bias, mask, mask_type,
    )  # fmt: skip
    torch.testing.assert_close(encoder_layer(*arguments), expected, rtol=1e-5, atol=1e-5)
    if kind.endswith("bool"):
        torch.testing.assert_close(encoder_layer_fast_path(*arguments), expected, rtol=1e-5, atol=1e-5)


def test_encoder_layer_with_a_mask_of_two_dimensions():
    """Mask type 0, which modules do not pass."""
    x, mask = torch.randn(BATCH, TOKENS, WIDTH), torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, 0.0, batch_first=True).train()
    a = layer.self_attn
    arguments = (
        x, WIDTH, HEADS, a.in_proj_weight, a.in_proj_bias, a.out_proj.weight, a.out_proj.bias, False, False,
        layer.norm1.eps, layer.norm1.weight, layer.norm1.bias, layer.norm2.weight, layer.norm2.bias,
        layer.linear1.weight, layer.linear1.bias, layer.linear2.weight, layer.linear2.bias, mask, 0,
    )  # fmt: skip
    torch.testing.assert_close(encoder_layer(*arguments), layer(x, src_mask=mask), rtol=1e-5, atol=1e-5)


class Attention(nn.Module):
    """Too narrow for any rewrite: compiled, it must compute what it computes otherwise."""

    def __init__(self, how="plain", **settings):
        super().__init__()
        self.how, self.settings = how, {"need_weights": False} | settings
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, dropout=0.2 * (how == "dropout"))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        if self.how == "checkpointed":
            return self.head(checkpoint(self.attend, x, use_reentrant=False))
        if self.how == "autocast inside":
            with torch.autocast("cpu", torch.bfloat16):
                x = self.attend(x)
            return self.head(x.float())
        if self.how == "checkpointed in autocast":
            with torch.autocast("cpu", torch.bfloat16):
                x = checkpoint(self.attend, x, use_reentrant=False)
            return self.head(x.float())
        if self.how == "no_grad inside":
            with torch.no_grad():
                x = self.attend(x)
            return self.head(x)
        return self.head(self.attend(x))

    def attend(self, x):
        out, probabilities = self.attention(x, x, x, **self.settings)
        return out if probabilities is None else out + probabilities.float().mean()


# By day the last.
WAYS = [
    ("dropout", False), ("checkpointed in autocast", False), ("no_grad inside", False), ("plain", False),
    ("plain", True), ("checkpointed", False), ("autocast inside", False), ("dropout", True),
]  # fmt: skip


@pytest.mark.by_day(1)
@pytest.mark.parametrize(("how", "need_weights"), WAYS)
def test_expanded_graphs_compute_the_same(monkeypatch, how, need_weights):
    """In the modes that the graph itself sets, and with the same randomness."""
    model = Attention(how, need_weights=need_weights)
    x = torch.randn(BATCH, TOKENS, WIDTH)
    results = []
    for expanded in (True, False):
        if not expanded:
            monkeypatch.setattr("sparse_compile.backend.expand", lambda *_: None)
        torch._dynamo.reset()
        step, given = compiled(copy.deepcopy(model)), x.clone().requires_grad_()
        torch.manual_seed(3)
        y = step(given)
        y.square().mean().backward()
        results.append([y, given.grad, *(parameter.grad for parameter in step.parameters())])
    expanded, _ = sparse_compile.report().graphs
    assert {row.module for row in expanded.rows} == {"attention.in_proj_weight", "attention.out_proj", "head"}
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.nightly
def test_batch_sizes_that_change():
    """Sizes stay symbolic: one graph for all of them but the first."""
    settings = {"attn_mask": nn.Transformer.generate_square_subsequent_mask(TOKENS), "need_weights": True}
    model = Attention(**settings)
    step = compiled(model)
    for batch in (2, 3, 4, 5):
        x = torch.randn(batch, TOKENS, WIDTH)
        torch.testing.assert_close(step(x), model(x), rtol=1e-5, atol=1e-6)
    assert len(sparse_compile.report().graphs) == 2


def test_projections_are_linears():
    """Self-attention in dense FP8, as other attention projections are; what reads another sequence has a row, too."""
    model = nn.TransformerDecoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    x, memory = torch.randn(2, 16, 64), torch.randn(2, 16, 64)
    compiled(model)(x, memory).square().mean().backward()
    roles = {row.module: (row.role, row.fprop) for row in sparse_compile.report().rows}
    assert roles["self_attn.in_proj_weight"] == roles["self_attn.out_proj"] == ("other", "fp8")
    assert roles["multihead_attn.out_proj"] == ("other", "fp8")
    assert roles["linear1"] == ("ffn up", "2:4 fp8")
    assert roles["linear2"] == ("ffn down", "2:4 fp8")
    dense = {(row.module, row.reason.partition(":")[0]) for row in sparse_compile.report().rows if row.reason}
    assert dense == {("multihead_attn.in_proj_weight", "form not rewritten")}  # a third and two thirds of it


@pytest.mark.parametrize(
    ("settings", "masked", "mode"),
    [
        ({"norm_first": True, "activation": "gelu"}, "causal and padded", torch.inference_mode),
        pytest.param({}, "", torch.no_grad, marks=pytest.mark.nightly),
        pytest.param({}, "causal", torch.inference_mode, marks=pytest.mark.nightly),
        pytest.param({"activation": "gelu"}, "padded", torch.no_grad, marks=pytest.mark.nightly),
    ],
)
def test_encoder_evaluates_as_it_trained(settings, masked, mode):
    """PyTorch's fast path would multiply with weights that are not pruned."""
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True, **settings)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    step, x, kwargs = compiled(model), torch.randn(2, 16, 64), {}
    if "causal" in masked:
        kwargs |= {"mask": nn.Transformer.generate_square_subsequent_mask(16), "is_causal": True}
    padding = torch.arange(16) >= torch.tensor([[16], [9]])
    if "padded" in masked:
        # Masks of two types make modules warn, where dynamo gives up.
        kwargs["src_key_padding_mask"] = padding if masked == "padded" else torch.where(padding, float("-inf"), 0.0)
    trained = step(x, **kwargs)
    trained.square().mean().backward()
    rows = sparse_compile.report().rows[:]
    model.eval()
    with mode():
        evaluated, dense = step(x, **kwargs), model(x, **kwargs)
    valid = slice(None) if "padded" not in masked else ~padding
    torch.testing.assert_close(evaluated[valid], trained.detach()[valid], rtol=1e-3, atol=1e-3)
    assert (evaluated - dense)[valid].norm() > 0.05 * dense[valid].norm()
    of_evaluation = sparse_compile.report().rows[len(rows) :]
    assert [(row.module, row.role, row.decision) for row in of_evaluation] == [
        (row.module, row.role, row.decision) for row in rows
    ]


def test_a_sample_of_padding_alone():
    """Finite, as in training; the fused operation makes NaN of it."""
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    padding = torch.tensor([[False] * 16, [True] * 16])
    with torch.no_grad():
        assert compiled(layer)(torch.randn(2, 16, 64), src_key_padding_mask=padding).isfinite().all()


def expanding(change=lambda node: None, **settings):
    """A backend that changes the graph's fused node, expands the graph and keeps it."""

    def run(graph_module, inputs):
        graph = clone_graph_module(graph_module)
        (node,) = (node for node in graph.graph.nodes if node.target in FUSED)
        change(node)
        expand(graph, **settings)
        run.graph, run.expanded = graph, node not in graph.graph.nodes
        return graph.forward

    return run


def evaluate(backend):
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    with torch.no_grad():
        return torch.compile(layer, backend=backend)(torch.randn(2, 16, 64))


def subclass(node):
    """What a tensor subclass looks like to the pass."""
    node.args[0].meta["example_value"] = nn.Parameter(torch.randn(2, 16, 64))


def test_what_runs_on_no_ordinary_tensor_stays():
    """Dense if its weights never were pruned, an error otherwise."""
    evaluate(backend := expanding(subclass))
    assert not backend.expanded
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"trained pruned.* is a Parameter, no ordinary tensor.*fastpath"):
        evaluate(expanding(subclass, is_pruned=lambda weight: weight.shape == (128, 64)))


def test_every_node_has_an_example():
    evaluate(backend := expanding())
    assert backend.expanded
    backend.graph.graph.lint()
    assert all(example_value(n) is not None for n in backend.graph.graph.nodes if n.op.startswith("call_"))
