"""What is derived from each weight: beta, frozen at first use, and the operands that the GEMMs read.

The operands of a weight are made once per optimizer step and reused by microbatches, recomputation and evaluation.
Tensor versions alone cannot tell when a weight changed: fused optimizers do not bump them.  So operands are reused
only if the weight's version, its address and the count of optimizer steps are unchanged, and an optimizer that has
stepped owns the weight; a weight that no such optimizer owns is pruned at every call.
"""

import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from sparse_compile.betas import SavedBetas, save_with
from sparse_compile.kernels import ops, reference
from sparse_compile.passes.rewrite import WeightSlot
from sparse_compile.recipe import Projection
from sparse_compile.torch_internals import WeakTensorKeyDictionary

_NEVER = (-1, -1, -1)  # a stamp that no weight has


class WeightState:
    """The operands of one weight for one projection and orientation."""

    __slots__ = ("__weakref__", "beta", "beta_tensor", "operands", "refreshes", "stamp")

    def __init__(self) -> None:
        self.beta: float | None = None
        self.beta_tensor: Tensor | None = None
        self.operands: tuple[Tensor, ...] = ()
        self.stamp: tuple[int, int, int] | None = None  # optimizer steps, version, address
        self.refreshes = 0  # how often the operands were made


class _OptimizerSteps:
    """Counts optimizer steps and knows which parameters an optimizer that has stepped owns."""

    def __init__(self) -> None:
        self.count = 0
        self._owned: WeakKeyDictionary[Optimizer, tuple[int, frozenset[int]]] = WeakKeyDictionary()
        register_optimizer_step_post_hook(self._on_step)

    def _on_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        del args, kwargs
        self.count += 1
        if optimizer not in self._owned:
            save_with(optimizer, beta_of)
        size = sum(len(group["params"]) for group in optimizer.param_groups)
        if self._owned.get(optimizer, (-1, None))[0] != size:
            ids = frozenset(id(parameter) for group in optimizer.param_groups for parameter in group["params"])
            self._owned[optimizer] = (size, ids)

    def owns(self, weight: Tensor) -> bool:
        return any(id(weight) in ids for _, ids in self._owned.values())


_steps = _OptimizerSteps()
_saved_betas = SavedBetas()
_states: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def optimizer_steps() -> int:
    """Steps of all optimizers in this process so far."""
    return _steps.count


def _states_of(weight: Tensor) -> Iterable[WeightState]:
    states: dict[object, WeightState] = _states.get(weight, {})
    return states.values()


def beta_of(weight: Tensor) -> float | None:
    """The S-STE scale of a weight; None where it has none."""
    return next((state.beta for state in _states_of(weight) if state.beta is not None), None)


def forget(weight: Tensor) -> None:
    """Let the next call make the weight's operands again; beta stays."""
    for state in _states_of(weight):
        if state.stamp is not None:
            state.stamp = _NEVER


def weight_state(weight: Tensor, slot: WeightSlot) -> WeightState:
    """The state of a weight for a slot's projection and orientation, made at first use."""
    states = _states.get(weight)
    if states is None:
        states = _states[weight] = {}
    key = (slot.projection, slot.transposed)
    state: WeightState | None = states.get(key)
    if state is None:
        state = states[key] = WeightState()
    return state


def current_operands(weight: Tensor, slot: WeightSlot, state: WeightState) -> tuple[Tensor, ...]:
    """The operands of ``weight`` as it is now."""
    stamp = (_steps.count, weight._version, weight.data_ptr())
    if stamp == state.stamp and _steps.owns(weight) and not _capturing(weight):
        return state.operands
    # Within one optimizer step an earlier call's backward may still need the old operands; after it, addresses stay.
    in_place = state.stamp is not None and state.stamp[0] != stamp[0]
    with _plain_tensors():
        if not in_place:
            state.operands = slot.new_operands()
        matrix = _matrix(weight, slot)
        beta = _beta(weight, matrix, slot, state) if slot.projection is Projection.SSTE else None
        _fill(matrix, beta, state.operands)
        if in_place:
            # A backward that comes after the optimizer step must fail as it does for a dense weight.
            torch.autograd.graph.increment_version(state.operands)
    state.stamp = stamp
    state.refreshes += 1
    return state.operands


def fill_operands(weight: Tensor, slot: WeightSlot, operands: tuple[Tensor, ...]) -> None:
    """Make operands of a weight with beta = 1, to see how long that takes; the weight's state is not touched."""
    with _plain_tensors():
        beta = ops.unit_scale(weight.device) if slot.projection is Projection.SSTE else None
        _fill(_matrix(weight, slot), beta, operands)


def _matrix(weight: Tensor, slot: WeightSlot) -> Tensor:
    """``[out_features, in_features]``"""
    return weight.detach().t() if slot.transposed else weight.detach()


def _fill(matrix: Tensor, beta: Tensor | None, operands: tuple[Tensor, ...]) -> None:
    if beta is not None:
        ops.prune_weight_(matrix, beta, *operands)
    else:
        ops.cast_weight_(matrix, *operands)


def _beta(weight: Tensor, matrix: Tensor, slot: WeightSlot, state: WeightState) -> Tensor:
    """beta as fp32 ``[1]``: a saved one, or from the first matrix that is not projected to zero; then frozen."""
    if state.beta_tensor is None:
        beta, missing = _saved_betas.find(weight, _steps.count)
        if missing:
            warnings.warn(
                f"an optimizer has trained {slot.name!r} before, and has no S-STE scale beta of it, which is therefore "
                "computed from the weight as it is now. If this resumes a run with backend 'sste', its linears go on "
                "with another scale; load the optimizer's state_dict of that run before the first step.",
                stacklevel=2,
            )
        if beta is None:
            beta = reference.sste_beta(matrix)
        if beta is None:
            return ops.unit_scale(weight.device)
        if not math.isfinite(beta):
            raise ValueError(
                f"the weight of {slot.name!r} holds NaN or infinite values at its first use, so its S-STE scale beta "
                f"is {beta}; initialise or load it before the first step"
            )
        state.beta = beta
        state.beta_tensor = torch.tensor([beta], dtype=torch.float32, device=weight.device)
    return state.beta_tensor


def _capturing(weight: Tensor) -> bool:
    """While the user captures a CUDA graph of the whole step, pruning must be part of it."""
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()


@contextmanager
def _plain_tensors() -> Iterator[None]:
    """Operands made under inference_mode could not be saved for a later backward."""
    with torch.inference_mode(False), torch.no_grad():
        yield
