"""S-STE's beta in checkpoints: a float beside what the optimizer keeps of a weight.

The model's ``state_dict`` stays as it is, and optimizers carry what they do not know through saving and loading.
"""

import gc
from collections.abc import Callable, Iterable
from weakref import WeakSet

from torch import Tensor
from torch.optim import SGD, Optimizer

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
            kept = optimizer.state.get(weight)
            if kept and KEY in kept:
                take(weight, float(kept[KEY]))

    optimizer.register_state_dict_pre_hook(write)
    optimizer.register_load_state_dict_post_hook(read)


class SavedBetas:
    """Looks betas up in the optimizers that are alive.

    Args:
        found: called with each of them.
    """

    def __init__(self, found: Callable[[Optimizer], None]) -> None:
        self._found = found
        self._optimizers: WeakSet[Optimizer] = WeakSet()
        self._searched_at: int | None = None

    def find(self, weight: Tensor, steps: int) -> tuple[float | None, bool]:
        """The saved beta of a weight; and whether an optimizer has stepped with the weight and saved none.

        Args:
            steps: optimizer steps of this process so far.  Optimizers are searched for once in between: that walks over
                the heap, about 0.2 s for a large model.
        """
        if self._searched_at != steps:
            # type(), because isinstance() would wake lazy proxies that pretend to be optimizers.
            self._optimizers = WeakSet(found for found in gc.get_objects() if issubclass(type(found), Optimizer))
            self._searched_at = steps
            for optimizer in self._optimizers:
                # Wrappers, as Accelerate's, are optimizers by name, and neither hold parameters nor take hooks.
                if "param_groups" in vars(optimizer):
                    self._found(optimizer)
        stepped = False
        for optimizer in self._optimizers:
            kept = optimizer.state.get(weight)
            if kept:
                if KEY in kept:
                    return float(kept[KEY]), False
                stepped = True
        return None, stepped


def _weights(optimizer: Optimizer) -> Iterable[Tensor]:
    return (weight for group in optimizer.param_groups for weight in group["params"])
