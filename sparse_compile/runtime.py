"""RUN: what dynamo calls instead of the traced graph."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
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
from sparse_compile.torch_internals.weak_tensors import OfTensors
from sparse_compile.weights.operand_set import OperandLayout, OperandSet
from sparse_compile.weights.operands import (
    are_sparse,
    current_operands,
    layout_of,
    operand_set,
    restore_operands,
)
from sparse_compile.weights.record import Phase, Trainer, WeightRecord
from sparse_compile.weights.registry import find_record, lock, record_of
from sparse_compile.weights.schedule import Schedule
from sparse_compile.weights.slot import WeightSlot
from sparse_compile.weights.standing import Standing
from sparse_compile.weights.target_pattern import TargetPattern

# Called with each weight that a rewritten linear reads, and its operands, before its first call.
on_weight: list[Callable[[WeightSlot, Tensor, OperandSet], object]] = []


@dataclass(slots=True)
class _Kept:
    """What is kept of the weights of a call: weakly, because compiled graphs may outlive the models they were made for.

    Attributes:
        gathered: whether FSDP2 gathers a weight.
        settled_at: up to which change of records no backward through these weights would say anything new.
    """

    records: list[ref[WeightRecord]]
    sets: list[ref[OperandSet]]
    gathered: bool
    settled_at: int = -1

    def alive(self) -> tuple[list[WeightRecord], list[OperandSet]] | None:
        """Records and operands; None where some of them are no more."""
        records = [record for known in self.records if (record := known()) is not None]
        sets = [kept for known in self.sets if (kept := known()) is not None and not kept.dropped]
        return (records, sets) if len(records) == len(sets) == len(self.sets) else None


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
        self._decays = [(index, slot.decay) for index, slot in enumerate(slots) if slot.decay]
        # Of weights that are dense in all phases: nobody else says that a graph trains them so, if it has no questions.
        self._dense = [
            index for index, slot in enumerate(slots) if not (slot.projection.prunes or slot.shadow_projection.prunes)
        ]
        self._fakes = tuple(fakes)  # of seeds and operands
        self._report = report
        self._baseline = baseline
        self._known: OfTensors[_Kept] = OfTensors()
        self._fallbacks = watch_fallbacks()

    def __call__(self, *args: Any) -> Any:
        # DDP's bucketing calls each part once to learn its outputs' shapes: with fake activations, but real parameters.
        if _is_fake(args):
            return self._compiled(*args, *self._fakes)
        self._report.calls += 1
        if self._fallbacks.watching or self._report.calls == 1 or capturing():
            self._fallbacks.note(args)
        weights = [args[slot.position] for slot in self._slots]
        kept, records, sets = self._kept(weights)
        inputs = [*(source.draw() for source in self._seeds), *current_operands(weights, self._slots, records, sets)]
        if self._baseline is not None and not capturing():
            self._measure(self._baseline, args, inputs)
        before_backward = self._before_backward(kept, weights, records, sets) if torch.is_grad_enabled() else None
        if before_backward is None:
            return self._compiled(*args, *inputs)
        return _call_hooked(lambda: self._compiled(*args, *inputs), args, before_backward)

    def _before_backward(
        self, kept: _Kept, weights: list[Tensor], records: list[WeightRecord], sets: list[OperandSet]
    ) -> Callable[[Any], None] | None:
        """Lets a backward say that it has passed, where that changes what a weight is, and find its operands.

        FSDP2 may free what it gathered, and the operands with it: backward reads those that forward did.  Its own
        hooks, which gather the weights for backward, are on the outputs of modules, and so run before.
        """
        passing, dense = [], []
        if kept.settled_at != WeightRecord.changes:
            passing = [
                (record, layout, record.beta_for(layout.projection))
                for record, layout, weight in zip(records, self._layouts, weights, strict=True)
                if weight.requires_grad and record.awaits_gradient(layout)
            ]
            if self._trainer is not None:
                trained = [(records[index], self._trainer) for index in self._dense if weights[index].requires_grad]
                dense = [(record, by) for record, by in trained if not record.is_trained_by(by, pruned=False)]
            kept.settled_at = -1 if passing or dense else WeightRecord.changes
        if not (passing or dense or kept.gathered or self._decays):
            return None

        def before_backward(_: Any) -> None:
            for record, layout, beta in passing:
                record.gradient_passed(layout, beta, self._trainer)
            for record, trainer in dense:
                record.train_by(trainer, pruned=False)
            for index, decay in self._decays:
                records[index].decay = decay
            if kept.gathered:
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

    def _kept(self, weights: list[Tensor]) -> tuple[_Kept, list[WeightRecord], list[OperandSet]]:
        kept = self._known.get(weights)
        alive = None if kept is None else kept.alive()
        if kept is not None and alive is not None:
            return kept, *alive
        records = [record_of(weight) for weight in weights]
        sets = []
        for slot, weight in zip(self._slots, weights, strict=True):
            sets.append(operand_set(weight, slot))
            sets[-1].readers.add(self)  # now: what has none goes when its weight gets operands in another layout
        gathered = any(operands.shards is not None for operands in sets)
        kept = _Kept([ref(record) for record in records], [ref(operands) for operands in sets], gathered)
        self._known.put(weights, kept)
        for slot, weight, operands in zip(self._slots, weights, sets, strict=True):
            watch(slot, weight, operands, self._health)
            for listener in on_weight:
                listener(slot, weight, operands)
        return kept, records, sets


def _call_hooked(call: Callable[[], Any], args: tuple[Any, ...], before_backward: Callable[[Any], None]) -> Any:
    """What ``call`` of ``args`` returns; a hook runs before a gradient passes it, and never if none does."""
    earlier = _backward_nodes(args)
    outputs = call()
    # A gradient comes through what a graph returns, and through inputs that it has written to.
    results = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    for node in _backward_nodes((*results, *args)) - earlier:
        node.register_prehook(torch.compiler.disable(before_backward))
    return outputs


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
class _Choice:
    """Of a call's weights.

    Attributes:
        changes: how often records had changed.
        now: what else it depends on.
        fresh: the indices of weights that nothing has trained, where it depends on whether they are 2:4.
        training: weights of which a backward would say how they are trained: their records, and whether pruned.
    """

    changes: int
    now: object
    runtime: Runtime
    fresh: Sequence[int]
    training: Sequence[tuple[ref[WeightRecord], bool]]


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
        self._chosen: OfTensors[_Choice] = OfTensors()
        self._asks_24 = any(question.in_features_dim is not None for question in questions)

    def __call__(self, *args: Any) -> Any:
        if _is_fake(args):
            return self._first(*args)
        if self._pattern is not None and torch.is_grad_enabled():
            self._pattern.ran(args)
        if not self._questions and not self._dense_reads:
            return self._first(*args)
        choice = self._choice(args)
        if not choice.training:
            return choice.runtime(*args)
        return _call_hooked(lambda: choice.runtime(*args), args, lambda _: self._note_training(choice))

    def _choice(self, args: tuple[Any, ...]) -> _Choice:
        weights = [args[question.position] for question in self._questions]
        training, sparse = torch.is_grad_enabled(), self._sparse(weights)
        known = self._chosen.get(weights)
        if known is not None and known.changes == WeightRecord.changes:
            dense = self._dense_of_a_finalized_model(weights, known.fresh)
            if known.now == (training, sparse, dense):
                return known
        if self._pattern is not None and training:
            self._pattern.check(args)
        if not training:
            self._refuse_dense_reads(args)
        with lock:
            standings = [
                self._standing(question, weight, question.position in sparse, training)
                for question, weight in zip(self._questions, weights, strict=True)
            ]
        fresh = () if training else self._fresh(standings)
        dense = self._dense_of_a_finalized_model(weights, fresh)
        for index in dense:
            standings[index] = Standing.TRAINED_DENSE
        runtime = self._choose(tuple(standings), args)
        choice = _Choice(
            changes=WeightRecord.changes, now=(training, sparse, dense), runtime=runtime, fresh=fresh,
            training=self._would_train(weights, standings, runtime) if training else (),
        )  # fmt: skip
        if not runtime.fixed_sizes:
            self._chosen.put(weights, choice)
        return choice

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

    def _fresh(self, standings: Sequence[Standing]) -> list[int]:
        """The indices of the targets that nothing has trained here, where there are several."""
        fresh = [
            index
            for index, (question, standing) in enumerate(zip(self._questions, standings, strict=True))
            if standing is Standing.FRESH and question.target is not None
        ]
        return fresh if len(fresh) > 1 else []

    def _dense_of_a_finalized_model(self, weights: Sequence[Tensor], fresh: Sequence[int]) -> frozenset[int]:
        """In an evaluation: where nothing has trained weights here and some are 2:4, the others were trained dense.

        Asked at each call: what is loaded behind an evaluation may show in samples alone.
        """
        if not fresh:
            return frozenset()
        chosen = [weights[index] for index in fresh]
        targets = [self._questions[index].target for index in fresh]
        dims = [-2 if target is not None and target.transposed else -1 for target in targets]
        found = are_sparse(chosen, [record_of(weight) for weight in chosen], dims)
        if not any(found):
            return frozenset()
        return frozenset(index for index, is_24 in zip(fresh, found, strict=True) if not is_24)

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

    def _would_train(
        self, weights: Sequence[Tensor], standings: Sequence[Standing], runtime: Runtime
    ) -> list[tuple[ref[WeightRecord], bool]]:
        """The weights of which nobody knows yet that this graph trains them, and whether it does so pruned."""
        found = []
        for question, weight, standing in zip(self._questions, weights, standings, strict=True):
            in_dense_phase = standing is Standing.DENSE and question.target is not None
            pruned, record = in_dense_phase or question.position in runtime.pruned, record_of(weight)
            if weight.requires_grad and not record.is_trained_by(self._trainer, pruned=pruned):
                found.append((ref(record), pruned))
        return found

    def _note_training(self, choice: _Choice) -> None:
        """An evaluation in another graph computes with each weight as what trains it does: pruned, or dense."""
        with lock:
            for known, pruned in choice.training:
                record = known()
                if record is not None:
                    record.train_by(self._trainer, pruned=pruned)


def follow(record: WeightRecord, target: OperandLayout, schedule: Schedule | None, trainer: Trainer | None) -> None:
    """What trains a weight says which schedule it follows; an evaluation only where nothing has.

    Args:
        trainer: None in an evaluation.

    Raises:
        ValueError: two graphs of the same options prune it along different dimensions.
    """
    training = trainer is not None
    if training and trainer in (record.pruned_by, record.called_by) and record.target is not None:
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
    if training:
        record.called_by = trainer
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
