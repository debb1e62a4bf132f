"""The operands that the GEMMs read of each weight: when they are made anew, and with which scale.

They are made once per optimizer step and reused by microbatches, recomputation and evaluation.  Tensor versions alone
cannot tell when a weight changed: fused optimizers do not bump them.  So operands are reused only if the weight's
version, its address and the last step of the optimizer that owns it are unchanged; a weight that no optimizer owns
that has stepped is pruned at every call.  What all these do not show, edits through ``.data``, is looked for in samples
(``edit_detection``).

Of a weight that FSDP2 gathers, the operands live as long as its gathered form: they are freed when FSDP2 frees that,
and made again, in the same tensors, when it has gathered the weight anew, for a forward or for a backward.
"""

import logging
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from sparse_compile.torch_internals.autocast import plain_arithmetic
from sparse_compile.torch_internals.tensors import is_held, versions_kept
from sparse_compile.weights.beta_fit import Fit, fit_betas
from sparse_compile.weights.edit_detection import find_edited, is_edited, take_samples
from sparse_compile.weights.operand_set import OperandLayout, OperandSet, WeightVersion
from sparse_compile.weights.optimizer_watch import held_by, watch
from sparse_compile.weights.pattern_24 import is_24
from sparse_compile.weights.record import Beta, BetaSource, Glimpse, Phase, Scale, WeightRecord
from sparse_compile.weights.registry import lock, record_of, take_blind
from sparse_compile.weights.slot import WeightSlot

logger = logging.getLogger(__name__)

_LARGEST_UPDATE = 0.5  # of the norm of a weight: what is loaded in its place differs by more


def layout_of(slot: WeightSlot) -> OperandLayout:
    return OperandLayout(slot.projection, slot.transposed, slot.device)


def operand_set(weight: Tensor, slot: WeightSlot) -> OperandSet:
    """The operands of a weight in a slot's layout, made at first use."""
    record = record_of(weight)
    if slot.refresh and record.shards is not None:
        raise ValueError(
            f"FSDP2 gathers the weight of {slot.name!r} anew for each forward, but transposable masks stay with one; "
            "use recipe 'sr-ste', or exclude the linear with 'sste.targets'"
        )
    return record.operand_set(layout_of(slot), weight.shape)


def current_operands(
    weights: Sequence[Tensor], slots: Sequence[WeightSlot], records: Sequence[WeightRecord], sets: Sequence[OperandSet]
) -> list[Tensor]:
    """The operands of the weights as they are now: all of the first weight, then of the next."""
    training = torch.is_grad_enabled()
    with lock, plain_arithmetic():
        versions = [_version(weight, kept) for weight, kept in zip(weights, sets, strict=True)]
        if training:
            _note_updates_by_hand(weights, slots, records, sets)
        stale = _find_stale(weights, slots, records, sets, versions, training)
        for index in stale:
            _refresh(weights[index], slots[index], records[index], sets[index], versions[index], training)
        sampled = [index for index in stale if sets[index].shards is None]
        _keep_samples([weights[index] for index in sampled], [sets[index] for index in sampled])
        for weight, slot, record, kept in zip(weights, slots, records, sets, strict=True):
            kept.used, kept.trains = True, kept.trains or training
            if record.trained_set is not kept:
                if not (training and weight.requires_grad):
                    _require_what_training_computed(slot, record)
                if training:
                    record.train_in(layout_of(slot), kept)
        return [operand for kept in sets for operand in kept.operands]


def _require_what_training_computed(slot: WeightSlot, record: WeightRecord) -> None:
    trained = record.layout
    if not record.pruned or trained is None or not trained.projection.prunes:
        return
    layout = layout_of(slot)
    if layout.projects_as(trained):
        return
    # What is 2:4 along a dimension passes any projection along it.
    along = layout.transposed == trained.transposed and not layout.projection.prunes_both_ways
    if record.phase is Phase.PRUNED or not (along or not layout.projection.prunes):
        by = "" if record.pruned_by is None else f" by 'sste.recipe': {record.pruned_by[0]!r}"
        raise ValueError(
            f"the weight of {slot.name!r} was trained pruned{by}, and what evaluates it here projects it otherwise, "
            f"which would compute another function than training did ({slot.projection.key}, not "
            f"{trained.projection.key}). Compile the evaluation with the options of the training, or evaluate a "
            "finalized copy of the model: sparse_compile.finalize writes into weights what they compute with"
        )


def restore_operands(
    weights: Sequence[Tensor], slots: Sequence[WeightSlot], records: Sequence[WeightRecord], sets: Sequence[OperandSet]
) -> None:
    """Make operands that were freed again, for a backward, from weights that FSDP2 has gathered anew.

    Raises:
        RuntimeError: FSDP2 has not gathered a weight.
    """
    with lock, plain_arithmetic():
        for weight, slot, record, kept in zip(weights, slots, records, sets, strict=True):
            if kept.freed:
                if weight.untyped_storage().size() == 0:
                    raise RuntimeError(
                        f"the backward of {slot.name!r} runs while FSDP2 holds its weight in shards: call the module "
                        "that fully_shard was applied to, whose hooks gather the weight, not its forward or a submodule"
                    )
                _refresh(weight, slot, record, kept, _version(weight, kept), True)


def fill_operands(weight: Tensor, slot: WeightSlot, operands: Any) -> None:
    """Make operands of a weight with beta = 1, to see how long that takes; what is kept of it is not touched."""
    with plain_arithmetic():
        slot.fill(_matrix(weight, slot.transposed), operands, None, slot.new_masks(), True)


def are_sparse(weights: Sequence[Tensor], records: Sequence[WeightRecord], dims: Sequence[int]) -> list[bool]:
    """Whether weights are 2:4 along dimensions as they are now, and not zero; asked again when they have changed."""
    training = torch.is_grad_enabled()
    with lock, plain_arithmetic():
        same = [
            index
            for index, (weight, record) in enumerate(zip(weights, records, strict=True))
            if record.glimpse_24 is not None and record.glimpse_24.version == (version_of(weight), weight.data_ptr())
        ]
        changed = set(range(len(weights))) - set(same)
        # One comparison for all, which waits for the device: not in training.
        if same and not training:
            samples = [glimpse.sample for index in same if (glimpse := records[index].glimpse_24) is not None]
            changed.update(same[place] for place in find_edited([weights[index] for index in same], samples))
        for index in changed:
            records[index].glimpse_24 = _glimpse(weights[index])
            records[index].is_24 = is_24(weights[index], dims[index]) and bool(weights[index].any())
        return [record.is_24 for record in records]


def _version(weight: Tensor, kept: OperandSet) -> WeightVersion:
    owned = weight if kept.shards is None else kept.shards.ref()
    return None if owned is None else watch.last_of(owned), version_of(weight), weight.data_ptr()


def version_of(weight: Tensor) -> int:
    # Tensors made under inference_mode have no version.
    return -1 if weight.is_inference() else weight._version


def _find_stale(
    weights: Sequence[Tensor],
    slots: Sequence[WeightSlot],
    records: Sequence[WeightRecord],
    sets: Sequence[OperandSet],
    versions: Sequence[WeightVersion],
    training: bool,
) -> list[int]:
    """The indices of the weights whose operands must be made again."""
    stale, doubtful = [], []
    for index, (weight, slot, record, kept, version) in enumerate(
        zip(weights, slots, records, sets, versions, strict=True)
    ):
        if _made_by_other_options(record, slot):
            stale.append(index)
            continue
        if kept.shards is not None:
            # What changes in the shards comes with the next gathering, before which the operands are freed.
            if kept.freed or version != kept.version or _capturing(weight):
                stale.append(index)
            continue
        # A weight that cannot be trained needs no owner.  In training it is pruned once per step, as others are, of
        # whatever optimizer: a teacher may follow its student through ``.data``, and a look would wait for the device.
        still = not weight.requires_grad and (not training or kept.made_at == watch.count)
        watched = version[0] is not None or still
        if version != kept.version or kept.sample is None or not watched or record.refit_due or _capturing(weight):
            stale.append(index)
            continue
        # Evaluation is where averaged weights are swapped in.  In training a look is rare, as it waits for the device:
        # at the first, second, fourth, eighth ... reuse of all, and the count starts again at each edit.
        kept.reuses = kept.reuses + 1 if training else 0
        if kept.reuses & (kept.reuses - 1) == 0 or not training:
            doubtful.append(index)
    if doubtful:
        samples = [sample for index in doubtful if (sample := sets[index].sample) is not None]
        for position in find_edited([weights[index] for index in doubtful], samples):
            sets[doubtful[position]].reuses = 0
            stale.append(doubtful[position])
    return stale


def _note_updates_by_hand(
    weights: Sequence[Tensor], slots: Sequence[WeightSlot], records: Sequence[WeightRecord], sets: Sequence[OperandSet]
) -> None:
    """No optimizer will say that weights were trained which none holds: they are others after a gradient has passed.

    So it is with optimizers over copies of the weights, too.
    """
    asked = [
        index
        for index, (weight, record, kept) in enumerate(zip(weights, records, sets, strict=True))
        if kept.sample is not None and kept.shards is None and weight.requires_grad
        # What follows a schedule may be in its warm-up, in which nothing else is asked: in its first calls.
        if record.trained_with is not None or (record.schedule is not None and not record.steps and kept.refreshes < 5)
    ]
    if not asked:
        return
    held = {id(weight) for optimizer in list(watch.optimizers) for weight in held_by(optimizer)}
    for index in asked:
        weight, before, record = weights[index], sets[index].sample, records[index]
        if id(weight) in held or before is None or _capturing(weight):
            continue
        # Weights that are loaded after a trial have nothing to do with those before.
        if 0 < (take_samples([weight.detach()])[0] - before).norm() < _LARGEST_UPDATE * before.norm():
            record.trained_by_hand()
            if record.schedule is not None:
                warnings.warn(
                    f"{slots[index].name!r} is trained, and no optimizer that is known holds its weight. "
                    "'sste.warmup' and 'sste.tail' count the steps of its optimizer, so its phase never changes: train "
                    "it with a torch.optim.Optimizer that holds it, or leave the schedule out",
                    stacklevel=2,
                )


def _refresh(
    weight: Tensor, slot: WeightSlot, record: WeightRecord, kept: OperandSet, version: WeightVersion, training: bool
) -> None:
    stepped = kept.version is not None and version[0] not in (None, kept.version[0])
    # Within one optimizer step an earlier call's backward may still need the old operands; otherwise addresses stay,
    # as CUDA graphs need them.
    freed = kept.freed
    in_place = freed or (bool(kept.operands) and (stepped or not any(is_held(operand) for operand in kept.operands)))
    if freed:
        kept.allocate()
    elif not in_place:
        kept.operands = slot.new_operands()
    matrix = _matrix(weight, slot.transposed)
    beta = None
    if slot.projection.has_beta:
        if record.phase is Phase.FINALIZED and (
            not training or kept.version is None or version[1:] != kept.version[1:]
        ):
            _warn_if_replaced(weight, matrix, slot)
        beta = record.beta_on(_beta(weight, matrix, slot, record, training), weight.device)
    search = _needs_masks(weight, slot, record, kept)
    same = freed and not stepped  # as for the gathered weight itself, being freed and made again is no change
    with versions_kept(kept.operands) if same else nullcontext():
        slot.fill(matrix, kept.operands, beta, kept.masks, search)
    if in_place and not same:
        # A backward that comes after the optimizer step must fail as it does for a dense weight.
        torch.autograd.graph.increment_version(kept.operands)
    kept.version, kept.steps, kept.made_at = version, record.steps, watch.count
    kept.refreshes += 1


def _matrix(weight: Tensor, transposed: bool) -> Tensor:
    """``[out_features, in_features]``, of experts ``[E, out_features, in_features]``."""
    return weight.detach().mT if transposed else weight.detach()


def _needs_masks(weight: Tensor, slot: WeightSlot, record: WeightRecord, kept: OperandSet) -> bool:
    """Whether transposable masks must be found: at first, after so many optimizer steps, and for an edited weight."""
    if not slot.refresh:
        return False
    if record.loaded_masks is not None:
        (masks, kept.mask_steps), record.loaded_masks = record.loaded_masks, None
        kept.masks = masks.to(slot.device)
        if kept.mask_steps < slot.refresh:
            return False
    else:
        kept.mask_steps += record.steps != kept.steps
        if kept.masks is None:
            kept.masks = slot.new_masks()
        elif kept.mask_steps < slot.refresh:
            reused = record.steps != kept.steps or not _capturing(weight)
            if reused and not is_edited(weight, record, kept):
                return False
    kept.mask_steps = 0
    return True


def _keep_samples(weights: Sequence[Tensor], sets: Sequence[OperandSet]) -> None:
    if any(_capturing(weight) for weight in weights):
        # Memory of the graph: the next call outside it prunes anew.
        for kept in sets:
            kept.sample = None
        return
    for kept, sample in zip(sets, take_samples(weights), strict=True):
        kept.sample = sample


def _beta(weight: Tensor, matrix: Tensor, slot: WeightSlot, record: WeightRecord, training: bool) -> Beta:
    """The scale that linears compute with now: the final one, or what the weight as it is would begin with."""
    if record.beta is None or not record.beta.fits(slot.projection):
        return _provisional(weight, matrix, slot, record, training)
    if len(record.beta.values) != (slot.experts or 1):
        raise ValueError(
            f"the weight of {slot.name!r} holds {slot.experts or 1} matrices, and there are {len(record.beta.values)} "
            "S-STE scales beta of it: its optimizer's state_dict is of another model. Load one of this model"
        )
    if _capturing(weight):
        return record.beta
    if record.unverified:
        record.unverified = False
        for fit, value in zip(_fits(matrix, slot), record.beta.values, strict=True):
            if fit.is_24 and value != 1.0:
                raise ValueError(
                    f"the weight of {slot.name!r} is 2:4 already, so its S-STE scale beta is 1, but its optimizer's "
                    f"state_dict holds {value}: the weight was saved after finalize, the optimizer before it. "
                    "Load a weight and an optimizer that were saved together, or start with a new optimizer"
                )
    if record.refit_due:
        record.refit_due = False
        _refit(record, record.beta, _fits(matrix, slot), slot)
    return record.beta


def _warn_if_replaced(weight: Tensor, matrix: Tensor, slot: WeightSlot) -> None:
    if not _capturing(weight) and not is_24(matrix, -1):
        warnings.warn(
            f"the weight of {slot.name!r} was finalized, then changed by something else than training with the "
            "backend, and is no longer 2:4. It is pruned with a scale beta of 1 now. If it is what it was before "
            "finalize, load the state_dict of its optimizer of then, too, or give sparse_compile.set_beta the scales "
            "that sparse_compile.beta returned then",
            stacklevel=2,
        )


def _refit(record: WeightRecord, beta: Beta, fits: Sequence[Fit], slot: WeightSlot) -> None:
    """Put fitted scales in the place of priors."""
    values, left = list(beta.values), 0
    for index, fit in enumerate(fits):
        # Of experts some may have been fitted before.
        if slot.experts is not None and values[index] != fit.prior * slot.beta_factor:
            continue
        if fit.may_replace_prior():
            logger.info("beta of %s: %.3f, fitted, in place of the prior %.3f", slot.name, fit.value, fit.prior)
            values[index] = fit.value * slot.beta_factor
        else:
            left += 1
    if left == 0:
        record.adopt(_scale(values, slot), BetaSource.FITTED, beta.prior)
    elif tuple(values) != beta.values:
        steps = record.prior_steps
        record.adopt(_scale(values, slot), BetaSource.PRIOR, beta.prior)
        record.prior_steps, record.refit_due = steps, False


def _scale(values: Sequence[float], slot: WeightSlot) -> Scale:
    return values[0] if slot.experts is None else tuple(values)


def _provisional(weight: Tensor, matrix: Tensor, slot: WeightSlot, record: WeightRecord, training: bool) -> Beta:
    """Of a weight that has none yet: it becomes final when the weight is trained, and until then it is the weight's."""
    known, glimpse = record.provisional, record.provisional_glimpse
    still = known is not None and glimpse is not None and (_capturing(weight) or _is_still(weight, glimpse))
    if known is not None and still and _is_provisional_of(record, slot):
        return known
    fits = _fits(matrix, slot)
    all_24 = all(fit.is_24 for fit in fits)
    if training and take_blind(weight) and not all_24:
        warnings.warn(
            f"an optimizer has trained {slot.name!r} before but holds no S-STE scale beta for it, so beta is computed "
            "from the current weight. If this resumes a run with backend 'sste', the linear continues with a different "
            "scale: load that run's optimizer state_dict before the first step. "
            "torch.distributed.checkpoint loads beta if the model is called once before get_state_dict.",
            stacklevel=2,
        )
    # What is 2:4 goes on as what it is.
    values = [1.0 if fit.is_24 else fit.value * slot.beta_factor for fit in fits]
    source = BetaSource.FITTED if all(fit.representative for fit in fits) else BetaSource.PRIOR
    record.provisional = Beta(_scale(values, slot), BetaSource.SPARSE if all_24 else source, fits[0].prior)
    record.provisional_glimpse, record.provisional_factor = _glimpse(weight), slot.beta_factor
    return record.provisional


def _made_by_other_options(record: WeightRecord, slot: WeightSlot) -> bool:
    """Whether operands may have been made with a provisional scale by other options than a slot's."""
    if record.provisional is None or not slot.projection.has_beta:
        return False
    is_final = record.beta is not None and record.beta.fits(slot.projection)
    return not is_final and not _is_provisional_of(record, slot)


def _is_provisional_of(record: WeightRecord, slot: WeightSlot) -> bool:
    """Whether the provisional scale is by the options of a slot."""
    known = record.provisional
    return known is not None and known.fits(slot.projection) and record.provisional_factor == slot.beta_factor


def _fits(matrix: Tensor, slot: WeightSlot) -> list[Fit]:
    """Of each of the weight's matrices."""
    fits = fit_betas([matrix] if slot.experts is None else matrix.unbind(), slot.projection)
    known = [fit for fit in fits if fit is not None]
    if len(known) < len(fits):
        raise ValueError(
            f"the weight of {slot.name!r} holds NaN or infinite values at its first use, so it has no S-STE scale "
            "beta; initialise or load it before the first step"
        )
    return known


def _glimpse(weight: Tensor) -> Glimpse:
    return Glimpse((version_of(weight), weight.data_ptr()), take_samples([weight.detach()])[0])


def _is_still(weight: Tensor, glimpse: Glimpse) -> bool:
    return glimpse.version == (version_of(weight), weight.data_ptr()) and not find_edited([weight], [glimpse.sample])


def _capturing(weight: Tensor) -> bool:
    """While the user captures a CUDA graph of the whole step, pruning must be part of it."""
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()
