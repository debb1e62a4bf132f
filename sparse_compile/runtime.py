"""RUN: what dynamo calls instead of the traced graph."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast
from weakref import ref

import torch
from torch import Tensor

from sparse_compile.linear.seed import SeedSource
from sparse_compile.measuring.baseline import Baseline, measure
from sparse_compile.measuring.device_timer import capturing
from sparse_compile.measuring.eager_fallbacks import watch_fallbacks
from sparse_compile.measuring.weight_health import watch
from sparse_compile.reporting.model import GraphReport
from sparse_compile.torch_internals.fake import FakeTensor
from sparse_compile.torch_internals.weak_tensors import WeakTensor, weak
from sparse_compile.weights.operands import are_sparse, current_operands, layout_of, operand_set, restore_operands
from sparse_compile.weights.record import OperandLayout, OperandSet, WeightRecord
from sparse_compile.weights.registry import bake, lock, record_of
from sparse_compile.weights.schedule import Schedule
from sparse_compile.weights.slot import WeightSlot
from sparse_compile.weights.standing import Standing
from sparse_compile.weights.target_pattern import TargetPattern

# Called with each weight that a rewritten linear reads, and its operands, before its first call.
on_weight: list[Callable[[WeightSlot, Tensor, OperandSet], object]] = []


class Runtime:
    """A compiled graph, and the prologue that draws its seeds and brings the operands of its weights up to date.

    What is kept of weights is looked up from the actual arguments: graphs are shared between blocks and between models.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        slots: Sequence[WeightSlot],
        fakes: Sequence[Tensor],
        report: GraphReport,
        baseline: Baseline | None = None,
        seed_devices: Sequence[torch.device] = (),
        health: int = 0,
    ) -> None:
        self._health = health
        self.fixed_sizes = False  # whether dynamo may call its graph with other sizes than it was compiled for
        self._compiled = compiled
        self._slots = tuple(slots)
        self._seeds = [SeedSource(device) for device in seed_devices]
        self._layouts = [layout_of(slot) for slot in slots]
        self._fakes = tuple(fakes)  # of seeds and operands
        self._report = report
        self._baseline = baseline
        # The weight each slot saw last, and what is kept of it: saves the look-up by tensor.  Weak: compiled graphs may
        # outlive the models that they were compiled for.
        self._last: list[tuple[WeakTensor, ref[WeightRecord], ref[OperandSet]] | None] = [None] * len(slots)
        self._met_gathered = False  # a weight that FSDP2 gathers
        self._fallbacks = watch_fallbacks()
        # Up to which change of records no backward through these weights would say anything new.
        self._settled_at = -1

    def __call__(self, *args: Any) -> Any:
        # DDP's bucketing calls each part once to learn its outputs' shapes: with fake activations, but real parameters.
        if _is_fake(args):
            return self._compiled(*args, *self._fakes)
        self._report.calls += 1
        if self._fallbacks.watching or self._report.calls == 1 or capturing():
            self._fallbacks.note(args)
        weights = [args[slot.position] for slot in self._slots]
        kept = [self._kept(index, weight) for index, weight in enumerate(weights)]
        records, sets = [record for record, _ in kept], [operands for _, operands in kept]
        inputs = [*(source.draw() for source in self._seeds), *current_operands(weights, self._slots, records, sets)]
        if self._baseline is not None and not capturing():
            self._measure(self._baseline, args, inputs)
        outputs = self._compiled(*args, *inputs)
        if torch.is_grad_enabled():
            self._prepare_backward(outputs, weights, records, sets)
        return outputs

    def _prepare_backward(
        self, outputs: Any, weights: list[Tensor], records: list[WeightRecord], sets: list[OperandSet]
    ) -> None:
        """Let a backward say that it has passed, where that changes what a weight is, and find its operands.

        FSDP2 may free what it gathered, and the operands with it: backward reads those that forward did.  Its own
        hooks, which gather the weights for backward, are on the outputs of modules, and so run before.
        """
        passing = []
        if self._settled_at != WeightRecord.changes:
            passing = [
                (record, layout, record.current_beta)
                for record, layout, weight in zip(records, self._layouts, weights, strict=True)
                if weight.requires_grad and record.awaits_gradient(layout)
            ]
            self._settled_at = -1 if passing else WeightRecord.changes
        gathered = self._met_gathered and any(operands.shards is not None for operands in sets)
        if not passing and not gathered:
            return

        def before_backward(_: Any) -> None:
            for record, layout, beta in passing:
                record.gradient_passed(layout, beta)
            if gathered:
                restore_operands(weights, self._slots, records, sets)

        results = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        nodes = {result.grad_fn for result in results if isinstance(result, Tensor) and result.grad_fn is not None}
        for node in nodes:
            node.register_prehook(torch.compiler.disable(before_backward))

    def _measure(self, baseline: Baseline, args: tuple[Any, ...], inputs: list[Tensor]) -> None:
        """Once."""
        self._baseline = None
        result = measure(baseline, self._compiled, self._slots, args, inputs)
        if isinstance(result, str):
            self._report.not_measured = result
        else:
            self._report.measured = result

    def _kept(self, index: int, weight: Tensor) -> tuple[WeightRecord, OperandSet]:
        last = self._last[index]
        if last is not None and last[0].ref() is weight:
            record, operands = last[1](), last[2]()
            if record is not None and operands is not None and not operands.dropped:
                return record, operands
        slot = self._slots[index]
        record, operands = record_of(weight), operand_set(weight, slot)
        operands.readers.add(self)
        self._last[index] = (weak(weight), ref(record), ref(operands))
        self._met_gathered = self._met_gathered or operands.shards is not None
        self._settled_at = -1
        watch(slot, weight, operands, self._health)
        for listener in on_weight:
            listener(slot, weight, operands)
        return record, operands


def _is_fake(args: tuple[Any, ...]) -> bool:
    return any(isinstance(argument, FakeTensor) for argument in args)


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A weight of which it depends what its linear is compiled to: asked at each call.

    Attributes:
        target: how it is pruned outside of dense phases; None if it never is.
        in_features_dim: along which it may be 2:4 itself, where that is asked; else None.
    """

    position: int  # among the graph's inputs
    target: OperandLayout | None
    in_features_dim: int | None


class Chooser:
    """Chooses, by the weights that a call is given, which variant of its graph runs.

    Args:
        choose: the variant for how the weights of the questions stand, compiled if it is none of those that are.
        first: the variant that was compiled when dynamo traced the graph.
        pattern: of names of linears that are targets, where the user gave one, and where the linears' weights are.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        schedule: Schedule | None,
        choose: Callable[[tuple[Standing, ...], tuple[Any, ...]], Runtime],
        first: Runtime,
        pattern: tuple[TargetPattern, Sequence[int]] | None = None,
    ) -> None:
        self._pattern = pattern
        self._questions = tuple(questions)
        self._schedule = schedule
        self._choose = choose
        self._first = first
        self._last: tuple[Any, ...] | None = None
        self._asks_24 = any(question.in_features_dim is not None for question in questions)

    def __call__(self, *args: Any) -> Any:
        if _is_fake(args):
            return self._first(*args)
        if self._pattern is not None and torch.is_grad_enabled():
            # Once: the error comes with the first step.
            (pattern, positions), self._pattern = self._pattern, None
            pattern.ran(args[position] for position in positions)
        return self._variant(args)(*args)

    def _variant(self, args: tuple[Any, ...]) -> Runtime:
        if not self._questions:
            return self._first
        weights = [args[question.position] for question in self._questions]
        now = (torch.is_grad_enabled(), self._sparse(weights))
        if self._last is not None:
            known, changes, before, runtime = self._last
            same = all(last.ref() is weight for last, weight in zip(known, weights, strict=True))
            if same and changes == WeightRecord.changes and before == now:
                return cast(Runtime, runtime)
        training, sparse = now
        with lock:
            standings = tuple(
                self._standing(question, weight, question.position in sparse, training)
                for question, weight in zip(self._questions, weights, strict=True)
            )
        runtime = self._choose(standings, args)
        self._last = None if runtime.fixed_sizes else (tuple(map(weak, weights)), WeightRecord.changes, now, runtime)
        return runtime

    def _sparse(self, weights: Sequence[Tensor]) -> frozenset[int]:
        """The positions of the frozen weights that are 2:4 themselves, where that is asked."""
        if not self._asks_24:
            return frozenset()
        pairs = zip(self._questions, weights, strict=True)
        asked = [(question, weight) for question, weight in pairs if question.in_features_dim is not None]
        dims = [question.in_features_dim or 0 for question, _ in asked]
        found = are_sparse([weight for _, weight in asked], [record_of(weight) for _, weight in asked], dims)
        return frozenset(question.position for (question, _), is_24 in zip(asked, found, strict=True) if is_24)

    def _standing(self, question: Question, weight: Tensor, sparse: bool, training: bool) -> Standing:
        record = record_of(weight)
        if question.target is not None:
            follow(record, question.target, self._schedule, training=training and weight.requires_grad)
            if record.unbaked:
                bake(weight, record)
        return standing_of(record, sparse=sparse)


def follow(record: WeightRecord, target: OperandLayout, schedule: Schedule | None, *, training: bool) -> None:
    """What trains a weight says which schedule it follows; an evaluation only where nothing has."""
    if record.target is None or training:
        record.target = target
    if training or record.schedule is None:
        record.follow(schedule)


def standing_of(record: WeightRecord, *, sparse: bool) -> Standing:
    """Args: sparse: whether the weight is frozen and 2:4 itself."""
    if not record.phase.prunes:
        return Standing.DENSE
    if record.pruned:
        return Standing.PRUNED
    return Standing.SPARSE if sparse else Standing.FRESH
