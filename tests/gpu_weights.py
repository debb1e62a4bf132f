"""What tests of kernels that prune weights share."""

import torch
from torch import Tensor

from sparse_compile.kernels.formats import E4M3, metadata_shape, values_shape


def in_layout(layout: str, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """A random weight ``[n, k]`` on the GPU: contiguous, transposed, or strided."""
    if layout == "contiguous":
        return torch.randn(n, k, device="cuda").to(dtype)
    if layout == "transposed":
        return torch.randn(k, n, device="cuda").to(dtype).t()
    return torch.randn(2 * n, 3 * k, device="cuda").to(dtype)[::2, ::3]


def poisoned(n: int, k: int) -> list[Tensor]:
    """Operands of a weight that is compressed both ways, on the GPU, full of what no kernel writes."""

    def payload(rows: int, columns: int) -> Tensor:
        return torch.full(values_shape(rows, columns), 0x7F, dtype=torch.uint8, device="cuda").view(E4M3)

    def words(rows: int, columns: int) -> Tensor:
        return torch.full(metadata_shape(rows, columns), -559038737, dtype=torch.int32, device="cuda")

    return [payload(n, k), words(n, k), payload(k, n), words(k, n), torch.full((1,), float("nan"), device="cuda")]


def special(kind: str) -> Tensor:
    """A weight ``[80, 144]`` on the GPU of ties, zeros, NaN and infinity, tiny or huge magnitudes."""
    weight = torch.randn(80, 144, device="cuda")
    if kind == "ties":
        weight = torch.randint(-3, 4, (80, 144), device="cuda").float()
    elif kind == "NaN":
        weight[3, 4:7] = torch.tensor([float("-inf"), float("nan"), float("nan")])
    else:
        weight *= {"zero": 0.0, "tiny": 1e-38, "huge": 1e37}[kind]
    return weight
