"""Transposable masks: the search against all 90 masks, the kernel against its definition, and training with them."""

import copy
import itertools

import pytest
import torch
from torch import nn

import shared_graphs
import sparse_compile
from gpu_weights import in_layout, poisoned, special
from sparse_compile.kernels import reference
from sparse_compile.kernels.formats import E4M3, metadata_shape, values_shape
from sparse_compile.kernels.reference.transposable import (
    PAIRS,
    dense_mask,
    prune_transposable,
    transposable_masks,
    ways,
)
from sparse_compile.kernels.weight import prune_fp8
from sparse_compile.testing import assert_same_bits
from sparse_compile.weights.registry import find_record

clean_slate = shared_graphs.kept

EAGER = {"sste.executor": "eager", "sste.when": "always", "sste.recipe": "t-sr-ste"}


def all_masks():
    """``[90, 4, 4]``, by trying every choice of two columns for each row."""
    rows = [[float(column in pair) for column in range(4)] for pair in PAIRS]
    masks = torch.tensor(list(itertools.product(rows, repeat=4)), dtype=torch.float64)
    return masks[(masks.sum(1) == 2).all(-1)]


def test_the_ways_are_the_90_masks():
    found = set()
    for upper, lower in ways():
        for pairs in itertools.product(upper, lower):
            found.add(tuple(pairs[0] + pairs[1]))
    expected = {
        tuple(PAIRS.index(tuple(row.nonzero().flatten().tolist())) for row in mask) for mask in all_masks().bool()
    }
    assert len(ways()) == 19
    assert found == expected
    assert len(expected) == 90


@pytest.mark.parametrize("draw", ["normal", "ties", "uniform"])
def test_the_best_of_all_masks_is_found(draw):
    if draw == "ties":
        weight = torch.randint(-3, 4, (64, 128)).double()
    else:
        weight = torch.randn(64, 128).double() if draw == "normal" else torch.rand(64, 128).double()
    mask = dense_mask(transposable_masks(weight))
    tiles = weight.abs().reshape(16, 4, 32, 4).transpose(1, 2)
    best = torch.einsum("abij,mij->abm", tiles, all_masks()).amax(-1)
    kept = (weight.abs() * mask).reshape(16, 4, 32, 4).transpose(1, 2).sum((-1, -2))
    torch.testing.assert_close(kept, best, rtol=1e-14, atol=0)
    assert (mask.reshape(64, 32, 4).sum(-1) == 2).all()
    assert (mask.t().reshape(128, 16, 4).sum(-1) == 2).all()


@pytest.mark.parametrize("size", [(16, 16), (48, 80)], ids=str)
def test_both_operands_are_the_masked_weight(size):
    weight = torch.randn(size)
    masks = transposable_masks(weight)
    values, metadata, values_t, metadata_t, scale_inv = prune_transposable(weight, masks)
    dense = reference.decompress24(values, metadata)[:, : size[1]].float()
    assert torch.equal(dense, reference.decompress24(values_t, metadata_t)[:, : size[0]].float().t())
    exact = weight * dense_mask(masks)
    assert ((dense * scale_inv - exact).abs() <= 2**-4 * exact.abs() + 2**-10 * scale_inv).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_element_shows_also_where_it_is_dropped(value):
    weight = torch.randn(16, 16)
    weight[3, 5] = value
    masks = transposable_masks(weight)
    assert prune_transposable(weight, masks)[-1].isnan()
    assert prune_transposable(weight, ~masks)[-1].isnan()


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [(16, 16), (48, 80), (3072, 768), (768, 3072), (1600, 6400)], ids=str)
def test_kernel_matches_the_reference(size, dtype, layout):
    n, k = size
    weight = in_layout(layout, n, k, dtype)
    best = transposable_masks(weight)
    other = transposable_masks(torch.randn(n, k, device="cuda"))
    buffers = poisoned(n, k)
    for search, wanted in ((True, best), (False, other), (False, best)):
        masks = torch.zeros_like(best) if search else wanted.clone()
        prune_fp8.launch_prune_transposable(weight, *buffers, masks, search)
        assert torch.equal(masks, wanted)
        for actual, expected in zip(buffers, prune_transposable(weight, wanted), strict=True):
            assert_same_bits(actual, expected, f"search {search}")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["ties", "zero", "NaN", "tiny", "huge"])
def test_kernel_matches_the_reference_on_special_values(kind):
    weight = special(kind)
    buffers, masks = poisoned(80, 144), transposable_masks(torch.zeros_like(weight))
    prune_fp8.launch_prune_transposable(weight, *buffers, masks, True)
    wanted = transposable_masks(weight)
    assert torch.equal(masks, wanted)
    for actual, expected in zip(buffers, prune_transposable(weight, wanted), strict=True):
        assert_same_bits(actual, expected)


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    n, k = 65536 + 128, 32768
    weight = torch.zeros(n, k, device="cuda", dtype=torch.bfloat16)
    weight[-128:] = torch.randn(128, k, device="cuda")
    buffers, masks = poisoned(n, k), torch.zeros(n // 4, k // 4, dtype=torch.int16, device="cuda")
    prune_fp8.launch_prune_transposable(weight, *buffers, masks, True)
    last = transposable_masks(weight[-128:])
    assert torch.equal(masks[-32:], last)
    expected = prune_transposable(weight[-128:], last)
    assert_same_bits(buffers[0][-128:], expected[0])
    assert_same_bits(buffers[1][:, -8:], expected[1])
    assert_same_bits(buffers[2][:, -64:], expected[2])
    assert_same_bits(buffers[3][-1:], expected[3])


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, torch.empty(16, 36), r"\(16, 36\); needed are multiples of 16"),
        (3, torch.empty(16, 64, dtype=E4M3), r"values_t is .* needed is torch.float8_e4m3fn \(32, 64\)"),
        (6, torch.empty(16, 32, dtype=torch.int16), r"masks is .* needed is torch.int16 \(4, 8\)"),
    ],
)
def test_wrong_tensors_are_refused(position, wrong, message):
    arguments = [
        torch.empty(16, 32),
        torch.empty(values_shape(16, 32), dtype=E4M3), torch.empty(metadata_shape(16, 32), dtype=torch.int32),
        torch.empty(values_shape(32, 16), dtype=E4M3), torch.empty(metadata_shape(32, 16), dtype=torch.int32),
        torch.empty(1), torch.empty(4, 8, dtype=torch.int16), True,
    ]  # fmt: skip
    arguments[position] = wrong
    with pytest.raises(ValueError, match=message):
        prune_fp8.launch_prune_transposable(*arguments)


class FFN(nn.Module):
    def __init__(self, layer=nn.Linear):
        super().__init__()
        self.up, self.down = layer(64, 128), layer(128, 64)

    def forward(self, x):
        return self.down(self.up(x).relu())


def compiled(model, **options):
    return torch.compile(model, backend="sste", options=EAGER | {f"sste.{name}": v for name, v in options.items()})


def state_of(weight):
    (kept,) = find_record(weight).operands.values()
    return kept


def step_once(step, optimizer):
    step(torch.randn(16, 64)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("microbatches", [1, 2])
def test_masks_are_found_anew_after_so_many_optimizer_steps(microbatches):
    model = FFN()
    step, optimizer = compiled(model, refresh=3), torch.optim.SGD(model.parameters(), lr=0.5)
    fresh = []
    for _ in range(8):
        weight = model.up.weight.detach().clone()
        for _ in range(microbatches):
            step(torch.randn(16, 64)).square().mean().backward()
        fresh.append(torch.equal(state_of(model.up.weight).masks, transposable_masks(weight)))
        # Whatever the masks, the operands are those of the weight as it is.
        expected = prune_transposable(weight, state_of(model.up.weight).masks)
        for actual, wanted in zip(state_of(model.up.weight).operands, expected, strict=True):
            assert_same_bits(actual, wanted)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    assert fresh == [True, False, False, True, False, False, True, False]


def test_an_edited_weight_gets_masks_of_its_own():
    model = FFN()
    step, optimizer = compiled(model, refresh=100), torch.optim.SGD(model.parameters(), lr=0.1)
    step_once(step, optimizer)
    step(torch.randn(16, 64))
    model.load_state_dict(FFN().state_dict())
    step(torch.randn(16, 64))
    assert torch.equal(state_of(model.up.weight).masks, transposable_masks(model.up.weight.detach()))
    step_once(step, optimizer)
    model.up.weight.data = torch.randn(128, 64)  # which no version shows
    step(torch.randn(16, 64))
    assert torch.equal(state_of(model.up.weight).masks, transposable_masks(model.up.weight.detach()))


def test_an_evaluation_of_a_resumed_run_leaves_the_masks():
    """Before its optimizer has stepped in this process, when a weight is pruned at every call."""
    model = FFN()
    step, optimizer = compiled(model, refresh=100), torch.optim.SGD(model.parameters(), lr=0.5)
    step_once(step, optimizer)
    step_once(step, optimizer)
    masks = state_of(model.up.weight).masks.clone()
    resumed = FFN()
    again, its_optimizer = compiled(resumed, refresh=100), torch.optim.SGD(resumed.parameters(), lr=0.5)
    resumed.load_state_dict(model.state_dict())
    its_optimizer.load_state_dict(optimizer.state_dict())
    assert not torch.equal(masks, transposable_masks(model.up.weight.detach())), "they are those of the first step"
    for _ in range(2):
        with torch.no_grad():
            again(torch.randn(16, 64))
        step_once(again, its_optimizer)
        assert torch.equal(state_of(resumed.up.weight).masks, masks)


def test_another_optimizer_goes_on_with_the_masks():
    model = FFN()
    step, optimizer = compiled(model, refresh=100), torch.optim.SGD(model.parameters(), lr=0.5)
    step_once(step, optimizer)
    masks = state_of(model.up.weight).masks.clone()
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        step_once(step, optimizer)
        assert torch.equal(state_of(model.up.weight).masks, masks)


def test_masks_that_were_loaded_are_saved_again():
    """Before any call has used them, in a model that had others."""
    model = FFN()
    step, optimizer = compiled(model, refresh=100), torch.optim.SGD(model.parameters(), lr=0.5)
    step_once(step, optimizer)
    weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    model.load_state_dict(FFN().state_dict())
    step_once(step, optimizer)
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    again = optimizer.state_dict()["param_groups"][0]["sste"]
    for place, kept in state["param_groups"][0]["sste"].items():
        assert torch.equal(again[place]["masks"], kept["masks"])


def test_masks_survive_a_run_that_only_evaluates():
    """Whose checkpoint holds those that it has loaded: no call of it has recorded gradients."""
    model = FFN()
    step, optimizer = compiled(model, refresh=100), torch.optim.SGD(model.parameters(), lr=0.5)
    step_once(step, optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    resumed = FFN()
    again, its_optimizer = compiled(resumed, refresh=100), torch.optim.SGD(resumed.parameters(), lr=0.5)
    resumed.load_state_dict(model.state_dict())
    its_optimizer.load_state_dict(state)
    with torch.no_grad():
        again(torch.randn(16, 64))
    saved = its_optimizer.state_dict()["param_groups"][0]["sste"]
    assert len(saved) == 2
    for place, kept in state["param_groups"][0]["sste"].items():
        assert torch.equal(saved[place]["masks"], kept["masks"])
        assert saved[place]["mask_steps"] == kept["mask_steps"]


@pytest.mark.parametrize("how", ["loaded", "invalidated"])
def test_masks_of_other_weights_are_not_saved(how):
    """Weights that were changed, and that no call has pruned since."""
    model = FFN()
    step, optimizer = compiled(model, refresh=100), torch.optim.SGD(model.parameters(), lr=0.5)
    step_once(step, optimizer)
    if how == "loaded":
        model.load_state_dict(FFN().state_dict())
    else:
        model.up.weight.data.copy_(torch.randn(model.up.weight.shape))  # which no version shows
        sparse_compile.invalidate(model)
    resumed = FFN()
    again, its_optimizer = compiled(resumed, refresh=100), torch.optim.SGD(resumed.parameters(), lr=0.5)
    resumed.load_state_dict(model.state_dict())
    its_optimizer.load_state_dict(optimizer.state_dict())
    again(torch.randn(16, 64))
    assert torch.equal(state_of(resumed.up.weight).masks, transposable_masks(resumed.up.weight.detach()))


def test_an_invalidated_weight_gets_masks_of_its_own():
    """After an optimizer step, with which masks alone would be kept."""
    model = FFN()
    step, optimizer = compiled(model, refresh=100), torch.optim.SGD(model.parameters(), lr=0.1)
    step_once(step, optimizer)
    model.up.weight.data.copy_(torch.randn(model.up.weight.shape))
    sparse_compile.invalidate(model)
    step(torch.randn(16, 64))
    assert torch.equal(state_of(model.up.weight).masks, transposable_masks(model.up.weight.detach()))


@pytest.mark.parametrize("transposed", [False, True], ids=["Linear", "Conv1D"])
def test_what_the_masks_drop_decays(conv1d, transposed):
    model = FFN(conv1d) if transposed else FFN()
    step, optimizer = compiled(model, decay=0.5), torch.optim.SGD(model.parameters(), lr=0.1)
    before = [weight.detach().clone() for weight in (model.up.weight, model.down.weight)]
    (step(torch.randn(16, 64)) * 0).sum().backward()
    optimizer.step()
    for weight, old in zip((model.up.weight, model.down.weight), before, strict=True):
        matrix, new = (old.t(), weight.t()) if transposed else (old, weight)
        mask = dense_mask(transposable_masks(matrix))
        torch.testing.assert_close(new.data, torch.where(mask, matrix, 0.95 * matrix))


def test_a_tail_begins_with_the_masked_weights():
    model = FFN()
    step, optimizer = compiled(model, refresh=100, tail=1, total_steps=3), torch.optim.SGD(model.parameters(), lr=0.1)
    step_once(step, optimizer)
    masks = state_of(model.up.weight).masks.clone()
    step_once(step, optimizer)
    mask = dense_mask(masks)
    assert not model.up.weight[~mask].any()
    assert model.up.weight[mask].all()


def test_gradients_are_those_of_the_masked_weights():
    """All three products, but for what is rounded and sampled: dgrad reads what fprop does."""
    model = FFN()
    baseline = FFN()
    baseline.load_state_dict(model.state_dict())
    with torch.no_grad():
        for layer in (baseline.up, baseline.down):
            layer.weight.mul_(dense_mask(transposable_masks(layer.weight)))
    x = torch.randn(64, 64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    compiled(model)(x).square().mean().backward()
    baseline(y).square().mean().backward()
    assert (x.grad - y.grad).norm() < 0.2 * y.grad.norm()
    for actual, expected in (
        (model.up.bias.grad, baseline.up.bias.grad),
        (model.down.bias.grad, baseline.down.bias.grad),
    ):
        assert (actual - expected).norm() < 0.2 * expected.norm()
