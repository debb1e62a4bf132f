"""A pattern of ``sste.targets`` that names no linear of a model: an error at the end of its first step.

One graph of several may have no linear of such a name.  So what counts is all graphs that have run with weights of the
optimizer that steps.
"""

from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, NamedTuple
from weakref import WeakSet

from torch import Tensor
from torch.optim import Optimizer

from sparse_compile.torch_internals.weak_tensors import WeakTensor
from sparse_compile.weights.optimizer_watch import Stage, watch
from sparse_compile.weights.record import WeightRecord
from sparse_compile.weights.registry import find_record, record_of


class NamedLinear(NamedTuple):
    """A linear of a graph.

    Attributes:
        position: of its weight among the graph's inputs.
        name: the model's own, of the block that was traced: others may share the graph.
        path: as the traced function reaches the weight, which is the same for all blocks.
        weight: of the block that was traced; None where dynamo did not tell.
    """

    position: int
    name: str
    path: str
    weight: WeakTensor | None


class TargetPattern:
    """What a graph has found of a pattern.

    Args:
        names: of the graph's linears, also of those that are not rewritten.
        linears: those that a pattern may name.
        name_of: the model's own name of a weight; None if it has none.
    """

    def __init__(
        self,
        pattern: str,
        names: Iterable[str],
        linears: Sequence[NamedLinear] = (),
        name_of: Callable[[Tensor], str | None] = lambda _: None,
    ) -> None:
        self.pattern, self.names = pattern, sorted(set(names))
        self.matched = any(self._matches(name) for name in (*self.names, *(linear.path for linear in linears)))
        self.records: WeakSet[WeightRecord] = WeakSet()
        self._linears, self._name_of = linears, name_of
        self._has_run = False

    def ran(self, args: Sequence[Any]) -> None:
        """The graph runs in training: the error comes with the first step."""
        if not self._has_run:
            self._has_run = True
            self.records.update(record_of(args[linear.position]) for linear in self._linears)
            _waiting.add(self)

    def check(self, args: Sequence[Any]) -> None:
        """Blocks that are compiled one by one share a graph, which is decided on by the names of the first.

        Raises:
            ValueError: the pattern names some of them and not others.
        """
        for position, traced, path, weight in self._linears:
            if self._matches(path) or weight is None or weight.ref() is args[position]:
                continue
            name = self._name_of(args[position])
            if name is not None and self._matches(name) != self._matches(traced):
                raise ValueError(
                    f"options={{'sste.targets': {self.pattern!r}}} names one of {traced!r} and {name!r}, but not the "
                    "other, and blocks that are compiled one by one share what is compiled. Compile the model as a "
                    f"whole, or name what all blocks have in common, such as {path!r}"
                )

    def _matches(self, name: str) -> bool:
        return fnmatchcase(name, self.pattern)


_waiting: set[TargetPattern] = set()


def _after_step(optimizer: Optimizer, weights: Sequence[Tensor]) -> None:
    del optimizer
    if not _waiting:
        return
    stepped = {id(record) for weight in weights if (record := find_record(weight)) is not None}
    ran = [found for found in _waiting if any(id(record) in stepped for record in found.records)]
    _waiting.difference_update(ran)
    for pattern in sorted({found.pattern for found in ran}):
        graphs = [found for found in ran if found.pattern == pattern]
        if not any(found.matched for found in graphs):
            names = sorted({name for found in graphs for name in found.names})
            nearest = get_close_matches(pattern, names, n=1, cutoff=0.0)
            raise ValueError(
                f"options={{'sste.targets': {pattern!r}}} matches no linear of this model, so nothing was pruned. Its "
                f"linears are {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}; the nearest is "
                f"{nearest[0] if nearest else 'none'}. Choose another pattern, or 'ffn', 'ffn-up' or 'all'"
            )


watch.subscribe(Stage.TARGETS, after=_after_step)
