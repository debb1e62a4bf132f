"""Makes Hugging Face's Accelerate, and so the Trainer, accept the backend "sste": it refuses names it does not know."""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_MODULE = "accelerate.utils.dataclasses"


def accept_in_accelerate() -> None:
    """Make ``DynamoBackend("sste")`` mean Inductor, which is routed to this backend; now, or at its import."""
    if _MODULE in sys.modules:
        _accept(sys.modules[_MODULE])
    else:
        sys.meta_path.insert(0, _Finder())


def _accept(module: ModuleType) -> None:
    def missing(names: Any, value: object) -> Any:
        return names.INDUCTOR if str(value).upper() == "SSTE" else None

    # An enumeration calls this for values that it lacks.
    module.DynamoBackend._missing_ = classmethod(missing)


class _Finder(MetaPathFinder):
    """Finds one module like the other finders do, and edits it after its import; then removes itself."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _accept(module)
