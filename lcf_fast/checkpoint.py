"""An adapter, or a sharer's half of one, as a folder: weights in safetensors, and ``config.json``.

``config.json`` holds the format's version, the configuration, the kept layers, the digests that messages are known by,
and size and SHA-256 of the weights' file, so that damage, or a save that stopped between the two files, is told from an
adapter before a weight is used. Each file is written under another name and moved into place: a reader sees the old one
or the new one, whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from .checks import check_dtype, check_has_memory
from .config import CacheGeometry, LCFConfig, check_routing
from .errors import CheckpointError, GeometryError, LCFError
from .files import sweep, write_whole
from .fingerprint import Origin, is_digest
from .placement import PLACEMENTS, check_placement
from .reading.model_fingerprint import weights_sample

if TYPE_CHECKING:
    from .adapter import LatentCacheFlow
    from .sharer import SideOf
    from .slots import LatentSlots

    Adapter = TypeVar("Adapter", LatentCacheFlow, LatentSlots)
    Side = TypeVar("Side", bound=SideOf)

__all__ = ["CONFIG_FILE", "FORMAT_VERSION", "SIDE_FILE", "WEIGHTS_FILE"]
__all__ += ["has_slots", "load", "load_adapter", "load_any", "load_side", "save", "save_side", "template_options"]

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "adapter.safetensors"
SIDE_FILE = "sharer.safetensors"
FORMAT = "lcf_fast.adapter"
SIDE_FORMAT = "lcf_fast.sharer"
FORMAT_VERSION = 1
_ROLES = {"sharer", "receiver"}


def save(adapter: LatentCacheFlow | LatentSlots, directory: str | os.PathLike[str]) -> None:
    """Write an adapter's two files into ``directory``, which is made if need be. Dtypes are kept."""
    from .slots import LatentSlots

    description: dict[str, Any] = {"format": FORMAT, "config": adapter.config.to_dict()}
    if adapter.config.cross_context:
        description["origin"] = _origin_entry(adapter.origin)
        description["accepted_sharers"] = sorted(adapter.accepted_sharers)
    if adapter.trained_between:
        description["trained_between"] = adapter.trained_between
    if isinstance(adapter, LatentSlots) and adapter.trained_placement is not None:
        description["placement"] = check_placement(adapter.trained_placement)
    if adapter.trained_template_options is not None:
        description["template_options"] = adapter.trained_template_options
    _save(adapter, directory, WEIGHTS_FILE, description)


def save_side(side: SideOf, directory: str | os.PathLike[str]) -> None:
    """Write the two files of a sharer's half into ``directory``, which is made if need be."""
    from .slots_sharer import SlotsSharerSide

    description: dict[str, Any] = {
        "format": SIDE_FORMAT,
        "sharer": _geometry_entry(side.sharer_geometry),
        "receiver": _geometry_entry(side.receiver_geometry),
        "bottleneck": side.get_parameter("down_weight").shape[1],
        "origin": _origin_entry(side.origin),
    }
    if isinstance(side, SlotsSharerSide):
        description["slots"] = side.slot_count
        if side.per_span:
            description["per_span"] = True
    _save(side, directory, SIDE_FILE, description)


def _origin_entry(origin: Origin) -> dict[str, str]:
    return {"adapter": origin.adapter, "sharer": origin.sharer}


def _geometry_entry(geometry: CacheGeometry) -> dict[str, int]:
    return {"layers": geometry.layers, "kv_heads": geometry.kv_heads, "head_dim": geometry.head_dim}


def _save(
    module: LatentCacheFlow | LatentSlots | SideOf,
    directory: str | os.PathLike[str],
    file: str,
    description: dict[str, Any],
) -> None:
    from safetensors.torch import save as to_bytes

    check_has_memory("adapter", module.receiver_layers)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    # Copies, since parameters may be tied: safetensors writes no memory twice.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in module.state_dict().items()}
    weights = to_bytes(tensors, metadata={"format": "pt"})
    description = description | {
        "format_version": FORMAT_VERSION,
        "receiver_layers": module.receiver_layers.tolist(),
        "sharer_layers": module.sharer_layers.tolist(),
        "weights": {"file": file, "bytes": len(weights), "sha256": hashlib.sha256(weights).hexdigest()},
    }
    write_whole(folder / file, weights)
    write_whole(folder / CONFIG_FILE, (json.dumps(description, indent=2) + "\n").encode())


def load(
    kind: type[Adapter],
    directory: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    sharer: Any = None,
    receiver: Any = None,
) -> Adapter:
    """Read an adapter; see `LatentCacheFlow.from_pretrained` and `LatentSlots.from_pretrained`."""
    from .slots import LatentSlots

    folder = Path(directory)
    path = folder / CONFIG_FILE
    check_dtype(dtype)
    description, config = _read_config(path)
    if issubclass(kind, LatentSlots) != (config.slots > 0):
        serves = "LatentSlots" if config.slots else "LatentCacheFlow"
        got = f"one {'with' if config.slots else 'without'} slots: use {serves}.from_pretrained"
        raise CheckpointError(f"{path}: config.slots", expected=f"an adapter for {kind.__name__}", got=got)
    kept, reads = _routing(path, description, config.sharer, config.receiver)
    if config.slots and (len(kept), reads) != (config.receiver.layers, config.sharer_layers):
        expected = "all receiver layers, by the configuration's layer map"
        raise CheckpointError(f"{path}: receiver_layers", expected=expected, got=f"{kept} reading {reads}")
    placement = description.get("placement")  # adapters of before it was recorded do not say
    if placement not in (None, *PLACEMENTS):
        raise CheckpointError(f"{path}: placement", expected=" or ".join(PLACEMENTS), got=repr(placement)[:80])
    for name, model, geometry in (("sharer", sharer, config.sharer), ("receiver", receiver, config.receiver)):
        _check_model(name, model, geometry, folder)
    between = description.get("trained_between", {})
    if not isinstance(between, dict) or not between.keys() <= _ROLES or not all(map(is_digest, between.values())):
        raise CheckpointError(f"{path}: trained_between", expected="digests of the models", got=repr(between)[:80])
    for name, model in (("sharer", sharer), ("receiver", receiver)):
        _check_weights(name, model, between.get(name), folder)
    options = _template_options(path, description)
    origin, accepted = None, description.get("accepted_sharers", [])
    if config.cross_context and "origin" in description:  # adapters of before there were digests have none
        origin = _origin(path, description["origin"])
    if not isinstance(accepted, list) or not all(map(is_digest, accepted)):
        raise CheckpointError(f"{path}: accepted_sharers", expected="a list of digests", got=repr(accepted)[:80])
    # On the meta device no memory is filled with fresh parameters only to be overwritten.
    with _named(path), torch.device("meta"):
        adapter = kind(config) if config.slots else kind(config, keep_layers=kept)  # type: ignore[call-arg]
    _fill(adapter, folder / WEIGHTS_FILE, description["weights"], kept, reads)
    if origin is not None:
        adapter._set_origin(origin)
    adapter.accepted_sharers = frozenset(accepted)
    adapter.trained_between = dict(between)
    adapter.trained_template_options = options
    if isinstance(adapter, LatentSlots):
        adapter.trained_placement = placement
    return adapter.to(device=device, dtype=dtype).eval()


def load_any(directory: str | os.PathLike[str], **options: Any) -> Any:
    """Read what a folder holds: a `LatentCacheFlow`, a `LatentSlots`, or a sharer's half of either, by itself.

    Options and errors as those of its ``from_pretrained``; for callers who need an adapter there is `load_adapter`.
    """
    from .sharer import SharerSide
    from .slots_sharer import SlotsSharerSide

    described = _json(Path(directory) / CONFIG_FILE)
    if isinstance(described, dict) and described.get("format") == SIDE_FORMAT:
        kind = SlotsSharerSide if "slots" in described else SharerSide
        return kind.from_pretrained(directory, **options)
    return load_adapter(directory, **options)


def load_adapter(directory: str | os.PathLike[str], **options: Any) -> LatentCacheFlow | LatentSlots:
    """Read an adapter of whichever kind the folder holds. Options and errors as those of ``from_pretrained``."""
    from .adapter import LatentCacheFlow
    from .slots import LatentSlots

    _, config = _read_config(Path(directory) / CONFIG_FILE)
    if config.slots:
        return LatentSlots.from_pretrained(directory, **options)
    return LatentCacheFlow.from_pretrained(directory, **options)


def template_options(directory: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Of the chat templates that an adapter was trained with, before it is loaded; None: its folder does not say."""
    path = Path(directory) / CONFIG_FILE
    return _template_options(path, _read_config(path)[0])


def has_slots(directory: str | os.PathLike[str]) -> bool:
    """Of the adapter in a folder, before it is loaded."""
    return _read_config(Path(directory) / CONFIG_FILE)[1].slots > 0


def _template_options(path: Path, description: dict[str, Any]) -> dict[str, Any] | None:
    options = description.get("template_options")
    if not (options is None or isinstance(options, dict)):
        raise CheckpointError(f"{path}: template_options", expected="a JSON object", got=repr(options)[:80])
    return options


def _read_config(path: Path) -> tuple[dict[str, Any], LCFConfig]:
    description = _description(path, FORMAT, {"config": dict})
    with _named(path):
        return description, LCFConfig.from_dict(description["config"])


def load_side(
    kind: type[Side],
    directory: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    sharer: Any = None,
) -> Side:
    """Read a sharer's half; see `SharerSide.from_pretrained` and `SlotsSharerSide.from_pretrained`."""
    from .slots_sharer import SlotsSharerSide

    folder = Path(directory)
    path = folder / CONFIG_FILE
    check_dtype(dtype)
    description = _description(path, SIDE_FORMAT, {"sharer": dict, "receiver": dict, "bottleneck": int, "origin": dict})
    with _named(path):
        try:
            geometries = [CacheGeometry(**description[name]) for name in ("sharer", "receiver")]
        except TypeError as error:
            raise CheckpointError(str(path), expected="layers, kv_heads and head_dim", got=str(error)) from error
    has_slots = "slots" in description
    if issubclass(kind, SlotsSharerSide) != has_slots:
        got = f"one {'with' if has_slots else 'without'} slots"
        raise CheckpointError(f"{path}: slots", expected=f"a sharer's half for {kind.__name__}", got=got)
    kept, reads = _routing(path, description, *geometries)
    make: Any = kind
    own: dict[str, Any] = {"receiver_layers": kept}
    if has_slots:
        own = {"slots": description["slots"], "per_span": description.get("per_span", False)}
        if not isinstance(own["per_span"], bool):
            raise CheckpointError(f"{path}: per_span", expected="a bool", got=repr(own["per_span"])[:80])
        if len(kept) != geometries[1].layers:
            raise CheckpointError(f"{path}: receiver_layers", expected="all receiver layers", got=f"{kept}")
    origin = _origin(path, description["origin"])
    _check_model("sharer", sharer, geometries[0], folder)
    with _named(path), torch.device("meta"):
        side: Side = make(
            *geometries,
            bottleneck=description["bottleneck"],
            sharer_layers=reads,
            adapter_digest=origin.adapter,
            **own,
        )
    _fill(side, folder / SIDE_FILE, description["weights"], kept, reads)
    side._set_origin(origin)
    return side.to(device=device, dtype=dtype)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of a configuration, as errors of the file that holds it."""
    try:
        yield
    except CheckpointError:
        raise
    except LCFError as error:
        raise CheckpointError(f"{path}: {error.argument}", expected=error.expected, got=error.got) from error
    except (RuntimeError, TypeError, OverflowError) as error:  # on the meta device sizes alone can go wrong
        raise CheckpointError(str(path), expected="sizes that a tensor can have", got=str(error)[:80]) from error


def _origin(path: Path, entry: Any) -> Origin:
    parts = [entry.get(name) for name in ("adapter", "sharer")] if isinstance(entry, dict) else [None]
    if not all(map(is_digest, parts)):
        raise CheckpointError(f"{path}: origin", expected="the digests of both halves", got=repr(entry)[:80])
    return Origin(*parts)


def _check_model(name: str, model: Any, geometry: CacheGeometry, folder: Path) -> None:
    if model is not None and (wanted := CacheGeometry.of(model)) != geometry:
        raise GeometryError(name, expected=f"an adapter for {wanted}", got=f"{folder}, for {geometry}")


def _check_weights(name: str, model: Any, digest: str | None, folder: Path) -> None:
    """That a model, where it is one with weights, is the one that the adapter was trained with."""
    if digest is None or not isinstance(model, nn.Module):
        return
    found = weights_sample(model)
    if found is not None and found != digest:
        expected = f"the model that {folder} was trained with, {digest[:8]} (of another, give its geometry alone)"
        raise GeometryError(name, expected=expected, got=f"one of other weights, {found[:8]}")


def _fill(module: nn.Module, path: Path, entry: dict[str, Any], kept: tuple[int, ...], reads: tuple[int, ...]) -> None:
    """Give a module on the meta device the weights of a file, once they are known to be its."""
    tensors = _weights(path, entry)
    _check_tensors(path, module, tensors, kept, reads)
    module.load_state_dict(tensors, assign=True)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(str(path), expected="a readable file", got=error.strerror or str(error)) from error


def _json(path: Path) -> Any:
    data = _read(path)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or nested beyond reason
        raise CheckpointError(str(path), expected="JSON", got=str(error)) from error


def _description(path: Path, form: str, fields: dict[str, type]) -> dict[str, Any]:
    description = _json(path)
    if not isinstance(description, dict) or description.get("format") != form:
        got = repr(description.get("format")) if isinstance(description, dict) else type(description).__name__
        raise CheckpointError(f"{path}: format", expected=repr(form), got=got)
    version = description.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format_version", expected=str(FORMAT_VERSION), got=repr(version))
    wanted = fields | {"receiver_layers": list, "sharer_layers": list, "weights": dict}
    for key, kind in wanted.items():
        value = description.get(key)
        if not isinstance(value, kind):
            raise CheckpointError(f"{path}: {key}", expected=f"a JSON {kind.__name__}", got=type(value).__name__)
    return description


def _routing(
    path: Path, description: dict[str, Any], sharer: CacheGeometry, receiver: CacheGeometry
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    kept, reads = tuple(description["receiver_layers"]), tuple(description["sharer_layers"])
    for name, layers in (("receiver_layers", kept), ("sharer_layers", reads)):
        if not all(type(t) is int for t in layers):
            raise CheckpointError(f"{path}: {name}", expected="ints", got=str(layers))
    with _named(path):
        check_routing(kept, reads, receiver, sharer)
    return kept, reads


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
    module: nn.Module,
    tensors: dict[str, Tensor],
    kept: tuple[int, ...],
    reads: tuple[int, ...],
) -> None:
    """Names, shapes and dtypes are those of the configuration, and the routing that of ``config.json``."""
    wanted = module.state_dict()
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
