"""What a graph was compiled with is asked again at each call: weights that are frozen, trained, told, loaded."""

import pytest
import torch

import sparse_compile

EAGER = {"sste.executor": "eager", "sste.when": "always"}


def compiled(model, **options):
    return torch.compile(model, backend="sste", options=EAGER | {f"sste.{name}": v for name, v in options.items()})


def distance(actual, expected):
    return float((actual - expected).detach().norm() / expected.detach().norm())


def train(run, optimizer, steps=2):
    for _ in range(steps):
        run(torch.randn(16, 64, requires_grad=True)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def decisions():
    """Of each graph in the report."""
    return [{row.decision.split()[0] for row in graph.rows} for graph in sparse_compile.report().graphs]


@pytest.mark.parametrize(
    ("dynamic", "executor"),
    [
        (True, "eager"),
        *(
            pytest.param(*other, marks=pytest.mark.nightly)
            for other in ((False, "eager"), (True, "inductor"), (False, "inductor"))
        ),
    ],
)
def test_frozen_then_trained_then_frozen(executor, dynamic, ffn):
    """A discriminator in the generator's step, and in its own."""
    model, x = ffn(), torch.randn(32, 64, requires_grad=True)
    run = torch.compile(model, backend="sste", dynamic=dynamic, options=EAGER | {"sste.executor": executor})
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model.requires_grad_(False)
    assert distance(run(x), model(x)) < 0.01, "never trained: dense"
    model.requires_grad_(True)
    # Of the size that is evaluated later, which needs no graph of its own then.
    for _ in range(2):
        run(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = run(x)
    model.requires_grad_(False)
    for tokens in (32, 24, 32):
        frozen = run(x[:tokens])
        assert distance(frozen, trained[:tokens]) < 1e-6
        (slope,) = torch.autograd.grad(frozen.sum(), x)
        assert slope[:tokens].abs().sum() > 0
    assert {"dense"} in decisions()
    assert {"s-ste"} in decisions()


def test_the_report_has_the_variants_that_ran(ffn):
    model = ffn().requires_grad_(False)
    run = compiled(model)
    with torch.no_grad():
        run(torch.randn(16, 64))
        assert decisions() == [{"dense"}]
        sparse_compile.set_beta(model, {"up.weight": 1.5, "down.weight": 1.5})
        run(torch.randn(16, 64))
        run(torch.randn(16, 64))
    assert decisions() == [{"dense"}, {"s-ste"}]
    assert [graph.calls for graph in sparse_compile.report().graphs] == [1, 2]


def test_one_of_two_weights(ffn):
    model, x = ffn().requires_grad_(False), torch.randn(16, 64)
    run = compiled(model)
    with torch.no_grad():
        dense = run(x)
        sparse_compile.set_beta(model, {"up.weight": 1.5})
        assert distance(run(x), dense) > 0.1
    rows = {row.module: row.decision.split()[0] for row in sparse_compile.report().graphs[-1].rows}
    assert rows == {"up": "s-ste", "down": "dense"}


def test_a_dense_checkpoint_in_a_frozen_24_model(ffn):
    trained, x = ffn(), torch.randn(32, 64)
    compiled(trained)(x).sum().backward()
    sparse_compile.finalize(trained)
    for how in ("load_state_dict", "data", "assign"):
        served = ffn()
        served.load_state_dict(trained.state_dict())
        served.requires_grad_(False)
        run = compiled(served, frozen="sparse")
        with torch.no_grad():
            assert 0 < distance(run(x), served(x)) < 0.1, how
            for state, bound in ((ffn().state_dict(), 1e-6), (trained.state_dict(), 0.1)):
                if how == "data":
                    for name, parameter in served.named_parameters():
                        parameter.data.copy_(state[name])
                else:
                    served.load_state_dict(state, assign=how == "assign")
                    served.requires_grad_(False)
                assert distance(run(x), served(x)) < bound, how
        assert [graph.calls for graph in sparse_compile.report().graphs if graph.rewritten][-1] >= 1


def test_a_frozen_24_weight_that_an_adapter_was_merged_into_is_dense_after_invalidate(ffn):
    """Through ``.data``, in training, where nobody looks."""
    served, x = ffn().requires_grad_(False), torch.randn(32, 64)
    for weight in (served.up.weight, served.down.weight):
        weight.copy_(sparse_compile.kernels.reference.soft_threshold24(weight))
    run = compiled(served, frozen="sparse", recipe="s-ste-bf16")
    assert 0 < distance(run(x), served(x)) < 0.1
    for weight in (served.up.weight, served.down.weight):
        weight.data += 0.1 * torch.randn_like(weight)
    sparse_compile.invalidate(served)
    assert distance(run(x), served(x)) < 1e-6


@pytest.mark.by_day(1)
@pytest.mark.parametrize("again", [{}, {"warmup": 1}, {"tail": 1, "total_steps": 100}], ids=str)
def test_a_schedule_ends_with_its_compilation(again, ffn):
    """At its old end nothing is written."""
    model = ffn()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    train(compiled(model, tail=2, total_steps=5), optimizer, 2)
    torch._dynamo.reset()
    before = model.up.weight.detach().clone()
    train(compiled(model, **again), optimizer, 4)
    assert torch.equal(model.up.weight, before)


@pytest.mark.nightly
def test_an_evaluation_without_the_schedule_follows_that_of_training(ffn):
    """Compiled on its own, of a model in its dense warm-up."""
    model, x = ffn(), torch.randn(16, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = compiled(model, warmup=3)
    train(step, optimizer, 1)
    with torch.no_grad():
        assert torch.equal(compiled(model)(x), step(x))
    train(step, optimizer, 3)
    with torch.no_grad():
        assert torch.equal(compiled(model)(x), step(x))


def test_weights_loaded_after_an_evaluation_start_clean(ffn):
    """Of a 2:4 checkpoint above all, whose scale is 1."""
    trained, x = ffn(), torch.randn(32, 64)
    compiled(trained)(x).sum().backward()
    sparse_compile.finalize(trained)
    fresh, warm = ffn(), ffn()
    fresh.load_state_dict(trained.state_dict())
    run = compiled(warm)
    with torch.no_grad():
        run(x)
    run(x).sum().backward()  # and a sanity check
    warm.zero_grad()
    warm.load_state_dict(trained.state_dict())
    with torch.no_grad():
        assert torch.equal(run(x), compiled(fresh)(x))
    assert sparse_compile.beta(warm) == {"up.weight": 1.0, "down.weight": 1.0}


def into_a_buffer(run, x):
    out = torch.zeros(32, 64)
    run(x, out)
    return out


def into_a_part_of_a_buffer(run, x):
    out = torch.zeros(64, 64)
    run(x, out[32:])
    return out[32:] * 1.0


def read_through_what_was_written_to(run, x):
    out = torch.zeros(64, 64)
    run(x, out[32:])
    return out


def written_to_what_was_returned(run, x):
    return run(x).add_(1.0)


@pytest.mark.by_day(2)
@pytest.mark.parametrize(
    "call", [into_a_buffer, into_a_part_of_a_buffer, read_through_what_was_written_to, written_to_what_was_returned]
)
def test_a_gradient_is_seen_whichever_way_it_comes(call, ffn):
    """A weight is trained pruned if a gradient passed, not if it passed what was returned."""

    class Net(ffn):
        def forward(self, x, out=None):
            y = super().forward(x)
            if out is None:
                return y.view(4, 8, 64)
            out.copy_(y)
            return None

    model, x = Net(), torch.randn(32, 64)
    run, optimizer = compiled(model), torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.no_grad():
        call(run, x)
    for _ in range(2):
        call(run, x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert {entry["sste_pruned"] for entry in optimizer.state_dict()["state"].values() if entry} == {1}


def test_what_a_gradient_comes_through_is_not_what_was_handed_in(ffn):
    """Of an input that is not written to, gradients say nothing of the weights."""
    model, x = ffn(), torch.randn(32, 64, requires_grad=True)
    run, optimizer = compiled(model), torch.optim.SGD(model.parameters(), lr=0.1)
    before = x * 2.0
    run(before)
    before.sum().backward()
    optimizer.step()
    assert {entry["sste_pruned"] for entry in optimizer.state_dict()["state"].values() if entry} == {0}


@pytest.mark.by_day(1)
@pytest.mark.parametrize("recipe", ["fp8", "s-ste"])
def test_a_weight_that_is_written_to_before_it_is_read(recipe, ffn):
    """It is multiplied as it is then, or not at all: trained dense it is not FP8, trained pruned it is an error."""

    class Net(ffn):
        clips = False

        def forward(self, x):
            if self.clips:
                with torch.no_grad():
                    self.up.weight.mul_(0.5)
            return super().forward(x)

    fresh, model, x = Net(), Net(), torch.randn(32, 64)
    fresh.down.requires_grad_(False)  # dense
    train(compiled(model), torch.optim.SGD(model.parameters(), lr=0.1))
    fresh.clips = model.clips = True
    twice = fresh.up.weight.detach() * 0.5, model.up.weight.detach() * 0.5
    with torch.no_grad():
        y = compiled(fresh, recipe=recipe)(x)
        assert torch.equal(fresh.up.weight, twice[0])
        assert distance(y, ffn.forward(fresh, x)) < 0.01
        run = compiled(model, recipe=recipe)
        if recipe == "s-ste":
            with pytest.raises(Exception, match="'up' was trained pruned, and mul_ writes to its weight"):
                run(x)
        else:
            assert distance(run(x), ffn.forward(model, x)) < 0.1
            assert torch.equal(model.up.weight, twice[1])


@pytest.mark.by_day(1)
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_weight_that_is_written_to_follows_no_schedule(dynamic, ffn):
    """It is dense, and no error, in the warm-up of the others and after it."""

    class Net(ffn):
        def forward(self, x):
            with torch.no_grad():
                self.up.weight.clamp_(-0.1, 0.1)
            return super().forward(x)

    model = Net()
    options = EAGER | {"sste.warmup": 1}
    run = torch.compile(model, backend="sste", dynamic=dynamic, options=options)
    train(run, torch.optim.SGD(model.parameters(), lr=0.1), 3)
    assert set(sparse_compile.beta(model)) == {"down.weight"}
