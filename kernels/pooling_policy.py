"""Launch configurations of the pooling kernels as data. Imports neither torch nor triton.

Rows come from cross-compilation (registers, spills, vector loads; tests/compile): none has been measured on a GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PoolingConfig:
    """How the pooling and merging kernels work.

    Attributes:
        block_tokens: tokens a chunk.
        group_spans: spans inside a chunk that are looked at together.
        num_warps: warps a program of the first launch.
        merge_chunks: chunks a program of the merge (one less where a further merge follows).
        merge_warps: its warps.
    """

    block_tokens: int
    group_spans: int
    num_warps: int
    merge_chunks: int
    merge_warps: int


@dataclass(frozen=True)
class FoldConfig:
    """How the fold through W_down works.

    Attributes:
        block_width: latent channels a program.
        block_batch: batch items that share one read of the weights.
        block_channels: channels of the summary a step.
        num_warps, num_stages: warps a program, depth of the software pipeline.
    """

    block_width: int
    block_batch: int
    block_channels: int
    num_warps: int
    num_stages: int


def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def pooling_config(head_dim: int, itemsize: int, target: str) -> PoolingConfig:
    """The row for a head width, element size in bytes and chip (``sm_90``, ``gfx942``)."""
    return PoolingConfig(block_tokens=64, group_spans=16, num_warps=4, merge_chunks=32, merge_warps=8)


def fold_config(channels: int, batch: int) -> FoldConfig:
    """The row for ``channels`` = Cs and the batch size."""
    block_batch = min(_next_power_of_2(batch), 8)
    block_channels = min(_next_power_of_2(channels), max(1024 // block_batch, 128))
    return FoldConfig(block_width=4, block_batch=block_batch, block_channels=block_channels, num_warps=4, num_stages=3)
