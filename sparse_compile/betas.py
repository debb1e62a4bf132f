"""S-STE's beta in checkpoints: a float beside what the optimizer keeps of a weight.

The model's ``state_dict`` stays as it is, and optimizers carry what they do not know through saving and loading.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any
from weakref import WeakSet

from torch import Tensor
from torch.optim import SGD, Optimizer

from sparse_compile.torch_internals import instances_of

KEY = "sste_beta"


def keep_with(
    optimizer: Optimizer, beta_of: Callable[[Tensor], float | None], take: Callable[[Tensor, float], None]
) -> None:
    """Let every ``state_dict`` of the optimizer hold the betas of its weights, and those that it loads be taken over.

    Args:
        beta_of: the beta of a weight; None where it has none.
        take: makes a loaded beta that of a weight.
    """

    def write(optimizer: Optimizer) -> None:
        for weight in _weights(optimizer):
            beta = beta_of(weight)
            # Most optimizers initialise what they keep of a weight when they find nothing, so nothing may come first.
            if beta is not None and (optimizer.state.get(weight) or isinstance(optimizer, SGD)):
                optimizer.state[weight][KEY] = beta

    def read(optimizer: Optimizer) -> None:
        for weight in _weights(optimizer):
            beta = saved_beta(optimizer, weight)
            if beta is not None:
                take(weight, beta)

    read(optimizer)  # what it loaded before
    optimizer.register_state_dict_pre_hook(write)
    optimizer.register_load_state_dict_post_hook(read)


def saved_beta(optimizer: Optimizer, weight: Tensor) -> float | None:
    """The beta that the optimizer was saved with; None if it holds none of this weight."""
    value = _kept(optimizer, weight).get(KEY)
    return None if value is None else float(value)


class SavedBetas:
    """Looks betas up in the optimizers that are alive.

    Args:
        found: called with each of them.
    """

    def __init__(self, found: Callable[[Optimizer], None]) -> None:
        self._found = found
        self._optimizers: WeakSet[Optimizer] = WeakSet()
        self._searched_at: Hashable = None

    def find(self, weight: Tensor, moment: Hashable) -> tuple[float | None, bool]:
        """The saved beta of a weight; and whether an optimizer has stepped with the weight and saved none.

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
            saved = saved_beta(optimizer, weight)
            if saved is not None:
                return saved, False
            stepped = stepped or bool(_kept(optimizer, weight))
        return None, stepped


def _kept(optimizer: Optimizer, weight: Tensor) -> Mapping[str, Any]:
    """What the optimizer keeps of the weight.  Wrappers that initialise no base class may have no state."""
    kept: Mapping[str, Any] = getattr(optimizer, "state", {}).get(weight) or {}
    return kept


def _weights(optimizer: Optimizer) -> Iterable[Tensor]:
    return (weight for group in optimizer.param_groups for weight in group["params"])
