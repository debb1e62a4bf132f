"""A finalized model that is loaded and compiled for inference: what runs in 2:4 FP8, and what it computes."""

from typing import Any

import pytest
import torch
from torch import nn

import sparse_compile
from sparse_compile.kernels.reference import soft_threshold24

PRUNED = {"blocks.0.up", "blocks.0.down"}


@pytest.fixture
def loaded(small_gpt) -> nn.Module:
    """2:4 in its FFN; nothing else is known of it in this process."""
    model: nn.Module = small_gpt(depth=1).eval()
    with torch.no_grad():
        for name in PRUNED:
            weight = model.get_submodule(name).weight
            weight.copy_(1.7 * soft_threshold24(weight))
    return model


def run(model: nn.Module, ids: torch.Tensor, mode: Any, **options: Any) -> tuple[torch.Tensor, dict[str, str]]:
    """What the compiled model returns, and the precision of each linear's fprop."""
    call = torch.compile(model, backend="sste", options={"sste.executor": "eager", "sste.when": "always"} | options)
    with mode():
        out = call(ids)
    rows = sparse_compile.report().rows
    return out, {row.module: row.decision.partition(" (")[2].partition(",")[0] or row.decision for row in rows}


@pytest.mark.by_day(1)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_weights_that_are_not_frozen_run_as_in_training(loaded, batch, mode) -> None:
    """As from_pretrained returns them.  Pruning changes nothing of them; attention runs in dense FP8."""
    ids = batch[0]
    with torch.no_grad():
        expected = loaded(ids)
    out, ran = run(loaded, ids, mode)
    dense_fp8 = {"blocks.0.qkv": "fp8", "blocks.0.proj": "fp8", "head": "fp8"}
    assert ran == dict.fromkeys(PRUNED, "2:4 fp8") | dense_fp8
    assert set(sparse_compile.beta(loaded).values()) == {1.0}
    assert 0 < (out - expected).norm() < 0.05 * expected.norm()


def test_frozen_weights_are_dense_unless_asked_for(loaded, batch) -> None:
    ids = batch[0]
    loaded.requires_grad_(False)
    with torch.no_grad():
        expected = loaded(ids)
    out, ran = run(loaded, ids, torch.no_grad)
    assert set(ran.values()) == {"dense"}
    assert torch.allclose(out, expected, atol=1e-5)
    torch._dynamo.reset()
    sparse_compile.report().graphs.clear()
    out, ran = run(loaded, ids, torch.no_grad, **{"sste.frozen": "sparse"})
    assert {name for name, precision in ran.items() if precision == "2:4 fp8"} == PRUNED
    assert {precision for name, precision in ran.items() if name not in PRUNED} == {"dense"}
    assert 0 < (out - expected).norm() < 0.05 * expected.norm()


def test_frozen_weights_that_are_not_24_stay_dense() -> None:
    """Broken in one group, or zero."""
    model = nn.Sequential(*(part for _ in range(3) for part in (nn.Linear(64, 64), nn.ReLU())))
    with torch.no_grad():
        for layer in model[::2]:
            layer.weight.copy_(soft_threshold24(layer.weight))
        model[0].weight[0, :4] = 1.0
        model[4].weight.zero_()
    model.requires_grad_(False)
    _, ran = run(model, torch.randn(8, 64), torch.no_grad, **{"sste.frozen": "sparse", "sste.targets": "all"})
    assert {name for name, precision in ran.items() if precision != "dense"} == {"2"}


@pytest.mark.nightly
def test_a_base_model_that_is_finalized_and_frozen_passes_gradients_on(loaded, batch) -> None:
    """As adapters train: gradients reach what lies before the frozen 2:4 linears."""
    loaded.requires_grad_(False)
    loaded.embedding.requires_grad_(True)
    options = {"sste.executor": "eager", "sste.when": "always", "sste.frozen": "sparse"}
    expected = torch.autograd.grad(loaded(*batch), loaded.embedding.weight)[0]
    torch.compile(loaded, backend="sste", options=options)(*batch).backward()
    actual = loaded.embedding.weight.grad
    assert 0 < (actual - expected).norm() < 0.1 * expected.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 24, 512])
def test_kernels_compute_what_the_plain_model_does(loaded, tokens: int) -> None:
    model = loaded.to("cuda", torch.bfloat16).requires_grad_(False)
    ids = torch.randint(0, 128, (1, tokens), device="cuda")
    with torch.no_grad():
        expected = model(ids).float()
    options = {"sste.frozen": "sparse", "sste.when": "always"}
    call = torch.compile(model, backend="sste", options=options)
    with torch.no_grad():
        out = call(ids).float()
    assert {row.module for row in sparse_compile.report().rows if row.decision != "dense"} == PRUNED
    assert (out - expected).norm() < 0.05 * expected.norm()


@pytest.mark.gpu
def test_what_is_faster_in_inference_is_measured_by_forward_alone(loaded) -> None:
    model = loaded.to("cuda", torch.bfloat16).requires_grad_(False)
    ids = torch.randint(0, 128, (4, 512), device="cuda")
    with torch.no_grad():
        expected = model(ids).float()
        out = torch.compile(model, backend="sste", options={"sste.frozen": "sparse"})(ids).float()
    assert (out - expected).norm() < 0.05 * expected.norm()
    for row in sparse_compile.report().rows:
        if row.module in PRUNED:
            assert row.dense_us is not None
            assert "a call would take" in row.reason or row.decision != "dense"
