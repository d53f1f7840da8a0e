"""Tiny agents of several families, and adapters between them; import as ``from tiny_agents import ...``."""

from __future__ import annotations

from typing import Any

import torch
from tiny_tokenizers import CHATML, tiny_tokenizer

from lcf_fast import CacheGeometry, LatentCacheFlow, LCFConfig
from lcf_fast.channels import Agent


def tiny_model(family: str, seed: int, *, layers: int = 2, limit: int = 512) -> Any:
    import transformers as t

    sizes: dict[str, Any] = {
        "vocab_size": 640,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": limit,
        "eos_token_id": 4,
        "pad_token_id": 0,
        "bos_token_id": 1,
    }
    kinds = {
        "qwen2": (t.Qwen2Config, t.Qwen2ForCausalLM),
        "qwen3": (t.Qwen3Config, t.Qwen3ForCausalLM),
        "llama": (t.LlamaConfig, t.LlamaForCausalLM),
        "mistral": (t.MistralConfig, t.MistralForCausalLM),
        "gemma": (t.GemmaConfig, t.GemmaForCausalLM),
        "phi3": (t.Phi3Config, t.Phi3ForCausalLM),
    }
    config, model = kinds[family]
    torch.manual_seed(seed)
    made = model(config(**sizes)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(3.0)  # answers that depend on what is read
    return made


def agent(name: str, family: str, seed: int, *, template: str | None = CHATML, **sizes: Any) -> Agent:
    kind = "bytes" if seed % 2 else "metaspace"
    return Agent(name, tiny_model(family, seed, **sizes), tiny_tokenizer(kind, template=template))


def adapter_of(sharer: Agent, receiver: Agent, *, cross_context: bool) -> LatentCacheFlow:
    torch.manual_seed(8)
    sides = CacheGeometry.of(sharer.model), CacheGeometry.of(receiver.model)
    config = LCFConfig(*sides, bottleneck=64, cross_context=cross_context, gate_init=1.0)
    made = LatentCacheFlow(config).eval()
    with torch.no_grad():
        made.up_weight.mul_(20.0)  # type: ignore[operator]
    return made
