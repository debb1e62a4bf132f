"""How a linear is spelt: F.linear, addmm, mm, matmul and ``@``, as functions, methods and operations of ATen.

A linear of experts, whose matrices are one parameter, is spelt grouped_mm, where tokens lie sorted by expert and
offsets say where those of each end, or bmm, where each expert has as many.
"""

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
_BMM = {torch.bmm, torch.ops.aten.bmm, torch.ops.aten.bmm.default}
_GROUPED = {torch._grouped_mm, torch.ops.aten._grouped_mm, torch.ops.aten._grouped_mm.default}
# What transformers calls in its place where PyTorch's own is not to be had: in fp32, under torch.compile.
_GROUPED_FALLBACK = "transformers.grouped_mm_fallback"
_OPS = (type(torch.ops.aten.mm), type(torch.ops.aten.mm.default))
_ADDMM = {torch.addmm, torch.ops.aten.addmm, torch.ops.aten.addmm.default}


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearPattern:
    """``output = input @ matrix.T + bias``, or ``input @ matrix + bias`` if ``transposed``."""

    input: Any
    matrix: Any
    bias: Any
    transposed: bool
    offsets: Any = None  # of experts: where the tokens of each end in the input
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
        left, bias = named["input"], named.get("bias")
        refusal = _adds_column(left, bias)
        return LinearPattern(input=left, matrix=named["weight"], bias=bias, transposed=False, refusal=refusal)
    if is_function and (node.target in _GROUPED or _op_name(node.target) == _GROUPED_FALLBACK):
        return _grouped(node)
    if node.target in (_MATMUL | _BMM if is_function else {*_MATMUL_METHODS, "bmm"}):
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


def is_of_experts(pattern: LinearPattern, weight: torch.Tensor) -> bool:
    """Whether a product is one of each expert's tokens with the expert's matrix in ``weight [E, ., .]``."""
    x, offsets = example_value(pattern.input), example_value(pattern.offsets)
    if weight.ndim != 3 or not isinstance(x, torch.Tensor):
        return False
    if pattern.offsets is None:
        # Without a guard on a size that may change.
        return x.ndim == 3 and isinstance(x.shape[0], int) and x.shape[0] == weight.shape[0]
    return x.ndim == 2 and offsets is not None and tuple(offsets.shape) == (weight.shape[0],)


def _grouped(node: Node) -> LinearPattern:
    named = _named(node, "input", "mat2", "offs", "bias", "out_dtype")
    left, matrix = named.get("input", named.get("self")), named.get("mat2", named.get("weight"))
    given, out_dtype = example_value(left), named.get("out_dtype")
    refusal = None
    if named.get("bias") is not None:
        refusal = "grouped_mm adds a bias; only one that is added to its result is rewritten"
    elif out_dtype is not None and given is not None and out_dtype != given.dtype:
        refusal = f"grouped_mm of {given.dtype} returns {out_dtype}; only one of the input's dtype is a linear"
    return LinearPattern(
        input=left, matrix=matrix, bias=None, transposed=True, offsets=named.get("offs"), refusal=refusal
    )


def target_name(node: Node) -> str:
    """Plain name of what a node calls, ``"matmul"`` for torch.matmul, operator.matmul and Tensor.matmul alike."""
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", ""))


def _op_name(target: Any) -> str:
    """Of an operation that a library has registered, ``"namespace.name"``."""
    return str(target).removesuffix(".default") if isinstance(target, _OPS) else ""


def _named(node: Node, *names: str) -> dict[str, Any]:
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def _writes_out(node: Node) -> str | None:
    return "it writes into an existing tensor (out=)" if node.kwargs.get("out") is not None else None


def _adds_column(left: Any, bias: Any) -> str | None:
    given, added = example_value(left), example_value(bias)
    if given is None or added is None or given.ndim < 3 or added.ndim != 2 or added.shape[1] != 1:
        return None
    # PyTorch takes one row for each token of all, or of a batch, by strides and versions.
    return f"F.linear adds a column, {tuple(added.shape)}; only a bias that has out_features is a linear's"


def _adds_more(node: Node, bias: Any) -> str | None:
    added, output = example_value(bias), example_value(node)
    if any(node.kwargs.get(name, 1) != 1 for name in ("alpha", "beta")):
        return f"addmm with {dict(node.kwargs)}; only alpha = beta = 1 is a linear"
    if added is None or added.shape != output.shape[-1:]:
        given = "no tensor" if added is None else f"shape {tuple(added.shape)}"
        return f"addmm adds {given}; only a vector of out_features is a bias"
    return None
