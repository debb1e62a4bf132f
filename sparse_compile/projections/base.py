"""What a projection is: how a weight becomes the operands that the products of its linears read."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from sparse_compile.kernels.formats import E4M3
from sparse_compile.kernels.timing.components import LinearShape, RandomOperands, add_component


class SparseOperand(NamedTuple):
    """A matrix ``[R, C]`` that is 2:4 along C, times ``scale_inv``.

    Attributes:
        values, metadata: see ``kernels.formats``.
        scale_inv: fp32 ``[1]``.
    """

    values: Tensor
    metadata: Tensor
    scale_inv: Tensor


class DenseOperand(NamedTuple):
    """A matrix ``[R, C]``, ``payload * scale_inv``; ``scale_inv`` is fp32 ``[1]``."""

    payload: Tensor
    scale_inv: Tensor


@dataclass(frozen=True, slots=True)
class BetaLimits:
    """What the least-squares scale beta is for weights of real distributions; see ``weights.beta_fit``.

    Attributes:
        prior: of normal weights.
        smallest: below it outliers decide the fit.
        largest: above what real distributions give.
        least_energy: share of a tile's energy that ``beta * S(W)`` holds in any weight that says something.
    """

    prior: float
    smallest: float
    largest: float
    least_energy: float


class Projection(ABC):
    """One way of projecting a weight ``[N, K]``: out_features N, in_features K.

    There is one instance of each, which is made in the file of its class, and stays what it is in copies and pickles.

    Attributes:
        key: its name in graphs and on disk.
        prunes: whether the weight becomes 2:4 along K; fprop is 2:4 then.
        prunes_both_ways: whether it is 2:4 along N, too; dgrad is 2:4 then.
        beta_limits: of the scale that is found once for each weight, and kept; None for projections without one.
        keeps_masks: whether masks are searched for, and kept for some optimizer steps.
        is_hard: whether what it keeps stays as it is; what it drops can decay then.
        fills_all_experts: whether ``fill`` takes the matrices of experts, too, and beta, masks and operands of as many.
        rows: how many rows, from the first, are projected together: 1, or 4 where tiles are.
        dtype: of the payload.
        one_copy: projects alike and keeps fprop's copy of the weight alone, of which ``dgrad_operand`` makes the other
            one in each backward; of weights whose dimensions are multiples of 128.  None where there is no such thing.
        dgrad_component: the component of ``kernels.timing.components`` that times what ``dgrad_operand`` runs.
    """

    prunes: bool = True
    prunes_both_ways: bool = False
    beta_limits: BetaLimits | None = None
    keeps_masks: bool = False
    is_hard: bool = False
    fills_all_experts: bool = False
    rows: int = 1
    dtype: torch.dtype = E4M3
    one_copy: "Projection | None" = None
    dgrad_component: str | None = None
    # A NamedTuple of tensors.  The last is ``scale_inv``, which stays where the others give their memory back.
    Operands: ClassVar[type[Any]]

    def __init__(self, key: str) -> None:
        if key in _by_key:
            raise ValueError(f"there is a projection {key!r} already; give this one a key of its own")
        if self.Operands._fields[-1] != "scale_inv":
            raise TypeError(f"the last operand of projection {key!r} is {self.Operands._fields[-1]!r}, not 'scale_inv'")
        self.key = key
        _by_key[key] = self
        add_component(self.cost_key, self.time, self.time, of_weight=True)

    def __repr__(self) -> str:
        return self.key

    def __reduce__(self) -> tuple[Callable[[str], "Projection"], tuple[str]]:
        return projection_of, (self.key,)

    @property
    def has_beta(self) -> bool:
        """Whether a scale is found for each weight."""
        return self.beta_limits is not None

    def projects_as(self, other: "Projection") -> bool:
        """Say whether another projection makes the same of a weight.

        Args:
            other: one with whatever precision and copies.

        Returns:
            Whether the definitions, ``project``, are the same.
        """
        return type(self).project is type(other).project and self.is_hard == other.is_hard

    @property
    def is_bf16(self) -> bool:
        """Whether the products run in bf16 instead of FP8."""
        return self.dtype is torch.bfloat16

    @property
    def cost_key(self) -> str:
        """Of the component of ``kernels.timing.components`` that says how long ``fill`` takes."""
        return f"weight {self.key}"

    @abstractmethod
    def new_operands(self, n: int, k: int, device: torch.device) -> Any:
        """Operands of a weight, uninitialised but for ``scale_inv``, which is 1: kernels begin with the last scale.

        Args:
            n: its out_features.
            k: its in_features.
            device: where they are made.

        Returns:
            An ``Operands``; of fake tensors under a FakeTensorMode.
        """

    def new_masks(self, n: int, k: int, device: torch.device) -> Tensor | None:
        """Uninitialised masks of a weight.

        Args:
            n: its out_features.
            k: its in_features.
            device: where they are made.

        Returns:
            None for projections that keep none.
        """
        del n, k, device
        return None

    @abstractmethod
    def fill(self, weight: Tensor, operands: Any, beta: Tensor | None, masks: Tensor | None, search: bool) -> None:
        """Make the operands of a weight, without waiting for the host: CUDA graphs capture it.

        Args:
            weight: ``[N, K]``, any strides, bf16, fp16 or fp32.
            operands: from ``new_operands``.
            beta: fp32 ``[1]``, or None for 1; always None for projections that have none.
            masks: from ``new_masks``.
            search: whether masks are searched for anew, or read.
        """

    def new_operands_of_experts(self, experts: int, n: int, k: int, device: torch.device) -> Any:
        """Allocate the operands of the matrices of experts.

        Args:
            experts: how many there are.
            n: out_features of each.
            k: in_features of each.
            device: where the operands lie.

        Returns:
            ``Operands``: those of each expert, stacked.  Fake ones under a FakeTensorMode.
        """
        of_one = self.new_operands(n, k, torch.device("meta"))
        stacked = (torch.empty(experts, *o.shape, dtype=o.dtype, device=device) for o in of_one[:-1])
        return self.Operands(*stacked, scale_inv=new_scale_inv(device, experts, *of_one[-1].shape))

    def new_masks_of_experts(self, experts: int, n: int, k: int, device: torch.device) -> Tensor | None:
        """Allocate the masks of experts.

        Args:
            experts: how many there are.
            n: out_features of each.
            k: in_features of each.
            device: where the masks lie.

        Returns:
            Those of ``new_masks`` of each expert, stacked; None for projections that keep none.
        """
        masks = self.new_masks(n, k, torch.device("meta"))
        return None if masks is None else torch.empty(experts, *masks.shape, dtype=masks.dtype, device=device)

    def fill_experts(
        self, weight: Tensor, operands: Any, beta: Tensor | None, masks: Tensor | None, search: bool
    ) -> None:
        """``fill`` for the matrix of each expert.

        Args:
            weight: ``[E, N, K]``, any strides, bf16, fp16 or fp32.
            operands: from ``new_operands_of_experts``; they are written.
            beta: fp32 ``[E]``, or None for 1.
            masks: from ``new_masks_of_experts``; None for projections that keep none.
            search: whether masks are searched for anew, or read.
        """
        if self.fills_all_experts:
            self.fill(weight, operands, beta, masks, search)
            return
        for e, matrix in enumerate(weight):
            of_one = self.Operands(*(operand[e] for operand in operands))
            own_beta, own_masks = None if beta is None else beta[e : e + 1], None if masks is None else masks[e]
            self.fill(matrix, of_one, own_beta, own_masks, search)

    @abstractmethod
    def project(self, weight: Tensor, masks: Tensor | None) -> Tensor:
        """The weight as its products read it, without beta and the cast; runs on any device.

        Args:
            weight: ``[N, K]``, fp32.
            masks: from ``new_masks``; None to search for them.

        Returns:
            ``[N, K]``, fp32.
        """

    @abstractmethod
    def fprop_operand(self, operands: Any) -> SparseOperand | DenseOperand:
        """What fprop multiplies the input with.

        Args:
            operands: filled ones.

        Returns:
            A matrix ``[N, K]``.
        """

    @abstractmethod
    def kept_for_dgrad(self, operands: Any) -> tuple[Tensor, ...]:
        """What ``dgrad_operand`` reads of the operands: saved for backward.

        Args:
            operands: filled ones.

        Returns:
            Tensors, of which the first is of this weight alone.
        """

    def dgrad_operand(self, *kept: Tensor) -> SparseOperand | DenseOperand:
        """What dgrad multiplies grad_output with; called in backward.

        Args:
            kept: from ``kept_for_dgrad``, an operand as it is unless a projection makes one of it.

        Returns:
            A matrix ``[K, N]``, or ``[N, K]`` in bf16.
        """
        return SparseOperand(*kept) if self.prunes_both_ways else DenseOperand(*kept)

    def time(self, shape: LinearShape, random: RandomOperands) -> Callable[[], Any]:
        """A call of ``fill``, to be timed; with masks that are there, since a search is rare.

        Args:
            shape: of the linear.
            random: makes its weight, of random numbers.

        Returns:
            Without arguments.
        """
        n, k, device = shape.out_features, shape.in_features, random.device
        weight, beta = random.weight(shape), random.ones(shape.experts or 1) if self.has_beta else None
        if shape.experts is None:
            operands, masks, fill = self.new_operands(n, k, device), self.new_masks(n, k, device), self.fill
        else:
            operands = self.new_operands_of_experts(shape.experts, n, k, device)
            masks, fill = self.new_masks_of_experts(shape.experts, n, k, device), self.fill_experts
        if masks is not None:
            fill(weight, operands, beta, masks, True)
        return lambda: fill(weight, operands, beta, masks, False)


_by_key: dict[str, Projection] = {}


def new_scale_inv(device: torch.device, *shape: int) -> Tensor:
    """1 in fp32, whatever the default dtype is; of one matrix ``[1]``."""
    return torch.ones(shape or 1, dtype=torch.float32, device=device)


def projection_of(key: str) -> Projection:
    """The projection that is called so in graphs and on disk."""
    if key not in _by_key:
        known = ", ".join(map(repr, sorted(_by_key)))
        raise ValueError(f"there is no projection {key!r}; known are {known}; import the module that makes it")
    return _by_key[key]
