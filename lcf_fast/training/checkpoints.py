"""Checkpoints of a training run: folders that are there whole or not at all.

A checkpoint is written under another name, brought to the disk, and then renamed; deleting one renames it first. So a
kill at any moment leaves whole checkpoints, and remains that the next run removes. Each holds the adapter as
``save_pretrained`` writes it, the optimizer's state in safetensors, and ``state.json``: step, settings, and how long
the log was. Nothing is pickled. The learning rate, the gate temperature, the noise and the order of the data follow
from the settings and the step, so they have no state of their own.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import CheckpointError, GeometryError
from ..files import sync_folder, write_whole
from .failures import RunError
from .settings import TrainingSettings

if TYPE_CHECKING:
    from ..adapter import LatentCacheFlow
    from ..slots import LatentSlots

    Adapter = LatentCacheFlow | LatentSlots

__all__ = ["Checkpoint", "Checkpoints"]

FORMAT = "lcf_fast.training"
FORMAT_VERSION = 3  # 1 told the ids of the next step's examples, not what they say; 2: see `prefills`
STATE_FILE = "state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
ADAPTER_FOLDER = "adapter"
_NAME = re.compile(r"step-(\d{8,})")
_REMAINS = re.compile(r"\.step-\d{8,}\.[0-9a-f]{16}")


@dataclass(frozen=True)
class Checkpoint:
    """Where a run stands after ``step`` steps.

    Attributes:
        settings: of the run.
        log_bytes: length of the log.
        data: digest of all that the run reads.
        models: digests of the frozen models that the run has, by "sharer" and "receiver".
    """

    step: int
    settings: TrainingSettings
    log_bytes: int
    data: str
    models: dict[str, str]


class Checkpoints:
    """The checkpoints in a folder, of which the newest ``keep`` stay."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        if keep < 1:
            raise GeometryError("keep", expected="1 or more", got=str(keep))
        self.folder, self.keep = folder, keep

    def paths(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        named = [(match, path) for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name))]
        return [path for match, path in sorted(named, key=lambda pair: int(pair[0][1]))]

    def latest(self) -> Path | None:
        """The newest."""
        return next(iter(reversed(self.paths())), None)

    def sweep(self) -> None:
        """Remove what a kill left half written, half deleted, or not yet deleted."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if _REMAINS.fullmatch(path.name):
                    shutil.rmtree(path)
            self._drop_oldest()

    def save(self, checkpoint: Checkpoint, adapter: Adapter, optimizer: torch.optim.Optimizer) -> Path:
        """Write a checkpoint, then drop the oldest. One of that step that is there already is this one, and stays.

        Raises:
            RunError: it cannot be written (a full disk, no permission). Those before it are as they were.
        """
        path = self.folder / f"step-{checkpoint.step:08d}"
        if path.exists():
            return path
        temporary = self._aside(path)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            try:
                self._write(temporary, checkpoint, adapter, optimizer)
                os.rename(temporary, path)
                sync_folder(self.folder)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            self._drop_oldest()
        except OSError as error:
            kept = self.latest()
            raise RunError(
                str(path),
                expected="a checkpoint that can be written",
                got=f"{error.strerror or error}; the last good one is {kept}" if kept else f"{error.strerror or error}",
            ) from error
        return path

    def load(self, path: Path, adapter: Adapter, optimizer: torch.optim.Optimizer) -> Checkpoint:
        """Bring adapter and optimizer to where a checkpoint has them.

        Raises:
            CheckpointError: damaged, or of another form. GeometryError: of another adapter.
        """
        state = read_state(path)
        tensors = _optimizer_tensors(path, state["optimizer"])
        saved = type(adapter).from_pretrained(path / ADAPTER_FOLDER)
        same = (saved.config, saved.receiver_layers.tolist()) == (adapter.config, adapter.receiver_layers.tolist())
        if not same:
            raise GeometryError("adapter", expected=f"the one of {path}: {saved!r}", got=repr(adapter))
        adapter.load_state_dict(saved.state_dict())
        _restore(path, adapter, optimizer, tensors)
        settings = TrainingSettings.from_dict(state["settings"])
        return Checkpoint(state["step"], settings, state["log_bytes"], state["data"], state["models"])

    def _write(
        self, folder: Path, checkpoint: Checkpoint, adapter: Adapter, optimizer: torch.optim.Optimizer
    ) -> None:
        from safetensors.torch import save as to_bytes

        adapter.save_pretrained(folder / ADAPTER_FOLDER)
        tensors = {
            f"{name}.{entry}": value.detach().cpu().contiguous()
            for name, parameter in adapter.named_parameters()
            for entry, value in optimizer.state.get(parameter, {}).items()
        }
        data = to_bytes(tensors)
        write_whole(folder / OPTIMIZER_FILE, data)
        state = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "step": checkpoint.step,
            "settings": checkpoint.settings.to_dict(),
            "log_bytes": checkpoint.log_bytes,
            "data": checkpoint.data,
            "models": checkpoint.models,
            "optimizer": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()},
        }
        write_whole(folder / STATE_FILE, (json.dumps(state, indent=2) + "\n").encode())

    def _drop_oldest(self) -> None:
        for path in self.paths()[: -self.keep]:
            aside = self._aside(path)
            os.rename(path, aside)
            shutil.rmtree(aside)

    def _aside(self, path: Path) -> Path:
        return path.with_name(f".{path.name}.{secrets.token_hex(8)}")


def read_state(path: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint, its form checked."""
    file = path / STATE_FILE
    try:
        state = json.loads(file.read_bytes())
    except OSError as error:
        raise CheckpointError(str(file), expected="a readable file", got=error.strerror or str(error)) from error
    except ValueError as error:
        raise CheckpointError(str(file), expected="JSON", got=str(error)) from error
    form = (state.get("format"), state.get("format_version")) if isinstance(state, dict) else None
    if form != (FORMAT, FORMAT_VERSION):
        expected = f"{FORMAT}, version {FORMAT_VERSION} (a run of another version begins anew)"
        raise CheckpointError(str(file), expected=expected, got=repr(form))
    wanted = {"step": int, "settings": dict, "log_bytes": int, "data": str, "models": dict, "optimizer": dict}
    for name, kind in wanted.items():
        if not isinstance(state.get(name), kind):
            raise CheckpointError(f"{file}: {name}", expected=kind.__name__, got=type(state.get(name)).__name__)
    return state


def _optimizer_tensors(path: Path, entry: dict[str, Any]) -> dict[str, Tensor]:
    from safetensors.torch import load as from_bytes

    file = path / OPTIMIZER_FILE
    try:
        data = file.read_bytes()
    except OSError as error:
        raise CheckpointError(str(file), expected="a readable file", got=error.strerror or str(error)) from error
    if (len(data), hashlib.sha256(data).hexdigest()) != (entry.get("bytes"), entry.get("sha256")):
        raise CheckpointError(str(file), expected=f"what {STATE_FILE} was written with (SHA-256)", got="other bytes")
    tensors: dict[str, Tensor] = from_bytes(data)
    return tensors


def _restore(
    path: Path, adapter: Adapter, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    """The optimizer's state by its parameters' names; the numbers in its groups follow from the settings."""
    names = {parameter: name for name, parameter in adapter.named_parameters()}
    described = optimizer.state_dict()
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, entry = key.rpartition(".")
        if name not in order:
            raise CheckpointError(str(path / OPTIMIZER_FILE), expected=f"state of {', '.join(order)}", got=key)
        state.setdefault(order.index(name), {})[entry] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": described["param_groups"]})
