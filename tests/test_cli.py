"""The command line: what `lcf-fast inspect` finds, prints, draws and refuses."""

from __future__ import annotations

import importlib
import json
import os
import re
import struct
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from adapters import make_adapter
from messages import EVERYTHING, ORIGIN, edited, header_of, make_message

from lcf_fast import BackendError, Message
from lcf_fast.cli import main
from lcf_fast.inspection import AdapterReport, MessageReport, inspect, write_png

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def adapter_folder(tmp_path: Path) -> Path:
    adapter = make_adapter(cross_context=True, keep=(0, 1, 3))
    adapter.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def message_file(tmp_path: Path) -> Path:
    path = tmp_path / "notes.lcf"
    message().save(path, contents=EVERYTHING)
    return path


def message() -> Message:
    """Two items; of the first, span 1 has all the weight in layer 2, and the others share it elsewhere."""
    made = make_message(
        batch=2, layers=(0, 2, 4), metadata={"topic": "café"}, generator=torch.Generator().manual_seed(9)
    )
    weights = made.tensors["span_weights"]
    weights[:, 0] = torch.tensor([0.5, 0.0, 0.5])
    weights[1, 0] = torch.tensor([0.0, 1.0, 0.0])
    return made


# --- what is found
# ---------------------------------------------------------------------


def test_of_an_adapter(adapter_folder: Path) -> None:
    report, _ = inspect(adapter_folder)
    assert isinstance(report, AdapterReport)
    adapter = make_adapter(cross_context=True, keep=(0, 1, 3))
    weights = dict(adapter.named_parameters())
    assert (report.kind, report.bottleneck, report.dtype) == ("LCF-X", 64, "float32")
    assert (report.sharer, report.receiver) == ((3, 2, 16), (5, 3, 8))
    assert report.parameters == sum(weight.numel() for weight in weights.values())
    assert report.parameter_bytes == 4 * report.parameters
    assert report.file_bytes == sum(file.stat().st_size for file in adapter_folder.iterdir())
    # Layer 1 is dead, of layer 3 only the value's gate is open (tests/adapters.py); the map is last-aligned.
    assert [(layer.receiver_layer, layer.sharer_layer) for layer in report.layers] == [(0, 0), (1, 0), (3, 1)]
    assert [(layer.key_open, layer.value_open) for layer in report.layers] == [
        (True, True),
        (False, False),
        (False, True),
    ]
    assert report.open_gates == 3
    assert report.layers[2].key_gate == -1.0 and report.layers[2].value_gate == pytest.approx(0.7)
    for row, layer in enumerate(report.layers):
        down, up = weights["down_weight"][row], weights["up_weight"][row]
        sharer, receiver = down[:, : 2 * 2 * 16], down[:, 2 * 2 * 16 :]
        expected = [float(part.norm()) for part in (sharer, receiver, up[0], up[1])]
        got = [layer.down_sharer_norm, layer.down_receiver_norm, layer.up_key_norm, layer.up_value_norm]
        assert got == pytest.approx(expected)


def test_of_an_adapter_without_a_pool(tmp_path: Path) -> None:
    make_adapter().to(torch.bfloat16).save_pretrained(tmp_path / "lcf")
    report, maps = inspect(tmp_path / "lcf")
    assert isinstance(report, AdapterReport)
    assert (report.kind, report.dtype, report.parameter_bytes) == ("LCF", "bfloat16", 2 * report.parameters)
    gates, norms = maps
    assert (gates.rows, gates.columns) == ((0, 1, 2, 3, 4), ("key", "value"))
    assert gates.values[2] == (2.0, 1.0)
    assert max(row[0] for row in norms.values) == 1.0 and len(norms.columns) == 4


def test_of_a_message(message_file: Path) -> None:
    report, (heat,) = inspect(message_file)
    assert isinstance(report, MessageReport)
    made, data = message(), message_file.read_bytes()
    assert (report.version, report.keyed) == (1, False)
    assert report.payload_bytes == len(header_of(data)[2])
    assert report.header_bytes + report.payload_bytes == len(data)
    assert report.stored_as == dict.fromkeys(EVERYTHING, "float32")
    assert (report.sharer, report.receiver, report.width) == ((3, 2, 4), (5, 3, 8), 8)
    assert (report.batch, report.spans, report.metadata) == (2, 3, {"topic": "café"})
    assert (report.adapter_digest, report.sharer_digest) == (ORIGIN.adapter, ORIGIN.sharer)
    latent, summary = made.tensors["latent"], made.tensors["summary"]
    assert [layer.receiver_layer for layer in report.layers] == [0, 2, 4]
    for row, layer in enumerate(report.layers):
        for norms, tensor in (
            (layer.latent_norms, latent[row]),
            (layer.key_norms, summary[row, 0]),
            (layer.value_norms, summary[row, 1]),
        ):
            assert norms == pytest.approx([float(item.norm()) for item in tensor])

    assert report.spans_of is not None
    first = report.spans_of[0]
    assert [span.mean_weight for span in first] == pytest.approx([1 / 3, 1 / 3, 1 / 3])
    assert (first[1].strongest_layer, first[1].strongest_weight) == (2, 1.0)
    assert first[0].strongest_layer == 0 and first[0].strongest_weight == 0.5
    assert heat.rows == (0, 2, 4) and heat.columns == ("0", "1", "2")
    assert heat.values == ((0.5, 0.0, 0.5), (0.0, 1.0, 0.0), (0.5, 0.0, 0.5))
    (second,) = inspect(message_file, item=1)[1]
    assert second.values[0] == pytest.approx(made.tensors["span_weights"][0, 1].mean(0).tolist())


def test_of_a_message_without_weights(tmp_path: Path) -> None:
    path = tmp_path / "notes.lcf"
    made = message()
    made.save(path, dtype="int8", key=b"secret")
    report, (heat,) = inspect(path, key=b"secret")
    assert isinstance(report, MessageReport)
    assert report.keyed and report.stored_as == {"latent": "int8"} and report.spans_of is None
    assert report.layers[0].key_norms is None and report.layers[0].value_norms is None
    norms = made.tensors["latent"].norm(dim=-1)
    assert heat.columns == ("0", "1") and "latent" in heat.title
    torch.testing.assert_close(torch.tensor(heat.values), norms, rtol=2e-2, atol=0)

    made.save(path, contents=("summary",))
    report, (heat,) = inspect(path)
    assert isinstance(report, MessageReport)
    assert report.width is None and report.layers[0].latent_norms is None
    norms = made.tensors["summary"].square().sum((1, 3, 4)).sqrt()
    torch.testing.assert_close(torch.tensor(heat.values), norms)


# --- what is printed
# ---------------------------------------------------------------------


def test_tables_of_an_adapter(adapter_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(adapter_folder)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"LCF-X adapter {adapter_folder}" in out and "3 of 5" in out and "3 of 6" in out
    (row,) = [line for line in out.splitlines() if "+0.7 " in line]
    report, _ = inspect(adapter_folder)
    assert isinstance(report, AdapterReport)
    layer = report.layers[2]
    norms = layer.down_sharer_norm, layer.down_receiver_norm, layer.up_key_norm, layer.up_value_norm
    assert row.replace("│", " ").split() == ["3", "1", "-1", "shut", "+0.7", "open", *(f"{n:.4g}" for n in norms)]
    facts = [" ".join(line.split()) for line in out.splitlines()]
    assert "sharer 3 layers, 2 KV heads, head dim 16" in facts
    assert "receiver 5 layers, 3 KV heads, head dim 8" in facts


def test_tables_of_a_message(message_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(message_file)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    size = message_file.stat().st_size
    assert f"{size:,} = header" in out and "café" in out and ORIGIN.adapter in out and "mean of 2 items" in out
    rows = [line.replace("│", " ").split() for line in out.splitlines()]
    assert ["1", "0.3333", "1.0000", "2"] in rows  # span, mean over layers, largest, in layer
    report, _ = inspect(message_file)
    assert isinstance(report, MessageReport)
    assert ["for", "adapter", ORIGIN.adapter] in rows and ["made", "by", ORIGIN.sharer] in rows
    for layer in report.layers:
        norms = [layer.latent_norms, layer.key_norms, layer.value_norms]
        assert [str(layer.receiver_layer), *(f"{sum(each or ()) / 2:.4g}" for each in norms)] in rows
    assert main(["inspect", str(message_file), "--item", "1"]) == 0
    rows = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    assert report.spans_of is not None
    for span in report.spans_of[1]:
        found = (f"{span.mean_weight:.4f}", f"{span.strongest_weight:.4f}", str(span.strongest_layer))
        assert [str(span.span), *found] in rows


def test_only_the_heaviest_of_many_spans_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make_message(spans=300)
    made.tensors["span_weights"].fill_(0.0)[..., 211] = 1.0
    made.save(tmp_path / "m", contents=EVERYTHING)
    assert main(["inspect", str(tmp_path / "m")]) == 0
    out = capsys.readouterr().out
    assert "the 20 heaviest of 300" in out and len(out.splitlines()) < 60
    rows = [line.replace("│", " ").split() for line in out.splitlines()]
    assert ["211", "1.0000", "1.0000", "0"] in rows


@pytest.mark.parametrize("which", ["adapter_folder", "message_file"])
def test_json(which: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> None:
    path = request.getfixturevalue(which)
    assert main(["inspect", str(path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(json.dumps(asdict(inspect(path)[0])))
    assert printed["path"] == str(path) and len(printed["layers"]) == 3


def test_a_strangers_text_does_not_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "\x1b[2J\x1b]0;title\x07[bold red]\r\n\u202e"
    path = tmp_path / "m"
    made = replace(message(), metadata={evil: evil})
    made.save(path)
    assert main(["inspect", str(path)]) == 0
    # In an error too: a key that contains it, in a description that is refused.
    path.write_bytes(edited(made.to_bytes(), field=lambda description: description.update({"origin": [evil, evil]})))
    assert main(["inspect", str(path)]) == 2
    assert main(["inspect", str(tmp_path / "\x1b[2J")]) == 2
    out, err = capsys.readouterr()
    for text in (out, err):
        assert not set(text) & {"\x1b", "\x07", "\r", "\u202e"}
        assert "\\x1b[2J" in text
    assert "[bold red]" in out


# --- pictures
# ---------------------------------------------------------------------


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_pictures(adapter_folder: Path, message_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (adapter_folder, message_file):
        assert main(["inspect", str(path), "--plot", str(tmp_path / "map")]) == 0  # PNG whatever the name
        assert min(png_size(tmp_path / "map")) >= 300
    capsys.readouterr()


def test_the_picture_shows_the_weights(message_file: Path, tmp_path: Path) -> None:
    """The cell of layer 2 and span 1, the only one of weight 1, is the brightest; one of weight 0 the darkest."""
    from matplotlib.image import imread

    _, maps = inspect(message_file)
    write_png(maps, tmp_path / "map.png")
    pixels = torch.from_numpy(imread(tmp_path / "map.png"))[..., :3]
    # viridis runs from dark violet to yellow; both must be there, as patches and not as single pixels.
    for color in ((0.993, 0.906, 0.144), (0.267, 0.005, 0.329)):
        assert int(((pixels - torch.tensor(color)).abs().amax(-1) < 0.02).sum()) > 1000


def test_a_picture_of_many_spans_stays_of_a_size_to_look_at(tmp_path: Path) -> None:
    make_message(spans=2_000).save(tmp_path / "m", contents=EVERYTHING)
    _, maps = inspect(tmp_path / "m")
    write_png(maps, tmp_path / "map.png")
    assert max(png_size(tmp_path / "map.png")) < 4_000


def test_without_matplotlib(
    message_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [*sys.modules]:
        if name.split(".")[0] == "matplotlib":
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BackendError, match="pip install"):
        write_png(inspect(message_file)[1], tmp_path / "map.png")
    assert main(["inspect", str(message_file), "--plot", str(tmp_path / "map.png")]) == 2
    assert "pip install 'lcf-fast[plot]'" in capsys.readouterr().err
    assert main(["inspect", str(message_file)]) == 0  # tables need none


# --- what is refused
# ---------------------------------------------------------------------


def test_errors_are_one_line_and_exit_code_2(
    message_file: Path, adapter_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "damaged"
    damaged.write_bytes(message_file.read_bytes()[:-1])
    (tmp_path / "key").write_bytes(b"another")
    (adapter_folder / "adapter.safetensors").write_bytes(b"")
    cases = [
        ([str(tmp_path / "missing")], "No such file"),
        ([str(damaged)], "message.length"),
        ([str(tmp_path)], "config.json"),
        ([str(adapter_folder)], "adapter.safetensors"),
        ([str(message_file), "--item", "2"], "item"),
        ([str(adapter_folder), "--item", "0"], "--item: expected a message's file beside it"),
        ([str(adapter_folder), "--key-file", str(tmp_path / "key")], "--key-file: expected a message's file beside it"),
        ([str(message_file), "--max-bytes", "100"], "max_bytes"),
        ([str(message_file), "--key-file", str(tmp_path / "key")], "key"),
        ([str(message_file), "--key-file", str(tmp_path / "none")], "none"),
        ([str(message_file), "--plot", str(tmp_path / "no" / "map.png")], "map.png"),
    ]
    for arguments, text in cases:
        assert main(["inspect", *arguments]) == 2, arguments
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("lcf-fast inspect: error: ") and err.count("\n") == 1, err
        assert text in err, arguments


@pytest.mark.parametrize(
    ("command", "said"), [("eval", "stopped; the same command goes on from there"), ("inspect", "stopped")]
)
def test_ctrl_c_is_one_line_and_exit_code_130(
    command: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lcf_fast.inspection.inspect", interrupted)
    monkeypatch.setattr("lcf_fast.demo.suite.prepare_suite", interrupted)
    given = ["--out", str(tmp_path / "out"), "--no-plots"] if command == "eval" else ["notes.lcf"]
    assert main([command, *given]) == 130
    assert capsys.readouterr().err == f"lcf-fast {command}: {said}\n"


def test_a_key_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "key").write_bytes(b"secret")
    message().save(tmp_path / "m", key=b"secret")
    assert main(["inspect", str(tmp_path / "m"), "--key-file", str(tmp_path / "key")]) == 0
    assert "signed with a key" in capsys.readouterr().out


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, text in ((["--help"], "inspect"), (["inspect", "--help"], "examples:"), (["--version"], "0.")):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0
        assert text in capsys.readouterr().out
    for wrong in ([], ["no-such-command"], ["inspect"]):
        with pytest.raises(SystemExit) as ended:
            main(wrong)
        assert ended.value.code == 2
        assert "usage: lcf-fast" in capsys.readouterr().err


LIGHT = """
import sys
from lcf_fast.cli import main
try:
    main(["inspect", "--help"])
finally:
    print(sorted({"torch", "rich", "matplotlib", "safetensors", "transformers"} & set(sys.modules)), file=sys.stderr)
"""


def test_help_imports_nothing_heavy() -> None:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", LIGHT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": path})
    assert done.stderr == "[]\n" and "examples:" in done.stdout


def test_the_command_is_installed_with_the_package() -> None:
    found = re.search(r'"lcf-fast = ([\w.]+):(\w+)"', (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert found is not None
    assert getattr(importlib.import_module(found[1]), found[2]) is main
