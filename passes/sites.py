"""What find hands on: linears that could be rewritten, and products with a parameter that are not, with the reason."""

from dataclasses import dataclass
from enum import Enum
from math import prod

from torch import Tensor
from torch.fx import Node

from sparse_compile.passes.flow import Region
from sparse_compile.passes.roles import Role
from sparse_compile.torch_internals.dispatch import tree_flatten
from sparse_compile.torch_internals.graph import example_value


class Reason(Enum):
    """Why a linear stays dense."""

    UNSUPPORTED_FORM = "form not rewritten"
    NOT_A_PARAMETER = "weight is not a parameter"
    NOT_PLAIN = "not a plain tensor"
    NOT_2D = "weight is not a matrix"
    CONVOLUTION = "convolution"
    DTYPE = "dtype"
    SHAPE = "shape"
    TOO_SMALL = "too small"
    TIED = "weight is shared"
    FROZEN = "weight is frozen"
    ADAPTER = "adapter"
    HEAD = "vocabulary head"
    OUTPUT = "output of the model"
    ROUTER = "router"
    SLOWER = "not faster"
    NO_KERNELS = "not emulated"
    NOT_A_TARGET = "not a target"
    DENSE_PHASE = "in a dense phase"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejection:
    """A linear that stays dense, and why."""

    name: str
    role: Role
    shape: str
    reason: Reason
    detail: str
    advice: str  # what the user can do about it
    node: Node
    site: "LinearSite | None" = None
    weights: frozenset[Node] = frozenset()  # placeholders of the parameters that are multiplied, where no site tells
    # Of a step, where no site tells; None where PyTorch's counter does not know the operation.
    flops: int | None = None
    # Predicted microseconds of its products in a step, where they were measured.
    dense_us: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LinearSite:
    """``output = input @ weight.T + bias`` with a parameter ``[N, K]``, stored ``[K, N]`` if ``transposed``.

    Of experts, whose matrices are a parameter ``[E, N, K]``: each with the tokens of its own.
    """

    node: Node
    region: Region
    input: Node
    weight: Node  # placeholder of the top graph
    bias: Node | None
    offsets: Node | None  # where the tokens of each expert end in the input; None where each has as many, or one matrix
    transposed: bool
    name: str  # the model's own
    path: str  # as the traced function reaches the weight
    role: Role
    other_uses: tuple[str, ...]  # what reads the weight besides linears that read it in the same way
    has_backward: bool  # whether a gradient can come to it
    forwards: int  # how often fprop runs in a step: once more in backward where a checkpointed region needs its result
    writers: tuple[str, ...] = ()  # what writes to the weight in the same graph, before the linear reads it

    @property
    def experts(self) -> int | None:
        """How many; None for one matrix."""
        weight = example_value(self.weight)
        return int(weight.shape[0]) if weight.ndim == 3 else None

    @property
    def out_features(self) -> int:
        return int(example_value(self.weight).shape[-1 if self.transposed else -2])

    @property
    def in_features(self) -> int:
        return int(example_value(self.weight).shape[-2 if self.transposed else -1])

    @property
    def shape(self) -> str:
        """``tokens x in_features -> out_features, experts``; ``?`` for a number of tokens that changes."""
        tokens = prod(example_value(self.input).shape[:-1])
        shape = f"{tokens if isinstance(tokens, int) else '?'} x {self.in_features} -> {self.out_features}"
        return shape if self.experts is None else f"{shape}, {self.experts} expert{'s' * (self.experts > 1)}"

    @property
    def products(self) -> tuple[str, ...]:
        """The products that a step has: no wgrad of a frozen weight, no dgrad where the input needs none."""
        wanted = {"fprop": True, "dgrad": False, "wgrad": False}
        if self.has_backward and example_value(self.node).requires_grad:
            wanted["dgrad"] = example_value(self.input).requires_grad
            wanted["wgrad"] = example_value(self.weight).requires_grad
        return tuple(name for name, is_wanted in wanted.items() if is_wanted)

    @property
    def dtype_name(self) -> str:
        """``bf16``: what its products run in where they are dense."""
        return dtype_name(self.node)

    def reject(self, reason: Reason, detail: str, advice: str) -> Rejection:
        return Rejection(
            name=self.name,
            role=self.role,
            shape=self.shape,
            reason=reason,
            detail=detail,
            advice=advice,
            node=self.node,
            site=self,
        )


def dtype_name(node: Node) -> str:
    """``bf16``: of a node's output, the first where it has several."""
    tensors = [leaf for leaf in tree_flatten(example_value(node))[0] if isinstance(leaf, Tensor)]
    name = str(tensors[0].dtype).removeprefix("torch.") if tensors else ""
    return name.replace("bfloat", "bf").replace("float", "fp")
