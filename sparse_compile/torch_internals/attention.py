"""Which kernel PyTorch takes for scaled_dot_product_attention."""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend


def chosen_backend(query: Tensor, key: Tensor, value: Tensor) -> str:
    """``CUDNN_ATTENTION``, ``FLASH_ATTENTION``, ... for causal attention of ``[batch, heads, tokens, features]``."""
    return SDPBackend(torch._fused_sdp_choice(query, key, value, is_causal=True)).name
