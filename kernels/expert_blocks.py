"""Blocks of tokens that have one expert each: what kernels over tokens sorted by expert are cut up into.

A kernel of one matrix takes block ``b`` of the tokens, from ``b * block`` on.  With experts a table says where a block
begins and whose it is, made on the device from the offsets, which nobody else reads.  Where a block is 128 tokens,
block ``b`` is also that of the columns of operands that contract over tokens.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_compile.kernels.launch_plan import LaunchPlan, allocator, plan_kernel

FIELDS = 4
_WARPS = 4


def most_blocks(tokens: int, experts: int, block: int) -> int:
    """Enough for any routing."""
    return (tokens + (block - 1) * experts) // block


@triton.jit(do_not_specialize=["tokens", "blocks", "experts"])
def _expert_blocks_kernel(
    offsets_ptr, table_ptr, tokens, blocks, experts, BLOCK: tl.constexpr, EXPERTS: tl.constexpr, REST: tl.constexpr
):
    """One program; EXPERTS: a power of two, at least ``experts``."""
    expert = tl.arange(0, EXPERTS)
    end = tl.load(offsets_ptr + expert, mask=expert < experts, other=0).to(tl.int32)
    begin = tl.load(offsets_ptr + expert - 1, mask=(expert > 0) & (expert < experts), other=0).to(tl.int32)
    end, begin = tl.minimum(end, tokens), tl.minimum(begin, tokens)
    count = tl.where(end > begin, (end - begin + BLOCK - 1) // BLOCK, 0)
    first = tl.cumsum(count, 0) - count
    used = tl.sum(count, 0)
    for j in range(tl.max(count, 0)):
        row_ptr = table_ptr + (first + j) * 4
        inside = j < count
        tl.store(row_ptr, expert, mask=inside)
        tl.store(row_ptr + 1, begin + j * BLOCK, mask=inside)
        tl.store(row_ptr + 2, end, mask=inside)
        tl.store(row_ptr + 3, begin, mask=inside)
    offs = tl.arange(0, REST)
    for start in range(used, blocks, REST):
        row_ptr = table_ptr + (start + offs) * 4
        inside = start + offs < blocks
        tl.store(row_ptr, -1, mask=inside)
        tl.store(row_ptr + 1, 0, mask=inside)
        tl.store(row_ptr + 2, 0, mask=inside)
        tl.store(row_ptr + 3, 0, mask=inside)
    tl.store(table_ptr + blocks * 4, used)
    span_ptr = table_ptr + (blocks + 1 + expert) * 4
    tl.store(span_ptr, first, mask=expert < experts)
    tl.store(span_ptr + 1, count, mask=expert < experts)


def plan_expert_blocks(
    offsets: Tensor, tokens: int, block: int, blocks: int | None = None
) -> tuple[Callable[[], Tensor], Tensor, LaunchPlan]:
    """What allocates a table, an example of it, and the plan that fills it, called with the addresses of both.

    Args:
        offsets: int32 or int64 ``[E]``, where the tokens of each expert end.
        tokens: as many as there are, or more with ``blocks``.
        blocks: the most that there can be, where that is known otherwise.

    Table:
        int32 ``[most_blocks + 1 + E, 4]``: of each block its expert, its first token, where its expert's tokens end,
        and where they begin; of those that no tokens need, -1, 0, 0, 0.  The row behind them begins with the number of
        blocks.  Then, of each expert, its first block and the number of its blocks.
    """
    check_offsets(offsets)
    experts = offsets.shape[0]
    blocks = most_blocks(tokens, experts, block) if blocks is None else blocks
    new_table = allocator(torch.empty(blocks + 1 + experts, FIELDS, dtype=torch.int32, device=offsets.device))
    table = new_table()
    plan = plan_kernel(
        _expert_blocks_kernel, (1,), (offsets, table), (tokens, blocks, experts),
        BLOCK=block, EXPERTS=triton.next_power_of_2(experts), REST=128, num_warps=_WARPS,
    )  # fmt: skip
    return new_table, table, plan


def check_offsets(offsets: Tensor) -> None:
    """Raise ValueError unless ``offsets`` is int32 or int64 ``[E]``, contiguous."""
    if offsets.dim() != 1 or offsets.dtype not in (torch.int32, torch.int64) or not offsets.is_contiguous():
        raise ValueError(
            f"offsets is {offsets.dtype} {tuple(offsets.shape)} with strides {offsets.stride()}; "
            "needed is int32 or int64 [E], contiguous"
        )
