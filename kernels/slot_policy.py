"""Launch configurations of the slot kernels as data. Imports neither torch nor triton.

Rows come from cross-compilation (registers, spills, vector loads; tests/compile) and from counting bytes and FLOPs:
none has been measured on a GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .policy import SMALL, next_power_of_2
from .tuned import in_place_of


@dataclass(frozen=True)
class SlotPoolConfig:
    """How the pooling and the merge of slots work.

    Attributes:
        block_slots: slots a program, padded to what a tensor instruction takes; programs for more run side by side.
        block_tokens: tokens a step.
        num_warps: warps a program.
        num_stages: depth of the software pipeline.
        masked_stages: the same where a mask's loads go before those of the tokens.
        merge_parts: states a step of the merge.
        merge_warps: warps a program of the merge.
    """

    block_slots: int
    block_tokens: int
    num_warps: int
    num_stages: int
    masked_stages: int
    merge_parts: int
    merge_warps: int


@dataclass(frozen=True)
class SlotFoldConfig:
    """How the fold of slots through W_down works.

    Attributes:
        block_rows: rows (batch item, slot) that share one read of the weights.
        block_width: latent channels a program.
        block_channels: channels of the pooled keys and values a step.
        num_warps: warps a program.
        num_stages: depth of the software pipeline.
    """

    block_rows: int
    block_width: int
    block_channels: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class SlotExpandConfig:
    """How FFN blocks and up-projection of slots work.

    Attributes:
        block_rows: rows (batch item, slot) a tile.
        block_channels: widest step over a head's channels; `common.head_chunk` narrows it for odd head dims.
        block_hidden: FFN hidden units a step.
        num_warps: warps a program.
        num_stages: depth of the software pipeline.
        splits: programs that share a tile's up-projection, each of which makes z itself.
    """

    block_rows: int
    block_channels: int
    block_hidden: int
    num_warps: int
    num_stages: int
    splits: int = 1


#: Fewest rows of a tensor instruction, to which slots are padded.
FEWEST_SLOTS = 16
#: Programs a multiprocessor that even out the end of a launch: four at a time, two rounds.
PROGRAMS_EACH = 8
#: A state's bytes are written and read: up to this part of the tokens' bytes that is little.
STATE_PART = 8
#: Shorter contexts go whole where layers, items and heads alone fill the chip: the second launch would take longer
#: than what even chunks save.
WHOLE_TOKENS = 256
#: Programs that pull weights at a multiprocessor's full rate before the L2 cache is the limit: it hands out some
#: 5.5 TB/s (H100), a multiprocessor takes at most 64 bytes a cycle, 0.11 TB/s: 50, and somewhat more do no harm.
PULLING_PROGRAMS = 64


def slot_block(slots: int) -> int:
    """Slots padded to a power of two that a tensor instruction takes."""
    return max(FEWEST_SLOTS, next_power_of_2(slots))


def slot_pool_config(head_dim: int, itemsize: int, slots: int, target: str) -> SlotPoolConfig:
    """The row for a head width, element size in bytes, number of slots and chip (``sm_90``, ``gfx942``).

    A step's keys and values are 16 KB: 126 registers and 40 KB of shared memory for 128 channels of 16 bits, so that
    four programs with two steps under way have 128 KB on a multiprocessor (latency times bandwidth of an H200 is about
    25 KB) and compute in turns. 32 KB take 250 registers for the same bytes, and spill where addresses are odd.
    """
    return in_place_of(_slot_pool(head_dim, itemsize, slots, target), "slot_pool", target, head_dim, itemsize)


def _slot_pool(head_dim: int, itemsize: int, slots: int, target: str) -> SlotPoolConfig:
    width = max(16, next_power_of_2(head_dim))
    block_slots = min(slot_block(slots), 64)
    # 64 slots: of 256 channels 430 spills, 206 in the loop; float32 11,000; sm_100 compiles 128 channels to an empty
    # kernel (Triton 3.7.1). Two programs of 32 read the same tokens at the same time, one of them from L2.
    if itemsize == 4 or width > 128 or target == "sm_100":
        block_slots = min(block_slots, 32)
    step_bytes = 16 * 1024
    warps = 8 if block_slots * width > 4096 or (itemsize == 4 and block_slots > 16) else 4
    if target == "sm_90" and block_slots == 64:
        # One warpgroup's HGMMA, and registers for two programs a multiprocessor instead of one.
        step_bytes, warps = 32 * 1024, 4
    stages, masked = 3, 5  # the mask's loads take two stages of every step
    if target == "gfx942":
        stages, masked, warps = 2, 3, 4  # a stage more is kept in registers; 8 warps have 256 each, 4 have 512
    tokens = min(max(step_bytes // (2 * width * itemsize), 16), 64)
    return SlotPoolConfig(block_slots, tokens, warps, stages, masked, merge_parts=16, merge_warps=4)


def slot_backward_config(head_dim: int, itemsize: int, slots: int, target: str) -> SlotPoolConfig:
    """The row of the pooling's backward; arguments as of `slot_pool_config`.

    At most 32 slots, 16 of 256 channels: queries and two gradients, each in three parts, wait in shared memory (32 of
    256 channels and a step's tokens: 167 KB, more than an A100 has; 32 of 128: 110 KB, more than sm_89 has); on gfx942
    in registers, so 16 there.
    """
    most = 32 if head_dim <= 128 and target not in ("gfx942", SMALL) else 16
    return _slot_pool(head_dim, itemsize, min(slots, most), target)  # never what the forward pass alone was tuned to


def chunk_tokens(config: SlotPoolConfig, rows: int, tokens: int, slots: int, itemsize: int, processors: int) -> int:
    """Tokens a program: a power of two of steps, at least one.

    As long as that leaves `PROGRAMS_EACH` programs a multiprocessor; or one, while states would cost more than a
    part of the cache's own bytes: 2 transfers of ``2·D`` float32 a slot against ``2·D`` elements a token.

    Args:
        config: the row of `slot_pool_config`.
        rows: layers times batch items times KV heads times groups of slots.
        tokens, slots: N and k.
        itemsize: bytes an element of the cache.
        processors: of the chip.
    """
    chunk = config.block_tokens
    cheap = STATE_PART * 2 * 4 * slots // itemsize
    while chunk < tokens:
        programs = rows * -(-tokens // (2 * chunk))
        is_even = programs >= PROGRAMS_EACH * processors
        is_short = tokens <= WHOLE_TOKENS and rows >= processors
        if not (is_even or is_short or (chunk < cheap and programs >= processors)):
            break
        chunk *= 2
    return chunk


def slot_fold_config(itemsize: int, rows: int, target: str) -> SlotFoldConfig:
    """The row for bytes an element of the weights, rows (batch items times slots) and chip.

    32 latent channels a program: 28 layers of d = 128 make 112 programs, which pull 14.7 MB of weights and, for k = 8,
    four times 1.8 MB of slots. 16 channels would read the slots eight times (29 MB from L2, 5.3 us at 5.5 TB/s), 64
    would leave half the multiprocessors idle.
    """
    # 64 rows: 70 spills in the loop on sm_100; 120 KB of shared memory, of which gfx942 has 64, sm_89 99.
    most = 32 if target in ("sm_100", "gfx942", SMALL) else 64
    stages = 2 if target == "gfx942" else 4
    return SlotFoldConfig(min(slot_block(rows), most), 32, 128 if itemsize < 4 else 32, num_warps=4, num_stages=stages)


#: Half precision: chip -> d -> tiles from the largest to the smallest. The largest has the most products a weight read.
#: The smallest is what a message needs (k = 8, one item): it waits for weights, one program a multiprocessor, so that
#: its pipeline is as deep as shared memory allows.
_HALF: dict[str, dict[int, tuple[SlotExpandConfig, ...]]] = {
    "sm_90": {
        64: (SlotExpandConfig(64, 64, 64, 4, 3), SlotExpandConfig(16, 64, 64, 4, 4)),
        128: (SlotExpandConfig(64, 64, 64, 4, 3), SlotExpandConfig(16, 64, 64, 4, 4)),
        256: (SlotExpandConfig(64, 64, 32, 8, 2), SlotExpandConfig(16, 64, 32, 4, 3)),
        512: (SlotExpandConfig(32, 64, 32, 8, 2), SlotExpandConfig(16, 32, 32, 8, 3)),
    },
    "sm_80": {
        64: (SlotExpandConfig(64, 64, 64, 4, 3), SlotExpandConfig(16, 64, 64, 4, 4)),
        # HMMA has no warpgroups: 8 warps on 64 rows halve what a thread holds.
        128: (SlotExpandConfig(64, 64, 32, 8, 2), SlotExpandConfig(16, 64, 64, 4, 4)),
        256: (SlotExpandConfig(64, 64, 32, 8, 2), SlotExpandConfig(16, 64, 32, 4, 3)),
        512: (SlotExpandConfig(32, 64, 32, 8, 2), SlotExpandConfig(16, 32, 32, 8, 3)),
    },
    # 64 KB of shared memory.
    "gfx942": {
        64: (SlotExpandConfig(64, 64, 64, 4, 2), SlotExpandConfig(16, 64, 64, 4, 2)),
        128: (SlotExpandConfig(64, 64, 32, 4, 2), SlotExpandConfig(16, 64, 64, 4, 2)),
        256: (SlotExpandConfig(32, 32, 32, 4, 2), SlotExpandConfig(16, 64, 32, 4, 2)),
        512: (SlotExpandConfig(16, 32, 32, 4, 1),),
    },
}
_HALF["sm_100"] = _HALF["sm_90"]
# 99 KB of it.
_HALF[SMALL] = {
    width: tuple(replace(row, num_stages=max(row.num_stages - 1, 1)) for row in rows)
    for width, rows in _HALF["sm_80"].items()
}
#: float32 multiplies on the plain cores: small tiles, or the unrolled products fill the register file.
_SINGLE: dict[int, tuple[SlotExpandConfig, ...]] = {
    64: (SlotExpandConfig(16, 32, 32, 4, 2),),
    128: (SlotExpandConfig(16, 32, 32, 4, 2),),
    256: (SlotExpandConfig(16, 32, 32, 8, 2),),
    512: (SlotExpandConfig(16, 32, 32, 8, 2),),
}
_SINGLE_AMD = {width: (replace(rows[0], num_stages=1),) for width, rows in _SINGLE.items()}
#: The interpreter takes its time for each operation, whatever its size.
_INTERPRETED = (SlotExpandConfig(64, 128, 128, 4, 1),)


def slot_expand_options(width: int, itemsize: int, target: str) -> tuple[SlotExpandConfig, ...]:
    """All tiles for d, bytes an element of the destination and chip, from the largest to the smallest, unsplit.

    ``target``: one of `policy.known_target`'s.
    """
    if target == "interpreter":
        return _INTERPRETED
    if itemsize == 4:
        return (_SINGLE_AMD if target == "gfx942" else _SINGLE)[width]
    return _HALF[target][width]


def slot_expand_config(
    width: int,
    itemsize: int,
    weight_size: int,
    target: str,
    layers: int,
    rows: int,
    processors: int,
    *,
    has_noise: bool = False,
) -> SlotExpandConfig:
    """The largest tile that gives every multiprocessor a program, else the smallest, split while that pays.

    A program reads the FFN's ``16·d²`` weights and its part of the up-projection's ``2·Cr·d``, as many for the
    published pair, of which the FFN's come from L2 for all splits but one. So a split shortens what one program pulls
    by a quarter (28 layers: 1 MB at 0.11 TB/s is 9.6 us, 768 KB in 56 programs 7.0), until `PULLING_PROGRAMS` share
    L2's bandwidth; then it only adds to the bytes (112 programs of 640 KB: 13 us).

    Args:
        width: d.
        itemsize, weight_size: bytes an element of the destination and of the weights.
        target: the chip, one of `policy.known_target`'s.
        layers: of the launch.
        rows: batch items times slots.
        processors: of the chip.
        has_noise: the smallest tile: random numbers take registers (64 rows of d = 128: 304 spills on sm_90, 428 on
            sm_80, and in the loops of sm_100; 16 rows: none).
    """
    config, programs = None, 0
    for config in slot_expand_options(width, itemsize, target)[-1 if has_noise else 0 :]:
        programs = layers * -(-rows // config.block_rows)
        if programs >= processors:
            break
    assert config is not None
    splits = 1
    while 2 * splits * programs <= PULLING_PROGRAMS and splits < 8:
        splits *= 2
    if target == "interpreter":
        splits = 1
    # Weights wait in shared memory in their own dtype.
    stages = config.num_stages if weight_size <= itemsize else max(config.num_stages // 2, 1)
    row = replace(config, splits=splits, num_stages=stages)
    return in_place_of(row, "slot_expand", target, width, itemsize)
