"""MEASURE: what is timed, when it is refused, and that training is the same to the last bit."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import sparse_compile
from sparse_compile import runtime
from sparse_compile.kernels import ops
from sparse_compile.measuring import baseline as measuring
from sparse_compile.reporting.model import GraphReport

EAGER = {"sste.executor": "eager", "sste.when": "always"}
MEASURED = EAGER | {"sste.report_measure": True}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Eventful(nn.Module):
    """Dropout, running statistics, a counter, a weight changed in place, and a graph break."""

    def __init__(self):
        super().__init__()
        self.inner, self.norm = nn.Linear(64, 64), nn.BatchNorm1d(64)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
        self.register_buffer("calls", torch.zeros(1))
        self.decayed = nn.Parameter(torch.ones(64))

    def forward(self, x):
        self.calls += 1
        with torch.no_grad():
            self.decayed.mul_(0.5)
        x = F.dropout(self.norm(self.down(F.gelu(self.up(x)))) * self.decayed, 0.5)
        torch._dynamo.graph_break()
        return F.dropout(self.inner(x), 0.1).square().mean()


def state_after_training(device, options):
    """Everything that training leaves behind, after three steps."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    random.seed(0)
    model = Eventful().to(device)
    compiled = torch.compile(model, backend="sste", options=options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    left = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = compiled(torch.randn(16, 64, device=device))
        loss.backward()
        left += [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]
        optimizer.step()
    left += model.state_dict().values()
    left += [value for kept in optimizer.state_dict()["state"].values() for value in kept.values()]
    left += [torch.get_rng_state(), torch.tensor(random.random()), torch.rand(4, device=device)]
    return left


@pytest.mark.parametrize("device", DEVICES)
def test_training_is_the_same_to_the_last_bit(device):
    expected = state_after_training(device, EAGER)
    first = len(sparse_compile.report().graphs)
    actual = state_after_training(device, MEASURED)
    graphs = sparse_compile.report().graphs[first:]
    assert [graph.not_measured for graph in graphs] == ["", ""]
    for graph in graphs:
        assert graph.measured.dense.backward.median > 0
        assert graph.measured.rewritten.backward.median > 0
    assert len(actual) == len(expected)
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(e)), index


def ffn():
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))


def run(model, *inputs, **more):
    """The graph's report after one call of a function that holds the model."""
    torch.compile(lambda *args: model(*args), backend="sste", options=MEASURED, **more)(*inputs)
    return sparse_compile.report().graphs[-1]


@pytest.mark.parametrize("device", DEVICES)
def test_times(device):
    graph = run(ffn().to(device), torch.randn(8, 64, device=device))
    measured = graph.measured
    for passes in (measured.dense, measured.rewritten):
        for spread in (passes.forward, passes.backward):
            assert 0 < spread.low <= spread.median <= spread.high
        assert (passes.peak_bytes is None) == (device == "cpu")
        assert device == "cpu" or passes.peak_bytes > 8 * 128 * 4  # the hidden activations at least
    assert measured.weights_ms > 0
    assert 0 < measured.casts_ms < measured.rewritten.total  # the inputs of both linears are transposed
    assert 0 < measured.mvue_ms < measured.rewritten.total
    assert graph.calls == 1


def test_without_gradients_there_is_no_backward():
    with torch.no_grad():
        measured = run(ffn(), torch.randn(8, 64)).measured
    assert measured.dense.backward is None
    assert measured.rewritten.backward is None
    assert measured.mvue_ms == 0
    assert measured.speedup == measured.dense.forward.median / (measured.rewritten.forward.median + measured.weights_ms)


def test_each_graph_is_measured_once(monkeypatch):
    results = []
    monkeypatch.setattr(runtime, "measure", lambda *arguments: results.append(1) or "no")
    compiled = torch.compile(ffn().forward, backend="sste", options=MEASURED)
    for _ in range(3):
        compiled(torch.randn(8, 64))
    assert results == [1]


class Tagged(torch.Tensor):
    pass


def test_refusals(monkeypatch):
    model = ffn()

    def in_place(x):
        return model(x.mul_(2))

    def mutated(x, view):
        x.add_(1)
        return model(view)

    leaf, base = torch.randn(8, 64, requires_grad=True), torch.randn(16, 64)
    cases = {
        "nothing is rewritten": (nn.Linear(64, 70), (torch.randn(8, 64),)),
        "changes an input in place that requires a gradient": (in_place, (leaf * 2,)),
        "some of its inputs share their memory": (mutated, (base[8:], base[:8])),
    }
    for message, (function, inputs) in cases.items():
        graph = run(function, *inputs)
        assert message in graph.not_measured
        assert graph.measured is None
        assert message in str(sparse_compile.report())
    slot = runtime.WeightSlot  # only counted
    baseline = measuring.Baseline(graph=None, compile=None, mutated=frozenset(), cuda_graphs=False)
    refusal = measuring._refusal(baseline, [slot], [torch.randn(2).as_subclass(Tagged)])
    assert refusal == "an input is a Tagged, which cannot be copied as a plain tensor can"
    monkeypatch.setattr(measuring, "several_processes", lambda: True)
    assert "several processes" in run(model, torch.randn(8, 64)).not_measured


def test_cuda_graphs_are_refused():
    options = MEASURED | {"triton.cudagraphs": True}
    torch.compile(ffn().forward, backend="sste", options=options)(torch.randn(8, 64))
    assert "the compiler runs CUDA graphs" in sparse_compile.report().graphs[-1].not_measured


def test_too_little_memory_is_said_and_training_goes_on(monkeypatch):
    def fail(*arguments):
        raise torch.OutOfMemoryError("tried to allocate 1 TiB")

    monkeypatch.setattr(measuring, "_measure", fail)
    graph = run(ffn(), torch.randn(8, 64))
    assert graph.not_measured == "a second forward and backward do not fit the memory: tried to allocate 1 TiB"
    assert graph.calls == 1


def test_neither_under_capture_nor_with_fake_inputs(monkeypatch):
    monkeypatch.setattr(runtime, "measure", lambda *arguments: "asked")
    report = GraphReport(rows=(), execution="kernels")
    called = runtime.Runtime(lambda *arguments: "ran", (), (), report, object())
    with FakeTensorMode():
        assert called(torch.empty(2)) == "ran"
    assert (report.not_measured, report.calls) == ("", 0)
    monkeypatch.setattr(runtime, "capturing", lambda: True)
    assert called(torch.empty(2)) == "ran"
    assert (report.not_measured, report.calls) == ("", 1)
    monkeypatch.setattr(runtime, "capturing", lambda: False)
    assert called(torch.empty(2)) == "ran"
    assert (report.not_measured, report.calls) == ("asked", 2)


def test_copies():
    """Parameters that are only read share their memory, with gradients of their own; the rest is copied as it lies."""
    parameter, changed = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))
    tensors = [torch.randn(6, 8)[1::2, ::3], torch.randn(1, 4).expand(3, 4), torch.randn(4, 3).t(), torch.empty(0, 2)]
    activation = torch.randn(2, 2, requires_grad=True) * 2
    arguments = [parameter, changed, 7, activation, *tensors]
    baseline = measuring.Baseline(graph=None, compile=None, mutated=frozenset({1}), cuda_graphs=False)
    copies = measuring._copies(baseline, arguments)
    assert copies[2] == 7
    for copy, original in zip(copies, arguments, strict=True):
        if isinstance(original, torch.Tensor):
            assert torch.equal(copy, original)
            assert copy.stride() == original.stride()
            assert copy.requires_grad == original.requires_grad
            assert copy.is_leaf
            assert copy is not original
    kept = {original.untyped_storage().data_ptr() for original in (parameter, changed, activation, *tensors[:3])}
    shared = [copies[index].untyped_storage().data_ptr() in kept for index in (0, 1, 3, 4, 5, 6)]
    assert shared == [True, False, False, False, False, False]
    copies[0].sum().backward()
    assert parameter.grad is None


def test_observed_ops():
    seen = []

    def observer(op, call, arguments):
        seen.append((op, len(arguments)))
        return call(*arguments)

    x = torch.zeros(128, 128, dtype=torch.float8_e4m3fn)
    with ops.observed(observer):
        assert ops.transpose_tokens(x).shape == (128, 128)
        with ops.observed(None):
            ops.transpose_tokens(x)
    ops.transpose_tokens(x)
    assert seen == [("transpose_tokens", 1)]
