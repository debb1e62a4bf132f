"""The randomness of gradient estimators."""

import torch
from torch import Tensor


def new_seed(device: torch.device) -> Tensor:
    """A random 62-bit integer, ``[1]``, of the default generator, as dropout's."""
    return torch.randint(2**62, (1,), device=device)
