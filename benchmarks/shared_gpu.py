"""Products while another kernel holds multiprocessors, as collectives do for as long as they run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from gemm_libraries import CUBLAS, SCALED_MM, Gemm, Inputs, Problem, column_scale_inv, fprop, make_inputs
from harness import Report, Timing, require_close, timing
from tabulate import tabulate
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sparse_compile.kernels.formats import E4M3
from sparse_compile.kernels.sparse_gemm.configs import choose, contraction_stages
from sparse_compile.kernels.sparse_gemm.plan import plan_gemm, sm_count

SHAPES = ((8192, 2048), (2048, 8192), (14336, 4096), (4096, 14336))  # out_features, in_features
HELD = (0, 8, 16)  # multiprocessors
WAVES = (1, 2, 3, 4)
_CALLS = 10  # behind one another, in a time
_ROUNDS = 8
_NANOSECONDS = 60_000_000  # longer than so many calls take
_HEAD_START = 400_000  # clock cycles in which the other kernel takes its multiprocessors
_WORDS = 8192  # of shared memory: no block of a product fits beside it


@gluon.jit
def _hold_kernel(out_ptr, nanoseconds, WORDS: gl.constexpr):
    """Takes a multiprocessor for each program, and waits."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    offsets = gl.arange(0, WORDS, layout)
    buffer = gl.allocate_shared_memory(gl.float32, [WORDS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    buffer.store(offsets.to(gl.float32))
    start = gl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], gl.int64, False, 1)
    now = start
    while now - start < nanoseconds:
        now = gl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], gl.int64, False, 1)
    gl.store(out_ptr + gl.program_id(0) * WORDS + offsets, buffer.load(layout))


class Holder:
    """Holds multiprocessors, from a stream of its own that goes first."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._out = torch.empty(max(HELD) * _WORDS, device=device)

    def hold(self, count: int) -> None:
        with torch.cuda.stream(self._stream):
            _hold_kernel[(count,)](self._out, _NANOSECONDS, WORDS=_WORDS, num_warps=8)
        torch.cuda._sleep(_HEAD_START)


def shared_part(device: torch.device) -> Report:
    holder = Holder(device)
    rows = [row for n, k in SHAPES for row in shape_rows(fprop(n, k), holder, device)]
    return {"rows": rows, "failed": []}, table(rows)


def shape_rows(problem: Problem, holder: Holder, device: torch.device) -> list[dict[str, Any]]:
    """Of one product, in each number of waves and by libraries; all are checked before any is timed."""
    fp8, bf16 = (make_inputs(problem, dtype, device) for dtype in (E4M3, torch.bfloat16))
    calls = {f"waves: {waves}": planned(problem, fp8, waves) for waves in WAVES}
    calls |= {gemm.name: of_library(gemm, x) for gemm, x in ((SCALED_MM, fp8), (CUBLAS, bf16))}
    rows = []
    for held in HELD:
        times = {name: asdict(found) for name, found in timed(calls, holder, held).items()}
        rows.append({"n": problem.rows, "k": problem.contraction, "held": held, "ms": times})
        print(table(rows[-1:]), flush=True)
    return rows


def planned(problem: Problem, x: Inputs, waves: int) -> Callable[[], object]:
    """Our product in so many waves, once it is right."""
    sms = sm_count(x.b.device)
    config = choose(problem.rows, problem.columns, contraction_stages(problem.contraction, 1), sms)
    out = torch.empty(problem.columns, problem.rows, dtype=torch.bfloat16, device=x.b.device)
    tensors = (x.values, x.metadata, x.b, x.scale_inv, x.column_scale_inv, out)
    plan = plan_gemm(config, False, *tensors, True, waves)

    def multiply() -> None:
        plan(*(None if tensor is None else tensor.data_ptr() for tensor in tensors))

    multiply()
    require_close(out.t(), (x.sparse.float() @ x.b.float().t()) * (x.scale_inv * column_scale_inv(x)))
    return multiply


def of_library(gemm: Gemm, x: Inputs) -> Callable[[], object]:
    """Its product, once it is right."""
    (call,) = gemm.prepare([x], True)
    require_close(call().t(), x.dense.float() @ x.b.float().t())
    return call


def timed(calls: Mapping[str, Callable[[], object]], holder: Holder, held: int) -> dict[str, Timing]:
    """Milliseconds of a call, taking turns."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(_ROUNDS):
        for name, call in calls.items():
            torch.cuda.synchronize()
            if held:
                holder.hold(held)
            start, end = torch.cuda.Event(True), torch.cuda.Event(True)
            start.record()
            for _ in range(_CALLS):
                call()
            end.record()
            torch.cuda.synchronize()
            found[name].append(start.elapsed_time(end) / _CALLS)
    return {name: timing(times) for name, times in found.items()}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(rows[0]["ms"])
    lines = [(row["n"], row["k"], row["held"], *(row["ms"][name]["median"] * 1e3 for name in names)) for row in rows]
    headers = ("n", "k", "SMs held", *(f"{name}, us" for name in names))
    return tabulate(lines, headers=headers, floatfmt=("", "", "", *[".0f"] * len(names)), tablefmt="github")
