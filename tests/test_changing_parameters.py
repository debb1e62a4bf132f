"""Copies of a model, and parameters that are replaced, cast, frozen, handed in or moved: operands and beta follow."""

import copy
import gc
import io
import weakref

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel

import shared_graphs
import sparse_compile
from ffn_training import (
    EAGER,
    FFN,
    adamw,
    after_two_steps,
    assert_current,
    assert_equal,
    compiled,
    gradients,
    refreshes,
    some_tokens,
    states,
    train,
)

clean_slate = shared_graphs.kept


@pytest.fixture
def x():
    return some_tokens()


@pytest.mark.parametrize("frozen", [True, False])
def test_each_call_sees_what_is_frozen(x: torch.Tensor, frozen: bool) -> None:
    model = FFN()
    step = compiled(model)
    model.up.weight.requires_grad_(not frozen)
    step(x).square().mean().backward()
    model.up.weight.requires_grad_(frozen)
    model.zero_grad()
    step(x).square().mean().backward()
    assert (model.up.weight.grad is not None) == frozen
    assert model.down.weight.grad is not None


@pytest.mark.parametrize("frozen", [False, True])
def test_an_averaged_copy_computes_what_the_model_would(x, frozen):
    model = FFN()
    average = AveragedModel(model, multi_avg_fn=lambda averages, current, _: torch._foreach_copy_(averages, current))
    step = compiled(model)
    optimizer = adamw(model)
    train(step, optimizer, x)
    average.update_parameters(model)
    average.requires_grad_(not frozen)
    sparse_compile.set_beta(average, sparse_compile.beta(model))
    evaluate = compiled(average)
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(evaluate(x), step(x))
        step(x).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)
    with torch.no_grad():
        evaluate(x)
    assert_current(average)
    assert sparse_compile.beta(average) == {f"module.{name}": beta for name, beta in sparse_compile.beta(model).items()}


# Copies and files.


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def compiled_by(what, model):
    """A compiled model beside the module, or the module itself, compiled in place."""
    if what == "torch.compile":
        return compiled(model)
    model.compile(backend="sste", options=EAGER)
    return model


def copies():
    """In a night all; by day those in which any two of the values meet."""
    for what in ("torch.compile", "module.compile"):
        for make_copy in (copy.deepcopy, saved):
            for when in ("before", "after"):
                odd = (what == "torch.compile") ^ (make_copy is saved) ^ (when == "before")
                marks = pytest.mark.nightly if odd else ()
                yield pytest.param(what, make_copy, when, id=f"{what}-{make_copy.__name__}-{when}", marks=marks)


@pytest.mark.parametrize(("what", "make_copy", "when"), list(copies()))
def test_copies_train_on_their_own(x, what, make_copy, when):
    """Of the compiled model, or of the module whose forward is compiled."""
    model = FFN()
    step = compiled_by(what, model)
    optimizer = adamw(model)
    if when == "after":
        train(step, optimizer, x)
    other = make_copy(step)
    if what == "module.compile":
        other.compile(backend="sste", options=EAGER)
    baseline = getattr(other, "_orig_mod", other)
    sparse_compile.set_beta(other, sparse_compile.beta(model))
    assert torch.equal(other(x), step(x))
    before = step(x)
    train(other, adamw(baseline), x)
    other(x)
    assert_current(baseline)
    assert torch.equal(step(x), before)
    assert_current(model)
    plain = FFN()
    plain.load_state_dict(baseline.state_dict(), strict=True)
    assert_equal(plain.parameters(), baseline.parameters())


def test_two_compiled_copies_of_a_module_share_its_weights(x):
    model = FFN()
    one, two = compiled(model), compiled(model)
    optimizer = adamw(model)
    train(one, optimizer, x)
    assert torch.equal(one(x), two(x))
    count = refreshes(model)
    two(x).square().mean().backward()
    optimizer.step()
    assert torch.equal(one(x), two(x))
    assert refreshes(model) == [n + 1 for n in count]


@pytest.mark.by_day(1)
@pytest.mark.parametrize("what", ["torch.compile", "module.compile"])
def test_nothing_outlives_a_model(x, what):
    torch._dynamo.reset()  # of a graph that another model was traced for nothing could hold this one
    model = FFN()
    step = compiled_by(what, model)
    optimizer = adamw(model)
    train(step, optimizer, x)
    watched = [weakref.ref(thing) for kept in states(model).values() for thing in (kept, *kept.operands)]
    watched.append(weakref.ref(model.up.weight))
    assert all(reference() is not None for reference in watched)
    del model, step, optimizer
    gc.collect()
    assert [reference() for reference in watched] == [None] * len(watched)


# Parameters that change.


def test_a_replaced_parameter(x):
    torch._dynamo.reset()
    model, step, optimizer = after_two_steps(x)
    old = weakref.ref(model.up.weight)
    model.up.weight = nn.Parameter(torch.randn(64, 64) / 8)
    step(x).square().mean().backward()
    assert_current(model)
    assert model.up.weight.grad is not None
    assert len(sparse_compile.report().graphs) == 1
    del optimizer
    gc.collect()
    assert old() is None


@pytest.mark.by_day(1)
@pytest.mark.parametrize("recipe", ["s-ste", "t-sr-ste"])
def test_a_weight_that_grows_and_shrinks_through_data(x, recipe):
    model = FFN()
    options = EAGER | {"sste.recipe": recipe}
    run, optimizer = compiled(model, options), torch.optim.SGD(model.parameters(), lr=0.01)
    train(run, optimizer, x)
    up, bias, down = (parameter.data for parameter in (model.up.weight, model.up.bias, model.down.weight))
    for times in (2, 1):
        model.up.weight.data, model.up.bias.data = up.repeat(times, 1), bias.repeat(times)
        model.down.weight.data = down.repeat(1, times) / times
        optimizer.zero_grad()
        with torch.no_grad():
            output = run(x)
            other = copy.deepcopy(model)
            sparse_compile.set_beta(other, sparse_compile.beta(model))
            torch.testing.assert_close(output, compiled(other, options)(x))
        train(run, optimizer, x)


def test_a_model_cast_after_compilation(x):
    model, step, _optimizer = after_two_steps(x)
    betas = sparse_compile.beta(model)
    model.to(torch.bfloat16)
    y = step(x.bfloat16())
    y.float().square().mean().backward()
    assert y.dtype is torch.bfloat16
    assert all(parameter.grad.dtype is torch.bfloat16 for parameter in model.parameters())
    assert_current(model)
    assert sparse_compile.beta(model) == betas


def test_a_frozen_weight_goes_on_as_it_was_trained(x):
    """Progressive freezing must not change what a linear computes."""
    model, step, optimizer = after_two_steps(x)
    torch.manual_seed(1)
    before = step(x)
    before.square().mean().backward()
    expected = gradients(model)
    model.zero_grad()
    model.up.weight.requires_grad_(False)
    count = refreshes(model)
    torch.manual_seed(1)
    after = step(x)
    after.square().mean().backward()
    assert torch.equal(before, after)
    assert model.up.weight.grad is None
    others = [(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True) if p.grad is not None]
    assert len(others) == len(expected) - 1
    assert_equal(*zip(*others, strict=True))
    assert refreshes(model) == count
    optimizer.step()
    model.up.weight.requires_grad_(True)
    step(x).square().mean().backward()
    assert model.up.weight.grad is not None
    assert_current(model)


@pytest.mark.parametrize("inside", [False, True])
def test_a_compiled_model_called_with_other_weights(x, inside):
    """Parameters that are handed in are weights like others."""
    torch._dynamo.reset()
    model, other = FFN(), FFN()
    values = {name: nn.Parameter(value.clone()) for name, value in other.state_dict().items()}
    if inside:
        y = compiled(lambda values, x: torch.func.functional_call(model, values, (x,)))(values, x)
    else:
        y = torch.func.functional_call(compiled(model), {f"_orig_mod.{n}": v for n, v in values.items()}, (x,))
    assert [row.decision.split()[0] for row in sparse_compile.report().rows] == ["s-ste"] * 2
    assert torch.equal(y, compiled(other)(x))
    assert sparse_compile.beta(model) == {}
    y.square().mean().backward()
    assert all(value.grad is not None for value in values.values())


@pytest.mark.gpu
def test_a_model_that_moves_to_the_host_and_back():
    x = torch.randn(128, 256)
    model = FFN(256).cuda()
    step = compiled(model, EAGER | {"sste.when": "always"})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(step, optimizer, x.cuda())
    betas, before = sparse_compile.beta(model), step(x.cuda())
    model.cpu()
    on_host = step(x)
    assert sparse_compile.beta(model) == betas
    torch.testing.assert_close(on_host, before.cpu(), rtol=0.05, atol=0.05)
    model.cuda()
    assert torch.equal(step(x.cuda()), before)


def swapped_run(x, swap, recipe):
    """Losses and scales of a run whose model is loaded and converted between its steps."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = FFN()
    step = compiled(model, EAGER | {"sste.recipe": recipe, "sste.health": 1})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    changes = (lambda: model.load_state_dict(model.state_dict()), lambda: model.to(torch.bfloat16), lambda: None)
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        for change in changes:
            loss = step(x.to(model.up.weight.dtype)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()  # which PyTorch forgets where it swaps
            losses.append(loss.item())
            change()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    return losses, sparse_compile.beta(model)


@pytest.mark.by_day(1)
@pytest.mark.parametrize("recipe", ["sr-ste", "s-ste"])
def test_parameters_whose_contents_are_swapped(x, recipe):
    """PyTorch swaps no tensors with weak references.  What is kept of a parameter stays with it."""
    assert swapped_run(x, True, recipe) == swapped_run(x, False, recipe)


def test_parameters_of_fsdp2_are_converted(x, one_process):
    """Of DTensors PyTorch always swaps the contents."""
    model = fully_shard(FFN(), mesh=init_device_mesh("cpu", (1,)))
    step = compiled(model)
    train(step, torch.optim.SGD(model.parameters(), lr=0.1), x)
    before = sparse_compile.beta(model)
    model.to(torch.bfloat16)
    assert sparse_compile.beta(model) == before
    assert len(before) == 2
