"""What a graph must know of a weight to be compiled."""

from enum import Enum


class Standing(Enum):
    """How a weight is found at a call."""

    FRESH = "fresh"  # never trained pruned: pruned if it is trained, dense if it is frozen
    DENSE = "dense"  # in a dense phase of its schedule
    PRUNED = "pruned"  # trained pruned: so it goes on, frozen or not, at any price
    SPARSE = "sparse"  # frozen and 2:4 itself
