"""What is run, point by point: a group of cases at one size. `urgent` says what of a run comes first.

A run covers the product of its settings; on a GPU also the sizes that the targets read (`bench.targets`). A sweep
covers every size, batch, width and dtype of the hot paths, with ours and eager alone, so that no loss hides between
the sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from .cases import GROUPS, WHOLE, Group, cases_of
from .settings import LONGEST, Settings, Sweep, dtype_name

BY_NAME = {group.name: group for group in GROUPS}
#: A receiver of a sweep's pooling, and a sharer of its injections, which take no part in the time.
ASIDE = 200


@dataclass(frozen=True)
class Point:
    """One group of cases at one size.

    Attributes:
        tokens: receiver positions N.
        context: sharer positions that LCF-X pools.
        brief: our first case and eager alone, each with its CUDA graph where that is small, in one regime; no profile.
        extra: of a sweep, behind all others: run where there is time over, and no target waits for it.
    """

    group: Group
    tokens: int
    context: int
    width: int
    dtype: torch.dtype
    batch: int = 1
    brief: bool = False
    extra: bool = False

    @property
    def length(self) -> int:
        """Positions a row of what is read: the receiver's, or those pooled where it takes no part."""
        return self.tokens if self.group.prompt else self.context

    def said(self) -> str:
        rows = f"{self.batch} × " if self.batch > 1 else ""
        return f"{self.group.title}: N = {rows}{self.length}, d = {self.width}, {dtype_name(self.dtype)}"

    def left_out(self, why: str) -> dict[str, Any]:
        """Plain JSON, for the results."""
        return {
            "group": self.group.name,
            "batch": self.batch,
            "tokens": self.length,
            "bottleneck": self.width,
            "dtype": dtype_name(self.dtype),
            "extra": self.extra,
            "why": why,
        }


@dataclass(frozen=True)
class Size:
    """What a target reads: a group at a batch, N receiver positions, and sharer positions that are pooled."""

    group: str
    tokens: int = 2048
    context: int = 2000
    batch: int = 1
    brief: bool = False


#: In the order in which they are run, at the first of --bottleneck.
TARGET_SIZES = (
    Size("lcf"),
    *(Size("lcf", tokens, brief=tokens < 128) for tokens in (128, 32, 8, 1)),
    Size("lcf", batch=8),
    Size("lcfx", 1000),
    Size("summarize", context=LONGEST),
    Size("lcf_pruned"),
    Size("train", 1024, batch=8),
    Size("slots"),
)


def points(settings: Settings) -> list[Point]:
    """Of a run: the product of its settings, and after it the other sizes that the targets read, where it is to."""
    found = [
        Point(group, tokens, settings.context, width, settings.dtype, batch)
        for width in settings.widths
        for batch in settings.batches
        for tokens in settings.tokens
        for group in GROUPS
        if tokens == settings.tokens[0] or _at_every_size(group, settings)
    ]
    if settings.targets:
        found += [
            point
            for size in TARGET_SIZES
            if not any(_is(point, size) for point in found)
            for point in [_sized(size, settings)]
        ]
    return [point for point in found if cases_of(point.group, settings.only)]


def urgent(found: Sequence[Point], settings: Settings) -> list[int]:
    """Indices of points in the order in which they are run: first what targets read."""
    sizes = TARGET_SIZES if settings.targets else ()
    width = settings.widths[0]

    def rank(index: int) -> tuple[int, int]:
        point = found[index]
        at = (i for i, size in enumerate(sizes) if point.width == width and _is(point, size))
        return next(at, len(sizes)), index

    return sorted(range(len(found)), key=rank)


def _is(point: Point, size: Size) -> bool:
    """Whether what a point measures is what the size asks for."""
    if (point.group.name, point.batch) != (size.group, size.batch):
        return False
    reads_prompt = point.group.prompt
    reads_context = point.group.crossing
    return (not reads_prompt or point.tokens == size.tokens) and (not reads_context or point.context == size.context)


def _sized(size: Size, settings: Settings) -> Point:
    group = BY_NAME[size.group]
    return Point(group, size.tokens, size.context, settings.widths[0], settings.dtype, size.batch, size.brief)


def _at_every_size(group: Group, settings: Settings) -> bool:
    """Whether a group is run at the other sizes too, not at the first of ``tokens`` alone."""
    return group.prompt and (group.name in WHOLE or not settings.quick)


# --- the sweep


def sweep_points(axes: Sweep, only: tuple[str, ...] = ()) -> tuple[list[Point], list[dict[str, Any]]]:
    """Points from what matters most to what matters least, and what is left out as too large.

    First one dtype at one width in every size, then at batch 1 the other widths and dtypes, each alone, then the rest
    (``extra``).
    """
    found: list[tuple[tuple[int, ...], Point]] = []
    left_out = []
    for a, b, c in product(range(len(axes.dtypes)), range(len(axes.widths)), range(len(axes.batches))):
        dtype, width, batch = axes.dtypes[a], axes.widths[b], axes.batches[c]
        sizes = [(name, tokens, ASIDE) for tokens in axes.tokens for name in WHOLE]
        sizes += [("summarize", 1, context) for context in axes.contexts]
        for d, (name, tokens, context) in enumerate(sizes):
            compared = (name, batch, tokens, width) in axes.compared and a == 0
            rank = _importance(a, b, c)
            point = Point(BY_NAME[name], tokens, context, width, dtype, batch, brief=not compared, extra=rank > 1)
            if not cases_of(point.group, only):
                continue
            if batch * point.length * dtype.itemsize > axes.most:
                left_out.append(point.left_out(f"more than {axes.most // dtype.itemsize:,} positions in all"))
                continue
            found.append(((rank, a, b, c, d), point))
    return [point for _, point in sorted(found, key=lambda one: one[0])], left_out


def _importance(dtype: int, width: int, batch: int) -> int:
    """0 is the most; of the indices on their axes."""
    if dtype == width == 0:
        return 0
    return 1 if batch == 0 and 0 in (dtype, width) else 2
