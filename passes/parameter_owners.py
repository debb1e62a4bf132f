"""What the live modules hold, beyond what one graph shows: who shares a weight, and the shapes of embeddings."""

from functools import cached_property

from torch.nn import Embedding, EmbeddingBag, Module, Parameter

from sparse_compile.passes.live_modules import LiveModules


class ParameterOwners:
    """Asks the modules that are alive."""

    def __init__(self, live: LiveModules | None = None) -> None:
        self._live = live or LiveModules()

    def holders(self, parameter: Parameter) -> list[str]:
        """``["Embedding.weight", "Linear.weight"]``: the class and attribute of each module that holds it."""
        return [f"{type(module).__name__}.{name}" for module, name in self._live.holders.get(id(parameter), [])]

    def is_embedding(self, parameter: Parameter) -> bool:
        """Whether an embedding holds it: a linear that reads it, in whatever graph, shares it."""
        holders = self._live.holders.get(id(parameter), [])
        return any(isinstance(module, (Embedding, EmbeddingBag)) for module, _ in holders)

    def has_embedding(self, parameter: Parameter | None, vocabulary: int, features: int) -> bool:
        """Whether the model that holds a linear's weight has an embedding of this shape: likely the linear's inverse.

        A layer that no model holds may belong to any.
        """
        model = None if parameter is None else self._live.root_of(parameter)
        others = self._embeddings.get((vocabulary, features), [])
        return any(model is other or _is_layer(model) or _is_layer(other) for other in others)

    @cached_property
    def _embeddings(self) -> dict[tuple[int, ...], list[Module | None]]:
        """By their shape, the outermost module around each."""
        models: dict[tuple[int, ...], list[Module | None]] = {}
        for module in self._live.modules:
            if isinstance(module, Embedding):
                models.setdefault(tuple(module.weight.shape), []).append(self._live.root_of(module.weight))
        return models


def _is_layer(module: Module | None) -> bool:
    """Whether it holds a weight and a bias at most."""
    return module is None or len(list(module.parameters())) <= 2
