"""The backend end to end: torch.compile in, gradients out, compared with an implementation that shares no code."""

import copy
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import sparse_compile
from sparse_compile.kernels import reference
from sparse_compile.kernels.reference import group_uniforms, mvue
from sparse_compile.recipe import SSTE, GradFormat
from sparse_compile.torch_internals import inductor
from sparse_compile.torch_internals.private_names import self_test
from sparse_compile.weights.registry import find_record

EAGER = {"sste.executor": "eager", "sste.when": "always"}


@pytest.fixture
def x():
    """Activations ``[4, 16, 64]``."""
    return torch.randn(4, 16, 64)


# An independent implementation of S-STE with MVUE and fp8, dense throughout: sorts instead of comparisons, loops over
# groups' cumulative probabilities instead of vectorised thresholds, masks instead of compressed operands.
def quantised(x, amax, largest=448, dtype=torch.float8_e4m3fn):
    scale = largest / amax
    return (x * scale).clamp(-largest, largest).to(dtype).float(), 1 / scale


def projected(weight):
    groups = weight.reshape(-1, 4)
    threshold = groups.abs().sort(dim=1).values[:, 1:2]
    return (groups.sign() * F.relu(groups.abs() - threshold)).reshape(weight.shape)


def sampled(grad, seed, index):
    """Exact MVUE along tokens of ``grad [T, N]``, by searching u and u + 1 in the cumulative probabilities."""
    tokens, columns = grad.shape
    groups = grad.reshape(tokens // 4, 4, columns).permute(0, 2, 1)
    magnitude = groups.abs()
    total, largest = magnitude.sum(-1, keepdim=True), magnitude.amax(-1, keepdim=True)
    rest = total - largest
    dominated = largest > rest
    probability = torch.where(dominated, magnitude / rest, 2 * magnitude / total)
    probability = torch.where(dominated & (magnitude == largest), torch.ones(()), probability)
    uniforms = group_uniforms(seed, index, tokens // 4, columns)
    kept = torch.zeros_like(groups)
    for q in range(tokens // 4):
        cumulative = probability[q].cumsum(-1)[:, :3].contiguous()
        for offset in (0.0, 1.0):
            chosen = torch.searchsorted(cumulative, uniforms[q][:, None] + offset, right=True)
            value = (groups[q] / probability[q]).gather(1, chosen)
            kept[q].scatter_(1, chosen, value)
    return kept.permute(0, 2, 1).reshape(tokens, columns)


class IndependentLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, beta, seed, index, grad_format):
        tokens = x.reshape(-1, x.shape[-1])
        x8, x_inv = quantised(tokens, tokens.abs().amax(1, keepdim=True))
        soft = projected(weight) if beta is not None else weight
        # One power of two, the largest that keeps the weight in range.
        w8, w_inv = quantised(soft, 448 / torch.exp2(torch.log2(448 / soft.abs().max()).floor()))
        w_inv = w_inv * (beta if beta is not None else 1.0)
        ctx.save_for_backward(w8 * w_inv, seed)
        ctx.x8, ctx.x_inv, ctx.index, ctx.sparse = x8, x_inv, index, beta is not None
        ctx.format = {"e4m3": (448, torch.float8_e4m3fn), "e5m2": (57344, torch.float8_e5m2)}[grad_format]
        return ((x8 * x_inv) @ (w8 * w_inv).t() + bias).reshape(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad_output):
        w, seed = ctx.saved_tensors
        grad = grad_output.reshape(-1, grad_output.shape[-1])
        g8, g_inv = quantised(grad, grad.abs().amax(1, keepdim=True), *ctx.format)
        folded = grad * ctx.x_inv
        bound = folded.abs().max()
        if ctx.sparse:
            folded = sampled(folded, seed, ctx.index)
            bound = 2 * bound
        f8, f_inv = quantised(folded, bound, *ctx.format)
        grad_weight = f_inv * (f8.t() @ ctx.x8)
        grad_input = ((g8 * g_inv) @ w).reshape(*grad_output.shape[:-1], -1)
        return grad_input, grad_weight, grad.sum(0), None, None, None, None


def independent_forward(model, ids, targets, seed, grad_format):
    """SmallGPT with FFN linears in S-STE and the others in fp8, the linears counted in execution order."""
    index = 0

    def run(layer, x, sparse, grad_format=grad_format):
        nonlocal index
        bias = x.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias
        beta = None
        if sparse:
            w = layer.weight.detach().double()
            beta = float((w * projected(w)).sum() / projected(w).square().sum())
        result = IndependentLinear.apply(x, layer.weight, bias, beta, seed, index, grad_format)
        index += 1
        return result

    x = model.embedding(ids)
    for block in model.blocks:
        batch, tokens, width = x.shape
        qkv = run(block.qkv, block.attention_norm(x), False).view(batch, tokens, 3, block.heads, -1)
        attended = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0), is_causal=True)
        x = x + run(block.proj, attended.transpose(1, 2).reshape(batch, tokens, width), False)
        x = x + run(block.down, F.gelu(run(block.up, block.ffn_norm(x), True)), True)
    logits = run(model.head, model.norm(x), False, "e5m2")
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def relative_errors(actual, expected):
    return {
        name: float((a.grad - e.grad).norm() / e.grad.norm())
        for (name, a), e in zip(actual.named_parameters(), expected.parameters(), strict=True)
    }


@pytest.mark.parametrize(
    ("grad_format", "executor", "depth"),
    [
        ("e4m3", "inductor", 1),
        ("e5m2", "eager", 1),
        pytest.param("e4m3", "eager", 2, marks=pytest.mark.nightly),
        pytest.param("e5m2", "inductor", 2, marks=pytest.mark.nightly),
    ],
)
def test_gradients_equal_an_independent_implementation(small_gpt, batch, grad_format, executor, depth, monkeypatch):
    model = small_gpt(depth=depth)
    baseline = copy.deepcopy(model)
    options = {
        "sste.executor": executor,
        "sste.when": "always",
        "sste.recipe": replace(SSTE, grad_format=GradFormat(grad_format)),
    }
    compiled = torch.compile(model, backend="sste", options=options)
    seeds = []

    def recorded(seed, *arguments):
        seeds.append(seed)
        return group_uniforms(seed, *arguments)

    monkeypatch.setattr(mvue, "group_uniforms", recorded)
    loss = compiled(*batch)
    loss.backward()
    assert len({int(seed) for seed in seeds}) == 1
    expected = independent_forward(baseline, *batch, seeds[0], grad_format)
    expected.backward()
    assert math.isclose(loss.item(), expected.item(), rel_tol=1e-5)
    # Sums in another order may round single elements to the neighbouring fp8 value, nothing more.
    assert max(relative_errors(model, baseline).values()) < 2e-3


@pytest.mark.parametrize("executor", ["eager", pytest.param("inductor", marks=pytest.mark.nightly)])
def test_bf16_prunes_targets_and_leaves_the_rest(small_gpt, batch, executor):
    """Against autograd through the projected weights, in fp32: within the rounding of bf16."""
    model = small_gpt(depth=1)
    baseline = copy.deepcopy(model)
    options = {"sste.executor": executor, "sste.when": "always", "sste.recipe": "ste-bf16"}
    loss = torch.compile(model, backend="sste", options=options)(*batch)
    loss.backward()
    decisions = {row.module: row.decision for row in sparse_compile.report().rows}
    assert decisions["blocks.0.up"] == "ste-bf16 (2:4 bf16, bf16, bf16)"
    assert decisions["blocks.0.qkv"] == decisions["head"] == "dense"
    with torch.no_grad():
        for layer in (baseline.blocks[0].up, baseline.blocks[0].down):
            layer.weight.copy_(reference.hard_threshold24(layer.weight))
    expected = baseline(*batch)
    expected.backward()
    assert math.isclose(loss.item(), expected.item(), rel_tol=1e-3)
    assert max(relative_errors(model, baseline).values()) < 2e-2


def test_an_identity_of_many_rows_runs_eagerly():
    """Inductor makes its places in uint16, which generated code alone can do."""
    layer, x = nn.Linear(64, 320), torch.randn(8, 64)
    run = torch.compile(lambda x: layer(x) @ torch.eye(320), backend="sste", options=EAGER | {"sste.recipe": "fp8"})
    assert (run(x) - layer(x)).norm() < 0.06 * layer(x).norm()


def test_without_mvue_the_weight_gradient_is_dense_fp8(ffn, x):
    """No samples: two runs are the same, and a seed is not even drawn."""
    model = ffn()
    compiled = torch.compile(model, backend="sste", options=EAGER | {"sste.recipe": "ste", "sste.mvue": "off"})
    gradients = []
    for seed in range(2):
        torch.manual_seed(seed)
        compiled(x).square().sum().backward()
        assert torch.initial_seed() == seed
        gradients.append([parameter.grad for parameter in model.parameters()])
        model.zero_grad()
    assert all(map(torch.equal, *gradients))
    (row, _) = sparse_compile.report().rows
    assert row.decision == "ste (2:4 fp8, fp8, fp8)"


def test_every_spelling_gives_the_same_gradients(monkeypatch):
    """F.linear, addmm, mm, matmul and @ are one arithmetic."""
    # The linears of one graph draw the same samples.
    monkeypatch.setattr(mvue, "group_uniforms", lambda seed, _, *arguments: group_uniforms(seed, 0, *arguments))
    weight, bias = torch.randn(128, 64) / 8, torch.randn(128)
    x = torch.randn(4, 16, 64)
    spellings = {
        "linear": lambda x, w, b: F.linear(x, w, b),
        "addmm": lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w.t()).view(4, 16, 128),
        "mm": lambda x, w, b: torch.mm(x.flatten(0, 1), w.t()).view(4, 16, 128) + b,
        "matmul": lambda x, w, b: torch.matmul(x, w.mT) + b,
        "@": lambda x, w, b: x @ w.T + b,
    }
    module = nn.Module()
    module.w = nn.ParameterDict({name: weight.clone() for name in spellings})
    module.b = nn.ParameterDict({name: bias.clone() for name in spellings})
    module.forward = lambda x: [f(x, module.w[name], module.b[name]) + x.sum() for name, f in spellings.items()]
    outputs = torch.compile(module, backend="sste", options=EAGER | {"sste.targets": "all"})(x)
    sum(y.square().sum() for y in outputs).backward()
    assert [graph.rewritten for graph in sparse_compile.report().graphs] == [len(spellings)]
    results = [
        (y.detach(), module.w[name].grad, module.b[name].grad) for name, y in zip(spellings, outputs, strict=True)
    ]
    for result in results[1:]:
        for actual, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_weights_stored_transposed(conv1d, x):
    """Conv1D and Linear of the same matrix train alike, in dense FP8 and in 2:4."""

    def model_of(layer):
        return nn.Sequential(layer(64, 64), nn.LayerNorm(64), layer(64, 128), nn.GELU(), layer(128, 64))

    model, baseline = model_of(conv1d), model_of(nn.Linear)
    with torch.no_grad():
        for parameter, other in zip(model.parameters(), baseline.parameters(), strict=True):
            other.copy_(parameter.t() if parameter.ndim == 2 else parameter)
    losses = []
    for m in (model, baseline):
        torch._dynamo.reset()
        torch.manual_seed(3)
        loss = torch.compile(m, backend="sste", options=EAGER)(x).square().mean()
        loss.backward()
        losses.append(loss.item())
        assert [row.fprop for row in sparse_compile.report().graphs[-1].rows] == ["fp8", "2:4 fp8", "2:4 fp8"]
    assert math.isclose(*losses, rel_tol=1e-6)
    for index in (0, 2, 4):
        actual, expected = model[index].weight.grad.t(), baseline[index].weight.grad
        assert (actual - expected).norm() < 5e-3 * expected.norm()


def test_checkpointing_gives_the_same_gradients(ffn, x):
    """Recomputation sees the same randomness."""
    model = ffn()
    baseline = copy.deepcopy(model)
    x.requires_grad_()
    for call in (lambda: checkpoint(model, x, use_reentrant=False), lambda: baseline(x)):
        torch._dynamo.reset()
        torch.manual_seed(3)
        torch.compile(call, backend="sste", options=EAGER)().square().mean().backward()
    assert [graph.rewritten for graph in sparse_compile.report().graphs] == [2, 2]
    assert max(relative_errors(model, baseline).values()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.nightly)], ids=str)
def test_autocast(small_gpt, batch, dtype):
    """Of a block and a head that is in FP8."""
    plain = small_gpt()
    model = copy.deepcopy(plain)
    for trained, enabled in ((plain, False), (model, True)):
        torch._dynamo.reset()
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            loss = torch.compile(trained, backend="sste", options=EAGER)(*batch)
        loss.backward()
        assert all(parameter.grad.dtype is torch.float32 for parameter in trained.parameters())
        assert sparse_compile.report().graphs[-1].rewritten == 5
    errors = relative_errors(model, plain)
    assert 0 < max(errors.values()) < 0.35
    assert errors["head.weight"] < 0.05


def test_pure_bf16(ffn, x):
    model = ffn().to(torch.bfloat16)
    names = list(model.state_dict())
    torch.compile(model, backend="sste", options=EAGER)(x.to(torch.bfloat16)).square().mean().backward()
    assert sparse_compile.report().graphs[0].rewritten == 2
    assert all(p.grad.dtype is torch.bfloat16 and bool(p.grad.isfinite().all()) for p in model.parameters())
    assert list(model.state_dict()) == names


@pytest.mark.by_day(1)
@pytest.mark.parametrize(("stored", "cast"), [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)])
def test_autocast_to_another_half_than_the_weights(ffn, x, stored, cast):
    """PyTorch concatenates no tensor of one of them under autocast to the other: what the backend does is outside."""
    model = ffn().to(stored)
    step = torch.compile(model, backend="sste", options=EAGER | {"sste.recipe": "t-sr-ste"})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    with torch.autocast("cpu", cast):
        for _ in range(2):  # the operands of the second are made again
            y = step(x)
            y.square().mean().backward()
            optimizer.step()
        with torch.no_grad():
            step(x)  # looks for edits
        assert optimizer.state_dict()["param_groups"][0]["sste"]  # masks, if the weight was not edited
    assert y.dtype is cast
    with torch.autocast("cpu", cast, enabled=False):
        plain = step(x.to(stored))
    assert (y - plain).norm() < 0.1 * plain.norm()


def test_evaluation_keeps_the_sparse_forward(ffn, x):
    model = ffn()
    compiled = torch.compile(model, backend="sste", options=EAGER)
    training = compiled(x)
    with torch.no_grad():
        no_grad = compiled(x)
    model.eval()
    with torch.inference_mode():
        inference = compiled(x)
    assert torch.equal(training, no_grad)
    assert torch.equal(training, inference)
    assert not torch.equal(training, model(x))
    assert all(graph.rewritten == 2 for graph in sparse_compile.report().graphs)


def test_randomness_follows_the_seed(ffn, x):
    model = ffn()
    compiled = torch.compile(model, backend="sste", options=EAGER)
    grads = []
    for seed in (1, 1, 2):
        model.zero_grad()
        torch.manual_seed(seed)
        compiled(x).square().mean().backward()
        grads.append(model.up.weight.grad.clone())
    assert torch.equal(grads[0], grads[1])
    assert not torch.equal(grads[0], grads[2])


def test_microbatches_share_one_prune(ffn, x):
    model = ffn()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    compiled = torch.compile(model, backend="sste", options=EAGER)
    counts = []
    for _ in range(3):
        for _ in range(4):
            compiled(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        (weight_state,) = find_record(model.up.weight).operands.values()
        counts.append(weight_state.refreshes)
    assert counts == [4, 5, 6]


@pytest.mark.nightly
@pytest.mark.parametrize("whole", [False, True], ids=["FFN", "GPT"])
def test_changing_numbers_of_tokens(ffn, small_gpt, whole):
    model = small_gpt() if whole else ffn()
    compiled = torch.compile(model, backend="sste", options=EAGER)
    for shape in [(2, 16), (3, 16), (4, 12), (5, 9)]:
        ids = torch.randint(0, 128, shape)
        loss = compiled(ids, ids) if whole else compiled(torch.randn(*shape, 64)).square().mean()
        loss.backward()
    assert len(sparse_compile.report().graphs) <= 3
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_blocks_that_share_a_graph_have_their_own_weights(ffn, x):
    """Regional compilation: one graph serves all blocks."""
    model = nn.Sequential(*(ffn() for _ in range(3)))
    whole = copy.deepcopy(model)
    for block in model:
        block.compile(backend="sste", options=EAGER)
    x.requires_grad_()  # as the outputs of the blocks before do
    regional = model(x)
    graphs = len(sparse_compile.report().graphs)
    torch._dynamo.reset()
    expected = torch.compile(whole, backend="sste", options=EAGER)(x)
    assert graphs == 1
    torch.testing.assert_close(regional, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("in_features", [66, 65])
def test_refused_shapes_give_the_dense_result(in_features):
    ffn = nn.Sequential(nn.Linear(in_features, 64), nn.ReLU(), nn.Linear(64, in_features))
    x = torch.randn(8, in_features)
    compiled = torch.compile(lambda y: ffn(y), backend="sste", options=EAGER)
    assert torch.equal(compiled(x), ffn(x))
    assert {row.reason.split(":")[0] for row in sparse_compile.report().rows} == {"shape"}


def test_shared_weight_outside_the_graph_is_refused():
    layer, embedding = nn.Linear(64, 64), nn.Embedding(64, 64)
    embedding.weight = layer.weight
    torch.compile(lambda x: x.sum() + layer(x).sum(), backend="sste", options=EAGER)(torch.randn(8, 64))
    (row,) = sparse_compile.report().rows
    assert row.decision == "dense"
    assert row.reason in (
        "weight is shared: held by Embedding.weight, Linear.weight",
        "weight is shared: held by Linear.weight, Embedding.weight",
    )


def test_empty_batch():
    ffn = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    x = torch.randn(0, 64, requires_grad=True)
    y = torch.compile(lambda v: ffn(v), backend="sste", options=EAGER)(x)
    y.sum().backward()
    assert y.shape == (0, 64)
    assert sparse_compile.report().graphs[0].rewritten == 2
    assert torch.equal(ffn[0].weight.grad, torch.zeros(128, 64))


def test_nan_weight_at_first_use_is_an_error():
    ffn = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    with torch.no_grad():
        ffn[0].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="holds NaN or infinite values at its first use"):
        torch.compile(lambda v: ffn(v), backend="sste", options=EAGER)(torch.randn(8, 64))


def test_private_names_of_pytorch_exist():
    assert self_test() == []


def test_activations_in_fp8(small_gpt, monkeypatch):
    """Linears that read one input share its cast; small memory keeps none of them, and changes no gradient."""
    graphs = []
    run_eagerly = inductor._run_eagerly

    def keep(graph_module, inputs, **kwargs):
        graphs.append(graph_module)
        return run_eagerly(graph_module, inputs, **kwargs)

    monkeypatch.setattr(inductor, "_run_eagerly", keep)
    gradients, kept, x = [], [], torch.randn(2, 32, 64)
    for memory in ("fast", "small"):
        torch.manual_seed(0)
        block = small_gpt(gated=True).blocks[0]
        compiled = torch.compile(block, backend="sste", options={**EAGER, "sste.memory": memory})
        saved = []

        def pack(tensor, saved=saved):
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = compiled(x)
        torch.manual_seed(1)
        y.square().mean().backward()
        gradients.append([parameter.grad for parameter in block.parameters()])
        kept.append(sum(tensor.dtype == torch.float8_e4m3fn for tensor in saved))
        if memory == "fast":
            assert_casts_are_shared(graphs)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    # The weights of five linears, and four inputs: two linears read one.
    assert kept == [5 + 4, 5]


def assert_casts_are_shared(graphs):
    """Of q, k and v in one, proj, gate and up, and down there are four inputs."""
    calls = Counter(node.target for graph in graphs for node in graph.graph.nodes)
    assert calls[torch.ops.sparse_compile.transpose_tokens.default] == 4
    casts = [
        node
        for graph in graphs
        for node in graph.graph.find_nodes(op="call_function", target=torch.ops.prims.convert_element_type.default)
        if node.args[1] is torch.float8_e4m3fn
    ]
    assert len(casts) == 4
    # Five linears: fprop and wgrad of three in 2:4, all others dense; grad_output is read once for both uses.
    assert calls[torch.ops.sparse_compile.sparse_mm.default] == 6
    assert calls[torch.ops.sparse_compile.cast_mvue_with_sums.default] == 3
    assert calls[torch.ops.sparse_compile.cast_transpose_with_sums.default] == 2
    # And for the gradient of the bias.
    with_sums = {torch.ops.sparse_compile.cast_mvue_with_sums, torch.ops.sparse_compile.cast_transpose_with_sums}
    for graph in graphs:
        for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.sum.dim_IntList):
            casts = [user for user in node.args[0].users if getattr(user.target, "overloadpacket", None) in with_sums]
            assert not casts, f"{node.format_node()} reads what {casts} read"
    assert calls[torch.ops.sparse_compile.scaled_mm.default] == 3 + 2 * 3
