"""The modules that are alive, beyond what one graph shows."""

from functools import cached_property

from torch import Tensor
from torch.nn import Module

from sparse_compile.torch_internals.heap import instances_of
from sparse_compile.torch_internals.modules import bare_modules_of, is_trace


class LiveModules:
    """Found once, at the first question: a walk over the heap, about 0.1 s for a large model.

    Traces stand for other modules and hold their parameters.  Neither they nor the bare modules inside of them count,
    but as parents of modules that nothing else holds.

    It keeps all of them alive: drop it when the compilation ends.
    """

    @property
    def modules(self) -> list[Module]:
        return self._modules_and_traces[0]

    @cached_property
    def holders(self) -> dict[int, list[tuple[Module, str]]]:
        """By a parameter's identity, the modules that hold it, each with its name there."""
        holders: dict[int, list[tuple[Module, str]]] = {}
        for module in self.modules:
            for name, parameter in vars(module)["_parameters"].items():
                if parameter is not None:
                    holders.setdefault(id(parameter), []).append((module, name))
        return holders

    @cached_property
    def parents(self) -> dict[int, Module]:
        """By a module's identity, the first that holds it."""
        parents: dict[int, Module] = {}
        modules, traces = self._modules_and_traces
        for module in (*modules, *traces):
            for child in vars(module)["_modules"].values():
                parents.setdefault(id(child), module)
        return parents

    def root_of(self, parameter: Tensor) -> Module | None:
        """The outermost module around the one that holds a parameter; None where none does."""
        holders = self.holders.get(id(parameter))
        if holders is None:
            return None
        root, seen = holders[0][0], set()
        while (parent := self.parents.get(id(root))) is not None and id(root) not in seen:
            seen.add(id(root))
            root = parent
        return root

    @cached_property
    def _modules_and_traces(self) -> tuple[list[Module], list[Module]]:
        # A module whose class does not call Module.__init__ holds none.
        found = [module for module in instances_of(Module) if "_modules" in vars(module)]
        traces = {id(inner): inner for trace in found if is_trace(trace) for inner in (trace, *bare_modules_of(trace))}
        return [module for module in found if id(module) not in traces], list(traces.values())
