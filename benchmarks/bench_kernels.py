"""The kernels other than the GEMM: how near they are to the speed of memory, and what a call costs the host.

    python benchmarks/bench_kernels.py memory    time against a copy of as many bytes
    python benchmarks/bench_kernels.py masks     the same of the kernels that only recipes with masks run
    python benchmarks/bench_kernels.py host      host time of one call of each op, the GEMMs included

Several parts can be named at once.  Data is random normal, in bf16.  The bytes of an op are those of its inputs and its
outputs, each counted once; a copy of as many bytes reads one half and writes the other.
"""

import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from harness import Candidate, Report, Timing, brief, measure, run_parts, set_count, timing

from sparse_compile.kernels import ops
from sparse_compile.kernels.formats import E4M3, E4M3_MAX, E5M2, MVUE_GAIN
from sparse_compile.kernels.reference import saturating_cast
from sparse_compile.linear.fp8 import token_amax
from sparse_compile.projections.groups_of_four import SOFT, SOFT_ONCE, prune_weight_
from sparse_compile.projections.groups_of_four_bf16 import SOFT_BF16, prune_weight_bf16_
from sparse_compile.projections.identity import IDENTITY, IDENTITY_ONCE, cast_weight_
from sparse_compile.projections.transposable import (
    SOFT_TRANSPOSABLE,
    TRANSPOSABLE,
    prune_soft_transposable_,
    prune_transposable_,
)
from sparse_compile.testing import assert_same_bits

DEVICE = torch.device("cuda")
WEIGHTS = ((4096, 14336), (8192, 8192), (768, 3072))  # out_features, in_features
ACTIVATIONS = ((16384, 14336), (16384, 4096), (16384, 3072), (16384, 768))  # tokens, features
ROUNDS = 20
_GRAPH_BYTES = 5 * 10**9  # about what a graph moves, in more than 1 ms: its launch is nothing against that
HOST_SIDE = 256  # of the operands whose host time is measured: their kernels take less than the host
HOST_TARGET = 15.0  # microseconds
_HOST_ROUNDS = 21
_HOST_CALLS = 200  # of two kernels at most: fewer than what a stream's queue holds, so that none waits for room

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Op:
    """An op: how its inputs of a shape are made, and a call that returns its outputs."""

    make: Callable[[int, int, torch.device], Tensors]
    run: Callable[..., Tensors]


def _prune_inputs(n: int, k: int, device: torch.device) -> Tensors:
    return _normal(n, k, device), torch.ones(1, device=device), *SOFT.new_operands(n, k, device)


def _prune(weight: Tensor, beta: Tensor, *buffers: Tensor, hard: bool = False) -> Tensors:
    prune_weight_(weight, beta, *buffers, hard)
    return buffers


def _prune_once_inputs(n: int, k: int, device: torch.device) -> Tensors:
    return _normal(n, k, device), torch.ones(1, device=device), *SOFT_ONCE.new_operands(n, k, device)


def _prune_once(weight: Tensor, beta: Tensor, *buffers: Tensor) -> Tensors:
    values, metadata, scale_inv = buffers
    prune_weight_(weight, beta, values, metadata, None, scale_inv, False)
    return buffers


def _pruned(n: int, k: int, device: torch.device) -> Tensors:
    operands = SOFT_ONCE.new_operands(n, k, device)
    if device.type != "meta":
        SOFT_ONCE.fill(_normal(n, k, device), operands, None, None, False)
    return operands.values, operands.metadata


def _transpose_pruned(values: Tensor, metadata: Tensor) -> Tensors:
    return (ops.transpose_pruned(values, metadata),)


def _prune_bf16_inputs(n: int, k: int, device: torch.device) -> Tensors:
    return _normal(n, k, device), torch.ones(1, device=device), *SOFT_BF16.new_operands(n, k, device)


def _prune_bf16(weight: Tensor, beta: Tensor, *buffers: Tensor) -> Tensors:
    prune_weight_bf16_(weight, beta, *buffers)
    return buffers


def _cast_weight_inputs(n: int, k: int, device: torch.device) -> Tensors:
    return _normal(n, k, device), *IDENTITY.new_operands(n, k, device)


def _cast_weight(weight: Tensor, *buffers: Tensor) -> Tensors:
    cast_weight_(weight, *buffers)
    return buffers


def _cast_once_inputs(n: int, k: int, device: torch.device) -> Tensors:
    return _normal(n, k, device), *IDENTITY_ONCE.new_operands(n, k, device)


def _cast_once(weight: Tensor, payload: Tensor, scale_inv: Tensor) -> Tensors:
    cast_weight_(weight, payload, None, scale_inv)
    return payload, scale_inv


def _soft_transposable_inputs(n: int, k: int, device: torch.device) -> Tensors:
    return _normal(n, k, device), torch.ones(1, device=device), *SOFT_TRANSPOSABLE.new_operands(n, k, device)


def _prune_soft_transposable(weight: Tensor, beta: Tensor, *buffers: Tensor) -> Tensors:
    prune_soft_transposable_(weight, beta, *buffers)
    return buffers


def _transposable_inputs(n: int, k: int, device: torch.device) -> Tensors:
    masks = TRANSPOSABLE.new_masks(n, k, device)
    if device.type != "meta":
        prune_transposable_(_normal(n, k, device), *TRANSPOSABLE.new_operands(n, k, device), masks, True)
    return _normal(n, k, device), *TRANSPOSABLE.new_operands(n, k, device), masks


def _prune_transposable(search: bool, weight: Tensor, *buffers: Tensor) -> Tensors:
    prune_transposable_(weight, *buffers, search)
    return buffers


def _decay_inputs(n: int, k: int, device: torch.device) -> Tensors:
    """A decay of 0: the gradient stays what it was however often it is added, and the time does not depend on it."""
    return _normal(n, k, device), _normal(n, k, device), torch.zeros(1, device=device)


def _add_masked_decay(grad: Tensor, weight: Tensor, factor: Tensor) -> Tensors:
    ops.add_masked_decay_(grad, weight, factor)
    return (grad.view_as(grad),)  # a tensor of its own, as it is written besides being read


def _activation(tokens: int, columns: int, device: torch.device) -> Tensors:
    """bf16 ``[tokens, columns]``, a scale for each token, and a scale that no sample of MVUE exceeds."""
    x = _normal(tokens, columns, device)
    amax = token_amax(x)
    return x, E4M3_MAX / amax, (E4M3_MAX / MVUE_GAIN / amax.amax()).expand(tokens).contiguous()


def _gradient(tokens: int, columns: int, device: torch.device) -> Tensors:
    return *_activation(tokens, columns, device), torch.randint(2**62, (1,), device=device)


def _cast_mvue(
    grad: Tensor, row_scale: Tensor, token_scale: Tensor, seed: Tensor,
    approximate: bool = False, stochastic: bool = False, dtype: torch.dtype = E4M3,
) -> Tensors:  # fmt: skip
    return ops.cast_mvue(grad, row_scale, token_scale, seed, 3, approximate, stochastic, dtype)


def _cast_transpose(x: Tensor, row_scale: Tensor, token_scale: Tensor) -> Tensors:
    return ops.cast_transpose(x, row_scale, token_scale, E4M3)


def _payload(tokens: int, columns: int, device: torch.device) -> Tensors:
    return (saturating_cast(_normal(tokens, columns, device).float() * 100),)


def _transpose_tokens(x: Tensor) -> Tensors:
    return (ops.transpose_tokens(x),)


def _normal(rows: int, columns: int, device: torch.device) -> Tensor:
    return torch.randn(rows, columns, device=device, dtype=torch.bfloat16)


WEIGHT_OPS = {
    "prune_weight_": Op(make=_prune_inputs, run=_prune),
    "prune_weight_, hard": Op(make=_prune_inputs, run=partial(_prune, hard=True)),
    "prune_soft_transposable_": Op(make=_soft_transposable_inputs, run=_prune_soft_transposable),
    "prune_weight_bf16_": Op(make=_prune_bf16_inputs, run=_prune_bf16),
    "cast_weight_": Op(make=_cast_weight_inputs, run=_cast_weight),
    "prune_weight_, one copy": Op(make=_prune_once_inputs, run=_prune_once),
    "cast_weight_, one copy": Op(make=_cast_once_inputs, run=_cast_once),
    "transpose_pruned": Op(make=_pruned, run=_transpose_pruned),
}
MASK_OPS = {
    "prune_transposable_, search": Op(make=_transposable_inputs, run=partial(_prune_transposable, True)),
    "prune_transposable_, kept masks": Op(make=_transposable_inputs, run=partial(_prune_transposable, False)),
    "add_masked_decay_": Op(make=_decay_inputs, run=_add_masked_decay),
}
ACTIVATION_OPS = {
    "cast_mvue, exact": Op(make=_gradient, run=_cast_mvue),
    "cast_mvue, approximate": Op(make=_gradient, run=partial(_cast_mvue, approximate=True)),
    "cast_mvue, exact, stochastic": Op(make=_gradient, run=partial(_cast_mvue, stochastic=True)),
    "cast_mvue, exact, e5m2": Op(make=_gradient, run=partial(_cast_mvue, dtype=E5M2)),
    "cast_transpose": Op(make=_activation, run=_cast_transpose),
    "transpose_tokens": Op(make=_payload, run=_transpose_tokens),
}


def moved_bytes(inputs: Tensors, outputs: Tensors) -> int:
    """Bytes of the inputs and outputs, each counted once: an op may return the buffers that it was given."""
    return sum({id(tensor): tensor.nbytes for tensor in (*inputs, *outputs)}.values())


def compare(name: str, op: Op, shape: tuple[int, int], device: torch.device = DEVICE) -> dict[str, Any]:
    """The op and a copy of as many bytes.  Each output of the op has the bits of the eager reference."""
    shaped = op.make(*shape, torch.device("meta"))
    size = moved_bytes(shaped, op.run(*shaped))
    sets = set_count(size)

    @cache
    def inputs() -> list[Tensors]:
        return [op.make(*shape, device) for _ in range(sets)]

    def check(outputs: Sequence[Tensors]) -> None:
        for given, actual in zip(inputs(), outputs, strict=True):
            with ops.force_reference():
                expected = op.run(*(tensor.clone() for tensor in given))
            for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
                assert_same_bits(one, other, f"output {index}")

    @cache
    def copies() -> list[tuple[Tensor, Tensor]]:
        # Whole 512 bytes, so that source and target are aligned.
        half = size // 1024 * 512
        made = torch.empty(sets, 2, half, dtype=torch.uint8, device=device).random_()
        return [(source, target) for source, target in made]

    def check_copies(outputs: Sequence[Tensor]) -> None:
        for (source, _), target in zip(copies(), outputs, strict=True):
            assert_same_bits(target, source, "copy")

    candidates = {
        "op": Candidate(prepare=lambda: [partial(op.run, *given) for given in inputs()], check=check),
        "copy": Candidate(
            prepare=lambda: [partial(target.copy_, source) for source, target in copies()], check=check_copies
        ),
    }
    results = measure(candidates, sets * max(1, round(_GRAPH_BYTES / size / sets)), ROUNDS)
    row = _row(name, shape, size, results["op"], results["copy"])
    share = row["share_of_copy"]
    outcome = f"{share:.0%} of the copy rate" if share else "; ".join(map(brief, row["errors"]))
    print(f"{name} {shape}: {outcome}", flush=True)
    return row


def _row(name: str, shape: tuple[int, int], size: int, op: Timing | str, copy: Timing | str) -> dict[str, Any]:
    share = copy.median / op.median if isinstance(op, Timing) and isinstance(copy, Timing) else None
    return {
        "op": name,
        "shape": shape,
        "bytes": size,
        "op_ms": asdict(op) if isinstance(op, Timing) else None,
        "copy_ms": asdict(copy) if isinstance(copy, Timing) else None,
        "share_of_copy": share,
        "errors": [result for result in (op, copy) if isinstance(result, str)],
    }


def memory_part(*cases: tuple[Mapping[str, Op], Sequence[tuple[int, int]]]) -> Report:
    """Ops that are bound by memory, each in each of its shapes."""
    rows = []
    for ops_of_shapes, shapes in cases:
        for shape, (name, op) in product(shapes, ops_of_shapes.items()):
            rows.append(compare(name, op, shape))
            gc.collect()
            torch.cuda.empty_cache()
    return {"rows": rows, "failed": failures(rows)}, memory_table(rows)


def failures(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [f"{row['op']} {row['shape']}: {brief(error)}" for row in rows for error in row["errors"]]


def memory_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        times = [row["op_ms"][key] * 1e3 for key in ("median", "low", "high")] if row["op_ms"] else [None] * 3
        rates = [row["bytes"] / spread["median"] / 1e9 if spread else None for spread in (row["op_ms"], row["copy_ms"])]
        shape = " x ".join(map(str, row["shape"]))
        lines.append((row["op"], shape, row["bytes"] / 1e6, *times, *rates, row["share_of_copy"]))
    headers = ("op", "shape", "MB", "us", "p10", "p90", "TB/s", "TB/s of a copy", "of the copy rate")
    floats = ("", "", ".1f", ".1f", ".1f", ".1f", ".2f", ".2f", ".0%")
    table = tabulate(lines, headers=headers, floatfmt=floats, missingval="-", tablefmt="github")
    errors = [f"- {failure}" for failure in failures(rows)]
    return table + ("\n\nDid not run:\n\n" + "\n".join(errors) if errors else "")


def host_calls(device: torch.device) -> dict[str, Callable[[], object]]:
    """One call of each op, on operands of 256 x 256."""
    calls: dict[str, Callable[[], object]] = {}
    for name, op in (WEIGHT_OPS | MASK_OPS | ACTIVATION_OPS).items():
        calls[name] = partial(op.run, *op.make(HOST_SIDE, HOST_SIDE, device))
    weight, beta, *buffers = _prune_inputs(HOST_SIDE, HOST_SIDE, device)
    values, metadata, weight_t, scale_inv = _prune(weight, beta, *buffers)
    (x,) = _payload(HOST_SIDE, HOST_SIDE, device)
    token_scale_inv = torch.ones(HOST_SIDE, device=device)
    calls["sparse_mm, fprop"] = partial(
        ops.sparse_mm, values, metadata, x, scale_inv, token_scale_inv, torch.bfloat16, True, True
    )
    calls["sparse_mm, wgrad"] = partial(
        ops.sparse_mm, values, metadata, x, scale_inv, None, torch.bfloat16, False, False
    )
    calls["scaled_mm"] = partial(ops.scaled_mm, x, weight_t, scale_inv, torch.bfloat16, True)
    return calls


def host_part() -> Report:
    """Host time of a call: of many that nothing waits for, taking turns with the other ops."""
    calls = host_calls(DEVICE)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(_HOST_ROUNDS):
        for name, call in calls.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(_HOST_CALLS):
                call()
            times[name].append((time.perf_counter() - start) / _HOST_CALLS * 1e3)
    rows = [{"op": name, "host_ms": asdict(timing(measured))} for name, measured in times.items()]
    return {"rows": rows, "target_us": HOST_TARGET, "failed": []}, host_table(rows)


def host_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [(row["op"], *(row["host_ms"][key] * 1e3 for key in ("median", "low", "high"))) for row in rows]
    table = tabulate(lines, headers=("op", "us", "p10", "p90"), floatfmt=".1f", tablefmt="github")
    worst = max(row["host_ms"]["median"] for row in rows) * 1e3
    middle = statistics.median(row["host_ms"]["median"] for row in rows) * 1e3
    return f"{table}\n\nMedian of the ops {middle:.1f} us, largest {worst:.1f} us; target: at most {HOST_TARGET:g} us."


def main() -> None:
    parts = {
        "memory": partial(memory_part, (WEIGHT_OPS, WEIGHTS), (ACTIVATION_OPS, ACTIVATIONS)),
        "masks": partial(memory_part, (MASK_OPS, WEIGHTS)),
        "host": host_part,
    }
    run_parts("bench_kernels", __doc__, parts)


if __name__ == "__main__":
    main()
