"""Dense FP8 in the backward products alone, for whole models and for the vocabulary head."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import shared_graphs
import sparse_compile
from sparse_compile.options import read_options
from sparse_compile.recipe import FP8, FP8_BACKWARD, SSTE, Gemm, GradFormat

uncompiled = shared_graphs.uncompiled

EAGER = {"sste.executor": "eager", "sste.when": "always"}


@pytest.mark.by_day(1)
@pytest.mark.parametrize(
    ("stored", "autocast"),
    [
        ("linear", False),
        ("conv1d", True),
        pytest.param("linear", True, marks=pytest.mark.nightly),
        pytest.param("conv1d", False, marks=pytest.mark.nightly),
    ],
)
def test_outputs_are_the_dense_ones_and_gradients_near_them(ffn, conv1d, stored, autocast):
    torch.manual_seed(0)
    model = ffn()
    if stored == "conv1d":
        model.up = conv1d(64, 128)
    x = torch.randn(48, 64)
    run = torch.compile(model, backend="sste", options=EAGER | {"sste.recipe": "fp8-backward"})
    gradients, outputs = [], []
    for call in (model, run):
        tokens = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs.append(call(tokens))
        outputs[-1].float().square().mean().backward()
        gradients.append([tokens.grad, *(parameter.grad.clone() for parameter in model.parameters())])
        model.zero_grad()
    rounding = 2**-7 if autocast else 1e-6  # the bias is added to a rounded product
    assert (outputs[1] - outputs[0]).norm() < rounding * outputs[0].norm()
    for actual, expected in zip(gradients[1], gradients[0], strict=True):
        difference = (actual - expected).norm() / expected.norm()
        assert difference < 0.06
    assert (gradients[1][0] - gradients[0][0]).norm() > 1e-4 * gradients[0][0].norm(), "in FP8"
    decisions = {row.module: row.decision for row in sparse_compile.report().rows}
    dense = "bf16" if autocast else "fp32"
    assert {row.fprop for row in sparse_compile.report().rows} == {dense}
    assert decisions == dict.fromkeys(("up", "down"), "fp8-backward (dense, fp8, fp8)")


FP8_FPROP = replace(FP8, name="fprop-alone", dgrad=Gemm.DENSE, wgrad=Gemm.DENSE)


@pytest.mark.by_day(1)
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("option", "products"),
    [
        ("fp8", ["fp8"] * 3),
        ("fp8-backward", ["fp32", "fp8", "fp8"]),
        (FP8_FPROP, ["fp8", "fp32", "fp32"]),
    ],
    ids=str,
)
def test_the_head(small_gpt, batch, option, products):
    model = small_gpt()
    run = torch.compile(model, backend="sste", options=EAGER | {"sste.head": option})
    run(*batch).backward()
    rows = {row.module: row for row in sparse_compile.report().rows}
    assert [rows["head"].fprop, rows["head"].dgrad, rows["head"].wgrad] == products
    assert rows["blocks.0.up"].decision == "s-ste (2:4 fp8, fp8, 2:4 fp8)"


def test_gradients_of_a_named_head_are_in_e5m2_and_those_of_a_composed_one_as_it_says():
    for recipe in (SSTE, replace(SSTE, grad_format=GradFormat.E5M2)):
        formats = [
            read_options(None, {"sste.recipe": recipe, "sste.head": head}).head.grad_format
            for head in ("fp8", "fp8-backward", FP8, replace(FP8, grad_format=GradFormat.E5M2))
        ]
        assert formats == [GradFormat.E5M2, GradFormat.E5M2, GradFormat.E4M3, GradFormat.E5M2]


def test_a_head_that_prunes_is_named_as_a_target_instead():
    with pytest.raises(
        ValueError, match=r"'sste.head' is the recipe 's-ste', which prunes; .*name it in 'sste.targets'"
    ):
        read_options(None, {"sste.head": SSTE})


def test_it_may_become_more_precise_but_not_dense():
    variants = [(variant.fprop, variant.dgrad, variant.wgrad) for variant in FP8_BACKWARD.variants()]
    assert variants == [(Gemm.DENSE, Gemm.FP8, Gemm.FP8), (Gemm.DENSE, Gemm.FP8, Gemm.DENSE)]


def test_a_dense_fprop_needs_an_unpruned_weight_and_a_dgrad_in_fp8():
    with pytest.raises(ValueError, match="dense where dgrad is dense fp8 and the weight is not projected"):
        replace(FP8_BACKWARD, dgrad=Gemm.DENSE, wgrad=Gemm.DENSE)
    with pytest.raises(ValueError, match=r"fprop is 2:4 if and only if the weight is projected"):
        replace(SSTE, fprop=Gemm.DENSE)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_on_a_gpu(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).to("cuda", dtype)
    run = torch.compile(model, backend="sste", options={"sste.when": "always", "sste.recipe": "fp8-backward"})
    x = torch.randn(1024, 256, device="cuda", dtype=dtype)
    gradients = []
    for call in (model, run):
        call(x).float().square().mean().backward()
        gradients.append([parameter.grad.float() for parameter in model.parameters()])
        model.zero_grad()
    for actual, expected in zip(gradients[1], gradients[0], strict=True):
        assert (actual - expected).norm() < 0.06 * expected.norm()
