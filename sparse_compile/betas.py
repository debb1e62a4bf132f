"""What checkpoints hold of a weight: numbers beside what the optimizer keeps of it.

S-STE's beta and, where there is a schedule, how far it is.  The model's ``state_dict`` stays as it is, and optimizers
carry what they do not know through saving and loading.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any
from weakref import WeakSet

from torch import Tensor
from torch.optim import SGD, Optimizer

from sparse_compile.torch_internals import instances_of

KEY = "sste_beta"
STEPS = "sste_steps"  # of the optimizer with this weight
PRUNED = "sste_pruned"  # 1 if the weight was trained pruned, and is not dense since
_KEYS = (KEY, STEPS, PRUNED)

# Numbers by their keys.
Kept = Mapping[str, float]


def keep_with(optimizer: Optimizer, kept_of: Callable[[Tensor], Kept], take: Callable[[Tensor, Kept], None]) -> None:
    """Let every ``state_dict`` of the optimizer hold what is kept of its weights, and what it loads be taken over.

    Args:
        kept_of: what is kept of a weight; empty where it is nothing.
        take: makes what was loaded that of a weight.
    """

    def write(optimizer: Optimizer) -> None:
        for weight in _weights(optimizer):
            kept = kept_of(weight)
            # Most optimizers initialise what they keep of a weight when they find nothing, so nothing may come first.
            if kept and (optimizer.state.get(weight) or isinstance(optimizer, SGD)):
                for key in _KEYS:
                    optimizer.state[weight].pop(key, None)
                optimizer.state[weight].update(kept)

    def read(optimizer: Optimizer) -> None:
        for weight in _weights(optimizer):
            kept = saved(optimizer, weight)
            if kept:
                take(weight, kept)

    read(optimizer)  # what it loaded before
    optimizer.register_state_dict_pre_hook(write)
    optimizer.register_load_state_dict_post_hook(read)


def saved(optimizer: Optimizer, weight: Tensor) -> Kept:
    """What the optimizer was saved with of this weight."""
    state = _state(optimizer, weight)
    return {key: float(state[key]) for key in _KEYS if key in state}


class SavedBetas:
    """Looks up what optimizers that are alive were saved with.

    Args:
        found: called with each of them.
    """

    def __init__(self, found: Callable[[Optimizer], None]) -> None:
        self._found = found
        self._optimizers: WeakSet[Optimizer] = WeakSet()
        self._searched_at: Hashable = None

    def find(self, weight: Tensor, moment: Hashable) -> tuple[Kept, bool]:
        """What was saved of a weight; and whether an optimizer has stepped with the weight.

        Args:
            moment: optimizers are searched for once in each: that walks over the heap, about 0.2 s for a large model.
        """
        if self._searched_at != moment:
            self._optimizers = WeakSet(instances_of(Optimizer))
            self._searched_at = moment
            for optimizer in self._optimizers:
                # Wrappers, as Accelerate's, are optimizers by name, and neither hold parameters nor take hooks.
                if "param_groups" in vars(optimizer):
                    self._found(optimizer)
        stepped = False
        for optimizer in self._optimizers:
            kept = saved(optimizer, weight)
            stepped = stepped or bool(_state(optimizer, weight))
            if kept:
                return kept, stepped
        return {}, stepped


def _state(optimizer: Optimizer, weight: Tensor) -> Mapping[str, Any]:
    """What the optimizer keeps of the weight.  Wrappers that initialise no base class may have no state."""
    kept: Mapping[str, Any] = getattr(optimizer, "state", {}).get(weight) or {}
    return kept


def _weights(optimizer: Optimizer) -> Iterable[Tensor]:
    return (weight for group in optimizer.param_groups for weight in group["params"])
