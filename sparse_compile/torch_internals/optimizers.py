"""Optimizers and their steps, whenever they were made."""

import sys
from collections.abc import Callable
from functools import cache
from types import CodeType, FrameType
from typing import Any

import torch

from sparse_compile.torch_internals.heap import instances_of


def call_with_new_optimizers(call: Callable[[torch.optim.Optimizer], None]) -> None:
    """Call with each optimizer that is alive, and with each that is made, copied, unpickled or given a state later.

    All of these pass through one method, which wraps the step for its hooks.
    """
    patch_step_function = torch.optim.Optimizer._patch_step_function

    def patch_and_call(optimizer: torch.optim.Optimizer) -> None:
        patch_step_function(optimizer)
        call(optimizer)

    torch.optim.Optimizer._patch_step_function = patch_and_call  # type: ignore[assignment,method-assign]
    for optimizer in instances_of(torch.optim.Optimizer):
        # Wrappers, as Accelerate's, are optimizers by name, and neither hold parameters nor take hooks.
        if "param_groups" in vars(optimizer):
            call(optimizer)


def change_pickled_optimizers(change: Callable[[torch.optim.Optimizer, dict[str, Any]], dict[str, Any]]) -> None:
    """Let it change what copies and pickles of optimizers hold: ``state`` by weight, and ``param_groups``."""
    getstate = torch.optim.Optimizer.__getstate__

    def changed(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return change(optimizer, getstate(optimizer))

    torch.optim.Optimizer.__getstate__ = changed  # type: ignore[assignment,method-assign]


def nested_optimizer_steps() -> int:
    """How many steps of optimizers are running in this thread, one called by the other; 1 in the outermost.

    Asked of the stack, so that a step that failed leaves nothing behind.
    """
    wrapper = _step_wrapper()
    steps, frame = 0, sys._getframe()
    while (caller := frame.f_back) is not None:
        frame = caller
        # Not by identity: dynamo gives a compiled step other code, of the same name.
        steps += frame.f_code.co_name == wrapper.co_name and frame.f_code.co_filename == wrapper.co_filename
    return steps


def initialises_state() -> bool:
    """Whether torch.distributed.checkpoint makes this step, at a rate of 0, so that an optimizer has a state.

    It does so each time that it asks an optimizer that keeps none.
    """
    checkpoints = sys.modules.get("torch.distributed.checkpoint.state_dict")
    if checkpoints is None:
        return False
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not checkpoints._init_optim_state.__code__:
        frame = frame.f_back
    return frame is not None


@cache
def _step_wrapper() -> CodeType:
    return torch.optim.Optimizer.profile_hook_step(lambda _: None).__code__
