"""Real models and a real text: what the caches come from. transformers is imported here only.

Without a path the two published architectures are built with random weights. Their vocabulary is cut to the bytes of
the text: it does not change a cache's shape, and nothing here reads a logit. Nothing is downloaded unless a hub id is
given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcf_fast import CacheGeometry
from lcf_fast.caches import cache_layers

Pair = tuple[Tensor, Tensor]
TEXT = Path(__file__).with_name("text.txt")
SEED = 20260807
#: Byte-level ids: one a byte.
BYTES = 256
#: The published vocabulary of both models, which random weights leave out.
PUBLISHED_VOCABULARY = 151_936

# The config.json of Qwen/Qwen2.5-0.5B-Instruct and of Qwen/Qwen3-0.6B, but for the vocabulary.
_QWEN25: dict[str, Any] = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32_768,
}
_QWEN3: dict[str, Any] = {
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
    "vocab_size": BYTES,
}


@dataclass(frozen=True)
class Source:
    """One side's model and its tokenizer.

    Attributes:
        model: the body, without the head; its call with ``use_cache=True`` gives the cache.
        tokenizer: None: a byte is a token.
        geometry: of its cache.
        label: what the results call it; holds no path.
    """

    model: Any
    tokenizer: Any
    geometry: CacheGeometry
    label: str


def load(where: str | None, role: str, *, device: torch.device, dtype: torch.dtype) -> Source:
    """The model of ``role`` (``sharer`` or ``receiver``): from a folder or hub id, else random.

    Raises:
        RuntimeError: transformers is not installed.
        OSError, ValueError: as transformers raises them for what it cannot load.
    """
    try:
        from transformers import AutoModel, AutoTokenizer, Qwen2Config, Qwen3Config
        from transformers.utils import logging
    except ImportError as error:
        raise RuntimeError(f"the main job makes its caches with transformers 5, which is missing: {error}") from error
    logging.set_verbosity_error()  # the missing head and the tokenizer are meant to be missing
    logging.disable_progress_bar()
    if where is None:
        if role == "sharer":
            config: Any = Qwen2Config(**_QWEN25, **_BOTH)
            name = "Qwen2.5-0.5B"
        else:
            config = Qwen3Config(**_QWEN3, **_BOTH)
            name = "Qwen3-0.6B"
        model = _random_model(AutoModel, config, device, dtype)
        label = f"{name} architecture, random weights, vocabulary {BYTES} of {PUBLISHED_VOCABULARY} (bytes)"
        return Source(model, None, CacheGeometry.of(config), label)
    model = AutoModel.from_pretrained(where, dtype=dtype).eval().requires_grad_(False).to(device)
    tokenizer = _tokenizer(AutoTokenizer, where)
    label = f"{Path(where).name}, its own weights{'' if tokenizer else ', bytes as tokens'}"
    return Source(model, tokenizer, CacheGeometry.of(model), label)


def _tokenizer(auto: Any, where: str) -> Any:
    """The model's tokenizer; None where there is none, since a folder may hold a model only."""
    try:
        tokenizer = auto.from_pretrained(where)
        # Some classes come up empty where their files are missing, and encode every text to nothing.
        return tokenizer if tokenizer("The tide", add_special_tokens=False)["input_ids"] else None
    except Exception:  # differs by tokenizer class
        return None


def _random_model(auto: Any, config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The architecture with random weights: the published initialisation's scale, fixed seed, no slow default init."""
    with torch.device("meta"):
        model = auto.from_config(config, dtype=dtype)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    model.rotary_emb = type(model.rotary_emb)(config=config).to(device)  # its buffers are computed, not loaded
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


def paragraphs() -> list[str]:
    """The text, a paragraph an entry."""
    return [part.strip() for part in TEXT.read_text(encoding="utf-8").split("\n\n") if part.strip()]


def tokenize(source: Source, parts: Sequence[str], tokens: int) -> tuple[list[int], list[int]]:
    """``tokens`` ids of the paragraphs in order, again from the start where they run out, and the spans' offsets.

    Returns:
        ids, and P + 1 offsets, a paragraph a span.
    """
    vocabulary = int(source.model.config.get_text_config().vocab_size)
    encoded = []
    for part in parts:
        text = part + "\n\n"
        if source.tokenizer is None:
            encoded.append([byte % vocabulary for byte in text.encode()])
        else:
            encoded.append(list(source.tokenizer(text, add_special_tokens=False)["input_ids"]))
    ids: list[int] = []
    offsets = [0]
    while len(ids) < tokens:
        for paragraph in encoded:
            ids.extend(paragraph)
            offsets.append(min(len(ids), tokens))
            if len(ids) >= tokens:
                break
    return ids[:tokens], offsets


@torch.no_grad()
def prefill(source: Source, ids: Sequence[int]) -> list[Pair]:
    """The cache that the model makes of these ids: one ``(key, value)`` a layer, each ``(1, H, N, D)``."""
    tensor = torch.tensor([list(ids)], device=next(source.model.parameters()).device)
    cache = source.model(tensor, use_cache=True).past_key_values
    return cache_layers(cache, geometry=source.geometry)
