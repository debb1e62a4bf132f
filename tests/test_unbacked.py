"""Sizes that are known at run time alone: no branch on them, whatever the recipe, and none, one or many tokens."""

from dataclasses import replace

import pytest
import torch
import torch._dynamo.config
import torch.nn.functional as F
from torch import nn

import sparse_compile
from sparse_compile.recipe import SSTE, Gemm

OPTIONS = {"sste.executor": "eager", "sste.when": "always"}
RECIPES = ["t-sr-ste"]
# Of the same operands as the one whose dgrad is 2:4, too, and that of the other tests.
OTHERS = ["s-ste", "s-ste-approximate", "s-ste-bf16", "ste", "fp8"]


@pytest.fixture(autouse=True)
def sizes_are_captured():
    captured = {"capture_dynamic_output_shape_ops": True, "capture_scalar_outputs": True}
    with torch._dynamo.config.patch(**captured):
        yield


class Expert(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.up, self.down = nn.Linear(64, 128, bias=bias), nn.Linear(128, 64, bias=bias)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


def by_where(expert, x, chosen):
    rows = torch.where(chosen)[0]
    return torch.zeros_like(x).index_add(0, rows, expert(x[rows]))


def by_nonzero(expert, x, chosen):
    rows = chosen.nonzero().squeeze(1)
    return expert(x.index_select(0, rows)).sum(0)


def by_mask(expert, x, chosen):
    return expert(x[chosen]).sum(0)


def by_masked_select(expert, x, chosen):
    return expert(x.masked_select(chosen[:, None]).view(-1, 64)).sum(0)


def by_unique(expert, x, chosen):
    return expert(x[torch.unique(torch.where(chosen)[0])]).sum(0)


def by_repetition(expert, x, chosen):
    return expert(x.repeat_interleave(2 * chosen.long(), dim=0)).sum(0)


def by_number(expert, x, chosen):
    count = chosen.sum().item()
    torch._check(count >= 0)
    torch._check(count <= x.shape[0])
    return expert(x[:count]).sum(0)


def in_three_dimensions(expert, x, chosen):
    rows = torch.where(chosen)[0]
    return expert(x[rows].unflatten(1, (1, 64))).sum(0)


WAYS = [by_repetition, by_number, in_three_dimensions]
# The other tests have by_where and by_mask, and the rest are much the same.
OTHER_WAYS = [by_where, by_nonzero, by_mask, by_masked_select, by_unique]


class Routed(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.expert, self.way = Expert(), way

    def forward(self, x, chosen):
        return self.way(self.expert, x, chosen)


def results(module, call, x, chosen):
    module.zero_grad()
    x = x.clone().requires_grad_()
    given = call(x, chosen)
    outputs = given if isinstance(given, list) else [given]
    sum(y.square().sum() for y in outputs).backward()
    return [*(y.detach() for y in outputs), x.grad, *(weight.grad.clone() for weight in module.parameters())]


def assert_alike(module, call, *inputs, noise=0.2):
    for value, expected in zip(results(module, call, *inputs), results(module, module, *inputs), strict=True):
        assert (value - expected).norm() <= noise * expected.norm()


def chosen(*rows):
    mask = torch.zeros(32, dtype=torch.bool)
    mask[list(rows)] = True
    return mask


TOKENS = [chosen(), chosen(5), chosen(*range(0, 32, 2)), chosen(*range(32))]


class SideBySide(nn.Module):
    """Each way with an expert of its own."""

    def __init__(self, ways):
        super().__init__()
        self.routed = nn.ModuleList(map(Routed, ways))

    def forward(self, x, chosen):
        return [routed(x, chosen) for routed in self.routed]


@pytest.mark.parametrize(
    "ways",
    [
        pytest.param(WAYS, id="side by side"),
        *(pytest.param([way], id=way.__name__, marks=pytest.mark.nightly) for way in (*WAYS, *OTHER_WAYS)),
    ],
)
def test_any_number_of_tokens(ways):
    """Outputs and gradients are those of the eager dense model, up to the noise of FP8: one graph for all."""
    module, x = SideBySide(ways), torch.randn(32, 64)
    options = OPTIONS | {"sste.recipe": "fp8"}
    call = torch.compile(module, backend="sste", options=options, fullgraph=True)
    for mask in TOKENS:
        assert_alike(module, call, x, mask)
    (graph,) = sparse_compile.report().graphs
    assert graph.rewritten == 2 * len(ways)
    assert {row.shape.split()[0] for row in graph.rows} == {"?"}
    assert {row.tokens for row in graph.rows} == {None}
    assert str(sparse_compile.report())


@pytest.mark.by_day(1)
@pytest.mark.parametrize(
    "options",
    [
        *({"sste.recipe": name} for name in RECIPES),
        *(pytest.param({"sste.recipe": name}, marks=pytest.mark.nightly) for name in OTHERS),
        pytest.param({"sste.recipe": replace(SSTE, dgrad=Gemm.MVUE24)}, marks=pytest.mark.nightly),
    ],
    ids=str,
)
def test_all_recipes(options):
    module, x = Routed(by_where), torch.randn(32, 64)
    call = torch.compile(module, backend="sste", options=OPTIONS | options, fullgraph=True)
    for mask in TOKENS:
        y, grad, *weights = results(module, call, x, mask)
        assert all(bool(value.isfinite().all()) for value in (y, grad, *weights))
        assert bool((y[~mask] == 0).all())
        assert [bool(weight.any()) for weight in weights] == [bool(mask.any())] * 4


@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.nightly)])
def test_a_dimension_that_is_marked(dynamic):
    module = Expert()
    call = torch.compile(module, backend="sste", options=OPTIONS | {"sste.recipe": "fp8"}, dynamic=dynamic)
    for count in (7, 1, 0, 40):
        x = torch.randn(count, 64)
        torch._dynamo.decorators.mark_unbacked(x, 0)

        def run(x, call):
            module.zero_grad()
            y = call(x)
            y.square().sum().backward()
            return [y, *(weight.grad.clone() for weight in module.parameters())]

        for value, expected in zip(run(x, call), run(x, module), strict=True):
            assert (value - expected).norm() <= 0.1 * expected.norm()
    (graph,) = sparse_compile.report().graphs
    assert "x.size(0) = u0 (depends on data)" in graph.dynamic


@pytest.mark.nightly
def test_in_a_checkpointed_region():
    module, x = Routed(by_mask), torch.randn(32, 64)

    def checkpointed(x, mask):
        rows = torch.where(mask)[0]
        return torch.utils.checkpoint.checkpoint(module.expert, x[rows], use_reentrant=False).sum(0)

    call = torch.compile(checkpointed, backend="sste", options=OPTIONS | {"sste.recipe": "fp8"}, fullgraph=True)
    for mask in TOKENS:
        assert_alike(module, call, x, mask)


@pytest.mark.nightly
def test_experts_side_by_side():
    """Several unknown numbers of tokens in one graph."""

    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.router, self.experts = nn.Linear(64, 2), nn.ModuleList(Expert(bias=False) for _ in range(2))

        def forward(self, x, _):
            shares = self.router(x).softmax(-1)
            best, y = shares.argmax(-1), torch.zeros_like(x)
            for index, expert in enumerate(self.experts):
                mine = torch.where(best == index)[0]
                y = y.index_add(0, mine, expert(x[mine]) * shares[mine, index : index + 1])
            return y

    module = Mixture()
    options = OPTIONS | {"sste.recipe": "fp8"}
    call = torch.compile(module, backend="sste", options=options, fullgraph=True)
    assert_alike(module, call, torch.randn(64, 64), None)
    assert_alike(module, call, torch.randn(1, 64).expand(64, 64), None)  # one expert gets all of them
