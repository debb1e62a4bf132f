"""Weights that follow a schedule: which phase each is in, and what happens to it where one ends."""

import torch
from torch import Tensor
from torch.nn import Parameter

from sparse_compile.betas import KEY, PRUNED, STEPS
from sparse_compile.courses import Course, Schedule, count_steps
from sparse_compile.derived import Derived
from sparse_compile.projected import write_projected
from sparse_compile.recipe import Projection
from sparse_compile.state import (
    course_of,
    derived_from,
    owned_by_optimizer,
    plain_tensors,
    release,
    saved_with,
)
from sparse_compile.torch_internals import PRUNED_NOW, local_tensor

_schedule: Schedule | None = None  # the last that was followed


def follow(weight: Tensor, schedule: Schedule, projection: Projection, transposed: bool) -> bool:
    """Let a weight follow a schedule; whether it is pruned now."""
    global _schedule
    _schedule = schedule
    if not hasattr(Parameter, PRUNED_NOW):
        setattr(Parameter, PRUNED_NOW, property(_is_pruned_now))
        count_steps(course_of, _switch)
    course = _course(weight)
    course.schedule, course.projection, course.transposed = schedule, projection, transposed
    _settle(weight, course)
    return course.prunes


def _is_pruned_now(weight: Tensor) -> bool | None:
    """What a graph is guarded by; asked of all that may use it, as the weights of blocks that are alike.

    None, for which no graph is compiled, where a checkpoint of a pruned weight goes on dense, as no step has seen.
    """
    course = _course(weight)
    return None if course.pruned and not course.prunes else course.prunes


def _course(weight: Tensor) -> Course:
    """The course of a weight; of a new one as far as its checkpoint says, by the last schedule."""
    derived = derived_from(weight)
    if derived.course is None:
        assert _schedule is not None  # nobody asks before there is one
        kept, _ = saved_with(weight, torch.is_grad_enabled())
        derived.course = Course(_schedule, int(kept.get(STEPS, 0)), bool(kept.get(PRUNED, 0)))
    return derived.course


def _switch(weight: Tensor, course: Course) -> None:
    """A step has ended a phase."""
    _settle(weight, course)
    release(weight)


def _settle(weight: Tensor, course: Course) -> None:
    """Where a weight was trained pruned and is dense from now on, write into it what linears computed with."""
    if course.prunes or not course.pruned:
        return
    derived, owned = derived_from(weight), owned_by_optimizer(weight)
    beta = derived.beta.value
    if beta is None and course.projection.has_beta:  # it was pruned in another process
        kept, _ = saved_with(weight, torch.is_grad_enabled())
        beta = kept.get(KEY)
    with plain_tensors():
        for tensor in (weight,) if owned is weight else (weight, owned):  # gathered, and in shards
            local = local_tensor(tensor)
            matrix = local.t() if course.transposed else local
            write_projected(matrix, course.projection, beta, _masks_of(derived))
    course.pruned = False
    derived.beta.forget()


def _masks_of(derived: Derived) -> Tensor | None:
    """The transposable masks that linears computed with; None where they did not, in this process."""
    return next((state.masks for state in derived.states.values() if state.masks is not None), None)
