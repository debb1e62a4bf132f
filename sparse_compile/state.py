"""What is derived from each weight: beta, frozen at first use in training, and the operands that the GEMMs read.

The operands of a weight are made once per optimizer step and reused by microbatches, recomputation and evaluation.
Tensor versions alone cannot tell when a weight changed: fused optimizers do not bump them.  So operands are reused
only if the weight's version, its address and the last step of the optimizer that owns it are unchanged; a weight that
no optimizer owns that has stepped is pruned at every call.  What all these do not show, edits through ``.data``, is
looked for in samples (``edits``).

Of a weight that FSDP2 gathers, the operands live as long as its gathered form: they are freed when FSDP2 frees that,
and made again, in the same tensors, when it has gathered the weight anew, for a forward or for a backward.
"""

import math
import warnings
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import count
from threading import RLock
from weakref import WeakSet, ref

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparse_compile.betas import KEY, PRUNED, STEPS, Kept, SavedBetas, keep_with
from sparse_compile.courses import Course
from sparse_compile.decay import Decay, MaskedDecay
from sparse_compile.derived import NEVER, Beta, Derived, Stamp, WeightState
from sparse_compile.edits import find_edited, take_samples
from sparse_compile.kernels import ops, reference
from sparse_compile.passes.rewrite import WeightSlot
from sparse_compile.pruning import Pruning
from sparse_compile.recipe import Projection
from sparse_compile.steps import OptimizerSteps
from sparse_compile.torch_internals import (
    WeakTensorKeyDictionary,
    call_when_freed,
    is_held,
    sharded_parameter,
    versions_kept,
)


def optimizer_steps() -> int:
    """Steps of all optimizers in this process so far."""
    return _steps.count


def optimizers_stepped() -> int:
    """How many live optimizers have stepped."""
    return _steps.optimizers


def beta_of(weight: Tensor) -> float | None:
    """The S-STE scale of a weight; None where it has none."""
    derived = _derived.get(weight)
    return None if derived is None else derived.beta.value


def is_pruned(weight: Tensor) -> bool:
    """Whether a linear has computed with the weight pruned, or it has the scale of one that did."""
    derived = _derived.get(weight)
    return derived is not None and (derived.beta.value is not None or any(slot[0].prunes for slot in derived.states))


def has_no_beta(weight: Tensor) -> bool:
    """Whether linears compute with the weight pruned, and none of them with a scale."""
    derived = _derived.get(weight)
    projections = {slot[0] for slot in derived.states} if derived is not None else set()
    return any(p.prunes for p in projections) and not any(p.has_beta for p in projections)


def give_beta(weight: Tensor, value: float) -> None:
    """Set the S-STE scale of a weight, from now on."""
    derived = derived_from(weight)
    if derived.beta.value != value:
        forget(weight)
    derived.beta.set(value, frozen=True)
    derived.finalized = None


def pruning_of(weight: Tensor, moment: Hashable) -> Pruning | None:
    """How the weight is pruned, in training if it was trained; None if it never was.

    Args:
        moment: optimizers are searched for a saved beta once in each (``SavedBetas.find``).
    """
    derived: Derived = _derived.get(weight) or Derived()
    pruned = {key: state for key, state in derived.states.items() if key[0].prunes}
    beta = derived.beta.value
    if beta is None and (derived.course is None or derived.course.pruned):  # a dense tail has left its beta behind
        kept, _ = _saved_betas.find(owned_by_optimizer(weight), moment)
        beta = kept.get(KEY)
    if beta is None and not pruned:
        return None
    last = max(pruned, key=lambda key: pruned[key].trained, default=None)
    projection, transposed = (Projection.SSTE, None) if last is None else (last[0], last[2])
    trained = max((state.trained for state in pruned.values()), default=0)
    finalized = derived.finalized is not None and trained <= derived.finalized
    masks = None if last is None else pruned[last].masks
    return Pruning(projection=projection, beta=beta, masks=masks, transposed=transposed, finalized=finalized)


def mark_finalized(weight: Tensor, pruning: Pruning) -> None:
    """The weight holds its own projection now: S(W) = W, so its scale is 1 from now on."""
    if pruning.beta is not None:
        give_beta(weight, 1.0)
    forget(weight)
    derived_from(weight).finalized = next(_clock)


def forget(weight: Tensor) -> None:
    """Let the next call make the weight's operands again; beta stays."""
    derived: Derived | None = _derived.get(weight)
    for state in derived.states.values() if derived is not None else ():
        if state.stamp is not None:
            state.stamp = NEVER


def course_of(weight: Tensor) -> Course | None:
    derived: Derived | None = _derived.get(weight)
    return None if derived is None else derived.course


def release(weight: Tensor) -> None:
    """Give back what linears computed with in the last phase."""
    derived_from(weight).states.clear()
    _decays.remove(weight)


def _kept_of(weight: Tensor) -> Kept:
    """What checkpoints hold of a weight."""
    kept: dict[str, float] = {}
    beta, course = beta_of(weight), course_of(weight)
    if beta is not None:
        kept[KEY] = beta
    if course is not None:
        kept |= {STEPS: course.steps, PRUNED: int(course.pruned)}
    return kept


def _take(weight: Tensor, kept: Kept) -> None:
    """A checkpoint is loaded after the first call: it replaces what was derived from the weights before."""
    course = course_of(weight)
    if course is not None and STEPS in kept:
        before = course.prunes
        course.steps, course.pruned = int(kept[STEPS]), bool(kept.get(PRUNED, 0))
        if course.prunes != before:
            # What must be written into the weight waits for the next call: the model may be loaded after its optimizer.
            release(weight)
    if KEY in kept and beta_of(weight) is not None:
        give_beta(weight, kept[KEY])


def saved_with(weight: Tensor, training: bool) -> tuple[Kept, bool]:
    """What a checkpoint of the weight's optimizer held of it; and whether an optimizer has stepped with it."""
    # Between two of these moments no optimizer has stepped.
    return _saved_betas.find(owned_by_optimizer(weight), (_steps.count, training))


def _watch(optimizer: Optimizer) -> None:
    if optimizer not in _watched:
        _watched.add(optimizer)
        keep_with(optimizer, _kept_of, _take)


_lock = RLock()
_watched: WeakSet[Optimizer] = WeakSet()
_steps = OptimizerSteps(on_first=_watch)
_decays = MaskedDecay()
_saved_betas = SavedBetas(found=_watch)
_derived: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_clock = count(1)


def derived_from(weight: Tensor) -> Derived:
    derived: Derived | None = _derived.get(weight)
    if derived is None:
        owned = owned_by_optimizer(weight)
        derived = _derived[weight] = _derived.setdefault(owned, Derived())
        if owned is not weight:
            derived.shards = ref(owned)
            call_when_freed(weight, derived.free)
    return derived


def weight_state(weight: Tensor, slot: WeightSlot) -> WeightState:
    """The state of a weight for a slot's projection and orientation, made at first use."""
    derived = derived_from(weight)
    key = (slot.projection, slot.bf16, slot.transposed, slot.device)
    state = derived.states.setdefault(key, WeightState(derived.beta, derived.shards))
    if slot.refresh and owned_by_optimizer(weight) is not weight:
        raise ValueError(
            f"FSDP2 gathers the weight of {slot.name!r} anew for each forward, but transposable masks stay with one; "
            "take recipe 'sr-ste', or leave it out by 'sste.targets'"
        )
    if slot.decay:
        known = ref(state)
        decay = Decay(
            decay=slot.decay, transposed=slot.transposed, masks=lambda: s.masks if (s := known()) is not None else None
        )
        _decays.set(owned_by_optimizer(weight), decay)
    return state


def current_operands(
    weights: Sequence[Tensor], slots: Sequence[WeightSlot], states: Sequence[WeightState]
) -> list[Tensor]:
    """The operands of the weights as they are now: all of the first weight, then of the next."""
    training = torch.is_grad_enabled()
    with _lock, plain_tensors():
        stamps = [_stamp(weight, state) for weight, state in zip(weights, states, strict=True)]
        stale = _find_stale(weights, states, stamps, training)
        for index in stale:
            _refresh(weights[index], slots[index], states[index], stamps[index], training)
        sampled = [index for index in stale if states[index].shards is None]
        _keep_samples([weights[index] for index in sampled], [states[index] for index in sampled])
        return [operand for state in states for operand in state.operands]


def restore_operands(weights: Sequence[Tensor], slots: Sequence[WeightSlot], states: Sequence[WeightState]) -> None:
    """Make operands that were freed again, for a backward, from weights that FSDP2 has gathered anew.

    Raises:
        RuntimeError: FSDP2 has not gathered a weight.
    """
    with _lock, plain_tensors():
        for weight, slot, state in zip(weights, slots, states, strict=True):
            if state.freed:
                if weight.untyped_storage().size() == 0:
                    raise RuntimeError(
                        f"the backward of {slot.name!r} runs while FSDP2 holds its weight in shards: call the module "
                        "to which fully_shard was applied, whose hooks gather it, and not its forward or a submodule"
                    )
                _refresh(weight, slot, state, _stamp(weight, state), True)


def _stamp(weight: Tensor, state: WeightState) -> Stamp:
    owned = weight if state.shards is None else state.shards()
    # Tensors made under inference_mode have no version.
    version = -1 if weight.is_inference() else weight._version
    return None if owned is None else _steps.last_of(owned), version, weight.data_ptr()


def _find_stale(
    weights: Sequence[Tensor], states: Sequence[WeightState], stamps: Sequence[Stamp], training: bool
) -> list[int]:
    """The indices of the weights whose operands must be made again."""
    stale, doubtful = [], []
    for index, (weight, state, stamp) in enumerate(zip(weights, states, stamps, strict=True)):
        if state.shards is not None:
            # What changes in the shards comes with the next gathering, before which the operands are freed.
            if state.freed or stamp != state.stamp or _capturing(weight):
                stale.append(index)
            continue
        # A weight that cannot be trained needs no owner.
        watched = stamp[0] is not None or not weight.requires_grad
        if stamp != state.stamp or state.sample is None or not watched or _capturing(weight):
            stale.append(index)
            continue
        # Evaluation is where averaged weights are swapped in.  In training a look is rare, as it waits for the device:
        # at the first, second, fourth, eighth ... reuse of all, and the count starts again at each edit.
        state.reuses = state.reuses + 1 if training else 0
        if state.reuses & (state.reuses - 1) == 0 or not training:
            doubtful.append(index)
    if doubtful:
        samples = [sample for index in doubtful if (sample := states[index].sample) is not None]
        for position in find_edited([weights[index] for index in doubtful], samples):
            states[doubtful[position]].reuses = 0
            stale.append(doubtful[position])
    return stale


def _refresh(weight: Tensor, slot: WeightSlot, state: WeightState, stamp: Stamp, training: bool) -> None:
    stepped = state.stamp is not None and stamp[0] not in (None, state.stamp[0])
    # Within one optimizer step an earlier call's backward may still need the old operands; otherwise addresses stay,
    # as CUDA graphs need them.
    freed = state.freed
    in_place = freed or (bool(state.operands) and (stepped or not any(is_held(operand) for operand in state.operands)))
    if freed:
        state.allocate()
    elif not in_place:
        state.operands = slot.new_operands()
    matrix = _matrix(weight, slot)
    beta = _beta(weight, matrix, slot, state.beta, training) if slot.projection.has_beta else None
    course = course_of(weight) if slot.projection.prunes else None
    if course is not None:
        course.pruned = course.pruned or training
        course.projection, course.transposed = slot.projection, slot.transposed
    search = _needs_masks(slot, state, stepped)
    same = freed and not stepped  # as for the gathered weight itself, being freed and made again is no change
    with versions_kept(state.operands) if same else nullcontext():
        _fill(slot, matrix, beta, state.operands, state.masks, search)
    if in_place and not same:
        # A backward that comes after the optimizer step must fail as it does for a dense weight.
        torch.autograd.graph.increment_version(state.operands)
    state.stamp = stamp
    state.refreshes += 1
    if training:
        state.trained = next(_clock)


def fill_operands(weight: Tensor, slot: WeightSlot, operands: tuple[Tensor, ...]) -> None:
    """Make operands of a weight with beta = 1, to see how long that takes; the weight's state is not touched."""
    with plain_tensors():
        masks = ops.new_masks(slot.out_features, slot.in_features, slot.device) if slot.refresh else None
        _fill(slot, _matrix(weight, slot), None, operands, masks, True)


def _matrix(weight: Tensor, slot: WeightSlot) -> Tensor:
    """``[out_features, in_features]``"""
    return weight.detach().t() if slot.transposed else weight.detach()


def _needs_masks(slot: WeightSlot, state: WeightState, stepped: bool) -> bool:
    """Whether transposable masks must be found: at first, after so many optimizer steps, and for an edited weight."""
    if not slot.refresh:
        return False
    state.steps += stepped
    if state.masks is None:
        state.masks = ops.new_masks(slot.out_features, slot.in_features, slot.device)
    elif stepped and state.stamp != NEVER and state.steps < slot.refresh:
        return False
    state.steps = 0
    return True


def _fill(
    slot: WeightSlot,
    matrix: Tensor,
    beta: Tensor | None,
    operands: tuple[Tensor, ...],
    masks: Tensor | None,
    search: bool,
) -> None:
    if masks is not None:
        ops.prune_transposable_(matrix, *operands, masks, search)
    elif slot.projection.prunes:
        scale = ops.unit_scale(matrix.device) if beta is None else beta
        prune = ops.prune_weight_bf16_ if slot.bf16 else ops.prune_weight_
        prune(matrix, scale, *operands, slot.projection is Projection.TOP2)
    else:
        ops.cast_weight_(matrix, *operands)


def _keep_samples(weights: Sequence[Tensor], states: Sequence[WeightState]) -> None:
    if any(_capturing(weight) for weight in weights):
        # Memory of the graph: the next call outside it prunes anew.
        for state in states:
            state.sample = None
        return
    for state, sample in zip(states, take_samples(weights), strict=True):
        state.sample = sample


def _beta(weight: Tensor, matrix: Tensor, slot: WeightSlot, beta: Beta, training: bool) -> Tensor:
    """beta as fp32 ``[1]``: a saved one, or from a matrix that is not projected to zero; frozen when training begins.

    Evaluation before training keeps the one that it found, because an optimizer's checkpoint may be loaded after it.
    """
    if beta.value is None or (training and not beta.frozen):
        computed = reference.sste_beta(matrix)
        if computed is None:
            return ops.unit_scale(weight.device)
        kept, stepped = saved_with(weight, training)
        saved, course = kept.get(KEY), course_of(weight)
        # After a dense warm-up there is none yet.
        dense_so_far = course is not None and course.steps > 0 and not course.pruned
        if saved is None and stepped and not dense_so_far:
            warnings.warn(
                f"an optimizer has trained {slot.name!r} before, and has no S-STE scale beta of it, which is therefore "
                "computed from the weight as it is now. If this resumes a run with backend 'sste', its linears go on "
                "with another scale; load the optimizer's state_dict of that run before the first step. "
                "torch.distributed.checkpoint loads beta if the model is called once before get_state_dict.",
                stacklevel=2,
            )
        if saved is not None and saved != 1.0 and computed == 1.0:
            raise ValueError(
                f"the weight of {slot.name!r} is 2:4 already, so its S-STE scale beta is 1, but its optimizer's "
                f"state_dict holds {saved}: the weight was saved after finalize, the optimizer before. Load those that "
                "were saved together, or begin with a new optimizer"
            )
        # A weight that is 2:4 already goes on as what it is.
        fitted = computed if computed == 1.0 else computed * slot.beta_factor
        value = fitted if saved is None else saved
        if not math.isfinite(value):
            raise ValueError(
                f"the weight of {slot.name!r} holds NaN or infinite values at its first use, so its S-STE scale beta "
                f"is {value}; initialise or load it before the first step"
            )
        beta.set(value, frozen=training)
    return beta.on(weight.device)


def owned_by_optimizer(weight: Tensor) -> Tensor:
    """What an optimizer holds of the weight: its shards, where FSDP2 gathers it."""
    sharded = sharded_parameter(weight)
    return weight if sharded is None else sharded


def _capturing(weight: Tensor) -> bool:
    """While the user captures a CUDA graph of the whole step, pruning must be part of it."""
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()


@contextmanager
def plain_tensors() -> Iterator[None]:
    """Operands made under inference_mode could not be saved for a later backward."""
    with torch.inference_mode(False), torch.no_grad():
        yield
