"""How a linear is spelt: F.linear, addmm, mm, matmul and ``@``, the weight transposed and cast on the way."""

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from sparse_compile.torch_internals import example_value

_LINEAR = {F.linear, torch._C._nn.linear}
_MATMUL = {torch.matmul, torch.mm, operator.matmul}
_MATMUL_METHODS = {"matmul", "mm", "__matmul__"}
_CASTS = {"to", "float", "bfloat16", "half", "type_as", "contiguous"}
# Contractions that may hold a weight and that no stage rewrites: found only to be reported.
_UNSUPPORTED = {"einsum", "tensordot", "bilinear", "multi_head_attention_forward", "baddbmm", "bmm", "mv", "addmv"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Spelling:
    """``output = input @ weight.T + bias``, the weight matrix stored transposed or not."""

    input: Any
    weight: Any  # where the transpositions and casts begin
    bias: Any
    transposed: bool
    refusal: str | None = None  # why the call is more than that


def read_linear(node: Node) -> Spelling | None:
    """The spelling of a linear at ``node``; None where the node is nothing of the kind.

    A matmul whose right operand is no matrix of parameters is a product of activations: the caller tells by ``weight``.
    """
    arguments = list(node.args)
    if node.op == "call_function" and node.target in _LINEAR:
        named = dict(zip(("input", "weight", "bias"), arguments, strict=False)) | node.kwargs
        return _spelling(named["input"], named["weight"], named.get("bias"), stored_transposed=False)
    is_function = node.op == "call_function"
    if (is_function and node.target in _MATMUL) or (node.op == "call_method" and node.target in _MATMUL_METHODS):
        named = dict(zip(("input", "other"), arguments, strict=False)) | node.kwargs
        right = named.get("other", named.get("mat2"))
        refusal = "it writes into an existing tensor (out=)" if node.kwargs.get("out") is not None else None
        return _spelling(named.get("input"), right, None, stored_transposed=True, refusal=refusal)
    if (is_function and node.target is torch.addmm) or (node.op == "call_method" and node.target == "addmm"):
        named = dict(zip(("input", "mat1", "mat2"), arguments, strict=False)) | node.kwargs
        spelling = _spelling(named["mat1"], named["mat2"], named["input"], stored_transposed=True)
        return _check_addmm(spelling, node)
    return None


def is_unsupported_contraction(node: Node) -> bool:
    """Whether the node may contain a linear in a form that is not rewritten."""
    return node.op in ("call_function", "call_method") and target_name(node) in _UNSUPPORTED


def target_name(node: Node) -> str:
    """Plain name of what a node calls, ``"matmul"`` for torch.matmul, operator.matmul and Tensor.matmul alike."""
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", ""))


def _spelling(input: Any, weight: Any, bias: Any, *, stored_transposed: bool, refusal: str | None = None) -> Spelling:
    root, flipped = _strip(weight)
    return Spelling(input=input, weight=root, bias=bias, transposed=stored_transposed != flipped, refusal=refusal)


def _check_addmm(spelling: Spelling, node: Node) -> Spelling:
    bias, output = example_value(spelling.bias), example_value(node)
    refusal = None
    if any(node.kwargs.get(name, 1) != 1 for name in ("alpha", "beta")):
        refusal = f"addmm with {dict(node.kwargs)}; only alpha = beta = 1 is a linear"
    elif node.kwargs.get("out") is not None:
        refusal = "it writes into an existing tensor (out=)"
    elif bias is None or bias.shape != output.shape[-1:]:
        given = "no tensor" if bias is None else f"shape {tuple(bias.shape)}"
        refusal = f"addmm adds {given}; only a vector of out_features is a bias"
    return replace(spelling, refusal=refusal)


def _strip(weight: Any) -> tuple[Any, bool]:
    """Follow transpositions and casts back to where they begin; whether an odd number of transpositions was passed."""
    flipped = False
    while isinstance(weight, Node):
        if _is_transposition(weight):
            flipped = not flipped
        elif not (weight.op == "call_method" and weight.target in _CASTS):
            break
        weight = weight.args[0]
    return weight, flipped


def _is_transposition(node: Node) -> bool:
    value = example_value(node)
    if value is None or value.ndim != 2:
        return False
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("T", "mT")
    name = target_name(node)
    dims = tuple(dim % 2 for dim in _flat(node.args[1:]) if isinstance(dim, int))
    return name == "t" or (
        name in ("transpose", "swapaxes", "permute")
        and dims in ((0, 1), (1, 0))
        and (name != "permute" or dims == (1, 0))
    )


def _flat(arguments: Any) -> list[Any]:
    nested = (argument if isinstance(argument, (tuple, list)) else [argument] for argument in arguments)
    return [item for items in nested for item in items]
