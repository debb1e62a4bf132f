"""The state of weights: beta frozen at first use, one prune per optimizer step, whatever the optimizer hides."""

import math

import pytest
import torch
from torch import nn

from sparse_compile import state
from sparse_compile.kernels import reference
from sparse_compile.passes.rewrite import WeightSlot
from sparse_compile.recipe import Projection

SLOT = WeightSlot(
    name="w",
    position=0,
    transposed=False,
    projection=Projection.SSTE,
    out_features=32,
    in_features=64,
    device=torch.device("cpu"),
)


def refreshed(weight, slot=SLOT):
    """The operands now, and how often they were made."""
    weight_state = state.weight_state(weight, slot)
    return state.current_operands(weight, slot, weight_state), weight_state.refreshes


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
        beta = torch.tensor([state.weight_state(weight, SLOT).beta])
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


def test_beta_is_frozen_at_first_use():
    weight = nn.Parameter(torch.randn(32, 64))
    first = reference.sste_beta(weight)
    refreshed(weight)
    weight.data.uniform_()
    refreshed(weight)
    assert state.weight_state(weight, SLOT).beta == first != reference.sste_beta(weight)


def test_a_zero_weight_gets_its_beta_when_it_has_values():
    weight = nn.Parameter(torch.zeros(32, 64))
    operands, _ = refreshed(weight)
    assert state.weight_state(weight, SLOT).beta is None
    assert not reference.decompress24(*operands[:2]).float().any()
    weight.data.normal_()
    refreshed(weight)
    assert state.weight_state(weight, SLOT).beta == reference.sste_beta(weight)


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
    """A backward that is still to come needs the operands of its own forward."""
    weight = nn.Parameter(torch.randn(32, 64))
    first, _ = refreshed(weight)
    kept = [operand.clone() for operand in first]
    weight.data.normal_()
    second, _ = refreshed(weight)
    assert not torch.equal(first[0].view(torch.uint8), second[0].view(torch.uint8))
    for operand, copy in zip(first, kept, strict=True):
        assert torch.equal(operand.view(torch.uint8), copy.view(torch.uint8))


def test_a_backward_after_the_optimizer_step_is_an_error():
    """As for a dense weight: the operands that the forward used are gone."""
    ffn = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    compiled = torch.compile(lambda x: ffn(x), backend="sste", options={"sste.executor": "eager"})
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
    before = len(state._states)
    weight = nn.Parameter(torch.randn(32, 64))
    refreshed(weight)
    assert len(state._states) == before + 1
    del weight
    assert len(state._states) == before
