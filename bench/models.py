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
from lcf_fast.architectures import PUBLISHED_VOCABULARY, published_config, random_model
from lcf_fast.caches import cache_layers
from lcf_fast.reading.prefill import prefill as prefill_of

Pair = tuple[Tensor, Tensor]
TEXT = Path(__file__).with_name("text.txt")
#: Byte-level ids: one a byte.
BYTES = 256


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
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise RuntimeError(f"the main job makes its caches with transformers 5, which is missing: {error}") from error
    logging.set_verbosity_error()  # the missing head and the tokenizer are meant to be missing
    logging.disable_progress_bar()
    if where is None:
        name = "Qwen2.5-0.5B" if role == "sharer" else "Qwen3-0.6B"
        config = published_config(role, vocabulary=BYTES)
        model = random_model(AutoModel, config, device, dtype)
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
    return cache_layers(prefill_of(source.model, tensor, torch.ones_like(tensor)), geometry=source.geometry)
