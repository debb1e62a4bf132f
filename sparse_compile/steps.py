"""Optimizer steps: how many there were, and the last one of each weight."""

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook


class OptimizerSteps:
    """Counts the steps of all optimizers of the process.

    Args:
        on_first: called with each optimizer after its first step.
    """

    def __init__(self, on_first: Callable[[Optimizer], None]) -> None:
        self.count = 0
        self._on_first = on_first
        # By identity: a weight lives as long as an optimizer holds it, so its id is its own until then.
        self._last: dict[int, int] = {}
        self._owned: weakref.WeakKeyDictionary[Optimizer, set[int]] = weakref.WeakKeyDictionary()
        register_optimizer_step_post_hook(self._on_step)

    @property
    def optimizers(self) -> int:
        """How many live optimizers have stepped."""
        return len(self._owned)

    def last_of(self, weight: Tensor) -> int | None:
        """The last step of an optimizer that owns the weight; None if no live optimizer that has stepped does."""
        return self._last.get(id(weight))

    def _on_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        del args, kwargs
        self.count += 1
        owned = self._owned.get(optimizer)
        if owned is None:
            owned = self._owned[optimizer] = set()
            weakref.finalize(optimizer, self._disown, owned).atexit = False
            self._on_first(optimizer)
        ids = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if ids != owned:
            self._disown(owned - ids)
            owned.clear()
            owned.update(ids)
        self._last.update(dict.fromkeys(ids, self.count))

    def _disown(self, ids: set[int]) -> None:
        for parameter in ids:
            self._last.pop(parameter, None)
