"""How a call of `fusion.fuse_layers` is launched, worked out once for calls that look alike.

A plan hangs on layouts, shapes, gates and the chip; on no tensor, address or value. What is left to a call is to read
the addresses and to launch: the host's part of a launch must not grow with layers where it need not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import accumulate
from operator import itemgetter, or_
from typing import Any, Protocol

import torch
from torch import Tensor

from .common import TRITON_DTYPE, VECTOR_BYTES, head_chunk, heads_block, hidden_chunk, odd, padded
from .launching import Variants, kind_of, variants_of
from .policy import SplitConfig, backward_config, split_config, split_counts, tile_config

Gates = tuple[tuple[bool, bool], ...]


class Layout(Protocol):
    """What is the same in all calls of a plan: layers ``[k0, v0, k1, v1, ...]``, ``(B, H, N, D)`` each. Hashable."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def strides(self) -> tuple[tuple[int, ...], ...]: ...
    def __hash__(self) -> int: ...


class Layers(Protocol):
    """A call's own: the tensors, and where they lie."""

    @property
    def tensors(self) -> Sequence[Tensor]: ...
    @property
    def layout(self) -> Layout: ...
    @property
    def addresses(self) -> list[int]: ...


# A layer's launch code: its row in the stacked weights, the output slots of its key and value, and its open gates.
# Bit 40 makes every code a 64-bit integer, so that all layers' codes have one type.
_SLOT_BITS = 12
_CODE_MARK = 1 << 40


def layer_code(row: int, slot_key: int, slot_value: int, open_key: bool, open_value: bool) -> int:
    """Pack what the kernel must know of one layer into an integer; `fusion.fuse_kernel` unpacks it."""
    assert max(row, slot_key, slot_value) < 1 << _SLOT_BITS
    return _CODE_MARK | open_value << 37 | open_key << 36 | slot_value << 24 | slot_key << 12 | row


@dataclass(frozen=True)
class Tables:
    """Which addresses of ``[k0, v0, k1, v1, ...]`` make a launch's two tables, of keys and of values.

    Attributes:
        keys, values: pick them, padded as launch tables are.
        may_align: whether the strides allow 16-byte vector loads; the addresses must, too.
    """

    keys: itemgetter[Any]
    values: itemgetter[Any]
    may_align: bool

    @classmethod
    def of(cls, layout: Layout, rows: tuple[int, ...]) -> Tables:
        size = layout.dtype.itemsize
        # The layers of a launch have the same strides.
        steps = (*layout.strides[2 * rows[0]][:-1], *layout.strides[2 * rows[0] + 1][:-1])
        return cls(
            _picks(rows, 0),
            _picks(rows, 1),
            all(step * size % VECTOR_BYTES == 0 for step in steps),
        )

    def __call__(self, layers: Layers) -> tuple[tuple[int, ...], tuple[int, ...], bool]:
        """Keys' and values' launch tables, and whether both are aligned: as `common.address_tables`."""
        addresses = layers.addresses
        keys, values = self.keys(addresses), self.values(addresses)
        if self.may_align and not (reduce(or_, keys) | reduce(or_, values)) % VECTOR_BYTES:
            return keys, values, True
        return odd(keys), odd(values), False


@dataclass(frozen=True)
class Split:
    """How `fusion_split` shares out a tile over programs.

    Attributes:
        parts, steps: programs of the down projection, and steps of channels each.
        splits, heads: programs of the rest, and KV heads each.
        down_grid, finish_grid: programs of the two launches.
        down_keywords, finish_keywords: compile-time parameters that hang on no address.
        down_options, finish_options: ``num_warps`` and ``num_stages``.
    """

    parts: int
    steps: int
    splits: int
    heads: int
    down_grid: tuple[int, int, int]
    finish_grid: tuple[int, int, int]
    down_keywords: Mapping[str, Any]
    finish_keywords: Mapping[str, Any]
    down_options: Mapping[str, Any]
    finish_options: Mapping[str, Any]


_ONLY_DOWN = {"SHARER_HEADS", "SHARER_DIM", "BLOCK_CS", "SHARER_DTYPE"}
_ONLY_FINISH = {"IS_INPLACE", "HIDDEN", "BLOCKS", "BLOCK_F", "BLOCK_H", "EPS"}


def _split(
    config: SplitConfig, target: str, programs: int, keywords: Mapping[str, Any], steps: int, heads: int
) -> Split:
    parts, splits = split_counts(target, programs, steps, heads)
    each = -(-heads // splits)
    splits = -(-heads // each)

    def without(names: set[str]) -> dict[str, Any]:
        return {name: value for name, value in keywords.items() if name not in names and name != "HAS_NOISE"}

    return Split(
        parts=parts,
        steps=-(-steps // parts),
        splits=splits,
        heads=each,
        down_grid=(programs * parts, 1, 1),
        finish_grid=(programs * splits, 1, 1),
        down_keywords=without(_ONLY_FINISH),
        finish_keywords=without(_ONLY_DOWN),
        down_options={"num_warps": config.num_warps, "num_stages": config.down_stages},
        finish_options={"num_warps": config.num_warps, "num_stages": config.finish_stages},
    )


@dataclass(frozen=True)
class Launch:
    """One launch, of few tokens two: layers whose tensors have the same strides.

    Attributes:
        rows: of the stacked weights.
        receiver, sharer: the caches' launch tables; without a sharer the receiver's twice.
        codes: the layers' launch codes, as a launch table.
        tiles: tokens' tiles.
        grid: programs.
        strides: of the caches and of what z starts from, as the kernels' arguments have them.
        keywords: compile-time parameters that hang on no address.
        options: ``num_warps`` and ``num_stages``.
        split: of few tokens; `fusion.fuse_kernel` is not launched then.
        variants: what a kernel was compiled to; shared with other lengths' launches.
    """

    rows: tuple[int, ...]
    receiver: Tables
    sharer: Tables
    codes: tuple[int, ...]
    tiles: int
    grid: tuple[int, int, int]
    strides: tuple[int, ...]
    keywords: Mapping[str, Any]
    options: Mapping[str, Any]
    split: Split | None
    variants: Callable[[Any], Variants]


@dataclass(frozen=True)
class Plan:
    """The launches of a call, and how many tensors it makes out of place."""

    open_gates: int
    launches: tuple[Launch, ...]


@dataclass(frozen=True)
class Sizes:
    """Of the stacked weights: width d, hidden units, FFN blocks, columns of W_down, and bytes an element."""

    width: int
    hidden: int
    blocks: int
    columns: int
    itemsize: int


@lru_cache(maxsize=256)
def _codes(rows: tuple[int, ...], live: Gates) -> tuple[int, ...]:
    """The launch table of these rows' codes; slots of outputs go by all layers' gates."""
    slots = [*accumulate((open_key + open_value for open_key, open_value in live), initial=0)]
    return padded(odd([layer_code(row, slots[row], slots[row] + live[row][0], *live[row]) for row in rows]))


@lru_cache(maxsize=256)
def _picks(rows: tuple[int, ...], which: int) -> itemgetter[Any]:
    """Picks these rows' keys (0) or values (1), padded as launch tables are."""
    return itemgetter(*padded([2 * row + which for row in rows]))


def _groups(receiver: Layout, sharer: Layout | None, live: Gates) -> list[tuple[int, ...]]:
    """Rows of layers with an open gate, by the strides of their tensors."""
    rows = tuple(row for row, gates in enumerate(live) if gates[0] or gates[1])
    if all(len({*layout.strides[which::2]}) == 1 for layout in (receiver, sharer or receiver) for which in (0, 1)):
        return [rows] if rows else []
    groups: dict[tuple[Any, ...], list[int]] = {}
    for row in rows:
        pair = slice(2 * row, 2 * row + 2)
        groups.setdefault((receiver.strides[pair], sharer and sharer.strides[pair]), []).append(row)
    return [*map(tuple, groups.values())]


@lru_cache(maxsize=256)
def plan_of(
    receiver: Layout,
    sharer: Layout | None,
    sizes: Sizes,
    live: Gates,
    extent: int,
    has_index: bool,
    is_inplace: bool,
    has_noise: bool,
    norm_eps: float,
    precision: str,
    target: str,
) -> Plan:
    """The launches of a call; arguments as of `fusion.fuse_layers`. ``extent``: tokens that tiles cover."""
    open_gates = sum(map(sum, live))
    batch, heads, _, head_dim = receiver.shape
    if not open_gates or not batch or extent <= 0:
        return Plan(open_gates, ())

    launches = []
    for rows in _groups(receiver, sharer, live):
        chip = (sizes.width, receiver.dtype.itemsize, target)
        cover = (len(rows) * batch, extent, sizes.itemsize)
        few = None if has_noise else split_config(*chip, *cover)
        whole = backward_config(*chip) if has_noise else tile_config(*chip, *cover)
        config = whole if few is None else few
        codes = _codes(rows, live)
        if sharer is None:
            # Only the product matters here: where the receiver's columns of W_down begin.
            other, sharer_heads, sharer_dim = receiver, 1, sizes.columns // 2 - heads * head_dim
            start = (batch * sizes.width, sizes.width)
        else:
            other, sharer_heads, sharer_dim = sharer, sharer.shape[1], sharer.shape[3]
            start = (sizes.width, 0)
        at = slice(2 * rows[0], 2 * rows[0] + 2)
        strides = [*other.strides[at], *receiver.strides[at]]
        gathered = other.shape[2] if has_index else config.block_tokens
        keywords = {
            "LAYERS": len(codes),
            "HAS_SHARER": sharer is not None,
            "HAS_INDEX": has_index,
            "HAS_NOISE": has_noise,
            "IS_INPLACE": is_inplace,
            "IS_WIDE": any(
                count * of[2] + dim >= 2**31
                for count, dim, of in zip(
                    (gathered, gathered, config.block_tokens, config.block_tokens),
                    (other.shape[3], other.shape[3], head_dim, head_dim),
                    strides,
                )
            ),
            "SHARER_HEADS": sharer_heads,
            "SHARER_DIM": sharer_dim,
            "RECEIVER_HEADS": heads,
            "RECEIVER_DIM": head_dim,
            "WIDTH": sizes.width,
            "HIDDEN": sizes.hidden,
            "BLOCKS": sizes.blocks,
            "BLOCK_T": config.block_tokens,
            "BLOCK_CS": head_chunk(sharer_dim, config.block_channels),
            "BLOCK_CR": head_chunk(head_dim, config.block_channels),
            "BLOCK_F": hidden_chunk(sizes.hidden, config.block_hidden),
            "BLOCK_H": heads_block(heads),
            "EPS": norm_eps,
            "SHARER_DTYPE": TRITON_DTYPE[other.dtype],
            "DTYPE": TRITON_DTYPE[receiver.dtype],
            "PRECISION": precision,
        }
        steps = (*(step for of in strides for step in of[:3]), *start)
        tiles = -(-extent // config.block_tokens)
        programs = len(rows) * batch * tiles
        split = None
        if few is not None:
            chunks = (sharer_heads * -(-sharer_dim // keywords["BLOCK_CS"]) if sharer is not None else 0,
                      heads * -(-head_dim // keywords["BLOCK_CR"]))  # fmt: skip
            split = _split(few, target, programs, keywords, 2 * sum(chunks), heads)
        launches.append(
            Launch(
                rows=rows,
                receiver=Tables.of(receiver, rows),
                sharer=Tables.of(other, rows),
                codes=codes,
                tiles=tiles,
                grid=(programs, 1, 1),
                strides=steps,
                keywords=keywords,
                options={"num_warps": whole.num_warps, "num_stages": whole.num_stages},
                split=split,
                variants=variants_of(receiver.device, *keywords.values(), *map(kind_of, steps), config),
            )
        )
    return Plan(open_gates, tuple(launches))
