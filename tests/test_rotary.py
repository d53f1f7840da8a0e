"""Keys to and from their positions: against what the models themselves put into their caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_slots import BY_LENGTH, FAMILIES, by_length, family_model
from torch import Tensor

from lcf_fast.errors import DTypeError, GeometryError, IndexRangeError, LCFError, ShapeError
from lcf_fast.rotary import Rotary


def keys_of(model: Any, ids: Tensor, positions: Tensor) -> list[Tensor]:
    cache = model(ids, position_ids=positions, use_cache=True).past_key_values
    return [layer.keys for layer in cache.layers]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_models_own_keys_turn_as_the_model_turns_them(name: str) -> None:
    """Attention knows differences of positions alone: the same tokens further on have the same keys, but turned."""
    model = family_model(name)
    rotary = Rotary.of(model)
    ids = torch.randint(3, 61, (2, 7))
    here = torch.arange(7).expand(2, 7)
    there = here + torch.tensor([[11], [40]])
    first, second = keys_of(model, ids, here), keys_of(model, ids, there)
    bare = rotary.unrotate(first, here)
    for got, own, moved, other in zip(rotary.rotate(bare, here), first, rotary.rotate(bare, there), second):
        torch.testing.assert_close(got, own, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(moved, other, rtol=2e-4, atol=2e-4)
    for a, b in zip(rotary.unrotate(second, there), bare):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)
    if name != "smollm3":
        assert all(float((a - b).abs().max()) > 0.1 for a, b in zip(first, second)), "nothing was turned"


@pytest.mark.parametrize("total", [30, 90])
@pytest.mark.parametrize("kind", BY_LENGTH)
def test_a_part_of_a_longer_text_turns_by_the_texts_frequencies(kind: str, total: int) -> None:
    model = family_model("llama", **by_length(kind))
    rotary, at = Rotary.of(model), torch.arange(total)[None]
    own = keys_of(model, torch.randint(3, 61, (1, total)), at)
    bare = [key[:, :, :4] for key in rotary.unrotate(own, at)]
    for got, wanted in zip(rotary.rotate(bare, at[:, :4], length=total), own):
        torch.testing.assert_close(got, wanted[:, :, :4], rtol=1e-4, atol=1e-4)
    if kind == "longrope" and total > 40:
        alone = rotary.rotate(bare, at[:, :4])
        assert float((alone[0] - own[0][:, :, :4]).abs().max()) > 0.1


@pytest.mark.parametrize(("length", "error"), [(3, ShapeError), (4.0, DTypeError), (True, DTypeError)])
def test_bad_lengths(length: Any, error: type[LCFError]) -> None:
    keys = [torch.ones(1, 2, 4, 16)] * 3
    with pytest.raises(error, match="length"):
        Rotary.of(family_model("qwen3")).rotate(keys, torch.arange(4)[None], length=length)


def test_layers_of_several_kinds_are_told_apart() -> None:
    assert Rotary.of(family_model("gemma3")).kinds == ("sliding_attention", "full_attention", "sliding_attention")
    kinds = Rotary.of(family_model("smollm3")).kinds
    assert (kinds[0], kinds[1]) == (kinds[2], "none")


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "llama, yarn"])
def test_in_bfloat16_the_kinds_are_the_same(name: str) -> None:
    assert Rotary.of(family_model(name).bfloat16()).kinds == Rotary.of(family_model(name)).kinds


def test_it_is_found_once_and_the_model_stays_as_it_was() -> None:
    model = family_model("qwen3").train()
    model.base_model.layers[1].eval()  # as of one who trains a part of it
    modes = [module.training for module in model.modules()]
    calls = []
    hook = model.base_model.register_forward_hook(lambda *_: calls.append(1))
    rotary = Rotary.of(model)
    assert Rotary.of(model) is rotary
    assert Rotary.of(rotary) is rotary
    hook.remove()
    assert len(calls) == 1
    assert [module.training for module in model.modules()] == modes


def test_a_padding_token_of_zeros_does_not_mislead() -> None:
    model = family_model("qwen3")
    model.config.pad_token_id = 1
    model.get_input_embeddings().weight[1] = 0
    assert Rotary._probed(model).kinds == ("",) * 3


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_head=2, n_layer=2)).eval()


def half_turned() -> Any:
    """Its rotary embedding says one thing, its layers do another."""
    model = family_model("qwen3")
    right = model.base_model.rotary_emb.forward
    own = {"count": 0}

    def wrong(x: Tensor, position_ids: Tensor) -> Any:
        own["count"] += 1
        return right(x, position_ids if own["count"] == 1 else 2 * position_ids)

    model.base_model.rotary_emb.forward = wrong
    return model


def test_layers_without_a_rotation_of_which_the_embedding_knows_nothing() -> None:
    """Its rotary embedding has angles for the layers with a window alone; the others see no positions."""
    model = family_model("gemma3")
    body = model.base_model
    angles = body.rotary_emb.forward
    still = torch.ones(1), torch.zeros(1)
    reading = [True]

    def forward(x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        if layer_type == "full_attention":
            if not reading:
                raise KeyError(layer_type)
            return tuple(part.expand_as(x[..., :1, :16]) for part in still)
        return angles(x, position_ids, layer_type)

    body.rotary_emb.forward = forward
    with body.register_forward_hook(lambda *_: reading.clear()):
        rotary = Rotary.of(model)
    assert rotary.kinds == ("sliding_attention", "none", "sliding_attention")


def reads_elsewhere() -> Any:
    """As models whose caches are of another kind complain of a DynamicCache."""
    model = family_model("qwen3")

    def forward(**_: Any) -> Any:
        raise IndexError("list index out of range")

    model.base_model.forward = forward
    return model


@pytest.mark.parametrize("make", [gpt2, half_turned, reads_elsewhere, lambda: torch.nn.Linear(2, 2), lambda: None])
def test_a_model_that_cannot_be_served_is_refused(make: Any) -> None:
    with pytest.raises(GeometryError) as caught:
        Rotary.of(make())
    assert caught.value.argument == "receiver"


@pytest.mark.parametrize(
    ("positions", "error"),
    [
        (torch.zeros(2, 3), DTypeError),
        ([[0, 1, 2]], DTypeError),
        (torch.zeros(2, 4, dtype=torch.int64), ShapeError),
        (torch.zeros(3, 3, dtype=torch.int64), ShapeError),
        (torch.tensor([[0, -1, 2]]), IndexRangeError),
    ],
)
def test_bad_positions(positions: Any, error: type[LCFError]) -> None:
    rotary = Rotary.of(family_model("qwen3"))
    keys = [torch.randn(2, 2, 3, 16)] * 3
    with pytest.raises(error):
        rotary.rotate(keys, positions)
    with pytest.raises(GeometryError):
        rotary.rotate(keys[:2], torch.zeros(1, 3, dtype=torch.int64))


@pytest.mark.parametrize("shape", [(2, 4, 3, 16), (2, 2, 3, 32), (2, 4, 3, 8)])
def test_keys_of_other_heads_are_refused(shape: tuple[int, ...]) -> None:
    """Also of as many channels in all: a head is what turns."""
    rotary = Rotary.of(family_model("qwen3"))
    assert rotary.heads == ((2, 16),) * 3
    with pytest.raises(GeometryError, match="2 KV heads of dim 16"):
        rotary.rotate([torch.randn(shape)] * 3, torch.zeros(1, 3, dtype=torch.int64))


@pytest.mark.parametrize("keys", [None, 3, [None], "keys", [torch.zeros(2, 3)]], ids=str)
def test_keys_that_are_none(keys: Any) -> None:
    with pytest.raises(DTypeError, match="keys"):
        Rotary.of(family_model("qwen3")).rotate(keys, torch.zeros(2, 3, dtype=torch.int64))
