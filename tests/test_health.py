"""Health: flips, zeros, underflow and saturation against dense masks; samples at steps; listeners."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import sparse_compile
from sparse_compile.kernels import ops, reference
from sparse_compile.measuring import weight_health as health
from sparse_compile.measuring.gradient_noise import GradNoise, noise_and_underflow
from sparse_compile.options import read_options
from sparse_compile.projections.groups_of_four import SOFT
from sparse_compile.projections.groups_of_four_bf16 import TOP2_BF16
from sparse_compile.projections.transposable import TRANSPOSABLE
from sparse_compile.recipe import SSTE, Gemm
from sparse_compile.reporting.health import Health
from sparse_compile.reporting.process_report import record_health

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
EAGER = {"sste.executor": "eager", "sste.when": "always"}


pytestmark = pytest.mark.usefixtures("nothing_watched")


def pruned(weight):
    operands = SOFT.new_operands(*weight.shape, weight.device)
    SOFT.fill(weight, operands, None, None, False)
    return operands


def kept(weight):
    """Dense mask of the two largest of each group: of a weight without ties the elements that pruning keeps."""
    magnitude = weight.reshape(-1, 4).abs()
    return (magnitude > magnitude.sort(dim=1).values[:, 1:2]).reshape(weight.shape)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(64, 64), (80, 208)])
def test_flips_equal_those_of_dense_masks(device, shape):
    before, noise = torch.randn(2, *shape, device=device)
    after = before + 0.3 * noise
    expected = int((kept(before) != kept(after)).sum())
    assert expected > 0
    assert int(health.mask_flips(pruned(before)[1], pruned(after)[1])) == expected
    assert int(health.mask_flips(pruned(before)[1], pruned(before)[1])) == 0


@pytest.mark.parametrize("device", DEVICES)
def test_bf16_operands_are_sampled_alike(device):
    before, noise = torch.randn(2, 80, 208, device=device)
    before[:, :4] = 0.0
    after = before + 0.3 * noise
    samples = []
    for weight in (before, after):
        operands = TOP2_BF16.new_operands(*weight.shape, weight.device)
        TOP2_BF16.fill(weight, operands, None, None, False)
        samples.append(operands[:2])
    # Two of four zeros are kept in each row, and the padding.
    scale = torch.ones(1)
    assert health._counts(*samples[0], scale, None).tolist() == [-1, 80 * (2 + (256 - 208) // 2), 0, 0]
    flips = int((reference.top2_mask(before) != reference.top2_mask(after)).sum())
    assert health._counts(*samples[1], scale, samples[0][1]).tolist()[0] == flips


def ffn(features=80):
    return nn.Sequential(nn.Linear(features, 160), nn.ReLU(), nn.Linear(160, 64))


@pytest.mark.parametrize("device", DEVICES)
def test_samples_equal_the_pruned_weight(device):
    model = ffn().to(device)
    with torch.no_grad():
        model[0].weight[:, :8] *= 1e7  # the others underflow
    compiled = torch.compile(model.forward, backend="sste", options=EAGER)
    compiled(torch.randn(8, 80, device=device))
    first = sparse_compile.health()
    assert [name.split(".")[-1] for name in first] == ["0", "2"]
    assert {sample.flips for sample in first.values()} == {None}
    weights = [model[0].weight.detach().clone(), model[2].weight.detach().clone()]
    payloads = [reference.prune_weight(weight.cpu(), torch.ones(1))[2].t().float() for weight in weights]
    for sample, payload, weight in zip(first.values(), payloads, weights, strict=True):
        zeros = (payload == 0).sum() / payload.numel()
        assert sample.zeros == pytest.approx(float(zeros))
        lost = (payload == 0) & kept(weight.cpu())
        assert sample.underflow == pytest.approx(float(lost.sum()) / (payload.numel() / 2))
        assert sample.saturated == pytest.approx(float((payload.abs() == 448).sum()) / (payload.numel() / 2))
    assert next(iter(first.values())).underflow > 0.5
    with torch.no_grad():
        model[2].weight.copy_(torch.randn_like(model[2].weight))
    compiled(torch.randn(8, 80, device=device))
    second = list(sparse_compile.health().values())
    flipped = (kept(weights[1]) != kept(model[2].weight.detach())).float().mean()
    assert [sample.flips for sample in second] == [0.0, pytest.approx(float(flipped))]


def test_samples_at_steps_go_to_listeners_and_the_report():
    written = []
    model = ffn(64)
    sparse_compile.on_health(lambda *scalar: written.append(scalar))
    compiled = torch.compile(model.forward, backend="sste", options=EAGER | {"sste.health": 2})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(6):
        compiled(torch.randn(8, 64)).square().sum().backward()
        optimizer.step()
    histories = list(sparse_compile.report().health.values())
    assert [len(history) for history in histories] == [3, 3]
    steps = [sample.step for sample in histories[0]]
    assert [step - steps[0] for step in steps] == [0, 2, 4]
    assert histories[0][0].flips is None
    assert histories[0][1].flips > 0
    names = list(sparse_compile.report().health)
    assert (f"sste/flips/{names[0]}", histories[0][2].flips, steps[2]) in written
    assert (f"sste/zeros/{names[1]}", histories[1][0].zeros, steps[0]) in written
    assert (f"sste/noise/{names[1]}", histories[1][0].noise, steps[0]) in written
    # Of each weight; flips but for the first sample; and two numbers of gradients, where there is a dgrad.
    assert len(written) == 2 * (3 * 4 - 1) + 3 * 2


def test_noise_where_dgrad_is_24():
    """It tells the weight as one in FP8 does, and is not taken for a product that makes a weight's gradient."""
    tokens, out_features, in_features = 32, 48, 80
    weight, grad = torch.randn(out_features, in_features), torch.randn(tokens, out_features)
    operands = TRANSPOSABLE.new_operands(out_features, in_features, weight.device)
    TRANSPOSABLE.fill(weight, operands, None, TRANSPOSABLE.new_masks(out_features, in_features, weight.device), True)
    values_t, metadata_t, weight_scale_inv = TRANSPOSABLE.kept_for_dgrad(operands)
    scale, seed, x_t = torch.ones(tokens), torch.zeros(1, dtype=torch.int64), torch.randn(in_features, 128)
    noise = GradNoise()
    noise.watch(True)
    payload, *operand = ops.cast_mvue(grad, scale, scale, seed, 0, False, False, torch.float8_e4m3fn)
    ops.sparse_mm(values_t, metadata_t, payload, weight_scale_inv, scale, torch.float32, True, True)
    ops.sparse_mm(*operand, x_t.to(torch.float8_e4m3fn), torch.ones(1), None, torch.float32, False, False)
    noise.watch(False)
    assert list(noise.take()) == [values_t.data_ptr()]


@pytest.mark.nightly
def test_noise_where_dgrad_is_sampled():
    """Its product is told from wgrad's: the noise is that of the weight's gradient, as with a dense dgrad."""
    noises = []
    for options in ({}, {"sste.recipe": replace(SSTE, dgrad=Gemm.MVUE24)}):
        health.monitor.noise.take()
        torch.compiler.reset()
        torch.manual_seed(0)
        model = ffn(64)
        compiled = torch.compile(model.forward, backend="sste", options=EAGER | {"sste.health": 1} | options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        x = torch.randn(200, 64, requires_grad=True)
        torch.manual_seed(1)
        for _ in range(3):
            compiled(x).square().sum().backward()
            optimizer.step()
        (first, second) = sparse_compile.report().health.values()
        noises.append([(sample.noise, sample.grad_underflow) for sample in (*first, *second)][-6:])
        assert health.monitor.noise._payloads == health.monitor.noise._values == {}
    dense, sampled = noises
    assert all(noise is not None and 0.05 < noise < 1.0 for noise, _ in dense + sampled)
    # The last linear has the same gradient either way; the first one's comes from a sampled dgrad.
    assert sampled[3:] == dense[3:]
    assert sampled[:3] != dense[:3]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("transposed", [False, True])
def test_noise_is_the_error_of_the_weights_gradient(device, transposed):
    """All elements of a small gradient; the same products as in a backward, beside an exact one."""
    tokens, out_features, in_features = 200, 144, 80
    generator = torch.Generator().manual_seed(0)
    grad, x = (torch.randn(tokens, n, generator=generator) for n in (out_features, in_features))
    grad[0, 1:] *= 1e-6  # beside the largest of their token FP8 makes these zero
    grad, x = grad.to(device), x.to(device, torch.float8_e4m3fn)
    scale, token_scale = 448 / grad.abs().amax(dim=1), torch.rand(tokens, device=device)
    weight_t = torch.randn(in_features, out_features, device=device).to(torch.float8_e4m3fn)
    unit, scale_inv = torch.ones(1, device=device), torch.full((1,), 0.5, device=device)
    noise = GradNoise()
    noise.watch(True)
    for seed in range(2):
        seed = torch.tensor([seed], device=device)
        payload, *operand = ops.cast_mvue(grad, scale, token_scale, seed, 0, False, False, torch.float8_e4m3fn)
        ops.scaled_mm(x, weight_t.t().contiguous(), unit, torch.float32, True)  # of another linear
        ops.scaled_mm(payload, weight_t, unit, torch.float32, True)
        x_t = ops.transpose_tokens(x)
        product = ops.sparse_mm(*operand, x_t, scale_inv, None, torch.float32, transposed, False)
    noise.watch(False)
    ((address, sums),) = noise.take().items()
    assert noise.take() == {}
    assert address == weight_t.data_ptr()
    exact = 0.5 * (grad * token_scale[:, None]).t() @ x.float()
    error = (product.t() if transposed else product) - exact
    assert float(sums[1]) == pytest.approx(2 * float(exact.square().sum()), rel=1e-3)
    relative, underflow = noise_and_underflow(sums.tolist())
    assert relative == pytest.approx(float(error.norm() / exact.norm()), rel=0.1)  # the mean of two draws
    # Of the first token nearly all, unless they are large by chance.
    assert underflow == pytest.approx(float((payload[0].float() == 0).sum()) / grad.numel(), rel=1e-3)
    assert underflow > 0.9 / tokens


@pytest.mark.parametrize(
    ("sums", "expected"),
    [
        ([4, 16, 8, 2], (0.5, 0.25)),
        ([0, 0, 0, 0], (None, None)),
        ([float("nan"), 1, 1, 0], (None, 0.0)),
    ],
)
def test_nothing_to_compare_with(sums, expected):
    assert noise_and_underflow(sums) == expected


@pytest.mark.nightly
def test_where_cuda_graphs_run_gradients_are_left_alone():
    torch.compile(ffn(64).forward, backend="sste", options=EAGER | {"sste.health": 1})(torch.randn(8, 64))
    assert ops._observer is not None
    options = EAGER | {"triton.cudagraphs": True}
    torch.compile(ffn(64).forward, backend="sste", options=options)(torch.randn(8, 64))
    assert ops._observer is None
    sparse_compile.health()
    assert ops._observer is None


@pytest.mark.gpu
def test_health_of_a_model_in_cuda_graphs():
    model = ffn(64).cuda()
    options = {"sste.health": 1, "sste.when": "always", "triton.cudagraphs": True}
    compiled = torch.compile(model.forward, backend="sste", options=options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        compiled(torch.randn(128, 64, device="cuda")).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    (first, *_), _ = sparse_compile.report().health.values()
    assert (first.noise, first.grad_underflow) == (None, None)
    assert all(len(samples) == 5 for samples in sparse_compile.report().health.values())


def noisy(samples):
    """By the last part of the weights' names, whether there is a noise."""
    return {name.split(".")[-1]: sample.noise is not None for name, sample in samples.items()}


@pytest.mark.nightly
def test_gradients_are_watched_in_the_step_after_a_sample_that_was_asked_for():
    others = [torch.optim.SGD(nn.Linear(4, 4).parameters()) for _ in range(3)]  # stepped, and not waited for
    for optimizer in others:
        optimizer.step()
    model = nn.Sequential(nn.Linear(64, 64), *ffn(64))
    compiled = torch.compile(model.forward, backend="sste", options=EAGER)
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (model[0], model[1], model[3])]

    def step():
        compiled(torch.randn(8, 64)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()

    step()
    assert not any(noisy(sparse_compile.health()).values())
    assert ops._observer is not None
    step()
    assert noisy(sparse_compile.health()) == {"1": True, "3": True}
    step()
    assert ops._observer is None


def test_a_weight_that_never_steps_is_not_waited_for():
    model = ffn(64)
    compiled = torch.compile(model.forward, backend="sste", options=EAGER)
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    compiled(torch.randn(8, 64)).square().sum().backward()
    sparse_compile.health()
    watched = []
    for _ in range(2):
        compiled(torch.randn(8, 64)).square().sum().backward()
        optimizer.step()
        watched.append(ops._observer is not None)
    assert watched == [True, False]


@pytest.mark.parametrize("device", DEVICES)
def test_samples_do_not_disturb_training(device):
    weights = []
    for every in (0, 1):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = ffn(64).to(device)
        compiled = torch.compile(model.forward, backend="sste", options=EAGER | {"sste.health": every})
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for _ in range(3):
            compiled(torch.randn(16, 64, device=device)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append([*model.parameters(), torch.rand(4, device=device)])
    assert any(history[-1].noise for history in sparse_compile.report().health.values())
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_weights_of_one_name_are_told_apart():
    first, second = ffn(64), ffn(64)

    def function(model, x):
        return model(x)

    compiled = torch.compile(function, backend="sste", options=EAGER)
    for model in (first, second):
        compiled(model, torch.randn(8, 64))
    names = list(sparse_compile.health())
    assert len(set(names)) == 4


@pytest.mark.gpu
def test_a_weight_that_moves_keeps_its_name():
    model = ffn(64)
    compiled = torch.compile(model.forward, backend="sste", options=EAGER)
    names = []
    for device in ("cpu", "cuda", "cpu"):
        model.to(device)
        compiled(torch.randn(8, 64, device=device))
        samples = sparse_compile.health()
        names.append(list(samples))
    assert names[0] == names[1] == names[2]
    # What was kept on another device is given back, so flips are counted anew.
    assert {sample.flips for sample in samples.values()} == {None}


def test_many_samples_are_thinned():
    for step in range(2000):
        record_health("up", Health(step=step, flips=None, zeros=0.5, underflow=0.0, saturated=0.0))
    steps = [sample.step for sample in sparse_compile.report().health["up"]]
    assert steps[0] == 0
    assert steps[-1] == 1999
    assert steps == sorted(steps)
    assert 256 <= len(steps) <= 512


@pytest.mark.parametrize("value", [-1, 2.5, True, "often"])
def test_wrong_option(value):
    with pytest.raises(ValueError, match=r"'sste.health' is .*; allowed is a number of optimizer steps"):
        read_options(None, {"sste.health": value})
