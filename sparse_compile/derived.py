"""What is kept of each weight: its scale, and what linears compute with."""

from collections.abc import Callable
from weakref import ref

import torch
from torch import Tensor

from sparse_compile.courses import Course
from sparse_compile.recipe import Projection

# The last step of the optimizer that owns a weight, the weight's version and its address.
Stamp = tuple[int | None, int, int]
NEVER: Stamp = (-1, -1, -1)  # a stamp that no weight has


class Beta:
    """The S-STE scale of one weight; other projections have none."""

    __slots__ = ("_tensors", "frozen", "value")

    def __init__(self) -> None:
        self.value: float | None = None
        self.frozen = False  # until a weight is trained, a checkpoint that is loaded may still bring its beta
        self._tensors: dict[torch.device, Tensor] = {}

    def set(self, value: float, *, frozen: bool) -> None:
        if value != self.value:
            self._tensors.clear()
        self.value, self.frozen = value, frozen

    def forget(self) -> None:
        self._tensors.clear()
        self.value, self.frozen = None, False

    def on(self, device: torch.device) -> Tensor:
        """fp32 ``[1]``."""
        if device not in self._tensors:
            self._tensors[device] = torch.tensor([self.value], dtype=torch.float32, device=device)
        return self._tensors[device]


class WeightState:
    """The operands of one weight for one projection, orientation and device.

    Attributes:
        shards: the parameter that an optimizer owns, where FSDP2 gathers the weight; None for every other weight.
        freed: whether the operands have no memory, because FSDP2 freed that of the gathered weight.
    """

    __slots__ = (
        "__weakref__", "beta", "freed", "masks", "operands", "refreshes", "reuses", "sample", "shards", "stamp",
        "steps", "trained",
    )  # fmt: skip

    def __init__(self, beta: Beta, shards: ref[Tensor] | None) -> None:
        self.beta = beta
        self.shards = shards
        self.operands: tuple[Tensor, ...] = ()
        self.freed = False
        self.masks: Tensor | None = None  # transposable ones, and the optimizer steps since they were found
        self.steps = 0
        self.stamp: Stamp | None = None
        self.sample: Tensor | None = None  # of the weight that the operands were made from
        self.refreshes = 0  # how often the operands were made
        self.reuses = 0  # how often calls that record gradients used them again, since an edit or an evaluation
        self.trained = 0  # when a call that records gradients made them last, by ``_clock``; 0 if none did

    def free(self) -> None:
        """Give the operands' memory back; the tensors stay, because a backward may hold them."""
        # But for the last, the scale: it is one number, and pruning again begins with it.
        if self.operands and not self.freed:
            for listener in before_freeing:
                listener(self)
            for operand in self.operands[:-1]:
                operand.untyped_storage().resize_(0)
            self.freed = True

    def allocate(self) -> None:
        """Uninitialised memory for operands that were freed."""
        for operand in self.operands[:-1]:
            operand.untyped_storage().resize_(operand.nbytes)
        self.freed = False


class Derived:
    """All that is derived from one weight, in shards and gathered."""

    __slots__ = ("beta", "course", "finalized", "shards", "states")

    def __init__(self) -> None:
        self.beta = Beta()
        self.shards: ref[Tensor] | None = None  # weak: what a dictionary with weak keys holds must not hold the key
        self.course: Course | None = None  # where there is a schedule
        self.states: dict[tuple[Projection, bool, bool, torch.device], WeightState] = {}
        self.finalized: int | None = None  # when the weight was made its own projection, by ``_clock``

    def free(self) -> None:
        for state in self.states.values():
            state.free()


# Called with each state whose operands are about to be freed.
before_freeing: list[Callable[[WeightState], None]] = []
