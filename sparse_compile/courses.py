"""When weights are pruned: a dense warm-up, then pruned, then a dense tail, counted in steps of the weight's optimizer.

A graph is compiled pruned or dense, and dynamo guards it by an attribute of parameters that says whether one is pruned
now.  So after a step that ends a phase the next call compiles for the next one, once; a tail uses a warm-up's graph.
The tail goes on from what linears computed with while the weight was pruned: that is written into it at the switch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from sparse_compile.recipe import Projection


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Linears are pruned in the optimizer steps from ``begin`` on, before ``end``; counted from 0."""

    begin: int
    end: int | None  # None: to the end of training

    def prunes_at(self, step: int) -> bool:
        return self.begin <= step and (self.end is None or step < self.end)

    def __str__(self) -> str:
        """The dense phases, for the report."""
        phases = [f"before optimizer step {self.begin}"] if self.begin else []
        phases += [f"from optimizer step {self.end} on"] if self.end is not None else []
        return "dense " + " and ".join(phases)


class Course:
    """Where a weight stands in its schedule.

    Args:
        steps: of its optimizer, so far.
        pruned: whether it was trained pruned, and is not dense since.
    """

    __slots__ = ("projection", "pruned", "schedule", "steps", "transposed")

    def __init__(self, schedule: Schedule, steps: int, pruned: bool) -> None:
        self.schedule, self.steps, self.pruned = schedule, steps, pruned
        # How it is pruned, once it is; whether it is stored [in_features, out_features].
        self.projection, self.transposed = Projection.NONE, False

    @property
    def prunes(self) -> bool:
        """Whether linears compute with it pruned now."""
        return self.schedule.prunes_at(self.steps)


def count_steps(course_of: Callable[[Tensor], Course | None], on_switch: Callable[[Tensor, Course], None]) -> None:
    """Count the steps of weights that have a schedule, from now on.

    Args:
        course_of: the course of a weight that an optimizer holds; None where it has none.
        on_switch: called when a step has ended a phase of a weight.
    """

    def after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        del args, kwargs
        for weight in (weight for group in optimizer.param_groups for weight in group["params"]):
            course = course_of(weight)
            if course is not None:
                before = course.prunes
                course.steps += 1
                if course.prunes != before:
                    on_switch(weight, course)

    register_optimizer_step_post_hook(torch.compiler.disable(after_step))
