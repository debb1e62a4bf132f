"""Experts through the backend: trained, saved, resumed, finalized as any other weight is, each matrix on its own."""

import copy
import io
import json
import os
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

import shared_graphs
import sparse_compile
import warm
from experts_training import COUNT, EAGER, EXACT, WIDTH, Model, adamw, batches, compiled, operands, train
from sparse_compile.export.check import Verdict, check_weights
from sparse_compile.kernels import ops, reference
from sparse_compile.measuring.weight_health import monitor
from sparse_compile.passes import choose
from sparse_compile.passes.decide import decide
from sparse_compile.passes.find import find
from sparse_compile.passes.flow import Flow
from sparse_compile.passes.parameter_owners import ParameterOwners
from sparse_compile.recipe import RECIPES, GradFormat
from sparse_compile.weights.pattern_24 import is_24
from sparse_compile.weights.registry import find_record, record_of

clean_slate = shared_graphs.kept
uncompiled = shared_graphs.uncompiled
pytestmark = pytest.mark.usefixtures("uncompiled")

NAMES = ["experts.down", "experts.up"]


def test_each_expert_has_its_scale_and_operands_of_its_own():
    model = Model()
    with torch.no_grad():
        model.experts.up[1] *= 100
        model.experts.up[2] = 0.5  # not representative
        model.experts.up[3] = reference.hard_threshold24(model.experts.up[3])
    compiled(model)(*next(batches()))
    betas = sparse_compile.beta(model)
    assert sorted(betas) == NAMES
    normal, large, constant, sparse = betas["experts.up"]
    assert normal == pytest.approx(1.48, abs=0.03)
    assert large == pytest.approx(1.48, abs=0.03)
    assert (constant, sparse) != (normal, large)
    assert constant == 1.48
    made = operands(model.experts.up)
    for e, matrix in enumerate(model.experts.up.detach()):
        expected = reference.prune_weight(matrix, torch.tensor([betas["experts.up"][e]]))
        for actual, wanted in zip(made, expected, strict=True):
            assert torch.equal(actual[e].view(torch.uint8), wanted.view(torch.uint8))


def test_an_expert_with_the_prior_is_fitted_while_others_stay():
    model = Model()
    with torch.no_grad():
        model.experts.up[2] = 0.5
    step, optimizer = compiled(model), adamw(model)
    train(step, optimizer, steps=1)
    before = sparse_compile.beta(model)["experts.up"]
    with torch.no_grad():
        model.experts.up[2].normal_(std=0.1)
    train(step, optimizer, steps=1)
    after = sparse_compile.beta(model)["experts.up"]
    assert before[2] == 1.48 != after[2]
    assert [before[e] for e in (0, 1, 3)] == [after[e] for e in (0, 1, 3)]


def saved(*parts):
    buffer = io.BytesIO()
    torch.save([part.state_dict() for part in parts], buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("make", [adamw, lambda m: torch.optim.SGD(m.parameters(), lr=0.1)], ids=["AdamW", "SGD"])
def test_a_resumed_run_goes_on(make):
    model = Model()
    step, optimizer = compiled(model), make(model)
    train(step, optimizer)
    model_state, optimizer_state = saved(model, optimizer)
    betas = sparse_compile.beta(model)
    kept = [entry["sste_beta"] for entry in optimizer_state["state"].values() if "sste_beta" in entry]
    assert sorted(kept) == sorted(betas.values())
    continued = train(step, optimizer)

    resumed = Model()
    step, optimizer = compiled(resumed), make(resumed)
    resumed.load_state_dict(model_state)
    optimizer.load_state_dict(optimizer_state)
    assert train(step, optimizer) == continued
    assert sparse_compile.beta(resumed) == betas


def test_distributed_checkpoints_hold_the_scales(tmp_path):
    model = Model()
    step, optimizer = compiled(model), adamw(model)
    train(step, optimizer)
    dcp.save(dict(zip("mo", get_state_dict(model, optimizer), strict=True)), checkpoint_id=tmp_path)
    continued = train(step, optimizer)
    resumed = Model()
    step, optimizer = compiled(resumed), adamw(resumed)
    step(*next(batches()))
    state = dict(zip("mo", get_state_dict(resumed, optimizer), strict=True))
    dcp.load(state, checkpoint_id=tmp_path)
    set_state_dict(resumed, optimizer, model_state_dict=state["m"], optim_state_dict=state["o"])
    assert train(step, optimizer) == continued


def test_scales_of_another_number_of_experts_are_refused():
    model = Model()
    for value in ([1.5] * 3, 1.5, [1.5, 1.5, 1.5, -1.0]):
        with pytest.raises(ValueError, match=r"scale of 'experts.up'"):
            sparse_compile.set_beta(model, {"experts.up": value})
    assert sparse_compile.beta(model) == {}
    record_of(model.experts.up).tell((1.5, 1.5))
    with pytest.raises(ValueError, match="holds 4 matrices, and there are 2 S-STE scales"):
        compiled(model)(*next(batches()))


def test_finalize_makes_every_expert_sparse_and_changes_nothing_else(tmp_path):
    model = Model()
    step, optimizer = compiled(model), adamw(model)
    train(step, optimizer)
    copied = copy.deepcopy(model)
    sparse_compile.set_beta(copied, sparse_compile.beta(model))
    x, ids = next(batches())
    with torch.no_grad():
        before = step(x, ids)
    assert sorted(sparse_compile.finalize(model)) == NAMES
    assert sparse_compile.beta(model) == {name: [1.0] * COUNT for name in NAMES}
    with torch.no_grad():
        for after in (step(x, ids), model(x, ids)):  # FP8 rounds beta * S(W) elsewhere than S(W)
            assert (after - before).double().norm() < 0.06 * (before - x).double().norm()
    for name in NAMES:
        assert is_24(model.get_parameter(name), -1)
    verdicts = {row.name: row.verdict for row in check_weights(model.state_dict().items())}
    assert verdicts == dict.fromkeys(NAMES, Verdict.PRUNED)
    first = copy.deepcopy(model.state_dict())
    sparse_compile.finalize(model)
    assert all(torch.equal(value, first[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        compiled(copied)(x, ids)
    sparse_compile.finalize(copied)
    assert all(torch.equal(value, first[name]) for name, value in copied.state_dict().items())


def test_a_copy_that_no_call_has_used_must_say_how_it_lies():
    model = Model()
    sparse_compile.set_beta(model, {"experts.up": [1.5] * COUNT})
    with pytest.raises(ValueError, match=r"the dimension along which 'experts.up'"):
        sparse_compile.finalize(model)
    model.experts.num_experts, model.experts.is_transposed = COUNT, False  # as transformers does
    assert sparse_compile.finalize(model) == ["experts.up"]
    assert is_24(model.experts.up, -1)


def test_an_edit_of_one_expert_through_data_is_seen():
    model = Model()
    step = compiled(model)
    with torch.no_grad():
        step(*next(batches()))
    before = operands(model.experts.up).scale_inv.clone()
    model.experts.up.data[2] *= 64
    with torch.no_grad():
        step(*next(batches()))
    ratio = operands(model.experts.up).scale_inv / before
    assert ratio.flatten().tolist() == [1.0, 1.0, 64.0, 1.0]


@pytest.mark.parametrize("recipe", ["sr-ste", "t-sr-ste"])
def test_masked_decay_and_masks_are_each_expert_s(recipe):
    model = Model()
    options = EAGER | {"sste.recipe": recipe, "sste.decay": 0.5}
    step, optimizer = compiled(model, options), torch.optim.SGD(model.parameters(), lr=1.0)
    x, ids = next(batches())
    step(x, ids).sum().backward()
    weight = model.experts.down
    grad, before = weight.grad.clone(), weight.detach().clone()
    optimizer.step()
    mask = reference.top2_mask(before)
    if recipe == "t-sr-ste":
        mask = torch.stack([reference.dense_mask(reference.transposable_masks(matrix)) for matrix in before])
    decayed = torch.where(mask, grad.float(), grad.float() + 0.5 * before.float()).bfloat16()
    assert torch.equal(weight, before - decayed)
    if recipe == "t-sr-ste":
        state = saved(optimizer)[0]
        masks = [entry["masks"] for entry in state["param_groups"][0]["sste"].values() if "masks" in entry]
        assert sorted(tuple(mask.shape) for mask in masks) == [(4, 16, 16), (4, 32, 16)]


def test_the_end_of_a_schedule_writes_every_expert():
    model = Model()
    options = EXACT | {"sste.total_steps": 4, "sste.tail": 3}
    step, optimizer = compiled(model, options), torch.optim.SGD(model.parameters(), lr=0.0)
    x, ids = next(batches())
    step(x, ids).sum().backward()
    betas, weight = sparse_compile.beta(model)["experts.up"], model.experts.up
    expected = [reference.soft_threshold24(w.float()) * beta for w, beta in zip(weight.detach(), betas, strict=True)]
    optimizer.step()  # the last that is pruned
    assert torch.equal(weight, torch.stack(expected).bfloat16())
    assert is_24(weight, -1)
    assert not sparse_compile.beta(model)


def test_health_counts_all_experts():
    model = Model()
    step, optimizer = compiled(model), adamw(model)

    def sample():
        step(*next(batches()))
        (kept,) = find_record(model.experts.up).operands.values()
        return sparse_compile.health()[monitor.watched[kept].name], model.experts.up.detach().clone()

    _, first = sample()
    train(step, optimizer, steps=1)
    health, second = sample()
    before, after = (reference.top2_mask(weight.float()) for weight in (first, second))
    flipped = (before ^ after).sum().item() / first.numel()
    assert health.flips == pytest.approx(flipped, rel=0.1)  # ties apart
    assert health.beta == pytest.approx(1.48, abs=0.05)
    assert 0.5 <= health.zeros < 0.55


def test_a_checkpointed_region_is_the_same():
    """Offsets are found inside of it, and again when it is computed again."""
    results = []
    for region in (False, True):
        model = Model()

        def forward(x, ids, model=model, region=region):
            return checkpoint(model, x, ids, use_reentrant=False) if region else model(x, ids)

        step = torch.compile(forward, backend="sste", options=EAGER)
        x, ids = next(batches())
        torch.manual_seed(5)
        y = step(x, ids)
        y.sum().backward()
        results.append([y, *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_numbers_of_tokens_may_change_in_one_graph():
    model = Model()
    step = compiled(model, dynamic=True, fullgraph=True)
    for tokens in (40, 56, 3):
        x, ids = next(batches(1, tokens))
        step(x, ids).sum().backward()
    (graph,) = sparse_compile.report().graphs
    assert graph.calls == 3
    assert {row.shape for row in graph.rows} == {"? x 64 -> 128, 4 experts", "? x 64 -> 64, 4 experts"}


def test_experts_with_as_many_tokens_each_are_batched_products():
    class Batched(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = (nn.Parameter(torch.randn(COUNT, WIDTH, WIDTH) / 8) for _ in range(2))

        def forward(self, x):
            return torch.bmm(F.gelu(torch.bmm(x, self.up)), self.down)

    model = Batched()
    step, x = compiled(model), torch.randn(COUNT, 10, WIDTH)
    y = step(x)
    y.sum().backward()
    assert {row.module: row.role for row in sparse_compile.report().rows} == {"up": "ffn up", "down": "ffn down"}
    dense = copy.deepcopy(model)
    sparse_compile.set_beta(dense, sparse_compile.beta(model))
    dense.zero_grad()
    for name, beta in sparse_compile.beta(model).items():
        weight = dense.get_parameter(name)
        for e in range(COUNT):
            weight.data[e] = (reference.soft_threshold24(weight[e].t()) * beta[e]).t()
    expected = dense(x)
    expected.sum().backward()
    assert F.cosine_similarity(y.flatten(), expected.flatten(), dim=0) > 0.99
    for name, parameter in model.named_parameters():
        other = dense.get_parameter(name).grad
        assert F.cosine_similarity(parameter.grad.flatten(), other.flatten(), dim=0) > 0.99


def test_fsdp2_gathers_experts(one_process):
    losses = []
    for sharded in (False, True):
        model = Model()
        model.compile(backend="sste", options=EXACT)
        if sharded:
            fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        optimizer = adamw(model)
        losses.append(train(model, optimizer))
        assert len(sparse_compile.beta(model)["experts.up"]) == COUNT
    assert losses[0] == losses[1]


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["fp8", "s-ste", "s-ste-transposable"])
def test_kernels_train_like_their_definitions(recipe):
    """The same samples; the curves part only by the accumulation of the tensor cores."""
    curves = []
    for reference_alone in (False, True):
        torch._dynamo.reset()
        with ops.force_reference() if reference_alone else nullcontext():
            model = Model().cuda()
            curves.append(train(compiled(model, EAGER | {"sste.recipe": recipe}), adamw(model), steps=8))
    executions = [graph.execution for graph in sparse_compile.report().graphs]
    assert executions == ["kernels", "emulated: the eager reference was asked for"]
    assert curves[0] != curves[1], "both were emulated"
    assert curves[0] == pytest.approx(curves[1], rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True], ids=["default", "CUDA graphs"])
def test_generated_code_trains_whatever_the_routing(graphs):
    """In one graph that never waits for the host."""
    with ops.force_reference():
        model = Model().cuda()
        expected = train(compiled(model), adamw(model), steps=1)
    torch._dynamo.reset()
    model = Model().cuda()
    options = {"sste.when": "always", "triton.cudagraphs": graphs, "sste.mvue": "off"}
    step = compiled(model, options, fullgraph=True)
    losses = train(step, adamw(model), steps=12)
    assert losses[0] == pytest.approx(expected[0], rel=0.02)
    assert losses[-1] < losses[0]
    (graph,) = [graph for graph in sparse_compile.report().graphs if graph.calls == 12]
    assert graph.execution == "kernels"
    assert {row.module: row.decision.split()[0] for row in graph.rows} == dict.fromkeys(NAMES, "s-ste")


@pytest.mark.nightly
def test_two_processes_train_as_one(tmp_path):
    """In shards, each of which has whole experts, and replicated: losses, weights and scales."""
    script = Path(__file__).parent / "distributed_experts.py"
    environment = {**os.environ, "PYTHONPATH": str(script.parents[1]), "OMP_NUM_THREADS": "1"}
    done = warm.group(2, script, cwd=tmp_path, env=environment)
    for rank in range(2):
        result = tmp_path / f"rank{rank}"
        assert result.exists(), [process.stderr for process in done]
        cases = json.loads(result.read_text())
        assert len(cases) == 6
        assert {name: same for name, same in cases.items() if same != [True] * 3} == {}


@pytest.mark.parametrize(
    ("width", "recipe", "why"),
    [
        (80, RECIPES["s-ste"], "whose features are no multiples of 64"),
        (64, RECIPES["s-ste-bf16"], "without FP8"),
        (64, replace(RECIPES["s-ste"], grad_format=GradFormat.E5M2), "with dense products of e5m2"),
        (64, replace(RECIPES["s-ste-transposable"], grad_format=GradFormat.E5M2), ""),
        (64, RECIPES["s-ste"], ""),
    ],
)
def test_kernels_run_what_they_can(monkeypatch, trace, width, recipe, why):
    monkeypatch.setattr(ops, "_missing_kernels", lambda device: None)
    monkeypatch.setattr(choose, "warned", set())
    weight = nn.Parameter(torch.randn(COUNT, width, 64))
    graph = trace(lambda x: torch.bmm(x, weight.mT).relu(), torch.randn(COUNT, 8, 64))
    plans, _ = decide(find(Flow(graph)).sites, recipe, "all", ParameterOwners())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept, rejections = choose.leave_without_kernels(plans)
    assert (len(kept), len(rejections)) == ((0, 1) if why else (1, 0))
    assert all(f"no kernels for experts {why}" == rejection.detail for rejection in rejections)
