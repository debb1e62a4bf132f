"""A torch.compile backend that trains transformers with 2:4-sparse FP8 GEMMs on NVIDIA Hopper GPUs.

``torch.compile(model, backend="sste")`` needs no import of this package where it is installed.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from typing import TYPE_CHECKING, Any

from sparse_compile.record import report
from sparse_compile.report import Report

if TYPE_CHECKING:
    from sparse_compile.weights import beta, health, invalidate, on_health, set_beta

__all__ = ["Report", "beta", "health", "invalidate", "on_health", "report", "set_beta"]


def __getattr__(name: str) -> Any:
    """Import at first use: PyTorch loads ``sparse_compile.autoload`` while it is being imported itself."""
    if name in ("beta", "health", "invalidate", "on_health", "set_beta"):
        return getattr(import_module("sparse_compile.weights"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _announce() -> None:
    """What an installation's entry point says, where nothing is installed: a checkout on PYTHONPATH."""
    try:
        distribution("sparse_compile")
    except PackageNotFoundError:
        from sparse_compile.torch_internals import register_entry_point

        register_entry_point("sste", "sparse_compile.backend:sste")


_announce()
