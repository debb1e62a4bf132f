"""beta and invalidate: what is derived from the weights of a model."""

import math

import pytest
import torch
from torch import nn

import shared_graphs
import sparse_compile
from sparse_compile.kernels import reference
from sparse_compile.weights.registry import find_record

clean_slate = shared_graphs.kept
uncompiled = shared_graphs.uncompiled
pytestmark = pytest.mark.usefixtures("uncompiled")

OPTIONS = {"sste.executor": "eager", "sste.when": "always"}


class Block(nn.Module):
    def __init__(self, proj):
        super().__init__()
        self.proj = nn.Linear(64, 64) if proj else None
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x):
        if self.proj is not None:
            x = x + self.proj(x)
        return x + self.down(nn.functional.gelu(self.up(x)))


class Model(nn.Module):
    """Weights that are pruned, that are no linear's, and where ``proj``, that are a linear's and not pruned."""

    def __init__(self, proj=False):
        super().__init__()
        self.embedding, self.blocks, self.norm = nn.Embedding(128, 64), nn.ModuleList([Block(proj)]), nn.LayerNorm(64)

    def forward(self, ids, targets):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return (self.norm(x) - self.embedding(targets)).square().mean()


@pytest.fixture
def trained(batch):
    """A compiled model after one step, its optimizer, and a function that returns its loss."""
    model = torch.compile(Model(), backend="sste", options=OPTIONS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def loss():
        torch.manual_seed(0)
        return model(*batch)

    loss().backward()
    optimizer.step()
    return model, optimizer, loss


def test_betas_are_those_of_the_first_weights(batch) -> None:
    model = Model()
    expected = {
        f"blocks.0.{name}.weight": reference.sste_beta(getattr(model.blocks[0], name).weight) for name in ("up", "down")
    }
    compiled = torch.compile(model, backend="sste", options=OPTIONS)
    assert sparse_compile.beta(model) == {}
    compiled(*batch)
    assert sparse_compile.beta(model) == sparse_compile.beta(compiled) == expected


def by_hand(model: nn.Module) -> None:
    for weight in model.parameters():
        weight.data.sub_(weight.grad, alpha=0.1)
        weight.grad = None


def test_weights_that_are_updated_by_hand_keep_their_scales(batch) -> None:
    """Also those of an optimizer over copies; frozen, they compute as they were trained."""
    model = Model()
    run = torch.compile(model, backend="sste", options=OPTIONS)
    run(*batch).backward()
    first = sparse_compile.beta(model)
    by_hand(model)
    for _ in range(4):
        run(*batch).backward()
        assert sparse_compile.beta(model) == first
        by_hand(model)
    trained = run(*batch)
    model.requires_grad_(False)
    torch.testing.assert_close(run(*batch), trained)


def test_weights_that_are_loaded_after_a_trial_get_scales_of_their_own(batch) -> None:
    """Though no optimizer is there yet that would tell the trial from training."""
    model, other = Model(), Model()
    run = torch.compile(model, backend="sste", options=OPTIONS)
    run(*batch).backward()
    model.load_state_dict(other.state_dict())
    run(*batch)
    torch.compile(other, backend="sste", options=OPTIONS)(*batch)
    assert sparse_compile.beta(model) == sparse_compile.beta(other)


@pytest.mark.parametrize("schedule", [{"sste.warmup": 2}, {"sste.tail": 2, "sste.total_steps": 9}], ids=str)
def test_a_schedule_that_no_optimizer_can_keep_warns(batch, schedule) -> None:
    model = Model()
    run = torch.compile(model, backend="sste", options=OPTIONS | schedule)
    run(*batch).backward()
    by_hand(model)
    with pytest.warns(UserWarning, match="no optimizer that is known holds its weight"):
        run(*batch)


def test_betas_can_be_given_before_the_first_step_and_later(batch) -> None:
    model = torch.compile(Model(), backend="sste", options=OPTIONS)
    given = {"module.blocks.0.up.weight": 1.25, "blocks.0.down.weight": 1.5}
    sparse_compile.set_beta(model, given)
    first = model(*batch).item()
    assert sparse_compile.beta(model) == {"blocks.0.up.weight": 1.25, "blocks.0.down.weight": 1.5}
    sparse_compile.set_beta(model, {"blocks.0.up.weight": 2.5})
    assert model(*batch).item() != first
    sparse_compile.set_beta(model, {"blocks.0.up.weight": 1.25})
    assert model(*batch).item() == first


def test_weights_that_are_kept_as_they_are_have_none(batch) -> None:
    model = torch.compile(Model(), backend="sste", options=OPTIONS | {"sste.recipe": "ste"})
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
def test_bad_betas_are_an_error_and_none_is_taken(betas, message) -> None:
    model = Model()
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


def test_nothing_is_told_where_one_name_is_wrong(batch) -> None:
    """A bias, an embedding, a norm or a head has no scale, and finalize must not overwrite it."""
    model = Model(proj=True)
    run = torch.compile(model, backend="sste", options=OPTIONS)
    good = {"blocks.0.up.weight": 1.5}
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for called in (False, True):
        for name, message in (
            ("blocks.0.up.bias", r"'blocks.0.up.bias' has no scale, because it is not a matrix: its shape is \(256,\)"),
            ("embedding.weight", r"'embedding.weight' of a Embedding has no scale"),
            ("norm.weight", "has no scale"),
            *([("blocks.0.proj.weight", "the linear of 'blocks.0.proj.weight' stays dense")] if called else []),
        ):
            with pytest.raises(ValueError, match=message):
                sparse_compile.set_beta(model, good | {name: 1.5})
            assert "blocks.0.up.weight" not in sparse_compile.beta(model) or called
        if not called:
            with pytest.raises(ValueError, match="nothing to finalize"):
                sparse_compile.finalize(model)
        run(*batch)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_a_scale_of_a_weight_that_turns_out_dense_is_refused_by_finalize(batch) -> None:
    model = Model(proj=True)
    sparse_compile.set_beta(model, {"blocks.0.proj.weight": 1.5})
    weight = model.blocks[0].proj.weight.detach().clone()
    torch.compile(model, backend="sste", options=OPTIONS)(*batch).backward()
    with pytest.raises(ValueError, match=r"'blocks.0.proj.weight' was given a scale, but its linear stays dense"):
        sparse_compile.finalize(model)
    assert torch.equal(model.blocks[0].proj.weight, weight)


class _Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args):
        return self.module(*args)


def _checkpointed(model):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    for index, block in enumerate(model.blocks):
        model.blocks[index] = checkpoint_wrapper(block)
    return model


WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="sste", options=OPTIONS),
    "averaged": torch.optim.swa_utils.AveragedModel,
    "checkpointed": _checkpointed,
    "wrapped twice": lambda model: _Wrapper(_Wrapper(model)),
    "compiled, wrapped, averaged": lambda model: torch.optim.swa_utils.AveragedModel(
        _Wrapper(torch.compile(_checkpointed(model), backend="sste", options=OPTIONS))
    ),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_names_are_found_through_wrappers(wrap) -> None:
    scales = {"blocks.0.up.weight": 1.25, "blocks.0.down.weight": 1.5}
    wrapped = wrap(Model())
    sparse_compile.set_beta(wrapped, scales)
    told = sparse_compile.beta(wrapped)
    assert sorted(told.values()) == [1.25, 1.5]
    other = Model()
    sparse_compile.set_beta(other, told)
    assert sparse_compile.beta(other) == scales


@pytest.mark.by_day(1)
def test_a_frozen_model_is_told_its_scales_after_it_was_compiled(trained, batch) -> None:
    """An average that is made, compiled and evaluated before training, and told its scales later."""
    model, _, loss = trained
    average = Model()
    for layer in (average.blocks[0].up, average.blocks[0].down):
        layer.weight.requires_grad_(False)
    run = torch.compile(average, backend="sste", options=OPTIONS)
    with torch.no_grad():
        run(*batch)
        average.load_state_dict(model._orig_mod.state_dict())
        dense = run(*batch)
        sparse_compile.set_beta(average, sparse_compile.beta(model))
        assert run(*batch) == loss() != dense


@pytest.mark.nightly
def test_recipes_that_were_tried_before_leave_no_operands(batch) -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    weight = model.blocks[0].up.weight
    for recipe in ("s-ste", "sr-ste", "fp8", "s-ste-bf16"):
        run = torch.compile(model, backend="sste", options=OPTIONS | {"sste.recipe": recipe})
        for _ in range(2):
            run(*batch).backward()
            kept = find_record(weight)
            assert bool(kept.decay) == (recipe == "sr-ste")
            optimizer.step()
        assert len(kept.operands) == 1, recipe
        assert bool(sparse_compile.beta(model)) == recipe.startswith("s-ste"), recipe
