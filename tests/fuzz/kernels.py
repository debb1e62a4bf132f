"""Kernels alone: random shapes, strides, offsets and values, in memory whose surroundings are watched.

What a kernel may read lies between NaN, what it writes is full of them before, and nothing else may change.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from random import Random
from typing import Any

import torch
from torch import Tensor

from sparse_compile.kernels import ops, reference
from sparse_compile.kernels.formats import E4M3, FP8_DTYPES, metadata_shape, padded, sums_shape, values_shape
from sparse_compile.testing import assert_block_sums, assert_same_bits

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GUARD = 1024  # bytes at either end
POISON = 0xFF  # NaN in every format, and no legal word of metadata
# Of weights, multiples of 16; of tokens, with all tails.
FEATURES = (16, 32, 48, 64, 80, 112, 128, 144, 208, 256, 272, 528, 1040)
TOKENS = (0, 1, 2, 15, 16, 17, 31, 64, 100, 127, 128, 129, 255, 256, 257, 333, 1023, 4097)


class Memory:
    """Tensors in buffers of their own, with guards around them.

    Args:
        largest: size that is drawn.
    """

    def __init__(self, chance: Random, device: str, largest: int) -> None:
        self.chance, self.device = chance, device
        self.features = [size for size in FEATURES if size <= largest]
        self.tokens = [size for size in TOKENS if size <= largest]
        self.generator = torch.Generator().manual_seed(chance.getrandbits(60))
        self._buffers: list[tuple[Tensor, Tensor, Tensor | None]] = []  # bytes, as they were; what may be written

    def given(self, x: Tensor, *, strided: bool = False, aligned: bool = True, written: bool = False) -> Tensor:
        """A copy that a kernel reads; of any strides, or away from 16-byte boundaries, or to be written as well."""
        shape = x.shape
        strides = list(x.contiguous().stride())
        if strided and x.dim() == 2:
            rows, columns = shape
            kind = self.chance.choice(["rows", "columns", "padded", "wide", "both"])
            strides = {
                "rows": [columns, 1], "columns": [1, rows], "padded": [columns + 16, 1], "wide": [3 * columns, 3],
                "both": [2, 2 * rows + 6],
            }[kind]  # fmt: skip
        offset = self.chance.choice((0, 16)) if aligned else self.chance.randrange(32)
        span = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if x.numel() else 0
        buffer = self._buffer((offset + span) * x.element_size())
        view = buffer[GUARD:-GUARD].view(x.dtype).as_strided(shape, strides, GUARD // x.element_size() + offset)
        view.copy_(x)
        self._buffers.append((buffer, buffer.clone(), view if written else None))
        return view

    def taken(self, shape: Sequence[int], dtype: torch.dtype, holds: float | None = None) -> Tensor:
        """What a kernel writes in full: it is contiguous, and holds anything before."""
        size = torch.Size(shape).numel() * dtype.itemsize
        buffer = self._buffer(size)
        view = buffer[GUARD : GUARD + size].view(dtype).view(*shape)
        if holds is not None:
            view.fill_(holds)
        self._buffers.append((buffer, buffer.clone(), view))
        return view

    def _buffer(self, size: int) -> Tensor:
        whole = (size + 15) // 16 * 16 + 2 * GUARD
        return torch.full((whole,), POISON, dtype=torch.uint8, device=self.device)

    def check(self) -> None:
        """Nothing has changed but what may be written."""
        for buffer, before, written in self._buffers:
            if written is not None:
                # As it was before, where it may be written.
                restored = before.view(written.dtype).as_strided(
                    written.shape, written.stride(), written.storage_offset()
                )
                restored.copy_(written)
            changed = (buffer != before).nonzero()
            assert not changed.numel(), f"{changed.numel()} bytes around tensors changed, the first at {changed[0]}"

    # Values.

    def dtype(self) -> torch.dtype:
        return self.chance.choice(DTYPES)

    def values(self, *shape: int) -> Tensor:
        """fp32, of a kind that is drawn."""
        x = torch.randn(shape, generator=self.generator)
        kind = self.chance.choice(
            ["normal", "normal", "ties", "equal", "zero", "negative zero", "tiny", "subnormal", "huge", "outliers"]
        )
        if kind == "ties":
            x = torch.randint(-3, 4, shape, generator=self.generator).float()
        elif kind == "outliers":
            x = torch.where(torch.rand(shape, generator=self.generator) < 0.01, 1e4 * x, x)
        elif kind != "normal":
            scale = {"equal": 0.0, "zero": 0.0, "negative zero": -0.0, "tiny": 1e-30, "subnormal": 1e-41, "huge": 1e4}
            x = x * scale[kind] + (0.7 if kind == "equal" else 0.0)
        return x

    def with_specials(self, x: Tensor) -> Tensor:
        """NaN and infinities in a few places, or in none."""
        if x.numel() and self.chance.random() < 0.3:
            flat = x.view(-1)
            for value in self.chance.sample([float("nan"), float("inf"), -float("inf")], 2):
                flat[self.chance.randrange(flat.numel())] = value
        return x

    def weight(self, *, finite: bool = False) -> Tensor:
        n, k = self.chance.choice(self.features), self.chance.choice(self.features)
        x = self.values(n, k)
        x = (x if finite else self.with_specials(x)).to(self.dtype())
        return self.given(x, strided=True, aligned=self.chance.random() < 0.5)

    def hint(self, right: Tensor) -> float:
        """What stands in ``scale_inv``: what was right before, or anything."""
        others = (2 * float(right), 0.9 * float(right), -1.0, 0.0, float("nan"), float("inf"), 1e-42)
        return self.chance.choice((float(right), *others))


@dataclass
class Call:
    """Of a launching function of ``kernels``, and what must be in its outputs then; in ``sums``, those of the first."""

    function: str
    arguments: tuple[Any, ...]
    outputs: Sequence[Tensor | None]  # None of what is left out
    expected: Sequence[Tensor]
    sums: Tensor | None = None


def prune_weight(memory: Memory) -> Call:
    weight, hard = memory.weight(), memory.chance.random() < 0.5
    (n, k), beta = weight.shape, memory.given(torch.tensor([1.4839]))
    expected = reference.prune_weight(weight, beta, hard)
    outputs = (
        memory.taken(values_shape(n, k), E4M3), memory.taken(metadata_shape(n, k), torch.int32),
        memory.taken((k, n), E4M3) if memory.chance.random() < 0.5 else None,
        memory.taken((1,), torch.float32, memory.hint(expected[-1])),
    )  # fmt: skip
    return Call("weight.prune_fp8.launch_prune_weight", (weight, beta, *outputs, hard), outputs, expected)


def prune_weight_bf16(memory: Memory) -> Call:
    weight, hard = memory.weight(), memory.chance.random() < 0.5
    (n, k), beta = weight.shape, memory.given(torch.tensor([1.4839]))
    outputs = (
        memory.taken(values_shape(n, k), torch.bfloat16),
        memory.taken(metadata_shape(n, k, torch.bfloat16), torch.int32),
        memory.taken((n, k), torch.bfloat16), memory.taken((1,), torch.float32),
    )  # fmt: skip
    expected = reference.prune_weight_bf16(weight, beta, hard)
    return Call("weight.prune_bf16.launch_prune_weight_bf16", (weight, beta, *outputs, hard), outputs, expected)


def cast_weight(memory: Memory) -> Call:
    weight = memory.weight()
    n, k = weight.shape
    expected = reference.cast_weight(weight)
    scale_inv = memory.taken((1,), torch.float32, memory.hint(expected[-1]))
    copies = [memory.taken((n, k), E4M3), memory.taken((k, n), E4M3)]
    left_out = memory.chance.randrange(3)
    outputs = (*(None if index == left_out else copy for index, copy in enumerate(copies)), scale_inv)
    return Call("weight.prune_fp8.launch_cast_weight", (weight, *outputs), outputs, expected)


def transpose_pruned(memory: Memory) -> Call:
    """Of any bytes, at any legal places."""
    rows, columns = memory.chance.choice(memory.features), padded(memory.chance.choice(memory.features))
    dense = torch.randint(256, (rows, columns), generator=memory.generator).to(torch.uint8).view(E4M3)
    order = torch.rand(rows, columns // 4, 4, generator=memory.generator).argsort(dim=-1)
    pruned = reference.compress24(dense, order[..., :2].sort(dim=-1).values)
    values, metadata = (memory.given(operand) for operand in pruned)
    output = memory.taken((columns, rows), E4M3)
    expected = reference.transpose_pruned(values, metadata)
    call = (values, metadata, output)
    return Call("weight.transpose_pruned.launch_transpose_pruned", call, (output,), (expected,))


def _both_ways(memory: Memory, n: int, k: int) -> tuple[Tensor, ...]:
    return tuple(
        memory.taken(shape, dtype)
        for rows, columns in ((n, k), (k, n))
        for shape, dtype in ((values_shape(rows, columns), E4M3), (metadata_shape(rows, columns), torch.int32))
    )


def prune_soft_transposable(memory: Memory) -> Call:
    weight, beta = memory.weight(), memory.given(torch.tensor([1.5826]))
    expected = reference.prune_soft_transposable(weight, beta)
    scale_inv = memory.taken((1,), torch.float32, memory.hint(expected[-1]))
    outputs = (*_both_ways(memory, *weight.shape), scale_inv)
    return Call("weight.prune_fp8.launch_prune_soft_transposable", (weight, beta, *outputs), outputs, expected)


def prune_transposable(memory: Memory) -> Call:
    # Which mask is the best of a tile with NaN is left open.
    search = memory.chance.random() < 0.5
    weight = memory.weight(finite=search)
    n, k = weight.shape
    best = reference.transposable_masks(weight if search else torch.randn(n, k, device=weight.device))
    masks = memory.taken(best.shape, torch.int16) if search else memory.given(best)
    expected = reference.prune_transposable(weight, best)
    scale_inv = memory.taken((1,), torch.float32, memory.hint(expected[-1]))
    outputs = (*_both_ways(memory, n, k), scale_inv)
    return Call(
        "weight.prune_fp8.launch_prune_transposable", (weight, *outputs, masks, search),
        (*outputs, masks), (*expected, best),
    )  # fmt: skip


def masked_decay(memory: Memory) -> Call:
    weight = memory.weight()
    grad = memory.given(memory.values(*weight.shape).to(memory.dtype()), strided=True, aligned=False, written=True)
    factor = memory.given(torch.tensor([0.37]))
    masks = None
    mask = reference.top2_mask(weight)
    if memory.chance.random() < 0.5:
        masks = memory.given(reference.transposable_masks(torch.randn(weight.shape, device=weight.device)))
        mask = reference.dense_mask(masks)
    expected = reference.add_masked_decay(grad, weight, factor, mask)
    return Call(
        "weight.masked_decay.launch_add_masked_decay", (grad, weight, factor, masks), (grad,), (expected,)
    )  # fmt: skip


def _tokens(memory: Memory) -> tuple[Tensor, Tensor, Tensor]:
    """Activations ``[T, C]`` and two scales for each token."""
    tokens, columns = memory.chance.choice(memory.tokens), memory.chance.choice(memory.features)
    x = memory.given(memory.values(tokens, columns).to(memory.dtype()), aligned=memory.chance.random() < 0.5)
    scales = torch.rand(2, tokens, generator=memory.generator) * memory.chance.choice((1.0, 1e3, 1e-3))
    return x, memory.given(scales[0]), memory.given(scales[1])


def cast_transpose(memory: Memory) -> Call:
    (x, row_scale, token_scale), dtype = _tokens(memory), memory.chance.choice(FP8_DTYPES)
    tokens, columns = x.shape
    outputs = memory.taken((tokens, columns), dtype), memory.taken((columns, padded(tokens)), dtype)
    expected = reference.cast_transpose(x, row_scale, token_scale, dtype)
    sums = _sums(memory, tokens, columns)
    arguments = (x, row_scale, token_scale, *outputs, sums)
    return Call("activation.cast_transpose.launch_cast_transpose", arguments, outputs, expected, sums)


def transpose_tokens(memory: Memory) -> Call:
    tokens, columns = memory.chance.choice(memory.tokens), memory.chance.choice(memory.features)
    x = memory.given(torch.randint(256, (tokens, columns), generator=memory.generator).to(torch.uint8).view(E4M3))
    output = memory.taken((columns, padded(tokens)), E4M3)
    expected = reference.transpose_tokens(x)
    return Call("activation.cast_transpose.launch_transpose_tokens", (x, output), (output,), (expected,))


def cast_mvue(memory: Memory) -> Call:
    (grad, row_scale, token_scale), dtype = _tokens(memory), memory.chance.choice(FP8_DTYPES)
    tokens, columns = grad.shape
    seed = memory.given(torch.tensor([memory.chance.randrange(-(2**63), 2**63)]))
    sampling = memory.chance.randrange(2**31), memory.chance.random() < 0.5, memory.chance.random() < 0.5
    outputs = (
        memory.taken((tokens, columns), dtype), memory.taken(values_shape(columns, tokens), dtype),
        memory.taken(metadata_shape(columns, tokens), torch.int32),
    )  # fmt: skip
    expected = reference.cast_mvue(grad, row_scale, token_scale, seed, *sampling, dtype)
    sums = _sums(memory, tokens, columns)
    arguments = (grad, row_scale, token_scale, seed, *sampling, *outputs, sums)
    return Call("activation.cast_mvue.launch_cast_mvue", arguments, outputs, expected, sums)


def _sums(memory: Memory, tokens: int, columns: int) -> Tensor | None:
    wanted = memory.chance.random() < 0.5
    return memory.taken(sums_shape(tokens, columns), torch.float32) if wanted else None


def sparse_gemm(memory: Memory) -> Call:
    """Of small integers, whose sums the tensor cores hold."""
    rows, contraction = memory.chance.choice(memory.features), memory.chance.choice(memory.features)
    columns = memory.chance.choice(memory.tokens)
    dtype = memory.chance.choice((*FP8_DTYPES, torch.bfloat16))
    signs = torch.randint(-1, 2, (rows, contraction), generator=memory.generator).float()
    prune = reference.prune_weight_bf16 if dtype is torch.bfloat16 else reference.prune_weight
    values, metadata, _, _ = prune(signs, torch.ones(1), True)
    values = values.to(dtype) if dtype is torch.bfloat16 else values.float().to(dtype)
    dense = torch.randint(-1, 2, (columns, contraction), generator=memory.generator).to(dtype)
    scale_inv = memory.given(torch.tensor([0.25]))
    exponents = torch.randint(-3, 4, (columns,), generator=memory.generator)
    dense_scale_inv = memory.given(2.0**exponents) if memory.chance.random() < 0.5 else None
    transpose, fast = memory.chance.random() < 0.5, memory.chance.random() < 0.5
    out = memory.taken((columns, rows) if transpose else (rows, columns), memory.dtype())
    inputs = (memory.given(values), memory.given(metadata), memory.given(dense), scale_inv, dense_scale_inv)
    expected = reference.sparse_mm(*inputs, out.dtype, transpose, fast)
    return Call("sparse_gemm.launch.launch_sparse_gemm", (*inputs, out, transpose, fast), (out,), (expected,))


KERNELS: dict[str, Callable[[Memory], Call]] = {
    function.__name__: function
    for function in (
        prune_weight, prune_weight_bf16, cast_weight, transpose_pruned, prune_soft_transposable, prune_transposable,
        masked_decay, cast_transpose, transpose_tokens, cast_mvue, sparse_gemm,
    )
}  # fmt: skip


def launch(call: Call) -> None:
    """The kernel itself."""
    module, name = call.function.rsplit(".", 1)
    getattr(import_module(f"sparse_compile.kernels.{module}"), name)(*call.arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def define(call: Call) -> None:
    """What the kernel must do, where there is none."""
    ops.fill(call.outputs, call.expected)
    if call.sums is not None:
        call.sums.copy_(reference.block_sums(call.arguments[0]))


def check(kernel: str, seed: int, device: str, run: Callable[[Call], None] = launch, largest: int = 4097) -> None:
    """One call, drawn by the seed.

    Raises:
        AssertionError: it wrote something else, or somewhere else.
    """
    memory = Memory(Random(f"{kernel}, {seed}"), device, largest)
    call = KERNELS[kernel](memory)
    run(call)
    what = ", ".join(
        f"{tuple(argument.shape)} {argument.dtype} {argument.stride()}"
        if isinstance(argument, Tensor)
        else f"{argument}"
        for argument in call.arguments
    )
    what = f"{kernel}, seed {seed}: {what}"
    try:
        memory.check()
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from error
    for number, (actual, expected) in enumerate(zip(call.outputs, call.expected, strict=True)):
        if actual is not None:
            assert_same_bits(actual, expected, f"{what}: output {number}")
    if call.sums is not None:
        assert_block_sums(call.sums, call.arguments[0], f"{what}: sums")


# Beyond 2**31 elements, where the last tokens and rows are compared.

HUGE = (2**21 + 80, 1040)


def huge_weight(kernel: str) -> None:
    rows, columns = HUGE
    weight = torch.empty(HUGE, device="cuda", dtype=torch.bfloat16).normal_().clamp_(-4, 4)
    weight[-1, 3] = 6.0  # the largest is in what is compared, so it has the same scale
    last, beta = weight[-128:], torch.ones(1, device="cuda")
    scale_inv = torch.empty(1, device="cuda")
    taken = lambda shape, dtype: torch.empty(shape, device="cuda", dtype=dtype)  # noqa: E731
    if kernel == "cast_weight":
        outputs = (taken((rows, columns), E4M3), taken((columns, rows), E4M3), scale_inv)
        launch(Call("weight.prune_fp8.launch_cast_weight", (weight, *outputs), (), ()))
        found = (outputs[0][-128:], outputs[1][:, -128:].contiguous(), scale_inv)
        expected: Sequence[Tensor] = reference.cast_weight(last)
    else:
        outputs = (
            taken(values_shape(rows, columns), E4M3), taken(metadata_shape(rows, columns), torch.int32),
            taken((columns, rows), E4M3), scale_inv,
        )  # fmt: skip
        launch(Call("weight.prune_fp8.launch_prune_weight", (weight, beta, *outputs, False), (), ()))
        found = (outputs[0][-128:], outputs[2][:, -128:].contiguous(), scale_inv)
        values, _, weight_t, expected_scale = reference.prune_weight(last, beta)
        expected = (values, weight_t, expected_scale)
    for number, (actual, wanted) in enumerate(zip(found, expected, strict=True)):
        assert_same_bits(actual, wanted, f"{kernel} of {HUGE}: output {number}")


def huge_tokens(kernel: str) -> None:
    tokens, _ = HUGE
    x = torch.empty(HUGE, device="cuda", dtype=torch.bfloat16).normal_()
    scales = torch.rand(2, tokens, device="cuda") * 100
    if kernel == "cast_transpose":
        row, column = ops.cast_transpose(x, scales[0], scales[1], E4M3)
        expected = reference.cast_transpose(x[-80:], scales[0, -80:], scales[1, -80:], E4M3)
        found = (row[-80:], column[:, tokens - 80 : tokens + 48].contiguous())
    else:
        seed = torch.ones(1, dtype=torch.int64, device="cuda")
        found = tuple(ops.cast_mvue(x, scales[0], scales[1], seed, 3, False, False, E4M3)[:2])
        # A draw depends on the column, so the first columns have theirs on their own.
        expected = reference.cast_mvue(x[:, :16].contiguous(), scales[0], scales[1], seed, 3, False, False, E4M3)[:2]
        found = (found[0][:, :16].contiguous(), found[1][:16])
    for number, (actual, wanted) in enumerate(zip(found, expected, strict=True)):
        assert_same_bits(actual, wanted, f"{kernel} of {HUGE}: output {number}")


HUGE_CHECKS: dict[str, Callable[[], None]] = {
    **{name: (lambda name=name: huge_weight(name)) for name in ("prune_weight", "cast_weight")},
    **{name: (lambda name=name: huge_tokens(name)) for name in ("cast_transpose", "cast_mvue")},
}
