"""RUN: what dynamo calls instead of the traced graph."""

from collections.abc import Callable, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from sparse_compile.clock import capturing
from sparse_compile.derived import WeightState
from sparse_compile.fallbacks import watch_fallbacks
from sparse_compile.measure import Twin, measure
from sparse_compile.passes.rewrite import WeightSlot, new_seed
from sparse_compile.report import GraphReport
from sparse_compile.state import current_operands, restore_operands, weight_state
from sparse_compile.torch_internals import FakeTensor
from sparse_compile.weight_health import watch

# Called with each weight that a rewritten linear reads, and its state, before its first call.
on_weight: list[Callable[[WeightSlot, Tensor, WeightState], object]] = [watch]


class Runtime:
    """A prologue, which draws seeds and brings the operands of every rewritten weight up to date, then the graph.

    The state is looked up from the actual arguments: graphs are shared between blocks and between models.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        slots: Sequence[WeightSlot],
        fakes: Sequence[Tensor],
        report: GraphReport,
        twin: Twin | None = None,
        seed_devices: Sequence[torch.device] = (),
    ) -> None:
        self._compiled = compiled
        self._slots = tuple(slots)
        self._seed_devices = tuple(seed_devices)
        self._fakes = tuple(fakes)  # of seeds and operands
        self._report = report
        self._twin = twin
        # The weight each slot saw last, and its state: saves the look-up by tensor.  Weak: compiled graphs may outlive
        # the models that they were compiled for.
        self._last: list[tuple[ref[Tensor], ref[WeightState]] | None] = [None] * len(slots)
        self._met_gathered = False  # a weight that FSDP2 gathers
        self._fallbacks = watch_fallbacks()

    def __call__(self, *args: Any) -> Any:
        # DDP's bucketing calls each part once to learn its outputs' shapes: with fake activations, but real parameters.
        if any(isinstance(argument, FakeTensor) for argument in args):
            return self._compiled(*args, *self._fakes)
        self._report.calls += 1
        if self._fallbacks.watching or self._report.calls == 1 or capturing():
            self._fallbacks.note(args)
        weights = [args[slot.position] for slot in self._slots]
        states = [self._state(index, weight) for index, weight in enumerate(weights)]
        seeds = [new_seed(device) for device in self._seed_devices]
        inputs = [*seeds, *current_operands(weights, self._slots, states)]
        if self._twin is not None and not capturing():
            self._measure(self._twin, args, inputs)
        outputs = self._compiled(*args, *inputs)
        if self._met_gathered:
            self._restore_before_backward(outputs, weights, states)
        return outputs

    def _restore_before_backward(self, outputs: Any, weights: list[Tensor], states: list[WeightState]) -> None:
        """FSDP2 may free what it gathered, and the operands with it: backward reads those that forward did.

        Its own hooks, which gather the weights for backward, are on the outputs of modules, and so run before.
        """
        if all(state.shards is None for state in states):
            return
        results = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        nodes = {result.grad_fn for result in results if isinstance(result, Tensor) and result.grad_fn is not None}
        for node in nodes:
            node.register_prehook(lambda _: restore_operands(weights, self._slots, states))

    def _measure(self, twin: Twin, args: tuple[Any, ...], inputs: list[Tensor]) -> None:
        """Once."""
        self._twin = None
        result = measure(twin, self._compiled, self._slots, args, inputs)
        if isinstance(result, str):
            self._report.not_measured = result
        else:
            self._report.measured = result

    def _state(self, index: int, weight: Tensor) -> WeightState:
        last = self._last[index]
        if last is not None and last[0]() is weight:
            state = last[1]()
            if state is not None:
                return state
        slot = self._slots[index]
        state = weight_state(weight, slot)
        self._last[index] = (ref(weight), ref(state))
        self._met_gathered = self._met_gathered or state.shards is not None
        for listener in on_weight:
            listener(slot, weight, state)
        return state
