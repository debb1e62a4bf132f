"""What a call leaves behind of a weight: nothing without a backward, and nothing for steps that others make."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import shared_graphs
import sparse_compile
from sparse_compile.weights.pattern_24 import is_24

clean_slate = shared_graphs.kept
uncompiled = shared_graphs.uncompiled
pytestmark = [
    pytest.mark.usefixtures("uncompiled"),
    pytest.mark.filterwarnings("ignore:.*no kernels for cpu"),
]

EAGER = {"sste.executor": "eager", "sste.when": "always"}
X, LABELS = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)), torch.arange(64)


class FFN(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Classifier(nn.Module):
    """Its last linear is trained dense, because its graph has the loss; without labels it looks like any FFN's."""

    def __init__(self):
        super().__init__()
        self.body, self.head = FFN(), FFN()

    def forward(self, x, labels=None):
        logits = self.head(F.layer_norm(x + self.body(x), (64,)))
        return logits if labels is None else F.cross_entropy(logits, labels)


def compiled(model, **options):
    return torch.compile(
        model, backend="sste", options=EAGER | {f"sste.{name}": value for name, value in options.items()}
    )


def train(run, optimizer, *inputs, steps=3):
    for _ in range(steps):
        run(*inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def trained_classifier():
    model = Classifier()
    run = compiled(model)
    train(run, torch.optim.AdamW(model.parameters(), lr=1e-3), X, LABELS)
    return model, run


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


# Training that goes on without rewritten linears that read the weights.
OTHERS = {
    "no compilation": lambda model: model,
    "another backend": lambda model: torch.compile(model, backend="aot_eager"),
    "no kernels": lambda model: compiled(model, recipe="fp8", when="faster"),
    "left as they are": lambda model: compiled(model, recipe="ste-bf16", targets="ffn-up"),
}
by_others = pytest.mark.parametrize("others", OTHERS.values(), ids=OTHERS.keys())


@pytest.mark.by_day(1)
@by_others
def test_masked_decay_ends_with_the_training_that_asked_for_it(others):
    model = FFN()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    decaying = compiled(model, recipe="sr-ste", decay=0.1)

    def moved(run):
        before = model.down.weight.detach().clone()
        (run(X) * 0.0).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        return distance(model.down.weight, before)

    assert moved(decaying) > 0.01
    assert moved(others(model)) == 0.0
    assert moved(decaying) > 0.01


@pytest.mark.by_day(1)
@by_others
def test_a_schedule_writes_after_a_step_of_its_own_alone(others):
    model = FFN()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scheduled = compiled(model, recipe="ste", tail=2, total_steps=5)
    train(scheduled, optimizer, X, steps=2)
    before = model.down.weight.detach().clone()
    train(others(model), optimizer, X, steps=3)
    assert torch.equal(model.down.weight, before)
    train(scheduled, optimizer, X, steps=1)  # goes on in its tail
    assert is_24(model.down.weight, -1)


@pytest.mark.by_day(2)
@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({}, {"beta": 1.7}),
        ({"beta": 1.7}, {}),
        ({}, {"recipe": "s-ste-transposable"}),
        ({"recipe": "s-ste-transposable"}, {}),
    ],
    ids=str,
)
def test_an_evaluation_decides_no_scale_of_other_options(first, then):
    def scales(evaluated):
        torch.manual_seed(0)
        model = FFN()
        if evaluated:
            with torch.no_grad():
                compiled(model, **first)(X)
        train(compiled(model, **then), torch.optim.SGD(model.parameters(), lr=1e-3), X, steps=1)
        return sparse_compile.beta(model)

    assert scales(True) == pytest.approx(scales(False))


@pytest.mark.by_day(1)
@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize(("first", "then"), [("s-ste", "s-ste-transposable"), ("s-ste-transposable", "s-ste")])
def test_another_projection_has_a_scale_of_its_own(first, then, resumed):
    torch.manual_seed(0)
    model = FFN()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    train(compiled(model, recipe=first), optimizer, X)
    scale = sparse_compile.beta(model)["up.weight"]
    if resumed:
        state, (model, before) = optimizer.state_dict(), (copy.deepcopy(model), model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        optimizer.load_state_dict(state)
        assert sparse_compile.beta(model) == sparse_compile.beta(before)
    train(compiled(model, recipe=then), optimizer, X, steps=1)
    fresh = FFN()
    fresh.load_state_dict(model.state_dict())
    compiled(fresh, recipe=then)(X)
    assert sparse_compile.beta(model)["up.weight"] == pytest.approx(sparse_compile.beta(fresh)["up.weight"], rel=0.01)
    assert abs(sparse_compile.beta(model)["up.weight"] / scale - 1) > 0.1
    train(compiled(model, recipe=then), optimizer, X)
    assert sparse_compile.beta(model)["up.weight"] == pytest.approx(sparse_compile.beta(fresh)["up.weight"], rel=0.01)


def test_a_scale_is_found_after_a_recipe_that_has_none():
    model = FFN()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    train(compiled(model, recipe="ste"), optimizer, X)
    run = compiled(model, recipe="s-ste")
    train(run, optimizer, X, steps=1)
    scales = sparse_compile.beta(model)
    assert scales.keys() == {"up.weight", "down.weight"}
    train(run, optimizer, X)
    assert sparse_compile.beta(model) == scales
    with torch.no_grad():
        expected = run(X)
    sparse_compile.finalize(model)
    assert distance(model(X), expected) < 0.1


def test_a_forward_without_backward_leaves_no_trace():
    _, run = trained_classifier()
    with torch.no_grad():
        before = run(X)
    run(X)  # records gradients, and none comes
    with torch.no_grad():
        assert torch.equal(run(X), before)


@pytest.mark.parametrize("head", ["fp8", "dense"])
@pytest.mark.by_day(1)
def test_an_evaluation_before_training_leaves_no_trace(head):
    model = Classifier()
    run = compiled(model, head=head)
    with torch.no_grad():
        run(X)
    assert "head.down.weight" in sparse_compile.beta(model)  # until it is trained dense
    train(run, torch.optim.AdamW(model.parameters(), lr=1e-3), X, LABELS)
    assert "head.down.weight" not in sparse_compile.beta(model)
    with torch.no_grad():
        expected = run(X)
    sparse_compile.finalize(model)
    assert not is_24(model.head.down.weight, -1)
    assert distance(model(X), expected) < 0.1


@pytest.mark.by_day(1)
@pytest.mark.parametrize("make", [copy.deepcopy, torch.optim.swa_utils.AveragedModel])
def test_a_copy_that_is_told_the_scales_is_dense_where_it_has_none(make):
    model, run = trained_classifier()
    average = make(model)
    sparse_compile.set_beta(average, sparse_compile.beta(model))
    with torch.no_grad():
        assert distance(compiled(average)(X), run(X)) < 1e-3


@pytest.mark.by_day(1)
@pytest.mark.parametrize("swapped", [False, True])
def test_what_is_loaded_through_data_behind_an_evaluation_is_looked_at(swapped):
    """Into a model that is evaluated as a finalized one, whose last linear was trained dense."""
    model, _ = trained_classifier()
    sparse_compile.finalize(model)
    loaded = Classifier()
    evaluate = compiled(loaded)
    with torch.no_grad():
        evaluate(X)
        for parameter, value in zip(loaded.parameters(), model.parameters(), strict=True):
            if swapped:
                parameter.data = value.data.clone()
            else:
                parameter.data.copy_(value)
        assert distance(evaluate(X), loaded(X)) < 0.1


@pytest.mark.by_day(3)
@pytest.mark.parametrize(
    ("trained", "evaluated"),
    [
        ("s-ste", "s-ste-transposable"), ("s-ste", "ste"), ("s-ste", "fp8"), ("s-ste-transposable", "s-ste"),
        ("ste", "s-ste"), ("t-sr-ste", "ste"),
    ],
)  # fmt: skip
def test_an_evaluation_by_another_recipe_is_refused(trained, evaluated):
    model = FFN()
    train(compiled(model, recipe=trained), torch.optim.SGD(model.parameters(), lr=1e-3), X, steps=1)
    evaluate = compiled(model, recipe=evaluated)
    with torch.no_grad(), pytest.raises(ValueError, match=rf"'(up|down)' was trained pruned by .* '{trained}'"):
        evaluate(X)
    sparse_compile.finalize(model)
    if evaluated == "s-ste-transposable":
        return  # which prunes it once more
    with torch.no_grad():
        assert distance(evaluate(X), model(X)) < 0.1


def test_a_finalized_weight_is_not_pruned_along_another_dimension_as_well():
    model = FFN()
    train(compiled(model), torch.optim.SGD(model.parameters(), lr=1e-3), X, steps=1)
    sparse_compile.finalize(model)
    with torch.no_grad(), pytest.raises(ValueError, match=r"was trained pruned by .* 's-ste'"):
        compiled(model, recipe="s-ste-transposable")(X)


@pytest.mark.by_day(2)
@pytest.mark.parametrize(
    ("trained", "evaluated"), [("s-ste", "s-ste-bf16"), ("fp8", "s-ste"), ("fp8", "ste"), ("fp8", "s-ste-bf16")]
)
def test_an_evaluation_by_another_recipe_computes_what_training_did(trained, evaluated):
    model = FFN()
    run = compiled(model, recipe=trained)
    train(run, torch.optim.SGD(model.parameters(), lr=1e-3), X, steps=1)
    with torch.no_grad():
        assert distance(compiled(model, recipe=evaluated)(X), run(X)) < 0.1
