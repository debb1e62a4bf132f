"""The ops: registration, fakes and dispatch.  Their numbers are tested with the kernels."""

import pytest
import torch
from torch.library import opcheck

import warm
from sparse_compile.kernels import ops, reference
from sparse_compile.kernels.formats import E4M3, E5M2, FP8_DTYPES
from sparse_compile.projections.groups_of_four import SOFT, prune_weight_
from sparse_compile.projections.groups_of_four_bf16 import SOFT_BF16
from sparse_compile.projections.identity import IDENTITY
from sparse_compile.projections.transposable import SOFT_TRANSPOSABLE, TRANSPOSABLE
from sparse_compile.testing import DENSE_INSTRUCTION, assert_within_budget

SEED = torch.tensor([1234567])


def pruned(n, k):
    buffers = SOFT.new_operands(n, k, torch.device("cpu"))
    SOFT.fill(torch.randn(n, k), buffers, None, None, False)
    return buffers


def fp8(*shape, dtype=E4M3):
    return torch.randn(shape).to(dtype)


def cases():
    values, metadata, _, scale_inv = pruned(48, 80)
    tokens = torch.rand(20) + 0.5
    yield "prune_weight_", (torch.randn(48, 80), torch.ones(1), *pruned(48, 80))
    yield "prune_weight_", (torch.randn(80, 48).t(), torch.ones(1), *pruned(48, 80))
    yield "prune_weight_", (torch.randn(48, 80), torch.ones(1), *pruned(48, 80), True)
    bf16 = SOFT_BF16.new_operands(48, 80, torch.device("cpu"))
    yield "prune_weight_bf16_", (torch.randn(48, 80), torch.ones(1), *bf16)
    yield "prune_weight_bf16_", (torch.randn(80, 48).t(), torch.ones(1), *(b.clone() for b in bf16), True)
    payload, payload_t, cast_scale_inv = IDENTITY.new_operands(48, 80, torch.device("cpu"))
    for buffers in ((payload, payload_t), (payload.clone(), None), (None, payload_t.clone())):
        yield "cast_weight_", (torch.randn(48, 80), *buffers, cast_scale_inv.clone())
    once = pruned(48, 80)
    yield "prune_weight_", (torch.randn(48, 80), torch.ones(1), *once[:2], None, once[3])
    yield "transpose_pruned", (values, metadata)
    masks, cpu = torch.full((12, 20), 0x5A5A, dtype=torch.int16), torch.device("cpu")
    for weight in (torch.randn(48, 80), torch.randn(80, 48).t()):
        yield "prune_soft_transposable_", (weight, torch.ones(1), *SOFT_TRANSPOSABLE.new_operands(48, 80, cpu))
    for search in (False, True):
        buffers = TRANSPOSABLE.new_operands(48, 80, cpu)
        yield "prune_transposable_", (torch.randn(80, 48).t(), *buffers, masks.clone(), search)
    yield "add_masked_decay_", (torch.randn(48, 80), torch.randn(48, 80), torch.ones(1), masks)
    yield "add_masked_decay_", (torch.randn(80, 48).t(), torch.randn(48, 80), torch.ones(1))
    yield "cast_mvue", (torch.randn(20, 48).bfloat16(), tokens, tokens, SEED, 3, True, False, E4M3)
    for count in (20, 128):  # padded, and not
        yield "transpose_tokens", (fp8(count, 48),)
        scales = torch.rand(count) + 0.5
        for dtype in FP8_DTYPES:
            for ending in ("", "_with_sums"):
                x = torch.randn(count, 48)
                yield f"cast_transpose{ending}", (x, scales, scales, dtype)
                yield f"cast_mvue{ending}", (x, scales, scales, SEED, 3, False, dtype == E5M2, dtype)
    for transpose in (False, True):
        yield "sparse_mm", (values, metadata, fp8(20, 80), scale_inv, tokens, torch.bfloat16, transpose, True)
        yield "sparse_mm", (values, metadata, fp8(20, 80), scale_inv, None, torch.float32, transpose, False)
    gradient = values.float().to(E5M2)
    yield "sparse_mm", (gradient, metadata, fp8(20, 80), scale_inv, None, torch.float32, False, False)
    yield "sparse_mm", (values, metadata, fp8(20, 80, dtype=E5M2), scale_inv, tokens, torch.bfloat16, True, True)
    yield "materialize", (torch.randn(20, 80).t(),)
    yield from cases_of_experts()
    for a, b in ((E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2)):
        yield "scaled_mm", (fp8(20, 80, dtype=a), fp8(48, 80, dtype=b), scale_inv, torch.bfloat16, True)


def cases_of_experts():
    # The kernels of experts take multiples of 64.
    offsets, scales, of_experts = torch.tensor([0, 13, 20]), torch.rand(20) + 0.5, torch.rand(3) + 0.5
    weight = SOFT.new_operands_of_experts(3, 64, 128, torch.device("cpu"))
    SOFT.fill_experts(torch.randn(3, 64, 128), weight, None, None, False)
    yield "grouped_mm", (torch.randn(20, 128), torch.randn(3, 64, 128).mT, offsets)
    yield "grouped_wgrad_mm", (torch.randn(20, 128), torch.randn(20, 64), offsets)
    # The weights are up to 448: with scales as theirs, products are near 10.
    of_tokens = (fp8(20, 128), of_experts / 64, scales, offsets, torch.bfloat16, True)
    yield "grouped_sparse_mm", (weight.values, weight.metadata, *of_tokens)
    yield "grouped_scaled_mm", (fp8(20, 128), fp8(3, 64, 128), of_experts, offsets, torch.bfloat16, True)
    grad, x_t = torch.randn(20, 64), reference.grouped_transpose_tokens(fp8(20, 128), offsets)
    yield "grouped_transpose_tokens", (fp8(20, 128), offsets)
    yield "grouped_cast_transpose", (grad, scales, scales, offsets, E5M2)
    yield "grouped_cast_mvue", (grad, scales, scales, SEED, 3, offsets, False, False, E4M3)
    _, grad_t = reference.grouped_cast_transpose(grad, scales, scales, offsets)
    _, values, metadata = reference.grouped_cast_mvue(grad, scales, scales, SEED, 3, offsets, False)
    yield "grouped_wgrad_scaled_mm", (grad_t, x_t, of_experts, offsets, torch.float32)
    for transpose in (False, True):
        yield "grouped_wgrad_sparse_mm", (values, metadata, x_t, of_experts, offsets, torch.float32, transpose)


CASES = list(cases())
NAMES = [name for name, _ in CASES]
# opcheck's own schema test compares inputs with allclose, which fp8 lacks: check_schema stands in for it.
CHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def bits(tensor):
    return tensor.clone().view(torch.uint8) if tensor.dtype in FP8_DTYPES else tensor.clone()


def tensors(arguments):
    return [argument for argument in arguments if isinstance(argument, torch.Tensor)]


def check_schema(name, arguments):
    """The op writes into the arguments that its schema says it mutates, into no other, and returns no alias."""
    op = getattr(torch.ops.sparse_compile, name).default
    before = [bits(a) if isinstance(a, torch.Tensor) else a for a in arguments]
    results = op(*arguments)
    results = results if isinstance(results, tuple) else (results,)
    for argument, old, declared in zip(arguments, before, op._schema.arguments[: len(arguments)], strict=True):
        if not isinstance(argument, torch.Tensor):
            continue
        if declared.alias_info is None:
            assert torch.equal(bits(argument), old), declared.name
        for result in results:
            assert result is None or result.data_ptr() != argument.data_ptr(), declared.name


def test_every_op_is_checked():
    assert set(NAMES) == ops.defined.keys()


@pytest.mark.by_day(14)
@pytest.mark.parametrize(("name", "arguments"), CASES, ids=NAMES)
def test_opcheck(name, arguments):
    check_schema(name, arguments)
    opcheck(getattr(torch.ops.sparse_compile, name), arguments, test_utils=CHECKS)


@pytest.mark.parametrize("tokens", [0, 1, 15])
def test_few_tokens(tokens):
    """No batch is too small, not even an empty one."""
    values, metadata, weight_t, scale_inv = pruned(48, 80)
    x, scale = fp8(tokens, 80), torch.ones(tokens)
    assert ops.sparse_mm(values, metadata, x, scale_inv, scale, torch.float32, True, True).shape == (tokens, 48)
    assert ops.scaled_mm(fp8(tokens, 48), weight_t, scale_inv, torch.float32, True).shape == (tokens, 80)
    row, *operand = ops.cast_mvue(torch.randn(tokens, 48), scale, scale, SEED, 0, False, False, E4M3)
    assert row.shape == (tokens, 48)
    grad_weight = ops.sparse_mm(*operand, ops.transpose_tokens(x), scale_inv, None, torch.float32, False, False)
    assert grad_weight.shape == (48, 80)
    # As dgrad samples: tokens are the columns that are cast, and rows of the product.
    out_features = torch.ones(48)
    _, *operand = ops.cast_mvue(torch.randn(48, tokens), out_features, out_features, SEED, 0, False, False, E4M3)
    assert ops.sparse_mm(*operand, weight_t, scale_inv, None, torch.float32, False, True).shape == (tokens, 80)
    if tokens == 0:
        assert torch.equal(grad_weight, torch.zeros(48, 80))


def test_cpu_is_emulated_and_the_reason_says_so():
    assert ops.emulation_reason(torch.device("cpu")) == "no kernels for cpu"


def test_autocast_does_not_reach_into_the_ops():
    a, b = fp8(16, 64), fp8(16, 64)
    expected = reference.scaled_mm(a, b, torch.ones(1), torch.float32, True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ops.scaled_mm(a, b, torch.ones(1), torch.float32, True), expected)


def test_strides_that_no_kernel_reads_are_refused():
    with pytest.raises(
        ValueError, match=r"argument 1 of scaled_mm is \(64, 48\) with strides \(1, 64\); it must be cont"
    ):
        ops.scaled_mm(fp8(16, 48), fp8(48, 64).t(), torch.ones(1), torch.float32, True)
    with pytest.raises(ValueError, match="argument 0 of transpose_tokens"):
        ops.transpose_tokens(fp8(48, 16).t())


@pytest.mark.nightly
def test_import_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; import sparse_compile.kernels.grouped_ops"
    warm.python("-c", code, check=True)


@pytest.mark.gpu
def test_hopper_runs_kernels_unless_told_otherwise():
    device = torch.device("cuda")
    assert ops.emulation_reason(device) is None
    with ops.force_reference():
        assert ops.emulation_reason(device) == "the eager reference was asked for"
    assert ops.emulation_reason(device) is None


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "arguments"), CASES, ids=NAMES)
def test_opcheck_on_the_gpu(name, arguments):
    moved = tuple(a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments)
    check_schema(name, moved)
    opcheck(getattr(torch.ops.sparse_compile, name), moved, test_utils=CHECKS)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "arguments"), CASES, ids=NAMES)
def test_repeated_calls_with_other_addresses(name, arguments):
    """The plan of the first call serves the second, whose tensors lie elsewhere and hold other numbers."""
    op = getattr(torch.ops.sparse_compile, name).default
    kept = []
    for repetition in range(3):
        moved = [a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments]
        if moved[0].dtype not in FP8_DTYPES:
            moved[0].mul_(1 + repetition)
        expected_arguments = [a.clone() if isinstance(a, torch.Tensor) else a for a in moved]
        results = op(*moved)
        with ops.force_reference():
            expected = op(*expected_arguments)
        kept += [moved, results]
        if results is None:  # it writes into tensors that it was given
            results, expected = tensors(moved), tensors(expected_arguments)
        if isinstance(results, torch.Tensor):
            results, expected = [results], [expected]
        for actual, wanted in zip(results, expected, strict=True):
            torch.testing.assert_close(actual.float(), wanted.float(), rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("elements", [1, 2, 8])
def test_weights_at_any_address(elements):
    weight = torch.randn(64 * 128 + elements, device="cuda")[elements:].view(64, 128).bfloat16()
    storage = torch.empty(64 * 128 + elements, dtype=torch.bfloat16, device="cuda")
    shifted = storage[elements:].view(64, 128).copy_(weight)
    aligned, moved = (SOFT.new_operands(64, 128, weight.device) for _ in range(2))
    prune_weight_(weight, torch.ones(1, device="cuda"), *aligned)
    prune_weight_(shifted, torch.ones(1, device="cuda"), *moved)
    for one, other in zip(aligned, moved, strict=True):
        assert torch.equal(bits(one), bits(other))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 15, 4097])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("a_dtype", "b_dtype"), [(E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2)], ids=str)
def test_scaled_mm_against_fp64(a_dtype, b_dtype, tokens, out_dtype):
    a, b = fp8(tokens, 768, dtype=a_dtype).cuda(), fp8(3072, 768, dtype=b_dtype).cuda()
    scale_inv = torch.full((1,), 0.37, device="cuda")
    out = ops.scaled_mm(a, b, scale_inv, out_dtype, True)
    assert_within_budget(out, a, b, scale_inv, DENSE_INSTRUCTION)


@pytest.mark.gpu
@pytest.mark.parametrize("use_fast_accum", [False, True])
def test_sums_of_many_tokens_with_a_mean(use_fast_accum):
    """As in FP32, unless few bits are allowed: those lose more than FP8 does, which shows that this test can fail."""
    a, b = ((torch.randn(256, 2**16, device="cuda") + 0.5).to(E4M3) for _ in range(2))
    exact = a.double() @ b.double().t()
    out = ops.scaled_mm(a, b, torch.ones(1, device="cuda"), torch.float32, use_fast_accum)
    error = float((out - exact).norm() / exact.norm())
    assert error > 0.01 if use_fast_accum else error < 2e-4
