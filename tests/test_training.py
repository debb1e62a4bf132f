"""Training: the recipes learn nearly as well as dense, and the kernels as their eager definitions."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

import sparse_compile
from sparse_compile import backend
from sparse_compile.kernels import ops
from sparse_compile.recipe import SSTE, Gemm, GradFormat, Rounding

ARMS = {
    **{
        name: {"sste.recipe": name}
        for name in (
            "s-ste",
            "s-ste-transposable",
            "s-ste-approximate",
            "ste",
            "sr-ste",
            "t-sr-ste",
            "s-ste-bf16",
            "ste-bf16",
            "fp8",
        )
    },
    "s-ste, 2:4 dgrad": {"sste.recipe": replace(SSTE, dgrad=Gemm.MVUE24)},
    "s-ste, e5m2, stochastic": {
        "sste.recipe": replace(SSTE, grad_format=GradFormat.E5M2, rounding=Rounding.STOCHASTIC)
    },
}


def text(count):
    """Batches of a language with structure to learn: each token follows from the two before it, with some noise."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        ids = torch.randint(0, 128, (8, 65), generator=generator)
        for position in range(2, 65):
            following = (3 * ids[:, position - 1] + ids[:, position - 2]) % 16
            noisy = torch.rand(8, generator=generator) < 0.05
            ids[:, position] = torch.where(noisy, ids[:, position], following)
        yield ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def losses(model, device, steps, **compile_options):
    torch.compiler.reset()
    model = model.to(device)
    compiled = torch.compile(model, **compile_options) if compile_options else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    torch.manual_seed(0)
    results = []
    for ids, targets in text(steps):
        loss = compiled(ids.to(device), targets.to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        results.append(loss.item())
    return results


@cache
def dense_losses(small_gpt):
    torch.manual_seed(0)
    return losses(small_gpt(), "cpu", 60)


@pytest.mark.nightly
@pytest.mark.parametrize("arm", ARMS)
def test_loss_follows_dense(small_gpt, arm):
    """After the steep part of the curve each recipe is within a tenth of the dense loss, far below the start's."""
    dense = dense_losses(small_gpt)
    torch.manual_seed(0)
    options = {"sste.executor": "eager", "sste.when": "always", **ARMS[arm]}
    sparse = losses(small_gpt(), "cpu", 60, backend="sste", options=options)
    last, last_dense = sum(sparse[-10:]) / 10, sum(dense[-10:]) / 10
    assert last_dense < 0.75 * dense[0]
    assert abs(last - last_dense) < 0.1 * last_dense


@pytest.mark.gpu
@pytest.mark.parametrize("arm", ARMS)
def test_kernels_train_like_their_definitions(small_gpt, arm):
    """Same seed, same data, same samples: the curves part only by the accumulation of the tensor cores."""
    curves = []
    for reference in (False, True):
        torch.manual_seed(0)
        with ops.force_reference() if reference else nullcontext():
            # Always: the definitions are slower than dense products, and a model as small as this may be.
            options = {"sste.executor": "eager", "sste.when": "always", **ARMS[arm]}
            model = small_gpt(width=128).bfloat16()
            curves.append(losses(model, "cuda", 40, backend="sste", options=options))
    executions = [graph.execution for graph in sparse_compile.report().graphs]
    assert executions == ["kernels", "emulated: the eager reference was asked for"]
    assert curves[0][-1] < 0.8 * curves[0][0]
    differences = [abs(a - b) for a, b in zip(*curves, strict=True)]
    assert max(differences[:5]) < 0.01
    assert sum(differences[-10:]) / 10 < 0.05


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_generated_code_trains_in_every_mode(small_gpt, mode, monkeypatch):
    """CUDA graphs among them: the operands keep their addresses, and the samples differ from step to step."""
    # torch.compile takes no options beside a mode, and so small a model would stay dense.
    monkeypatch.setattr(backend, "choose", lambda plans, **_: (plans, []))
    torch.manual_seed(0)
    curve = losses(small_gpt(width=128).bfloat16(), "cuda", 40, backend="sste", mode=mode)
    assert curve[-1] < 0.8 * curve[0]
    assert {graph.execution for graph in sparse_compile.report().graphs} == {"kernels"}


SECOND_PROCESS = """
import sys, torch
sys.path[:0] = sys.argv[1:]
from conftest import SmallGPT
from test_training import losses
torch.manual_seed(0)
print(losses(SmallGPT(width=256).bfloat16(), "cuda", 5, backend="sste", options={"sste.when": "always"}))
"""


@pytest.mark.gpu
def test_a_second_process_finds_what_the_first_compiled(tmp_path):
    """And trains alike: each process finds out anew which of two kernels is faster, and their sums round apart."""
    tests = Path(__file__).parent
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", SECOND_PROCESS, str(tests.parent), str(tests)]
    runs = [subprocess.run(command, env=environment, capture_output=True, text=True) for _ in range(2)]
    assert [run.returncode for run in runs] == [0, 0], runs[-1].stderr[-3000:]
    first, second = (json.loads(run.stdout.splitlines()[0]) for run in runs)
    assert second == pytest.approx(first, abs=0.01)
