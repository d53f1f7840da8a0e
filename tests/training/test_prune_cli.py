"""`lcf-fast prune`, from an adapter, two models and data to a smaller adapter, a table, JSON and a picture."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_folders import save_tiny_model, write_lines

from lcf_fast import CacheGeometry, LatentCacheFlow, LatentSlots, LCFConfig
from lcf_fast.cli import main
from lcf_fast.training import prune_command
from lcf_fast.training.batches import Batch, ExampleData
from lcf_fast.training.data import read_examples
from lcf_fast.training.models import load_model, load_tokenizer
from lcf_fast.training.settings import TrainingSettings
from lcf_fast.training.step import OnlinePrefills, TrainingStep

pytest.importorskip("tokenizers")
pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("sharer", "receiver")
DEAD, HARMFUL = 1, 2
#: How far each layer goes down the slope of the loss.
LENGTHS = {0: 0.3, DEAD: 1.0, HARMFUL: -0.5, 3: 0.6}
COLOURS = ["red", "blue", "green", "grey", "white", "black", "pink"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, data of both kinds, and an adapter of each kind with four layers."""
    root = tmp_path_factory.mktemp("prune")
    save_tiny_model(root / "sharer", "qwen2", layers=3, seed=0)
    save_tiny_model(root / "receiver", "qwen3", layers=4, seed=1)
    write_lines(root / "shared.jsonl", [{"prompt": f"Say {word} now", "response": word} for word in COLOURS])
    write_lines(
        root / "cross.jsonl",
        [
            {
                "sharer_context": [f"The sky is {word}.", "The sea is deep."],
                "receiver_context": "It is a day.",
                "question": "The sky?",
                "answer": word,
            }
            for word in COLOURS
        ],
    )
    for kind in ("shared", "cross"):
        made_adapter(root, kind).save_pretrained(root / kind)
    return root


def made_adapter(root: Path, kind: str) -> LatentCacheFlow:
    """Its layers add a vector to every key and value: down the loss's slope, up the slope, or nothing."""
    torch.manual_seed(3)
    crossing = kind == "cross"
    config = LCFConfig(
        CacheGeometry(3, 1, 16), CacheGeometry(4, 2, 16), bottleneck=64, cross_context=crossing, gate_init=1
    )
    adapter = LatentCacheFlow(config).eval()
    bias = adapter.get_parameter("up_bias")
    with torch.no_grad():
        adapter.get_parameter("up_weight").zero_()
        bias.zero_()
    step, batches = loaded(root, kind, adapter)
    sum(step(batch) for batch in batches).backward()
    slope = bias.grad
    assert slope is not None
    with torch.no_grad():
        for layer, length in LENGTHS.items():
            bias[layer] = -length * slope[layer] / slope[layer].norm()
        adapter.gate_logit[DEAD] = -0.25
    return adapter


def loaded(root: Path, kind: str, adapter: LatentCacheFlow) -> tuple[TrainingStep, list[Batch]]:
    """A step of an adapter between the two models, and all examples one by one."""
    sharer, receiver = (load_model("model", str(root / name), "fp32").requires_grad_(False) for name in MODELS)
    sharer_tokenizer, receiver_tokenizer = (load_tokenizer("model", str(root / name)) for name in MODELS)
    settings = TrainingSettings(steps=7, batch_size=1, micro_batch_size=1)
    data = ExampleData(read_examples(root / f"{kind}.jsonl"), sharer_tokenizer, receiver_tokenizer, settings)
    return TrainingStep(adapter, receiver, OnlinePrefills(sharer, receiver)), [data.batch(i, 0) for i in range(7)]


def arguments(folder: Path, out: Path, kind: str, *more: str) -> list[str]:
    models = ["--sharer", str(folder / "sharer"), "--receiver", str(folder / "receiver"), "--precision", "fp32"]
    data = ["--data", str(folder / f"{kind}.jsonl"), "--held-out", "0", "--device", "cpu"]
    return ["prune", str(folder / kind), str(out), *models, *data, *more]


@pytest.mark.parametrize("kind", ["shared", "cross"])
def test_the_most_important_layers_become_an_adapter(
    kind: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = pytest.importorskip("matplotlib.image")
    plot = tmp_path / "layers.png"
    assert main(arguments(folder, tmp_path / "json", kind, "--json", "--quiet", "--plot", str(plot))) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    found = json.loads(shown.out)
    by_layer = {layer["receiver_layer"]: layer for layer in found["layers"]}
    verdicts = {layer: each["verdict"] for layer, each in by_layer.items()}
    assert verdicts == {0: "useful", DEAD: "dead", HARMFUL: "harmful", 3: "useful"}
    assert (found["metric"], found["examples"], found["kept"]) == ("loss", 7, [0, 3])
    assert image.imread(plot).std() > 0.05

    # The losses are those of the adapters, an example at a time.
    def loss(adapter: LatentCacheFlow) -> float:
        step, batches = loaded(folder, kind, adapter)
        return sum(step(batch).item() for batch in batches) / found["response_tokens"]

    with torch.no_grad():
        assert found["whole"] == pytest.approx(loss(LatentCacheFlow.from_pretrained(folder / kind)), rel=1e-5)
        pruned = LatentCacheFlow.from_pretrained(tmp_path / "json")
        assert pruned.receiver_layers.tolist() == [0, 3]
        assert found["pruned"] == pytest.approx(loss(pruned), rel=1e-5)
        for layer in (0, HARMFUL):
            without = LatentCacheFlow.from_pretrained(folder / kind).prune({0, 1, 2, 3} - {layer})
            assert by_layer[layer]["metric_without"] == pytest.approx(loss(without), rel=1e-5)
    assert found["pruned"] < found["whole"] < found["alone"]

    assert main(arguments(folder, tmp_path / "one", kind, "--keep", "1")) == 0
    shown = capsys.readouterr()
    first = max((0, 3), key=lambda layer: float(by_layer[layer]["importance"]))
    one = LatentCacheFlow.from_pretrained(tmp_path / "one")
    assert one.receiver_layers.tolist() == [first]
    rows = [line.split("│") for line in shown.out.splitlines() if line.startswith("│")]
    assert [row[8].strip() for row in rows] == ["yes" if layer == first else "no" for layer in range(4)]
    assert [row[4].strip() for row in rows] == ["useful", "dead", "harmful", "useful"]
    assert rows[first][7].strip() == "1"
    lines = shown.out.splitlines()
    assert lines[-2].startswith(f"{tmp_path / 'one'}: 1 of 4 layers, {one.parameter_count():,} of ")
    assert lines[-1].startswith(f"loss {found['whole']:.4f} with all layers, ")
    assert lines[-1].endswith(f"with none (7 examples, {found['response_tokens']} response tokens)")
    assert "7 examples" in shown.err


def test_without_models_by_gates_or_by_name(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", str(folder / "shared"), str(tmp_path / "live"), "--audit-only"]) == 0
    assert LatentCacheFlow.from_pretrained(tmp_path / "live").receiver_layers.tolist() == [0, 2, 3]
    assert "live: 3 of 4 layers" in capsys.readouterr().out
    assert main(["prune", str(tmp_path / "live"), str(tmp_path / "two"), "--layers", "2-3"]) == 0
    assert LatentCacheFlow.from_pretrained(tmp_path / "two").receiver_layers.tolist() == [2, 3]


def test_stored_prefills_give_the_same_and_are_of_one_sharer(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = ["cache", *arguments(folder, tmp_path, "shared")[3:], "--out", str(tmp_path / "store")]
    assert main([*store, "--steps", "1", "--batch-size", "7"]) == 0
    (tmp_path / "sharer").mkdir()
    for name in (folder / "sharer").iterdir():
        if name.suffix != ".safetensors":  # its weights are not needed any more
            (tmp_path / "sharer" / name.name).write_bytes(name.read_bytes())
    reports: list[dict[str, Any]] = []
    for more in (["--cached", str(tmp_path / "store"), "--sharer", str(tmp_path / "sharer")], []):
        capsys.readouterr()
        out = tmp_path / f"out-{len(reports)}"
        assert main(arguments(folder, out, "shared", "--json", "--quiet", *more)) == 0
        shown = capsys.readouterr()
        reports.append(json.loads(shown.out))
        assert ("no weights here" in shown.err) == bool(more)
    save_tiny_model(tmp_path / "other", "qwen2", layers=3, seed=8)
    other = ["--cached", str(tmp_path / "store"), "--sharer", str(tmp_path / "other")]
    assert main(arguments(folder, tmp_path / "out-2", "shared", *other)) == 2
    assert "the sharer that the store was made with" in capsys.readouterr().err.splitlines()[-1]
    assert reports[0]["kept"] == reports[1]["kept"]
    for one, other in zip(reports[0]["layers"], reports[1]["layers"], strict=True):
        assert one["verdict"] == other["verdict"]
        if one["verdict"] != "dead":
            assert one["metric_without"] == pytest.approx(other["metric_without"], rel=1e-5)


def test_examples_are_those_that_training_left_out(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = read_examples(folder / "shared.jsonl").held_out(0.8)[1]
    assert 2 < len(held) < 7
    for more, count in ((["--held-out", "0.8"], len(held)), (["--held-out", "0.8", "--examples", "2"], 2)):
        assert main(arguments(folder, tmp_path / str(count), "shared", "--json", "--quiet", *more)) == 0
        assert json.loads(capsys.readouterr().out)["examples"] == count


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--keep", "4"], "--keep: expected 1 to 3, the layers with an open gate, got 4"),
        (["--keep", "0"], "--keep: expected 1 to 3"),
        (["--sharer", "RECEIVER"], "sharer: expected an adapter for CacheGeometry(layers=4"),
        (["--audit-only"], "--audit-only: expected no models and data"),
        (["--data", "nothing.jsonl"], "no such file"),
        (["--data", "CROSS"], "shared context"),
        (["--held-out", "0.0001"], "--held-out: expected a fraction that is an example or more"),
        (["--examples", "0"], "--examples: expected 1 or more"),
        (["--cached", "nowhere"], "manifest.json"),
        (["--plot", "no/such/folder/layers.png"], "--plot: expected a file in a folder that is there"),
        (["--device", "foo"], "--device: expected a name such as cpu or cuda:0, got 'foo'"),
        (["--device", "cuda:99"], "--device: expected"),
    ],
)
def test_bad_input_is_one_line_before_work(
    more: list[str],
    message: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prune_command, "_rank", None)
    places = {"RECEIVER": str(folder / "receiver"), "CROSS": str(folder / "cross.jsonl")}
    more = [places.get(word, word) for word in more]
    assert main(arguments(folder, tmp_path / "out", "shared", *more)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("lcf-fast prune: error: ")
    assert message in error
    assert not (tmp_path / "out").exists()


def test_what_an_adapter_needs_is_told(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine, out = str(folder / "shared"), str(tmp_path / "out")
    for arguments, message in (
        (["prune", mine, out], "no --sharer, --receiver, --data"),
        (["prune", mine, str(folder / "cross"), "--audit-only"], "a folder without an adapter"),
        (["prune", str(tmp_path), out, "--audit-only"], "config.json"),
        (["prune", mine, out, "--audit-only", "--examples", "3"], "which nothing is measured on, got --examples"),
        (["prune", mine, out, "--layers", "1", "--held-out", "0"], "which nothing is measured on, got --held-out"),
        (["prune", mine, __file__, "--audit-only"], "OUT: expected a folder, or none yet"),
        (["prune", mine, out, "--layers", "4"], "--layers: expected receiver layers among [0, 1, 2, 3], got 4"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    geometry = CacheGeometry(2, 1, 16)
    LatentSlots(LCFConfig(geometry, geometry, bottleneck=64, slots=2)).save_pretrained(tmp_path / "slots")
    for more in ([], ["--audit-only"], ["--layers", "0"]):
        assert main(["prune", str(tmp_path / "slots"), out, *more]) == 2
        said = capsys.readouterr().err
        assert "ADAPTER: expected LCF or LCF-X (slots adapters are not pruned" in said
        assert "from_pretrained" not in said
    adapter = LatentCacheFlow.from_pretrained(mine)
    with torch.no_grad():
        adapter.gate_logit.fill_(0.0)
    adapter.save_pretrained(tmp_path / "shut")
    assert main(["prune", str(tmp_path / "shut"), out, "--audit-only"]) == 2
    assert "4 dead, 0 harmful" in capsys.readouterr().err
    assert not Path(out).exists()


def test_what_was_measured_is_shown_though_nothing_can_be_saved(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(arguments(folder, tmp_path / "file" / "out", "shared", "--json", "--quiet")) == 2
    shown = capsys.readouterr()
    assert "file" in shown.err
    found = json.loads(shown.out)
    assert (found["examples"], found["kept"], found["pruned"]) == (7, [], None)


def test_prompts_are_as_the_adapter_was_trained(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = LatentCacheFlow.from_pretrained(folder / "shared")
    adapter.trained_template_options = {"thinking": False}
    adapter.save_pretrained(tmp_path / "adapter")

    def loss(out: str, *more: str) -> float:
        given = arguments(folder, tmp_path / out, "shared", "--json", "--quiet", *more)
        assert main([given[0], str(tmp_path / "adapter"), *given[2:]]) == 0
        shown = capsys.readouterr()
        assert ("trained with the template options" in shown.err) == bool(more)
        return float(json.loads(shown.out)["pruned"])

    assert loss("as trained") != loss("otherwise", "--template-options", "{}")
    assert LatentCacheFlow.from_pretrained(tmp_path / "otherwise").trained_template_options == {"thinking": False}


def test_help_has_examples_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; from lcf_fast.cli import main\n"
        "try: main(['prune', '--help'])\n"
        "finally: print('heavy:', {'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "\nexamples:\n" in shown
    assert "heavy: set()" in shown
    assert max(map(len, shown.splitlines())) <= 120
