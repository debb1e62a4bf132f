"""A pattern of ``sste.targets`` that names no linear of a model: an error at the end of its first step.

One graph of several may have no linear of such a name.  So what counts is all graphs that have run with weights of the
optimizer that steps.
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from weakref import WeakSet

from torch import Tensor
from torch.optim import Optimizer

from sparse_compile.weights.optimizer_watch import Stage, watch
from sparse_compile.weights.record import WeightRecord
from sparse_compile.weights.registry import find_record, record_of


class TargetPattern:
    """What a graph has found of a pattern.

    Args:
        names: of the graph's linears.
        paths: other names that a pattern may match.
    """

    def __init__(self, pattern: str, names: Iterable[str], paths: Iterable[str] = ()) -> None:
        self.pattern, self.names = pattern, sorted(set(names))
        self.matched = any(fnmatchcase(name, pattern) for name in (*self.names, *paths))
        self.records: WeakSet[WeightRecord] = WeakSet()

    def ran(self, weights: Iterable[Tensor]) -> None:
        """The graph has run in training, once for each set of weights."""
        self.records.update(map(record_of, weights))
        _waiting.add(self)


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
