"""A torch.compile backend that trains transformers with 2:4-sparse FP8 GEMMs on NVIDIA Hopper GPUs.

``torch.compile(model, backend="sste")`` needs no import of this package where it is installed.
"""

from sparse_compile.report import Report, report
from sparse_compile.torch_internals import register_entry_point
from sparse_compile.weights import beta, health, invalidate, on_health

__all__ = ["Report", "beta", "health", "invalidate", "on_health", "report"]

register_entry_point("sste", "sparse_compile.backend:sste")
