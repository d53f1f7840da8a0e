"""Training the demo's adapters, by the package's own `Trainer`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..adapter import LatentCacheFlow
from ..config import CacheGeometry, LCFConfig
from ..slots import LatentSlots
from ..training.batches import Batch
from ..training.settings import TrainingSettings
from ..training.trainer import Trainer
from .jobs import Watch
from .tasks import KEYS

__all__ = ["Lessons", "Sample", "Stage", "make_adapter", "make_slots_adapter", "train_adapter"]

BOTTLENECK = 64
LEARNING_RATE, ITEMS = 3e-3, 64  # items a step
#: The training gate's logit to begin with: open in all draws, at any temperature.
GATE = 8.0

#: Random items: (how many, generator) -> the batch.
Sample = Callable[[int, torch.Generator], Batch]


@dataclass(frozen=True)
class Stage:
    """A run of so many steps; for cross context, on facts of the first ``keys`` keys alone.

    Several facts start from few keys, as recall does: what keeps them apart in one message is of no use until all of
    it is there. A stage has a learning rate of its own, which rises and falls to zero.
    """

    steps: int
    keys: int = KEYS


class Lessons:
    """An endless supply of items as the trainer's `Data`: those of a step depend on the seed and the step alone.

    ``watch`` is told the step, 0-based, when it reads.
    """

    def __init__(self, sample: Sample, seed: int, watch: Callable[[int], None]) -> None:
        self.sample, self.seed, self.watch = sample, seed, watch

    def ids(self, step: int) -> Sequence[str]:
        return [f"{step}-{i}" for i in range(ITEMS)]

    def batch(self, step: int, index: int) -> Batch:
        if index:
            raise IndexError("a step of the demo is one micro-batch")
        self.watch(step)
        return self.sample(ITEMS, torch.Generator().manual_seed(self.seed * 1_000_003 + step))

    def digest(self) -> str:
        return str(self.seed)  # the runs are thrown away, none is gone on with


def make_adapter(sharer: Any, receiver: Any, *, cross_context: bool, seed: int) -> LatentCacheFlow:
    """A fresh one, without dropout: what it reads never repeats, or hardly."""
    config = LCFConfig(
        CacheGeometry.of(sharer),
        CacheGeometry.of(receiver),
        bottleneck=BOTTLENECK,
        cross_context=cross_context,
        dropout=0.0,
        gate_init=GATE,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LatentCacheFlow(config)


def make_slots_adapter(sharer: Any, receiver: Any, *, slots: int, seed: int, **changes: Any) -> LatentSlots:
    """As `make_adapter`, of slots; ``changes``: further fields of its configuration."""
    sides = CacheGeometry.of(sharer), CacheGeometry.of(receiver)
    config = LCFConfig(*sides, bottleneck=BOTTLENECK, slots=slots, dropout=0.0, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LatentSlots(config)


def train_adapter(
    adapter: LatentCacheFlow | LatentSlots,
    sharer: Any,
    receiver: Any,
    stages: Sequence[tuple[Stage, Sample]],
    *,
    seed: int,
    watch: Watch,
    slot_dropout: bool = False,
    placement: str = "append",
    guard_weight: float = 0.0,
) -> None:
    """Train in place, one stage after the other. The runs' logs and checkpoints are thrown away.

    ``slot_dropout``: so that a message of slots can be cut to any number of them. ``placement``, ``guard_weight``: as
    in `TrainingSettings`.
    """
    steps, before = sum(stage.steps for stage, _ in stages), 0

    def tell(step: int) -> None:
        if (before + step) % 10 == 0:
            watch(f"step {before + step} of {steps}")

    for number, (stage, sample) in enumerate(stages):
        settings = TrainingSettings(
            steps=stage.steps,
            batch_size=ITEMS,
            micro_batch_size=ITEMS,
            learning_rate=LEARNING_RATE,
            seed=seed + number,
            precision="fp32",
            device="cpu",
            slot_dropout=slot_dropout,
            placement=placement,
            guard_weight=guard_weight,
        )
        data = Lessons(sample, seed + number, tell)
        with TemporaryDirectory(prefix="lcf-demo-") as folder:
            out = Path(folder) / "run"
            trainer = Trainer(
                adapter, receiver, data, out, settings=settings, sharer=sharer, save_every=stage.steps, progress=False
            )
            trainer.run()
        before += stage.steps
