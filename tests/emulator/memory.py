"""Memory of a GPU whose programs run on a CPU: where tensors lie, shared memory, and who may not touch what when.

Lanes are arrays of shape ``(programs, threads)``. An address is looked up where it is: global memory is the process's
own. Each access is checked as compute-sanitizer would: bounds, alignment, reads of what nobody wrote, races.

Races are found from tags, one for each granule of memory. A tag says who last wrote (or read) it, and in which epoch: a
program's barriers part its time into epochs, and within one no order holds between warps. Between programs none ever
holds.
"""

from __future__ import annotations

import ctypes
import gc
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Lanes = NDArray[Any]

WARP = 32
#: Granules: a race is a race of granules. Two programs may well write neighbouring 16-bit elements of global memory.
GLOBAL_GRANULE, SHARED_GRANULE = 2, 4
SEVERAL = 0xFFFF


class EmulationError(RuntimeError):
    """What a GPU would not forgive: an access out of bounds, a race, a read of what was never written."""


@dataclass
class Findings:
    """What went wrong, counted by kernel, source line and kind."""

    counts: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    kernel: str = ""

    def add(self, kind: str, source: str, wrong: Lanes | int = 1) -> None:
        count = int(np.count_nonzero(wrong))
        if count:
            self.counts[self.kernel, source, kind] += count


@dataclass
class Allocation:
    """One tensor's storage, and for the launch at hand its granules' tags."""

    begin: int
    end: int
    wrote: NDArray[np.int64] | None = None
    read: NDArray[np.int64] | None = None

    def tags(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if self.wrote is None or self.read is None:
            granules = (self.end - self.begin) // GLOBAL_GRANULE + 1
            self.wrote, self.read = np.zeros(granules, np.int64), np.zeros(granules, np.int64)
        return self.wrote, self.read


class GlobalMemory:
    """The storages of all live CPU tensors, as programs of one launch see them."""

    def __init__(self, findings: Findings) -> None:
        self._findings = findings
        spans = set()
        for thing in gc.get_objects():
            if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu" and thing.layout == torch.strided:
                storage = thing.untyped_storage()
                if storage.nbytes():
                    spans.add((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
        self.allocations = [Allocation(*span) for span in sorted(spans)]
        self._begins = np.array([a.begin for a in self.allocations], np.int64)
        self._ends = np.array([a.end for a in self.allocations], np.int64)
        self._base = int(self._begins[0]) // 64 * 64
        self._views: dict[int, Lanes] = {}

    def _holder(self, address: Lanes, size: int, hint: list[int]) -> Lanes | int | None:
        """Which allocation each address lies in; one number if it is the same for all; None if one is in none."""
        low, high = int(address.min()), int(address.max()) + size
        if hint and self._begins[hint[0]] <= low and high <= self._ends[hint[0]]:
            return hint[0]
        first = int(np.searchsorted(self._begins, low, "right")) - 1
        if first >= 0 and high <= self._ends[first]:
            hint[:] = [first]
            return first
        holder = np.searchsorted(self._begins, address, "right") - 1
        if np.any(holder < 0) or np.any(address + size > self._ends[holder]):
            return None
        return holder

    def _view(self, size: int) -> Lanes:
        """All of the address space that tensors lie in, as elements of ``size`` bytes."""
        if size not in self._views:
            count = (int(self._ends[-1]) - self._base) // size + 1
            raw = (ctypes.c_uint8 * (count * size)).from_address(self._base)
            self._views[size] = np.ctypeslib.as_array(raw).view(f"u{size}")
        return self._views[size]

    def check(self, address: Lanes, size: int, source: str, hint: list[int]) -> Lanes | int:
        """Raise unless each address (signed, any shape) is aligned to ``size`` and within a tensor."""
        if np.any(address % size):
            raise EmulationError(f"{self._findings.kernel}, {source}: an address not aligned to {size} bytes")
        holder = self._holder(address, size, hint)
        if holder is None:
            raise EmulationError(f"{self._findings.kernel}, {source}: {size} bytes out of every tensor's bounds")
        return holder

    def load(self, address: Lanes, size: int) -> Lanes:
        return self._view(size)[(address - self._base) // size]

    def store(self, address: Lanes, size: int, value: Lanes) -> None:
        self._view(size)[(address - self._base) // size] = value

    def watch(
        self, address: Lanes, size: int, program: Lanes, warp: Lanes, epoch: int, source: str, holder: Lanes | int,
        *, writes: bool,
    ) -> None:  # fmt: skip
        """Tags of flat lanes' accesses: ``program`` counts from 1, ``epoch`` is the same for all."""
        if not isinstance(holder, int):
            for one in np.unique(holder):
                chosen = holder == one
                self.watch(address[chosen], size, program[chosen], warp[chosen], epoch, source, int(one), writes=writes)
            return
        allocation = self.allocations[holder]
        wrote, read = allocation.tags()
        granules = max(size // GLOBAL_GRANULE, 1)
        index = ((address - allocation.begin) // GLOBAL_GRANULE)[:, None] + np.arange(granules)
        mine = ((program.astype(np.int64) << 32) | (epoch << 16) | (warp.astype(np.int64) + 1))[:, None]
        earlier = wrote[index]
        differs = (earlier != 0) & (earlier != mine)
        across = (earlier >> 32) != (mine >> 32)
        # Another warp of the same program, and no barrier in between.
        unordered = ((earlier >> 16) == (mine >> 16)) & ((earlier & 0xFFFF) != (mine & 0xFFFF))
        verb = "write" if writes else "read"
        self._findings.add(f"global {verb} of what another program writes", source, differs & across)
        self._findings.add(f"global {verb} of what another warp wrote before any barrier", source, differs & unordered)
        if writes:
            reader = read[index]
            many = reader == -1
            across = (reader != 0) & ((reader >> 32) != (mine >> 32))
            same = ((reader >> 16) == (mine >> 16)) & ((reader & 0xFFFF) != (mine & 0xFFFF))
            self._findings.add("global write of what another program reads", source, many | across)
            self._findings.add("global write of what another warp read before any barrier", source, ~many & same)
            wrote[index] = mine
            at_once = (wrote[index] >> 32) != (mine >> 32)
            self._findings.add("global write of what another program writes", source, at_once)
        else:
            self._mark_read(read, index, mine)

    @staticmethod
    def _mark_read(read: NDArray[np.int64], index: Lanes, mine: Lanes) -> None:
        """-1 where several programs read; warp SEVERAL where several warps of one do."""
        before = read[index]
        mine = np.broadcast_to(mine, index.shape)
        read[index] = mine
        for other in (before, read[index]):
            several = (other != 0) & ((other == -1) | ((other >> 32) != (mine >> 32)))
            warps = ~several & ((other >> 16) == (mine >> 16)) & ((other & 0xFFFF) != (mine & 0xFFFF))
            if np.any(warps):
                read[index[warps]] = mine[warps] | SEVERAL
            if np.any(several):
                read[index[several]] = -1


class SharedMemory:
    """Shared memory of a group of programs that run in step, ``size`` bytes each from address ``begin`` on."""

    def __init__(self, programs: int, size: int, warps: int, findings: Findings, begin: int = 0) -> None:
        self.begin, self.size = begin, begin + size
        size = self.size
        self.words_each = max(-(-size // SHARED_GRANULE), 1) + 4
        self._findings = findings
        self.bytes = np.zeros((programs, self.words_each * SHARED_GRANULE), np.uint8)
        #: ``epoch << 16 | warp`` of the last write, and ``epoch << 16 | mask of warps`` of the epoch's reads.
        self.wrote = np.zeros((programs, self.words_each), np.int32)
        self.read = np.zeros((programs, self.words_each), np.int32)
        #: Words that a copy is on its way to; reads of wgmma that may still go on; writes that no proxy fence followed.
        self.coming = np.zeros((programs, self.words_each), np.uint8)
        self.taken = np.zeros((programs, self.words_each), np.uint8)
        self.fence = np.zeros((programs, self.words_each), np.int32)
        self.fences = 1
        self.warps = warps

    def take(self, chosen: Lanes) -> SharedMemory:
        """The same for some of the programs."""
        part = object.__new__(SharedMemory)
        part.__dict__.update(self.__dict__)
        for name in ("bytes", "wrote", "read", "coming", "taken", "fence"):
            setattr(part, name, getattr(self, name)[chosen].copy())
        return part

    def check(self, address: Lanes, size: int, source: str) -> None:
        if np.any(address % size):
            raise EmulationError(f"{self._findings.kernel}, {source}: a shared address not aligned to {size} bytes")
        if address.size and (int(address.max()) + size > self.size or int(address.min()) < self.begin):
            raise EmulationError(
                f"{self._findings.kernel}, {source}: out of {self.size - self.begin} bytes of shared memory"
            )

    def words(self, program: Lanes, address: Lanes, size: int) -> Lanes:
        """Flat indices of the granules, one more axis at the end."""
        first = program * self.words_each + address // SHARED_GRANULE
        return np.asarray(first[..., None] + np.arange(max(size // SHARED_GRANULE, 1)))

    def load(self, program: Lanes, address: Lanes, size: int) -> Lanes:
        flat = self.bytes.reshape(-1).view(f"u{size}")
        return np.asarray(flat[(program * (self.words_each * SHARED_GRANULE) + address) // size])

    def store(self, program: Lanes, address: Lanes, size: int, value: Lanes) -> None:
        flat = self.bytes.reshape(-1).view(f"u{size}")
        flat[(program * (self.words_each * SHARED_GRANULE) + address) // size] = value

    def watch_read(self, words: Lanes, warp: Lanes, epoch: int, source: str) -> None:
        """``words`` ``(lanes, n)``, ``warp`` ``(lanes,)``: lanes of one program after another, warps in order."""
        flat, warp = words.reshape(len(warp), -1), warp[:, None]
        wrote = self.wrote.reshape(-1)[flat]
        self._findings.add("shared read of what nobody wrote", source, wrote == 0)
        self._findings.add(
            "shared read of what another warp wrote before any barrier",
            source,
            ((wrote >> 16) == epoch) & ((wrote & 0xFFFF) != warp),
        )
        coming = self.coming.reshape(-1)[flat]
        self._findings.add("shared read of what a copy is still to bring", source, coming != 0)
        read = self.read.reshape(-1)
        for one in range(self.warps):
            mine = flat[warp[:, 0] == one]
            before = read[mine]
            read[mine] = np.where((before >> 16) == epoch, before | (1 << one), (epoch << 16) | (1 << one))

    def watch_write(self, words: Lanes, warp: Lanes, epoch: int, source: str, *, arrives: bool = True) -> None:
        """``arrives`` is False for a copy that is only on its way."""
        flat, warp = words.reshape(len(warp), -1), warp[:, None]
        wrote, read = self.wrote.reshape(-1)[flat], self.read.reshape(-1)[flat]
        unordered = ((wrote >> 16) == epoch) & ((wrote & 0xFFFF) != warp)
        self._findings.add("shared write of what another warp wrote before any barrier", source, unordered)
        others = ((read >> 16) == epoch) & ((read & 0xFFFF & ~(1 << warp)) != 0)
        self._findings.add("shared write of what another warp read before any barrier", source, others)
        taken = self.taken.reshape(-1)[flat]
        self._findings.add("shared write of what wgmma may still read", source, taken != 0)
        coming = self.coming.reshape(-1)
        self._findings.add("shared write of what a copy is still to bring", source, coming[flat] != 0)
        if arrives:
            self.mark_written(flat, warp, epoch)
        else:
            coming[flat] = 1

    def mark_written(self, flat: Lanes, warp: Lanes, epoch: int, *, needs_fence: bool = True) -> None:
        """By Triton before 3.7, copies need none: it puts none between them and wgmma, and gets away with it."""
        self.wrote.reshape(-1)[flat] = (epoch << 16) | warp
        self.fence.reshape(-1)[flat] = self.fences if needs_fence else 0

    def watch_matrix(self, words: Lanes, epoch: int, source: str) -> None:
        """wgmma's reads: by all warps of a group, through another proxy, until it is waited for."""
        flat = words.reshape(-1)
        wrote = self.wrote.reshape(-1)[flat]
        self._findings.add("wgmma reads what nobody wrote", source, wrote == 0)
        self._findings.add("wgmma reads what was written before any barrier", source, (wrote >> 16) == epoch)
        self._findings.add("wgmma reads what a copy is still to bring", source, self.coming.reshape(-1)[flat] != 0)
        unfenced = self.fence.reshape(-1)[flat] >= self.fences
        self._findings.add("wgmma reads what no proxy fence followed", source, unfenced)
        self.taken.reshape(-1)[flat] = 1

    def release_matrix(self, words: Lanes, mask: int, epoch: int) -> None:
        """wgmma is done with them; for other warps that counts after a barrier."""
        flat, read = words.reshape(-1), self.read.reshape(-1)
        self.taken.reshape(-1)[flat] = 0
        before = read[flat]
        read[flat] = np.where((before >> 16) == epoch, before | mask, (epoch << 16) | mask)
