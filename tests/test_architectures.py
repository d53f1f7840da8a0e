"""Models of random weights: every weight and buffer is written, ties hold, two of one config are the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lcf_fast import CacheGeometry
from lcf_fast.architectures import PUBLISHED_VOCABULARY, published_config, random_model

transformers = pytest.importorskip("transformers")
CPU = torch.device("cpu")


def tiny_config(kind: str, **more: Any) -> Any:
    size = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, **more}
    config = {"qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config}[kind]
    return config(num_hidden_layers=2, num_key_value_heads=1, **size)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_nothing_is_left_unwritten(kind: str, tied: bool) -> None:
    """Fresh memory holds NaN here (`poisoned_memory`)."""
    config = tiny_config(kind, tie_word_embeddings=tied)
    model = random_model(transformers.AutoModelForCausalLM, config, CPU, torch.float32)
    ids = torch.arange(20)[None]
    logits = model(ids).logits
    assert torch.isfinite(logits).all()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert not any(parameter.requires_grad for parameter in model.parameters())
    again = random_model(transformers.AutoModelForCausalLM, config, CPU, torch.float32)
    assert torch.equal(again(ids).logits, logits)
    # The buffers are those that the class itself computes: positions tell.
    theirs = type(model)(config).model.rotary_emb.inv_freq
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, theirs)


def test_a_body_alone_has_no_head() -> None:
    body = random_model(transformers.AutoModel, tiny_config("qwen3"), CPU, torch.float32)
    assert not hasattr(body, "lm_head")
    assert torch.isfinite(body(torch.arange(9)[None]).last_hidden_state).all()


def test_the_published_sizes() -> None:
    """With the whole vocabulary, which decides what a step costs: 494.0M and 596.0M parameters."""
    for role, geometry, count in (("sharer", (24, 2, 64), 494_032_768), ("receiver", (28, 8, 128), 596_049_920)):
        config = published_config(role)
        assert config.vocab_size == PUBLISHED_VOCABULARY == 151_936
        assert CacheGeometry.of(config) == CacheGeometry(*geometry)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        assert sum(parameter.numel() for parameter in model.parameters()) == count
        assert config.eos_token_id is None, "a note could end early"
