"""2:4 weights as PyTorch's own compressed tensors, for inference without this package."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.sparse import to_sparse_semi_structured

from sparse_compile.weights import beta, original, plain_name
from sparse_compile.weights.pattern_24 import in_features_dim, is_24

# What cuSPARSELt takes on Hopper, and torch.sparse hands to it.
_DTYPES = (torch.bfloat16, torch.float16)
_MULTIPLE = 16


@torch.no_grad()
def to_sparse(model: Module) -> list[str]:
    """Replace the 2:4 weights of linears by ``torch.sparse.to_sparse_semi_structured`` tensors, for inference.

    The linears then run cuSPARSELt's 2:4 GEMM in the weights' dtype, and a weight takes 9/16 of its memory.  Taken are
    the weights of ``nn.Linear`` and of transformers' ``Conv1D`` that are 2:4 along in_features, hold a non-zero and
    belong to one module: of a model that was finalized here, or saved so and loaded.  Conv1D's, which is stored
    transposed, is compressed along in_features too, and takes its place as a transposed view.  Weights are frozen by
    it.  Save the model before: compressed weights cannot be saved by safetensors.  The weights of experts stay as they
    are, as PyTorch has no product for them.

    Args:
        model: the model, on a GPU, in bf16 or fp16.

    Returns:
        The names of the weights that are compressed now.

    Raises:
        ValueError: no weight is 2:4; one was trained pruned and is not 2:4, because it was not finalized or was changed
            since; or one cannot be compressed: it is not on a GPU, neither bf16 nor fp16, or has a dimension that is no
            multiple of 16.  No weight is replaced then.
        RuntimeError: PyTorch was built without cuSPARSELt.
    """
    found = list(_find_24(original(model)))
    names = [name for name, *_ in found]
    missed = sorted({plain_name(name) for name in beta(model)} - set(names) - set(_experts_24(original(model))))
    if missed:
        raise ValueError(
            f"trained pruned, but not a 2:4 weight of a linear that can be compressed: {', '.join(map(repr, missed))}; "
            "call sparse_compile.finalize(model) first"
        )
    if not found:
        raise ValueError(
            "no linear of this model has a 2:4 weight; sparse_compile.finalize makes weights 2:4 that training pruned"
        )
    for name, _, weight, _ in found:
        _check(name, weight)
    if not torch.backends.cusparselt.is_available():
        raise RuntimeError("this PyTorch was built without cuSPARSELt, which runs 2:4 weights on Hopper GPUs")
    for _, module, weight, dim in found:
        matrix = weight.detach() if dim == -1 else weight.detach().t()
        compressed = to_sparse_semi_structured(matrix.contiguous())
        module.weight = Parameter(compressed if dim == -1 else compressed.t(), requires_grad=False)
    return names


def _experts_24(model: Module) -> Iterator[str]:
    """Names of the weights that hold 2:4 matrices of experts."""
    for name, weight in model.named_parameters():
        if weight.ndim == 3 and type(weight.data) is Tensor and (is_24(weight, -1) or is_24(weight, -2)):
            yield plain_name(name)


def _find_24(model: Module) -> Iterator[tuple[str, Module, Tensor, int]]:
    """Name, module, weight and dimension of in_features of each 2:4 weight that one linear alone holds."""
    holders: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    for path, module in model.named_modules():
        dim = in_features_dim(module)
        weight = module._parameters.get("weight")
        if dim is None or weight is None or type(weight.data) is not Tensor or holders[id(weight)] > 1:
            continue
        if is_24(weight, dim) and bool(weight.any()):
            yield plain_name(f"{path}.weight".removeprefix(".")), module, weight, dim


def _check(name: str, weight: Tensor) -> None:
    if not weight.is_cuda:
        raise ValueError(f"{name!r} is on {weight.device}; compressed weights run only on GPUs: move the model to one")
    if weight.dtype not in _DTYPES:
        raise ValueError(
            f"{name!r} is {weight.dtype}; cuSPARSELt takes bfloat16 and float16: call model.to(torch.bfloat16) first, "
            "which keeps weights 2:4"
        )
    if any(size % _MULTIPLE for size in weight.shape):
        raise ValueError(f"{name!r} is {tuple(weight.shape)}; cuSPARSELt takes multiples of {_MULTIPLE}")
