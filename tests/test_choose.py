"""CHOOSE: the fastest variant of each linear by the times of a made-up clock; dense where that is faster."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparse_compile.kernels import ops
from sparse_compile.kernels.timing.components import COMPONENTS as MEASURED
from sparse_compile.passes import agreement
from sparse_compile.passes.choose import _components, choose
from sparse_compile.passes.decide import decide
from sparse_compile.passes.find import find
from sparse_compile.passes.flow import Flow
from sparse_compile.passes.parameter_owners import ParameterOwners
from sparse_compile.passes.sites import Reason
from sparse_compile.projections.groups_of_four import SOFT
from sparse_compile.recipe import FP8, SSTE, SSTE_BF16, STE_BF16, T_SR_STE, Gemm, GradFormat, Rounding
from variants import VARIANTS

DENSE = {"dense fprop": 100.0, "dense dgrad": 100.0, "dense wgrad": 100.0}
COMPONENTS = {
    "fp8 fprop": 60.0, "fp8 dgrad": 60.0, "fp8 wgrad": 60.0, "sparse24 fprop": 40.0, "sparse24 wgrad": 40.0,
    "sparse24_bf16 fprop": 60.0, "bf16 dgrad": 100.0, "bf16 wgrad": 100.0,
    "cast_mvue exact nearest": 10.0, "cast_mvue approximate nearest": 10.0, "cast_transpose": 10.0,
    "transpose_tokens": 8.0, "weight soft24": 2.0, "weight top24": 2.0, "add_masked_decay": 3.0,
    "weight transposable24": 2.0, "sparse24 dgrad": 40.0, "weight soft24-bf16": 2.0, "weight top24-bf16": 2.0,
    "weight identity": 2.0, "weight identity-once": 2.0, "weight identity-backward": 2.0, "copy": 0.0,
    "mvue24 dgrad": 40.0,
    "cast_mvue for dgrad exact nearest": 10.0, "cast_mvue for dgrad approximate nearest": 10.0,
    "cast_mvue exact stochastic": 10.0,
}  # fmt: skip


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setattr(ops, "emulation_reason", lambda device: None)


@pytest.fixture
def plans(gpt_graph):
    """Of the linears qkv, proj, up and down."""

    def make(targets="ffn", recipe=SSTE, **model):
        return decide(find(Flow(gpt_graph(**model))).sites, recipe, targets, ParameterOwners())[0]

    return make


def clock(**changes):
    """Of every shape."""
    times = {**DENSE, **COMPONENTS, **{name.replace("_", " "): time for name, time in changes.items()}}
    times |= {name: time for name, time in changes.items() if name in times}

    def read(questions):
        return {
            question: {component: times[component] for component in components}
            for question, components in questions.items()
        }

    return read


def chosen(plans, read):
    return {plan.site.name.split(".")[-1]: plan.recipe for plan in choose(plans, read)[0]}


def test_the_recipe_where_it_is_fastest(kernels, plans):
    kept, rejections = choose(plans(), clock())
    assert [plan.recipe for plan in kept] == [FP8, FP8, SSTE, SSTE]
    assert rejections == []
    # qkv: three products, the cast and transpose of g and of x, the cast of the weight; a copy takes no time here.
    assert kept[0].price.dense == 300.0
    assert kept[0].price.rewritten == 3 * 60.0 + 10.0 + 8.0 + 2.0
    assert kept[2].price.rewritten == 40.0 + 60.0 + 40.0 + 10.0 + 8.0 + 2.0


@pytest.mark.parametrize("recipe", [SSTE_BF16, STE_BF16], ids=lambda recipe: recipe.name)
def test_bf16_casts_nothing(kernels, gpt_graph, recipe):
    plans, rejections = decide(find(Flow(gpt_graph())).sites, recipe, "ffn", ParameterOwners())
    dense = dict.fromkeys(["blocks.0.qkv", "blocks.0.proj", "head"], Reason.NOT_A_TARGET)
    assert {r.name: r.reason for r in rejections} == dense
    kept, _ = choose(plans, clock(copy=1000.0))
    assert [plan.price.rewritten for plan in kept] == [60.0 + 100.0 + 100.0 + 2.0] * 2


def test_transposable_masks_make_dgrad_sparse(kernels, plans):
    planned = plans(recipe=T_SR_STE)
    kept = {plan.site.name: plan for plan in choose(planned, clock())[0]}
    assert kept["blocks.0.up"].recipe is T_SR_STE
    assert kept["blocks.0.up"].price.rewritten == 3 * 40.0 + 10.0 + 8.0 + 2.0 + 3.0
    slow = {plan.site.name: plan for plan in choose(planned, clock(**{"cast_mvue exact nearest": 100.0}))[0]}
    assert (slow["blocks.0.up"].recipe.dgrad, slow["blocks.0.up"].recipe.wgrad) == (Gemm.SPARSE24, Gemm.FP8)


def test_a_sampled_dgrad_pays_for_its_cast(kernels, plans):
    sampled = dataclasses.replace(SSTE, dgrad=Gemm.MVUE24)
    planned = plans(recipe=sampled)
    kept = {plan.site.name: plan for plan in choose(planned, clock())[0]}
    assert kept["blocks.0.up"].recipe is sampled
    assert kept["blocks.0.up"].price.rewritten == 3 * 40.0 + 10.0 + 10.0 + 8.0 + 2.0
    # A copy of grad_output at 2 units an element and byte: it is read in fp32 and written, transposed, in fp32.
    slower = {plan.site.name: plan for plan in choose(planned, clock(copy=1.0, dense_fprop=1000.0))[0]}
    up, tokens = slower["blocks.0.up"].site, 64
    byte = 1.0 / (2 * 4 * tokens * up.out_features)
    fused = tokens * (up.in_features + up.out_features + 2 * up.in_features + 8 * up.out_features) * byte
    assert slower["blocks.0.up"].price.rewritten == pytest.approx(150.0 + fused)
    dense = {p.site.name: p for p in choose(planned, clock(**{"cast_mvue for dgrad exact nearest": 31.0}))[0]}
    recipe = dense["blocks.0.up"].recipe
    assert (recipe.dgrad, recipe.wgrad, recipe.estimator) == (Gemm.FP8, Gemm.SPARSE24, SSTE.estimator)


def test_gradients_are_priced_in_their_format_and_rounding(kernels, plans):
    """Measured on operands of that format; sampling with further random numbers has a time of its own."""
    recipe = dataclasses.replace(SSTE, grad_format=GradFormat.E5M2, rounding=Rounding.STOCHASTIC)
    planned = [dataclasses.replace(plan, recipe=recipe) for plan in plans() if plan.recipe is SSTE]
    asked = set()

    def read(questions):
        assert {shape.grad_dtype for shape, _ in questions} == {recipe.grad_format.dtype}
        asked.update(component for components in questions.values() for component in components)
        times = clock(**{"cast_mvue exact stochastic": 13.0})
        return times(questions)

    kept = choose(planned, read)[0]
    assert {plan.recipe for plan in kept} == {recipe}
    assert "cast_mvue exact stochastic" in asked
    assert "cast_mvue exact nearest" not in asked
    by_default = choose([plan for plan in plans() if plan.recipe is SSTE], clock())[0]
    for plan, other in zip(kept, by_default, strict=True):
        assert plan.price.rewritten == other.price.rewritten + 3.0


def test_what_is_slower_stays_dense_and_says_the_times(kernels, plans):
    read = clock(dense_fprop=60.0, dense_dgrad=60.0, dense_wgrad=60.0)
    kept, rejections = choose(plans(), read)
    assert [plan.site.name for plan in kept] == ["blocks.0.up", "blocks.0.down"], "160 of 180 us"
    assert {r.name: r.reason for r in rejections} == dict.fromkeys(["blocks.0.qkv", "blocks.0.proj"], Reason.SLOWER)
    assert "200 us in fp8 (fp8, fp8, fp8)" not in rejections[0].detail, "the fastest variant is named"
    assert "180 us dense" in rejections[0].detail


def test_a_gain_within_the_margin_is_none(kernels, plans):
    planned = plans()
    for dense, rewritten in ((160.0 / 0.94, True), (160.0 / 0.96, False)):
        names = chosen(planned, clock(dense_fprop=dense - 200.0, dense_dgrad=100.0, dense_wgrad=100.0))
        assert ("up" in names) == rewritten


def test_wgrad_in_the_precision_that_is_fastest(kernels, plans):
    recipe = chosen(plans(), clock(dense_wgrad=30.0))["up"]
    assert (recipe.projection, recipe.fprop, recipe.dgrad) == (SOFT, Gemm.SPARSE24, Gemm.FP8)
    assert (recipe.wgrad, recipe.estimator) == (Gemm.DENSE, None)
    read = clock()
    slow_sparse = clock(**{"cast_mvue exact nearest": 100.0})
    assert chosen(plans(), slow_sparse)["up"].wgrad is Gemm.FP8
    assert chosen(plans(), read)["up"] is SSTE


def test_backward_in_hp_saves_the_cast_of_the_gradient(kernels, plans):
    recipe = chosen(plans(), clock(dense_dgrad=55.0, dense_wgrad=30.0))["qkv"]
    assert (recipe.fprop, recipe.dgrad, recipe.wgrad) == (Gemm.FP8, Gemm.DENSE, Gemm.DENSE)


def test_fused_operations_cost_memory_traffic(kernels, plans):
    """A copy of grad_output at 2 units an element and byte, in fp32."""
    kept, _ = choose(plans(), clock(copy=1.0, dense_fprop=1000.0))
    qkv = kept[0].site
    tokens, inputs, outputs = 64, qkv.in_features, qkv.out_features
    byte = 1.0 / (2 * 4 * tokens * outputs)
    fused = tokens * (inputs + 2 * outputs + 2 * inputs + outputs) * byte
    assert kept[0].price.rewritten == pytest.approx(200.0 + fused)


def test_the_cast_of_a_shared_input_is_paid_once(kernels, plans):
    kept, _ = choose(plans(gated=True), clock(transpose_tokens=100.0, dense_wgrad=1000.0))
    prices = {plan.site.name.split(".")[-1]: plan.price.rewritten for plan in kept}
    assert prices["gate"] == prices["up"] == prices["down"] - 50.0


def test_checkpointed_forward_runs_twice(kernels, plans):
    (once, *_), _ = choose(plans(), clock())
    (twice, *_), _ = choose(plans(checkpoint=True), clock())
    assert twice.price.dense == once.price.dense + 100.0
    assert twice.price.rewritten == once.price.rewritten + 60.0


def test_what_the_user_named_is_rewritten_whatever_it_costs(kernels, plans):
    kept, rejections = choose(plans("*up"), clock(dense_fprop=1.0, dense_dgrad=1.0, dense_wgrad=1.0))
    assert [plan.site.name for plan in kept] == ["blocks.0.up"]
    assert len(rejections) == 3


def test_what_was_trained_pruned_is_rewritten_whatever_it_costs(kernels, plans):
    """Dense products would compute another function: in an evaluation of a few tokens, say."""
    planned = [dataclasses.replace(plan, pruned=plan.recipe is SSTE) for plan in plans()]
    kept, rejections = choose(planned, clock(dense_fprop=1.0, dense_dgrad=1.0, dense_wgrad=1.0))
    assert [plan.site.name for plan in kept] == ["blocks.0.up", "blocks.0.down"]
    assert len(rejections) == 2


def test_inference_is_forward_alone(kernels, plans):
    """A linear whose backward and casts of the weight would be slow is as good as its forward."""
    asked = set()

    def read(questions):
        asked.update(*questions.values())
        return clock(**{"weight soft24": 1000.0}, copy=1.0)(questions)

    planned = plans()
    kept, _ = choose(planned, read, training=False)
    assert [plan.recipe for plan in kept] == [plan.recipe for plan in planned] == [FP8, FP8, SSTE, SSTE]
    assert asked == {"dense fprop", "fp8 fprop", "sparse24 fprop", "copy"}
    for plan in kept:
        assert plan.price.dense == 100.0
    up, byte = kept[2].site, 1.0 / (2 * 4 * 64 * 256)
    assert kept[2].price.rewritten == pytest.approx(40.0 + 64 * up.in_features * byte)
    kept, rejections = choose(planned, clock(dense_fprop=50.0), training=False)
    assert [plan.recipe for plan in kept] == [SSTE, SSTE]
    assert "a call would take 60 us in fp8 (fp8, fp8, fp8), 50 us dense" in rejections[0].detail


def test_processes_choose_the_same(kernels, trace, small_gpt, batch):
    """What one found first holds for those whose clocks and numbers of tokens say otherwise."""
    store = torch.distributed.HashStore()

    def plans(ids):
        sites = find(Flow(trace(small_gpt(), *ids))).sites
        return decide(sites, SSTE, "ffn", ParameterOwners())[0]

    fast, slow = clock(dense_wgrad=30.0), clock(dense_fprop=1.0, dense_dgrad=1.0, dense_wgrad=1.0)
    shorter = tuple(part[:, :5] for part in batch)
    with mock.patch.object(agreement, "shared_store", return_value=store):
        kept, rejections = choose(plans(batch), fast)
        others = choose(plans(shorter), slow)
    assert [plan.recipe for plan in others[0]] == [plan.recipe for plan in kept] != []
    assert [plan.price for plan in others[0]] == [plan.price for plan in kept]
    assert others[1] == rejections == []
    assert choose(plans(shorter), slow)[0] == [], "a process of its own goes by its own times"


def test_nobody_waits_for_an_answer():
    """Threads ask at the same time; a question that one asks alone is its own to answer."""
    store = torch.distributed.HashStore()
    barrier = Barrier(8)

    def ask(name):
        def answer():
            barrier.wait(timeout=60)
            return name

        return agreement.agreed("who", answer)

    with mock.patch.object(agreement, "shared_store", return_value=store), ThreadPoolExecutor(8) as threads:
        answers = set(threads.map(ask, "abcdefgh"))
        assert len(answers) == 1
        assert agreement.agreed("who", lambda: pytest.fail("it is answered")) in answers
        assert agreement.agreed("and who else", lambda: "z") == "z"


def test_without_kernels_nothing_is_measured(plans):
    planned = plans()
    assert choose(planned, clock=None) == (planned, [])


def test_every_variant_has_its_pieces(kernels, plans):
    asked = set()

    def read(questions):
        for (shape, _), components in questions.items():
            asked.update(components)
            assert (shape.tokens, shape.dtype, shape.weight_dtype) == (64, torch.float32, torch.float32)
        return clock()(questions)

    choose(plans(), read)
    assert asked <= MEASURED.keys()
    assert {f"{gemm.value} wgrad" for gemm in (Gemm.SPARSE24, Gemm.FP8, Gemm.DENSE)} <= asked
    assert {component for recipe in VARIANTS.values() for component in _components(recipe)} <= MEASURED.keys()


def test_linears_that_share_a_weight_are_chosen_together(kernels, trace):
    """One of them gains, one loses: what counts is the sum, as the weight is pruned for both or for none."""
    layer = nn.Linear(64, 64)
    graph = trace(lambda x: layer(F.relu(layer(x)[:16])).sum() + x.sum(), torch.randn(64, 64))
    plans = decide(find(Flow(graph)).sites, SSTE, "ffn", ParameterOwners())[0]
    assert [plan.site.shape for plan in plans] == ["64 x 64 -> 64", "16 x 64 -> 64"]

    def read(dense_of_few):
        def times(questions):
            few = clock(dense_fprop=dense_of_few)
            return {question: (few if question[0].tokens == 16 else clock())({question: components})[question]
                    for question, components in questions.items()}  # fmt: skip

        return times

    # The first linear's input needs no gradient: 200 us dense, 92 rewritten; the second one's does.
    kept, rejections = choose(plans, read(dense_of_few=-100.0))
    assert ([plan.recipe for plan in kept], rejections) == ([SSTE, SSTE], [])
    kept, rejections = choose(plans, read(dense_of_few=-300.0))
    assert kept == []
    assert [rejection.reason for rejection in rejections] == [Reason.SLOWER, Reason.SLOWER]


def experts_plans(trace, recipe=SSTE):
    up, down = (nn.Parameter(torch.randn(4, 128, 128)) for _ in range(2))
    x = torch.randn(4, 64, 128, requires_grad=True)
    graph = trace(lambda x: torch.bmm(torch.bmm(x, up).relu(), down.mT), x)
    return decide(find(Flow(graph)).sites, recipe, "ffn", ParameterOwners())[0]


def test_experts_are_priced_by_an_even_and_a_skewed_routing(monkeypatch, kernels, trace):
    asked = set()

    def read(questions):
        asked.update(shape for shape, _ in questions)
        return {
            (shape, device): {
                name: (3.0 if shape.skewed and name in COMPONENTS else 1.0) * time
                for name, time in clock()({(shape, device): components})[shape, device].items()
            }
            for (shape, device), components in questions.items()
        }

    plans = experts_plans(trace)
    kept, rejections = choose(plans, read)
    assert {(shape.tokens, shape.experts, shape.skewed, shape.transposed) for shape in asked} == {
        (256, 4, skewed, transposed) for skewed in (False, True) for transposed in (False, True)
    }
    # What is rewritten takes twice as long in the mean, dense products take as long: more than they do.
    assert kept == []
    assert [rejection.reason for rejection in rejections] == [Reason.SLOWER] * 2
    assert {rejection.dense_us for rejection in rejections} == {300.0}
    kept, _ = choose(plans, clock())
    assert {plan.price.rewritten for plan in kept} == {40.0 + 60.0 + 40.0 + 10.0 + 8.0 + 2.0}
