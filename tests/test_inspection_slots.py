"""`lcf-fast inspect` on slots: what is found, printed and drawn of an adapter and of a message."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import make_adapter
from messages import SLOT_CONTENTS, make_message

from lcf_fast import CacheGeometry, LatentSlots, LCFConfig, Message
from lcf_fast.cli import main
from lcf_fast.errors import IndexRangeError
from lcf_fast.inspection import MessageReport, SideReport, SlotsReport, inspect, write_png


def adapter() -> LatentSlots:
    torch.manual_seed(3)
    return LatentSlots(LCFConfig(CacheGeometry(3, 2, 8), CacheGeometry(5, 3, 8), bottleneck=64, slots=4))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    adapter().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def message() -> Message:
    """Of item 1, slot 2 reads token 5 alone in every layer but the first, where it reads token 0."""
    made = make_message(slots=3, batch=2, contents=SLOT_CONTENTS, generator=torch.Generator().manual_seed(9))
    weights = made.tensors["slot_weights"]  # (5, 2, 2, 3, 6)
    weights[:, 1, :, 2] = torch.eye(6)[5]
    weights[0, 1, :, 2] = torch.eye(6)[0]
    return made


@pytest.fixture
def file(tmp_path: Path) -> Path:
    message().save(tmp_path / "notes.lcf", contents=SLOT_CONTENTS)
    return tmp_path / "notes.lcf"


def test_of_an_adapter(folder: Path) -> None:
    report, maps = inspect(folder)
    assert isinstance(report, SlotsReport)
    weights = dict(adapter().named_parameters())
    assert (report.kind, report.slots, report.bottleneck, report.dtype) == ("slots", 4, 64, "float32")
    assert report.parameters == sum(weight.numel() for weight in weights.values()) == adapter().parameter_count()
    assert report.message_bytes == 5 * 4 * 64 * 2
    assert report.file_bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert [layer.sharer_layer for layer in report.layers] == [0, 0, 0, 1, 2]
    for row, layer in enumerate(report.layers):
        assert layer.query_norms == pytest.approx([float(slot.norm()) for slot in weights["slot_query"][row]])
        assert layer.embedding_norms == pytest.approx([float(e.norm()) for e in weights["slot_embedding"][row]])
        assert layer.down_norm == pytest.approx(float(weights["down_weight"][row].norm()))
        assert layer.up_value_norm == pytest.approx(float(weights["up_weight"][row, 1].norm()))
    assert [heat.columns for heat in maps] == [("0", "1", "2", "3")] * 2
    assert maps[0].values[4] == report.layers[4].query_norms


@pytest.mark.parametrize("kind", ["slots", "LCF-X"])
def test_of_a_sharers_half(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    side: Any = adapter().sharer_side() if kind == "slots" else make_adapter(True).sharer_side()
    side.save_pretrained(tmp_path / "side")
    report, maps = inspect(tmp_path / "side")
    assert isinstance(report, SideReport)
    weights = dict(side.named_parameters())
    assert (report.kind, report.slots) == (kind, 4 if kind == "slots" else 0)
    assert report.parameters == sum(weight.numel() for weight in weights.values())
    assert (report.adapter_digest, report.sharer_digest) == (side.origin.adapter, side.origin.sharer)
    assert [layer.sharer_layer for layer in report.layers] == side.sharer_layers.tolist()
    names = ("0", "1", "2", "3") if kind == "slots" else ("span", "global")
    assert report.query_names == names
    assert [heat.columns for heat in maps] == [names] * (2 if kind == "slots" else 1)
    for row, layer in enumerate(report.layers):
        assert layer.down_norm == pytest.approx(float(weights["down_weight"][row].norm()))
        queries = weights["slot_query"][row] if kind == "slots" else [weights[f"{n}_query"][row] for n in names]
        assert layer.query_norms == pytest.approx([float(query.norm()) for query in queries])
        assert len(layer.embedding_norms) == report.slots
    assert main(["inspect", str(tmp_path / "side")]) == 0
    shown = capsys.readouterr().out
    assert f"sharer's half of {kind}" in shown
    assert ["for", "adapter", report.adapter_digest] in cells(shown)
    assert ["itself", report.sharer_digest] in cells(shown)
    for layer in report.layers:
        queries = [f"{norm:.4g}" for norm in layer.query_norms]
        if kind == "slots":
            queries = [mean(layer.query_norms), mean(layer.embedding_norms)]
        reads = [str(layer.receiver_layer), str(layer.sharer_layer)]
        assert [*reads, *queries, f"{layer.down_norm:.4g}"] in cells(shown)
    assert main(["inspect", str(tmp_path / "side"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["query_names"] == list(names)


def test_where_slots_stood_in_training_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = adapter()
    for placement, text in ((None, "not said (append)"), ("prefix", "prefix")):
        made.trained_placement = placement  # type: ignore[assignment]
        made.save_pretrained(tmp_path)
        report, _ = inspect(tmp_path)
        assert isinstance(report, SlotsReport)
        assert report.placement == placement
        assert main(["inspect", str(tmp_path)]) == 0
        assert text in capsys.readouterr().out


def test_of_a_message(file: Path) -> None:
    report, (heat,) = inspect(file, item=1)
    assert isinstance(report, MessageReport)
    assert (report.slots, report.width, report.batch, report.spans_of) == (3, 8, 2, None)
    assert report.slots_of is not None
    assert [len(item) for item in report.slots_of] == [3, 3]
    slot = report.slots_of[1][2]
    assert slot.tokens[:2] == (5, 0)
    assert slot.weights[:2] == pytest.approx((0.8, 0.2))
    assert slot.effective == pytest.approx(1.649, abs=1e-3)  # exp(-0.8 ln 0.8 - 0.2 ln 0.2)
    assert heat.row_name == "slot"
    assert (heat.rows, heat.columns) == ((0, 1, 2), ("0", "1", "2", "3", "4", "5"))
    assert heat.values[2] == pytest.approx((0.2, 0, 0, 0, 0, 0.8))
    assert [sum(row) for row in heat.values] == pytest.approx([1, 1, 1])
    latent = message().tensors["latent"]
    assert report.layers[1].latent_norms == pytest.approx([float(latent[1, b].norm()) for b in range(2)])
    with pytest.raises(IndexRangeError):
        inspect(file, item=2)


def test_without_weights_there_is_a_picture_of_norms(tmp_path: Path) -> None:
    message().save(tmp_path / "notes.lcf")
    report, (heat,) = inspect(tmp_path / "notes.lcf")
    assert isinstance(report, MessageReport)
    assert report.slots_of is None
    assert heat.row_name == "receiver layer"
    assert len(heat.rows) == 5


def cells(shown: str) -> list[list[str]]:
    return [line.replace("│", " ").split() for line in shown.splitlines()]


def mean(norms: tuple[float, ...]) -> str:
    return f"{sum(norms) / len(norms):.4g}"


def test_tables(folder: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "slots adapter" in shown
    assert "2,560 bytes in bfloat16" in shown
    report, _ = inspect(folder)
    assert isinstance(report, SlotsReport)
    for layer in report.layers:
        norms = [f"{norm:.4g}" for norm in (layer.down_norm, layer.up_key_norm, layer.up_value_norm)]
        reads = [str(layer.receiver_layer), str(layer.sharer_layer)]
        assert [*reads, mean(layer.query_norms), mean(layer.embedding_norms), *norms] in cells(shown)
    assert main(["inspect", str(file), "--item", "1"]) == 0
    shown = capsys.readouterr().out
    assert "what each slot drew on, item 1" in shown
    assert "5: 0.800, 0: 0.200" in shown
    assert "spans" not in shown


@pytest.mark.parametrize("which", ["folder", "file"])
def test_json_and_pictures(which: str, folder: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = {"folder": folder, "file": file}[which]
    assert main(["inspect", str(path), "--json", "--plot", str(path.parent / "w.png")]) == 0
    assert json.loads(capsys.readouterr().out)["slots"] == (4 if which == "folder" else 3)
    data = (path.parent / "w.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert 200 < width < 3000
    assert 200 < height < 3000


def test_a_picture_of_many_tokens_stays_of_a_size_to_look_at(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    long = make_message(slots=8, tokens=3000, contents=SLOT_CONTENTS)
    long.save(tmp_path / "long.lcf", contents=SLOT_CONTENTS)
    _, maps = inspect(tmp_path / "long.lcf")
    write_png(maps, tmp_path / "long.png")
    width, _ = struct.unpack(">II", (tmp_path / "long.png").read_bytes()[16:24])
    assert width < 3000
