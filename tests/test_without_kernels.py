"""A device without kernels runs the dense model, and says so; but a weight that was trained pruned stays so."""

import copy
import warnings

import pytest
import torch
from torch import nn

import shared_graphs
import sparse_compile
from sparse_compile.kernels import ops
from sparse_compile.passes import choose
from sparse_compile.passes.decide import decide
from sparse_compile.passes.find import find
from sparse_compile.passes.flow import Flow
from sparse_compile.passes.parameter_owners import ParameterOwners
from sparse_compile.recipe import SSTE

uncompiled = shared_graphs.uncompiled
pytestmark = pytest.mark.usefixtures("uncompiled")

FASTER = {"sste.executor": "eager"}
ALWAYS = FASTER | {"sste.when": "always"}
X = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def nobody_was_warned(monkeypatch):
    monkeypatch.setattr(choose, "warned", set())


def ffn():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))


def train(model, options, steps=1, optimizer=None):
    torch._dynamo.reset()
    call = torch.compile(model, backend="sste", options=options)
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        call(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def decisions():
    return {row.module: row.decision.split()[0] for row in sparse_compile.report().graphs[-1].rows}


@pytest.mark.by_day(1)
@pytest.mark.parametrize("targets", ["ffn", "[02]", pytest.param("all", marks=pytest.mark.nightly)])
def test_it_is_dense_with_one_warning_and_a_reason(targets):
    """Also where the user names linears: that says which ones, not that they be emulated."""
    model, dense = ffn(), ffn()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        train(model, FASTER | {"sste.targets": targets}, steps=3)
        train(model, FASTER | {"sste.recipe": "fp8"})  # warned of already
    (message,) = [str(w.message) for w in warned if "kernels" in str(w.message)]
    expected = "sparse_compile: no kernels for cpu: the model runs dense; 'sste.when': 'always' emulates the kernels"
    assert message == expected
    first, _ = sparse_compile.report().graphs
    assert (first.rewritten, first.execution) == (0, "dense")
    assert {row.reason for row in first.rows} == {"not emulated: no kernels for cpu"}
    assert {row.advice for row in first.rows} == {"'sste.when': 'always' emulates the kernels"}
    assert "no kernels for cpu" in str(sparse_compile.report())
    for step in range(4):
        if step in (0, 3):
            optimizer = torch.optim.AdamW(dense.parameters(), lr=1e-2)
        dense(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for weight, other in zip(model.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(weight, other)


def test_always_emulates_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train(ffn(), ALWAYS)
    assert decisions() == {"0": "s-ste", "2": "s-ste"}


def test_a_weight_that_was_trained_pruned_stays_so():
    """And its neighbours run dense."""
    model = ffn()
    optimizer = train(model, ALWAYS | {"sste.targets": "0"})
    train(model, FASTER, optimizer=optimizer)
    assert decisions() == {"0": "s-ste", "2": "dense"}
    with torch.no_grad():
        evaluated = torch.compile(model, backend="sste", options=FASTER)(X)
    assert decisions() == {"0": "s-ste", "2": "dense"}
    assert (evaluated - model(X)).norm() > 0.02 * evaluated.norm(), "dense products compute another function"


@pytest.mark.by_day(1)
@pytest.mark.parametrize("options", [{}, {"sste.recipe": "ste", "sste.warmup": 1}], ids=str)
def test_a_checkpoint_says_that_it_was(options):
    model = ffn()
    optimizer = train(model, ALWAYS | options, steps=2)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    again = ffn()
    again.load_state_dict(saved[0])
    resumed = torch.optim.AdamW(again.parameters(), lr=1e-2)
    resumed.load_state_dict(saved[1])
    train(again, FASTER | options, optimizer=resumed)
    assert decisions() == dict.fromkeys("02", options.get("sste.recipe", "s-ste"))


@pytest.mark.nightly
def test_a_checkpoint_of_dense_training_does_not():
    optimizer = train(ffn(), FASTER, steps=2)
    again = ffn()
    resumed = torch.optim.AdamW(again.parameters(), lr=1e-2)
    resumed.load_state_dict(optimizer.state_dict())
    train(again, FASTER, optimizer=resumed)
    assert decisions() == {"0": "dense", "2": "dense"}


@pytest.mark.nightly
def test_no_schedule_writes_into_weights_that_were_never_pruned():
    schedule = {"sste.recipe": "ste", "sste.warmup": 1, "sste.tail": 1, "sste.total_steps": 4}
    model, dense = ffn(), ffn()
    train(model, FASTER | schedule, steps=5)
    train(dense, FASTER | {"sste.recipe": "ste"}, steps=5)
    for weight, other in zip(model.parameters(), dense.parameters(), strict=True):
        assert torch.equal(weight, other)
    assert not (model[0].weight == 0).any()


def test_each_linear_by_its_own_device(trace, small_gpt, batch, monkeypatch):
    """Those on a device that has kernels go on to be priced; devices of one kind are warned of once."""
    plans, _ = decide(find(Flow(trace(small_gpt(depth=1), *batch))).sites, SSTE, "ffn", ParameterOwners())
    missing = iter([None, "no kernels for NVIDIA A100", None, "no kernels for NVIDIA A100"])
    monkeypatch.setattr(ops, "missing_kernels", lambda device: next(missing))
    with warnings.catch_warnings(record=True) as warned:
        kept, rejections = choose.leave_without_kernels(plans)
    assert kept == [plans[0], plans[2]]
    assert [rejection.name for rejection in rejections] == [plans[1].site.name, plans[3].site.name]
    assert len([w for w in warned if "no kernels for NVIDIA A100: the model runs dense" in str(w.message)]) == 1


@pytest.mark.parametrize(
    ("name", "capability", "hip", "reason"),
    [
        (
            "NVIDIA A100-SXM4-80GB",
            (8, 0),
            None,
            "no kernels for NVIDIA A100-SXM4-80GB (sm_80), only for sm_90 (Hopper)",
        ),
        ("NVIDIA B200", (10, 0), None, "no kernels for NVIDIA B200 (sm_100), only for sm_90 (Hopper)"),
        ("AMD Instinct MI300X", (9, 4), "6.2", "no kernels for AMD Instinct MI300X (ROCm)"),
        ("NVIDIA H200", (9, 0), None, None),
    ],
)
def test_the_reason_names_the_gpu(monkeypatch, name, capability, hip, reason):
    ops._missing_kernels.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.version, "hip", hip)
    try:
        assert ops.missing_kernels(torch.device("cuda")) == ops.emulation_reason(torch.device("cuda", 0)) == reason
    finally:
        ops._missing_kernels.cache_clear()


def test_the_reference_that_was_asked_for_is_no_missing_kernel():
    with ops.force_reference():
        assert ops.missing_kernels(torch.device("cpu")) == "no kernels for cpu"
        assert ops.emulation_reason(torch.device("cpu")) == "the eager reference was asked for"
