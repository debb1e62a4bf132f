"""Whether the weights of a checkpoint are 2:4, and the table that says so."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase

import torch
from tabulate import tabulate
from torch import Tensor

from sparse_compile.printable import printable
from sparse_compile.weights.pattern_24 import may_be_of_experts, share_of_groups

# Random weights hold next to no groups with two zeros, a matrix with half of its elements zero at random 69 %.
_IN_PART = 0.5


class Verdict(Enum):
    """What a weight is."""

    PRUNED = "2:4"
    TRANSPOSED = "2:4, stored transposed"
    IN_PART = "2:4 in part"
    ZERO = "zero"
    DENSE = "dense"


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """One matrix of a checkpoint, or those of experts."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    zeros: float  # share of its elements
    groups: float | None  # share of the groups along its rows that are 2:4; None where it has none
    groups_transposed: float | None  # along its columns

    @property
    def verdict(self) -> Verdict:
        if self.zeros == 1.0:
            return Verdict.ZERO
        if self.groups == 1.0:
            return Verdict.PRUNED
        if self.groups_transposed == 1.0:
            return Verdict.TRANSPOSED
        in_part = max(self.groups or 0.0, self.groups_transposed or 0.0) > _IN_PART
        return Verdict.IN_PART if in_part else Verdict.DENSE

    @property
    def is_24(self) -> bool:
        return self.verdict in (Verdict.PRUNED, Verdict.TRANSPOSED, Verdict.ZERO)


def check_weights(tensors: Iterable[tuple[str, Tensor]], globs: Sequence[str] = ()) -> Iterable[Checked]:
    """What each matrix is, of those that the patterns name; of all without patterns.

    Left out are tensors of other than two dimensions, but for those that may hold the matrices of experts, and of
    integers other than int8.
    """
    for name, tensor in tensors:
        named = not globs or any(fnmatchcase(name, glob) for glob in globs)
        if (
            named
            and (tensor.ndim == 2 or may_be_of_experts(tensor))
            and (tensor.is_floating_point() or tensor.dtype is torch.int8)
        ):
            values = tensor.float() if tensor.dtype.itemsize == 1 else tensor
            yield Checked(
                name=name,
                shape=tuple(tensor.shape),
                dtype=tensor.dtype,
                zeros=1.0 - int(values.count_nonzero()) / max(tensor.numel(), 1),
                groups=share_of_groups(values, -1),
                groups_transposed=share_of_groups(values, -2),
            )


def as_table(rows: Sequence[Checked]) -> str:
    lines = [
        (
            printable(row.name),
            " x ".join(map(str, row.shape)),
            str(row.dtype).removeprefix("torch."),
            _share(row.zeros),
            _share(row.groups),
            _share(row.groups_transposed),
            row.verdict.value,
        )
        for row in rows
    ]
    headers = ("weight", "shape", "dtype", "zeros", "2:4 along rows", "along columns", "verdict")
    return tabulate(lines, headers=headers, disable_numparse=True, colalign=("left",) * 3 + ("right",) * 3 + ("left",))


def _share(share: float | None) -> str:
    """Percent, never rounded up to all nor down to nothing."""
    if share is None:
        return "-"
    if share in (0.0, 1.0):
        return f"{share:.0%}"
    return f"{min(max(share, 0.0001), 0.9999):.2%}"


def summary(rows: Sequence[Checked]) -> str:
    counts = {verdict: sum(row.verdict is verdict for row in rows) for verdict in Verdict}
    return f"of {len(rows)} weights: " + ", ".join(f"{count} {what.value}" for what, count in counts.items() if count)


def wrong(rows: Sequence[Checked], globs: Sequence[str]) -> list[str]:
    """What keeps the exit status from being 0, a line for each."""
    if globs:
        unmatched = [glob for glob in globs if not any(fnmatchcase(row.name, glob) for row in rows)]
        lines = [f"  {glob!r} matches no matrix" for glob in unmatched]
        return lines + [f"  {row.name} is {row.verdict.value}" for row in rows if not row.is_24]
    lines = [f"  {row.name} is {row.verdict.value}" for row in rows if row.verdict is Verdict.IN_PART]
    if not any(row.verdict in (Verdict.PRUNED, Verdict.TRANSPOSED) for row in rows):
        lines.append("  no weight is 2:4")
    return lines
