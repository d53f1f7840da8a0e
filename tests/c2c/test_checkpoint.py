"""The released layout: a folder written by hand as theirs is, the round trip, and all that is refused."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import Pair, make_cache
from lcf_fast import CacheGeometry
from lcf_fast.c2c import C2CConfig, C2CFuser
from lcf_fast.errors import CheckpointError, DTypeError, GeometryError

MakeFuser = Callable[..., C2CFuser]
SHARER, RECEIVER = CacheGeometry(3, 2, 4), CacheGeometry(5, 3, 6)
PAIR: dict[str, Any] = {"sharer": SHARER, "receiver": RECEIVER}


def caches() -> tuple[list[Pair], list[Pair]]:
    return make_cache(SHARER, 2, 5), make_cache(RECEIVER, 2, 5)


def same(a: list[Pair], b: list[Pair]) -> bool:
    return all(torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(change(read(path))))


def as_released(folder: Path, fuser: C2CFuser) -> None:
    """By hand, file by file: only what the description names, and init_args without what has a default."""
    folder.mkdir(parents=True, exist_ok=True)
    arguments = {
        "source_dim": 4,
        "target_dim": 6,
        "source_num_heads": 2,
        "target_num_heads": 3,
        "intermediate_dim": 10,
        "hidden_dim": 16,
        "dtype": {"__type__": "torch.dtype", "value": "float32"},
    }
    for i, projector in enumerate(fuser.projectors):
        torch.save(projector.state_dict(), folder / f"projector_{i}.pt")
        (folder / f"projector_{i}.json").write_text(json.dumps({"class": "C2CProjector", "init_args": arguments}))
    layers = {str(t): [[s, i]] for i, (t, s) in enumerate(zip(fuser.kept, fuser.reads))}
    (folder / "projector_config.json").write_text(json.dumps({"0": {"1": layers}}))


# --- what is read and written
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"layer_map": (2, 0, 1, 1, 0)}], ids=["last aligned", "map"])
def test_a_released_folder(make_fuser: MakeFuser, fields: dict[str, Any], tmp_path: Path) -> None:
    fuser = make_fuser(**fields)
    as_released(tmp_path, fuser)
    state = torch.get_rng_state()
    loaded = C2CFuser.from_pretrained(tmp_path, **PAIR)
    assert torch.equal(torch.get_rng_state(), state)
    assert loaded.config == fuser.config and not loaded.training
    assert all(p.requires_grad for p in loaded.parameters())
    sharer, receiver = caches()
    assert same(loaded.requires_grad_(False).fuse(sharer, receiver), fuser.fuse(sharer, receiver))


def test_a_side_of_one_head_may_leave_its_number_out(make_fuser: MakeFuser, tmp_path: Path) -> None:
    fuser = make_fuser(sharer=CacheGeometry(3, 1, 4), receiver=CacheGeometry(5, 1, 6))
    fuser.save_pretrained(tmp_path)
    heads = ("source_num_heads", "target_num_heads")
    for path in tmp_path.glob("projector_?.json"):
        rewrite(path, lambda d: d | {"init_args": {k: v for k, v in d["init_args"].items() if k not in heads}})
    assert C2CFuser.from_pretrained(tmp_path).config == fuser.config


def test_part_of_the_layers_and_shared_projectors(make_fuser: MakeFuser, tmp_path: Path) -> None:
    fuser = make_fuser(keep=(0, 2, 4))
    as_released(tmp_path, fuser)
    # Layers 2 and 4 take the same projector, as the layout allows.
    rewrite(tmp_path / "projector_config.json", lambda c: {"0": {"1": {**c["0"]["1"], "4": [[2, 1]]}}})
    (tmp_path / "projector_2.pt").unlink()
    loaded = C2CFuser.from_pretrained(tmp_path, **PAIR).requires_grad_(False)
    assert loaded.kept == (0, 2, 4) and loaded.projectors[1] is loaded.projectors[2]
    assert loaded.parameter_count() * 3 == fuser.parameter_count() * 2
    fuser.projectors[2] = fuser.projectors[1]
    sharer, receiver = caches()
    assert same(loaded.fuse(sharer, receiver), fuser.fuse(sharer, receiver))
    loaded.save_pretrained(tmp_path / "again")
    assert sorted(p.name for p in (tmp_path / "again").glob("*.pt")) == ["projector_0.pt", "projector_1.pt"]
    assert same(C2CFuser.from_pretrained(tmp_path / "again").fuse(sharer, receiver), fuser.fuse(sharer, receiver))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep", [None, (1, 3)])
def test_round_trip_is_bitwise(
    make_fuser: MakeFuser, dtype: torch.dtype, keep: tuple[int, ...] | None, tmp_path: Path
) -> None:
    fuser = make_fuser(keep=keep, dtype=dtype, layer_map=(2, 0, 1, 1, 0), num_layers=4, dropout=0.25)
    fuser.gate_temperature = 0.25
    fuser.save_pretrained(tmp_path / "a" / "folder")
    loaded = C2CFuser.from_pretrained(tmp_path / "a" / "folder")
    assert (loaded.config, loaded.kept, loaded.reads) == (fuser.config, fuser.kept, fuser.reads)
    assert loaded.gate_temperature == 0.25
    for name, tensor in fuser.state_dict().items():
        other = loaded.state_dict()[name]
        assert other.dtype == tensor.dtype == dtype and torch.equal(other, tensor)
    assert loaded.receiver_layers.tolist() == list(fuser.kept) and loaded.sharer_layers.tolist() == list(fuser.reads)


def test_what_is_written_is_what_they_read(make_fuser: MakeFuser, tmp_path: Path) -> None:
    fuser = make_fuser(dtype=torch.bfloat16)
    fuser.save_pretrained(tmp_path)
    assert read(tmp_path / "projector_config.json") == {
        "0": {"1": {"0": [[0, 0]], "1": [[0, 1]], "2": [[0, 2]], "3": [[1, 3]], "4": [[2, 4]]}}
    }
    assert read(tmp_path / "projector_3.json") == {
        "class": "C2CProjector",
        "init_args": {
            "source_dim": 4,
            "target_dim": 6,
            "source_num_heads": 2,
            "target_num_heads": 3,
            "intermediate_dim": 10,
            "hidden_dim": 16,
            "num_layers": 3,
            "dropout": 0.1,
            "initial_temperature": 1.0,
            "final_temperature": 0.001,
            "anneal_steps": 1929,
            "dtype": {"__type__": "torch.dtype", "value": "bfloat16"},
        },
    }
    state = torch.load(tmp_path / "projector_3.pt", weights_only=True)
    assert "key_scalar_mlp2.blocks.0.w1.weight" in state and state["gate_temperature"].shape == ()


def test_a_smaller_fuser_leaves_no_projector_of_a_larger_one(make_fuser: MakeFuser, tmp_path: Path) -> None:
    make_fuser().save_pretrained(tmp_path)
    (tmp_path / "projector_notes.txt").write_text("mine")
    make_fuser(keep=(1, 2)).save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "geometry.json",
        "projector_config.json",
        "projector_notes.txt",
        *(f"projector_{i}.{end}" for i in (0, 1) for end in ("pt", "json")),
    }
    assert C2CFuser.from_pretrained(tmp_path).kept == (1, 2)


def test_dtype_and_device(make_fuser: MakeFuser, tmp_path: Path) -> None:
    make_fuser().save_pretrained(tmp_path)
    loaded = C2CFuser.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    loaded = C2CFuser.from_pretrained(tmp_path, device="meta")
    assert {p.device.type for p in loaded.parameters()} == {"meta"}
    for dtype in (torch.int8, "bfloat16"):
        with pytest.raises(DTypeError, match=r"^dtype: "):
            C2CFuser.from_pretrained(tmp_path, dtype=dtype)  # type: ignore[arg-type]


def test_the_weights_are_not_the_file(make_fuser: MakeFuser, tmp_path: Path) -> None:
    """A parameter that stayed mapped to its file would change with it."""
    make_fuser().save_pretrained(tmp_path)
    loaded = C2CFuser.from_pretrained(tmp_path)
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    for path in tmp_path.glob("*.pt"):
        data = path.read_bytes()
        with open(path, "r+b") as file:
            file.write(b"\x55" * len(data))
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.state_dict().items())


def test_several_pairs_in_one_map(make_fuser: MakeFuser, tmp_path: Path) -> None:
    fuser = make_fuser()
    as_released(tmp_path, fuser)
    rewrite(tmp_path / "projector_config.json", lambda c: {"0": {"1": {"0": [[0, 0]]}, "2": c["0"]["1"]}})
    with pytest.raises(CheckpointError, match="sharer_name to choose among 1, 2"):
        C2CFuser.from_pretrained(tmp_path, **PAIR)
    assert C2CFuser.from_pretrained(tmp_path, **PAIR, sharer_name=1).kept == (0,)
    assert C2CFuser.from_pretrained(tmp_path, **PAIR, sharer_name="2", receiver_name="0").kept == (0, 1, 2, 3, 4)
    with pytest.raises(CheckpointError, match="an entry 7"):
        C2CFuser.from_pretrained(tmp_path, **PAIR, sharer_name=7)
    rewrite(tmp_path / "projector_config.json", lambda c: {"a": c["0"], "b": c["0"]})
    with pytest.raises(CheckpointError, match="receiver_name to choose among a, b"):
        C2CFuser.from_pretrained(tmp_path, **PAIR)


# --- what is refused
# ---------------------------------------------------------------------------------------------------


def of_map(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder / "projector_config.json", lambda c: {"0": {"1": change(c["0"]["1"])}})


def of_json(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder / "projector_2.json", change)


def of_arguments(**arguments: Any) -> Callable[[Path], None]:
    return of_json(lambda c: {**c, "init_args": {**c["init_args"], **arguments}})


def of_state(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "projector_2.pt"
        torch.save(change(torch.load(path, weights_only=True)), path)

    return apply


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('a pickle was run')",)


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no map": (lambda f: (f / "projector_config.json").unlink(), "projector_config.json"),
    "no JSON": (lambda f: (f / "projector_config.json").write_text("{"), "expected JSON"),
    "a list": (lambda f: (f / "projector_config.json").write_text("[]"), "a JSON object"),
    "no layers": (of_map(lambda c: {}), "a receiver layer or more"),
    "no number": (of_map(lambda c: {"first": [[0, 0]]}), "receiver layers as keys"),
    "two sources": (of_map(lambda c: {**c, "1": [[0, 0], [1, 1]]}), "aggregators"),
    "no pair": (of_map(lambda c: {**c, "1": [[0]]}), "two ints"),
    "negative": (of_map(lambda c: {**c, "1": [[-1, 0]]}), "two ints"),
    "no such receiver layer": (of_map(lambda c: {**c, "5": [[0, 0]]}), r"receiver layers in \[0, 5\)"),
    "no such sharer layer": (of_map(lambda c: {**c, "1": [[3, 0]]}), r"sharer layers in \[0, 3\)"),
    "no such projector": (of_map(lambda c: {**c, "1": [[0, 9]]}), "projector_9.json"),
    "no widths": (lambda f: (f / "projector_2.json").unlink(), "projector_2.json"),
    "another class": (of_json(lambda c: {**c, "class": "AllInOneProjector"}), "'C2CProjector'"),
    "no arguments": (of_json(lambda c: {"class": c["class"]}), "init_args"),
    "an unknown argument": (of_arguments(activation="relu"), "activation"),
    "no dim": (of_json(lambda c: {**c, "init_args": {"target_dim": 6, "target_num_heads": 3}}), "source_dim"),
    "a bad width": (of_arguments(hidden_dim=0), "hidden"),
    "other widths": (of_arguments(hidden_dim=32), "init_args of projector_0.json"),
    "no weights": (lambda f: (f / "projector_2.pt").unlink(), "projector_2.pt"),
    "cut short": (
        lambda f: (f / "projector_2.pt").write_bytes((f / "projector_2.pt").read_bytes()[:900]),
        "torch.save",
    ),
    "empty": (lambda f: (f / "projector_2.pt").write_bytes(b""), "torch.save"),
    "a pickle": (lambda f: (f / "projector_2.pt").write_bytes(pickle.dumps(Evil())), "torch.save"),
    "code inside": (of_state(lambda c: {**c, "key_in.weight": Evil()}), "torch.save"),
    "no state dict": (of_state(lambda c: [1, 2]), "state dict of tensors"),
    "a tensor missing": (of_state(lambda c: {k: v for k, v in c.items() if k != "key_in.bias"}), "missing key_in.bias"),
    "a tensor too many": (of_state(lambda c: {**c, "bias": torch.zeros(1)}), "unknown bias"),
    "a wrong shape": (of_state(lambda c: {**c, "value_in.bias": torch.zeros(17)}), r"value_in.bias: expected \(16,\)"),
    "no temperature": (of_state(lambda c: {**c, "gate_temperature": torch.tensor(0.0)}), "above 0"),
    "ints": (of_state(lambda c: {**c, "value_in.bias": torch.zeros(16, dtype=torch.int64)}), "float dtype"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_damage_is_named(make_fuser: MakeFuser, name: str, tmp_path: Path) -> None:
    as_released(tmp_path, make_fuser())
    damage, text = BROKEN[name]
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=text):
        C2CFuser.from_pretrained(tmp_path, **PAIR)


def test_a_missing_temperature_is_no_damage(make_fuser: MakeFuser, tmp_path: Path) -> None:
    as_released(tmp_path, make_fuser())
    of_state(lambda c: {k: v for k, v in c.items() if k != "gate_temperature"})(tmp_path)
    assert float(C2CFuser.from_pretrained(tmp_path, **PAIR).projectors[2].get_buffer("gate_temperature")) == 1.0


@pytest.mark.parametrize(
    ("pair", "argument"),
    [
        ({"receiver": RECEIVER}, "sharer"),
        ({"sharer": SHARER}, "receiver"),
        ({"sharer": CacheGeometry(3, 1, 8), "receiver": RECEIVER}, "sharer"),
        ({"sharer": SHARER, "receiver": CacheGeometry(5, 3, 8)}, "receiver"),
    ],
)
def test_other_models(make_fuser: MakeFuser, pair: dict[str, Any], argument: str, tmp_path: Path) -> None:
    as_released(tmp_path, make_fuser())
    with pytest.raises(GeometryError) as raised:
        C2CFuser.from_pretrained(tmp_path, **pair)
    assert raised.value.argument == argument


def test_a_saved_fuser_knows_its_models(make_fuser: MakeFuser, tmp_path: Path) -> None:
    make_fuser().save_pretrained(tmp_path)
    C2CFuser.from_pretrained(tmp_path, **PAIR)
    with pytest.raises(GeometryError, match="sharer"):
        C2CFuser.from_pretrained(tmp_path, sharer=CacheGeometry(4, 2, 4))
    for change, text in (
        ({"format_version": 2}, "version 1"),
        ({"sharer": {"layers": 3}}, "kv_heads"),
        ({"receiver": None}, "receiver"),
        ({"layer_map": "mine"}, "layer_map"),
        ({"layer_map": None}, "layer_map"),
    ):
        make_fuser().save_pretrained(tmp_path)
        rewrite(tmp_path / "geometry.json", lambda c, change=change: {**c, **change})  # type: ignore[misc]
        with pytest.raises(CheckpointError, match=text):
            C2CFuser.from_pretrained(tmp_path)


@pytest.mark.parametrize("calls", [0, 1, 4])
def test_a_failed_save_leaves_what_was_there(
    make_fuser: MakeFuser, calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_fuser().save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    left, write = [calls], torch.save

    def until_full(*arguments: Any) -> None:
        if not left[0]:
            raise OSError(28, "No space left on device")
        left[0] -= 1
        write(*arguments)

    monkeypatch.setattr(torch, "save", until_full)
    with pytest.raises(OSError, match="No space"):
        make_fuser(logits=[(1.0, 1.0)] * 5).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_save_that_is_killed_while_files_move_is_no_fuser(
    make_fuser: MakeFuser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of the old projectors among the new: refused, instead of being read as one."""
    make_fuser().save_pretrained(tmp_path)
    move, left = os.replace, [3]

    def until_killed(source: Any, target: Any) -> None:
        if Path(target).parent == tmp_path:
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
        move(source, target)

    monkeypatch.setattr(os, "replace", until_killed)
    with pytest.raises(KeyboardInterrupt):
        make_fuser(logits=[(1.0, 1.0)] * 5).save_pretrained(tmp_path)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"projector_config\.json"):
        C2CFuser.from_pretrained(tmp_path)
    (tmp_path / ".saving-killed").mkdir()
    make_fuser().save_pretrained(tmp_path)
    C2CFuser.from_pretrained(tmp_path)
    assert not list(tmp_path.glob(".saving-*"))


def test_models_give_their_geometry(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 16, "max_position_embeddings": 16}
    sharer = transformers.Qwen2Config(**sizes, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
    receiver = transformers.Qwen3Config(
        **sizes, num_hidden_layers=5, num_attention_heads=3, num_key_value_heads=3, head_dim=6
    )
    config = C2CConfig(CacheGeometry.of(sharer), CacheGeometry.of(receiver), hidden=16, intermediate=10)
    assert config.sharer == SHARER and config.receiver == RECEIVER
    as_released(tmp_path, C2CFuser(config))
    assert C2CFuser.from_pretrained(tmp_path, sharer=sharer, receiver=receiver).config == config
