"""Symbolic sizes."""

from typing import Any, cast

import torch


def hint(size: int | torch.SymInt) -> int | None:
    """The size that a symbolic one had when dynamo traced, without a guard on it; None if it depends on data."""
    if isinstance(size, torch.SymInt):
        return cast("int | None", size.node.hint)
    return size


# What stands for a size that depends on data where nodes are run on fake tensors: a number that most sizes divide.
_UNKNOWN_SIZE = 64


def concrete_size(size: Any) -> Any:
    """A number for a symbolic one: what it was when dynamo traced; where it depends on data, one that stands for it."""
    if not isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return size
    known = size.node.hint
    if known is None:
        environment = size.node.shape_env
        # PyTorch 2.11 has the older name only, and newer versions warn of it.
        name = "backed_var_to_val" if hasattr(environment, "backed_var_to_val") else "var_to_val"
        expression = size.node.expr.xreplace(getattr(environment, name))
        known = expression.xreplace(dict.fromkeys(expression.free_symbols, _UNKNOWN_SIZE))
    kind = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}[type(size)]
    return kind(known)


def has_unbacked_size(value: Any) -> bool:
    """Whether a size of a tensor depends on data."""
    return isinstance(value, torch.Tensor) and any(hint(size) is None for size in value.shape)
