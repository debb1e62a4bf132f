"""The ops: schemas, fakes and dispatch.  ``torch.ops.sparse_compile.*``

Each op has one eager definition (``reference``) and, on GPUs of compute capability 9.0, one kernel.  The kernels are
imported on first use, so that importing this module needs no Triton.  The ops are opaque to AOTAutograd and Inductor
and not differentiable: ``linear.py`` composes them into differentiable linears.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from sparse_compile.kernels import reference
from sparse_compile.kernels.formats import metadata_shape, padded, sums_shape, values_shape
from sparse_compile.torch_internals.autocast import no_autocast

P = ParamSpec("P")
R = TypeVar("R")

_LIBRARY = torch.library.Library("sparse_compile", "DEF")
_reference_forced = False
# By their names, the ops that are defined so far: what this module defines, and what projections do.
defined: dict[str, Callable[..., Any]] = {}
# Called in the place of each op, with its name, what it would have called, and the arguments: it returns the result.
Observer = Callable[[str, Callable[..., Any], tuple[Any, ...]], Any]
_observer: Observer | None = None


def emulation_reason(device: torch.device) -> str | None:
    """Why the ops run their eager reference on ``device``; None where they run kernels."""
    if _reference_forced:
        return "the eager reference was asked for"
    return missing_kernels(device)


def missing_kernels(device: torch.device) -> str | None:
    """Why there are no kernels for ``device``; None where there are."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _missing_kernels(device)


@cache
def _missing_kernels(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"no kernels for {device.type}"
    name = torch.cuda.get_device_name(device)
    if torch.version.hip is not None:
        return f"no kernels for {name} (ROCm)"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        return f"no kernels for {name} (sm_{major}{minor}), only for sm_90 (Hopper)"
    return None


@contextmanager
def force_reference() -> Iterator[None]:
    """Run the eager reference of every op, also on a Hopper GPU: the oracle of tests and benchmarks."""
    global _reference_forced
    before, _reference_forced = _reference_forced, True
    try:
        yield
    finally:
        _reference_forced = before


def observe(observer: Observer | None) -> Observer | None:
    """Let an observer, or none, call every op from now on; returns the one before.

    Ops of a CUDA graph that is replayed are not seen.
    """
    global _observer
    before, _observer = _observer, observer
    return before


@contextmanager
def observed(observer: Observer | None) -> Iterator[None]:
    """Observe for a while."""
    before = observe(observer)
    try:
        yield
    finally:
        observe(before)


def define(
    schema: str,
    eager: Callable[..., R],
    load: Callable[[], Callable[..., R]] | None,
    fake: Callable[P, R],
    *,
    any_strides: int = 0,
) -> Callable[P, R]:
    """Define one op.

    All tensors must be contiguous but the first ``any_strides`` arguments.  What ``load`` returns, which runs
    on Hopper GPUs, sees to that itself: launchers check only arguments whose like they have not met before.  Without it
    there is no kernel yet, and the eager definition runs there, too.
    """
    name = schema.split("(")[0]

    def emulate(*arguments: Any) -> R:
        _check_contiguous(name, arguments, start=any_strides)
        # Autocast would silently turn the fp32 products of the reference into bf16.
        with no_autocast():
            return eager(*arguments)

    def run(*arguments: Any) -> R:
        if load is None or _reference_forced or _missing_kernels(arguments[0].device) is not None:
            return emulate(*arguments)
        return load()(*arguments)

    def observable(call: Callable[..., R]) -> Callable[..., R]:
        def seen(*arguments: Any) -> R:
            observer = _observer  # another thread may change it
            return call(*arguments) if observer is None else cast(R, observer(name, call, arguments))

        return seen

    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    _LIBRARY.impl(name, observable(emulate), "CompositeExplicitAutograd")
    _LIBRARY.impl(name, observable(run), "CUDA")
    torch.library.register_fake(f"sparse_compile::{name}", fake, lib=_LIBRARY)
    defined[name] = getattr(torch.ops.sparse_compile, name).default
    return cast(Callable[P, R], defined[name])


def _check_contiguous(name: str, arguments: Sequence[object], start: int = 0) -> None:
    for index, argument in enumerate(arguments[start:], start):
        if isinstance(argument, Tensor) and not argument.is_contiguous():
            raise ValueError(
                f"argument {index} of {name} is {tuple(argument.shape)} with strides {argument.stride()}; "
                "it must be contiguous"
            )


def launcher(
    function: str, fake: Callable[..., Any], order: Callable[..., tuple[object, ...]] = lambda *arguments: arguments
) -> Callable[[], Callable[..., Any]]:
    """Loads what an op runs on Hopper GPUs: the function ``"module.name"`` of ``kernels``, imported on first use.

    It is called with the op's arguments and its results, in ``order``; results are allocated like those of ``fake``.
    """
    module, name = function.rsplit(".", 1)

    @cache
    def load() -> Callable[..., Any]:
        from sparse_compile.kernels import launch_plan

        launch = getattr(import_module(f"sparse_compile.kernels.{module}"), name)
        return launch_plan.planned(lambda *arguments: launch_plan.plan_with_results(launch, fake, arguments, order))

    return load


def empty(like: Tensor, shape: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def no_results(*arguments: Tensor | bool | None) -> None:
    """The fake of an op that writes into its arguments alone."""


def fill(buffers: Sequence[Tensor | None], results: Sequence[Tensor]) -> None:
    """Copy results into buffers, where there are any."""
    for buffer, result in zip(buffers, results, strict=True):
        if buffer is not None:
            buffer.copy_(result)


def of_experts_too(eager: Callable[..., None]) -> Callable[..., None]:
    """What does with the matrices of experts ``[E, N, K]``, and all tensors beside them, as ``eager`` with one."""

    def each(weight: Tensor, *arguments: Any) -> None:
        if weight.ndim == 2:
            eager(weight, *arguments)
            return
        for e, matrix in enumerate(weight):
            # beta stays one-dimensional.
            of_one = ((a[e] if a.ndim > 1 else a[e : e + 1]) if isinstance(a, Tensor) else a for a in arguments)
            eager(matrix, *of_one)

    return each


def _add_masked_decay_eager(grad: Tensor, weight: Tensor, factor: Tensor, masks: Tensor | None = None) -> None:
    mask = reference.top2_mask(weight) if masks is None else reference.dense_mask(masks)
    grad.copy_(reference.add_masked_decay(grad, weight, factor, mask))


add_masked_decay_ = define(
    "add_masked_decay_(Tensor(a!) grad, Tensor weight, Tensor factor, Tensor? masks=None) -> ()",
    _add_masked_decay_eager,
    launcher("weight.masked_decay.launch_add_masked_decay", no_results),
    no_results,
    any_strides=2,
)


def _cast_transpose_fake(
    x: Tensor, row_scale: Tensor, token_scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    tokens, columns = x.shape
    return empty(x, (tokens, columns), dtype), empty(x, (columns, padded(tokens)), dtype)


def _launched_cast_transpose(
    x: Tensor, row_scale: Tensor, token_scale: Tensor, dtype: torch.dtype, *results: Tensor
) -> tuple[object, ...]:
    return (x, row_scale, token_scale, *results)


def _with_sums(
    cast: Callable[..., tuple[Tensor, ...]], sums: Callable[[Tensor], Tensor] = reference.block_sums
) -> Callable[..., tuple[Tensor, ...]]:
    """A cast that also returns sums of its first argument."""
    return lambda x, *arguments: (*cast(x, *arguments), sums(x))


def _sums_fake(x: Tensor) -> Tensor:
    return empty(x, sums_shape(*x.shape), torch.float32)


_cast_transpose_with_sums_fake = _with_sums(_cast_transpose_fake, _sums_fake)

cast_transpose = define(
    "cast_transpose(Tensor x, Tensor row_scale, Tensor token_scale, ScalarType dtype) -> (Tensor, Tensor)",
    reference.cast_transpose,
    launcher("activation.cast_transpose.launch_cast_transpose", _cast_transpose_fake, _launched_cast_transpose),
    _cast_transpose_fake,
)


cast_transpose_with_sums = define(
    "cast_transpose_with_sums(Tensor x, Tensor row_scale, Tensor token_scale, ScalarType dtype) "
    "-> (Tensor, Tensor, Tensor)",
    _with_sums(reference.cast_transpose),
    launcher(
        "activation.cast_transpose.launch_cast_transpose", _cast_transpose_with_sums_fake, _launched_cast_transpose
    ),
    _cast_transpose_with_sums_fake,
)


def _transpose_tokens_fake(x: Tensor) -> Tensor:
    return empty(x, (x.shape[1], padded(x.shape[0])), x.dtype)


transpose_tokens = define(
    "transpose_tokens(Tensor x) -> Tensor",
    reference.transpose_tokens,
    launcher("activation.cast_transpose.launch_transpose_tokens", _transpose_tokens_fake),
    _transpose_tokens_fake,
)


def _transpose_pruned_fake(values: Tensor, metadata: Tensor) -> Tensor:
    return empty(values, (2 * values.shape[1], values.shape[0]), values.dtype)


transpose_pruned = define(
    "transpose_pruned(Tensor values, Tensor metadata) -> Tensor",
    reference.transpose_pruned,
    launcher("weight.transpose_pruned.launch_transpose_pruned", _transpose_pruned_fake),
    _transpose_pruned_fake,
)


def _cast_mvue_fake(
    grad: Tensor,
    row_scale: Tensor,
    token_scale: Tensor,
    seed: Tensor,
    index: int,
    approximate: bool,
    stochastic: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, columns = grad.shape
    return (
        empty(grad, (tokens, columns), dtype),
        empty(grad, values_shape(columns, tokens), dtype),
        empty(grad, metadata_shape(columns, tokens), torch.int32),
    )


def _launched_cast_mvue(
    grad: Tensor, row_scale: Tensor, token_scale: Tensor, seed: Tensor, index: int, approximate: bool, stochastic: bool,
    dtype: torch.dtype, *results: Tensor,
) -> tuple[object, ...]:  # fmt: skip
    return (grad, row_scale, token_scale, seed, index, approximate, stochastic, *results)


cast_mvue = define(
    "cast_mvue(Tensor grad, Tensor row_scale, Tensor token_scale, Tensor seed, int index, bool approximate, "
    "bool stochastic, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    reference.cast_mvue,
    launcher("activation.cast_mvue.launch_cast_mvue", _cast_mvue_fake, _launched_cast_mvue),
    _cast_mvue_fake,
)


_cast_mvue_with_sums_fake = _with_sums(_cast_mvue_fake, _sums_fake)

cast_mvue_with_sums = define(
    "cast_mvue_with_sums(Tensor grad, Tensor row_scale, Tensor token_scale, Tensor seed, int index, bool approximate, "
    "bool stochastic, ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    _with_sums(reference.cast_mvue),
    launcher("activation.cast_mvue.launch_cast_mvue", _cast_mvue_with_sums_fake, _launched_cast_mvue),
    _cast_mvue_with_sums_fake,
)


def _materialize(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


# The same tensor in memory of its own: being opaque, it keeps the compiler from computing x again where it is read.
materialize = define(
    "materialize(Tensor x) -> Tensor",
    _materialize,
    lambda: _materialize,
    lambda x: empty(x, tuple(x.shape), x.dtype),
    any_strides=1,
)


def _sparse_mm_fake(
    values: Tensor,
    metadata: Tensor,
    dense: Tensor,
    scale_inv: Tensor,
    dense_scale_inv: Tensor | None,
    out_dtype: torch.dtype,
    transpose: bool,
    use_fast_accum: bool,
) -> Tensor:
    rows, columns = values.shape[0], dense.shape[0]
    return empty(dense, (columns, rows) if transpose else (rows, columns), out_dtype)


sparse_mm = define(
    "sparse_mm(Tensor values, Tensor metadata, Tensor dense, Tensor scale_inv, Tensor? dense_scale_inv, "
    "ScalarType out_dtype, bool transpose, bool use_fast_accum) -> Tensor",
    reference.sparse_mm,
    launcher(
        "sparse_gemm.launch.launch_sparse_gemm",
        _sparse_mm_fake,
        lambda values, metadata, dense, scale_inv, dense_scale_inv, out_dtype, transpose, use_fast_accum, out: (
            (values, metadata, dense, scale_inv, dense_scale_inv, out, transpose, use_fast_accum)
        ),
    ),
    _sparse_mm_fake,
)


@cache
def unit_scale(device: torch.device, number: int = 1) -> Tensor:
    """fp32 ``[number]`` holding 1."""
    return torch.ones(number, dtype=torch.float32, device=device)


def unit_beta(weight: Tensor) -> Tensor:
    """1 for a weight ``[N, K]``, or for each matrix of ``[E, N, K]``."""
    return unit_scale(weight.device, weight.shape[0] if weight.ndim == 3 else 1)


def prepare(device: torch.device) -> None:
    """Allocate what the ops keep on ``device``: to be called before a CUDA graph owns the allocator."""
    unit_scale(device)


def _scaled_mm_kernel(a: Tensor, b: Tensor, scale_inv: Tensor, out_dtype: torch.dtype, use_fast_accum: bool) -> Tensor:
    _check_contiguous("scaled_mm", (a, b, scale_inv))
    if 0 in (*a.shape, b.shape[0]):
        return torch.zeros(a.shape[0], b.shape[0], dtype=out_dtype, device=a.device)
    return torch._scaled_mm(
        a, b.t(), scale_a=scale_inv, scale_b=unit_scale(a.device), out_dtype=out_dtype, use_fast_accum=use_fast_accum
    )


def _scaled_mm_fake(a: Tensor, b: Tensor, scale_inv: Tensor, out_dtype: torch.dtype, use_fast_accum: bool) -> Tensor:
    return empty(a, (a.shape[0], b.shape[0]), out_dtype)


scaled_mm = define(
    "scaled_mm(Tensor a, Tensor b, Tensor scale_inv, ScalarType out_dtype, bool use_fast_accum) -> Tensor",
    reference.scaled_mm,
    lambda: _scaled_mm_kernel,
    _scaled_mm_fake,
)
