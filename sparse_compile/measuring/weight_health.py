"""Whether pruned weights fare well: how their masks change over training, and what FP8 loses of them.

A sample reads the compressed weight alone: two bits of metadata and half a byte of values an element at most; no dense
mask is ever stored.  Kept between samples is the metadata of the last one, an eighth of a byte an element.

Gradients are watched in the step before a sample that is due, or after one that was asked for (``grad_noise``).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import cache
from statistics import median
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from sparse_compile.kernels.formats import padded
from sparse_compile.measuring.device_timer import capturing
from sparse_compile.measuring.gradient_noise import GradNoise, noise_and_underflow
from sparse_compile.projections.base import SparseOperand
from sparse_compile.reporting.health import HEALTH_LIMITS, Health
from sparse_compile.reporting.process_report import record_health
from sparse_compile.torch_internals.autocast import plain_arithmetic
from sparse_compile.torch_internals.weak_tensors import weak
from sparse_compile.weights.operand_set import OperandSet, before_freeing
from sparse_compile.weights.optimizer_watch import Stage
from sparse_compile.weights.optimizer_watch import watch as optimizer_watch
from sparse_compile.weights.record import WeightRecord
from sparse_compile.weights.registry import find_record, record_of
from sparse_compile.weights.slot import WeightSlot

Listener = Callable[[str, float, int], object]

_MAGNITUDE = 0x7F  # bits of e4m3 without the sign
_LARGEST = 0x7E  # 448


class _Watched:
    """A weight on one device, and the metadata of its last sample there."""

    __slots__ = (
        "device", "every", "in_features", "last", "name", "projection", "record", "rows", "taken", "weight",
    )  # fmt: skip

    def __init__(self, name: str, slot: WeightSlot, weight: Tensor, every: int) -> None:
        self.name = name
        self.weight = weak(weight)
        self.record = ref(record_of(weight))
        self.every = every  # optimizer steps of the weight between two samples; 0 takes none
        self.device, self.projection = slot.device, slot.projection
        self.rows, self.in_features = slot.out_features * (slot.experts or 1), slot.in_features
        self.last: Tensor | None = None
        self.taken: tuple[Tensor, Tensor, int] | None = None  # by _take, before the operands were freed

    def is_there(self) -> bool:
        """Whether the weight lives, and was not moved to another device, where it has another state."""
        weight = self.weight.ref()
        return weight is not None and weight.device == self.device


class HealthMonitor:
    """The pruned weights that are watched, who hears of their samples, and whose gradients are compared.

    Attributes:
        watched: what is known of each weight, by its operands.
        listeners: called with every sample.
        noise: of the gradients of the step at hand.
    """

    def __init__(self) -> None:
        self.watched: WeakKeyDictionary[OperandSet, _Watched] = WeakKeyDictionary()
        self.listeners: list[Listener] = []
        self.noise = GradNoise()
        self._gradients_left = False
        # Of which gradients were asked for, and how many steps each had made then.
        self._asked: WeakKeyDictionary[WeightRecord, int] = WeakKeyDictionary()

    def watch(self, slot: WeightSlot, weight: Tensor, operands: OperandSet, every: int) -> None:
        if not slot.projection.prunes:
            return
        watched = self.watched.get(operands)
        if watched is None:
            # A weight that was moved keeps its name.
            taken = {
                other.name for other in self.watched.values() if other.is_there() or other.weight.ref() is not weight
            }
            names = (slot.name if number == 1 else f"{slot.name} ({number})" for number in range(1, len(taken) + 2))
            name = next(name for name in names if name not in taken)
            self.watched[operands] = _Watched(name, slot, weight, every)
        elif every:
            watched.every = min(watched.every or every, every)
        self.watch_gradients()

    def leave_gradients(self) -> None:
        self._gradients_left = True
        self.watch_gradients()

    def sample_all(self) -> dict[str, Health]:
        """One of each weight; the gradients of the next optimizer step are compared."""
        samples = self.sample(list(self.watched))
        records = (watched.record() for watched in self.watched.values())
        self._asked = WeakKeyDictionary({record: record.steps for record in records if record is not None})
        self.watch_gradients()
        return samples

    def sample(self, sets: Iterable[OperandSet]) -> dict[str, Health]:
        """One of each weight that has been pruned; also kept for the report, and handed to the listeners."""
        counts, gradients = {}, self.noise.take()
        with plain_arithmetic():
            for state in sets:
                watched = self.watched[state]
                counted, watched.taken = watched.taken, None
                if not state.freed:
                    counted = _take(state, watched)
                if counted is not None and watched.is_there():
                    count, watched.last, address = counted
                    counts[watched] = count, gradients.get(address)
        # One wait for the device, when all of the work is queued.
        samples = {
            watched: _health(watched, count.tolist(), None if sums is None else sums.tolist())
            for watched, (count, sums) in counts.items()
        }
        for watched, taken in samples.items():
            record_health(watched.name, taken)
            for quantity, value in asdict(taken).items():
                if value is not None and (quantity in HEALTH_LIMITS or quantity == "zeros"):
                    for listener in self.listeners:
                        listener(f"sste/{quantity}/{watched.name}", value, taken.step)
        return {watched.name: taken for watched, taken in samples.items()}

    def after_step(self, weights: Sequence[Tensor]) -> None:
        """Sample what an optimizer has stepped, where that is due."""
        if any(watched.every for watched in self.watched.values()) and not capturing():
            stepped = {id(find_record(weight)) for weight in weights}
            due = [state for state, watched in self.watched.items() if _is_due(watched, 0, stepped)]
            if due:
                self.sample(due)
        self.watch_gradients()

    def before_freeing(self, operands: OperandSet) -> None:
        """What FSDP2 frees before the optimizer steps is counted before."""
        watched = self.watched.get(operands)
        if watched is not None and _is_due(watched, 1) and not capturing():
            with plain_arithmetic():
                watched.taken = _take(operands, watched)

    def watch_gradients(self) -> None:
        """Whether a backward that now comes belongs to a sample."""
        due = any(_is_due(watched, 1) for watched in self.watched.values())
        self.noise.watch((due or self._is_awaited()) and not self._gradients_left)

    def _is_awaited(self) -> bool:
        """Whether a weight that was asked about has not stepped since; where another stepped twice, it may never."""
        made = [record.steps - before for record, before in self._asked.items()]
        return bool(made) and min(made) < 1 and max(made) < 2


monitor = HealthMonitor()


def watch(slot: WeightSlot, weight: Tensor, operands: OperandSet, every: int) -> None:
    """Let samples include a weight, if it is pruned.

    Args:
        every: take one each so many steps of its optimizer; of several graphs' wishes, the most frequent.  0: none.
    """
    monitor.watch(slot, weight, operands, every)


def on_health(listener: Listener) -> None:
    """Pass every sample on, for instance to TensorBoard's ``SummaryWriter.add_scalar``.

    Args:
        listener: called as ``listener(tag, value, step)`` for each quantity of ``Health``.  Tags are
            ``sste/flips/<module>`` and alike, values are shares from 0 to 1, the step is the weight's optimizer step.
    """
    if listener not in monitor.listeners:
        monitor.listeners.append(listener)


def leave_gradients() -> None:
    """Watch none from now on: what CUDA graphs allocate in a backward is theirs, and nobody may keep it."""
    monitor.leave_gradients()


def health() -> dict[str, Health]:
    """A sample of every pruned weight that is alive.

    The first call, or the first sample of option ``sste.health``, begins: flips are counted from one to the next, and
    the gradients of the optimizer step after a call are compared for the next one.  Waits for the GPU.

    Returns:
        A ``Health`` by the name of the weight's module.  A graph that several blocks share names their weights ``up``,
        ``up (2)``, ...  Weights that FSDP2 holds in shards are not among them: the option ``sste.health`` looks at
        them before they are given back.
    """
    return monitor.sample_all()


def _take(state: OperandSet, watched: _Watched) -> tuple[Tensor, Tensor, int] | None:
    """Counts, a copy of the metadata, and the address by which its gradients are kept; None before it was pruned."""
    if not state.operands:
        return None
    pruned = watched.projection.fprop_operand(state.operands)
    for_dgrad = watched.projection.kept_for_dgrad(state.operands)
    assert isinstance(pruned, SparseOperand)
    counts = _counts(pruned.values, pruned.metadata, pruned.scale_inv, watched.last)
    return counts, pruned.metadata.clone(), for_dgrad[0].data_ptr()


def mask_flips(before: Tensor, after: Tensor) -> Tensor:
    """How many bits of the mask differ between two int32 metadata of e4m3 operands; int64, a scalar."""
    masks, ones = _tables(before.device)
    # Two groups of four to a byte: the positions of both kept elements, two bits each.
    differing = masks[_bytes(before)] ^ masks[_bytes(after)]
    return ones[differing.int()].sum()


def _bytes(metadata: Tensor) -> Tensor:
    return metadata.flatten().view(torch.uint8).int()


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """By a byte of metadata: the masks of its two groups as a byte; by a byte: how many of its bits are set."""
    nibble = [1 << (code & 3) | 1 << (code >> 2) for code in range(16)]
    masks = [nibble[code & 15] | nibble[code >> 4] << 4 for code in range(256)]
    ones = [code.bit_count() for code in range(256)]
    return torch.tensor(masks, dtype=torch.uint8, device=device), torch.tensor(ones, device=device)


def _counts(values: Tensor, metadata: Tensor, scale_inv: Tensor, last: Tensor | None) -> Tensor:
    """int64 ``[4]``: flips, or -1 at the first sample; zeros among the values, padding included; the largest; whether
    NaN or infinity is among them."""
    if values.dtype is torch.bfloat16:
        zero, largest, broken = values == 0, values.isinf(), ~values.isfinite().all()
    else:
        magnitude = values.view(torch.uint8) & _MAGNITUDE
        # FP8 has no infinity; the scale is that of the largest magnitude.
        zero, largest, broken = magnitude == 0, magnitude == _LARGEST, ~scale_inv.isfinite().all()
    flips = torch.full((), -1, device=values.device) if last is None else mask_flips(last, metadata)
    return torch.stack([flips, zero.sum(), largest.sum(), broken.long()])


def _health(watched: _Watched, counts: list[int], sums: list[float] | None) -> Health:
    flips, zeros, saturated, nonfinite = counts
    elements = watched.rows * watched.in_features
    kept = elements // 2
    noise, grad_underflow = (None, None) if sums is None else noise_and_underflow(sums)
    zeros -= watched.rows * (padded(watched.in_features) - watched.in_features) // 2
    record = watched.record()
    beta = None if record is None else record.current_beta
    return Health(
        step=0 if record is None else record.steps,
        flips=None if flips < 0 else flips / elements,
        zeros=(elements - kept + zeros) / elements,
        underflow=zeros / kept,
        saturated=saturated / kept,
        noise=noise,
        grad_underflow=grad_underflow,
        beta=None if beta is None else median(beta.values),
        beta_source="" if beta is None else beta.source.value,
        nonfinite=bool(nonfinite),
    )


def _is_due(watched: _Watched, later: int, stepped: set[int] | None = None) -> bool:
    """Whether a weight is sampled after so many further steps of its optimizer.

    Args:
        stepped: ids of the records that are asked about; all if it is None.
    """
    record = watched.record()
    if record is None or not watched.every or (stepped is not None and id(record) not in stepped):
        return False
    return (record.steps + later) % watched.every == 0


before_freeing.append(lambda operands: monitor.before_freeing(operands))
optimizer_watch.subscribe(Stage.HEALTH, after=lambda optimizer, weights: monitor.after_step(weights))
