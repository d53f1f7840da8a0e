"""The ranks of a data-parallel run, as ``torchrun`` starts them; one process alone is rank 0 of 1."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..devices import chosen_device

__all__ = ["Ranks", "process_group"]


@dataclass(frozen=True)
class Ranks:
    """This process's place in the default process group."""

    rank: int
    count: int
    device: torch.device

    @classmethod
    def current(cls, device: torch.device) -> Ranks:
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), device)
        return cls(0, 1, device)

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0

    def share(self, items: int) -> range:
        """Which of ``items`` are this rank's: contiguous shares of nearly one size."""
        return range(items * self.rank // self.count, items * (self.rank + 1) // self.count)

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums over the ranks, float64."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.count > 1:
            dist.all_reduce(tensor)
        summed: list[float] = tensor.tolist()
        return summed

    def from_first(self, value: int) -> int:
        """Rank 0's ``value``, on every rank."""
        return round(self.total([value if self.first else 0])[0])


@contextmanager
def process_group(device: str | None = None) -> Iterator[torch.device]:
    """The device of this process, within the process group that ``torchrun``'s environment describes, if it does.

    Args:
        device: as `chosen_device` reads it.

    Raises:
        DeviceError: no such device here.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = chosen_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if ranks == 1:
        yield chosen
        return
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield chosen
    finally:
        dist.destroy_process_group()
