"""bench_step without a GPU: its categories of kernels, its tables, and its check of losses."""

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench_step
import step_models
from modern_gpt import ModernGPT
from step_models import SSTE

import sparse_compile
from libraries import library
from sparse_compile.kernels import ops


@pytest.mark.parametrize(
    ("kernel", "category"),
    [
        ("sparse_gemm_kernel", "2:4 GEMM"),
        ("nvjet_sm90_qqtst_320x128_128x3_1x2_h_bz_coopB_TNT", "fp8 GEMM"),
        ("nvjet_sm90_tst_320x128_64x3_1x2_h_bz_coopB_NNT", "bf16 GEMM"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x64", "attention"),
        ("_cast_mvue_kernel", "casts of their own"),
        ("_speculate_kernel", "casts of their own"),
        ("triton_red_fused__to_copy_abs_amax_cast_mvue_silu_backward_7", "fused by Inductor"),
        ("void at::native::multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>>", "optimizer"),
        ("Memset (Device)", "other"),
    ],
)
def test_kernels_fall_into_categories(kernel: str, category: str) -> None:
    assert bench_step.categorise(kernel) == category


def test_overhead_is_what_is_no_gemm_and_not_in_the_bf16_step() -> None:
    bf16 = {"bf16 GEMM": 70.0, "attention": 20.0, "other": 10.0}
    sste = {"2:4 GEMM": 20.0, "fp8 GEMM": 15.0, "attention": 20.0, "casts of their own": 4.0, "other": 11.0}
    assert bench_step.overhead(bf16, sste) == pytest.approx(5.0 / 70.0)


def test_table_of_steps() -> None:
    spread = {"median": 10.0, "low": 9.0, "high": 11.0}
    facts = {"model": "m", "ms": spread, "peak_gib": 2.0, "host_ms": 3.0}
    rows = [
        {"kind": "bf16", "speedup": 1.0, "predicted_over_measured": None, **facts},
        {"kind": "sste", "speedup": 1.25, "predicted_over_measured": 1.1, **facts},
    ]
    lines = bench_step.step_table(rows).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[6:8]] == ["x bf16", "predicted / measured"]
    assert [cell.strip() for cell in lines[3].split("|")[6:8]] == ["1.250", "1.100"]


def test_table_of_compilations() -> None:
    rows = [
        {"model": "m", "kind": "bf16", "cold_s": 20.0, "warm_s": 10.0},
        {"model": "m", "kind": "sste", "cold_s": 30.0, "warm_s": 11.0},
    ]
    last = [cell.strip() for cell in bench_step.compile_table(rows).splitlines()[-1].split("|")[1:-1]]
    assert last == ["m", "sste", "30.0", "1.50", "11.0", "1.10"]


class Classifier(nn.Module):
    """A vision transformer as far as its step goes: images in, logits out."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 8 * 8, 1000)

    def forward(self, images: Tensor) -> Tensor:
        self.logits = self.head(images.flatten(1))
        return self.logits


@pytest.mark.parametrize(
    ("name", "make", "batch", "dtype"),
    [
        (
            "gpt-1280",
            lambda: ModernGPT(step_models.GPTConfig(layers=1, width=64, heads=1, context=16, vocabulary=8192)),
            (2, 16),
            torch.bfloat16,
        ),
        ("vit-large", Classifier, (64, 8), torch.float32),
    ],
)
def test_steps_of_other_models_than_hugging_faces(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    make: Callable[[], nn.Module],
    batch: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    made: list[nn.Module] = []

    def remembered() -> nn.Module:
        made.append(make())
        return made[0]

    monkeypatch.setitem(step_models.COMPILE, step_models.BF16, {"backend": "eager"})
    model = replace(step_models.MODELS[name], make=remembered, batch=batch)
    step = step_models.training_step(model, step_models.BF16, torch.device("cpu"))
    before = [parameter.detach().clone() for parameter in made[0].parameters()]
    assert float(step()) == pytest.approx(math.log(model.vocabulary), abs=model.tolerance)
    changed = [not torch.equal(old, new) for old, new in zip(before, made[0].parameters(), strict=True)]
    assert any(changed)
    assert {parameter.dtype for parameter in made[0].parameters()} == {dtype}
    if isinstance(made[0], Classifier):
        assert made[0].logits.dtype == torch.bfloat16, "fp32 parameters are multiplied under autocast"


@pytest.mark.by_day(1)
@pytest.mark.parametrize(
    ("name", "wrong", "expected"),
    [("gpt2-small", float("nan"), 10.0), ("gpt2-small", 9.0, 10.0), ("experts-mixtral", 4.1, 4.0)],
)
def test_a_wrong_loss_ends_the_measurement(
    monkeypatch: pytest.MonkeyPatch, name: str, wrong: float, expected: float
) -> None:
    """Another than the first kind's, or where pruning changes it, than that of the kernels' definitions."""

    def loss(kind: str) -> float:
        return 10.0 if kind == "bf16" else 4.0 if ops._reference_forced else wrong

    monkeypatch.setattr(bench_step, "training_step", lambda model, kind, device: lambda: loss(kind))
    for function in ("empty_cache", "reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, function, lambda: None)
    for function in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, function, lambda: 0)
    with pytest.raises(SystemExit, match=f"FAILED: the first loss of {name} is {wrong} in sste, not {expected}"):
        bench_step.candidates(name, ["bf16", "sste"])


@pytest.mark.nightly
@pytest.mark.parametrize("skewed", [False, True])
def test_the_step_of_experts_trains_them(monkeypatch: pytest.MonkeyPatch, skewed: bool) -> None:
    library("transformers")
    options = {"sste.executor": "eager", "sste.when": "always"}
    monkeypatch.setitem(step_models.COMPILE, SSTE, {"backend": "sste", "options": options})
    make = partial(step_models.Experts, 64, 64, 8, 2, 32, skewed=skewed)
    model = step_models.StepModel(make=make, vocabulary=8, batch=(2, 16))
    step = step_models.training_step(model, SSTE, torch.device("cpu"))
    assert 0 < float(step()) < float("inf")
    rows = sparse_compile.report().graphs[-1].rows
    assert {row.module: row.shape for row in rows} == {
        "experts.gate_up_proj": "64 x 64 -> 128, 8 experts", "experts.down_proj": "64 x 64 -> 64, 8 experts"
    }  # fmt: skip
