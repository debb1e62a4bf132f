"""Masked decay (SR-STE): before each optimizer step, ``grad += decay * (1 - mask) * W`` for every weight that has one.

It is added inside of ``optimizer.step``, once: after all microbatches, so that accumulation does not multiply it; after
gradients are unscaled and clipped, which happens before the step, so that neither changes it; and not at all where a
gradient scaler skips the step.  A fused optimizer that unscales by itself gets it in the scale of its gradients.  With
a closure it is added when the closure returns, which computes the gradients.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparse_compile.kernels import ops
from sparse_compile.torch_internals.autocast import plain_arithmetic
from sparse_compile.torch_internals.distributed import local_tensor
from sparse_compile.torch_internals.weak_tensors import TensorDict, weak
from sparse_compile.weights.optimizer_watch import Arguments
from sparse_compile.weights.record import WeightRecord


class MaskedDecay:
    """Decays the weights whose records say so.

    Args:
        record_of: the record of a weight that an optimizer holds; None where it has none.
    """

    def __init__(self, record_of: Callable[[Tensor], WeightRecord | None]) -> None:
        self._record_of = record_of
        # The gradient that a weight's decay was last added to, and its version after that.
        self._added = TensorDict()

    def before_step(
        self, optimizer: Optimizer, weights: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Arguments | None:
        # args[0] is the optimizer.
        if len(args) > 1 and callable(args[1]):
            return (args[0], self._after(args[1], optimizer, weights), *args[2:]), kwargs
        if callable(kwargs.get("closure")):
            return args, kwargs | {"closure": self._after(kwargs["closure"], optimizer, weights)}
        self._add(optimizer, weights)
        return None

    def _after(self, closure: Callable[[], Any], optimizer: Optimizer, weights: list[Tensor]) -> Callable[[], Any]:
        def run() -> Any:
            loss = closure()
            self._add(optimizer, weights)
            return loss

        return run

    def _add(self, optimizer: Optimizer, weights: list[Tensor]) -> None:
        scale = getattr(optimizer, "grad_scale", None)  # of the gradients that a GradScaler left to a fused optimizer
        with plain_arithmetic():
            for weight in weights:
                record = self._record_of(weight)
                if record is not None and record.decay and record.phase.prunes and weight.grad is not None:
                    self._add_to(weight, record, scale)

    def _add_to(self, weight: Tensor, record: WeightRecord, scale: Tensor | None) -> None:
        matrix, grad = local_tensor(weight), local_tensor(weight.grad)
        # A step may be one of several that see the same gradients: of two optimizers of one weight, for instance.
        last, version = self._added.get(weight, (None, -1))
        if last is not None and last.ref() is grad and version == grad._version:
            return
        factor = _factor(record.decay, grad.device)
        if scale is not None:
            factor = factor * scale.to(grad.device)
        masks = record.trained_set.masks if record.trained_set is not None else None
        if record.layout is not None and record.layout.transposed:
            grad, matrix = grad.mT, matrix.mT
        if matrix.ndim == 2:
            ops.add_masked_decay_(grad, matrix, factor.reshape(1), masks)
        else:
            for e, of_expert in enumerate(matrix):
                ops.add_masked_decay_(grad[e], of_expert, factor.reshape(1), None if masks is None else masks[e])
        self._added[weight] = (weak(local_tensor(weight.grad)), local_tensor(weight.grad)._version)


@cache
def _factor(decay: float, device: torch.device) -> Tensor:
    """fp32 ``[1]``"""
    return torch.full((1,), decay, dtype=torch.float32, device=device)
