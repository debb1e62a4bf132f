"""Dispatch modes, which see the operations that run, and what their arguments are made of."""

from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

__all__ = ["HigherOrderOperator", "TorchDispatchMode", "tree_flatten", "tree_map_only"]
