"""Steps of all optimizers of the process: one hook before, one after, and who hears of them in which order."""

import weakref
from collections.abc import Callable, Iterable
from enum import IntEnum
from threading import local
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from sparse_compile.torch_internals.optimizers import (
    call_with_new_optimizers,
    initialises_state,
    nested_optimizer_steps,
)

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Before = Callable[[Optimizer, list[Tensor], tuple[Any, ...], dict[str, Any]], Arguments | None]
After = Callable[[Optimizer, list[Tensor]], None]


class Stage(IntEnum):
    """Who hears of a step, in this order."""

    DECAY = 0
    RECORDS = 1
    HEALTH = 2
    STEP_TIMES = 3
    TARGETS = 4
    FLIP_COUNTS = 5


class OptimizerWatch:
    """Knows every optimizer, counts steps, and tells its subscribers of the outermost ones.

    An optimizer may call another one's step in its own, as SAM, Lookahead and ZeroRedundancyOptimizer do, or that of
    its base class: subscribers hear of one step.  What such an optimizer has stepped with are the weights of the inner
    one as well.  The last step of each weight is kept for every step, since a closure may run a forward in between.
    """

    def __init__(self) -> None:
        self.count = 0  # outermost steps
        self.optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._on_optimizer: list[Callable[[Optimizer], None]] = []
        self._on_state: list[Callable[[Optimizer], None]] = []
        self._before: dict[Stage, Before] = {}
        self._after: dict[Stage, list[After]] = {stage: [] for stage in Stage}
        self._ticks = 0  # steps, inner ones of others too
        # By identity: a weight lives as long as an optimizer holds it, so its id is its own until then.
        self._last: dict[int, int] = {}
        self._owned: weakref.WeakKeyDictionary[Optimizer, set[int]] = weakref.WeakKeyDictionary()
        # Optimizers that kept nothing when their first step began; in it a closure may run a forward.
        self._began_empty: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        # Optimizers that step by another one.
        self._outer: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._inner = local()
        register_optimizer_step_pre_hook(torch.compiler.disable(self._before_step))
        register_optimizer_step_post_hook(torch.compiler.disable(self._after_step))
        call_with_new_optimizers(self._given)

    def last_of(self, weight: Tensor) -> int | None:
        """When an optimizer that owns the weight stepped last, in steps of any optimizer, inner ones too.

        None if no live optimizer that has stepped owns it.
        """
        return self._last.get(id(weight))

    def has_stepped(self, optimizer: Optimizer) -> bool:
        """Whether it has, or is in its first step, begun with an empty state: nothing it keeps is of another run."""
        return optimizer in self._owned or optimizer in self._began_empty

    def subscribe(self, stage: Stage, *, before: Before | None = None, after: After | None = None) -> None:
        """Hear of each outermost step.

        Args:
            before: called with the optimizer, the weights that it is about to step with, and the step's arguments; may
                return other ones.  An inner step is told of with those weights alone that the outer one does not hold.
            after: called with the optimizer and the weights that it has stepped with.
        """
        if before is not None:
            self._before[stage] = before
        if after is not None:
            self._after[stage].append(after)

    def on_optimizer(self, call: Callable[[Optimizer], None]) -> None:
        """Call with every optimizer, now or when it comes up."""
        self._on_optimizer.append(call)
        for optimizer in list(self.optimizers):
            call(optimizer)

    def on_state(self, call: Callable[[Optimizer], None]) -> None:
        """Call with each known optimizer that is given another state, by ``load_state_dict`` or past it."""
        self._on_state.append(call)

    def _given(self, optimizer: Optimizer) -> None:
        if optimizer in self.optimizers:
            for call in self._on_state:
                call(optimizer)
        self.meet(optimizer)

    def meet(self, optimizer: Optimizer) -> None:
        """An optimizer is there."""
        if optimizer not in self.optimizers:
            self.optimizers.add(optimizer)
            for call in self._on_optimizer:
                call(optimizer)

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        if nested_optimizer_steps() <= 1:
            self._inner.optimizers, self._inner.told = [], set()
        if not optimizer.state:
            self._began_empty.add(optimizer)
        if initialises_state():
            return None
        told: set[int] = getattr(self._inner, "told", set())  # none where the watch began within a step
        weights = [weight for weight in held_by(optimizer) if id(weight) not in told]
        told.update(map(id, weights))
        changed = None
        for stage in sorted(self._before) if weights else ():
            result = self._before[stage](optimizer, weights, *(changed or (args, kwargs)))
            changed = result or changed
        return changed

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        del args, kwargs
        self.meet(optimizer)
        if initialises_state():
            return
        self._ticks += 1
        self._own(optimizer)
        inner: list[Optimizer] = getattr(self._inner, "optimizers", [])
        if nested_optimizer_steps() > 1:
            inner.append(optimizer)
            return
        others = [other for other in inner if other is not optimizer]
        if others:
            self._outer.add(optimizer)
        elif optimizer in self._outer:
            return  # this time it did not step: it accumulates
        self.count += 1
        weights = list({id(weight): weight for other in (*others, optimizer) for weight in held_by(other)}.values())
        for stage in Stage:
            for call in self._after[stage]:
                call(optimizer, weights)

    def _own(self, optimizer: Optimizer) -> None:
        owned = self._owned.get(optimizer)
        if owned is None:
            owned = self._owned[optimizer] = set()
            weakref.finalize(optimizer, self._disown, owned).atexit = False
        ids = {id(weight) for weight in held_by(optimizer)}
        if ids != owned:
            self._disown(owned - ids)
            owned.clear()
            owned.update(ids)
        self._last.update(dict.fromkeys(ids, self._ticks))

    def _disown(self, ids: set[int]) -> None:
        for parameter in ids:
            self._last.pop(parameter, None)


def held_by(optimizer: Optimizer) -> Iterable[Tensor]:
    """Its weights, in order."""
    return (weight for group in optimizer.param_groups for weight in group["params"])


watch = OptimizerWatch()
