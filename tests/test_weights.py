"""beta and invalidate: what is derived from the weights of a model."""

import math

import pytest
import torch
from torch import nn

import sparse_compile
from sparse_compile.kernels import reference
from sparse_compile.weights.registry import find_record

OPTIONS = {"sste.executor": "eager", "sste.when": "always"}


@pytest.fixture
def trained(small_gpt, batch):
    """A compiled model after one step, its optimizer, and a function that returns its loss."""
    model = torch.compile(small_gpt(depth=1), backend="sste", options=OPTIONS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def loss():
        torch.manual_seed(0)
        return model(*batch)

    loss().backward()
    optimizer.step()
    return model, optimizer, loss


def test_betas_are_those_of_the_first_weights(small_gpt, batch) -> None:
    model = small_gpt(depth=1)
    expected = {
        f"blocks.0.{name}.weight": reference.sste_beta(getattr(model.blocks[0], name).weight) for name in ("up", "down")
    }
    compiled = torch.compile(model, backend="sste", options=OPTIONS)
    assert sparse_compile.beta(model) == {}
    compiled(*batch)
    assert sparse_compile.beta(model) == sparse_compile.beta(compiled) == expected


def test_betas_can_be_given_before_the_first_step_and_later(small_gpt, batch) -> None:
    model = torch.compile(small_gpt(depth=1), backend="sste", options=OPTIONS)
    given = {"module.blocks.0.up.weight": 1.25, "blocks.0.down.weight": 1.5}
    sparse_compile.set_beta(model, given)
    first = model(*batch).item()
    assert sparse_compile.beta(model) == {"blocks.0.up.weight": 1.25, "blocks.0.down.weight": 1.5}
    sparse_compile.set_beta(model, {"blocks.0.up.weight": 2.5})
    assert model(*batch).item() != first
    sparse_compile.set_beta(model, {"blocks.0.up.weight": 1.25})
    assert model(*batch).item() == first


def test_weights_that_are_kept_as_they_are_have_none(small_gpt, batch) -> None:
    model = torch.compile(small_gpt(depth=1), backend="sste", options=OPTIONS | {"sste.recipe": "ste"})
    optimizer = torch.optim.AdamW(model.parameters())
    model(*batch).backward()
    optimizer.step()
    assert sparse_compile.beta(model) == {}
    assert not any("sste_beta" in entry for entry in optimizer.state_dict()["state"].values())
    with pytest.raises(ValueError, match=r"the recipe of 'blocks\.0\.up\.weight' has no scale"):
        sparse_compile.set_beta(model, {"blocks.0.up.weight": 1.5})


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        (
            {"blocks.0.upp.weight": 1.0},
            r"no parameter .* named 'blocks.0.upp.weight'; did you mean 'blocks.0.up.weight'",
        ),
        ({"blocks.0.up.weight": math.nan}, r"the scale of 'blocks.0.up.weight' is nan; it must be a positive"),
        ({"blocks.0.up.weight": -1.0}, r"is -1.0; it must be a positive, finite number"),
    ],
)
def test_bad_betas_are_an_error_and_none_is_taken(small_gpt, betas, message) -> None:
    model = small_gpt(depth=1)
    with pytest.raises(ValueError, match=message):
        sparse_compile.set_beta(model, {"blocks.0.down.weight": 1.0} | betas)
    assert sparse_compile.beta(model) == {}


def test_an_edit_that_cannot_be_seen_is_seen_after_invalidate(trained) -> None:
    model, _, loss = trained
    before, betas = loss().item(), sparse_compile.beta(model)
    weight = model._orig_mod.blocks[0].up.weight
    # A row that no sample holds.
    weight.data[1].mul_(1.5)
    assert loss().item() == before, "the optimizer owns it and has not stepped"
    sparse_compile.invalidate(model)
    assert loss().item() != before
    assert sparse_compile.beta(model) == betas, "beta is frozen"
    weight.data[1].div_(1.5)
    sparse_compile.invalidate(model)
    assert loss().item() == before


def test_operands_keep_their_addresses(trained) -> None:
    model, _, loss = trained
    loss()
    weight = model._orig_mod.blocks[0].up.weight
    (kept,) = find_record(weight).operands.values()
    addresses = [operand.data_ptr() for operand in kept.operands]
    refreshes = kept.refreshes
    sparse_compile.invalidate(model)
    loss()
    assert kept.refreshes == refreshes + 1
    assert [operand.data_ptr() for operand in kept.operands] == addresses


def test_between_forward_and_backward_it_is_an_error(trained) -> None:
    model, _, loss = trained
    pending = loss()
    sparse_compile.invalidate(model)
    loss()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        pending.backward()


def test_models_without_the_backend() -> None:
    model = nn.Linear(4, 4)
    sparse_compile.invalidate(model)
    assert sparse_compile.beta(model) == {}
