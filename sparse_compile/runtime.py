"""RUN: what dynamo calls instead of the traced graph."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import Node

from sparse_compile.linear.seed import SeedSource
from sparse_compile.measuring.baseline import Baseline, measure
from sparse_compile.measuring.device_timer import capturing
from sparse_compile.measuring.eager_fallbacks import watch_fallbacks
from sparse_compile.measuring.weight_health import watch
from sparse_compile.reporting.model import GraphReport
from sparse_compile.torch_internals.fake import FakeTensor
from sparse_compile.torch_internals.tensors import whole
from sparse_compile.torch_internals.weak_tensors import WeakTensor, weak
from sparse_compile.weights.operand_set import OperandLayout, OperandSet
from sparse_compile.weights.operands import are_sparse, current_operands, layout_of, operand_set, restore_operands
from sparse_compile.weights.record import Phase, Trainer, WeightRecord
from sparse_compile.weights.registry import find_record, lock, record_of
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
        trainer: Trainer | None = None,
    ) -> None:
        self._health, self._trainer = health, trainer
        self.fixed_sizes = False  # whether dynamo may call its graph with other sizes than it was compiled for
        self._compiled = compiled
        self._slots = tuple(slots)
        self._seeds = [SeedSource(device) for device in seed_devices]
        self._layouts = [layout_of(slot) for slot in slots]
        self.pruned = frozenset(slot.position for slot in slots if slot.projection.prunes)  # positions of weights
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
        before_backward = self._before_backward(weights, records, sets) if torch.is_grad_enabled() else None
        if before_backward is None:
            return self._compiled(*args, *inputs)
        earlier = _backward_nodes(args)
        outputs = self._compiled(*args, *inputs)
        # A gradient comes through what the graph returns, and through inputs that it has written to.
        results = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        for node in _backward_nodes((*results, *args)) - earlier:
            node.register_prehook(torch.compiler.disable(before_backward))
        return outputs

    def _before_backward(
        self, weights: list[Tensor], records: list[WeightRecord], sets: list[OperandSet]
    ) -> Callable[[Any], None] | None:
        """Lets a backward say that it has passed, where that changes what a weight is, and find its operands.

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
            return None

        def before_backward(_: Any) -> None:
            for record, layout, beta in passing:
                record.gradient_passed(layout, beta, self._trainer)
            if gathered:
                restore_operands(weights, self._slots, records, sets)

        return before_backward

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


def _backward_nodes(values: Iterable[Any]) -> set[Node]:
    """What the gradients of values pass in backward; those of all views of a tensor pass that of the tensor."""
    wholes = (whole(value) for value in values if isinstance(value, Tensor))
    return {tensor.grad_fn for tensor in wholes if tensor.grad_fn is not None}


def _is_fake(args: tuple[Any, ...]) -> bool:
    return any(isinstance(argument, FakeTensor) for argument in args)


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A weight of which it depends what its linear is compiled to: asked at each call.

    Attributes:
        target: how it is pruned outside of dense phases; None if the options do not ask for it in this graph.
        in_features_dim: along which it may be 2:4 itself, where that is asked; else None.
    """

    position: int  # among the graph's inputs
    target: OperandLayout | None
    in_features_dim: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseRead:
    """A product that stays dense, whatever its weight is.

    Attributes:
        product: its name, and why.
    """

    position: int  # of the weight among the graph's inputs
    product: str


class Chooser:
    """Chooses, by the weights that a call is given, which variant of its graph runs.

    Args:
        choose: the variant for how the weights of the questions stand, compiled if it is none of those that are.
        first: the variant that was compiled when dynamo traced the graph.
        trainer: which options train the weights of this graph.
        dense_reads: products that would compute another function than training did with a weight that it pruned.
        pattern: of names of linears that are targets, where the user gave one.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        schedule: Schedule | None,
        choose: Callable[[tuple[Standing, ...], tuple[Any, ...]], Runtime],
        first: Runtime,
        trainer: Trainer,
        dense_reads: Sequence[DenseRead] = (),
        pattern: TargetPattern | None = None,
    ) -> None:
        self._pattern = pattern
        self._questions = tuple(questions)
        self._schedule = schedule
        self._choose = choose
        self._first = first
        self._trainer = trainer
        self._dense_reads = tuple(dense_reads)
        self._last: tuple[Any, ...] | None = None
        self._asks_24 = any(question.in_features_dim is not None for question in questions)

    def __call__(self, *args: Any) -> Any:
        if _is_fake(args):
            return self._first(*args)
        if self._pattern is not None and torch.is_grad_enabled():
            self._pattern.ran(args)
        return self._variant(args)(*args)

    def _variant(self, args: tuple[Any, ...]) -> Runtime:
        if not self._questions and not self._dense_reads:
            return self._first
        weights = [args[question.position] for question in self._questions]
        now = (torch.is_grad_enabled(), self._sparse(weights))
        if self._last is not None:
            known, changes, before, runtime = self._last
            same = all(last.ref() is weight for last, weight in zip(known, weights, strict=True))
            if same and changes == WeightRecord.changes and before == now:
                return cast(Runtime, runtime)
        training, sparse = now
        if self._pattern is not None and training:
            self._pattern.check(args)
        if not training:
            self._refuse_dense_reads(args)
        with lock:
            standings = tuple(
                self._standing(question, weight, question.position in sparse, training)
                for question, weight in zip(self._questions, weights, strict=True)
            )
        runtime = self._choose(standings, args)
        if training:
            with lock:
                self._note_training(weights, standings, runtime)
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
        trainer = self._trainer if training and weight.requires_grad else None
        if question.target is not None:
            follow(record, question.target, self._schedule, trainer)
        return standing_of(record, sparse=sparse, trainer=trainer)

    def _refuse_dense_reads(self, args: tuple[Any, ...]) -> None:
        for read in self._dense_reads:
            record = find_record(args[read.position])
            if record is not None and record.phase is Phase.PRUNED:
                raise ValueError(
                    f"a weight that was trained pruned is multiplied densely here ({read.product}), which would "
                    "compute another function than training did. Multiply it in the form in which it was trained, or "
                    "evaluate a finalized copy of the model: sparse_compile.finalize writes into weights what they "
                    "compute with"
                )

    def _note_training(self, weights: Sequence[Tensor], standings: Sequence[Standing], runtime: Runtime) -> None:
        """An evaluation in another graph computes with each weight as what trains it does: pruned, or dense."""
        for question, weight, standing in zip(self._questions, weights, standings, strict=True):
            if weight.requires_grad:
                in_dense_phase = standing is Standing.DENSE and question.target is not None
                pruned = in_dense_phase or question.position in runtime.pruned
                record_of(weight).train_by(self._trainer, pruned=pruned)


def follow(record: WeightRecord, target: OperandLayout, schedule: Schedule | None, trainer: Trainer | None) -> None:
    """What trains a weight says which schedule it follows; an evaluation only where nothing has.

    Args:
        trainer: None in an evaluation.

    Raises:
        ValueError: two graphs of the same options prune it along different dimensions.
    """
    training = trainer is not None
    if training and record.pruned_by == trainer and record.target is not None:
        before, projection = record.target, target.projection
        if (
            before.projection is projection
            and before.transposed != target.transposed
            and not projection.prunes_both_ways
        ):
            raise ValueError(
                "a weight is multiplied as it is in one compiled graph and transposed in another, so each would prune "
                "it along another dimension. Compile both parts as one, where such a weight stays dense, name targets "
                "without it in 'sste.targets', or set 'sste.recipe': 's-ste-transposable', which prunes along both"
            )
    if record.target is None or training:
        record.target = target
    if training or record.schedule is None:
        record.follow(schedule)


def standing_of(record: WeightRecord, *, sparse: bool, trainer: Trainer | None) -> Standing:
    """How a weight stands.

    Args:
        sparse: whether it is frozen and 2:4 itself.
        trainer: the options that train it in this call; None in an evaluation, which computes what training did,
            whatever part the weight plays in its graph.
    """
    if not record.phase.prunes:
        return Standing.DENSE
    if record.pruned:
        return Standing.PRUNED if trainer in (None, record.pruned_by) else Standing.RESUMED
    if sparse:
        return Standing.SPARSE
    return Standing.TRAINED_DENSE if trainer is None and record.trained_dense else Standing.FRESH
