"""Making a store of frozen prefills: plan it, know its size, write it shard by shard.

The plan goes through the micro-batches of the run that the store is for, in their order, and takes each example where
it first comes up; the prefills are then computed in those very micro-batches. Shards are whole micro-batches. A shard
is there once the JSON file beside it is, so a run that is killed loses no more than the shard it was at.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..caches import Pair
from ..config import CacheGeometry
from ..counting import counted
from ..devices import chosen_device
from ..errors import GeometryError, IndexRangeError
from ..files import only_writer, write_whole
from ..reading.model_fingerprint import model_fingerprint, model_sample, weights_sample
from ..reading.prefill import DTYPES, prefill
from .failures import RunError
from .prefills import (
    MANIFEST,
    Entry,
    Manifest,
    read_entries,
    shard_entries_bytes,
    shard_name,
    token_digest,
)
from .settings import TrainingSettings
from .step import frozen, receiver_prefill, sharer_tokens

if TYPE_CHECKING:
    from .batches import Batch
    from .trainer import Data

__all__ = ["StorePlan", "plan_prefills", "write_prefills"]

_ENTRY_BYTES = 1024  # more than an example takes beside its tensors, in the shard's header and in JSON


@dataclass
class PlannedShard:
    """Examples of a shard, and the micro-batches ``(step, index)`` that they come up in."""

    entries: list[Entry] = field(default_factory=list)
    batches: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class StorePlan:
    """What a store will hold. `tensor_bytes` is exact; on the disk some hundred bytes an example come on top."""

    settings: TrainingSettings
    sharer: CacheGeometry
    receiver: CacheGeometry
    sharer_layers: tuple[int, ...]
    with_receiver: bool
    shards: tuple[PlannedShard, ...]

    @property
    def entries(self) -> list[Entry]:
        return [entry for shard in self.shards for entry in shard.entries]

    @property
    def tensor_bytes(self) -> int:
        return sum(map(self.bytes_of, self.shards))

    def bytes_of(self, shard: PlannedShard) -> int:
        sharer, receiver = _token_bytes(self.settings, self.sharer, self.sharer_layers, self.receiver)
        theirs = sum(entry.sharer_tokens for entry in shard.entries) * sharer
        return theirs + (sum(e.receiver_tokens for e in shard.entries) * receiver if self.with_receiver else 0)

    def waiting(self, folder: Path) -> list[int]:
        """Numbers of the shards that are not in ``folder`` yet.

        Raises:
            RunError: the disk has no room for them.
        """
        numbers = [n for n, shard in enumerate(self.shards) if not _is_there(folder, n, shard.entries)]
        needed = sum(self.bytes_of(self.shards[n]) + _ENTRY_BYTES * len(self.shards[n].entries) + 4096 for n in numbers)
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free
        if free < needed:
            raise RunError(str(folder), expected=f"{_size(needed)} free for the caches", got=_size(free))
        return numbers

    def digest(self) -> str:
        listed = [[asdict(entry) for entry in shard.entries] for shard in self.shards]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:32]

    def summary(self) -> str:
        """One line: how many examples, tokens and bytes."""
        entries = self.entries
        theirs, mine = sum(e.sharer_tokens for e in entries), sum(e.receiver_tokens for e in entries)
        tokens = f"{theirs:,} tokens of the sharer in {len(self.sharer_layers)} layers"
        if self.with_receiver:
            tokens += f", {mine:,} of the receiver in {self.receiver.layers}"
        return f"{len(entries):,} examples, {tokens}: {_size(self.tensor_bytes)} in {len(self.shards):,} shards"


def plan_prefills(
    data: Data,
    settings: TrainingSettings,
    sharer: CacheGeometry,
    receiver: CacheGeometry,
    *,
    sharer_layers: Iterable[int] | None = None,
    with_receiver: bool = True,
    shard_bytes: int = 1 << 28,
    progress: bool = False,
) -> StorePlan:
    """Which examples a run reads, and how much room their caches take. No model is needed, tokens are made once.

    Args:
        data: of the run; each example has one id, and one text of it.
        settings: of the run: ``steps``, the micro-batches and ``precision`` count.
        sharer_layers: that an adapter will read (``set(config.sharer_layers)``); None: all.
        with_receiver: store the receiver's caches of the prompts as well.
        shard_bytes: a shard ends with the micro-batch that fills so many.

    Raises:
        IndexRangeError: a layer that the sharer does not have. RunError: one id with two texts.
    """
    every = range(sharer.layers)
    layers = tuple(every) if sharer_layers is None else tuple(sorted(set(sharer_layers)))
    if not layers or any(layer not in every for layer in layers):
        raise IndexRangeError("sharer_layers", expected=f"layers in [0, {sharer.layers})", got=str(layers))
    if shard_bytes < 1:
        raise GeometryError("shard_bytes", expected="1 or more", got=str(shard_bytes))
    per_token = _token_bytes(settings, sharer, layers, receiver)
    known: dict[str, Entry] = {}
    shards, size = [PlannedShard()], 0
    places = [(step, index) for step in range(settings.steps) for index in range(settings.micro_batches)]
    for step, index in counted(places, "micro-batches planned", total=len(places), shown=progress):
        new = []
        for entry in _entries(data.batch(step, index)):
            before = known.setdefault(entry.id, entry)
            if before is entry:
                new.append(entry)
            elif before.receiver_digest != entry.receiver_digest:
                raise RunError("data", expected="one text for each id", got=f"two for {entry.id!r}")
        if not new:
            continue
        if size >= shard_bytes:
            shards.append(PlannedShard())
            size = 0
        shards[-1].entries += new
        shards[-1].batches.append((step, index))
        size += sum(e.sharer_tokens * per_token[0] + e.receiver_tokens * per_token[1] * with_receiver for e in new)
    return StorePlan(settings, sharer, receiver, layers, with_receiver, tuple(shards))


def write_prefills(
    folder: Path | str, plan: StorePlan, data: Data, sharer: Any, receiver: Any, *, progress: bool = False
) -> Manifest:
    """Compute and store what is planned, going on where a run before stopped.

    Args:
        folder: a new one, or one that was begun with the same plan and models.
        data: that the plan was made from.
        sharer, receiver: transformers causal LMs; frozen, moved and cast in place.

    Raises:
        GeometryError: models of another geometry than the plan's. DeviceError: ``plan.settings.device`` is not here.
            RunError: ``folder`` holds another store; another process is writing it; not enough room on the disk, found
            before the first prefill; it cannot be written. What is finished stays.
    """
    folder = Path(folder)
    for name, model, geometry in (("sharer", sharer, plan.sharer), ("receiver", receiver, plan.receiver)):
        if (found := CacheGeometry.of(model)) != geometry:
            raise GeometryError(name, expected=f"{geometry} as planned", got=str(found))
    device = chosen_device(plan.settings.device)
    precision = plan.settings.precision
    sharer, receiver = (frozen(model, device=device, precision=precision) for model in (sharer, receiver))
    sharer_weights = weights_sample(sharer)
    assert sharer_weights is not None  # it has been moved to a device
    manifest = Manifest(
        precision=precision,
        sharer=(plan.sharer.layers, plan.sharer.kv_heads, plan.sharer.head_dim),
        receiver=(plan.receiver.layers, plan.receiver.kv_heads, plan.receiver.head_dim),
        sharer_layers=plan.sharer_layers,
        with_receiver=plan.with_receiver,
        sharer_fingerprint=model_fingerprint(sharer, precision),
        receiver_fingerprint=model_fingerprint(receiver, precision),
        sharer_sample=model_sample(sharer, precision),
        sharer_weights=sharer_weights,
        examples=len(plan.entries),
        shards=len(plan.shards),
        tensor_bytes=plan.tensor_bytes,
        plan=plan.digest(),
    )
    try:
        with only_writer(folder):
            _store(folder, plan, data, manifest, sharer, receiver, progress)
    except OSError as error:
        raise RunError(str(folder), expected="a folder to write to", got=error.strerror or str(error)) from error
    return manifest


def _store(
    folder: Path, plan: StorePlan, data: Data, manifest: Manifest, sharer: Any, receiver: Any, progress: bool
) -> None:
    """All shards that are not there yet."""
    waiting = _begin(folder, plan, manifest)
    written = [0]
    every = [(n, place) for n in waiting for place in plan.shards[n].batches]
    rows: list[dict[str, Tensor]] = []
    for n, (step, index) in counted(
        every,
        "micro-batches stored",
        total=len(every),
        shown=progress,
        more=lambda: f"{_size(written[0])} of {_size(sum(plan.bytes_of(plan.shards[n]) for n in waiting))}",
    ):
        shard = plan.shards[n]
        rows += _compute(plan, data.batch(step, index), shard.entries[len(rows) :], sharer, receiver)
        if (step, index) == shard.batches[-1]:
            _write_shard(folder, n, shard.entries, rows)
            rows = []
            written[0] += plan.bytes_of(shard)


def _begin(folder: Path, plan: StorePlan, manifest: Manifest) -> list[int]:
    """Numbers of the shards that are not there yet; the manifest is, and the disk has room for them."""
    if (folder / MANIFEST).exists():
        held = Manifest.read(folder)
        changed = [name for name, value in asdict(manifest).items() if getattr(held, name) != value]
        if changed:
            expected = f"a new folder, or a store of the same {', '.join(changed)}"
            raise RunError(str(folder), expected=expected, got="another store")
    elif any(folder.iterdir()):
        raise RunError(str(folder), expected="a new folder, or a store", got="a folder that holds something else")
    waiting = plan.waiting(folder)
    write_whole(folder / MANIFEST, manifest.to_bytes())
    return waiting


def _is_there(folder: Path, number: int, entries: Sequence[Entry]) -> bool:
    # Its SHA-256 is verified when it is read: going through terabytes before going on would take as long again.
    beside, shard = (folder / f"{shard_name(number)}{ending}" for ending in (".json", ".safetensors"))
    if not beside.exists() or not shard.exists():
        return False
    held, size, _ = read_entries(beside)
    return held == list(entries) and shard.stat().st_size == size


def _entries(batch: Batch) -> list[Entry]:
    """What will be stored of a batch's examples."""
    ids, mask = sharer_tokens(batch)
    entries = []
    for row, id in enumerate(batch.ids):
        theirs = ids[row][mask[row].bool()]
        mine = batch.receiver_ids[row][batch.receiver_mask[row].bool()][:-1]
        entries.append(Entry(id, len(theirs), len(mine), token_digest(theirs), token_digest(mine)))
    return entries


def _compute(
    plan: StorePlan, batch: Batch, entries: Sequence[Entry], sharer: Any, receiver: Any
) -> list[dict[str, Tensor]]:
    """Tensors of the batch's examples that ``entries`` begins with, in their order."""
    ids, mask = sharer_tokens(batch)
    held = prefill(sharer, ids.to(sharer.device), mask.to(sharer.device))
    theirs = [held[layer] for layer in plan.sharer_layers]
    mine = receiver_prefill(receiver, batch) if plan.with_receiver else None
    rows: list[dict[str, Tensor]] = []
    for row, id in enumerate(batch.ids):
        if len(rows) == len(entries) or entries[len(rows)].id != id:
            continue  # it has come up before
        entry = entries[len(rows)]
        rows.append({"sharer": _stacked(theirs, row, entry.sharer_tokens)})
        if mine is not None:
            rows[-1]["receiver"] = _stacked(mine, row, entry.receiver_tokens)
    return rows


def _stacked(layers: Sequence[Pair], row: int, tokens: int) -> Tensor:
    """``(L, 2, H, tokens, D)`` on the CPU: the last ``tokens`` positions of a row, which are its real ones."""
    start = layers[0][0].shape[2] - tokens
    return torch.stack([torch.stack([part[row, :, start:] for part in pair]) for pair in layers]).cpu()


def _write_shard(folder: Path, number: int, entries: Sequence[Entry], rows: Sequence[dict[str, Tensor]]) -> None:
    from safetensors.torch import save

    data = save({f"{i}.{part}": tensor for i, row in enumerate(rows) for part, tensor in row.items()})
    write_whole(folder / f"{shard_name(number)}.safetensors", data)
    write_whole(folder / f"{shard_name(number)}.json", shard_entries_bytes(entries, data))


def _token_bytes(
    settings: TrainingSettings, sharer: CacheGeometry, sharer_layers: Sequence[int], receiver: CacheGeometry
) -> tuple[int, int]:
    """Bytes of one token's keys and values in the sharer's stored layers, and in the receiver's."""
    size = DTYPES[settings.precision].itemsize
    return 2 * len(sharer_layers) * sharer.channels * size, 2 * receiver.layers * receiver.channels * size


def _size(count: int) -> str:
    """Bytes as people read them."""
    value, units = float(count), ["bytes", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{count} bytes" if units[0] == "bytes" else f"{value:.1f} {units[0]}"
