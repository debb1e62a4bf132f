"""Masked decay (SR-STE): before each optimizer step, ``grad += decay * (1 - mask) * W`` for every weight that has one.

It is added inside of ``optimizer.step``, once: after all microbatches, so that accumulation does not multiply it; after
gradients are unscaled and clipped, which happens before the step, so that neither changes it; and not at all where a
gradient scaler skips the step.  A fused optimizer that unscales by itself gets it in the scale of its gradients.  With
a closure it is added when the closure returns, which computes the gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sparse_compile.kernels import ops
from sparse_compile.torch_internals import WeakTensorKeyDictionary, local_tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Decay:
    """How much of what a weight's mask drops is added to its gradient."""

    decay: float
    transposed: bool  # whether the weight is stored [in_features, out_features]
    masks: Callable[[], Tensor | None]  # transposable ones; None where the largest elements are kept


class MaskedDecay:
    """Decays the weights that it was told of, from now on."""

    def __init__(self) -> None:
        self._decays: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        # The gradient that a weight's decay was last added to, and its version after that.
        self._added: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        register_optimizer_step_pre_hook(torch.compiler.disable(self._before_step))

    def set(self, weight: Tensor, decay: Decay) -> None:
        """Args: weight: as an optimizer holds it, in shards under FSDP2."""
        self._decays[weight] = decay

    def remove(self, weight: Tensor) -> None:
        self._decays.pop(weight, None)

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self._decays:
            return None
        # args[0] is the optimizer.
        if len(args) > 1 and callable(args[1]):
            return (args[0], self._after(args[1], optimizer), *args[2:]), kwargs
        if callable(kwargs.get("closure")):
            return args, kwargs | {"closure": self._after(kwargs["closure"], optimizer)}
        self._add(optimizer)
        return None

    def _after(self, closure: Callable[[], Any], optimizer: Optimizer) -> Callable[[], Any]:
        def run() -> Any:
            loss = closure()
            self._add(optimizer)
            return loss

        return run

    def _add(self, optimizer: Optimizer) -> None:
        scale = getattr(optimizer, "grad_scale", None)  # of the gradients that a GradScaler left to a fused optimizer
        with torch.no_grad():
            for weight in (weight for group in optimizer.param_groups for weight in group["params"]):
                decay = self._decays.get(weight)
                if decay is not None and weight.grad is not None:
                    self._add_to(weight, decay, scale)

    def _add_to(self, weight: Tensor, decay: Decay, scale: Tensor | None) -> None:
        matrix, grad = local_tensor(weight), local_tensor(weight.grad)
        # A step may be one of several that see the same gradients: of a class that calls its parent's, for instance.
        last, version = self._added.get(weight, (lambda: None, -1))
        if last() is grad and version == grad._version:
            return
        factor = _factor(decay.decay, grad.device)
        if scale is not None:
            factor = factor * scale.to(grad.device)
        if decay.transposed:
            ops.add_masked_decay_(grad.t(), matrix.t(), factor.reshape(1), decay.masks())
        else:
            ops.add_masked_decay_(grad, matrix, factor.reshape(1), decay.masks())
        self._added[weight] = (ref(grad), grad._version)


@cache
def _factor(decay: float, device: torch.device) -> Tensor:
    """fp32 ``[1]``"""
    return torch.full((1,), decay, dtype=torch.float32, device=device)
