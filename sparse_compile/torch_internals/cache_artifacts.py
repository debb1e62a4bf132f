"""Kinds of ours among the cache artifacts that ``torch.compiler.save_cache_artifacts`` saves."""

from collections.abc import Callable

from torch.compiler._cache import CacheArtifact, CacheArtifactFactory, CacheArtifactManager


def register_artifacts(kind: str, write: Callable[[str, bytes], None]) -> Callable[[str, bytes], None]:
    """Register a kind of artifacts; once for each in a process, before any are loaded.

    Args:
        kind: a name that PyTorch has none of.
        write: called when artifacts are loaded, with the key and the content of each.

    Returns:
        What records an artifact, by its key and content.  Of the same key the last one is written last.
    """

    class Artifact(CacheArtifact):
        def populate_cache(self) -> None:
            write(self.key, self.content)

        @staticmethod
        def type() -> str:
            return kind

    CacheArtifactFactory.register(Artifact)

    def record(key: str, content: bytes) -> None:
        CacheArtifactManager.record_artifact(kind, key, content)

    return record
