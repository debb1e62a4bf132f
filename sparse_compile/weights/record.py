"""One record for each weight: its phase, its scale beta, its schedule, and its operands.

Transitions are methods, and an illegal one raises::

    FRESH ──trained──▶ PRUNED ──finalize──▶ FINALIZED ──trained──▶ PRUNED
      ▲                  │ ▲
      │ schedule         │ └─ told its scale, or loaded: from every phase
      ▼                  ▼ the schedule's end, when a step writes beta * S(W) into the weight (bakes it)
    WARMUP              TAIL
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch
from torch import Tensor

from sparse_compile.errors import SparseCompileError
from sparse_compile.projections.base import Projection
from sparse_compile.torch_internals.weak_tensors import WeakTensor
from sparse_compile.weights.beta_fit import WINDOW
from sparse_compile.weights.operand_set import STALE, OperandLayout, OperandSet
from sparse_compile.weights.schedule import Schedule
from sparse_compile.weights.skipped_steps import SkipCount, SkippedSteps


class Phase(Enum):
    """Where a weight stands in training."""

    FRESH = "fresh"  # linears compute with it pruned, and no optimizer has trained it so
    WARMUP = "dense warm-up"
    PRUNED = "pruned"  # trained pruned, or told the scale of a weight that was
    TAIL = "dense tail"
    FINALIZED = "finalized"  # it is its own projection

    @property
    def prunes(self) -> bool:
        """Whether linears compute with the weight pruned."""
        return self not in (Phase.WARMUP, Phase.TAIL)


class BetaSource(Enum):
    """Where a scale comes from."""

    FITTED = "fitted"
    PRIOR = "prior"  # the weight was not representative when training began
    CHECKPOINT = "checkpoint"
    TOLD = "told"  # by set_beta
    SPARSE = "of a 2:4 weight"


# Of a weight; of one that holds the matrices of experts, one for each.
Scale = float | tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Beta:
    """The S-STE scale of a weight; other projections have none.

    Attributes:
        source: of experts the prior, as long as one of them has it.
        prior: of the projection that it belongs to, by which projections with other scales are told from it; None where
            nothing says it.
    """

    value: Scale
    source: BetaSource
    prior: float | None = None

    @property
    def values(self) -> tuple[float, ...]:
        """One for each matrix."""
        return self.value if isinstance(self.value, tuple) else (self.value,)

    def fits(self, projection: Projection) -> bool:
        """Whether it is the scale of such a projection, as far as is known."""
        limits = projection.beta_limits
        return self.prior is None or limits is None or self.prior == limits.prior


# The options that train a weight: the arithmetic of their recipe, and their targets.
Trainer = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Glimpse:
    """What was computed of a weight as it was, and how to tell that it is still that: its version, and a sample."""

    version: tuple[int, int]
    sample: Tensor


class WeightRecord:
    """All that is kept of one weight, in shards and gathered.

    Attributes:
        phase: see ``Phase``.
        beta: final since the weight was trained; None before, and for projections that have none.
        provisional: the scale with which linears compute until there is a final one, by the options of the last call.
        steps: of its optimizer, with this weight, in this run and those that it resumes; until ``settle``, with those
            that a fused optimizer has skipped since.
        prior_steps: how many of these have used the prior.
        target: the layout in which it is pruned, or would be outside of dense phases; None where no call has told.
        layout: the one of the last call that recorded gradients; None before.
        unbaked: whether its schedule has ended and it was trained pruned: a step must write beta * S(W) into it.
        unverified: whether its scale comes from a checkpoint, and the weight has not been looked at since.
        decay: masked decay of the gradient that has passed since the last step.
        called_by: the options of the last call that recorded gradients since the last step.
        pruned_by: the options that last trained it pruned; of a checkpoint nothing says it.
        trained_dense: whether gradients have passed, and none with it pruned, in this run or those that it resumes.
        loaded: whether it goes on from what a checkpoint held of it: that is saved again, though no call uses it.
    """

    __slots__ = (
        "__weakref__", "_on_devices", "_unsettled", "beta", "called_by", "decay", "glimpse_24", "is_24", "layout",
        "loaded", "loaded_masks", "operands", "phase", "prior_steps", "provisional", "provisional_factor",
        "provisional_glimpse", "pruned_by", "refit_due", "schedule", "shards", "stepped_to", "steps", "target",
        "trained_dense", "trained_set", "trained_with", "unbaked", "unverified",
    )  # fmt: skip

    # Of all records, how often one changed what linears compute with: what was decided by them is decided anew then.
    changes: ClassVar[int] = 0

    def __init__(self, steps: int = 0) -> None:
        self.phase = Phase.FRESH
        self.beta: Beta | None = None
        self.provisional: Beta | None = None
        self.provisional_glimpse: Glimpse | None = None
        self.provisional_factor = 1.0  # of the options
        self.schedule: Schedule | None = None
        self.steps = steps
        self.prior_steps = 0
        # Steps may have been skipped since this count.
        self._unsettled: tuple[SkippedSteps, SkipCount] | None = None
        self.refit_due = False
        self.shards: WeakTensor | None = None  # weak: what a dictionary with weak keys holds must not hold the key
        self.operands: dict[OperandLayout, OperandSet] = {}
        self.target: OperandLayout | None = None
        self.layout: OperandLayout | None = None
        self.decay = 0.0
        self.loaded = False
        self.loaded_masks: tuple[Tensor, int] | None = None
        self.unbaked = False
        self.unverified = False
        self.trained_set: OperandSet | None = None  # of that layout
        self.stepped_to: tuple[int, int] | None = None  # the weight's version and address after its last step
        # How a gradient passed since the last step.
        self.trained_with: tuple[OperandLayout, Beta | None, Trainer | None] | None = None
        self.called_by: Trainer | None = None
        self.pruned_by: Trainer | None = None
        self.trained_dense = False
        self.is_24 = False
        self.glimpse_24: Glimpse | None = None
        self._on_devices: dict[tuple[Scale, torch.device], Tensor] = {}

    @property
    def pruned(self) -> bool:
        """Whether dense products would compute another function than training did."""
        return self.phase in (Phase.PRUNED, Phase.FINALIZED)

    @property
    def computed_pruned(self) -> bool:
        """Whether a linear has computed with the weight pruned, or it has the scale of one that did."""
        return self.pruned or (self.phase.prunes and any(layout.projection.prunes for layout in self.operands))

    @property
    def masked_set(self) -> OperandSet | None:
        """The operands whose transposable masks are the weight's: where it has only been evaluated, of that layout."""
        trained = () if self.trained_set is None else (self.trained_set,)
        return next((kept for kept in (*trained, *self.operands.values()) if kept.masks is not None), None)

    @property
    def masks(self) -> Tensor | None:
        """Transposable masks that the next call uses, if they hold until then."""
        if self.loaded_masks is not None:
            return self.loaded_masks[0]
        return None if self.masked_set is None else self.masked_set.masks

    @property
    def current_beta(self) -> Beta | None:
        """What linears compute with now."""
        return self.beta or (self.provisional if self.phase.prunes else None)

    def beta_for(self, projection: Projection) -> Beta | None:
        """What linears compute with now in a projection: of another one's scale nothing."""
        if self.beta is not None and self.beta.fits(projection):
            return self.beta
        return self.provisional if self.phase.prunes else None

    def beta_on(self, beta: Beta, device: torch.device) -> Tensor:
        """A scale as fp32 ``[1]``, of experts ``[E]``."""
        key = (beta.value, device)
        if key not in self._on_devices:
            self._on_devices = {key: torch.tensor(beta.values, dtype=torch.float32, device=device)}
        return self._on_devices[key]

    # Transitions.

    def adopt(self, value: Scale, source: BetaSource, prior: float | None = None) -> None:
        """The one way for a scale to become that of the weight.

        Raises:
            ValueError: it is not a positive, finite number.
        """
        beta = Beta(value, source, prior)
        wrong = [number for number in beta.values if not (math.isfinite(number) and number > 0)]
        if wrong:
            raise ValueError(f"a scale beta is {wrong[0]}; it must be a positive, finite number")
        if self.current_beta is None or self.current_beta.value != value:
            self.mark_stale()
        self.beta = beta
        self.prior_steps, self.refit_due = 0, source is BetaSource.PRIOR
        self.unverified = source is BetaSource.CHECKPOINT

    def tell(self, value: Scale) -> None:
        """The weight is a copy of one that was trained with this scale."""
        self.settle()
        self.adopt(value, BetaSource.TOLD)
        self._enter(Phase.PRUNED)
        self.unbaked = False
        self._keep_to_schedule()

    def follow(self, schedule: Schedule | None) -> None:
        """Keep to a schedule from now on, or to none."""
        if schedule != self.schedule:
            self.settle()
            self.schedule = schedule
            self.unbaked = False
            self._keep_to_schedule()

    def awaits_gradient(self, layout: OperandLayout) -> bool:
        """Whether training in this layout would change what the weight is: asked before a backward."""
        if not layout.projection.prunes:
            return self.pruned
        if self.beta is not None and not self.beta.fits(layout.projection):
            return True
        return self.phase is not Phase.PRUNED or (self.beta is not None) != layout.projection.has_beta

    def gradient_passed(self, layout: OperandLayout, beta: Beta | None, trainer: Trainer | None) -> None:
        """A backward ran through a linear: the optimizer's next step trains the weight in this layout."""
        self.trained_with = (layout, beta, trainer)

    def join(self, steps: int) -> None:
        """An optimizer that has made so many steps without it holds it from now on: it is where its optimizer is."""
        self.settle()
        self.steps = max(self.steps, steps)

    def step(self, skipped: SkippedSteps | None = None) -> None:
        """Its optimizer has stepped.

        Args:
            skipped: what counts the steps that a fused optimizer skips, where this may have been one.  It is read,
                which waits for the device, where this step may change the phase or the scale, and not in others.
        """
        self.steps += 1
        if skipped is not None:
            if self._unsettled is not None and self._unsettled[0] is not skipped:
                self.settle()
            self._unsettled = self._unsettled or (skipped, skipped.before)
            if self._may_change():
                self.settle()
                if skipped.skipped_last():
                    return
        if self.trained_with is not None:
            trained_with, self.trained_with = self.trained_with, None
            self._train(*trained_with)
        if self.beta is not None and self.beta.source is BetaSource.PRIOR:
            self.prior_steps += 1
            self.refit_due = self.prior_steps <= WINDOW
        if len(self.operands) > 1:
            # What no call has read since the last step is that of a recipe that is given up.
            self._keep(lambda _, kept: kept.used)
        ours = any(kept.trains for layout, kept in self.operands.items() if layout.projection.prunes)
        for kept in self.operands.values():
            kept.used = kept.trains = False
        self.decay, self.called_by = 0.0, None
        self._keep_to_schedule()
        # What others train is what it is: its schedule writes into it after a step of ours alone.
        self.unbaked = self.unbaked and ours

    def trained_by_hand(self) -> None:
        """Something that is no optimizer has made a step, which a schedule does not count."""
        if self.trained_with is not None:
            trained_with, self.trained_with = self.trained_with, None
            self._train(*trained_with)

    def is_trained_by(self, trainer: Trainer, *, pruned: bool) -> bool:
        """Whether ``train_by`` would change nothing."""
        pruned_by = trainer if pruned else self.pruned_by
        return (self.pruned_by, self.trained_dense) == (pruned_by, pruned_by is None)

    def train_by(self, trainer: Trainer, *, pruned: bool) -> None:
        """A gradient passes a call that computed with the weight, pruned outside of dense phases or not."""
        if not self.is_trained_by(trainer, pruned=pruned):
            self.pruned_by = trainer if pruned else self.pruned_by
            self.trained_dense = self.pruned_by is None
            if self.trained_dense:
                self._forget_evaluations()
            WeightRecord.changes += 1

    def was_trained_dense(self) -> None:
        """Runs that this one resumes have trained it so."""
        if self.phase is Phase.FRESH and self.pruned_by is None and not self.trained_dense:
            self.trained_dense = True
            self._forget_evaluations()
            WeightRecord.changes += 1

    def _forget_evaluations(self) -> None:
        """Of a weight that is trained dense, those that computed with it pruned, because nothing had trained it."""
        if self.phase is Phase.FRESH:
            self.provisional = self.provisional_glimpse = None
            self._keep(lambda layout, _: not layout.projection.prunes)

    def _may_change(self) -> bool:
        """Whether the last step may change the phase or the scale."""
        fits = self.beta is not None and self.beta.source is BetaSource.PRIOR and self.prior_steps <= WINDOW
        schedule = self.schedule
        switches = schedule is not None and schedule.prunes_at(self.steps - 1) != schedule.prunes_at(self.steps)
        return self.trained_with is not None or fits or switches

    def settle(self) -> None:
        """Take back the steps that were counted and skipped."""
        if self._unsettled is not None:
            (skipped, since), self._unsettled = self._unsettled, None
            count = skipped.now.read() - since.read()
            self.steps -= count
            for kept in self.operands.values():
                kept.steps -= count

    def _train(self, layout: OperandLayout, beta: Beta | None, trainer: Trainer | None) -> None:
        if layout.projection.prunes:
            if self.phase.prunes:
                self._enter(Phase.PRUNED)
            if not layout.projection.has_beta:
                self.beta = None
                WeightRecord.changes += 1
            elif beta is not None and (self.beta is None or not self.beta.fits(layout.projection)):
                self.adopt(beta.value, beta.source, beta.prior)
        elif self.pruned and self.pruned_by != trainer:
            # Other options train it dense, from the weight as it is.
            self.beta, self.pruned_by, self.trained_dense = None, None, True
            self._enter(Phase.FRESH)
        self.provisional = self.provisional_glimpse = None

    def baked(self) -> None:
        """beta * S(W) was written into the weight, which is dense from now on."""
        if not self.unbaked:
            raise SparseCompileError("bake", "weight", f"it is {self.phase.value}, and nothing is to be written")
        self.unbaked = False
        self._go_dense()

    def finalize(self) -> None:
        """The weight holds its own projection now: S(W) = W, so a scale is 1 from now on."""
        if not self.phase.prunes:
            raise SparseCompileError("finalize", "weight", f"it is in its {self.phase.value}")
        if self.current_beta is not None:
            experts = isinstance(self.current_beta.value, tuple)
            self.adopt((1.0,) * len(self.current_beta.values) if experts else 1.0, BetaSource.SPARSE)
        self.mark_stale()
        self._enter(Phase.FINALIZED)

    def load(
        self, *, steps: int, pruned: bool, beta: Beta | None, prior_steps: int, masks: tuple[Tensor, int] | None
    ) -> None:
        """Go on from a checkpoint."""
        self.loaded, self.loaded_masks = False, masks
        self.steps, self.trained_with, self.unbaked, self._unsettled = steps, None, False, None
        self.pruned_by, self.trained_dense = None, False
        self.stepped_to = None
        self.beta = self.provisional = self.provisional_glimpse = None
        if not pruned:
            if self.pruned:
                self.drop_operands()
            self._enter(Phase.FRESH)
        else:
            if beta is not None:
                self.adopt(beta.value, beta.source, beta.prior)
                self.prior_steps = prior_steps
                self.refit_due = beta.source is BetaSource.PRIOR and prior_steps <= WINDOW
            self._enter(Phase.PRUNED)
        self.mark_stale()
        WeightRecord.changes += 1
        self._keep_to_schedule()

    def _keep_to_schedule(self) -> None:
        prunes = self.schedule is None or self.schedule.prunes_at(self.steps)
        if prunes:
            if not self.phase.prunes:
                self._enter(Phase.FRESH)
        elif self.phase is Phase.PRUNED:
            # Its warm-up is behind it, though a copy, or what was resumed without its steps, counts from 0.  At the end
            # it is pruned until that is written, in this step, or in the next one: calls write no weights.
            assert self.schedule is not None
            self.unbaked = self.schedule.ends_by(self.steps)
        else:
            self._go_dense()

    def _go_dense(self) -> None:
        assert self.schedule is not None
        phase = Phase.WARMUP if self.steps < self.schedule.begin else Phase.TAIL
        if self.phase is not phase:
            self.beta = self.provisional = self.provisional_glimpse = None
            self.drop_operands()
            self._enter(phase)

    def _enter(self, phase: Phase) -> None:
        if phase is not self.phase:
            self.phase = phase
            WeightRecord.changes += 1

    # Operands.

    def operand_set(self, layout: OperandLayout, shape: torch.Size) -> OperandSet:
        """Of this layout, made at first use.

        Args:
            shape: of the weight, which may grow or shrink through ``.data``.
        """
        known = self.operands.get(layout)
        if known is None or known.shape != shape:
            # A weight lives on one device, and what no graph can read any more is given back.
            self._keep(
                lambda other, kept: other.device == layout.device and kept.shape == shape and len(kept.readers) > 0
            )
            self.operands[layout] = OperandSet(self.shards)
            self.operands[layout].shape = shape
            if self.trained_set is not None and self.trained_set.shape != shape:
                self.trained_set = None  # and its masks
        return self.operands[layout]

    def train_in(self, layout: OperandLayout, kept: OperandSet) -> None:
        """A call that records gradients reads the weight in a layout."""
        self.layout, self.trained_set = layout, kept

    def mark_stale(self) -> None:
        """Let the next call make the operands again, and look whether the weight is 2:4; beta stays."""
        self.glimpse_24 = None
        for kept in self.operands.values():
            if kept.version is not None:
                kept.version = STALE

    def drop_operands(self) -> None:
        """Give back what linears computed with."""
        self._keep(lambda *_: False)

    def _keep(self, wanted: Callable[[OperandLayout, OperandSet], bool]) -> None:
        for layout, kept in list(self.operands.items()):
            if not wanted(layout, kept):
                kept.dropped = True
                del self.operands[layout]

    def free(self) -> None:
        for kept in self.operands.values():
            kept.free()
