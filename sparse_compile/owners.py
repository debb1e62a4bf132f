"""Which modules hold a parameter: one graph may see only one use of a shared weight."""

import gc
from functools import cached_property

from torch._dynamo import OptimizedModule
from torch.nn import Module, Parameter


class ParameterOwners:
    """Looks every live module up once, at the first question: a walk over the heap, about 0.1 s for a large model."""

    def __call__(self, parameter: Parameter) -> list[str]:
        """``["Embedding.weight", "Linear.weight"]``: the class and attribute of each module that holds it."""
        return self._names.get(id(parameter), [])

    @cached_property
    def _names(self) -> dict[int, list[str]]:
        names: dict[int, list[str]] = {}
        for candidate in gc.get_objects():
            # type(), because isinstance() would wake lazy proxies that pretend to be modules.
            if not issubclass(type(candidate), Module) or issubclass(type(candidate), OptimizedModule):
                continue
            for attribute, parameter in candidate.__dict__.get("_parameters", {}).items():
                if parameter is not None:
                    names.setdefault(id(parameter), []).append(f"{type(candidate).__name__}.{attribute}")
        return names
