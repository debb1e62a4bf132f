"""A weight is computed with as it was trained, whatever part it plays in another graph."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparse_compile
from ffn_training import EAGER, compiled, states
from sparse_compile import runtime
from sparse_compile.torch_internals.weak_tensors import weak
from sparse_compile.weights.registry import find_record
from sparse_compile.weights.target_pattern import NamedLinear, TargetPattern


class Net(nn.Module):
    """An FFN; what it returns besides, and where its graph ends, is asked for."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x, labels=None, features=False, breaks=False, penalty=False):
        hidden = self.up(x)
        if features:
            return hidden
        if breaks:
            torch._dynamo.graph_break()
        logits = self.down(F.gelu(hidden))
        if labels is not None:
            return logits, F.cross_entropy(logits, labels)
        return (logits, self.up.weight.abs().sum()) if penalty else logits


TOKENS = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(32)


def logits(output):
    return output[0] if isinstance(output, tuple) else output


def loss(output):
    if isinstance(output, tuple) and output[1].ndim == 0:
        return output[1] + output[0].square().mean()
    return logits(output).square().mean()


def trained(run, model, steps=3, **how):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        loss(run(TOKENS, **how)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def distance(actual, expected):
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.by_day(3)
@pytest.mark.parametrize(
    ("training", "evaluation"),
    [
        ({"labels": LABELS}, {}),
        ({}, {"labels": LABELS}),
        ({"breaks": True}, {}),
        ({}, {"breaks": True}),
        ({"penalty": True}, {}),
        ({}, {"penalty": True}),
    ],
    ids=["labels", "no labels", "break", "no break", "penalty", "no penalty"],
)
def test_an_evaluation_computes_what_training_did(training, evaluation):
    model = Net()
    run = compiled(model)
    trained(run, model, **training)
    expected = logits(run(TOKENS, **training)).detach()
    with torch.no_grad():
        assert distance(logits(run(TOKENS, **evaluation)), expected) < 0.1


def test_the_features_of_a_pruned_ffn_are_of_its_pruned_weight():
    model = Net()
    run = compiled(model)
    trained(run, model)
    with torch.no_grad():
        features = run(TOKENS, features=True)
        assert distance(features, F.linear(TOKENS, pruned_up(model), model.up.bias)) < 0.1
        assert distance(features, model.up(TOKENS)) > 0.3


def pruned_up(model):
    finalized = Net()
    finalized.load_state_dict(model.state_dict())
    finalized.up.weight.data = sparse_compile.kernels.reference.soft_threshold24(model.up.weight.data)
    return finalized.up.weight * sparse_compile.beta(model)["up.weight"]


def test_what_one_graph_trains_pruned_another_of_the_same_options_does_too():
    """Else it would be dense after a step of the other, and get a new scale in each."""
    model = Net()
    run = compiled(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scales = []
    for _ in range(4):
        (run(TOKENS).square().mean() + run(TOKENS, features=True).square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        scales.append(sparse_compile.beta(model)["up.weight"])
    assert len(set(scales)) == 1
    assert find_record(model.up.weight).pruned


def test_other_options_begin_anew():
    """Attention projections that were targets, and are none of the next run: these train them dense."""
    model = Net()
    trained(compiled(model), model)
    assert find_record(model.down.weight).pruned
    torch.compiler.reset()
    run = compiled(model, EAGER | {"sste.targets": "ffn-up"})
    trained(run, model)
    assert not find_record(model.down.weight).pruned
    assert find_record(model.up.weight).pruned
    with torch.no_grad():
        expected = model.down(F.gelu(run(TOKENS, features=True)))
        assert distance(run(TOKENS), expected) < 0.1


def test_a_resumed_run_goes_on_pruned_in_whatever_graph_comes_first():
    model, resumed = Net(), Net()
    state = trained(compiled(model), model).state_dict()
    resumed.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(resumed.parameters(), lr=0.1, momentum=0.9)
    optimizer.load_state_dict(state)
    run = compiled(resumed)
    with torch.no_grad():
        features = run(TOKENS, features=True)
        assert distance(features, F.linear(TOKENS, pruned_up(model), model.up.bias)) < 0.1
    for _ in range(2):
        (run(TOKENS, features=True).square().mean() + run(TOKENS).square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert find_record(resumed.up.weight).pruned


class TopK(nn.Module):
    """Of an autoencoder: training keeps the largest elements of all, an evaluation what exceeds a threshold."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x, labels=None):
        hidden = F.relu(self.up(x))
        if labels is None:
            return self.down(hidden * (hidden > 0.3))
        largest = hidden.flatten().topk(32 * len(x))
        kept = torch.zeros_like(hidden).flatten().scatter(0, largest.indices, largest.values).view_as(hidden)
        out = self.down(kept)
        return out, F.mse_loss(out, x)


@pytest.mark.by_day(1)
@pytest.mark.parametrize(("momentum", "pruned_too"), [(0.9, True), (0.9, False), (0.0, True)])
def test_a_resumed_evaluation_computes_densely_what_was_trained_so(momentum, pruned_too):
    """An optimizer that keeps nothing of its weights tells it by what else it has trained pruned."""

    def make():
        model = nn.ModuleDict({"dense": TopK(), **({"pruned": Net()} if pruned_too else {})})
        runs = [compiled(part) for part in model.values()]
        return model, runs, torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)

    model, runs, optimizer = make()
    for _ in range(3):
        sum(loss(run(TOKENS, **labels)) for run, labels in zip(runs, ({"labels": LABELS}, {}), strict=False)).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        expected = [run(TOKENS) for run in runs]
    checkpoint = model.state_dict(), optimizer.state_dict()
    for _ in range(2):  # what was resumed and only evaluated is saved as it was
        again, resumed, other = make()
        again.load_state_dict(checkpoint[0])
        other.load_state_dict(checkpoint[1])
        with torch.no_grad():
            assert all(distance(run(TOKENS), each) < 1e-6 for run, each in zip(resumed, expected, strict=True))
        checkpoint = again.state_dict(), other.state_dict()


@pytest.mark.by_day(1)
@pytest.mark.parametrize("evaluated_before", [False, True])
def test_what_training_left_dense_of_a_finalized_model_is_evaluated_so(evaluated_before):
    """In another process nothing says it but that others are 2:4; the weights may be loaded behind an evaluation."""

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = Net(), Net()

        def forward(self, x, labels=None):
            x = x + self.body(x)
            return self.head(x, labels)[1] if labels is not None else self.head(x)

    model = Classifier()
    run, optimizer = compiled(model), torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        run(TOKENS, LABELS).backward()
        optimizer.step()
        optimizer.zero_grad()
    sparse_compile.finalize(model)
    loaded = Classifier()
    evaluate = compiled(loaded)
    with torch.no_grad():
        if evaluated_before:
            evaluate(TOKENS)
        loaded.load_state_dict(model.state_dict())
        assert distance(evaluate(TOKENS), loaded(TOKENS)) < 0.1


def test_a_part_of_a_pruned_weight_is_refused_in_an_evaluation():
    model = nn.MultiheadAttention(64, 4, batch_first=True)
    run = compiled(lambda query, x: model(query, x, x, need_weights=False)[0], EAGER | {"sste.targets": "all"})
    x = torch.randn(2, 16, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run(x, x).square().mean().backward()
    optimizer.step()
    assert any("in_proj" in name for name in states(model))
    with torch.no_grad(), pytest.raises(ValueError, match=r"multiplied densely here .*in_proj_weight.* finalized copy"):
        run(x[:, -1:], x)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(x)))


def blocks(pattern):
    """Compiled one by one: dynamo traces the first, and another, of which the rest share the graph."""
    model = nn.Sequential(*(Block() for _ in range(4)))
    for block in model:
        block.compile(backend="sste", options=EAGER | {"sste.targets": pattern})
    return model


@pytest.mark.by_day(1)
@pytest.mark.parametrize("pattern", ["1.*", "2.*"])
def test_a_pattern_that_names_some_of_the_blocks_that_share_a_graph_is_refused(pattern):
    model = blocks(pattern)
    with pytest.raises(ValueError, match=r"names one of '1\.\w+' and '2\.\w+', but not the other.* such as 'up'"):
        model(TOKENS)


@pytest.mark.parametrize(("pattern", "other", "is_refused"), [
    ("0.*", "1.up", True), ("1.*", "1.up", True), ("0.*", "0.up", False), ("2.*", "1.up", False),
    ("up", "1.up", False), ("0.*", None, False),
])  # fmt: skip
def test_what_other_blocks_are_called_is_asked(pattern, other, is_refused):
    traced, called = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    linear = NamedLinear(position=1, name="0.up", path="up", weight=weak(traced))
    target = TargetPattern(pattern, ["0.up"], [linear], lambda weight: other if weight is called else None)
    target.check((None, traced))
    if is_refused:
        with pytest.raises(ValueError, match=r"names one of '0\.up' and '1\.up', but not the other.* such as 'up'"):
            target.check((None, called))
    else:
        target.check((None, called))


def test_a_pattern_may_name_what_all_blocks_have_in_common():
    model = blocks("up")
    trained(model, model)
    assert set(sparse_compile.beta(model)) == {f"{number}.up.weight" for number in range(4)}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def encode(self, x):
        return self.down(F.gelu(self.up(x)))

    def decode(self, x):
        return F.gelu(x @ self.down.weight) @ self.up.weight


@pytest.mark.by_day(1)
@pytest.mark.parametrize("recipe", ["s-ste", "s-ste-transposable"])
def test_two_graphs_do_not_prune_a_weight_along_two_dimensions(recipe):
    model = Tied()
    encode, decode = (compiled(part, EAGER | {"sste.recipe": recipe}) for part in (model.encode, model.decode))
    if recipe == "s-ste":
        with pytest.raises(Exception, match="transposed in another"):
            decode(encode(TOKENS))
    else:
        decode(encode(TOKENS)).square().mean().backward()
        assert model.up.weight.grad is not None


def test_an_evaluation_before_training_decides_nothing_for_those_after():
    after = []
    for evaluated_before in (False, True):
        model = Net()
        run = compiled(model)
        with torch.no_grad():
            if evaluated_before:
                run(TOKENS)  # of an FFN: pruned
        trained(run, model, features=True)  # of no FFN: dense
        with torch.no_grad():
            after.append(run(TOKENS))
    assert torch.equal(*after)


def test_blocks_that_share_a_graph_are_looked_up_once(monkeypatch):
    blocks = nn.ModuleList(Net() for _ in range(5))
    for block in blocks:
        block.compile(backend="sste", options=EAGER)

    def run(x):
        for block in blocks:
            x = block(x)
        return x

    trained(run, blocks)
    looked_up = []
    monkeypatch.setattr(runtime, "record_of", looked_up.append)
    monkeypatch.setattr(runtime, "standing_of", looked_up.append)
    trained(run, blocks, steps=1)
    assert not looked_up
