"""DECIDE: a plan or a rejection for each linear; every reason has a row."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparse_compile.passes.decide import decide
from sparse_compile.passes.find import find
from sparse_compile.passes.flow import Flow
from sparse_compile.passes.parameter_owners import ParameterOwners
from sparse_compile.passes.sites import Reason
from sparse_compile.recipe import FP8, FP8_BACKWARD, HEAD, SSTE, SSTE_BF16, SSTE_TRANSPOSABLE, Gemm


def found(graph):
    result = find(Flow(graph))
    return result.sites, result.rejections


def decisions(graph, targets="ffn", recipe=SSTE, head=None):
    sites, _ = found(graph)
    plans, rejections = decide(sites, recipe, targets, ParameterOwners(), head=head)
    return {plan.site.name: plan.recipe for plan in plans}, {r.name: r.reason for r in rejections}


def test_ffn_gets_the_recipe_and_attention_dense_fp8(gpt_graph):
    plans, rejections = decisions(gpt_graph())
    assert plans == {"blocks.0.qkv": FP8, "blocks.0.proj": FP8, "blocks.0.up": SSTE, "blocks.0.down": SSTE}
    assert rejections == {"head": Reason.HEAD}


@pytest.mark.parametrize("gated", [False, True])
def test_the_first_linears_of_ffns_alone(gpt_graph, gated):
    plans, rejections = decisions(gpt_graph(gated=gated), "ffn-up")
    assert {name for name, recipe in plans.items() if recipe == SSTE} == {"blocks.0.up", "blocks.0.gate"} & plans.keys()
    assert plans["blocks.0.down"] == FP8
    assert rejections == {"head": Reason.HEAD}


def test_advice_names_the_smallest_targets_that_a_linear_is_one_of(gpt_graph):
    sites, _ = found(gpt_graph())
    plans, _ = decide(sites, SSTE, "ffn-up", ParameterOwners())
    said = {plan.site.name: plan.advice.partition("set ")[2] for plan in plans}
    ffn, everywhere = (f"'sste.targets': {targets!r}, or name it there" for targets in ("ffn", "all"))
    assert said == {"blocks.0.qkv": everywhere, "blocks.0.proj": everywhere, "blocks.0.up": "", "blocks.0.down": ffn}


def test_all_linears_but_the_head(gpt_graph):
    plans, rejections = decisions(gpt_graph(), "all")
    assert set(plans.values()) == {SSTE}
    assert len(plans) == 4
    assert rejections == {"head": Reason.HEAD}


@pytest.mark.parametrize("targets", ["ffn", "all", "*[hpu][erp]*"])
def test_of_all_linears_those_of_ffns_alone_get_a_larger_scale(gpt_graph, targets):
    sites, _ = found(gpt_graph())
    plans, _ = decide(sites, replace(SSTE, beta_factor=1.7), targets, ParameterOwners())
    factors = {plan.site.name: plan.recipe.beta_factor for plan in plans if plan.recipe.projection.prunes}
    named = {"blocks.0.proj": 1.7, "blocks.0.up": 1.7, "head": 1.7}
    ffn = {"blocks.0.up": 1.7, "blocks.0.down": 1.7}
    assert factors == {"ffn": ffn, "all": {"blocks.0.qkv": 1.0, "blocks.0.proj": 1.0, **ffn}}.get(targets, named)


@pytest.mark.parametrize("targets", ["ffn", "all"])
def test_the_head_in_dense_fp8_if_asked_for(gpt_graph, targets):
    sites, _ = found(gpt_graph())
    plans, rejections = decide(sites, SSTE, targets, ParameterOwners(), head=FP8)
    assert plans[-1].site.name == "head"
    assert plans[-1].recipe == FP8.for_head()
    assert rejections == []


def test_a_tied_head_stays_dense_also_if_asked_for(gpt_graph):
    sites, _ = found(gpt_graph(tied=True))
    _, rejections = decide(sites, SSTE, "ffn", ParameterOwners(), head=FP8)
    assert [rejection.reason for rejection in rejections] == [Reason.TIED]


def test_glob_names_the_targets_the_head_too(gpt_graph):
    plans, rejections = decisions(gpt_graph(), "*[hp][er][ao][dj]")
    others = {"blocks.0.qkv": FP8, "blocks.0.proj": SSTE, "blocks.0.up": FP8, "blocks.0.down": FP8}
    assert plans == {**others, "head": SSTE.for_head()}
    assert rejections == {}


@pytest.mark.parametrize("recipe", [FP8, FP8_BACKWARD, SSTE, SSTE_TRANSPOSABLE])
def test_dense_dgrad_of_the_head_alone_is_accurate(gpt_graph, recipe):
    """However the head gets its recipe: as a target or by an option."""
    as_target, _ = decisions(gpt_graph(), "*", recipe)
    given = {"head": recipe} if not recipe.projection.prunes else {}
    by_option, _ = decisions(gpt_graph(), "ffn", recipe, **given)
    accurate = Gemm.SPARSE24 if recipe.dgrad is Gemm.SPARSE24 else Gemm.FP8_ACCURATE
    for plans in (as_target, by_option):
        assert all(plan.dgrad is not Gemm.FP8_ACCURATE for name, plan in plans.items() if name != "head")
    assert as_target["head"].dgrad is accurate
    assert not given or by_option["head"].dgrad is accurate


def decide_while_tracing(model, batch, recipe, **questions):
    """Dynamo lets go of the real parameters when its backend returns."""
    decided = []

    def backend(graph, inputs):
        decided.append(decide(find(Flow(graph)).sites, recipe, "ffn", ParameterOwners(), **questions))
        return graph.forward

    torch.compile(model, backend=backend)(*batch)
    return decided[0]


@pytest.mark.parametrize("transposed", [False, True])
def test_frozen_weights_that_are_24(small_gpt, conv1d, batch, transposed):
    """Along the dimension that is in_features."""
    model = small_gpt(conv1d if transposed else torch.nn.Linear, depth=1).requires_grad_(False)
    wanted = model.blocks[0].up.weight
    asked = []

    def is_24(weight, dim):
        asked.append(dim)
        return weight is wanted

    plans, rejections = decide_while_tracing(model, batch, SSTE, is_24=is_24)
    assert [(plan.site.name, plan.recipe, plan.pruned) for plan in plans] == [("blocks.0.up", SSTE, False)]
    assert {rejection.reason for rejection in rejections} == {Reason.FROZEN}
    assert asked == [0 if transposed else 1] * 4 + [1]


@pytest.mark.parametrize(("recipe", "pruned"), [(SSTE, True), (FP8, False)])
def test_plans_of_weights_that_were_trained_pruned(small_gpt, batch, recipe, pruned):
    model = small_gpt(depth=1)
    wanted = {model.blocks[0].up.weight}
    plans, _ = decide_while_tracing(model, batch, recipe, is_pruned=lambda weight: weight in wanted)
    assert {plan.site.name for plan in plans if plan.pruned} == ({"blocks.0.up"} if pruned else set())


def test_named_linear_that_cannot_be_rewritten_is_an_error(trace, small_gpt, batch):
    model = small_gpt(depth=1)
    model.blocks[0].up.weight.requires_grad_(False)
    graph = trace(model, *batch)
    with pytest.raises(ValueError, match=r"names 'blocks.0.up', which can't be rewritten: weight is frozen"):
        decisions(graph, "*up")


def test_an_output_is_dense_unless_it_is_named(trace):
    """Values are compared with it: no more rounding than asked for.  Nor is it a vocabulary head."""
    ffn = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    out = nn.Linear(64, 128)
    graph = trace(lambda x, y: F.mse_loss(out(x + ffn(x)), y), torch.randn(8, 64), torch.randn(8, 128))
    for targets in ("ffn", "all"):
        plans, rejections = decisions(graph, targets, head=FP8)
        assert plans == {"ffn.0": SSTE, "ffn.2": SSTE}
        assert rejections == {"out": Reason.OUTPUT}
    plans, rejections = decisions(graph, "out")
    assert (plans["out"], rejections) == (SSTE, {})


def test_a_router_is_dense_unless_it_is_named(trace, small_gpt, batch):
    router = nn.Linear(64, 96)  # no embedding in these tests has its shape
    graph = trace(lambda x: router(x).softmax(-1).topk(2), torch.randn(8, 64))
    plans, rejections = decisions(graph, "all", head=FP8)
    assert (plans, rejections) == ({}, {"router": Reason.ROUTER})
    plans, rejections = decisions(graph, "router")
    assert (plans, rejections) == ({"router": SSTE}, {})
    # What draws tokens from logits has an embedding's shape.
    model = small_gpt(depth=1)
    plans, _ = decisions(trace(lambda ids: model(ids)[:, -1].topk(5), batch[0]), head=FP8)
    assert plans["model.head"] == FP8.for_head()


def test_what_reads_a_head_as_well_is_as_precise(trace):
    """A weight has one arithmetic, whichever linear comes first."""
    head, table = nn.Linear(64, 96, bias=False), torch.randn(96, 64)

    def function(x):
        again = x + head(x).softmax(-1) @ table
        return F.cross_entropy(head(again), torch.arange(8))

    sites, _ = found(trace(function, torch.randn(8, 64)))
    for option in (HEAD["fp8-backward"], HEAD["fp8"]):
        plans, _ = decide(sites, SSTE, "ffn", ParameterOwners(), head=option)
        assert [plan.recipe for plan in plans] == [option.for_head()] * 2


def test_several_heads_in_one_parameter_stay_dense(trace):
    heads = nn.Parameter(torch.randn(4, 64, 96))

    def function(x):
        return F.cross_entropy(torch.bmm(x.expand(4, -1, -1), heads).flatten(0, 1), torch.arange(32))

    for targets in ("ffn", "all"):
        plans, rejections = decisions(trace(function, torch.randn(8, 64)), targets, head=FP8)
        assert (plans, [*rejections.values()]) == ({}, [Reason.HEAD])


def test_advice_for_a_dense_head_is_true(trace):
    """Not where it would stay dense without the option."""
    head = nn.Linear(64, 32)
    graph = trace(lambda x: F.cross_entropy(head(x), torch.arange(8)), torch.randn(8, 64))
    assert decisions(graph)[1] == {"head": Reason.TOO_SMALL}
    wide = nn.Linear(64, 96)
    graph = trace(lambda x: F.cross_entropy(wide(x), torch.arange(8)), torch.randn(8, 64))
    assert decisions(graph)[1] == {"wide": Reason.HEAD}
    assert decisions(graph, recipe=SSTE_BF16)[1] == {"wide": Reason.NOT_A_TARGET}


def test_head_whose_loss_lies_outside_the_graph(trace, small_gpt, batch):
    """It leaves the graph, and an embedding has its shape."""
    model = small_gpt(depth=1)
    plans, rejections = decisions(trace(model, batch[0]))
    assert len(plans) == 4
    assert rejections == {"head": Reason.HEAD}


@pytest.mark.parametrize("place", ["of another model", "of its own", "of no model"])
def test_whose_embedding_has_the_shape_of_the_last_linear(small_gpt, place):
    """Of another model that lives, it says nothing of this one."""
    model = small_gpt(depth=1, vocabulary=512)
    block, embedding = model.blocks[0], nn.Embedding(256, 64)  # up's shape
    if place == "of its own":
        model.positions = embedding
    other = nn.Sequential(embedding, nn.Linear(64, 64)) if place == "of another model" else None

    def part(x):
        return block.up(block.ffn_norm(x))

    plans, rejections = decide_while_tracing(part, (torch.randn(2, 8, 64),), SSTE)
    assert [rejection.reason for rejection in rejections] == ([] if other is not None else [Reason.HEAD])
    assert len(plans) == (other is not None)


def test_last_linear_of_a_graph_that_is_cut(trace, small_gpt):
    """No embedding has the shape of this one: a graph break or a bucket of DDP ends here."""
    model = small_gpt(depth=1, vocabulary=512)
    block = model.blocks[0]
    graph = trace(lambda x: block.up(block.ffn_norm(x)), torch.randn(2, 8, 64))
    assert decisions(graph) == ({"block.up": FP8}, {})


def single(layer):
    """A linear inside a residual branch, so that it is no head."""
    return lambda x: x.sum() + layer(x).sum()


@pytest.mark.parametrize(
    ("in_features", "out_features", "reason"),
    [
        (66, 64, Reason.SHAPE),
        (64, 72, Reason.SHAPE),
        (48, 64, Reason.TOO_SMALL),
        (64, 16, Reason.TOO_SMALL),
    ],
)
def test_shapes(trace, in_features, out_features, reason):
    layer = nn.Linear(in_features, out_features)
    assert decisions(trace(single(layer), torch.randn(8, in_features))) == ({}, {"layer": reason})


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_dtypes(trace, dtype):
    layer = nn.Linear(64, 64, dtype=dtype)
    graph = trace(lambda x: layer(x).abs().sum() + x.abs().sum(), torch.randn(8, 64, dtype=dtype))
    assert decisions(graph) == ({}, {"layer": Reason.DTYPE})


def test_integer_weight(trace):
    weight = nn.Parameter(torch.ones(64, 64, dtype=torch.int32), requires_grad=False)
    graph = trace(lambda x: (x @ weight).sum() + x.sum(), torch.ones(8, 64, dtype=torch.int32))
    assert list(decisions(graph)[1].values()) == [Reason.DTYPE]


def test_tied_within_the_graph(gpt_graph):
    _, rejections = decisions(gpt_graph(tied=True))
    assert rejections == {"embedding": Reason.TIED}


def test_frozen(trace):
    layer = nn.Linear(64, 64).requires_grad_(False)
    assert decisions(trace(single(layer), torch.randn(8, 64))) == ({}, {"layer": Reason.FROZEN})


def test_unrelated_modules_own_nothing():
    layer = nn.Linear(64, 64)
    owners = ParameterOwners()
    assert owners.holders(layer.weight) == ["Linear.weight"]
    assert owners.holders(nn.Parameter(torch.zeros(1))) == []


def test_a_weight_of_two_linears_is_pruned_once_for_both(trace):
    layer = nn.Linear(64, 64)
    plans, rejections = decide(
        found(trace(lambda x: layer(F.relu(layer(x))).sum() + x.sum(), torch.randn(8, 64)))[0],
        SSTE, "ffn", ParameterOwners(),
    )  # fmt: skip
    assert [plan.recipe for plan in plans] == [SSTE, SSTE]
    assert rejections == []


def test_a_weight_of_two_linears_has_one_arithmetic(trace):
    """An FFN's linear whose weight serves outside of the FFN as well is not pruned, nor scaled, in one place alone."""
    up, down = nn.Linear(64, 64), nn.Linear(64, 64)
    graph = trace(lambda x: down(F.relu(up(x))).sum() + up(x.softmax(-1)).softmax(-1).sum(), torch.randn(8, 64))
    larger = replace(SSTE, beta_factor=1.7)
    for targets, other in (("ffn", FP8), ("all", SSTE)):
        plans, _ = decide(found(graph)[0], larger, targets, ParameterOwners())
        assert [(plan.site.name, plan.recipe) for plan in plans] == [("up", other), ("down", larger), ("up", other)]


def test_where_one_linear_of_a_weight_stays_dense_all_do(trace):
    """Of the second one the input has no float dtype that the kernels know."""
    layer = nn.Linear(64, 64)

    def twice(x):
        return layer(x).sum() + F.linear(x.double(), layer.weight.double()).sum()

    plans, rejections = decide(found(trace(twice, torch.randn(8, 64)))[0], SSTE, "ffn", ParameterOwners())
    assert plans == []
    assert [rejection.reason for rejection in rejections] == [Reason.DTYPE, Reason.TIED]
