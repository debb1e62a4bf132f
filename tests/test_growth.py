"""Nothing grows with the number of compilations, nor of steps: objects, memory, time of a step."""

import gc
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparse_compile
from ffn_training import EAGER, FFN, compiled, some_tokens
from sparse_compile.reporting.process_report import report_so_far
from sparse_compile.runtime import Chooser, Runtime
from sparse_compile.torch_internals.heap import instances_of
from sparse_compile.variants import Decisions, Variants
from sparse_compile.weights.operand_set import OperandSet
from sparse_compile.weights.record import WeightRecord

KINDS = (Chooser, Decisions, OperandSet, Runtime, Variants, WeightRecord, torch.fx.GraphModule, torch.optim.Optimizer)


def resident() -> int:
    """Bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def alive() -> Counter[str]:
    gc.collect()
    # One walk over the heap for all kinds: beside other tests it takes a second.
    classes = Counter(map(type, instances_of(object)))
    return Counter(
        {kind.__name__: sum(classes[found] for found in classes if issubclass(found, kind)) for kind in KINDS}
    )


@pytest.mark.nightly
@pytest.mark.parametrize("times", [3, 300])
def test_models_that_are_compiled_and_forgotten(times: int) -> None:
    """As in a search for hyperparameters, or a notebook."""
    x = some_tokens()
    counted, memory = [], []
    for index in range(times):
        torch._dynamo.reset()
        report_so_far().graphs.clear()
        model = FFN()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = compiled(model)
        step(x).square().mean().backward()
        optimizer.step()
        del model, optimizer, step
        if index in (times // 2, times - 1):
            torch._dynamo.reset()
            counted.append(alive())
            memory.append(resident())
    assert counted[0] == counted[1]
    if times > 100:
        # The allocator of the system keeps what it got: in half of the compilations no more than a few.
        assert memory[1] - memory[0] < 100 * 2**20


@pytest.mark.nightly
def test_sizes_that_change_leave_the_operands_alone() -> None:
    """Graphs are kept for each, weights and what is derived from them are not."""
    torch._dynamo.reset()
    model = FFN()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = compiled(model, dynamic=False)
    counts = []
    for tokens in (16, 17):
        step(torch.randn(tokens, 64)).square().mean().backward()
        optimizer.step()
        found = alive()
        counts.append({name: found[name] for name in ("OperandSet", "WeightRecord")})
    assert counts[0] == counts[1]


class Wide(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(FFN(width) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("device", "steps", "width", "tokens", "options"),
    [
        pytest.param("cpu", 600, 64, 16, EAGER, id="cpu"),
        pytest.param("cuda", 20_000, 1024, 4096, {"sste.when": "always"}, id="cuda", marks=pytest.mark.gpu),
        pytest.param(
            "cuda", 20_000, 1024, 4096, {"sste.when": "always", "triton.cudagraphs": True}, id="cuda, graphs",
            marks=pytest.mark.gpu,
        ),
    ],
)  # fmt: skip
@pytest.mark.timeout(3000)
def test_many_steps(device: str, steps: int, width: int, tokens: int, options: dict[str, Any]) -> None:
    """Memory of host and device, and the time of a step, in the last tenth as in the second."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Wide(width).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    step = compiled(model, {**options, "sste.health": 50})
    batches = torch.randn(8, tokens, width, device=device)
    part = steps // 10
    taken: list[list[float]] = []
    host, on_device = [], []
    for index in range(steps):
        begin = time.perf_counter()
        step(batches[index % 8]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if index % part == 0:
            taken.append([])
        if index % 20 == 19:
            if device == "cuda":
                torch.cuda.synchronize()
            taken[-1].append(time.perf_counter() - begin)
        if index % part == part - 1:
            gc.collect()
            host.append(resident())
            on_device.append(torch.cuda.memory_allocated() if device == "cuda" else 0)
    assert on_device[-1] == on_device[1]
    assert host[-1] - host[1] < 32 * 2**20, host
    times = [statistics.median(part) for part in taken]
    assert times[-1] < 1.1 * statistics.median(times[1:4]) + (1e-3 if device == "cpu" else 0), times
    assert all(len(samples) <= 1000 for samples in sparse_compile.report().health.values())
