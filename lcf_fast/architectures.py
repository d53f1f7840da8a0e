"""The two published architectures, and models of them with random weights: real sizes without a download."""

from __future__ import annotations

from typing import Any

import torch

from .errors import BackendError

__all__ = ["PUBLISHED_VOCABULARY", "QWEN3", "QWEN25", "published_config", "random_model"]

#: Of both models.
PUBLISHED_VOCABULARY = 151_936
SEED = 20260807

# The config.json of Qwen/Qwen2.5-0.5B-Instruct and of Qwen/Qwen3-0.6B, but for the vocabulary.
QWEN25: dict[str, Any] = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32_768,
}
QWEN3: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
}
_BOTH: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "tie_word_embeddings": True,
    "use_sliding_window": False,
}


def published_config(role: str, *, vocabulary: int = PUBLISHED_VOCABULARY) -> Any:
    """A transformers config: of Qwen2.5-0.5B for the ``"sharer"``, of Qwen3-0.6B for the ``"receiver"``.

    Raises:
        BackendError: transformers is not installed.
    """
    try:
        from transformers import Qwen2Config, Qwen3Config
    except ImportError:
        expected = "the transformers library, which pip install 'lcf-fast[hf]' brings"
        raise BackendError(role, expected=expected, got="an environment without it") from None
    if role == "sharer":
        return Qwen2Config(**QWEN25, **_BOTH, vocab_size=vocabulary)
    return Qwen3Config(**QWEN3, **_BOTH, vocab_size=vocabulary)


def random_model(auto: Any, config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The architecture with random weights: the published initialisation's scale, fixed seed, no slow default init.

    ``auto``: the class of transformers that makes it, ``AutoModel`` or ``AutoModelForCausalLM``.
    """
    with torch.device("meta"):
        model = auto.from_config(config, dtype=dtype)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    model.tie_weights()  # tensors that were one on the meta device are two now
    body = model.base_model
    body.rotary_emb = type(body.rotary_emb)(config=config).to(device)  # its buffers are computed, not loaded
    generator = torch.Generator(device).manual_seed(SEED)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            bound = config.initializer_range * 3**0.5  # a uniform's standard deviation is its bound over sqrt(3)
            parameter.uniform_(-bound, bound, generator=generator)
        elif name.endswith("bias"):
            parameter.uniform_(-1.0, 1.0, generator=generator)  # the published key biases are far from zero
        else:
            parameter.fill_(1.0)
    return model
