"""Kernels on the CPU, in Triton's interpreter, have the bits of the eager reference."""

import os
import subprocess
import sys
from ast import literal_eval
from collections.abc import Iterator
from pathlib import Path

import pytest

KERNELS = (
    "prune",
    "prune_bf16",
    "transpose_pruned",
    "soft_transposable",
    "decay",
    "quantize",
    "mvue",
    *(
        pytest.param(kernel, marks=pytest.mark.nightly)
        for kernel in ("transposable", "experts_weights", "experts_casts", "random")
    ),
)


@pytest.fixture(scope="module")
def interpreter() -> Iterator["subprocess.Popen[str]"]:
    """One process for all kernels: it imports torch once."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.interpreted_kernels"], cwd=Path(__file__).parents[1], env=environment,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        yield process


@pytest.mark.parametrize("cases", ["few", pytest.param("all", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_interpreted_kernels_match_the_reference(interpreter: "subprocess.Popen[str]", kernel: str, cases: str) -> None:
    assert interpreter.stdin is not None
    assert interpreter.stdout is not None
    interpreter.stdin.write(f"{kernel} {cases}\n")
    interpreter.stdin.flush()
    answer = literal_eval(interpreter.stdout.readline())
    assert answer == "right", answer
