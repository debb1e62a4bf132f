"""PyTorch's operations: decompositions, fast paths, Triton kernels of the user."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch

# The fast path of nn.TransformerEncoderLayer.
encoder_layer_fast_path: Callable[..., Any] = torch._transformer_encoder_layer_fwd


def triton_kernel(index: int) -> Any:
    """The user's Triton kernel that a node of dynamo's graph launches."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    return kernel_side_table.get_kernel(index)


@cache
def decompositions() -> Mapping[Any, Callable[..., Any]]:
    """PyTorch's definitions of operations by others."""
    from torch._decomp import core_aten_decompositions, decomposition_table

    return {**decomposition_table, **core_aten_decompositions()}
