"""What the live modules hold, beyond what one graph shows: who shares a weight, and the shapes of embeddings."""

from functools import cached_property

from torch.nn import Embedding, EmbeddingBag, Parameter

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

    def has_embedding(self, vocabulary: int, features: int) -> bool:
        """Whether an embedding of this shape is alive: then a linear of this shape is likely to be its inverse."""
        return (vocabulary, features) in self._embeddings

    @cached_property
    def _embeddings(self) -> set[tuple[int, ...]]:
        held = (module for holders in self._live.holders.values() for module, _ in holders)
        return {tuple(module.weight.shape) for module in held if isinstance(module, Embedding)}
