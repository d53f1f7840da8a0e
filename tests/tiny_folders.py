"""Tiny models with tokenizers, saved as folders; import as ``from tiny_folders import ...``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tiny_tokenizers import CHATML, INST, tiny_tokenizer

#: By architecture: the options of its tokenizer, and its KV heads. The two tokenizers cut a text differently.
_KINDS: dict[str, tuple[dict[str, Any], int]] = {
    "qwen2": ({"template": INST, "merges": False}, 1),
    "qwen3": ({"template": CHATML}, 2),
}


def save_tiny_model(folder: Path, kind: str, *, layers: int = 2, seed: int = 0) -> None:
    """A random Qwen2 or Qwen3 causal LM of width 32, with its tokenizer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    options, kv_heads = _KINDS[kind]
    tokenizer = tiny_tokenizer("bytes", **options)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 512,
    }
    torch.manual_seed(seed)
    if kind == "qwen3":
        model: Any = Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=16))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**sizes))
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def write_lines(path: Path, rows: Iterable[object]) -> None:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
