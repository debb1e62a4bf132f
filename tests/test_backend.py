"""The backend end to end: torch.compile in, gradients out, compared with an implementation that shares no code."""

import copy
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparse_compile
from sparse_compile.kernels import reference
from sparse_compile.kernels.reference import group_uniforms, mvue
from sparse_compile.torch_internals import inductor
from sparse_compile.torch_internals.private_names import self_test
from sparse_compile.weights.registry import find_record

EAGER = {"sste.executor": "eager", "sste.when": "always"}


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
    """SmallGPT with FFN linears in S-STE and attention projections in fp8, the linears counted in execution order."""
    index = 0

    def run(layer, x, sparse):
        nonlocal index
        beta = None
        if sparse:
            w = layer.weight.detach().double()
            beta = float((w * projected(w)).sum() / projected(w).square().sum())
        result = IndependentLinear.apply(x, layer.weight, layer.bias, beta, seed, index, grad_format)
        index += 1
        return result

    x = model.embedding(ids)
    for block in model.blocks:
        batch, tokens, width = x.shape
        qkv = run(block.qkv, block.attention_norm(x), False).view(batch, tokens, 3, block.heads, -1)
        attended = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0), is_causal=True)
        x = x + run(block.proj, attended.transpose(1, 2).reshape(batch, tokens, width), False)
        x = x + run(block.down, F.gelu(run(block.up, block.ffn_norm(x), True)), True)
    logits = model.head(model.norm(x))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def relative_errors(actual, expected):
    return {
        name: float((a.grad - e.grad).norm() / e.grad.norm())
        for (name, a), e in zip(actual.named_parameters(), expected.parameters(), strict=True)
    }


@pytest.mark.parametrize("executor", ["eager", "inductor"])
@pytest.mark.parametrize("grad_format", ["e4m3", "e5m2"])
def test_gradients_equal_an_independent_implementation(small_gpt, batch, grad_format, executor, monkeypatch):
    model = small_gpt(depth=2 if executor == "eager" else 1)
    baseline = copy.deepcopy(model)
    options = {"sste.executor": executor, "sste.when": "always", "sste.grad_format": grad_format}
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


@pytest.mark.parametrize("executor", ["eager", "inductor"])
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


def test_without_mvue_the_weight_gradient_is_dense_fp8(small_gpt, batch):
    """No samples: two runs are the same, and a seed is not even drawn."""
    gradients = []
    for seed in range(2):
        torch.manual_seed(0)
        model = small_gpt(depth=1)
        torch.manual_seed(seed)
        options = EAGER | {"sste.recipe": "ste", "sste.mvue": "off"}
        torch.compile(model, backend="sste", options=options)(*batch).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(map(torch.equal, *gradients))
    rows = {row.module: row for row in sparse_compile.report().rows}
    assert rows["blocks.0.up"].decision == "ste (2:4 fp8, fp8, fp8)"


def test_every_spelling_gives_the_same_gradients(batch):
    """F.linear, addmm, mm, matmul and @ are one arithmetic."""
    weight, bias = torch.randn(128, 64) / 8, torch.randn(128)
    x = torch.randn(4, 16, 64)
    spellings = {
        "linear": lambda x, w, b: F.linear(x, w, b),
        "addmm": lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w.t()).view(4, 16, 128),
        "mm": lambda x, w, b: torch.mm(x.flatten(0, 1), w.t()).view(4, 16, 128) + b,
        "matmul": lambda x, w, b: torch.matmul(x, w.mT) + b,
        "@": lambda x, w, b: x @ w.T + b,
    }
    results = []
    for spelling in spellings.values():
        torch._dynamo.reset()
        module = nn.Module()
        module.w, module.b = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
        module.forward = lambda x, m=module, f=spelling: f(x, m.w, m.b) + x.sum()
        compiled = torch.compile(module, backend="sste", options=EAGER | {"sste.targets": "all"})
        torch.manual_seed(3)
        y = compiled(x)
        y.square().sum().backward()
        results.append((y.detach(), module.w.grad, module.b.grad))
    assert sum(graph.rewritten for graph in sparse_compile.report().graphs) == len(spellings)
    for result in results[1:]:
        for actual, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_weights_stored_transposed(small_gpt, conv1d, batch):
    """Conv1D and Linear of the same matrix train alike."""
    model, baseline = small_gpt(conv1d), small_gpt()
    with torch.no_grad():
        for (name, parameter), other in zip(model.named_parameters(), baseline.parameters(), strict=True):
            matrix = parameter.ndim == 2 and "embedding" not in name and "head" not in name
            other.copy_(parameter.t() if matrix else parameter)
    losses = []
    for m in (model, baseline):
        torch._dynamo.reset()
        torch.manual_seed(3)
        loss = torch.compile(m, backend="sste", options=EAGER)(*batch)
        loss.backward()
        losses.append(loss.item())
    assert math.isclose(*losses, rel_tol=1e-6)
    actual, expected = model.blocks[0].up.weight.grad.t(), baseline.blocks[0].up.weight.grad
    assert (actual - expected).norm() < 5e-3 * expected.norm()


def test_checkpointing_gives_the_same_gradients(small_gpt, batch):
    """Recomputation sees the same randomness."""
    model = small_gpt(checkpoint=True)
    baseline = copy.deepcopy(model)
    baseline.checkpoint = False
    for m in (model, baseline):
        torch._dynamo.reset()
        torch.manual_seed(3)
        torch.compile(m, backend="sste", options=EAGER)(*batch).backward()
    assert [graph.rewritten for graph in sparse_compile.report().graphs] == [8, 8]
    assert max(relative_errors(model, baseline).values()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(small_gpt, batch, dtype):
    model = small_gpt()
    baseline = copy.deepcopy(model)
    compiled = torch.compile(model, backend="sste", options=EAGER)
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype=dtype):
        loss = compiled(*batch)
    loss.backward()
    torch.manual_seed(3)
    torch._dynamo.reset()
    torch.compile(baseline, backend="sste", options=EAGER)(*batch).backward()
    assert all(parameter.grad.dtype is torch.float32 for parameter in model.parameters())
    assert sparse_compile.report().graphs[0].rewritten == 8
    errors = relative_errors(model, baseline)
    assert max(errors.values()) < 0.35
    assert errors["head.weight"] < 0.05


def test_pure_bf16(small_gpt, batch):
    model = small_gpt().to(torch.bfloat16)
    torch.compile(model, backend="sste", options=EAGER)(*batch).backward()
    assert sparse_compile.report().graphs[0].rewritten == 8
    assert all(p.grad.dtype is torch.bfloat16 and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_evaluation_keeps_the_sparse_forward(small_gpt, batch):
    model = small_gpt()
    compiled = torch.compile(model, backend="sste", options=EAGER)
    training = compiled(*batch)
    with torch.no_grad():
        no_grad = compiled(*batch)
    model.eval()
    with torch.inference_mode():
        inference = compiled(*batch)
    assert training.item() == no_grad.item() == inference.item() != model(*batch).item()
    assert all(graph.rewritten == 8 for graph in sparse_compile.report().graphs)


def test_randomness_follows_the_seed(small_gpt, batch):
    model = small_gpt()
    compiled = torch.compile(model, backend="sste", options=EAGER)
    grads = []
    for seed in (1, 1, 2):
        model.zero_grad()
        torch.manual_seed(seed)
        compiled(*batch).backward()
        grads.append(model.blocks[0].up.weight.grad.clone())
    assert torch.equal(grads[0], grads[1])
    assert not torch.equal(grads[0], grads[2])


def test_microbatches_share_one_prune(small_gpt, batch):
    model = small_gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    compiled = torch.compile(model, backend="sste", options=EAGER)
    (weight,) = [p for n, p in model.named_parameters() if n == "blocks.0.up.weight"]
    counts = []
    for _ in range(3):
        for _ in range(4):
            compiled(*batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        (weight_state,) = find_record(weight).operands.values()
        counts.append(weight_state.refreshes)
    assert counts == [4, 5, 6]


def test_changing_numbers_of_tokens(small_gpt):
    model = small_gpt()
    compiled = torch.compile(model, backend="sste", options=EAGER)
    for shape in [(2, 16), (3, 16), (4, 12), (5, 9)]:
        ids = torch.randint(0, 128, shape)
        compiled(ids, ids).backward()
    assert len(sparse_compile.report().graphs) <= 3
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_blocks_that_share_a_graph_have_their_own_weights(small_gpt, batch):
    """Regional compilation: one graph serves all blocks."""
    model = small_gpt(depth=3)
    whole = copy.deepcopy(model)
    for block in model.blocks:
        block.compile(backend="sste", options=EAGER)
    regional = model(*batch)
    graphs = len(sparse_compile.report().graphs)
    torch._dynamo.reset()
    expected = torch.compile(whole, backend="sste", options=EAGER)(*batch)
    assert graphs == 1
    assert math.isclose(regional.item(), expected.item(), rel_tol=1e-6)


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


def test_state_dict_is_unchanged(small_gpt, batch):
    model = small_gpt()
    names = list(model.state_dict())
    torch.compile(model, backend="sste", options=EAGER)(*batch).backward()
    assert list(model.state_dict()) == names


def test_private_names_of_pytorch_exist():
    assert self_test() == []


def test_small_memory_keeps_no_fp8_activations_and_changes_no_gradient(small_gpt, batch):
    gradients, kept = [], []
    for memory in ("fast", "small"):
        torch.manual_seed(0)
        model = small_gpt(gated=True)
        compiled = torch.compile(model, backend="sste", options={**EAGER, "sste.memory": memory})
        saved = []

        def pack(tensor, saved=saved):
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = compiled(*batch)
        torch.manual_seed(1)
        loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        kept.append(sum(tensor.dtype == torch.float8_e4m3fn for tensor in saved))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    # The weights of ten linears, and four inputs of each block: two linears read one.
    assert kept == [10 + 8, 10]


def test_linears_that_read_one_input_share_its_cast(small_gpt, batch, monkeypatch):
    """Of q, k and v in one, proj, gate and up, and down there are four inputs a block."""
    graphs = []
    run_eagerly = inductor._run_eagerly

    def keep(graph_module, inputs, **kwargs):
        graphs.append(graph_module)
        return run_eagerly(graph_module, inputs, **kwargs)

    monkeypatch.setattr(inductor, "_run_eagerly", keep)
    torch.compile(small_gpt(gated=True), backend="sste", options=EAGER)(*batch).backward()
    calls = Counter(node.target for graph in graphs for node in graph.graph.nodes)
    assert calls[torch.ops.sparse_compile.transpose_tokens.default] == 2 * 4
    casts = [
        node
        for graph in graphs
        for node in graph.graph.find_nodes(op="call_function", target=torch.ops.prims.convert_element_type.default)
        if node.args[1] is torch.float8_e4m3fn
    ]
    assert len(casts) == 2 * 4
    # Five linears a block: fprop and wgrad of three in 2:4, all others dense; grad_output is read once for both uses.
    assert calls[torch.ops.sparse_compile.sparse_mm.default] == 2 * 6
    assert calls[torch.ops.sparse_compile.cast_mvue.default] == 2 * 3
    assert calls[torch.ops.sparse_compile.cast_transpose.default] == 2 * 2
    assert calls[torch.ops.sparse_compile.scaled_mm.default] == 2 * (3 + 2 * 3)
