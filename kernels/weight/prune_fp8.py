"""A weight to e4m3 with one scale: 2:4-pruned and compressed, or dense.

    prune:  W~ = beta * S(W),  of each four along K, S keeps two
            payload = e4m3(S * scale),  scale_inv = beta / scale,  amax = max |S|
            soft (S-STE):  S(w) = sign(w) * max(|w| - t, 0),  t the second smallest magnitude
            hard (top-2):  S(w) = w for the two largest magnitudes, of equal ones the first, and 0 for the others
    soft transposable:  W~ = beta * S(W), by the larger of the soft thresholds of each four along K and along N;
                        payload and amax as above, but 2:4 along rows and columns
    transposable:  W~ = mask * W, mask 2:4 along rows and columns; payload = e4m3(W * scale), amax = max |W|
    cast:   payload = e4m3(W * scale),  scale_inv = 1 / scale,  amax = max |W|

``scale`` is the largest power of two with ``amax * scale <= 448``.  ``weight [N, K]`` may have any strides.  Pruning
writes ``values [N, padded(K) / 2]`` and ``metadata`` (see ``formats``) for fprop and, transposed, the payload
``[K, N]`` for dgrad, which is compressed as well where it is 2:4 along both dimensions.  Casting writes the payload as
it is and transposed.  Dense ones may be left out.  Arithmetic is fp32.

The weight is read once.  Its scale hardly ever changes from one step to the next, being a power of two.  So a first
launch casts with the scale that stands behind the old ``scale_inv`` and finds the amax of each tile; a second one finds
the true scale, casts again if it is another, and writes ``scale_inv``.  What stood in ``scale_inv`` decides how long
this takes, never what is written.

A weight ``[E, N, K]`` holds the matrices of experts, which are made in the same two launches, each with its own scale:
``beta`` is fp32 ``[E]`` then, and every buffer has one more dimension in front.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sparse_compile.kernels.formats import (
    AMAX_FLOOR,
    E4M3,
    check_buffer,
    check_weight,
    metadata_shape,
    padded,
    values_shape,
)
from sparse_compile.kernels.launch_plan import LaunchPlan, UncachedPlan, allocator, plan_kernel, planned
from sparse_compile.kernels.tiles import load_tile
from sparse_compile.kernels.weight.fp8_tiles import (
    cast_tile,
    load_layout,
    prune_soft_transposable_tile,
    prune_tile,
    prune_transposable_tile,
)
from sparse_compile.kernels.weight.groups_of_four import bits

# Rows, columns and warps of a tile, and the most registers of a thread.
_ROW_MAJOR_TILE = (64, 128, 4, 80)
_COLUMN_MAJOR_TILE = (128, 128, 8, None)
# Programs of the second launch: one for each multiprocessor of an H100 or H200.
_CORRECT_PROGRAMS = 132

# What is made of the weight: those before _CAST have a beta; transposable masks are found, or read.
_SOFT, _HARD, _SOFT_TRANSPOSABLE, _CAST, _SEARCH, _MASKS = map(gl.constexpr, range(6))
# Both copies that these write are compressed, in blocks of 128.  Half of one is more programs at a time; a search takes
# the registers that it needs.
_BOTH_WAYS_TILES = {
    _SOFT_TRANSPOSABLE.value: (64, 128, 4, 128), _SEARCH.value: (128, 128, 8, None), _MASKS.value: (128, 128, 8, 128)
}  # fmt: skip
_AMAX_FLOOR_BITS = gl.constexpr(int(torch.tensor(AMAX_FLOOR, dtype=torch.float32).view(torch.int32)))
_ONE_BITS = gl.constexpr(0x3F800000)
_INFINITY_BITS = gl.constexpr(0x7F800000)
_NAN_BITS = gl.constexpr(0x7FC00000)
_PARTIALS_CHUNK = gl.constexpr(4096)


@gluon.jit
def _write_tile(
    tile, weight_ptr, payload_ptr, metadata_ptr, weight_t_ptr, metadata_t_ptr, masks_ptr, scale,
    rows, columns, stride_wn, stride_wk, tiles_k,
    weight_size, payload_size, metadata_size, weight_t_size, metadata_t_size, masks_size,
    MODE: gl.constexpr, COLUMN_MAJOR: gl.constexpr, EVEN: gl.constexpr, EXPERTS: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """Read one tile of the weight and write all that is made of it; the bits of its amax.

    Sizes: of what belongs to one expert, whose number is the second of the program.
    """
    if EXPERTS:
        expert = gl.program_id(1).to(gl.int64)
        weight_ptr += expert * weight_size
        if payload_ptr is not None:
            payload_ptr += expert * payload_size
        if metadata_ptr is not None:
            metadata_ptr += expert * metadata_size
        if weight_t_ptr is not None:
            weight_t_ptr += expert * weight_t_size
        if metadata_t_ptr is not None:
            metadata_t_ptr += expert * metadata_t_size
        if masks_ptr is not None:
            masks_ptr += expert * masks_size
    row, column = tile // tiles_k * BLOCK_N, tile % tiles_k * BLOCK_K
    layout: gl.constexpr = load_layout([BLOCK_N, BLOCK_K], gl.num_warps(), COLUMN_MAJOR)
    w = load_tile(weight_ptr, row, column, rows, columns, stride_wn, stride_wk, BLOCK_N, BLOCK_K, EVEN, layout)
    if MODE == _CAST:
        amax_bits = cast_tile(w, row, column, payload_ptr, weight_t_ptr, scale, rows, columns, COLUMN_MAJOR, EVEN)
    elif MODE == _SOFT_TRANSPOSABLE:
        amax_bits = prune_soft_transposable_tile(
            w, row, column, payload_ptr, metadata_ptr, weight_t_ptr, metadata_t_ptr, scale, rows, columns,
            COLUMN_MAJOR, EVEN,
        )  # fmt: skip
    elif MODE <= _HARD:
        amax_bits = prune_tile(
            w, row, column, payload_ptr, metadata_ptr, weight_t_ptr, scale, rows, columns,
            MODE == _HARD, COLUMN_MAJOR, EVEN,
        )  # fmt: skip
    else:
        amax_bits = prune_transposable_tile(
            w, row, column, payload_ptr, metadata_ptr, weight_t_ptr, metadata_t_ptr, masks_ptr, scale, rows, columns,
            layout, MODE == _SEARCH, COLUMN_MAJOR, EVEN,
        )  # fmt: skip
    return amax_bits


@gluon.jit(do_not_specialize=["tiles", "tiles_k"])
def _speculate_kernel(
    weight_ptr, beta_ptr, payload_ptr, metadata_ptr, weight_t_ptr, metadata_t_ptr, masks_ptr, scale_inv_ptr,
    partials_ptr, rows, columns, stride_wn, stride_wk, tiles, tiles_k,
    weight_size, payload_size, metadata_size, weight_t_size, metadata_t_size, masks_size,
    MODE: gl.constexpr, COLUMN_MAJOR: gl.constexpr, EVEN: gl.constexpr, EXPERTS: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """One tile, with the scale behind the old scale_inv.  Partials: the bits of the tiles' amax, then of that scale."""
    expert = gl.program_id(1)
    if MODE < _CAST:
        beta_ptr += expert
    scale_inv_ptr += expert
    partials_ptr += expert * (tiles + 1)
    # As soon as every program has begun, those of the second launch take the places that become free.
    gdc_launch_dependents()
    # beta / scale_inv, whose mantissas are equal; any other quotient will not be the true scale.
    beta_bits = _ONE_BITS
    if MODE < _CAST:
        beta_bits = bits(gl.load(beta_ptr))
    scale_bits = beta_bits - bits(gl.load(scale_inv_ptr)) + _ONE_BITS & _INFINITY_BITS
    tile = gl.program_id(0)
    amax_bits = _write_tile(
        tile, weight_ptr, payload_ptr, metadata_ptr, weight_t_ptr, metadata_t_ptr, masks_ptr,
        scale_bits.to(gl.float32, bitcast=True), rows, columns, stride_wn, stride_wk, tiles_k,
        weight_size, payload_size, metadata_size, weight_t_size, metadata_t_size, masks_size,
        MODE, COLUMN_MAJOR, EVEN, EXPERTS, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    gl.store(partials_ptr + tile, amax_bits)
    if tile == 0:
        gl.store(partials_ptr + tiles, scale_bits)


@gluon.jit(do_not_specialize=["tiles", "tiles_k"])
def _correct_kernel(
    weight_ptr, beta_ptr, payload_ptr, metadata_ptr, weight_t_ptr, metadata_t_ptr, masks_ptr, scale_inv_ptr,
    partials_ptr, rows, columns, stride_wn, stride_wk, tiles, tiles_k,
    weight_size, payload_size, metadata_size, weight_t_size, metadata_t_size, masks_size,
    MODE: gl.constexpr, COLUMN_MAJOR: gl.constexpr, EVEN: gl.constexpr, EXPERTS: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """Write scale_inv and, where the true scale is not the one that was assumed, all tiles again."""
    expert = gl.program_id(1)
    if MODE < _CAST:
        beta_ptr += expert
    scale_inv_ptr += expert
    partials_ptr += expert * (tiles + 1)
    # Until the first launch is complete, and all that it wrote can be read.
    gdc_wait()
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    offs = gl.arange(0, _PARTIALS_CHUNK, layout)
    largest = gl.full([_PARTIALS_CHUNK], 0, gl.int32, layout)
    for start in range(0, tiles, _PARTIALS_CHUNK):
        largest = gl.maximum(largest, gl.load(partials_ptr + start + offs, mask=start + offs < tiles, other=0))
    amax_bits = gl.max(largest, 0)

    # Bounded, so that the scale and its inverse are normal numbers.  A mantissa above 1.75, that of 448 = 1.75 * 2^8,
    # is carried into the exponent.
    bounded = gl.minimum(gl.maximum(amax_bits, _AMAX_FLOOR_BITS), _INFINITY_BITS - 1)
    exponent = bounded + 0x1FFFFF >> 23
    scale_bits = 262 - exponent << 23
    if gl.program_id(0) == 0:
        # NaN or infinity in the weight makes every product NaN.
        scale_inv_bits = gl.where(amax_bits < _INFINITY_BITS, exponent - 8 << 23, _NAN_BITS)
        scale_inv = scale_inv_bits.to(gl.float32, bitcast=True)
        if MODE < _CAST:
            scale_inv = gl.load(beta_ptr) * scale_inv
        gl.store(scale_inv_ptr, scale_inv)
    if scale_bits != gl.load(partials_ptr + tiles):
        for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
            _write_tile(
                tile, weight_ptr, payload_ptr, metadata_ptr, weight_t_ptr, metadata_t_ptr, masks_ptr,
                scale_bits.to(gl.float32, bitcast=True), rows, columns, stride_wn, stride_wk, tiles_k,
                weight_size, payload_size, metadata_size, weight_t_size, metadata_t_size, masks_size,
                MODE, COLUMN_MAJOR, EVEN, EXPERTS, BLOCK_N, BLOCK_K,
            )  # fmt: skip


@planned
def launch_prune_weight(
    weight: Tensor, beta: Tensor, values: Tensor, metadata: Tensor, weight_t: Tensor | None, scale_inv: Tensor,
    hard: bool = False,
) -> LaunchPlan:  # fmt: skip
    """Prune and cast ``weight`` into the buffers, all of which are written in full.

    Args:
        weight: ``[N, K]``, any strides, bf16, fp16 or fp32; N and K multiples of 16.  Or ``[E, N, K]``: of experts.
        beta: fp32 ``[1]``, of experts ``[E]``.
        values: e4m3 ``[N, padded(K) / 2]``.
        metadata: int32 ``[padded(K) / 128, padded(N) / 16, 32, 2]``.
        weight_t: e4m3 ``[K, N]``, or None.
        scale_inv: fp32 ``[1]``; 0 for an empty weight, NaN for one with NaN or infinity.  Faster where it still holds
            the result of a similar weight.
        hard: whether the two largest magnitudes are kept as they are, instead of S-STE's soft threshold.

    Raises:
        ValueError: a tensor has another shape, dtype, layout or device.
    """
    experts, n, k = _check_weight(weight, beta, scale_inv)
    check_buffer("values", values, (*experts, *values_shape(n, k)), E4M3, weight.device)
    check_buffer("metadata", metadata, (*experts, *metadata_shape(n, k)), torch.int32, weight.device)
    if weight_t is not None:
        check_buffer("weight_t", weight_t, (*experts, k, n), E4M3, weight.device)
    if weight.numel() == 0:
        return UncachedPlan(scale_inv.zero_)
    # Metadata is written for the padding too.
    mode = _HARD if hard else _SOFT
    prune = _plan(mode, weight, beta, values, metadata, weight_t, None, None, scale_inv, (padded(n), padded(k)))
    return lambda weight, beta, values, metadata, weight_t, scale_inv: prune(
        weight, beta, values, metadata, weight_t, None, None, scale_inv
    )


@planned
def launch_prune_transposable(
    weight: Tensor, values: Tensor, metadata: Tensor, values_t: Tensor, metadata_t: Tensor, scale_inv: Tensor,
    masks: Tensor, search: bool,
) -> LaunchPlan:  # fmt: skip
    """Prune ``weight`` by transposable masks, and cast it, into the buffers, which are written in full.

    Args:
        weight: ``[N, K]``, any strides, bf16, fp16 or fp32; N and K multiples of 16.
        values, metadata: e4m3 ``[N, padded(K) / 2]`` and int32 ``[padded(K) / 128, padded(N) / 16, 32, 2]``.
        values_t, metadata_t: e4m3 ``[K, padded(N) / 2]`` and int32 ``[padded(N) / 128, padded(K) / 16, 32, 2]``.
        scale_inv: fp32 ``[1]``; as for ``launch_prune_weight``.
        masks: int16 ``[N / 4, K / 4]``, a bit for each element of a tile.
        search: whether the best masks are found and written to ``masks``, instead of being read from there.

    Raises:
        ValueError: a tensor has another shape, dtype, layout or device.
    """
    experts, n, k = _check_transposable(weight, None, values, metadata, values_t, metadata_t, scale_inv)
    check_buffer("masks", masks, (*experts, n // 4, k // 4), torch.int16, weight.device)
    if weight.numel() == 0:
        return UncachedPlan(scale_inv.zero_)
    mode, covered = _SEARCH if search else _MASKS, (padded(n), padded(k))
    prune = _plan(mode, weight, None, values, metadata, values_t, metadata_t, masks, scale_inv, covered)
    return lambda weight, values, metadata, values_t, metadata_t, scale_inv, masks: prune(
        weight, None, values, metadata, values_t, metadata_t, masks, scale_inv
    )


@planned
def launch_prune_soft_transposable(
    weight: Tensor, beta: Tensor, values: Tensor, metadata: Tensor, values_t: Tensor, metadata_t: Tensor,
    scale_inv: Tensor,
) -> LaunchPlan:  # fmt: skip
    """Prune ``weight`` by soft thresholds along both dimensions, and cast it, into the buffers, written in full.

    Arguments and errors as of ``launch_prune_weight`` and ``launch_prune_transposable``.
    """
    _, n, k = _check_transposable(weight, beta, values, metadata, values_t, metadata_t, scale_inv)
    if weight.numel() == 0:
        return UncachedPlan(scale_inv.zero_)
    mode, covered = _SOFT_TRANSPOSABLE, (padded(n), padded(k))
    prune = _plan(mode, weight, beta, values, metadata, values_t, metadata_t, None, scale_inv, covered)
    return lambda weight, beta, values, metadata, values_t, metadata_t, scale_inv: prune(
        weight, beta, values, metadata, values_t, metadata_t, None, scale_inv
    )


def _check_weight(weight: Tensor, beta: Tensor | None, scale_inv: Tensor) -> tuple[tuple[int, ...], int, int]:
    """``(experts,)`` or ``()``, and N and K."""
    check_weight(weight, experts=True)
    *experts, n, k = weight.shape
    if beta is not None:
        check_buffer("beta", beta, tuple(experts) or (1,), torch.float32, weight.device)
    check_buffer("scale_inv", scale_inv, (*experts, 1), torch.float32, weight.device)
    return tuple(experts), n, k


def _check_transposable(
    weight: Tensor, beta: Tensor | None, values: Tensor, metadata: Tensor, values_t: Tensor, metadata_t: Tensor,
    scale_inv: Tensor,
) -> tuple[tuple[int, ...], int, int]:  # fmt: skip
    experts, n, k = _check_weight(weight, beta, scale_inv)
    check_buffer("values", values, (*experts, *values_shape(n, k)), E4M3, weight.device)
    check_buffer("metadata", metadata, (*experts, *metadata_shape(n, k)), torch.int32, weight.device)
    check_buffer("values_t", values_t, (*experts, *values_shape(k, n)), E4M3, weight.device)
    check_buffer("metadata_t", metadata_t, (*experts, *metadata_shape(k, n)), torch.int32, weight.device)
    return experts, n, k


@planned
def launch_cast_weight(
    weight: Tensor, payload: Tensor | None, payload_t: Tensor | None, scale_inv: Tensor
) -> LaunchPlan:
    """Cast ``weight`` into the buffers, all of which are written in full.

    Args:
        weight: ``[N, K]``, any strides, bf16, fp16 or fp32; N and K multiples of 16.
        payload: e4m3 ``[N, K]``, or None.
        payload_t: e4m3 ``[K, N]``, or None.
        scale_inv: fp32 ``[1]``; 0 for an empty weight, NaN for one with NaN or infinity.  Faster where it still holds
            the result of a similar weight.

    Raises:
        ValueError: a tensor has another shape, dtype, layout or device.
    """
    experts, n, k = _check_weight(weight, None, scale_inv)
    if payload is not None:
        check_buffer("payload", payload, (*experts, n, k), E4M3, weight.device)
    if payload_t is not None:
        check_buffer("payload_t", payload_t, (*experts, k, n), E4M3, weight.device)
    if weight.numel() == 0:
        return UncachedPlan(scale_inv.zero_)
    cast = _plan(_CAST, weight, None, payload, None, payload_t, None, None, scale_inv, (n, k))
    return lambda weight, payload, payload_t, scale_inv: cast(
        weight, None, payload, None, payload_t, None, None, scale_inv
    )


def _plan(
    mode: gl.constexpr, weight: Tensor, beta: Tensor | None, payload: Tensor | None, metadata: Tensor | None,
    weight_t: Tensor | None, metadata_t: Tensor | None, masks: Tensor | None, scale_inv: Tensor,
    covered: tuple[int, int],
) -> LaunchPlan:  # fmt: skip
    """Of both launches, over tiles that cover ``covered`` rows and columns; called with all tensors' addresses."""
    *experts, n, k = weight.shape
    column_major = weight.stride(-2) == 1 and weight.stride(-1) != 1
    one_way = _COLUMN_MAJOR_TILE if column_major else _ROW_MAJOR_TILE
    block_n, block_k, warps, registers = _BOTH_WAYS_TILES.get(mode.value, one_way)
    tiles_n, tiles_k = triton.cdiv(covered[0], block_n), triton.cdiv(covered[1], block_k)
    tiles, number = tiles_n * tiles_k, experts[0] if experts else 1
    new_partials = allocator(torch.empty(number * (tiles + 1), dtype=torch.int32, device=weight.device))
    made = (payload, metadata, weight_t, metadata_t, masks)
    tensors = (weight, beta, *made, scale_inv, new_partials())
    of_one = [0 if not experts or tensor is None else tensor.stride(0) for tensor in (weight, *made)]
    sizes = (n, k, *weight.stride()[-2:], tiles, tiles_k, *of_one)
    options = {
        "MODE": mode.value,
        "COLUMN_MAJOR": column_major,
        "EVEN": (tiles_n * block_n, tiles_k * block_k) == (n, k),
        "EXPERTS": bool(experts),
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "num_warps": warps,
        "maxnreg": registers,
    }
    speculate = plan_kernel(_speculate_kernel, (tiles, number), tensors, sizes, **options)
    # It starts while the first launch ends, and waits for that by itself.
    programs = min(tiles, triton.cdiv(_CORRECT_PROGRAMS, number))
    correct = plan_kernel(_correct_kernel, (programs, number), tensors, sizes, launch_pdl=True, **options)

    def run(*addresses: int | None) -> None:
        partials = new_partials()
        speculate(*addresses, partials.data_ptr())
        correct(*addresses, partials.data_ptr())

    return run
