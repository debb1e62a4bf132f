"""A torch.compile backend that trains transformers with 2:4-sparse FP8 GEMMs on NVIDIA Hopper GPUs.

``torch.compile(model, backend="sste")`` needs no import of this package where it is installed.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from typing import TYPE_CHECKING, Any

from sparse_compile.reporting.process_report import report
from sparse_compile.reporting.report import Report

if TYPE_CHECKING:
    from sparse_compile.export.finalize import finalize
    from sparse_compile.export.to_sparse import to_sparse
    from sparse_compile.measuring.weight_health import health, on_health
    from sparse_compile.recipe import Recipe
    from sparse_compile.weights import attach, beta, invalidate, set_beta

__all__ = [
    "Recipe", "Report", "attach", "beta", "finalize", "health", "invalidate", "on_health", "report", "set_beta",
    "to_sparse",
]  # fmt: skip

_WEIGHTS = "sparse_compile.weights"
_HEALTH = "sparse_compile.measuring.weight_health"
_MODULES = {
    "Recipe": "sparse_compile.recipe",
    "attach": _WEIGHTS,
    "beta": _WEIGHTS,
    "finalize": "sparse_compile.export.finalize",
    "health": _HEALTH,
    "invalidate": _WEIGHTS,
    "on_health": _HEALTH,
    "set_beta": _WEIGHTS,
    "to_sparse": "sparse_compile.export.to_sparse",
}


def __getattr__(name: str) -> Any:
    """Import at first use: PyTorch loads ``sparse_compile.launcher.autoload`` while it is being imported itself."""
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _announce() -> None:
    """What an installation's entry point says, where nothing is installed: a checkout on PYTHONPATH."""
    try:
        distribution("sparse_compile")
    except PackageNotFoundError:
        from sparse_compile.launcher.autoload import register_cache_artifacts
        from sparse_compile.torch_internals.dynamo import register_entry_point

        register_entry_point("sste", "sparse_compile.backend:sste")
        register_cache_artifacts()


_announce()
