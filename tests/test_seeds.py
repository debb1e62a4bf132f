"""The samples of a backward are those that its forward drew the seed of, whenever and however often it runs."""

from dataclasses import replace

import pytest
import torch
import torch._functorch.config
from torch import nn
from torch.utils.checkpoint import checkpoint

import shared_graphs
import sparse_compile
from sparse_compile.kernels import ops
from sparse_compile.linear.seed import SeedSource, new_seed
from sparse_compile.recipe import SSTE, Gemm, GradFormat, Rounding

clean_slate = shared_graphs.kept

OPTIONS = {"sste.executor": "eager", "sste.when": "always"}
X = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))


def ffn():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))


def compiled(module, **options):
    return torch.compile(module, backend="sste", options=OPTIONS | {f"sste.{name}": v for name, v in options.items()})


def gradients(module):
    """Of all weights, which are without any afterwards."""
    found = [weight.grad.clone() for weight in module.parameters()]
    module.zero_grad()
    return found


def same(these, those):
    return all(torch.equal(a, b) for a, b in zip(these, those, strict=True))


ARMS = {
    "default": {},
    "2:4 dgrad": {"recipe": replace(SSTE, dgrad=Gemm.MVUE24)},
    "small memory": {"memory": "small"},
    "stochastic rounding": {"recipe": replace(SSTE, rounding=Rounding.STOCHASTIC)},
}


@pytest.mark.by_day(2)
@pytest.mark.parametrize("options", ARMS.values(), ids=ARMS.keys())
@torch._functorch.config.patch(donated_buffer=False)
def test_a_second_backward_draws_the_same(options):
    module = ffn()
    y = compiled(module, **options)(X)
    y.square().sum().backward(retain_graph=True)
    first = gradients(module)
    y.square().sum().backward()
    assert same(gradients(module), first)


def test_the_order_of_backwards_changes_nothing():
    module = ffn()
    call = compiled(module)

    def in_order(order):
        torch.manual_seed(3)
        outputs = [call(X) for _ in range(3)]
        found = {}
        for index in order:
            outputs[index].square().sum().backward()
            found[index] = gradients(module)
        return found

    forwards, backwards = in_order([0, 1, 2]), in_order([2, 0, 1])
    assert all(same(forwards[index], backwards[index]) for index in range(3))
    # Each call draws its own.
    assert not same(forwards[0], forwards[1])


def test_the_generator_moves_in_forward_alone_and_by_one_draw():
    module = ffn()
    call = compiled(module)
    torch.manual_seed(5)
    torch.randint(2**62, (1,))
    expected = torch.get_rng_state()
    torch.manual_seed(5)
    y = call(X)
    assert torch.equal(torch.get_rng_state(), expected)
    y.sum().backward()
    assert torch.equal(torch.get_rng_state(), expected)


def test_a_source_draws_what_a_new_seed_is():
    source = SeedSource(torch.device("cpu"))
    torch.manual_seed(3)
    drawn = [source.draw().item() for _ in range(3)]
    torch.manual_seed(3)
    assert drawn == [new_seed(torch.device("cpu")).item() for _ in range(3)]


def test_memory_is_used_again_when_nothing_holds_the_seed():
    source = SeedSource(torch.device("cpu"))
    held = source.draw()
    value, alias = held.item(), held[:1]
    other = source.draw()
    assert other.data_ptr() != held.data_ptr()
    del held
    assert source.draw().data_ptr() not in (alias.data_ptr(), other.data_ptr())
    assert alias.item() == value
    address = alias.data_ptr()
    del alias
    assert source.draw().data_ptr() == address


def test_steps_find_their_seeds_where_those_of_the_last_one_lay():
    """Else Inductor would record a CUDA graph in each step."""
    call, addresses = compiled(ffn()), []

    def watched(name, kernel, arguments):
        if name == "cast_mvue_with_sums":
            addresses.append(arguments[3].data_ptr())
        return kernel(*arguments)

    with ops.observed(watched):
        losses = []
        for _ in range(3):
            first, second = (call(X).square().mean() for _ in range(2))
            first.backward()
            second.backward()
            losses += [first.detach().clone(), torch.empty(1, dtype=torch.int64)]  # takes what is free
    assert len(set(addresses)) == 2
    assert addresses == addresses[:4] * 3


@pytest.mark.gpu
def test_cuda_graphs_are_recorded_once():
    from torch._inductor.cudagraph_trees import get_container

    model = ffn().cuda()
    call = torch.compile(model, backend="sste", options={"sste.when": "always", "triton.cudagraphs": True})
    optimizer, losses, recorded = torch.optim.AdamW(model.parameters(), lr=1e-3), [], []
    x = torch.randn(256, 64, device="cuda")
    for _ in range(12):
        loss = call(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses += [loss.detach().clone(), torch.empty(1, dtype=torch.int64, device="cuda")]
        recorded.append(get_container(0).tree_manager.new_graph_id().id)  # counts the question, too
    assert recorded[-1] - recorded[5] == 6
    assert recorded[5] > 6, "nothing was recorded"


def test_what_samples_nothing_draws_nothing():
    before = torch.get_rng_state()
    module, recipe = nn.Linear(64, 64), "fp8"
    torch.set_rng_state(before)
    compiled(module, recipe=recipe)(X).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)
    for context in (torch.no_grad(), torch.inference_mode()):
        module = ffn()
        before = torch.get_rng_state()
        with context:
            compiled(module)(X)
        assert torch.equal(torch.get_rng_state(), before)


def test_a_seed_makes_training_repeat():
    def train():
        torch._dynamo.reset()
        module = ffn()
        call, optimizer = compiled(module), torch.optim.AdamW(module.parameters(), lr=1e-2)
        torch.manual_seed(7)
        for _ in range(3):
            call(X).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return list(module.parameters())

    assert same(train(), train())


@pytest.mark.parametrize(
    ("where", "reentrant"),
    [
        ("in the graph", False),
        ("around the compiled module", True),
        pytest.param("in the graph", True, marks=pytest.mark.nightly),
        pytest.param("around the compiled module", False, marks=pytest.mark.nightly),
    ],
)
def test_recomputation_sees_the_same_samples(where, reentrant):
    module = ffn()
    x = X.clone().requires_grad_()

    def run(call):
        torch.manual_seed(11)
        call(x).square().sum().backward()
        x.grad = None
        return gradients(module)

    plain = run(compiled(module))
    if where == "in the graph":
        call = compiled(lambda x: checkpoint(module, x, use_reentrant=reentrant))
    else:
        inner = compiled(module)
        call = lambda x: checkpoint(inner, x, use_reentrant=reentrant)  # noqa: E731
    assert same(run(call), plain)


def test_graphs_with_dropout_draw_theirs_apart():
    """Dropout in the graph is functionalised by the compiler; neither takes the other's numbers."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 128), nn.Dropout(0.5), nn.GELU(), nn.Linear(128, 64))
    call = compiled(module)

    def run():
        torch.manual_seed(13)
        y = call(X)
        y.square().sum().backward()
        return [y.detach(), *gradients(module)]

    assert same(run(), run())


def test_generated_code_saves_the_seed():
    """Inductor neither moves it to backward nor draws it anew, whatever else the recipe asks of gradients."""
    module = nn.Sequential(nn.Linear(64, 64))
    recipe = replace(SSTE, grad_format=GradFormat.E5M2, rounding=Rounding.STOCHASTIC)
    call = compiled(module, executor="inductor", recipe=recipe, targets="all")
    torch.manual_seed(17)
    first, second = call(X), call(X)
    state = torch.get_rng_state()
    second.square().sum().backward()
    of_second = gradients(module)
    first.square().sum().backward()
    of_first = gradients(module)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(17)
    for expected in (of_first, of_second):
        call(X).square().sum().backward()
        assert same(gradients(module), expected)
    decisions = {row.decision for row in sparse_compile.report().rows}
    assert decisions == {"s-ste (2:4 fp8, fp8, 2:4 fp8; e5m2 gradients; stochastic rounding)"}
