"""Launch configurations as data. Imports neither torch nor triton, so that a choice can be tested anywhere.

The rows come from cross-compilation (registers, spills, shared memory; tests/compile holds them to it). None has been
measured on a GPU yet: they are where tuning starts (`python -m bench.tune`, whose rows `tuned` puts in their place).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from .tuned import in_place_of

DEFAULT_TARGET = "sm_90"
#: Consumer and inference parts (sm_86, sm_89, sm_120): sm_80's instructions, 99 KB of shared memory instead of 163.
SMALL = "sm_89"
#: What CPU tensors are served by, under TRITON_INTERPRET=1: few, large programs.
INTERPRETER = "interpreter"

#: Multiprocessors (AMD: compute units) a chip has, to be filled before tiles grow.
PROCESSORS = {"sm_80": 108, SMALL: 128, "sm_90": 132, "sm_100": 148, "gfx942": 304, INTERPRETER: 1}


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


#: Half precision: bottleneck width -> tiles from the largest to the smallest. The largest has the most products a
#: weight read; the smallest fills the chip when there are few tokens. Reasons stand beside what is not obvious.
_HALF: dict[str, dict[int, tuple[TileConfig, ...]]] = {
    "sm_90": {
        64: (TileConfig(128, 64, 64, 8, 3), TileConfig(16, 64, 64, 4, 3)),
        # 128 tokens on 8 warps: two warpgroups, each with its own 64 rows of HGMMA. 256 halve what is pulled of weights
        # (310 MB through L2 at 2,048 tokens instead of 620) and fit with 32 hidden units of 128 tokens at a time.
        128: (
            TileConfig(256, 64, 32, 8, 3),
            TileConfig(128, 64, 64, 8, 3),
            TileConfig(64, 64, 64, 4, 3),
            TileConfig(16, 64, 64, 4, 3),
        ),
        # 32 hidden units at a time leave room for 128 rows.
        256: (TileConfig(128, 64, 32, 8, 2), TileConfig(64, 64, 64, 8, 2), TileConfig(16, 64, 32, 4, 3)),
        # The latent alone is 512 floats a row. 64 rows are the fewest for HGMMA; they spill, but in no loop.
        512: (TileConfig(64, 64, 32, 8, 2), TileConfig(32, 64, 32, 8, 2), TileConfig(16, 32, 32, 8, 2)),
    },
    "sm_80": {
        64: (TileConfig(64, 64, 64, 4, 3), TileConfig(16, 64, 64, 4, 3)),
        # HMMA has no warpgroups: 8 warps on 64 rows halve what a thread holds. 64 hidden units spill in the loops.
        128: (TileConfig(64, 64, 32, 8, 2), TileConfig(16, 64, 64, 4, 3)),
        256: (TileConfig(64, 64, 32, 8, 2), TileConfig(16, 64, 32, 4, 2)),
        512: (TileConfig(32, 64, 32, 8, 2), TileConfig(16, 32, 32, 8, 2)),
    },
    # 64 KB of shared memory, and one stage keeps nothing in it between steps.
    "gfx942": {
        64: (TileConfig(64, 64, 64, 4, 2), TileConfig(16, 64, 64, 4, 2)),
        128: (TileConfig(64, 64, 32, 4, 2), TileConfig(16, 64, 32, 4, 2)),
        256: (TileConfig(32, 32, 32, 4, 2), TileConfig(16, 32, 32, 4, 2)),
        # 8 warps leave a wave 256 registers: 295 spills. 4 warps leave it 512: none.
        512: (TileConfig(16, 32, 32, 4, 1),),
    },
    INTERPRETER: {width: (TileConfig(64, 128, 128, 4, 1),) for width in (64, 128, 256, 512)},
}
# Two stages of d = 512 take 104 KB.
_HALF[SMALL] = {**_HALF["sm_80"], 512: tuple(replace(row, num_stages=1) for row in _HALF["sm_80"][512])}
# At d = 512 the 64-row tile compiles to an empty kernel for sm_100 (Triton 3.7.1), so the next smaller one leads.
_HALF["sm_100"] = {**_HALF["sm_90"], 512: _HALF["sm_90"][512][1:]}
# Nor are 256 tokens for it, whose ptxas aims at 128 registers a thread.
_HALF["sm_100"][128] = _HALF["sm_90"][128][1:]
# At d = 256 this one spills least there, 14 times in place and twice out of place; others 29 times and more in all.
_HALF["sm_100"][256] = (TileConfig(128, 32, 64, 8, 2), *_HALF["sm_90"][256][1:])

#: float32 multiplies on the plain cores: small tiles, or the unrolled products fill the register file.
_SINGLE: dict[int, tuple[TileConfig, ...]] = {
    64: (TileConfig(16, 32, 32, 4, 2),),
    128: (TileConfig(16, 32, 32, 4, 2),),
    256: (TileConfig(16, 32, 32, 8, 2),),
    512: (TileConfig(16, 32, 32, 8, 2),),
}

#: Backward pass, half precision: width -> the one tile of all its kernels. A program holds a tile's latents and their
#: gradients at once, or some of a weight's gradient in both halves, so tiles are smaller than in the forward pass.
_BACKWARD: dict[int, TileConfig] = {
    64: TileConfig(32, 64, 32, 4, 2),
    128: TileConfig(32, 32, 32, 4, 2),
    256: TileConfig(16, 32, 16, 8, 2),
    512: TileConfig(16, 32, 16, 8, 1),
}
#: Where a chip does better than that. sm_90: each of two warpgroups has 64 rows of HGMMA, so that 128 rows take hardly
#: more instructions than 64 do, and half of what is pulled of weights. Dropout's random numbers then spill by the
#: hundred, once a program, whose loops have twenty thousand instructions and none. Of d = 256, 64 rows fit so, with a
#: few spills in loops, and take a third of what 16 rows do a row. Elsewhere more rows spill in loops.
_BACKWARD_OF: dict[tuple[str, int], TileConfig] = {
    ("sm_90", 64): TileConfig(128, 64, 32, 8, 2),
    ("sm_90", 128): TileConfig(128, 64, 32, 8, 2),
    ("sm_90", 256): TileConfig(64, 32, 16, 8, 2),
    ("sm_80", 128): TileConfig(32, 64, 32, 8, 2),
    ("gfx942", 256): TileConfig(16, 32, 16, 8, 1),  # float32 weights, two stages of which pass its 64 KB
}
_BACKWARD_OF[SMALL, 128] = _BACKWARD_OF["sm_80", 128]
#: The same for gradients of weights, whose programs walk over all rows and share those they read: of the FFN's, as many
#: hidden units as fit, and of W_down and W_up whole heads. None: the row of the other backward kernels.
_FFN_WEIGHTS_OF: dict[tuple[str, int], TileConfig] = {
    ("sm_90", 128): TileConfig(128, 64, 64, 8, 2),
    ("sm_90", 256): TileConfig(64, 64, 32, 8, 2),
}
_COLUMNS_OF: dict[tuple[str, int], TileConfig] = {
    ("sm_90", 64): TileConfig(64, 128, 32, 8, 2),
    ("sm_90", 128): TileConfig(64, 128, 32, 8, 2),
    ("sm_90", 256): TileConfig(64, 128, 32, 8, 2),
}
_BACKWARD_SINGLE: dict[int, TileConfig] = {
    64: TileConfig(16, 32, 16, 8, 2),
    128: TileConfig(16, 32, 16, 8, 2),
    256: TileConfig(16, 32, 16, 8, 1),
    512: TileConfig(16, 32, 16, 8, 1),
}


def next_power_of_2(n: int) -> int:
    """Triton's own takes ten times as long on the host."""
    return 1 << max(n - 1, 0).bit_length()


def known_target(target: str) -> str:
    """The chip whose rows serve ``target``: its own, else those of its family (``sm_87`` takes ``sm_80``'s)."""
    if target in _HALF:
        return target
    if target.startswith("gfx"):
        return "gfx942"
    if target.startswith("sm_"):
        capability = int(target.removeprefix("sm_"))
        if capability in (86, 89) or capability >= 120:
            return SMALL
        known = [name for name in ("sm_100", "sm_90", "sm_80") if capability >= int(name.removeprefix("sm_"))]
        return known[0] if known else SMALL
    return DEFAULT_TARGET


def tile_options(width: int, itemsize: int, target: str) -> tuple[TileConfig, ...]:
    """All tiles for a bottleneck width, element size in bytes and chip, from the largest to the smallest."""
    target = known_target(target)
    rows = _SINGLE if itemsize == 4 and target != INTERPRETER else _HALF[target]
    return rows[width]


def stages(number: int, itemsize: int, weight_size: int) -> int:
    """Of a pipeline: weights wait in shared memory in their own dtype, so that a stage less of float32 ones beside
    16-bit caches fits where the rows' own number of 16-bit ones does."""
    return max(number - 1, 1) if weight_size > itemsize else number


def tile_config(
    width: int, itemsize: int, target: str, rows: int, tokens: int, weight_size: int = 0
) -> TileConfig:
    """The largest tile that still gives every multiprocessor a program, but none of over 128 tokens that gives the
    busiest one a third more of them; else the smallest.

    Args:
        width: bottleneck width d.
        itemsize: bytes an element of the receiver's cache.
        target: the chip, ``sm_90``, ``gfx942``, ...
        rows: independent rows of tiles: layers times batch items.
        tokens: tokens to cover in each.
        weight_size: bytes an element of the weights, where they may be wider than the cache.
    """
    row = _tile(width, itemsize, target, rows, tokens)
    row = replace(row, num_stages=stages(row.num_stages, itemsize, weight_size))
    return in_place_of(row, "tile", target, width, itemsize)


def injection_config(
    width: int, itemsize: int, target: str, rows: int, tokens: int, weight_size: int = 0
) -> TileConfig:
    """`tile_config` for the injection by itself, whose latents wait in shared memory beside the up-projection: two
    stages of 64 rows at d = 512 take 256 KB."""
    row = tile_config(width, itemsize, target, rows, tokens, weight_size)
    return replace(row, num_stages=1) if width == 512 and row.block_tokens > 32 else row


def _tile(width: int, itemsize: int, target: str, rows: int, tokens: int) -> TileConfig:
    options = tile_options(width, itemsize, target)
    wanted = PROCESSORS[known_target(target)]

    def busiest(config: TileConfig) -> int:
        """Tokens that one multiprocessor goes through, tile after tile."""
        return -(-rows * -(-tokens // config.block_tokens) // wanted) * config.block_tokens

    for i, config in enumerate(options):
        # A token pulls 14 KB through L2 in a tile of 256, with its share of the weights, and 19 KB in one of 128.
        if config.block_tokens > 128 and 3 * busiest(config) >= 4 * busiest(options[i + 1]):
            continue
        if rows * -(-tokens // config.block_tokens) >= wanted:
            # The smallest pulls the weights most often: 620 MB through L2 at 256 tokens of 28 layers (d = 128), 113 us
            # at 5.5 TB/s, where 64 rows pull 155 MB. Not where the next larger one keeps half the chip busy.
            larger = options[max(i - 1, 0)]
            is_last = i == len(options) - 1
            return larger if is_last and 2 * rows * -(-tokens // larger.block_tokens) >= wanted else config
    return options[-1]


def backward_config(width: int, itemsize: int, target: str) -> TileConfig:
    """The tile of the backward kernels but the pool's and those below, and of the forward pass in training, whose
    random numbers take registers. Arguments as of `tile_options`."""
    return in_place_of(_backward(width, itemsize, target), "backward", target, width, itemsize)


def ffn_weights_config(width: int, itemsize: int, target: str) -> TileConfig:
    """The tile of the gradients of the FFN's matrices. Arguments as of `tile_options`."""
    row = _backward(width, itemsize, target, _FFN_WEIGHTS_OF)
    return in_place_of(row, "ffn_weights", target, width, itemsize)


def columns_config(width: int, itemsize: int, target: str) -> TileConfig:
    """The tile of the gradients of W_down and W_up. Arguments as of `tile_options`."""
    return in_place_of(_backward(width, itemsize, target, _COLUMNS_OF), "columns", target, width, itemsize)


def _backward(
    width: int, itemsize: int, target: str, of: Mapping[tuple[str, int], TileConfig] | None = None
) -> TileConfig:
    if target == INTERPRETER:
        return tile_options(width, itemsize, target)[0]
    if itemsize == 4:
        return _BACKWARD_SINGLE[width]
    chip = known_target(target), width
    return (of or {}).get(chip) or _BACKWARD_OF.get(chip) or _BACKWARD[width]


@dataclass(frozen=True)
class SplitConfig:
    """How the two launches of few tokens work (`fusion_split`).

    Attributes:
        block_tokens: tokens a tile.
        block_channels: widest step over a head's channels.
        block_hidden: FFN hidden units at a time.
        num_warps: warps a program.
        down_stages: depth of the software pipeline in the down projection's launch.
        finish_stages: the same in the other.
    """

    block_tokens: int
    block_channels: int
    block_hidden: int
    num_warps: int
    down_stages: int
    finish_stages: int


#: Half precision: width -> tiles of few tokens, from the smallest on. Steps of 64 hidden units or more: a program waits
#: for weights, so that what counts is bytes under way, and passes through the loops. None has been measured.
_SPLIT: dict[str, dict[int, tuple[SplitConfig, ...]]] = {
    "sm_90": {
        64: (SplitConfig(16, 64, 128, 4, 4, 3), SplitConfig(32, 64, 128, 4, 4, 3), SplitConfig(64, 64, 64, 8, 4, 3)),
        # 64 rows and 128 hidden units take all registers.
        128: (SplitConfig(16, 64, 128, 8, 4, 3), SplitConfig(32, 64, 128, 8, 4, 3), SplitConfig(64, 64, 64, 8, 4, 3)),
        256: (SplitConfig(16, 64, 64, 8, 4, 3), SplitConfig(32, 64, 64, 8, 4, 3), SplitConfig(64, 64, 32, 8, 3, 3)),
        512: (SplitConfig(16, 32, 32, 8, 4, 3), SplitConfig(32, 32, 32, 8, 4, 3)),
    },
    "sm_80": {
        64: (SplitConfig(16, 64, 128, 4, 4, 3), SplitConfig(64, 64, 64, 8, 3, 2)),
        128: (SplitConfig(16, 64, 128, 8, 4, 2), SplitConfig(64, 64, 32, 8, 3, 3)),
        256: (SplitConfig(16, 64, 64, 8, 3, 2), SplitConfig(32, 64, 32, 8, 3, 2)),
        512: (SplitConfig(16, 32, 32, 8, 3, 2),),
    },
    "gfx942": {
        64: (SplitConfig(16, 64, 64, 4, 2, 2), SplitConfig(64, 64, 32, 4, 2, 2)),
        128: (SplitConfig(16, 64, 64, 4, 2, 2), SplitConfig(32, 64, 32, 4, 2, 2)),
        256: (SplitConfig(16, 64, 32, 4, 2, 2),),
        512: (SplitConfig(16, 32, 32, 4, 2, 1),),
    },
    INTERPRETER: {
        width: (SplitConfig(16, 128, 128, 4, 1, 1), SplitConfig(64, 128, 128, 4, 1, 1)) for width in (64, 128, 256, 512)
    },
}
_SPLIT["sm_100"] = _SPLIT["sm_90"]
_SPLIT[SMALL] = _SPLIT["sm_80"]
#: float32. Wider latents spill by the hundred: one launch serves those.
_SPLIT_SINGLE: dict[int, tuple[SplitConfig, ...]] = {
    64: (SplitConfig(16, 32, 32, 4, 3, 2),),
    128: (SplitConfig(16, 32, 16, 8, 3, 2),),
}

#: The most tokens that are split, and the tile that must leave half the multiprocessors idle for it: beyond that one
#: launch has programs enough, and two would only write the parts of z to memory.
SPLIT_TOKENS, SPLIT_TILE = 128, 64
#: Programs that pull all of a layer's later weights at a multiprocessor's full rate before the L2 cache is the limit:
#: it hands out some 5.5 TB/s (H100), a multiprocessor takes at most 64 bytes a cycle, 0.11 TB/s: 50, and a few more.
PULLING_PROGRAMS = 64


def split_options(width: int, itemsize: int, target: str) -> tuple[SplitConfig, ...]:
    """All rows of few tokens for a bottleneck width, element size in bytes and chip, from the smallest tile on; for
    some there is none."""
    target = known_target(target)
    rows = _SPLIT_SINGLE if itemsize == 4 and target != INTERPRETER else _SPLIT[target]
    return rows.get(width, ())


def split_config(
    width: int, itemsize: int, target: str, rows: int, tokens: int, weight_size: int = 0
) -> SplitConfig | None:
    """How few tokens are split over two launches; None where one launch is as good. Arguments as of `tile_config`.

    Two tiles cover the tokens, one where 16 do: more would pull the weights more often than a multiprocessor gains.
    """
    options = split_options(width, itemsize, target)
    is_few = tokens <= SPLIT_TOKENS and 2 * rows * -(-tokens // SPLIT_TILE) <= PROCESSORS[known_target(target)]
    if not options or not is_few:
        return None
    row = next((config for config in options if 2 * config.block_tokens >= tokens), options[-1])
    down, finish = (stages(number, itemsize, weight_size) for number in (row.down_stages, row.finish_stages))
    row = replace(row, down_stages=down, finish_stages=finish)
    return in_place_of(row, "split", target, width, itemsize)


def split_counts(target: str, programs: int, steps: int, heads: int) -> tuple[int, int]:
    """How many programs share a tile in the two launches: ``(parts, splits)``.

    Args:
        target: the chip.
        programs: tiles of all layers and items.
        steps: of the down projection.
        heads: KV heads of the receiver.
    """
    parts = -(-PROCESSORS[known_target(target)] // programs)
    each = -(-steps // max(1, min(parts, steps)))
    splits = max(1, min(heads, PULLING_PROGRAMS // programs))
    return -(-steps // each), 1 << (splits.bit_length() - 1)
