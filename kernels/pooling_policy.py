"""Launch configurations of the pooling kernels and the fold as data. Imports neither torch nor triton.

Rows come from cross-compilation (registers, spills, vector loads; tests/compile): none has been measured on a GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass

from .policy import PROCESSORS, known_target, next_power_of_2
from .tuned import in_place_of


@dataclass(frozen=True)
class PoolingConfig:
    """How the chunk and merge kernels work.

    Attributes:
        block_tokens: tokens a chunk.
        group_spans: spans inside a chunk that are looked at together.
        num_warps: warps a program of the chunk kernel.
        merge_chunks: chunks a program of the merge; one less where a further merge follows.
        merge_warps: warps a program of the merge.
        max_registers: a thread of the chunk kernel may take; 255 is no limit. Not on AMD.
        max_turns: chunks that a program takes one after the other, at the most.
    """

    block_tokens: int
    group_spans: int
    num_warps: int
    merge_chunks: int
    merge_warps: int
    max_registers: int = 255
    max_turns: int = 8


@dataclass(frozen=True)
class FoldConfig:
    """How the fold through W_down works.

    Attributes:
        block_width: latent channels a program.
        block_batch: batch items that share one read of the weights.
        block_channels: channels of the summary a step.
        num_warps: warps a program.
        num_stages: depth of the software pipeline.
    """

    block_width: int
    block_batch: int
    block_channels: int
    num_warps: int
    num_stages: int


#: Keys and values of a chunk, bytes. They pass through registers, which is what limits the bytes in flight: 32 KB by
#: four warps is 140 to 215 registers a thread on sm_90, and without a spill the 128 that let four programs share a
#: multiprocessor, 128 KB (latency times bandwidth of an H200 is about 25 KB a multiprocessor, most of it idle while
#: programs reduce). 64 KB leave two programs; 16 KB pay the work on spans, which does not depend on the head's width,
#: twice; eight warps need more instructions for the same bytes. float32, multiplied on the plain cores, would spill.
CHUNK_BYTES = 32 * 1024
#: Below 16 tokens no tensor instruction fits; above 128 the [spans, tokens] tiles take the registers.
CHUNK_TOKENS = (16, 128)
#: Programs a multiprocessor that are left where a program takes several chunks. What it does once (tables, divisions,
#: queries, the search for its first span) takes half as many instructions as a chunk does; but six rounds of the four
#: programs that share a multiprocessor should stay, or the last one weighs.
PROGRAMS = 24
#: Sums that a fold program keeps: 32 a thread, by at most four warps.
FOLD_SUMS = 4096


def pooling_config(head_dim: int, itemsize: int, target: str) -> PoolingConfig:
    """The row for a head width, element size in bytes and chip (``sm_90``, ``gfx942``); one for all chips so far.

    32 chunks a merge: 2,000 tokens of width 128 in 16 bits take a single one.
    """
    return in_place_of(pooling_backward_config(head_dim, itemsize), "pooling", target, head_dim, itemsize)


def pooling_backward_config(head_dim: int, itemsize: int) -> PoolingConfig:
    """The row of the backward kernels, which take a chunk and its warps from it: never one that the forward pass alone
    was tuned to. Arguments as of `pooling_config`."""
    tokens = CHUNK_BYTES // (2 * next_power_of_2(head_dim) * itemsize)
    fewest, most = CHUNK_TOKENS
    return PoolingConfig(
        block_tokens=min(max(tokens, fewest), most),
        group_spans=16,
        num_warps=4,
        merge_chunks=32,
        merge_warps=8,
        max_registers=128 if itemsize < 4 else 255,
    )


def turns(config: PoolingConfig, chunks: int, target: str) -> int:
    """How many of all ``chunks`` (of layers, items, heads and tracks) a program of the chunk kernel takes."""
    return max(1, min(config.max_turns, chunks // (PROGRAMS * PROCESSORS[known_target(target)])))


def fold_config(channels: int, batch: int) -> FoldConfig:
    """The row for ``channels`` = Cs.

    Four rows of weights a program: 28 layers of d = 128 make 896 programs, all resident on an H200 at once, so that the
    weights come in at one latency.
    """
    block_width = 4
    block_batch = min(next_power_of_2(batch), 8)
    block_channels = min(next_power_of_2(channels), FOLD_SUMS // (block_width * block_batch))
    num_warps = max(1, 4 * block_width * block_batch * block_channels // FOLD_SUMS)
    return FoldConfig(block_width, block_batch, block_channels, num_warps, num_stages=3)
