"""What is taken for a causal language model, and what is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_tokenizers import tiny_tokenizer

from lcf_fast import CacheGeometry, LatentCacheFlow, LCFConfig
from lcf_fast.cli import main
from lcf_fast.training.failures import RunError
from lcf_fast.training.models import load_config, load_model

pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


OTHERS = (
    "BertForMaskedLM",
    "BertModel",
    "T5ForConditionalGeneration",
    "Qwen3Model",
    "Qwen3ForSequenceClassification",
)


def saved(folder: Path, name: str) -> Path:
    """A tiny model of transformers by the name of its class."""
    sizes = dict(SIZES)
    if name.startswith("T5"):
        sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}
    family = next(each for each in ("Bert", "T5", "Qwen3") if name.startswith(each))
    torch.manual_seed(0)
    getattr(transformers, name)(getattr(transformers, f"{family}Config")(**sizes)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", OTHERS)
def test_another_kind_of_model_is_refused_by_name(name: str, tmp_path: Path) -> None:
    saved(tmp_path / "m", name)
    for load in (load_config, lambda role, path: load_model(role, path, "fp32")):
        with pytest.raises(RunError, match=f"sharer .*: expected the folder .* causal language model.* got {name}"):
            load("sharer", str(tmp_path / "m"))


@pytest.mark.parametrize("architectures", [None, ["Qwen3ForCausalLM"], ["SomeLMHeadModel"]])
def test_a_causal_model_is_taken(architectures: list[str] | None, tmp_path: Path) -> None:
    path = saved(tmp_path / "m", "Qwen3ForCausalLM") / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": architectures}))
    assert load_config("sharer", str(tmp_path / "m")).num_hidden_layers == 2
    assert type(load_model("sharer", str(tmp_path / "m"), "bf16")).__name__ == "Qwen3ForCausalLM"


def shorten(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def configured(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        found = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**found, **changes}))

    return change


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "half a file": (shorten, "incomplete metadata"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "weights of fewer layers": (
        configured(num_hidden_layers=3, layer_types=["full_attention"] * 3),
        "weights of all that its config.json describes, got none of model.layers.2.*, .*, .* and 8 more",
    ),
    "weights of another size": (configured(intermediate_size=64), "causal language model"),
    "a text for a number": (configured(num_hidden_layers="two"), "causal language model"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_folder_is_a_typed_error(how: str, tmp_path: Path) -> None:
    damage, said = DAMAGE[how]
    damage(saved(tmp_path / "m", "Qwen3ForCausalLM"))
    with pytest.raises(RunError, match=said):
        load_model("receiver", str(tmp_path / "m"), "fp32")


@pytest.mark.parametrize("command", ["train", "cache", "prune", "eval", "latency"])
@pytest.mark.parametrize("role", ["sharer", "receiver"])
def test_no_command_takes_a_bert(role: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "causal", "Qwen3ForCausalLM")
    saved(tmp_path / "bert", "BertForMaskedLM")
    for name in ("causal", "bert"):
        tiny_tokenizer("bytes").save_pretrained(tmp_path / name)
    (tmp_path / "set.jsonl").write_text('{"prompt": "One", "response": "two"}\n{"prompt": "Two", "response": "3"}\n')
    given = [command, "--device", "cpu"]
    for side in ("sharer", "receiver"):
        given += [f"--{side}", str(tmp_path / ("bert" if side == role else "causal"))]
    if command == "prune":  # which looks at the adapter first
        geometry = CacheGeometry(2, 1, 64)
        LatentCacheFlow(LCFConfig(geometry, geometry, bottleneck=64)).save_pretrained(tmp_path / "adapter")
    given += [str(tmp_path / "adapter")] if command == "prune" else ["--out"]
    given += [str(tmp_path / "out")]
    given += [] if command == "latency" else ["--data", str(tmp_path / "set.jsonl")]
    assert main(given) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"lcf-fast {command}: error: {role} {tmp_path / 'bert'}: expected the folder or hub id of a")
    assert not (tmp_path / "out").exists()
