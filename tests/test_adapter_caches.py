"""The adapter on the caches that real transformers models make, and generation that goes on from them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from adapters import assert_equal, cloned
from torch import Tensor

from lcf_fast import CacheGeometry, GeometryError, LatentCacheFlow, LCFConfig, ShapeError
from lcf_fast.caches import cache_layers

transformers = pytest.importorskip("transformers")

LENGTH = 9
COMMON = {
    "vocab_size": 64,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """A small Qwen2 and a small Qwen3, as the published pair is."""
    torch.manual_seed(3)
    sharer = transformers.Qwen2Config(**COMMON, num_hidden_layers=3, hidden_size=64)
    receiver = transformers.Qwen3Config(**COMMON, num_hidden_layers=4, hidden_size=32, head_dim=32)
    return tuple(transformers.AutoModelForCausalLM.from_config(c).eval() for c in (sharer, receiver))


def make_adapter(models: tuple[Any, Any], cross_context: bool = False, keep: Any = None) -> LatentCacheFlow:
    torch.manual_seed(11)
    sharer, receiver = (CacheGeometry.of(model) for model in models)
    config = LCFConfig(sharer, receiver, bottleneck=64, cross_context=cross_context, gate_init=1.0)
    adapter = LatentCacheFlow(config, keep_layers=keep).requires_grad_(False).eval()
    adapter.get_parameter("up_weight").mul_(20.0)  # an edit that greedy decoding cannot miss
    return adapter


def make_input(padded: bool) -> tuple[Tensor, Tensor]:
    ids = torch.randint(2, 64, (2, LENGTH), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = 0
    return ids.masked_fill(mask == 0, 0), mask


@torch.no_grad()
def prefill(model: Any, ids: Tensor, mask: Tensor, kind: str) -> Any:
    cache = None if kind == "dynamic" else transformers.StaticCache(config=model.config, max_cache_len=32)
    out = model(ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache, use_cache=True)
    return out.past_key_values


def go_on(model: Any, ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=8, do_sample=False)
    return out[:, ids.shape[1] :]


@pytest.mark.parametrize("cross_context", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_an_edited_cache_is_what_generation_goes_on_from(
    models: tuple[Any, Any], kind: str, padded: bool, cross_context: bool
) -> None:
    sharer, receiver = models
    adapter = make_adapter(models, cross_context, keep=[0, 2, 3])
    ids, mask = make_input(padded)
    shared, own = prefill(sharer, ids, mask, kind), prefill(receiver, ids, mask, kind)
    plain_shared, plain_own = cache_layers(shared), cache_layers(own)
    before = cloned(plain_own)
    visible = mask[:, :-1] if padded else None

    def edit(shared: Any, own: Any, in_place: bool = False) -> Any:
        if cross_context:
            message = adapter.summarize(shared, attention_mask=visible)
            return (adapter.inject_ if in_place else adapter.inject)(own, message, attention_mask=visible)
        fuse = adapter.fuse_ if in_place else adapter.fuse
        return fuse(shared, own, attention_mask=visible, sharer_attention_mask=visible)

    untouched = go_on(receiver, ids, mask, copy.deepcopy(own))
    edited = edit(shared, own)
    assert type(edited) is type(own)
    expected = edit(plain_shared, plain_own)
    assert_equal(cache_layers(edited), expected)
    assert_equal(cache_layers(own), before)

    # The model goes on from the very numbers that the edit made: with a DynamicCache made of them by hand.
    by_hand = transformers.DynamicCache()
    for layer, (key, value) in enumerate(expected):
        by_hand.update(key, value, layer)
    informed = go_on(receiver, ids, mask, edited)
    assert torch.equal(informed, go_on(receiver, ids, mask, by_hand))
    assert not torch.equal(informed, untouched)
    assert_equal(cache_layers(own), before)

    # In place: the same cache, the same buffers, the same tokens.
    pointers = [layer.keys.data_ptr() for layer in own.layers]
    assert edit(shared, own, in_place=True) is own
    assert [layer.keys.data_ptr() for layer in own.layers] == pointers
    assert torch.equal(go_on(receiver, ids, mask, own), informed)


def test_a_static_cache_is_edited_in_a_compiled_graph(models: tuple[Any, Any]) -> None:
    """Which takes its length from the mask: a number that lies in a tensor is not read while tracing."""
    adapter, (ids, mask) = make_adapter(models), make_input(True)
    sharer = prefill(models[0], ids, mask, "dynamic")
    edited, expected = (prefill(models[1], ids, mask, "static") for _ in range(2))
    torch.compiler.reset()
    edit = torch.compile(adapter.fuse_, fullgraph=True, backend="aot_eager")
    edit(sharer, edited, attention_mask=mask[:, :-1])
    adapter.fuse_(sharer, expected, attention_mask=mask[:, :-1])
    for mine, truth in zip(edited.layers, expected.layers):
        torch.testing.assert_close((mine.keys, mine.values), (truth.keys, truth.values), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_closed_gates_change_no_token(models: tuple[Any, Any], kind: str) -> None:
    sharer, receiver = models
    adapter = make_adapter(models)
    adapter.gate_logit.fill_(-1.0)
    ids, mask = make_input(True)
    shared, own = prefill(sharer, ids, mask, kind), prefill(receiver, ids, mask, kind)
    expected = go_on(receiver, ids, mask, copy.deepcopy(own))
    assert torch.equal(go_on(receiver, ids, mask, adapter.fuse(shared, own)), expected)
    assert torch.equal(go_on(receiver, ids, mask, adapter.fuse_(shared, own)), expected)


def test_padding_of_a_batch_changes_nothing_for_the_row(models: tuple[Any, Any]) -> None:
    """A left-padded row is edited as it would be alone, and its padding not at all."""
    adapter = make_adapter(models)
    ids, mask = make_input(True)
    shared, own = (cache_layers(prefill(model, ids, mask, "dynamic")) for model in models)
    together = adapter.fuse(shared, own, attention_mask=mask[:, :-1])
    alone = adapter.fuse(
        [(key[:1, :, 4:], value[:1, :, 4:]) for key, value in shared],
        [(key[:1, :, 4:], value[:1, :, 4:]) for key, value in own],
    )
    for pair, row, old in zip(together, alone, own):
        for tensor, expected, was in zip(pair, row, old):
            # Another number of rows may be added up in another order (numbers of order 1).
            torch.testing.assert_close(tensor[:1, :, 4:], expected, rtol=1e-5, atol=1e-5)
            assert torch.equal(tensor[0, :, :4], was[0, :, :4])


def test_kinds_of_cache_can_be_mixed(models: tuple[Any, Any]) -> None:
    sharer, receiver = models
    adapter = make_adapter(models)
    ids, mask = make_input(False)
    own = prefill(receiver, ids, mask, "dynamic")
    expected = adapter.fuse(cache_layers(prefill(sharer, ids, mask, "dynamic")), cache_layers(own))
    got = adapter.fuse(prefill(sharer, ids, mask, "static"), own)
    for pair, wanted in zip(cache_layers(got), expected):
        for tensor, truth in zip(pair, wanted):
            torch.testing.assert_close(tensor, truth, rtol=1e-4, atol=1e-5)


def test_layers_that_are_not_edited_are_shared(models: tuple[Any, Any]) -> None:
    sharer, receiver = models
    ids, mask = make_input(False)
    shared, own = prefill(sharer, ids, mask, "dynamic"), prefill(receiver, ids, mask, "dynamic")
    edited = make_adapter(models, keep=[2]).fuse(shared, own)
    same = [new.keys is old.keys and new.values is old.values for new, old in zip(edited.layers, own.layers)]
    assert same == [True, True, False, True]


def test_wrong_caches_are_refused_by_name_and_stay_whole(models: tuple[Any, Any]) -> None:
    sharer, receiver = models
    adapter = make_adapter(models)
    ids, mask = make_input(False)
    shared, own = prefill(sharer, ids, mask, "static"), prefill(receiver, ids, mask, "static")
    before = cloned(cache_layers(own))
    with pytest.raises(GeometryError, match="receiver_cache: expected 4 layers, got 3"):
        adapter.fuse_(own, shared)
    with pytest.raises(ShapeError, match=r"attention_mask: expected .*\(2, 8\)"):
        adapter.fuse_(shared, own, attention_mask=mask)  # the prompt's mask, one token longer than the cache
    with pytest.raises(GeometryError, match=r"receiver_cache\.layers\[0\]: .*uninitialised"):
        adapter.fuse_(shared, transformers.StaticCache(config=receiver.config, max_cache_len=32))
    assert_equal(cache_layers(own), before)
