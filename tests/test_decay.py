"""Masked decay: the op against its definition; in training once per optimizer step, however gradients come to be."""

import copy

import pytest
import torch
from torch import nn

import shared_graphs
from sparse_compile.kernels import ops, reference
from sparse_compile.kernels.weight import masked_decay
from sparse_compile.testing import assert_same_bits

clean_slate = shared_graphs.kept

DECAY = 0.25
EAGER = {"sste.executor": "eager", "sste.when": "always"}


def dropped(weight):
    """What is left of the weight ``[N, K]`` without the two largest of each four; no ties."""
    groups = weight.reshape(-1, 4)
    return groups.where(groups.abs() <= groups.abs().sort(dim=1).values[:, 1:2], 0.0).reshape(weight.shape)


def test_the_reference_is_the_definition():
    grad, weight = torch.randn(2, 48, 80)
    actual = reference.add_masked_decay(grad, weight, torch.tensor([DECAY]), reference.top2_mask(weight))
    torch.testing.assert_close(actual, grad + DECAY * dropped(weight))
    kept = dropped(weight) == 0
    assert torch.equal(actual[kept], grad[kept])


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [(3, 4), (48, 80), (3072, 768), (1600, 6400)], ids=str)
def test_kernel_matches_the_reference(size, dtype, grad_dtype, layout):
    n, k = size

    def make(dtype):
        if layout == "contiguous":
            return torch.randn(n, k, device="cuda").to(dtype)
        if layout == "transposed":
            return torch.randn(k, n, device="cuda").to(dtype).t()
        return torch.randn(2 * n, 3 * k, device="cuda").to(dtype)[::2, ::3]

    weight, factor = make(dtype), torch.tensor([DECAY], device="cuda")
    masks = reference.transposable_masks(weight) if n % 4 == 0 else None
    for given in {None, masks}:
        grad = make(grad_dtype)
        mask = reference.top2_mask(weight) if given is None else reference.dense_mask(given)
        expected = reference.add_masked_decay(grad, weight, factor, mask)
        masked_decay.launch_add_masked_decay(grad, weight, factor, given)
        assert_same_bits(grad, expected)


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    n, k = 65536 + 128, 32768
    weight, grad = (torch.zeros(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    weight[-128:] = torch.randn(128, k, device="cuda")
    factor = torch.tensor([DECAY], device="cuda")
    masked_decay.launch_add_masked_decay(grad, weight, factor)
    last = weight[-128:]
    expected = reference.add_masked_decay(torch.zeros_like(last), last, factor, reference.top2_mask(last))
    assert_same_bits(grad[-128:], expected)
    assert not grad[:-128].any()


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, torch.empty(16, 30), r"grad is torch.float32 \(16, 30\); allowed is .* K a multiple of 4"),
        (1, torch.empty(16, 32, dtype=torch.float64), "weight is torch.float64"),
        (1, torch.empty(32, 32), r"grad is \(16, 32\) on cpu; needed is \(32, 32\) on cpu"),
        (2, torch.ones(2), "factor is"),
    ],
)
def test_wrong_tensors_are_refused(position, wrong, message):
    arguments = [torch.empty(16, 32), torch.empty(16, 32), torch.ones(1)]
    arguments[position] = wrong
    with pytest.raises(ValueError, match=message):
        masked_decay.launch_add_masked_decay(*arguments)


class FFN(nn.Module):
    def __init__(self, layer=nn.Linear):
        super().__init__()
        self.up, self.down = layer(64, 128), layer(128, 64)

    def forward(self, x):
        return self.down(self.up(x).relu()).square().mean()


def compiled(model, recipe="sr-ste"):
    options = EAGER | {"sste.recipe": recipe} | ({"sste.decay": DECAY} if recipe == "sr-ste" else {})
    return torch.compile(model, backend="sste", options=options)


def backward(step, microbatches=1, scale=1.0):
    """With the same samples whatever the recipe."""
    for seed in range(microbatches):
        torch.manual_seed(seed)
        (step(torch.randn(16, 64)) * scale).backward()


OF_STE = {}  # by what they are gradients of: all tests begin with the same weights


def of_ste(model, microbatches=1):
    """The gradients with the recipe ``ste``, compiled once for the same weights."""
    key = (microbatches, type(model.up), *(parameter.detach().numpy().tobytes() for parameter in model.parameters()))
    if key not in OF_STE:
        baseline = copy.deepcopy(model)
        backward(compiled(baseline, "ste"), microbatches)
        OF_STE[key] = [parameter.grad for parameter in baseline.parameters()]
    return [grad.clone() for grad in OF_STE[key]]


def expected_weights(model, learning_rate, microbatches=1):
    """After one step of SGD with the gradients of ``ste`` and the decay, once."""
    grads = dict(zip(model.parameters(), of_ste(model, microbatches), strict=True))
    with torch.no_grad():
        for layer in (model.up, model.down):
            weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight.t()
            grads[layer.weight] += DECAY * (dropped(weight) if isinstance(layer, nn.Linear) else dropped(weight).t())
        return [p - learning_rate * grad for p, grad in grads.items()]


def assert_weights(model, expected):
    for actual, wanted in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(actual.data, wanted)


@pytest.mark.by_day(1)
@pytest.mark.parametrize(
    ("transposed", "microbatches"),
    [
        pytest.param(False, 1, id="Linear"),
        pytest.param(True, 3, id="Conv1D, accumulated"),
        pytest.param(False, 3, id="Linear, accumulated", marks=pytest.mark.nightly),
        pytest.param(True, 1, id="Conv1D", marks=pytest.mark.nightly),
    ],
)
def test_once_per_step_whatever_is_accumulated(conv1d, microbatches, transposed):
    model = FFN(conv1d) if transposed else FFN()
    expected = expected_weights(model, 0.1, microbatches)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    backward(compiled(model), microbatches)
    optimizer.step()
    assert_weights(model, expected)


def test_each_step_gets_its_own():
    model = FFN()
    step, optimizer = compiled(model), torch.optim.SGD(model.parameters(), lr=0.1)
    kept = []  # gradients that someone holds on to
    for set_to_none in (True, False, True):
        expected = expected_weights(model, 0.1)
        kept.append(model.up.weight.grad)
        optimizer.zero_grad(set_to_none=set_to_none)
        backward(step)
        optimizer.step()
        assert_weights(model, expected)


def test_clipping_comes_before():
    model = FFN()
    baseline = copy.deepcopy(model)
    for parameter, grad in zip(baseline.parameters(), of_ste(model), strict=True):
        parameter.grad = grad
    nn.utils.clip_grad_norm_(baseline.parameters(), 1e-3)
    step, optimizer = compiled(model), torch.optim.SGD(model.parameters(), lr=1.0)
    before = copy.deepcopy(model)
    backward(step)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    weight = before.up.weight.detach()
    torch.testing.assert_close(model.up.weight.data, weight - baseline.up.weight.grad - DECAY * dropped(weight))


@pytest.mark.parametrize("named", [False, True])
def test_a_closure_computes_the_gradients_first(named):
    model = FFN()
    expected = expected_weights(model, 0.1)
    step, optimizer = compiled(model), torch.optim.SGD(model.parameters(), lr=0.1)

    def closure():
        optimizer.zero_grad()
        backward(step)
        return 5.0

    step(torch.zeros(16, 64))  # the weights are known; their gradients are not
    assert (optimizer.step(closure=closure) if named else optimizer.step(closure)) == 5.0
    assert_weights(model, expected)


@pytest.mark.parametrize(
    ("fused", "unscale"),
    [
        (True, False),
        (False, True),
        pytest.param(False, False, marks=pytest.mark.nightly),
        pytest.param(True, True, marks=pytest.mark.nightly),
    ],
)
def test_gradient_scalers_do_not_change_it(fused, unscale):
    """Also where a fused optimizer unscales by itself."""
    model = FFN()
    expected = expected_weights(model, 0.1)
    step, optimizer = compiled(model), torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    backward(step, scale=scaler.scale(torch.ones(())))
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert_weights(model, expected)


def test_a_step_that_is_skipped_decays_nothing():
    model = FFN()
    before = copy.deepcopy(model)
    step, optimizer = compiled(model), torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    backward(step, scale=scaler.scale(torch.tensor(torch.inf)))
    scaler.step(optimizer)
    assert_weights(model, list(before.parameters()))


def test_a_step_within_a_step_is_one():
    class Base(torch.optim.Optimizer):
        def step(self, closure=None):
            with torch.no_grad():
                for weight in self.param_groups[0]["params"]:
                    weight -= 0.1 * weight.grad

    class Derived(Base):
        def step(self, closure=None):
            super().step()

    model = FFN()
    expected = expected_weights(model, 0.1)
    Base(FFN().parameters(), {})  # its step has hooks from now on
    optimizer = Derived(model.parameters(), {})
    backward(compiled(model))
    optimizer.step()
    assert_weights(model, expected)


def test_weights_without_gradient_and_dense_ones_are_left_alone():
    model = FFN()
    step, optimizer = compiled(model), torch.optim.SGD(model.parameters(), lr=0.1)
    step(torch.zeros(16, 64))
    before = copy.deepcopy(model)
    optimizer.step()
    assert_weights(model, list(before.parameters()))
    model = FFN()
    expected = [p - 0.1 * g for p, g in zip(model.parameters(), gradients_of(model, "ste"), strict=True)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step()
    assert_weights(model, expected)


def gradients_of(model, recipe):
    backward(compiled(model, recipe))
    return [parameter.grad for parameter in model.parameters()]


def test_the_op_runs_its_reference_off_the_gpu():
    grad, weight, factor = torch.randn(64, 48).t(), torch.randn(48, 64), torch.tensor([DECAY])
    expected = reference.add_masked_decay(grad, weight, factor, reference.top2_mask(weight))
    ops.add_masked_decay_(grad, weight, factor)
    assert torch.equal(grad, expected)
