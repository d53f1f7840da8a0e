"""Stored prefills: the losses of the models themselves, the size as planned, and nothing mixed up or damaged unseen."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny_training import KINDS, RandomData, read_log, tiny_adapter, tiny_model, tiny_settings, tiny_store, tiny_trainer

from lcf_fast import CacheGeometry, LatentCacheFlow, LCFConfig
from lcf_fast.errors import GeometryError, IndexRangeError
from lcf_fast.files import only_writer
from lcf_fast.reading.model_fingerprint import model_fingerprint, model_sample
from lcf_fast.training import caching
from lcf_fast.training.batches import Batch
from lcf_fast.training.caching import plan_prefills, write_prefills
from lcf_fast.training.failures import RunError
from lcf_fast.training.prefills import Manifest, StoredPrefills
from lcf_fast.training.step import OnlinePrefills, TrainingStep, frozen

SETTINGS = tiny_settings(steps=4)
SHARD = 18_000  # bytes: four shards


def models(precision: str = "fp32") -> tuple[Any, Any]:
    return (
        frozen(tiny_model("qwen2", 1), device="cpu", precision=precision),
        frozen(tiny_model("qwen3", 2), device="cpu", precision=precision),
    )


def stored(folder: Path, **kind: bool) -> StoredPrefills:
    sharer, receiver = models()
    return StoredPrefills(folder, tiny_adapter(sharer, receiver, **kind), receiver, SETTINGS)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of LCF on the same tokens, in several shards. Not to be changed."""
    folder = tmp_path_factory.mktemp("store") / "store"
    assert tiny_store(folder, SETTINGS, shard_bytes=SHARD).shards == 4
    return folder


# --- the same losses
# ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "with_receiver", "precision"),
    [
        ("same", True, "fp32"),
        ("same", False, "fp32"),
        ("aligned", True, "bf16"),
        ("cross", True, "fp32"),
        ("cross", False, "bf16"),
    ],
)
def test_training_on_stored_prefills_is_bitwise_training_on_the_models(
    kind: str, with_receiver: bool, precision: str, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, precision=precision)
    tiny_store(tmp_path / "store", settings, with_receiver=with_receiver, shard_bytes=5000, **KINDS[kind])
    online = tiny_trainer(tmp_path / "online", settings, **KINDS[kind])
    sharer, receiver = models(precision)
    prefiller = StoredPrefills(tmp_path / "store", tiny_adapter(sharer, receiver, **_adapter(kind)), receiver, settings)
    offline = tiny_trainer(tmp_path / "stored", settings, prefiller=prefiller, **KINDS[kind])
    expected, adapter = online.run(), offline.run()
    assert read_log(tmp_path / "stored") == read_log(tmp_path / "online")
    for name, tensor in expected.state_dict().items():
        assert torch.equal(adapter.state_dict()[name], tensor), name


def _adapter(kind: str) -> dict[str, bool]:
    return {"cross_context": kind == "cross"}


@pytest.mark.parametrize("kind", KINDS)
def test_beside_other_examples_the_loss_is_the_same_to_rounding(kind: str, tmp_path: Path) -> None:
    tiny_store(tmp_path, SETTINGS, shard_bytes=5000, **KINDS[kind])
    sharer, receiver = models()
    adapter = tiny_adapter(sharer, receiver, **_adapter(kind)).eval()
    online = TrainingStep(adapter, receiver, OnlinePrefills(sharer, receiver))
    offline = TrainingStep(adapter, receiver, StoredPrefills(tmp_path, adapter, receiver, SETTINGS))
    data = RandomData(SETTINGS, **KINDS[kind])
    for ids in (["7", "0", "19", "12", "3"], ["19", "18"], ["4"]):
        batch = data.of(ids)
        assert offline(batch).item() == pytest.approx(online(batch).item(), rel=1e-6)


def test_an_example_that_comes_up_again_is_stored_once(tmp_path: Path) -> None:
    manifest = tiny_store(tmp_path, SETTINGS, examples=7)  # 20 places
    assert manifest.examples == 7
    sharer, receiver = models()
    prefiller = StoredPrefills(tmp_path, tiny_adapter(sharer, receiver), receiver, SETTINGS)
    data = RandomData(SETTINGS, examples=7)
    tiny_trainer(tmp_path / "run", SETTINGS, prefiller=prefiller, data=data).run()
    tiny_trainer(tmp_path / "online", SETTINGS, data=data).run()
    for one, other in zip(read_log(tmp_path / "run"), read_log(tmp_path / "online"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


class Mixed:
    """Tokens that are the same for both models: a batch of them alone, and as rows of a batch that aligns."""

    def __init__(self, aligned: bool) -> None:
        self.aligned, self.data = aligned, RandomData(SETTINGS)

    def ids(self, step: int) -> list[str]:
        return self.data.ids(step)

    def digest(self) -> str:
        return self.data.digest()

    def batch(self, step: int, index: int) -> Batch:
        batch = self.data.batch(step, index)
        if self.aligned:
            rows = torch.arange(batch.receiver_ids.shape[1]).expand_as(batch.receiver_ids)
            batch.sharer_index = torch.where(batch.receiver_mask.bool(), rows, -1)
        return batch


@pytest.mark.parametrize("aligned_first", [False, True])
def test_whether_a_batch_aligns_may_change(aligned_first: bool, tmp_path: Path) -> None:
    sharer, receiver = models()
    geometries = CacheGeometry.of(sharer), CacheGeometry.of(receiver)
    data = Mixed(aligned_first)
    write_prefills(tmp_path, plan_prefills(data, SETTINGS, *geometries), data, sharer, receiver)
    adapter = tiny_adapter(sharer, receiver).eval()
    online = TrainingStep(adapter, receiver, OnlinePrefills(sharer, receiver))
    offline = TrainingStep(adapter, receiver, StoredPrefills(tmp_path, adapter, receiver, SETTINGS))
    batch = Mixed(not aligned_first).batch(1, 0)
    assert offline(batch).item() == pytest.approx(online(batch).item(), rel=1e-6)


# --- what is stored
# ---------------------------------------------------------------------


@pytest.mark.parametrize("with_receiver", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_planned_size_is_what_the_tensors_take(with_receiver: bool, precision: str, tmp_path: Path) -> None:
    settings = replace(SETTINGS, precision=precision)
    manifest = tiny_store(
        tmp_path, settings, cross_context=True, sharer_layers=[1], with_receiver=with_receiver, shard_bytes=3000
    )
    found = 0
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, framework="pt") as shard:
            tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
        found += sum(tensor.nbytes for tensor in tensors.values())
        assert {tensor.shape[0] for name, tensor in tensors.items() if "sharer" in name} == {1}
        assert any("receiver" in name for name in tensors) == with_receiver
    assert found == manifest.tensor_bytes


def test_the_plan_says_its_size_before_anything_is_computed() -> None:
    sharer, receiver = CacheGeometry(24, 2, 64), CacheGeometry(28, 8, 128)  # of Qwen2.5-0.5B and Qwen3-0.6B
    settings = tiny_settings(steps=4, precision="bf16")
    data = RandomData(settings)
    plan = plan_prefills(data, settings, sharer, receiver)
    masks = [data.batch(s, i).receiver_mask for s in range(4) for i in range(settings.micro_batches)]
    tokens = sum(int(mask.sum()) - len(mask) for mask in masks)  # all but each prompt's last
    assert plan.tensor_bytes == tokens * (12_288 + 114_688)
    summary = plan.summary()
    assert summary.startswith(
        f"20 examples, {tokens} tokens of the sharer in 24 layers, {tokens} of the receiver in 28"
    )
    assert f"{plan.tensor_bytes / 1e6:.1f} MB in 1 shards" in summary
    fewer = plan_prefills(data, settings, sharer, receiver, sharer_layers=[0, 5], with_receiver=False)
    assert fewer.tensor_bytes == tokens * 1_024
    with pytest.raises(IndexRangeError, match="sharer_layers"):
        plan_prefills(data, settings, sharer, receiver, sharer_layers=[24])
    with pytest.raises(GeometryError, match="shard_bytes"):
        plan_prefills(data, settings, sharer, receiver, shard_bytes=0)


def test_only_the_layers_that_an_adapter_reads_are_needed(tmp_path: Path) -> None:
    tiny_store(tmp_path, SETTINGS, sharer_layers=[1])
    sharer, receiver = models()
    config = LCFConfig(CacheGeometry.of(sharer), CacheGeometry.of(receiver), bottleneck=64, gate_init=1.0)
    whole = LatentCacheFlow(config)
    with pytest.raises(RunError, match=r"without \[0\]"):
        StoredPrefills(tmp_path, whole, receiver, SETTINGS)
    last = LatentCacheFlow(config, keep_layers=[1]).eval()
    batch = RandomData(SETTINGS).batch(0, 0)
    offline = TrainingStep(last, receiver, StoredPrefills(tmp_path, last, receiver, SETTINGS))(batch)
    assert torch.equal(offline, TrainingStep(last, receiver, OnlinePrefills(sharer, receiver))(batch))


# --- what is refused
# ---------------------------------------------------------------------


def copied(store: Path, to: Path) -> Path:
    to.mkdir()
    for path in store.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def edited(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize("change", [lambda d: d[:-1], lambda d: d[:-1] + bytes([d[-1] ^ 1]), lambda d: d + b"0"])
def test_a_damaged_shard_is_found_when_it_is_read(
    change: Callable[[bytes], bytes], store: Path, tmp_path: Path
) -> None:
    folder = copied(store, tmp_path / "store")
    edited(folder / "shard-00001.safetensors", change)
    prefiller, data = stored(folder), RandomData(SETTINGS)
    prefiller(data.batch(0, 0))
    with pytest.raises(RunError, match=r"shard-00001.safetensors: expected .*bytes"):
        prefiller(data.of(["8"]))


def test_a_shard_of_another_size_is_written_anew(store: Path, tmp_path: Path) -> None:
    folder = copied(store, tmp_path / "store")
    edited(folder / "shard-00001.safetensors", lambda data: data[:-1])
    tiny_store(folder, SETTINGS, shard_bytes=SHARD)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {p.name: p.read_bytes() for p in store.iterdir()}


def test_a_store_that_is_not_whole(store: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="a readable file"):
        stored(tmp_path)
    folder = copied(store, tmp_path / "store")
    (folder / "shard-00002.json").unlink()
    with pytest.raises(RunError, match=r"expected 4 finished shards .*got 3, shard-00002 not among them"):
        stored(folder)
    (folder / "shard-00002.json").write_bytes(b'{"bytes": 1}')
    with pytest.raises(RunError, match=r"shard-00002.json: expected a shard's examples"):
        stored(folder)
    for change, message in (
        (lambda d: d.replace(b'"format_version": 3', b'"format_version": 2'), "version 3 .*anew by lcf-fast cache"),
        (lambda d: d.replace(b'"shards": 4', b'"shards": "4"'), "shards"),
        (lambda d: d[:-5], "JSON"),
        (lambda d: b"3", "object"),
    ):
        (folder / "manifest.json").write_bytes(change((store / "manifest.json").read_bytes()))
        with pytest.raises(RunError, match=message):
            stored(folder)


def test_a_store_for_something_else(store: Path) -> None:
    sharer, receiver = models()
    adapter = tiny_adapter(sharer, receiver)
    with pytest.raises(RunError, match="precision: expected bf16"):
        StoredPrefills(store, adapter, receiver, replace(SETTINGS, precision="bf16"))
    other = frozen(tiny_model("qwen3", 2), device="cpu", precision="fp32")
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[3, 3] += 1e-3
    with pytest.raises(RunError, match=r"receiver: expected .* the receiver that the store was made with"):
        StoredPrefills(store, adapter, other, SETTINGS)
    with pytest.raises(RunError, match=r"sharer: expected \(2, 2, 16\) as the run has it"):
        StoredPrefills(store, tiny_adapter(receiver, receiver), receiver, SETTINGS)

    with pytest.raises(RunError, match=r"sharer: expected .* the sharer that the store was made with"):
        StoredPrefills(store, adapter, receiver, SETTINGS, sharer=tiny_model("qwen2", 9))

    prefiller = StoredPrefills(store, adapter, receiver, SETTINGS, sharer=sharer)
    data = RandomData(SETTINGS)
    with pytest.raises(RunError, match="the example '20'"):
        prefiller(data.batch(4, 0))
    for side in ("receiver_ids", "sharer_ids"):
        batch = data.batch(0, 1)
        changed = getattr(batch, side).clone()
        changed[1, -2] += 1
        setattr(batch, side, changed)
        with pytest.raises(RunError, match="example '3': expected the tokens that the store was made with"):
            prefiller(batch)


@pytest.mark.parametrize(("kind", "further"), [("cross", 1), ("aligned", 2)])
def test_a_sharers_text_that_has_grown_is_another(kind: str, further: int, tmp_path: Path) -> None:
    tiny_store(tmp_path, SETTINGS, **KINDS[kind])
    prefiller, batch = stored(tmp_path, **_adapter(kind)), RandomData(SETTINGS, **KINDS[kind]).batch(0, 0)
    prefiller(batch)
    for name in ("sharer_ids", "sharer_mask"):
        whole = getattr(batch, name)
        setattr(batch, name, torch.cat([whole, torch.ones_like(whole[:, :further])], 1))
    with pytest.raises(RunError, match="expected the tokens that the store was made with"):
        prefiller(batch)


def test_a_run_on_a_store_knows_its_sharer(store: Path, tmp_path: Path) -> None:
    sharer, receiver = models()
    online = tiny_trainer(tmp_path / "run", SETTINGS)
    online.run()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    offline = tiny_trainer(tmp_path / "run", SETTINGS, prefiller=stored(store))
    assert offline.models == online.models
    assert offline.adapter.trained_between == online.adapter.trained_between
    assert offline.adapter.trained_between.keys() == {"sharer", "receiver"}
    held = offline.run(resume=True).trained_between
    assert LatentCacheFlow.from_pretrained(tmp_path / "run" / "adapter").trained_between == held

    data = RandomData(SETTINGS)
    geometries = CacheGeometry.of(sharer), CacheGeometry.of(receiver)
    write_prefills(
        tmp_path / "others", plan_prefills(data, SETTINGS, *geometries), data, tiny_model("qwen2", 9), receiver
    )
    with pytest.raises(RunError, match="sharer: expected the model that"):
        tiny_trainer(tmp_path / "run", SETTINGS, prefiller=stored(tmp_path / "others")).run(resume=True)


@pytest.mark.parametrize("fingerprint", [model_fingerprint, model_sample])
def test_a_fingerprint_is_of_what_decides_the_cache(fingerprint: Any, tmp_path: Path) -> None:
    model = tiny_model("qwen3", 2)
    first = fingerprint(model, "fp32")
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert fingerprint(again, "fp32") == first
    assert fingerprint(again.bfloat16(), "bf16") == fingerprint(model, "bf16") != first
    with torch.no_grad():
        again = type(model).from_pretrained(tmp_path)
        again.model.layers[1].self_attn.v_proj.weight *= 1.001
    assert fingerprint(again, "fp32") != first
    model.config.rms_norm_eps *= 2
    assert fingerprint(model, "fp32") != first


# --- writing
# ---------------------------------------------------------------------


def test_a_full_disk_is_foreseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = caching.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(caching.shutil, "disk_usage", lambda _: usage._replace(free=5000))
    monkeypatch.setattr(caching, "prefill", lambda *_: pytest.fail("computed something"))
    with pytest.raises(RunError, match=r"free for the caches, got 5.0 kB"):
        tiny_store(tmp_path / "store", SETTINGS)
    assert not any((tmp_path / "store").iterdir())


def test_a_disk_that_fills_up_loses_no_finished_shard(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, write_shard = os.fsync, caching._write_shard
    for call in itertools.count(1, 3):
        counter, folder = itertools.count(1), tmp_path / str(call)

        def fsync(file: int, call: int = call, counter: Any = counter) -> None:
            if next(counter) == call:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(file)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            try:
                tiny_store(folder, SETTINGS, shard_bytes=SHARD)
            except RunError as error:
                message = str(error)
            else:
                break
        assert "No space left" in message
        left = [n for n in range(4) if not (folder / f"shard-{n:05d}.json").exists()]
        written: list[int] = []

        def write(into: Path, number: int, *rest: Any, written: list[int] = written) -> None:
            written.append(number)
            write_shard(into, number, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(caching, "_write_shard", write)
            tiny_store(folder, SETTINGS, shard_bytes=SHARD)
        assert written == left
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == {p.name: p.read_bytes() for p in store.iterdir()}
    assert call > 9  # a manifest and four shards of two files each


def test_another_store_in_the_folder_is_left_alone(store: Path, tmp_path: Path) -> None:
    folder = copied(store, tmp_path / "store")
    held = {path.name: path.read_bytes() for path in folder.iterdir()}
    for changes, message in (
        ({"settings": replace(SETTINGS, precision="bf16")}, "precision"),
        ({"settings": replace(SETTINGS, steps=3)}, "examples"),
        ({"sharer_layers": [1]}, "sharer_layers"),
    ):
        keywords: dict[str, Any] = {"settings": SETTINGS, "shard_bytes": SHARD, **changes}
        with pytest.raises(RunError, match=rf"a new folder, or a store of the same .*{message}"):
            tiny_store(folder, keywords.pop("settings"), **keywords)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == held
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="something else"):
        tiny_store(tmp_path / "mine", SETTINGS)


def test_two_processes_do_not_write_one_store(tmp_path: Path) -> None:
    sharer, receiver = models()
    data = Mixed(False)
    plan = plan_prefills(data, SETTINGS, CacheGeometry.of(sharer), CacheGeometry.of(receiver))
    with only_writer(tmp_path):
        (others := tmp_path / ".shard-00000.safetensors.0123456789abcdef.part").write_bytes(b"")
        with pytest.raises(RunError, match="another run is writing there"):
            write_prefills(tmp_path, plan, data, sharer, receiver)
    assert list(tmp_path.iterdir()) == [others]


def test_two_texts_of_one_id_are_refused() -> None:
    class Changing(RandomData):
        def batch(self, step: int, index: int) -> Batch:
            batch = super().batch(step, index)
            return replace(batch, ids=tuple("0" for _ in batch.ids))

    geometries = CacheGeometry(2, 1, 16), CacheGeometry(2, 2, 16)
    with pytest.raises(RunError, match="one text for each id, got two for '0'"):
        plan_prefills(Changing(SETTINGS), SETTINGS, *geometries)


def test_a_manifest_is_plain_json(store: Path) -> None:
    found = json.loads((store / "manifest.json").read_text())
    assert found["examples"] == 20
    assert re.fullmatch("[0-9a-f]{32}", found["sharer_fingerprint"])
    assert Manifest.read(store).sharer == (2, 1, 16)
