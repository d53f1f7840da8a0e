"""The random numbers of training on the device; `lcf_fast.noise` says what they are, and draws the same ones."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import inlined

#: As `lcf_fast.noise.BLOCK_STREAM`.
BLOCK_STREAM = tl.constexpr(2)
#: `lcf_fast.noise.TrainingNoise.arguments`: seed, threshold, keep scale, 1 / temperature.
NoiseArguments = tuple[int, int, float, float]
NO_NOISE: NoiseArguments = (0, 0, 1.0, 1.0)


@triton.jit
def random_tile(seed, o_channel, o_token, i_item, row, stream):
    """32 random bits for each (token, channel) of a tile, as int64. ``i_item``: of all tokens, or (tokens, 1)."""
    zeros = o_token[:, None].to(tl.int32) * 0 + o_channel[None, :].to(tl.int32) * 0
    channel = zeros + o_channel[None, :].to(tl.int32)
    token = zeros + o_token[:, None].to(tl.int32)
    item = (zeros + i_item).to(tl.int32)
    place = (zeros + (row | (stream << 16))).to(tl.int32)
    bits, _, _, _ = tl.philox(seed, channel, token, item, place)
    return bits.to(tl.int64)


@inlined
def drawn_for(o_row, i_item, slots, IS_PACKED: tl.constexpr):
    """The token and the item that each row's numbers are drawn for. Packed rows are (item, slot), slot fastest."""
    o_token = o_row
    if IS_PACKED:
        o_token = o_row % slots
        i_item = (o_row // slots)[:, None]
    return o_token, i_item


@triton.jit
def keep_tile(seed, threshold, o_channel, o_token, i_item, row, i_block):
    """Which of a block's outputs are kept."""
    return (random_tile(seed, o_channel, o_token, i_item, row, BLOCK_STREAM + i_block) >> 1) >= threshold


@triton.jit
def soft_gate_tile(seed, inverse_temperature, logit, o_head, o_token, i_item, row, side):
    """``sigmoid((logit + G) / temperature)`` for each (token, head) of a tile."""
    bits = random_tile(seed, o_head, o_token, i_item, row, side)
    uniform = ((bits >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    score = (logit - tl.log(-tl.log(uniform))) * inverse_temperature
    return 1.0 / (1.0 + tl.exp(-score))
