"""How the eager back end cuts its work: reused buffers, tiles of token rows, groups of layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

# Token rows of one layer in a tile. Two Zen 4 cores, 512 tokens, 28 layers, LCF-128 float32, in place: 266 ms at 128,
# 227 at 256, 196 at 512, 188 at 1024. Below 512 the batched product loses; above, little but the buffers grows.
TILE_ROWS = 512
# Rows of all the layers that are worked on together: a tile a core, which also bounds the buffers (8,192 rows of
# 4,096 channels are 134 MB in float32). With few tokens a tile these are many layers.
_MAX_CORES = 16
_ACCELERATOR_ROWS = 16384


def operand_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of matrix operands: the cache's, but float32 for float16 on a CPU.

    Few CPUs multiply in float16; elsewhere torch takes three times as long as to convert and multiply, and rounds more.
    bfloat16 runs at twice float32's rate.
    """
    return torch.float32 if dtype == torch.float16 and device.type == "cpu" else dtype


class Workspace:
    """Named buffers, reused from tile to tile: on a CPU, touching fresh memory costs as much as the copy into it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = prod(shape)
        buffer = self.buffers.get(name)
        if buffer is None or buffer.numel() < size or buffer.dtype != dtype:
            buffer = self.buffers[name] = torch.empty(size, dtype=dtype, device=self.device)
        return buffer[:size].view(*shape)


class Tile(NamedTuple):
    """A rectangle of batch items and positions, and which of its rows count (``None``: all)."""

    items: slice
    tokens: slice
    keep: Tensor | None  # (items, tokens) bool

    @property
    def shape(self) -> tuple[int, int]:
        return self.items.stop - self.items.start, self.tokens.stop - self.tokens.start


def cut_tiles(
    mask: Tensor | None, batch: int, positions: tuple[int, int], rows: int, device: torch.device
) -> list[Tile]:
    """Cut a range of positions of every item into tiles of at most ``rows`` rows (one item at least).

    On a CPU the mask ``(B, N)`` is looked at: a tile shrinks to the positions that count in some item of it, and goes
    if there is none. Elsewhere looking would wait for the device.

    Returns:
        Tiles in order of items, then positions.
    """
    start, stop = positions
    if stop <= start:
        return []
    look = device.type == "cpu"
    tiles: list[Tile] = []
    step = max(1, rows // (stop - start))
    for first in range(0, batch, step):
        items = slice(first, min(batch, first + step))
        low, high = start, stop
        if mask is not None and look:
            used = mask[items, start:stop].any(0).nonzero()
            if not len(used):
                continue
            low, high = start + int(used[0]), start + int(used[-1]) + 1
        parts = -(-(high - low) // rows)
        length = -(-(high - low) // parts)
        for at in range(low, high, length):
            tokens = slice(at, min(high, at + length))
            keep = None if mask is None else mask[items, tokens]
            if keep is not None and look:
                if not bool(keep.any()):
                    continue
                if bool(keep.all()):
                    keep = None
            tiles.append(Tile(items, tokens, keep))
    return tiles


def uncovered(tiles: Sequence[Tile], batch: int, length: int) -> list[tuple[slice, slice]]:
    """The rectangles (items, positions) that no tile holds; ``tiles`` in the order of `cut_tiles`."""
    gaps: list[tuple[slice, slice]] = []
    items, position = slice(0, 0), length
    for tile in tiles:
        if tile.items != items:
            gaps.append((items, slice(position, length)))
            gaps.append((slice(items.stop, tile.items.start), slice(0, length)))
            items, position = tile.items, 0
        gaps.append((items, slice(position, tile.tokens.start)))
        position = tile.tokens.stop
    gaps.append((items, slice(position, length)))
    gaps.append((slice(items.stop, batch), slice(0, length)))
    return [gap for gap in gaps if all(axis.start < axis.stop for axis in gap)]


def tile_rows(device: torch.device) -> int:
    """How many token rows of one layer make a tile."""
    return TILE_ROWS if device.type == "cpu" else _ACCELERATOR_ROWS


def group_layers(live: Sequence[tuple[bool, bool]], tiles: Sequence[Tile], device: torch.device) -> Iterator[slice]:
    """Runs of layers with the same gates open, few enough for one set of buffers; dead layers are left out."""
    cores = min(max(2, torch.get_num_threads()), _MAX_CORES)
    limit = TILE_ROWS * cores if device.type == "cpu" else _ACCELERATOR_ROWS
    most = max(1, limit // max(prod(tile.shape) for tile in tiles))
    start = 0
    while start < len(live):
        stop = start + 1
        while stop < len(live) and live[stop] == live[start]:
            stop += 1
        if any(live[start]):
            parts = -(-(stop - start) // most)
            size = -(-(stop - start) // parts)
            for at in range(start, stop, size):
                yield slice(at, min(stop, at + size))
        start = stop
