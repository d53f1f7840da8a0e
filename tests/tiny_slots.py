"""Slots adapters between tiny models; import as ``from tiny_slots import ...``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lcf_fast import CacheGeometry, LatentSlots, LCFConfig

#: Tiny causal LMs of every served kind of positions: a name, the class's stem, what its configuration has beside.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "llama": ("Llama", {}),
    "llama, llama3 rope": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "llama, yarn": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "llama, linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "mistral": ("Mistral", {}),
    "gemma2": ("Gemma2", {}),
    "gemma3": ("Gemma3Text", {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "phi3": ("Phi3", {"hidden_size": 64}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1]}),
    # Half of each head turns, a quarter; all of it by half as many angles.
    "phi": ("Phi", {"hidden_size": 64}),
    "stablelm": ("StableLm", {"hidden_size": 64}),
    "gpt_oss": ("GptOss", {"num_local_experts": 2, "num_experts_per_tok": 1}),
}


#: Rope types whose frequencies go by the last position of a call: other ones from the 41st on.
BY_LENGTH: dict[str, dict[str, Any]] = {
    "dynamic": {"factor": 4.0},
    "longrope": {"factor": 4.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8},
}


def by_length(kind: str) -> dict[str, Any]:
    """What a configuration of such a rope type has beside, for `family_model`."""
    own = {"rope_type": kind, "rope_theta": 10000.0, "original_max_position_embeddings": 40, **BY_LENGTH[kind]}
    return {"rope_parameters": own, "max_position_embeddings": 40 if kind == "dynamic" else 256}


def family_model(name: str, seed: int = 0, **more: Any) -> Any:
    """A random model of three layers, width 32, with an answer that depends on what it reads; ``more``: sizes."""
    import transformers

    stem, changes = FAMILIES[name]
    sizes: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        **changes,
        **more,
    }
    torch.manual_seed(seed)
    model = "Gemma3" if stem == "Gemma3Text" else stem
    made = getattr(transformers, f"{model}ForCausalLM")(getattr(transformers, f"{stem}Config")(**sizes)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(3.0)
    return made.requires_grad_(False)


def slots_adapter(sharer: Any, receiver: Any, slots: int = 3, *, dropout: float = 0.0, seed: int = 5) -> LatentSlots:
    """Fresh, in eval mode; what it adds weighs as much as the receiver's own."""
    config = LCFConfig(
        CacheGeometry.of(sharer), CacheGeometry.of(receiver), bottleneck=64, slots=slots, dropout=dropout
    )
    torch.manual_seed(seed)
    made = LatentSlots(config).eval()
    with torch.no_grad():
        made.get_parameter("up_weight").mul_(3.0)
    return made


def ragged_ids(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """``(B, N)`` random ids and mask, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(3, 61, (len(lengths), width), generator=generator)
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask
