"""Configurations of the sparse GEMM, and the choice among them."""

from collections.abc import Iterator
from dataclasses import dataclass

BLOCK_R = 128  # rows of a tile
STAGE_BYTES = 128  # of a row of B: what a stage contracts
_GROUP = 16  # tiles of rows that share their tiles of B in L2
# block_d -> stages that shared memory holds, and [64, 64] pieces of out that a warpgroup may have on their way.
_BUFFERS = {256: (4, 3), 192: (5, 3), 128: (7, 2)}
# (block_d, cluster) -> microseconds of a launch, of a stage and of a tile's end, when all multiprocessors work: least
# squares over 109 products on an H200, and 1 % off the stage of the widest clusters, which need less power.
_COSTS = {
    (256, 1): (0.3, 0.487, 2.35),
    (256, 2): (1.1, 0.483, 2.22),
    (192, 1): (1.0, 0.383, 1.67),
    (192, 2): (1.7, 0.379, 1.60),
    (128, 1): (1.9, 0.298, 0.81),
    (128, 2): (2.7, 0.295, 0.87),
}
# Waves that a product is cut into where collectives hold some multiprocessors: a block that waits for one holds up its
# wave's share of the product, not all of it.  More waves hold it up less, and cost up to 7 % where nothing is held.
_WAVES = 2
_LEAST_ROUNDS = 2  # of tiles, in a wave
# Stages after which the sums of an accurate product move to its carry.
CARRY_STAGES = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """How a product is cut up.

    Args:
        block_d: a tile is 128 rows of A by ``block_d`` rows of B.
        cluster: blocks that multiply the same rows of B, each with rows of A of its own; 1 or 2.
    """

    block_d: int
    cluster: int

    def __post_init__(self) -> None:
        if (self.block_d, self.cluster) not in _COSTS:
            raise ValueError(f"{self}; allowed is (block_d, cluster) in {sorted(_COSTS)}")

    @property
    def stages(self) -> int:
        """Stages of the ring."""
        return _BUFFERS[self.block_d][0]

    @property
    def out_buffers(self) -> int:
        return _BUFFERS[self.block_d][1]

    @property
    def group(self) -> int:
        """Rows of clusters that share their tiles of B in L2."""
        return _GROUP // self.cluster

    def tiles(self, rows: int, columns: int) -> int:
        """What the clusters take in turns: a tile for each of its blocks."""
        return _ceil_div(rows, BLOCK_R * self.cluster) * _ceil_div(columns, self.block_d)

    def microseconds(self, rows: int, columns: int, num_k: int, sm_count: int) -> float:
        """Estimated time of a product ``[rows, columns]`` of ``num_k`` stages."""
        launch, stage, end = _COSTS[self.block_d, self.cluster]
        rounds = _ceil_div(self.tiles(rows, columns), sm_count // self.cluster)
        return launch + rounds * (num_k * stage + end)


def waves_of(tiles: int, clusters: int) -> int:
    """How many waves so many tiles are cut into where the GPU is shared with collectives."""
    return max(1, min(_WAVES, _ceil_div(tiles, clusters) // _LEAST_ROUNDS))


def contraction_stages(contraction: int, element_size: int) -> int:
    """How many stages a contraction of so many elements, each of so many bytes, has."""
    return _ceil_div(contraction * element_size, STAGE_BYTES)


def configs() -> Iterator[Config]:
    """Every config that may be chosen."""
    for block_d, cluster in _COSTS:
        yield Config(block_d=block_d, cluster=cluster)


def choose(rows: int, columns: int, num_k: int, sm_count: int) -> Config:
    """The config with the least estimated time, the first of equals."""
    return min(configs(), key=lambda config: config.microseconds(rows, columns, num_k, sm_count))


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
