"""How a linear is spelt: F.linear, addmm, mm, matmul and ``@``, as functions, methods and operations of ATen."""

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from sparse_compile.torch_internals.graph import example_value

_LINEAR = {F.linear, torch._C._nn.linear, torch.ops.aten.linear, torch.ops.aten.linear.default}
_MATMUL = {
    torch.matmul, torch.mm, torch.linalg.matmul, operator.matmul, torch.ops.aten.mm, torch.ops.aten.mm.default,
    torch.ops.aten.matmul, torch.ops.aten.matmul.default,
}  # fmt: skip
_MATMUL_METHODS = {"matmul", "mm", "__matmul__"}
_ADDMM = {torch.addmm, torch.ops.aten.addmm, torch.ops.aten.addmm.default}


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearPattern:
    """``output = input @ matrix.T + bias``, or ``input @ matrix + bias`` if ``transposed``."""

    input: Any
    matrix: Any
    bias: Any
    transposed: bool
    refusal: str | None = None  # why the call is more than that


def read_linear(node: Node) -> LinearPattern | None:
    """How a linear at ``node`` is written; None where the node is nothing of the kind.

    A matmul whose right operand is no matrix of parameters is a product of activations: the caller tells by ``matrix``.
    """
    if node.op not in ("call_function", "call_method"):
        return None
    is_function = node.op == "call_function"
    if is_function and node.target in _LINEAR:
        named = _named(node, "input", "weight", "bias")
        return LinearPattern(input=named["input"], matrix=named["weight"], bias=named.get("bias"), transposed=False)
    if node.target in (_MATMUL if is_function else _MATMUL_METHODS):
        named = _named(node, "input", "other")
        left = named.get("input", named.get("self"))
        right = named.get("other", named.get("mat2", named.get("tensor2")))
        return LinearPattern(input=left, matrix=right, bias=None, transposed=True, refusal=_writes_out(node))
    if node.target in (_ADDMM if is_function else {"addmm"}):
        named = _named(node, "input", "mat1", "mat2")
        bias = named.get("input", named.get("self"))
        refusal = _writes_out(node) or _adds_more(node, bias)
        return LinearPattern(input=named["mat1"], matrix=named["mat2"], bias=bias, transposed=True, refusal=refusal)
    return None


def target_name(node: Node) -> str:
    """Plain name of what a node calls, ``"matmul"`` for torch.matmul, operator.matmul and Tensor.matmul alike."""
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", ""))


def _named(node: Node, *names: str) -> dict[str, Any]:
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def _writes_out(node: Node) -> str | None:
    return "it writes into an existing tensor (out=)" if node.kwargs.get("out") is not None else None


def _adds_more(node: Node, bias: Any) -> str | None:
    added, output = example_value(bias), example_value(node)
    if any(node.kwargs.get(name, 1) != 1 for name in ("alpha", "beta")):
        return f"addmm with {dict(node.kwargs)}; only alpha = beta = 1 is a linear"
    if added is None or added.shape != output.shape[-1:]:
        given = "no tensor" if added is None else f"shape {tuple(added.shape)}"
        return f"addmm adds {given}; only a vector of out_features is a bias"
    return None
