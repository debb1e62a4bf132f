"""What a graph must know of a weight to be compiled."""

from enum import Enum


class Standing(Enum):
    """How a weight is found at a call."""

    FRESH = "fresh"  # never trained pruned: pruned if it is trained, dense if it is frozen
    DENSE = "dense"  # in a dense phase of its schedule
    TRAINED_DENSE = (
        "trained dense"  # by another graph, with the same options: an evaluation computes with it dense, too
    )
    PRUNED = "pruned"  # trained pruned: so it goes on, frozen or not, at any price, whatever part it plays in a graph
    RESUMED = "resumed"  # the same, but other options train it now: it goes on where it is a target of theirs
    SPARSE = "sparse"  # frozen and 2:4 itself
