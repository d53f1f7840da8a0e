"""An adapter as a folder: round trip, size on disk, atomic writes, damage told before a weight is used."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import RECEIVER, SHARER, assert_equal, make_adapter, make_caches
from safetensors.torch import load_file, save_file

from lcf_fast import (
    CacheGeometry,
    CheckpointError,
    DeviceError,
    DTypeError,
    GeometryError,
    LatentCacheFlow,
    LatentSlots,
    LCFConfig,
    LCFError,
    SharerSide,
    checkpoint,
)
from lcf_fast.checkpoint import load_adapter, template_options
from lcf_fast.reading.model_fingerprint import weights_sample

QWEN25, QWEN3 = CacheGeometry(24, 2, 64), CacheGeometry(28, 8, 128)
NINE = (6, 8, 9, 10, 15, 16, 17, 19, 21)  # the paper's best nine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("cross_context", [False, True])
@pytest.mark.parametrize("keep", [None, [0, 2, 3]])
def test_round_trip_is_bitwise(dtype: torch.dtype, cross_context: bool, keep: list[int] | None, tmp_path: Path) -> None:
    adapter = make_adapter(cross_context, keep=keep, dtype=dtype, layer_map=(2, 0, 1, 1, 0), norm_eps=1e-5)
    adapter.save_pretrained(tmp_path / "new" / "folder")
    again = LatentCacheFlow.from_pretrained(tmp_path / "new" / "folder")
    assert again.config == adapter.config
    assert list(again.state_dict()) == list(adapter.state_dict())
    for name, tensor in adapter.state_dict().items():
        assert again.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(again.state_dict()[name], tensor)
    assert all(isinstance(p, torch.nn.Parameter) and p.requires_grad for p in again.parameters())
    sharer, receiver = make_caches()
    again.requires_grad_(False)  # as make_adapter's are: a graph takes another path
    if cross_context:
        assert_equal(
            again.inject(receiver, again.summarize(sharer)), adapter.inject(receiver, adapter.summarize(sharer))
        )
    else:
        assert_equal(again.fuse(sharer, receiver), adapter.fuse(sharer, receiver))


def test_dtype_and_device_on_loading(tmp_path: Path) -> None:
    make_adapter(dtype=torch.bfloat16).save_pretrained(str(tmp_path))
    assert LatentCacheFlow.from_pretrained(str(tmp_path)).gate_logit.dtype == torch.bfloat16
    adapter = LatentCacheFlow.from_pretrained(tmp_path, dtype=torch.float32, device="meta")
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    assert {t.device.type for t in adapter.state_dict().values()} == {"meta"}
    assert adapter.receiver_layers.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64, "float16", 16])
def test_dtypes_that_no_adapter_has(dtype: Any, tmp_path: Path) -> None:
    adapter = make_adapter(True)
    adapter.save_pretrained(tmp_path / "adapter")
    adapter.sharer_side().save_pretrained(tmp_path / "side")
    for kind, name in ((LatentCacheFlow, "adapter"), (SharerSide, "side")):
        with pytest.raises(DTypeError, match=r"^dtype: expected a float dtype of torch, or None"):
            kind.from_pretrained(tmp_path / name, dtype=dtype)


def test_tied_parameters_are_saved_each(tmp_path: Path) -> None:
    adapter = make_adapter(True)
    adapter.register_parameter("global_query", adapter.get_parameter("span_query"))
    adapter.up_bias = torch.nn.Parameter(adapter.get_parameter("up_weight").data[..., 0])  # a view into another
    adapter.save_pretrained(tmp_path)
    loaded = LatentCacheFlow.from_pretrained(tmp_path)
    for name, tensor in adapter.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_an_adapter_without_memory_cannot_be_saved(tmp_path: Path) -> None:
    for cross_context in (False, True):
        with pytest.raises(DeviceError, match="expected a device with memory, got meta"):
            make_adapter(cross_context).to("meta").save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("cross_context", [False, True])
@pytest.mark.parametrize("size", [10**30, 2**40])
def test_sizes_beyond_any_tensor(size: int, cross_context: bool, tmp_path: Path) -> None:
    adapter = make_adapter(cross_context)
    (adapter.sharer_side() if cross_context else adapter).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    description = json.loads(path.read_text())
    description.get("config", description)["bottleneck"] = size
    path.write_text(json.dumps(description))
    with pytest.raises(CheckpointError):
        checkpoint.load_any(tmp_path)


@pytest.mark.parametrize("side", ["sharer", "receiver"])
def test_layers_beyond_any_model_are_not_listed(side: str, tmp_path: Path) -> None:
    """A layer map of so many would take all memory before anything were found wrong."""
    make_adapter().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    description = json.loads(path.read_text())
    description["config"][side]["layers"] = 10**7
    path.write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match="at most 4096"):
        checkpoint.load_any(tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"config": ' * 100_000])
def test_json_nested_beyond_reason(text: str, tmp_path: Path) -> None:
    make_adapter().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="JSON"):
        LatentCacheFlow.from_pretrained(tmp_path)


def test_loading_leaves_the_random_state_alone(tmp_path: Path) -> None:
    make_adapter().save_pretrained(tmp_path)
    state = torch.get_rng_state()
    LatentCacheFlow.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("keep", "parameters", "megabytes"), [(None, 19_393_528, 39), (NINE, 6_233_634, 13)])
def test_size_on_disk(keep: tuple[int, ...] | None, parameters: int, megabytes: int, tmp_path: Path) -> None:
    adapter = LatentCacheFlow(LCFConfig(QWEN25, QWEN3), keep_layers=keep, dtype=torch.bfloat16)
    adapter.save_pretrained(tmp_path)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert 0 <= size - 2 * parameters < 8192  # the rest: header, buffers, config.json
    assert -(-size // 1_000_000) == megabytes  # as the paper prints them, rounded up


def test_a_folder_holds_two_files_and_no_leftovers(tmp_path: Path) -> None:
    (tmp_path / ".config.json.0123456789abcdef.part").write_text("{")  # what a kill left
    for _ in range(2):  # also over an older one
        make_adapter().save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.safetensors", "config.json"]
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "config.json").stat().st_mode & 0o777 == 0o666 & ~mask
    description = json.loads((tmp_path / "config.json").read_text())
    assert description["format_version"] == 1
    assert LCFConfig.from_dict(description["config"]) == make_adapter().config


@pytest.mark.parametrize("failing", [1, 2])
def test_a_save_that_fails_midway_never_gives_a_mixture(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = make_adapter(), make_adapter(keep=[0, 2])
    old.save_pretrained(tmp_path)
    replace, calls = os.replace, 0

    def interrupted(source: Any, target: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", interrupted)
    with pytest.raises(OSError, match="disk full"):
        new.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.safetensors", "config.json"]
    if failing == 1:
        assert torch.equal(LatentCacheFlow.from_pretrained(tmp_path).up_weight, old.up_weight)  # type: ignore[arg-type]
    else:
        with pytest.raises(CheckpointError):
            LatentCacheFlow.from_pretrained(tmp_path)


def test_the_models_it_is_for_can_be_checked(tmp_path: Path) -> None:
    make_adapter().save_pretrained(tmp_path)
    LatentCacheFlow.from_pretrained(tmp_path, sharer=SHARER, receiver=RECEIVER)
    with pytest.raises(GeometryError, match=r"sharer: .*layers=24.*layers=3"):
        LatentCacheFlow.from_pretrained(tmp_path, sharer=QWEN25)
    with pytest.raises(GeometryError, match="receiver"):
        LatentCacheFlow.from_pretrained(tmp_path, receiver=SHARER)


# --- damage ------------------------------------------------------------------------------------------------------

WEIGHTS, CONFIG = "adapter.safetensors", "config.json"


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    description = json.loads((folder / CONFIG).read_text())
    change(description)
    (folder / CONFIG).write_text(json.dumps(description))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors and make the checksum fit, so that only the tensors are wrong."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    data = (folder / WEIGHTS).read_bytes()
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit(folder, lambda d: d["weights"].update(entry))


def flip_byte(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1000] ^= 1
    (folder / WEIGHTS).write_bytes(data)


def truncate(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-64])


def not_safetensors(folder: Path) -> None:
    data = b"\xff" * 100
    (folder / WEIGHTS).write_bytes(data)
    entry = {"bytes": 100, "sha256": hashlib.sha256(data).hexdigest()}
    edit(folder, lambda d: d["weights"].update(entry))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "adapter.safetensors: expected a readable file"),
    "no config": (lambda f: (f / CONFIG).unlink(), "config.json: expected a readable file"),
    "no folder": (shutil.rmtree, "a readable file"),
    "a flipped byte": (flip_byte, r"SHA-256\), got other bytes"),
    "cut short": (truncate, r"expected \d+ bytes, got \d+ bytes"),
    "not safetensors": (not_safetensors, "expected a safetensors file"),
    "config cut short": (lambda f: (f / CONFIG).write_text('{"format": '), "expected JSON"),
    "config is no text": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00"), "expected JSON"),
    "config is a list": (lambda f: (f / CONFIG).write_text("[]"), "format: expected 'lcf_fast.adapter', got list"),
    "another format": (lambda f: edit(f, lambda d: d.update(format="peft")), "got 'peft'"),
    "a later version": (lambda f: edit(f, lambda d: d.update(format_version=2)), "format_version: expected 1, got 2"),
    "no version": (lambda f: edit(f, lambda d: d.pop("format_version")), "got None"),
    "no config entry": (lambda f: edit(f, lambda d: d.pop("config")), "config: expected a JSON dict"),
    "unknown field": (lambda f: edit(f, lambda d: d["config"].update(rank=4)), "config.json: config: .*also rank"),
    "bad field": (lambda f: edit(f, lambda d: d["config"].update(bottleneck=63)), "bottleneck: expected an even"),
    "layers out of range": (lambda f: edit(f, lambda d: d.update(receiver_layers=[0, 1, 2, 3, 5])), "receiver_layers"),
    "layers unsorted": (lambda f: edit(f, lambda d: d.update(receiver_layers=[1, 0, 2, 3, 4])), "ascending"),
    "layers no ints": (lambda f: edit(f, lambda d: d.update(receiver_layers=["0"])), "receiver_layers"),
    "layers miscounted": (lambda f: edit(f, lambda d: d.update(sharer_layers=[0, 0])), "sharer_layers"),
    "layers of another": (lambda f: edit(f, lambda d: d.update(sharer_layers=[0, 0, 0, 1, 1])), "sharer_layers"),
    "another width": (lambda f: edit(f, lambda d: d["config"].update(bottleneck=32)), r"down_weight: expected \(5, 32"),
    "another geometry": (lambda f: edit(f, lambda d: d["config"]["sharer"].update(head_dim=8)), "down_weight"),
    "a missing tensor": (lambda f: rewrite(f, lambda t: t.pop("up_bias")), "expected tensors"),
    "one too many": (lambda f: rewrite(f, lambda t: t.update(extra=torch.ones(1))), "extra"),
    "wrong shape": (lambda f: rewrite(f, lambda t: t.update(down_bias=t["down_bias"][:, :1].clone())), "down_bias"),
    "wrong dtype": (lambda f: rewrite(f, lambda t: t.update(up_bias=t["up_bias"].long())), "up_bias: .*float"),
    "layers no int64": (
        lambda f: rewrite(f, lambda t: t.update(receiver_layers=t["receiver_layers"].float())),
        "receiver_layers: expected int64",
    ),
    "no digests": (lambda f: edit(f, lambda d: d.update(accepted_sharers=["short"])), "accepted_sharers"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_folder_is_told_before_a_weight_is_used(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, text = DAMAGE[case]
    folder = tmp_path / "adapter"
    make_adapter().save_pretrained(folder)
    damage(folder)

    def used(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(LatentCacheFlow, "load_state_dict", used)
    with pytest.raises(LCFError, match=text) as caught:
        LatentCacheFlow.from_pretrained(folder)
    assert isinstance(caught.value, CheckpointError)


def test_models_of_other_weights_than_it_was_trained_with_are_refused(tmp_path: Path) -> None:
    """Whatever dtype they are loaded in, with a head or without; a geometry alone has no weights to be of."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    made = Qwen2Config(num_hidden_layers=2, num_key_value_heads=1, **sizes)
    first, other = (Qwen2ForCausalLM(made) for _ in range(2))
    geometry = CacheGeometry.of(first)
    adapter = LatentCacheFlow(LCFConfig(geometry, geometry, bottleneck=64))
    adapter.trained_between = {"sharer": weights_sample(first) or "", "receiver": weights_sample(other) or ""}
    adapter.save_pretrained(tmp_path)
    for sharer, receiver in ((first, other), (first.model, None), (None, other.bfloat16()), (geometry, geometry)):
        again = LatentCacheFlow.from_pretrained(tmp_path, sharer=sharer, receiver=receiver)
        assert again.trained_between == adapter.trained_between
    again.prune([1]).save_pretrained(tmp_path / "pruned")
    for folder in (tmp_path, tmp_path / "pruned"):
        with pytest.raises(GeometryError, match=r"sharer: expected the model that .* was trained with"):
            LatentCacheFlow.from_pretrained(folder, sharer=other, receiver=other)
        with pytest.raises(GeometryError, match="give its geometry alone"):
            LatentCacheFlow.from_pretrained(folder, receiver=first)
    with torch.no_grad():
        first.model.layers[1].mlp.down_proj.weight.zero_()
    with pytest.raises(GeometryError, match="sharer"):
        LatentCacheFlow.from_pretrained(tmp_path, sharer=first)
    description = json.loads((tmp_path / "config.json").read_text())
    damaged: tuple[object, ...] = ([], {"third": "0" * 32}, {"sharer": "short"})
    for broken in damaged:
        (tmp_path / "config.json").write_text(json.dumps({**description, "trained_between": broken}))
        with pytest.raises(CheckpointError, match="trained_between"):
            LatentCacheFlow.from_pretrained(tmp_path)


@pytest.mark.parametrize("slots", [0, 2])
def test_template_options_of_the_training_are_kept(slots: int, tmp_path: Path) -> None:
    config = LCFConfig(CacheGeometry(2, 1, 8), CacheGeometry(2, 1, 8), bottleneck=64, slots=slots)
    adapter = LatentSlots(config) if slots else LatentCacheFlow(config)
    for options in (None, {}, {"enable_thinking": False, "date_string": "25 Nov 2026"}):
        adapter.trained_template_options = options
        adapter.save_pretrained(tmp_path)
        assert load_adapter(tmp_path).trained_template_options == template_options(tmp_path) == options
    description = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**description, "template_options": ["enable_thinking"]}))
    for read in (load_adapter, template_options):
        with pytest.raises(CheckpointError, match="template_options: expected a JSON object"):
            read(tmp_path)
