"""A fuser as a folder, in the layout of the released ones.

``projector_config.json`` maps layers: ``{receiver: {sharer: {receiver_layer: [[sharer_layer, projector]]}}}``, all keys
strings. Projector ``i`` is ``projector_i.pt``, a state dict, and ``projector_i.json``, its class and widths
(``{"class": "C2CProjector", "init_args": {...}}``). How many layers the two models have stands in neither, so what is
written here has ``geometry.json`` beside them, which the released code does not look at.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..checks import check_dtype
from ..config import CacheGeometry, layer_map
from ..errors import CheckpointError, GeometryError, LCFError
from ..files import whole_file, write_whole
from .config import C2CConfig

if TYPE_CHECKING:
    from .fuser import C2CFuser

__all__ = ["GEOMETRY_FILE", "MAP_FILE", "load", "save"]

MAP_FILE = "projector_config.json"
GEOMETRY_FILE = "geometry.json"
CLASS = "C2CProjector"
FORMAT = "lcf_fast.c2c"
FORMAT_VERSION = 1
#: The keys that their code, and so what is written here, gives receiver and sharer: indices of a list of models.
RECEIVER_NAME, SHARER_NAME = "0", "1"
#: Their names of a projector's widths, with their defaults, by ours.
_WIDTHS = {
    "hidden": ("hidden_dim", 1024),
    "intermediate": ("intermediate_dim", 1024),
    "num_layers": ("num_layers", 3),
    "dropout": ("dropout", 0.1),
    "initial_temperature": ("initial_temperature", 1.0),
    "final_temperature": ("final_temperature", 0.001),
    "anneal_steps": ("anneal_steps", 1929),
}
#: Their names of what a geometry holds, by our fields; the head counts may be left out, and are 1 then.
_SIDES = {
    "sharer": {"kv_heads": "source_num_heads", "head_dim": "source_dim"},
    "receiver": {"kv_heads": "target_num_heads", "head_dim": "target_dim"},
}
_BUFFER = "gate_temperature"
#: Of the folder that a save writes to first; a kill may leave one.
_ASIDE = ".saving-"


def save(fuser: C2CFuser, directory: str | os.PathLike[str]) -> None:
    """Write a fuser into ``directory``, which is made if need be; projectors of another one there are removed."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    # All files are written before the first is moved, and while they are moved there is no map: what a full disk leaves
    # is the old fuser, and what a kill leaves is never taken for one.
    for left in folder.glob(f"{_ASIDE}*"):
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=folder, prefix=_ASIDE) as name:
        count = _write(fuser, Path(name))
        (folder / MAP_FILE).unlink(missing_ok=True)
        for path in sorted(Path(name).iterdir(), key=lambda path: path.name == MAP_FILE):
            os.replace(path, folder / path.name)
    _remove_others(folder, count)


def _write(fuser: C2CFuser, folder: Path) -> int:
    """All files of a fuser; the number of its projectors."""
    config = fuser.config
    index: dict[int, int] = {}  # projectors that layers share are written once
    for projector in fuser.projectors:
        if id(projector) in index:
            continue
        i = index[id(projector)] = len(index)
        state = {name: tensor.detach().cpu().clone() for name, tensor in projector.state_dict().items()}
        with whole_file(folder / f"projector_{i}.pt") as file:
            torch.save(state, file)
        dtype = {"__type__": "torch.dtype", "value": str(next(projector.parameters()).dtype).removeprefix("torch.")}
        arguments = {theirs: getattr(config, ours) for ours, (theirs, _) in _WIDTHS.items()}
        for side, names in _SIDES.items():
            arguments |= {theirs: getattr(getattr(config, side), ours) for ours, theirs in names.items()}
        _write_json(folder / f"projector_{i}.json", {"class": CLASS, "init_args": arguments | {"dtype": dtype}})
    spec = config.layer_map
    sides = {side: _entry(getattr(config, side)) for side in _SIDES}
    described = {"format": FORMAT, "format_version": FORMAT_VERSION, **sides}
    _write_json(folder / GEOMETRY_FILE, described | {"layer_map": spec if isinstance(spec, str) else list(spec)})
    layers = {str(t): [[s, index[id(projector)]]] for t, s, projector in zip(fuser.kept, fuser.reads, fuser.projectors)}
    _write_json(folder / MAP_FILE, {RECEIVER_NAME: {SHARER_NAME: layers}})
    return len(index)


def _entry(geometry: CacheGeometry) -> dict[str, int]:
    return {field.name: getattr(geometry, field.name) for field in fields(geometry)}


def _write_json(path: Path, value: Any) -> None:
    write_whole(path, (json.dumps(value, indent=2) + "\n").encode())


def _remove_others(folder: Path, count: int) -> None:
    # The released code counts the files that are there.
    for path in folder.iterdir():
        match = re.fullmatch(r"projector_(\d+)\.(pt|json)", path.name)
        if match and int(match[1]) >= count:
            path.unlink()


def load(
    kind: type[C2CFuser],
    directory: str | os.PathLike[str],
    *,
    sharer: Any,
    receiver: Any,
    sharer_name: str | int | None,
    receiver_name: str | int | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> C2CFuser:
    """Read a fuser; see `C2CFuser.from_pretrained`."""
    check_dtype(dtype)
    folder = Path(directory)
    routes = _routes(folder / MAP_FILE, receiver_name, sharer_name)
    saved = _geometry_file(folder / GEOMETRY_FILE)
    pair = {"sharer": sharer, "receiver": receiver}
    geometries = {side: _geometry(side, model, saved, folder) for side, model in pair.items()}
    reads = {t: s for t, (s, _) in routes.items()}
    spec = _map_of(folder / MAP_FILE, reads, geometries, saved)
    needed = sorted({i for _, i in routes.values()})
    config = _config(folder, needed, geometries, spec)
    # On the meta device no memory is filled with fresh parameters only to be overwritten.
    with torch.device("meta"):
        fuser = kind(config, keep_layers=routes)
    modules = dict(zip(needed, fuser.projectors))
    for i, module in modules.items():
        _fill(folder / f"projector_{i}.pt", module, config, device, dtype)
    # Layers may share a projector.
    fuser.projectors = nn.ModuleList(modules[routes[t][1]] for t in fuser.kept)
    for name, layers in (("receiver_layers", fuser.kept), ("sharer_layers", fuser.reads)):
        fuser.register_buffer(name, torch.tensor(layers, dtype=torch.int64, device=device), persistent=False)
    temperature = fuser.projectors[0].get_buffer(_BUFFER)
    if temperature.device.type != "meta":
        fuser.gate_temperature = float(temperature)
    return fuser.eval()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(str(path), expected="a readable file", got=error.strerror or str(error)) from error
    except ValueError as error:  # no UTF-8, or no JSON
        raise CheckpointError(str(path), expected="JSON", got=str(error)) from error
    if not isinstance(value, dict):
        raise CheckpointError(str(path), expected="a JSON object", got=type(value).__name__)
    return value


def _choose(where: str, entries: dict[str, Any], name: str | int | None, argument: str) -> tuple[str, dict[str, Any]]:
    """The entry of that name, or the only one."""
    if name is None:
        if len(entries) != 1:
            expected = f"one entry, or {argument} to choose among {', '.join(entries) or 'none'}"
            raise CheckpointError(where, expected=expected, got=f"{len(entries)} entries")
        (name,) = entries
    if str(name) not in entries:
        raise CheckpointError(where, expected=f"an entry {name!s} ({argument})", got=", ".join(entries) or "none")
    entry = entries[str(name)]
    where = f"{where}[{str(name)!r}]"
    if not isinstance(entry, dict):
        raise CheckpointError(where, expected="a JSON object", got=type(entry).__name__)
    return where, entry


def _routes(path: Path, receiver_name: str | int | None, sharer_name: str | int | None) -> dict[int, tuple[int, int]]:
    """By receiver layer, ascending: the sharer layer that it reads, and its projector."""
    where, sharers = _choose(str(path), _read_json(path), receiver_name, "receiver_name")
    where, layers = _choose(where, sharers, sharer_name, "sharer_name")
    if not layers:
        raise CheckpointError(where, expected="a receiver layer or more", got="none")
    routes = {}
    for name, pairs in layers.items():
        if not name.isdecimal():
            raise CheckpointError(where, expected="receiver layers as keys", got=repr(name))
        if not isinstance(pairs, list) or len(pairs) != 1:
            got = f"{len(pairs)} of them" if isinstance(pairs, list) else type(pairs).__name__
            expected = "one [sharer layer, projector] (aggregators of several are not served)"
            raise CheckpointError(f"{where}[{name!r}]", expected=expected, got=got)
        pair = pairs[0]
        if not isinstance(pair, list) or len(pair) != 2 or not all(type(n) is int and n >= 0 for n in pair):
            raise CheckpointError(f"{where}[{name!r}]", expected="[sharer layer, projector], two ints", got=repr(pair))
        routes[int(name)] = (pair[0], pair[1])
    return dict(sorted(routes.items()))


def _geometry_file(path: Path) -> dict[str, Any] | None:
    """``geometry.json``, its geometries made; None where there is none, as in a released fuser."""
    if not path.exists():
        return None
    found = _read_json(path)
    form = found.get("format"), found.get("format_version")
    if form != (FORMAT, FORMAT_VERSION):
        raise CheckpointError(str(path), expected=f"{FORMAT}, version {FORMAT_VERSION}", got=repr(form))
    for side in _SIDES:
        try:
            found[side] = CacheGeometry(**found[side])
        except (LCFError, TypeError, KeyError) as error:
            expected = "layers, kv_heads and head_dim"
            raise CheckpointError(f"{path}: {side}", expected=expected, got=str(error)) from error
    return found


def _geometry(side: str, model: Any, saved: dict[str, Any] | None, folder: Path) -> CacheGeometry:
    if model is None:
        if saved is None:
            expected = f"the {side} or its CacheGeometry: the folder does not say how many layers it has"
            raise GeometryError(side, expected=expected, got="None")
        found: CacheGeometry = saved[side]
        return found
    given = CacheGeometry.of(model)
    if saved is not None and saved[side] != given:
        raise GeometryError(side, expected=f"a fuser for {given}", got=f"{folder}, for {saved[side]}")
    return given


def _map_of(
    path: Path, reads: Mapping[int, int], geometries: Mapping[str, CacheGeometry], saved: dict[str, Any] | None
) -> str | tuple[int, ...]:
    """The layer map with these entries: as it was saved where that has them, else of each layer; layers checked."""
    for side, layers in (("receiver", reads.keys()), ("sharer", reads.values())):
        wrong = sorted({layer for layer in layers if layer >= geometries[side].layers})
        if wrong:
            expected = f"{side} layers in [0, {geometries[side].layers}), the {side}'s"
            raise CheckpointError(str(path), expected=expected, got=", ".join(map(str, wrong)))
    spec = "last_aligned" if saved is None else saved.get("layer_map")
    try:
        resolved = list(layer_map(spec, geometries["sharer"].layers, geometries["receiver"].layers))  # type: ignore[arg-type]
    except LCFError as error:
        where = f"{path.with_name(GEOMETRY_FILE)}: {error.argument}"
        raise CheckpointError(where, expected=error.expected, got=error.got) from error
    if isinstance(spec, str) and all(resolved[t] == s for t, s in reads.items()):
        return spec
    for t, s in reads.items():
        resolved[t] = s
    return tuple(resolved)


def _config(
    folder: Path, needed: list[int], geometries: Mapping[str, CacheGeometry], spec: str | tuple[int, ...]
) -> C2CConfig:
    """What all the projectors' JSON files say, which must be one thing, and that of these models."""
    config: C2CConfig | None = None
    for i in needed:
        path = folder / f"projector_{i}.json"
        arguments = _init_args(path)
        for side, names in _SIDES.items():
            found = {ours: arguments.get(theirs, 1) for ours, theirs in names.items()}
            geometry = geometries[side]
            if found != {"kv_heads": geometry.kv_heads, "head_dim": geometry.head_dim}:
                got = f"{path}, for {found['kv_heads']} KV heads of {found['head_dim']}"
                raise GeometryError(side, expected=f"projectors for {geometry}", got=got)
        widths = {ours: arguments.get(theirs, default) for ours, (theirs, default) in _WIDTHS.items()}
        try:
            one = C2CConfig(geometries["sharer"], geometries["receiver"], layer_map=spec, **widths)
        except LCFError as error:
            raise CheckpointError(f"{path}: {error.argument}", expected=error.expected, got=error.got) from error
        if config is not None and one != config:
            raise CheckpointError(str(path), expected=f"the init_args of projector_{needed[0]}.json", got="others")
        config = one
    assert config is not None  # a layer map has an entry
    return config


def _init_args(path: Path) -> dict[str, Any]:
    described = _read_json(path)
    if described.get("class") != CLASS:
        raise CheckpointError(f"{path}: class", expected=f"{CLASS!r}", got=repr(described.get("class")))
    arguments = described.get("init_args")
    if not isinstance(arguments, dict):
        raise CheckpointError(f"{path}: init_args", expected="a JSON object", got=type(arguments).__name__)
    known = {
        "dtype",
        *(theirs for theirs, _ in _WIDTHS.values()),
        *(n for side in _SIDES.values() for n in side.values()),
    }
    unknown = sorted(set(arguments) - known)
    if unknown:
        raise CheckpointError(f"{path}: init_args", expected=f"only {', '.join(sorted(known))}", got=", ".join(unknown))
    missing = [name for name in ("source_dim", "target_dim") if name not in arguments]
    if missing:
        raise CheckpointError(f"{path}: init_args", expected=", ".join(missing), got="nothing of the name")
    return arguments


def _fill(
    path: Path, module: nn.Module, config: C2CConfig, device: torch.device | str | None, dtype: torch.dtype | None
) -> None:
    """Give a projector on the meta device the weights of a file, once they are known to be its."""
    tensors = _state_dict(path)
    wanted = module.state_dict()
    if _BUFFER not in tensors:  # what annealing reached says nothing to inference
        tensors[_BUFFER] = torch.tensor(config.initial_temperature, device="cpu")
    if tensors.keys() != wanted.keys():
        missing = ", ".join(sorted(wanted.keys() - tensors.keys())) or "none"
        more = ", ".join(sorted(tensors.keys() - wanted.keys())) or "none"
        raise CheckpointError(str(path), expected=f"the tensors of a {CLASS}", got=f"missing {missing}, unknown {more}")
    for name, meta in wanted.items():
        if tensors[name].shape != meta.shape:
            got = str(tuple(tensors[name].shape))
            raise CheckpointError(f"{path}: {name}", expected=str(tuple(meta.shape)), got=got)
        if not tensors[name].is_floating_point():
            raise CheckpointError(f"{path}: {name}", expected="a float dtype", got=str(tensors[name].dtype))
    if not 0 < float(tensors[_BUFFER]) < math.inf:
        got = str(float(tensors[_BUFFER]))
        raise CheckpointError(f"{path}: {_BUFFER}", expected="a finite number above 0", got=got)
    # Copies: a parameter that stays a view of the file would change, or crash, with it.
    copies = {name: tensor.to(device=device, dtype=dtype, copy=True) for name, tensor in tensors.items()}
    module.load_state_dict(copies, assign=True)


def _state_dict(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(str(path), expected="a readable file", got="none")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(str(path), expected="a state dict that torch.save wrote", got=reason) from error
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise CheckpointError(str(path), expected="a state dict of tensors", got=type(found).__name__)
    return dict(found)
