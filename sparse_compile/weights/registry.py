"""The records of all weights, and what makes them change: steps of optimizers, and checkpoints."""

import warnings
from collections.abc import Sequence
from copy import copy
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import Tensor
from torch.optim import Optimizer

from sparse_compile.torch_internals.autocast import plain_arithmetic
from sparse_compile.torch_internals.distributed import first_local, local_tensor
from sparse_compile.torch_internals.fsdp2 import call_when_freed, sharded_parameter
from sparse_compile.torch_internals.optimizers import change_pickled_optimizers
from sparse_compile.torch_internals.weak_tensors import TensorDict, weak
from sparse_compile.weights.edit_detection import is_edited
from sparse_compile.weights.masked_decay import MaskedDecay
from sparse_compile.weights.optimizer_state import Loaded, SavedState, connect, read, write, writes_its_own
from sparse_compile.weights.optimizer_watch import Stage, held_by, watch
from sparse_compile.weights.projection import write_projected
from sparse_compile.weights.record import BetaSource, Scale, WeightRecord
from sparse_compile.weights.skipped_steps import SkippedSteps, add_step

lock = RLock()
_records = TensorDict()


def find_record(weight: Tensor) -> WeightRecord | None:
    """The record of a weight, in shards or gathered; None where nothing is kept of it."""
    record: WeightRecord | None = _records.get(weight)
    return record


def record_of(weight: Tensor) -> WeightRecord:
    """The record of a weight, made at first use, with what optimizers have loaded of it."""
    record = find_record(weight)
    if record is None:
        read_unread()
        record = _make_record(weight)
    return record


def _make_record(weight: Tensor) -> WeightRecord:
    owned = owned_by_optimizer(weight)
    record = find_record(owned)
    if record is None:
        # One that joins late is where its optimizer is.
        held = (count for optimizer, count in list(_steps.items()) if any(one is owned for one in held_by(optimizer)))
        record = _records[owned] = WeightRecord(steps=max(held, default=0))
    if owned is not weight:
        _records[weight] = record
        record.shards = weak(owned)
        call_when_freed(weight, record.free)
    return record


def owned_by_optimizer(weight: Tensor) -> Tensor:
    """What an optimizer holds of the weight: its shards, where FSDP2 gathers it."""
    sharded = sharded_parameter(weight)
    return weight if sharded is None else sharded


def bake(weight: Tensor, record: WeightRecord) -> None:
    """Write into a weight that was trained pruned, and is dense from now on, what linears computed with."""
    owned, layout = owned_by_optimizer(weight), record.target
    assert layout is not None  # whoever follows a schedule has one
    beta = None if record.beta is None else record.beta.value
    masks = None if record.masks is None else record.masks.to(weight.device)
    with plain_arithmetic():
        for tensor in (weight,) if owned is weight else (weight, owned):  # gathered, and in shards
            local = local_tensor(tensor)
            if isinstance(beta, tuple):  # FSDP2 shards whole experts
                first = first_local(tensor)
                own_beta: Scale | None = beta[first : first + len(local)]
            else:
                own_beta = beta
            write_projected(local.mT if layout.transposed else local, layout.projection, own_beta, masks)
    record.baked()


def read_unread() -> None:
    """Take over what optimizers hold that were loaded without their hooks."""
    if _read_at[0] != watch.count:
        _read_at[0] = watch.count
        for optimizer in list(watch.optimizers):
            read_now(optimizer)


def read_now(optimizer: Optimizer) -> None:
    _take_over(optimizer, read(optimizer))


_read_at = [-1]  # steps so far


def _saved_of(weight: Tensor) -> SavedState | None:
    record = find_record(weight)
    if record is None:
        return None
    record.settle()
    made = record.masked_set.version if record.masked_set is not None else None
    with plain_arithmetic():
        return SavedState.of(
            record,
            stepped=lambda: made is not None and made[0] not in (None, watch.last_of(weight)),
            edited=lambda kept: is_edited(weight.detach(), record, kept),
        )


# The outermost steps of each optimizer, in this run and those that it resumes.
_steps: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
# The ids of the weights that it has stepped with last, or was loaded with.
_held: WeakKeyDictionary[Optimizer, set[int]] = WeakKeyDictionary()


def _load(optimizer: Optimizer, loaded: list[Loaded]) -> None:
    """An optimizer was loaded: its weights go on from what was saved with it, and where that is nothing, as fresh."""
    with lock:
        steps = _steps[optimizer] = max((saved.steps for _, saved, _ in loaded if saved is not None), default=0)
        _held[optimizer] = {id(weight) for weight, _, _ in loaded}
        for weight, saved, keeps_state in loaded:
            record = find_record(weight)
            if saved is not None:
                saved.to(_make_record(weight) if record is None else record)
            elif record is not None and (record.beta is None or record.beta.source is not BetaSource.TOLD):
                record.load(steps=steps, pruned=False, beta=None, prior_steps=0, masks=None)
            _mark_blind(weight, keeps_state and (saved is None or saved.lacks_beta))


def _loaded(optimizer: Optimizer, held: list[Loaded]) -> None:
    """Through its hooks: all that it holds was loaded."""
    _load(optimizer, held)
    _note_dense(held)


def _take_over(optimizer: Optimizer, held: list[Loaded]) -> None:
    """What an optimizer holds of ours, if it does, that no hook has seen to be loaded."""
    loaded = [one for one in held if one.saved is not None]
    if loaded:
        _load(optimizer, loaded)
        _note_dense(held)


def _note_dense(held: Sequence[Loaded]) -> None:
    """Of an optimizer's weights those were trained dense of which it keeps its own state alone.

    One that keeps none, as SGD, tells it where it has trained others pruned.
    """
    others = any(saved is not None and saved.pruned for _, saved, _ in held)
    for weight, saved, keeps_state in held:
        if saved is None and weight.ndim > 1 and (keeps_state or others):
            _make_record(weight).was_trained_dense()


def _found(optimizer: Optimizer, held: list[Loaded]) -> None:
    """What an optimizer holds that was not seen to be loaded."""
    for weight, saved, keeps_state in held:
        if saved is None and find_record(weight) is None:
            _mark_blind(weight, keeps_state)
    _take_over(optimizer, held)


def _mark_blind(weight: Tensor, blind: bool) -> None:
    if blind:
        _blind[weight] = True
    else:
        _blind.pop(weight, None)


# Weights whose optimizer was loaded with a state of them, without anything of ours.
_blind = TensorDict()


def take_blind(weight: Tensor) -> bool:
    """Whether an optimizer was loaded that has trained the weight, and brought nothing of ours; said once."""
    owned = owned_by_optimizer(weight)
    blind = _blind.pop(owned, False) is True
    for optimizer in list(watch.optimizers):
        # It holds a state, and was neither seen to step nor to be loaded.
        if optimizer not in _heard and optimizer.state and not watch.has_stepped(optimizer):
            blind = blind or any(held is owned for held in held_by(optimizer))
    return blind


# Optimizers that were loaded through their hooks.
_heard: WeakSet[Optimizer] = WeakSet()


def _after_step(optimizer: Optimizer, weights: list[Tensor]) -> None:
    with lock:
        before, held_before = _steps.get(optimizer, 0), _held.get(optimizer)
        _held[optimizer] = set(map(id, weights))
        saves, steps = False, before + 1
        skipped = add_step(optimizer, _skipped.get(optimizer))
        if skipped is not None:
            _skipped[optimizer] = skipped
        for weight in weights:
            record = find_record(weight)
            if record is not None:
                if held_before is not None and id(weight) not in held_before:
                    record.join(before)
                record.step(skipped)
                steps = max(steps, record.steps)
                held = local_tensor(weight)
                record.stepped_to = held._version, held.data_ptr()
                saves = saves or record.pruned
                if record.unbaked:
                    bake(weight, record)
        _steps[optimizer] = steps
    if saves and writes_its_own(optimizer) and optimizer not in _warned:
        _warned.add(optimizer)
        warnings.warn(
            f"{type(optimizer).__name__} writes its own state_dict, which cannot hold the S-STE scale beta and the "
            "phase of its weights: save sparse_compile.beta(model) next to it, and pass that to "
            "sparse_compile.set_beta when you resume",
            stacklevel=2,
        )


_warned: WeakSet[Optimizer] = WeakSet()
# Of optimizers that a gradient scaler leaves the decision to.
_skipped: WeakKeyDictionary[Optimizer, SkippedSteps] = WeakKeyDictionary()


# Optimizers in their ``load_state_dict``.
_loading: WeakSet[Optimizer] = WeakSet()


def _given(optimizer: Optimizer) -> None:
    """Some have a ``load_state_dict`` of their own, without hooks; of others the hook says what was loaded."""
    if optimizer not in _loading:
        read_now(optimizer)


def _pickled(optimizer: Optimizer, kept: dict[str, Any]) -> dict[str, Any]:
    """What copies and pickles of an optimizer hold: what is kept of its weights, too, which its copy has copies of."""
    if all(find_record(weight) is None for weight in held_by(optimizer)):
        return kept
    written = write(optimizer, kept, _saved_of)
    state = copy(kept["state"])  # of its class
    state.update(written["state"])
    return {**written, "state": state}


def _connect(optimizer: Optimizer) -> None:
    connect(optimizer, _saved_of, _loaded, _found)
    optimizer.register_load_state_dict_pre_hook(lambda optimizer, _: _loading.add(optimizer))
    optimizer.register_load_state_dict_post_hook(_loading.discard)
    optimizer.register_load_state_dict_post_hook(_heard.add)


change_pickled_optimizers(_pickled)
watch.on_optimizer(_connect)
watch.on_state(_given)
watch.subscribe(Stage.DECAY, before=MaskedDecay(find_record).before_step)
watch.subscribe(Stage.RECORDS, after=_after_step)
