"""The 2:4 pattern: of each four neighbours along in_features, at most two are not zero."""

from torch import Tensor
from torch.nn import Linear, Module


def share_of_groups(weight: Tensor, dim: int) -> float | None:
    """The share of groups of four along ``dim`` that hold at most two non-zeros; None where there are no such groups.

    Args:
        weight: ``[N, K]``, of any dtype; NaN counts as non-zero.
    """
    rows = weight.detach().movedim(dim, -1)
    if rows.numel() == 0 or rows.shape[-1] % 4:
        return None
    # Not every device compares e4m3.
    nonzero = (rows.float() if rows.dtype.itemsize == 1 and rows.is_floating_point() else rows) != 0
    groups: Tensor = nonzero.unflatten(-1, (-1, 4)).sum(-1)
    return int((groups <= 2).sum()) / groups.numel()


def is_24(weight: Tensor, dim: int) -> bool:
    """Whether every group of four along ``dim`` holds at most two non-zeros."""
    return share_of_groups(weight, dim) == 1.0


def may_be_of_experts(weight: Tensor) -> bool:
    """Whether a tensor may hold the matrices of experts, ``[E, N, K]``: by its sizes, which no convolution's has."""
    return weight.ndim == 3 and not any(size % 16 for size in weight.shape[1:])


def in_features_dim(module: Module) -> int | None:
    """The dimension of a module's weights that is contracted, -1 or -2; None for a module that is no linear.

    ``nn.Linear`` stores ``[out_features, in_features]``, the Conv1D of transformers, as GPT-2 has it, the transpose.
    Modules of experts, ``[E, ., .]``, of transformers say which of the two.
    """
    if isinstance(module, Linear):
        return -1
    # By name: transformers need not be installed.
    names = {(cls.__module__, cls.__name__) for cls in type(module).__mro__}
    if names & _TRANSPOSED:
        return -2
    transposed = getattr(module, "is_transposed", None) if hasattr(module, "num_experts") else None
    return (-2 if transposed else -1) if isinstance(transposed, bool) else None


_TRANSPOSED = {
    ("transformers.pytorch_utils", "Conv1D"), ("transformers.models.llama4.modeling_llama4", "Llama4TextExperts")
}  # fmt: skip
