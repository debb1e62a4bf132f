"""A torch.compile backend that trains transformers with 2:4-sparse FP8 GEMMs on NVIDIA Hopper GPUs.

``torch.compile(model, backend="sste")`` needs no import of this package where it is installed.
"""

from sparse_compile.report import Report, report
from sparse_compile.torch_internals import register_entry_point
from sparse_compile.weights import beta, invalidate, set_beta

__all__ = ["Report", "beta", "invalidate", "report", "set_beta"]

register_entry_point("sste", "sparse_compile.backend:sste")
