"""Linears that train in no graph: past dynamo's recompile limit, at a graph break, under ``torch.compiler.disable``.

Dynamo tells nobody when it runs eagerly what it has compiled before.  So in some training steps the weights that graphs
are called with are noted, and at the optimizer's step compared with those of compiled modules that have a gradient.
"""

import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import Embedding, EmbeddingBag, Module, Parameter
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from sparse_compile.measuring.device_timer import capturing
from sparse_compile.reporting.model import fold_names
from sparse_compile.reporting.process_report import report_so_far
from sparse_compile.reporting.report import Report
from sparse_compile.torch_internals.dynamo import RecompileLimit, on_recompile_limit
from sparse_compile.torch_internals.modules import compiled_modules, is_pytorchs
from sparse_compile.torch_internals.weak_tensors import WeakTensor, weak
from sparse_compile.weights.pattern_24 import may_be_of_experts

# Steps 2, 8, 32, ... of each optimizer are looked at: the first compiles, and a look may walk over the heap.
_FIRST, _FACTOR = 2, 4
_ADVICE = "use dynamic=True or raise it"
_EXPERTS_ADVICE = "a loop over experts does that; transformers: model.set_experts_implementation('grouped_mm')"
_CLASS_ADVICE = "compile a class of your own that holds it"

_Weights = dict[int, WeakTensor]  # by their ids


@dataclass(slots=True)
class _Window:
    """Of an optimizer: its steps so far, which one is looked at next, and the weights noted since the one before."""

    steps: int = 0
    next: int = _FIRST
    noted: _Weights = field(default_factory=dict)

    @property
    def is_open(self) -> bool:
        return self.steps + 1 == self.next


class Fallbacks:
    """Fills ``Report.fallbacks``.

    Attributes:
        backend: ours.
        traced: whether it was given a graph.
        watching: whether each call of a graph is to be noted; the first one of a graph always is.
    """

    def __init__(self, report: Report) -> None:
        self.backend: object = None
        self.traced = False
        self.watching = False
        self._report = report
        self._windows: WeakKeyDictionary[Optimizer, _Window] = WeakKeyDictionary()
        self._noted: _Weights = {}  # ever
        self._captured = False  # by the user: what a CUDA graph replays calls nothing
        self._limits: dict[str, RecompileLimit] = {}  # by function
        self._pruning: set[str] = set()  # functions
        self._eager: list[str] = []
        self._warned: set[str] = set()

    def note(self, arguments: Iterable[Any]) -> None:
        """A graph is called with these."""
        self._captured = self._captured or capturing()
        weights: _Weights = {id(weight): weak(weight) for weight in arguments if isinstance(weight, Parameter)}
        for noted in (self._noted, *(window.noted for window in self._windows.values() if window.is_open)):
            noted |= weights

    def prunes(self, frame: str) -> None:
        """Graphs of this function, which ``compiled_frame`` has named, compute with pruned weights."""
        self._pruning.add(frame)

    def on_limit(self, limit: RecompileLimit) -> None:
        """Dynamo will compile a function no more."""
        self._limits[limit.function] = limit
        self._tell()
        if limit.frame in self._pruning:
            self._warn(f"{_beyond(limit)}.  They compute with dense weights, where calls of its graphs prune them")

    def on_step(self, optimizer: Optimizer, args: Any = None, kwargs: Any = None) -> None:
        del args, kwargs
        if self._captured or capturing():
            return
        window = self._windows.setdefault(optimizer, _Window())
        window.steps += 1
        if window.steps == window.next:
            self._look(optimizer, _alive(window.noted))
            window.next *= _FACTOR
            window.noted.clear()
        self.watching = any(window.is_open for window in self._windows.values())

    def _look(self, optimizer: Optimizer, now: set[int]) -> None:
        trained = (weight for group in optimizer.param_groups for weight in group["params"] if weight.grad is not None)
        self._eager = []
        if not self.traced:
            self._eager = self._without_effect()
        elif any(_is_weight(weight) and type(weight) is Parameter and id(weight) not in now for weight in trained):
            compiled = compiled_modules()
            roots = [(root, linears) for root, _ in compiled if (linears := dict(_linears_of(root)))]
            # Of what another backend compiles in place no weight was ever in a graph of this one.
            noted = _alive(self._noted)
            ours = {type(root) for root, linears in roots if noted & {id(weight) for weight in linears.values()}}
            ours |= {type(root) for root, backend in compiled if backend is self.backend}
            self._eager = list(self._described([pair for pair in roots if type(pair[0]) in ours], now))
        self._tell()

    def _described(self, roots: list[tuple[Module, dict[str, Parameter]]], now: set[int]) -> Iterator[str]:
        """What runs eagerly of the modules that were compiled: whole ones, by their class, then parts of others."""
        alike: defaultdict[type, list[Module]] = defaultdict(list)
        whole: defaultdict[type, list[Module]] = defaultdict(list)
        parts: defaultdict[type, set[str]] = defaultdict(set)
        experts: defaultdict[type, set[str]] = defaultdict(set)
        for root, linears in roots:
            eager = {name for name, weight in linears.items() if id(weight) not in now and _is_trained(weight)}
            alike[type(root)].append(root)
            experts[type(root)] |= {name for name, weight in linears.items() if weight.ndim == 3}
            if eager == linears.keys():
                whole[type(root)].append(root)
            else:
                parts[type(root)] |= eager
        for kind, fallen in whole.items():
            limit = self._limit_of(fallen[0])
            why = f"{limit.name} {limit.value}; {_ADVICE}" if limit else "TORCH_LOGS=graph_breaks shows why"
            count = f"{len(fallen)} of {len(alike[kind])}"
            yield f"{count} compiled modules of class {kind.__name__} fell back to eager: {why}"
        for kind, names in parts.items():
            for pattern in fold_names(names):
                yield (
                    f"{pattern} of {kind.__name__} runs eagerly, outside any graph, because of a graph break or "
                    "torch.compiler.disable; TORCH_LOGS=graph_breaks shows which"
                    f"{'; ' + _EXPERTS_ADVICE if names & experts[kind] else ''}"
                )

    def _without_effect(self) -> list[str]:
        """Modules that were compiled and train, where no graph was ever traced: no report would come."""
        compiled = compiled_modules()
        lines = sorted(
            {line for root, backend in compiled if _has_gradients(root) and (line := self._why_not(root, backend))}
        )
        for line in lines:
            self._warn(line)
        return lines

    def _warn(self, line: str) -> None:
        if line not in self._warned:
            self._warned.add(line)
            warnings.warn(f"sparse_compile: {line}", stacklevel=2)

    def _why_not(self, root: Module, backend: object) -> str | None:
        """Why nothing was traced of a module that was compiled with this backend; None of another one's.

        Args:
            backend: as ``compiled_modules`` has it.
        """
        in_place, name = backend is None, type(root).__name__
        compiled = f"{name}.compile()" if in_place else f"torch.compile({name})"
        no_effect = f"{compiled} had no effect, and the module runs eagerly: PyTorch traces none of its own classes"
        if not in_place and backend is not self.backend:
            return None
        if in_place and all(map(is_pytorchs, root.modules())) and not _is_sharded(root):
            return f"{no_effect} that are compiled in place; use torch.compile(module), or {_CLASS_ADVICE}"
        if all(map(_is_torchs, root.modules())):
            return f"{no_effect} behind the hooks of DDP and FSDP; {_CLASS_ADVICE}, and wrap that"
        if in_place:
            return None  # whose backend is not known
        return (
            f"{compiled} has traced nothing, and the module trains: call what torch.compile returns, not the module; "
            "if you do, TORCH_LOGS=graph_breaks shows why nothing is traced"
        )

    def _limit_of(self, module: Module) -> RecompileLimit | None:
        code = type(module).forward.__code__
        own = [
            limit for limit in self._limits.values() if f"({code.co_filename}:{code.co_firstlineno})" in limit.function
        ]
        # Modules of PyTorch's own classes, and those with hooks, are traced from a frame around their forward.
        around = [limit for limit in self._limits.values() if limit.is_pytorchs]
        return next(iter(own + around), None)

    def _tell(self) -> None:
        lines = list(self._eager)
        for limit in self._limits.values():
            told = any(f"{limit.name} {limit.value}; {_ADVICE}" in line for line in lines)
            if not told:
                lines.append(_beyond(limit))
        self._report.fallbacks[:] = lines


def _beyond(limit: RecompileLimit) -> str:
    return (
        f"{limit.function} has reached {limit.name} {limit.value}: calls that fit none of its graphs run eagerly; "
        f"{_ADVICE}"
    )


def _is_weight(weight: Tensor) -> bool:
    return weight.ndim == 2 or may_be_of_experts(weight)


def _is_trained(weight: Tensor) -> bool:
    """Gradients of what was not called may be there still, as zeros."""
    return weight.grad is not None and bool(weight.grad.any())


def _has_gradients(root: Module) -> bool:
    """Of shards it is not asked whether they are zeros: that would take all processes."""
    return any(
        parameter.grad is not None and (type(parameter) is not Parameter or _is_trained(parameter))
        for parameter in root.parameters()
    )


def _is_torchs(module: Module) -> bool:
    """Of PyTorch's own classes, wrappers for several GPUs included."""
    return type(module).forward.__module__.startswith("torch.")


def _is_sharded(root: Module) -> bool:
    return any(type(parameter) is not Parameter for parameter in root.parameters())


def _alive(weights: _Weights) -> set[int]:
    """Ids of those that live."""
    return {key for key, reference in weights.items() if reference.ref() is not None}


def _linears_of(root: Module) -> Iterator[tuple[str, Parameter]]:
    """Weights by their names; none that FSDP shards, for which graphs see others."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for prefix, module in root.named_modules():
        if fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel):
            return
        if not isinstance(module, (Embedding, EmbeddingBag)):
            for name, weight in module.named_parameters(prefix, recurse=False):
                named = weight.ndim == 3 or name.rpartition(".")[2].endswith("weight")
                if _is_weight(weight) and type(weight) is Parameter and named:
                    yield name.removesuffix(".weight"), weight


@cache
def watch_fallbacks() -> Fallbacks:
    """Watch from now on."""
    fallbacks = Fallbacks(report_so_far())
    on_recompile_limit(fallbacks.on_limit)
    register_optimizer_step_post_hook(torch.compiler.disable(fallbacks.on_step))
    return fallbacks
