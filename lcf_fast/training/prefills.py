"""Frozen prefills on disk: what the two models' caches of a data set are, computed once (`lcf-fast cache`).

A store is a folder: ``manifest.json`` says which models, layers and examples it is for, ``shard-00000.safetensors``
and so on hold the caches, and beside each shard ``shard-00000.json`` names its examples and its SHA-256. An example's
caches are stored without padding: of the sharer ``(S, 2, Hs, M, Ds)`` for the S layers that an adapter reads (the
queries of LCF-X's pool are trained, so it needs the tokens' keys and values, too), of the receiver
``(Lr, 2, Hr, N - 1, Dr)`` for the prompt but its last token, all layers, since the response attends to all. Keys come
with their rotation, which counts real tokens only, so they fit any padding.

The caches are the bits that the models gave when the store was made. A batch that then had the same examples (all of a
run's first epoch has) gives bitwise the loss of the models themselves; in later epochs, where an example stands beside
others and is padded otherwise, the models round otherwise, and losses agree to that rounding.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..caches import Pair
from ..config import CacheGeometry
from ..reading.model_fingerprint import model_fingerprint
from ..reading.prefill import DTYPES
from .failures import RunError
from .settings import TrainingSettings
from .step import Prefill, receiver_prefill, sharer_tokens

if TYPE_CHECKING:
    from ..adapter import LatentCacheFlow
    from ..slots import LatentSlots
    from .batches import Batch

__all__ = ["Entry", "Manifest", "StoredPrefills", "token_digest"]

FORMAT = "lcf_fast.prefills"
FORMAT_VERSION = 3  # 1 did not hold what a run tells of its sharer; 2 could be of models with rounded rotations
MANIFEST = "manifest.json"
_OPEN_SHARDS = 8


def token_digest(ids: Tensor) -> str:
    """16 hex digits of token ids ``(n,)``."""
    return hashlib.sha256(" ".join(map(str, ids.tolist())).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Entry:
    """One example in a store: how many tokens of each model are stored, and digests of the ids that they are of."""

    id: str
    sharer_tokens: int
    receiver_tokens: int
    sharer_digest: str
    receiver_digest: str


@dataclass(frozen=True)
class Manifest:
    """What a store is for, and how much of it there is.

    Attributes:
        precision: of the models and the caches, "bf16" or "fp32".
        sharer, receiver: ``(layers, KV heads, head dim)``.
        sharer_layers: layers that are stored, ascending.
        with_receiver: whether the receiver's caches are stored as well.
        sharer_fingerprint, receiver_fingerprint: see `lcf_fast.reading.model_fingerprint`.
        sharer_sample, sharer_weights: what `model_sample` and `weights_sample` there say of the sharer, for the
            checkpoints and the adapter of a run that never sees it.
        examples, shards: how many.
        tensor_bytes: of all caches together.
        plan: digest of which examples are in which shard.
    """

    precision: str
    sharer: tuple[int, int, int]
    receiver: tuple[int, int, int]
    sharer_layers: tuple[int, ...]
    with_receiver: bool
    sharer_fingerprint: str
    receiver_fingerprint: str
    sharer_sample: str
    sharer_weights: str
    examples: int
    shards: int
    tensor_bytes: int
    plan: str

    def to_bytes(self) -> bytes:
        described = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        return (json.dumps(described, indent=2) + "\n").encode()

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a store.

        Raises:
            RunError: there is none, or not of a form that this version knows.
        """
        path = folder / MANIFEST
        found = _read_json(path)
        form = (found.get("format"), found.get("format_version"))
        if form != (FORMAT, FORMAT_VERSION):
            expected = f"{FORMAT}, version {FORMAT_VERSION} (a store of another version is made anew by lcf-fast cache)"
            raise RunError(f"{path}: format", expected=expected, got=repr(form))
        values: dict[str, Any] = {}
        for field in fields(cls):
            value = found.get(field.name)
            values[field.name] = tuple(value) if isinstance(value, list) else value
            wanted = {"str": str, "int": int, "bool": bool}.get(str(field.type), tuple)
            if type(values[field.name]) is not wanted:
                raise RunError(f"{path}: {field.name}", expected=str(field.type), got=repr(value)[:80])
        return cls(**values)


def shard_name(number: int) -> str:
    return f"shard-{number:05d}"


def read_entries(path: Path) -> tuple[list[Entry], int, str]:
    """The examples, the bytes and the SHA-256 of a shard, off the JSON file beside it."""
    found = _read_json(path)
    try:
        entries = [Entry(**entry) for entry in found["examples"]]
        return entries, int(found["bytes"]), str(found["sha256"])
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(str(path), expected="a shard's examples, bytes and sha256", got=f"{error!r}"[:80]) from error


def shard_entries_bytes(entries: Sequence[Entry], data: bytes) -> bytes:
    """The JSON file beside a shard."""
    described = {
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "examples": [asdict(entry) for entry in entries],
    }
    return (json.dumps(described) + "\n").encode()


class StoredPrefills:
    """Prefills out of a store, in place of the models' own: a `Trainer`'s ``prefiller``.

    Args:
        folder: written whole by `lcf_fast.training.caching.write_prefills`.
        adapter: that will be trained.
        receiver: the model; it prefills the prompts where the store has only the sharer's caches.
        settings: of the run.
        sharer: the model that the run names as its sharer; held against the store and not kept. None: not known.

    Raises:
        RunError: no store, one that is not finished, or one for other models, layers or another precision; later, at a
            batch: an example that is not in it or has other tokens, a damaged shard.
    """

    def __init__(
        self,
        folder: Path | str,
        adapter: LatentCacheFlow | LatentSlots,
        receiver: Any,
        settings: TrainingSettings | None = None,
        *,
        sharer: Any = None,
    ) -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder)
        self._receiver = receiver
        self._check(adapter, TrainingSettings() if settings is None else settings)
        self._check_model("receiver", receiver, self.manifest.receiver_fingerprint)
        if sharer is not None:
            self._check_model("sharer", sharer, self.manifest.sharer_fingerprint)
        self._places: dict[str, tuple[int, int, Entry]] = {}
        self._sums: list[tuple[int, str]] = []
        missing = [n for n in range(self.manifest.shards) if not (self.folder / f"{shard_name(n)}.json").exists()]
        if missing:
            got = f"{self.manifest.shards - len(missing)}, {shard_name(missing[0])} not among them"
            expected = f"{self.manifest.shards} finished shards (lcf-fast cache goes on where it stopped)"
            raise RunError(str(self.folder), expected=expected, got=got)
        for number in range(self.manifest.shards):
            entries, size, digest = read_entries(self.folder / f"{shard_name(number)}.json")
            self._sums.append((size, digest))
            self._places |= {entry.id: (number, i, entry) for i, entry in enumerate(entries)}
        self._verified: set[int] = set()
        self._open: OrderedDict[int, Any] = OrderedDict()

    def __call__(self, batch: Batch) -> Prefill:
        """The batch's caches, padded as its tokens are, on the receiver's device."""
        geometry, layers = CacheGeometry(*self.manifest.sharer), self.manifest.sharer_layers
        _, mask = sharer_tokens(batch)
        theirs = _Padded(len(layers), geometry, mask.shape, DTYPES[self.manifest.precision])
        for row, id in enumerate(batch.ids):
            number, index, entry = self._place(id)
            self._check_tokens(batch, row, entry)
            # Where rows of the batch align and this one's two sequences are one, it has a last token that no position
            # of the prompt reads; the store may hold it or not.
            theirs.put(row, self._shard(number).get_tensor(f"{index}.sharer"), int(mask[row].sum()))
        device = self._receiver.device
        read = dict(zip(layers, theirs.pairs(device)))
        nothing = torch.zeros((), dtype=theirs.dtype, device=device).expand(theirs.layer_shape)
        sharer = [read.get(layer, (nothing, nothing)) for layer in range(geometry.layers)]
        return Prefill(sharer, lambda: self._receiver_pairs(batch))

    def _receiver_pairs(self, batch: Batch) -> list[Pair]:
        if not self.manifest.with_receiver:
            return receiver_prefill(self._receiver, batch)
        geometry, length = CacheGeometry(*self.manifest.receiver), batch.receiver_ids.shape[1] - 1
        mine = _Padded(geometry.layers, geometry, (len(batch.ids), length), DTYPES[self.manifest.precision])
        for row, id in enumerate(batch.ids):
            number, index, entry = self._place(id)
            mine.put(row, self._shard(number).get_tensor(f"{index}.receiver"), entry.receiver_tokens)
        return mine.pairs(self._receiver.device)

    # --- checks

    def _check(self, adapter: LatentCacheFlow | LatentSlots, settings: TrainingSettings) -> None:
        manifest, config = self.manifest, adapter.config
        wanted: dict[str, tuple[Any, Any]] = {
            "sharer": (_sizes(config.sharer), manifest.sharer),
            "receiver": (_sizes(config.receiver), manifest.receiver),
            "precision": (settings.precision, manifest.precision),
        }
        for name, (mine, stored) in wanted.items():
            if mine != stored:
                raise RunError(f"{self.folder}: {name}", expected=f"{mine} as the run has it", got=str(stored))
        unread = sorted(set(adapter.sharer_layers.tolist()) - set(manifest.sharer_layers))
        if unread:
            got = f"without {unread}: lcf-fast cache with the adapter's layer map and layers stores those"
            raise RunError(f"{self.folder}: sharer_layers", expected="the layers that the adapter reads", got=got)

    def _check_model(self, role: str, model: Any, stored: str) -> None:
        if (found := model_fingerprint(model, self.manifest.precision)) != stored:
            expected = f"{stored}, the {role} that the store was made with"
            raise RunError(role, expected=expected, got=f"{found}, a model of other weights or configuration")

    def _place(self, id: str) -> tuple[int, int, Entry]:
        if id not in self._places:
            raise RunError(str(self.folder), expected=f"the example {id!r}", got=f"{len(self._places)} others")
        return self._places[id]

    def _check_tokens(self, batch: Batch, row: int, entry: Entry) -> None:
        theirs = batch.sharer_ids[row][batch.sharer_mask[row].bool()]
        mine = batch.receiver_ids[row][batch.receiver_mask[row].bool()][:-1]
        same = token_digest(theirs[: entry.sharer_tokens]) == entry.sharer_digest
        # Of shared context a store may lack the last token, which no position of the prompt reads.
        further = len(theirs) - entry.sharer_tokens - (1 if batch.spans is None else 0)
        if not same or further > 0 or token_digest(mine) != entry.receiver_digest:
            expected = "the tokens that the store was made with (the same data, tokenizers and templates)"
            raise RunError(f"{self.folder}: example {entry.id!r}", expected=expected, got="others")

    def _shard(self, number: int) -> Any:
        from safetensors import safe_open

        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        path = self.folder / f"{shard_name(number)}.safetensors"
        try:
            if number not in self._verified:
                _verify(path, *self._sums[number])
                self._verified.add(number)
            shard = self._open[number] = safe_open(path, framework="pt")
        except OSError as error:
            raise RunError(str(path), expected="a readable shard", got=error.strerror or str(error)) from error
        if len(self._open) > _OPEN_SHARDS:
            self._open.popitem(last=False)
        return shard


class _Padded:
    """Caches of a batch under construction: padded on the left with zeros, ``(L, 2, B, H, N, D)``."""

    def __init__(self, layers: int, geometry: CacheGeometry, rows: Sequence[int], dtype: torch.dtype) -> None:
        batch, length = rows
        self.dtype, self.layer_shape = dtype, (batch, geometry.kv_heads, length, geometry.head_dim)
        self._stacked = torch.zeros((layers, 2, *self.layer_shape), dtype=dtype, device="cpu")

    def put(self, row: int, stored: Tensor, tokens: int) -> None:
        """The first of the ``stored (L, 2, H, n, D)`` tokens, as a row that has ``tokens`` real ones at its end."""
        count, start = min(tokens, stored.shape[3]), self.layer_shape[2] - tokens
        self._stacked[:, :, row, :, start : start + count] = stored[:, :, :, :count]

    def pairs(self, device: torch.device) -> list[Pair]:
        moved = self._stacked.to(device)
        return [(layer[0], layer[1]) for layer in moved]


def _sizes(geometry: CacheGeometry) -> tuple[int, int, int]:
    return geometry.layers, geometry.kv_heads, geometry.head_dim


def _verify(path: Path, size: int, digest: str) -> None:
    """Raises RunError unless a file has this size and SHA-256."""
    found = path.stat().st_size
    if found != size:
        raise RunError(str(path), expected=f"{size:,} bytes", got=f"{found:,} bytes")
    hashed = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            hashed.update(block)
    if hashed.hexdigest() != digest:
        raise RunError(str(path), expected="the bytes that were stored (SHA-256)", got="others: the file is damaged")


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise RunError(str(path), expected="a readable file", got=error.strerror or str(error)) from error
    except ValueError as error:
        raise RunError(str(path), expected="JSON", got=str(error)) from error
    if not isinstance(found, dict):
        raise RunError(str(path), expected="a JSON object", got=type(found).__name__)
    return found
