"""What is kept of each weight: its phase, its scale beta, its schedule, and the operands that the GEMMs read."""

from sparse_compile.weights.api import attach, beta, invalidate, original, plain_name, set_beta

__all__ = ["attach", "beta", "invalidate", "original", "plain_name", "set_beta"]
