"""Tilings of the sparse GEMM, and the choice among them."""

from dataclasses import dataclass

BLOCK_R = 128  # rows of a tile: each of two warpgroups multiplies 64
BLOCK_C = 128  # logical columns of a stage: one block of metadata, two instructions
_SHARED_LIMIT = 227 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """A tile of 128 rows of A by ``block_d`` rows of B, ``stages`` of which are in flight.

    ``tile_cost`` is the time that a tile takes, relative to the other configs: what the choice between them rests on.
    """

    block_d: int
    stages: int
    tile_cost: float

    def __post_init__(self) -> None:
        if self.block_d not in (128, 256):
            raise ValueError(f"block_d is {self.block_d}; allowed are 128 and 256")
        if self.stages < 2 or self.tile_cost <= 0:
            raise ValueError(f"{self} needs at least two stages and a positive cost")
        stage = (BLOCK_R // 2 + self.block_d) * BLOCK_C
        # 1 KiB for the barriers and for what the warps hand each other.
        needed = self.stages * stage + 2 * BLOCK_R * self.block_d + 1024
        if needed > _SHARED_LIMIT:
            raise ValueError(f"{self} needs {needed} bytes of shared memory; a block has {_SHARED_LIMIT}")

    def tiles(self, rows: int, columns: int) -> int:
        """How many tiles an output ``[rows, columns]`` has."""
        return _ceil_div(rows, BLOCK_R) * _ceil_div(columns, self.block_d)


CONFIGS = (
    Config(block_d=256, stages=4, tile_cost=1.0),
    Config(block_d=128, stages=6, tile_cost=0.6),
)


def choose(rows: int, columns: int, sm_count: int) -> Config:
    """The config whose rounds of one tile per multiprocessor take the least time, the first of equals."""
    return min(CONFIGS, key=lambda config: _ceil_div(config.tiles(rows, columns), sm_count) * config.tile_cost)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
