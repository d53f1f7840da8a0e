"""An adapter as a folder: ``adapter.safetensors`` and ``config.json``.

``config.json`` holds the format's version, the configuration, the kept layers, and size and SHA-256 of the
weights' file, so that damage, or a save that stopped between the two files, is told from an adapter before a
weight is used. Each file is written under another name and moved into place: a reader sees the old one or the
new one, whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .config import CacheGeometry, LCFConfig
from .errors import CheckpointError, GeometryError, LCFError

if TYPE_CHECKING:
    from .adapter import LatentCacheFlow

__all__ = ["CONFIG_FILE", "FORMAT_VERSION", "WEIGHTS_FILE", "load", "save"]

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "adapter.safetensors"
FORMAT = "lcf_fast.adapter"
FORMAT_VERSION = 1


def save(adapter: LatentCacheFlow, directory: str | os.PathLike[str]) -> None:
    """Write an adapter's two files into ``directory``, which is made if need be. Dtypes are kept."""
    from safetensors.torch import save as to_bytes

    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.state_dict().items()}
    weights = to_bytes(tensors, metadata={"format": "pt"})
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "config": adapter.config.to_dict(),
        "receiver_layers": adapter.receiver_layers.tolist(),
        "sharer_layers": adapter.sharer_layers.tolist(),
        "weights": {
            "file": WEIGHTS_FILE,
            "bytes": len(weights),
            "sha256": hashlib.sha256(weights).hexdigest(),
        },
    }
    _write(folder / WEIGHTS_FILE, weights)
    _write(folder / CONFIG_FILE, (json.dumps(description, indent=2) + "\n").encode())


def _write(path: Path, data: bytes) -> None:
    """All of it or nothing, and on the disk when this returns."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load(
    kind: type[LatentCacheFlow],
    directory: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    sharer: Any = None,
    receiver: Any = None,
) -> LatentCacheFlow:
    """Read an adapter; see `LatentCacheFlow.from_pretrained`."""
    folder = Path(directory)
    description = _description(folder / CONFIG_FILE)
    config, kept, reads = _routing(folder / CONFIG_FILE, description)
    for name, model, geometry in (("sharer", sharer, config.sharer), ("receiver", receiver, config.receiver)):
        if model is not None and (wanted := CacheGeometry.of(model)) != geometry:
            raise GeometryError(name, expected=f"an adapter for {wanted}", got=f"{folder}, for {geometry}")
    tensors = _weights(folder / WEIGHTS_FILE, description["weights"])

    # On the meta device no memory is filled with fresh parameters only to be overwritten.
    with torch.device("meta"):
        adapter = kind(config, keep_layers=kept)
    _check_tensors(folder / WEIGHTS_FILE, adapter, tensors, kept, reads)
    adapter.load_state_dict(tensors, assign=True)
    for parameter in adapter.parameters():
        parameter.requires_grad_(True)
    return adapter.to(device=device, dtype=dtype)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(str(path), expected="a readable file", got=error.strerror or str(error)) from error


def _description(path: Path) -> dict[str, Any]:
    data = _read(path)
    try:
        description = json.loads(data)
    except ValueError as error:  # no UTF-8, or no JSON
        raise CheckpointError(str(path), expected="JSON", got=str(error)) from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        got = repr(description.get("format")) if isinstance(description, dict) else type(description).__name__
        raise CheckpointError(f"{path}: format", expected=repr(FORMAT), got=got)
    version = description.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format_version", expected=str(FORMAT_VERSION), got=repr(version))
    for key, form in (
        ("config", dict),
        ("receiver_layers", list),
        ("sharer_layers", list),
        ("weights", dict),
    ):
        if not isinstance(description.get(key), form):
            got = type(description.get(key)).__name__
            raise CheckpointError(f"{path}: {key}", expected=f"a JSON {form.__name__}", got=got)
    return description


def _routing(path: Path, description: dict[str, Any]) -> tuple[LCFConfig, tuple[int, ...], tuple[int, ...]]:
    try:
        config = LCFConfig.from_dict(description["config"])
    except LCFError as error:
        raise CheckpointError(f"{path}: {error.argument}", expected=error.expected, got=error.got) from error
    layers = []
    for name, geometry in (("receiver_layers", config.receiver), ("sharer_layers", config.sharer)):
        layers.append(tuple(description[name]))
        if not all(type(t) is int and 0 <= t < geometry.layers for t in layers[-1]):
            expected = f"layers in [0, {geometry.layers})"
            raise CheckpointError(f"{path}: {name}", expected=expected, got=str(layers[-1]))
    kept, reads = layers
    if not kept or list(kept) != sorted(set(kept)):
        raise CheckpointError(f"{path}: receiver_layers", expected="ascending layers", got=str(kept))
    if len(reads) != len(kept):
        raise CheckpointError(f"{path}: sharer_layers", expected=f"{len(kept)} layers", got=str(reads))
    return config, kept, reads


def _weights(path: Path, entry: dict[str, Any]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    data = _read(path)
    if len(data) != entry.get("bytes"):
        raise CheckpointError(str(path), expected=f"{entry.get('bytes')} bytes", got=f"{len(data)} bytes")
    if hashlib.sha256(data).hexdigest() != entry.get("sha256"):
        raise CheckpointError(
            str(path),
            expected=f"the weights that {CONFIG_FILE} was written with (SHA-256)",
            got="other bytes",
        )
    try:
        tensors: dict[str, Tensor] = from_bytes(data)
    except SafetensorError as error:
        raise CheckpointError(str(path), expected="a safetensors file", got=str(error)) from error
    return tensors


def _check_tensors(
    path: Path,
    adapter: LatentCacheFlow,
    tensors: dict[str, Tensor],
    kept: tuple[int, ...],
    reads: tuple[int, ...],
) -> None:
    """Names, shapes and dtypes are those of the configuration, and the routing that of ``config.json``."""
    wanted = adapter.state_dict()
    if tensors.keys() != wanted.keys():
        raise CheckpointError(str(path), expected=f"tensors {', '.join(wanted)}", got=", ".join(sorted(tensors)))
    for name, meta in wanted.items():
        tensor = tensors[name]
        if tensor.shape != meta.shape:
            raise CheckpointError(f"{path}: {name}", expected=str(tuple(meta.shape)), got=str(tuple(tensor.shape)))
        if tensor.is_floating_point() != meta.is_floating_point():
            form = "a float dtype" if meta.is_floating_point() else "int64"
            raise CheckpointError(f"{path}: {name}", expected=form, got=str(tensor.dtype))
    for name, layers in (("receiver_layers", kept), ("sharer_layers", reads)):
        if tuple(tensors[name].tolist()) != layers:
            got = str(tensors[name].tolist())
            raise CheckpointError(f"{path}: {name}", expected=f"{layers} as in {CONFIG_FILE}", got=got)
