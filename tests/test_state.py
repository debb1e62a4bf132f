"""The state of weights: beta frozen at first use, one prune per optimizer step, whatever the optimizer hides."""

import dataclasses
import gc
import math
from unittest import mock

import pytest
import torch
from torch import nn

import shared_graphs
from sparse_compile.kernels import reference
from sparse_compile.projections.groups_of_four import SOFT
from sparse_compile.testing import assert_same_bits
from sparse_compile.weights import operands as operands_module
from sparse_compile.weights import registry
from sparse_compile.weights.operands import current_operands, operand_set
from sparse_compile.weights.optimizer_watch import watch
from sparse_compile.weights.registry import record_of
from sparse_compile.weights.slot import WeightSlot

clean_slate = shared_graphs.kept

SLOT = WeightSlot(
    name="w",
    position=0,
    transposed=False,
    projection=SOFT,
    out_features=32,
    in_features=64,
    device=torch.device("cpu"),
)


def refreshed(weight, slot=SLOT):
    """The operands now, and how often they were made."""
    kept = operand_set(weight, slot)
    return current_operands([weight], [slot], [record_of(weight)], [kept]), kept.refreshes


def beta_of(weight):
    return record_of(weight).current_beta.value


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_one_prune_per_optimizer_step(make):
    weight = nn.Parameter(torch.randn(32, 64))
    optimizer = make([weight])
    counts = []
    for _ in range(4):
        for _ in range(3):  # microbatches
            operands, count = refreshed(weight)
        beta = torch.tensor([beta_of(weight)])
        for actual, expected in zip(operands, reference.prune_weight(weight.detach(), beta), strict=True):
            assert torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))
        counts.append(count)
        weight.grad = torch.randn_like(weight)
        optimizer.step()
    # Until its first step nobody knows that this optimizer owns the weight.
    assert counts == [3, 4, 5, 6]


def test_updates_without_an_optimizer_are_seen():
    """``p.data`` changes bump no version: a weight that no optimizer owns is pruned at every call."""
    weight = nn.Parameter(torch.randn(32, 64))
    values = []
    for _ in range(3):
        operands, _ = refreshed(weight)
        values.append(reference.decompress24(*operands[:2]).float())
        weight.data.normal_()
    assert not torch.equal(values[0], values[1])
    assert not torch.equal(values[1], values[2])


def test_a_frozen_weight_is_pruned_again_after_a_step_of_any_optimizer():
    """A teacher that follows its student through ``.data``, and is not called under ``no_grad``."""
    weight, other = nn.Parameter(torch.randn(32, 64), requires_grad=False), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([other], lr=0.1)
    for _ in range(8):
        weight.data.mul_(-0.5)
        other.grad = torch.ones(1)
        optimizer.step()
        operands, count = refreshed(weight)
        expected = reference.prune_weight(weight, torch.tensor([beta_of(weight)]))
        for actual, wanted in zip(operands, expected, strict=True):
            assert_same_bits(actual, wanted)
        pending = operands[0].view_as(operands[0])  # as a backward holds it
        assert refreshed(weight) == (operands, count), "microbatches"
    held = pending.clone()
    weight.data.normal_()
    optimizer.step()
    assert not torch.equal(refreshed(weight)[0][1], operands[1])
    assert_same_bits(pending, held)


def test_an_owned_weight_changed_in_place_is_seen():
    weight = nn.Parameter(torch.randn(32, 64))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    refreshed(weight)
    count = refreshed(weight)[1]
    with torch.no_grad():
        weight.mul_(-1)
    assert refreshed(weight)[1] == count + 1


def test_beta_is_that_of_the_weight_until_it_is_trained():
    """Weights that are loaded after an evaluation, or after a forward that no step follows, begin with their own."""
    ffn = nn.Sequential(nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 64, bias=False))
    step = torch.compile(lambda x: ffn(x), backend="sste", options={"sste.executor": "eager", "sste.when": "always"})
    optimizer = torch.optim.SGD(ffn.parameters(), lr=0.1)
    weight = ffn[0].weight
    for _ in range(2):
        with torch.no_grad():
            step(torch.randn(8, 64))
        assert beta_of(weight) == reference.sste_beta(weight)
        weight.data.normal_()
        loss = step(torch.randn(8, 64)).sum()
        assert beta_of(weight) == reference.sste_beta(weight)
        weight.data.uniform_()
    first = beta_of(weight)
    loss.backward()
    optimizer.step()
    weight.data.normal_()
    step(torch.randn(8, 64))
    assert beta_of(weight) == first != reference.sste_beta(weight)


def test_a_zero_weight_gets_its_beta_when_it_has_values():
    weight = nn.Parameter(torch.zeros(32, 64))
    operands, _ = refreshed(weight)
    assert beta_of(weight) == SOFT.beta_limits.prior
    assert not reference.decompress24(*operands[:2]).float().any()
    weight.data.normal_()
    refreshed(weight)
    assert beta_of(weight) == reference.sste_beta(weight)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_values_at_first_use_are_an_error(value):
    weight = nn.Parameter(torch.randn(32, 64))
    weight.data[3, 4] = value
    with pytest.raises(ValueError, match="'w' holds NaN or infinite values at its first use"):
        refreshed(weight)


def test_addresses_stay_across_optimizer_steps():
    """CUDA graphs record the addresses of the operands."""
    weight = nn.Parameter(torch.randn(32, 64))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    addresses = set()
    for _ in range(4):
        weight.grad = torch.randn_like(weight)
        optimizer.step()
        addresses.add(tuple(operand.data_ptr() for operand in refreshed(weight)[0]))
    assert len(addresses) == 1


def test_calls_within_a_step_do_not_overwrite_each_other():
    """A backward that is still to come needs the operands of its own forward; without one, addresses stay."""
    ffn = nn.Sequential(nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 64, bias=False))
    compiled = torch.compile(
        lambda x: ffn(x), backend="sste", options={"sste.executor": "eager", "sste.when": "always"}
    )
    x = torch.randn(8, 64)

    def input_grad(edit):
        tokens = x.clone().requires_grad_()
        loss = compiled(tokens).sum()
        edit()
        loss.backward()
        return tokens.grad

    def edit():
        for parameter in ffn.parameters():
            parameter.data.neg_()
        compiled(x)

    weight_state = operand_set(ffn[2].weight, dataclasses.replace(SLOT, out_features=64))
    expected = input_grad(lambda: None)
    addresses = [operand.data_ptr() for operand in weight_state.operands]
    assert torch.equal(input_grad(lambda: None), expected)
    assert [operand.data_ptr() for operand in weight_state.operands] == addresses
    assert torch.equal(input_grad(edit), expected)
    assert [operand.data_ptr() for operand in weight_state.operands] != addresses


def test_a_backward_after_the_optimizer_step_is_an_error():
    """As for a dense weight: the operands that the forward used are gone."""
    ffn = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    compiled = torch.compile(
        lambda x: ffn(x), backend="sste", options={"sste.executor": "eager", "sste.when": "always"}
    )
    optimizer = torch.optim.SGD(ffn.parameters(), lr=0.1)
    x = torch.randn(8, 64)
    for _ in range(2):
        compiled(x).sum().backward()
        optimizer.step()
    loss = compiled(x).sum()
    for parameter in ffn.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    compiled(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_operands_made_under_inference_mode_serve_training():
    weight = nn.Parameter(torch.randn(32, 64))
    with torch.inference_mode():
        operands, _ = refreshed(weight)
    assert not any(operand.is_inference() for operand in operands)


def test_orientations_have_states_of_their_own():
    square = nn.Parameter(torch.randn(64, 64))
    fields = {name: getattr(SLOT, name) for name in SLOT.__slots__} | {"out_features": 64}
    slots = [WeightSlot(**(fields | {"transposed": transposed})) for transposed in (False, True)]
    plain, flipped = (refreshed(square, slot)[0] for slot in slots)
    transposed, _ = refreshed(nn.Parameter(square.detach().t()), slots[0])
    assert torch.equal(flipped[0].view(torch.uint8), transposed[0].view(torch.uint8))
    assert not torch.equal(plain[0].view(torch.uint8), flipped[0].view(torch.uint8))


def test_state_dies_with_its_weight():
    before = len(registry._records)
    weight = nn.Parameter(torch.randn(32, 64))
    refreshed(weight)
    assert len(registry._records) == before + 1
    del weight
    assert len(registry._records) == before


def sgd_by_hand(weight):
    """``.data`` alone: no optimizer, no version."""

    def update():
        weight.data.sub_(weight.grad, alpha=0.1)

    return update


def stepping(*optimizers):
    def update():
        for optimizer in optimizers:
            optimizer.step()

    return update


class Int8SGD(torch.optim.Optimizer):
    """Momentum in int8, updates of ``.data``."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        for weight in (weight for group in self.param_groups for weight in group["params"]):
            kept = self.state[weight]
            momentum = kept["momentum"].float() * kept["scale"] if kept else 0.0
            momentum = 0.9 * momentum + weight.grad
            kept["scale"] = momentum.abs().max() / 127
            kept["momentum"] = (momentum / kept["scale"]).round().to(torch.int8)
            weight.data.sub_(momentum, alpha=0.1)


class Unhooked(torch.optim.Optimizer):
    """What calls no initialiser has no hooks."""

    def __init__(self, params):
        self.params = list(params)

    def step(self, closure=None):
        for weight in self.params:
            weight.data.sub_(weight.grad, alpha=0.1)


def unhooked_after_hooked(weight):
    """The optimizer that owns the weight is alive and steps no more."""
    owner = torch.optim.SGD([weight], lr=0.1)
    weight.grad = torch.zeros_like(weight)
    owner.step()
    by_hand = sgd_by_hand(weight)
    return lambda: (by_hand(), owner)


def in_backward(weight):
    """The optimizer steps in a hook of backward."""
    optimizer = torch.optim.SGD([weight], lr=0.1)
    weight.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    return lambda: (weight * torch.randn_like(weight)).sum().backward()


def sharpness_aware(weight):
    """SAM: a step up along the gradient and back through ``.data``, then a step."""
    optimizer = torch.optim.SGD([weight], lr=0.1)
    calls = iter(range(100))

    def update():
        if next(calls) % 2 == 0:
            weight.data.add_(weight.grad, alpha=0.05)
        else:
            weight.data.sub_(weight.grad, alpha=0.05)
            optimizer.step()

    return update


UPDATES = {
    "by hand": sgd_by_hand,
    "two optimizers": lambda w: stepping(torch.optim.SGD([w], lr=0.1), torch.optim.AdamW([w], lr=0.1, fused=True)),
    "two groups": lambda w: stepping(torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))]}, {"params": [w]}])),
    "compiled": lambda w: torch.compile(torch.optim.AdamW([w], lr=0.1).step, backend="eager"),
    "int8": lambda w: stepping(Int8SGD([w])),
    "unhooked": lambda w: stepping(Unhooked([w])),
    "unhooked after hooked": unhooked_after_hooked,
    "in backward": in_backward,
    "sharpness-aware": sharpness_aware,
    "data replaced": lambda w: lambda: setattr(w, "data", w.data - 0.1 * w.grad),
}  # fmt: skip


@pytest.mark.parametrize("make", UPDATES.values(), ids=UPDATES.keys())
def test_every_kind_of_update_is_seen(make):
    weight = nn.Parameter(torch.randn(32, 64))
    update = make(weight)
    for _ in range(5):
        for _ in range(2):  # microbatches
            operands, _ = refreshed(weight)
            expected = reference.prune_weight(weight.detach(), torch.tensor([beta_of(weight)]))
            for actual, wanted in zip(operands, expected, strict=True):
                assert_same_bits(actual, wanted)
        weight.grad = torch.randn_like(weight)
        update()


def test_a_step_of_another_optimizer_changes_nothing():
    """Two models that train in turns, such as a generator and its critic."""
    weights = [nn.Parameter(torch.randn(32, 64)) for _ in range(2)]
    optimizers = [torch.optim.SGD([weight], lr=0.1) for weight in weights]
    for weight, optimizer in zip(weights, optimizers, strict=True):
        weight.grad = torch.randn_like(weight)
        optimizer.step()
    _, count = refreshed(weights[0])
    optimizers[1].step()
    assert refreshed(weights[0])[1] == count
    optimizers[0].step()
    assert refreshed(weights[0])[1] == count + 1


def test_an_owner_that_is_gone_owns_nothing():
    """Its id may soon be another's."""
    weight = nn.Parameter(torch.randn(32, 64))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    first = watch.last_of(weight)
    assert first is not None
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.zeros(1))]
    optimizer.step()
    assert watch.last_of(weight) is None
    optimizer.param_groups[0]["params"] = [weight]
    optimizer.step()
    assert watch.last_of(weight) == first + 2
    del optimizer
    gc.collect()
    assert watch.last_of(weight) is None


def test_edits_are_looked_for_less_and_less_often():
    """A look waits for the device: at the first, second, fourth and eighth reuse in training, always in evaluation."""
    weight = nn.Parameter(torch.randn(32, 64))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    with mock.patch.object(operands_module, "find_edited", return_value=[]) as look:
        looks = []
        for _ in range(10):
            refreshed(weight)
            looks.append(look.call_count)
        assert looks == [0, 1, 2, 2, 3, 3, 3, 3, 4, 4]
        with torch.no_grad():
            for _ in range(3):
                refreshed(weight)
        assert look.call_count == 4 + 3
        refreshed(weight)
        assert look.call_count == 4 + 3 + 1
