"""transformers caches to per-layer views and back, on real models with random weights."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import Geometry, make_cache
from lcf_fast import CacheGeometry, DeviceError, DTypeError, GeometryError, LCFError, ShapeError
from lcf_fast.caches import Pair, cache_argument, cache_layers, is_cache, rebuild_cache
from lcf_fast.reading.prefill import prefill as read_whole

SHAPE = Geometry(3, 2, 16)
GEOMETRY = CacheGeometry(*SHAPE)
VOCABULARY = 64
PROMPT = 9

MODELS: dict[str, dict[str, Any]] = {
    "Qwen2": {"hidden_size": 64},
    "Qwen3": {"hidden_size": 32, "head_dim": 16},
    "Llama": {"hidden_size": 64},
    "Mistral": {"hidden_size": 64, "sliding_window": None},
    "Gemma": {"hidden_size": 32, "head_dim": 16},
    # Sliding windows that the prompts here do not fill, in alternate layers and in all.
    "Gemma2": {"hidden_size": 32, "head_dim": 16, "sliding_window": 64},
    "Gemma3Text": {"hidden_size": 32, "head_dim": 16, "sliding_window": 64},
    "Mistral-windowed": {"hidden_size": 64, "sliding_window": 64},
}


def make_model(name: str, **changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    fields = {
        "vocab_size": VOCABULARY,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        **MODELS[name],
        **changes,
    }
    config = getattr(transformers, name.partition("-")[0] + "Config")(**fields)
    torch.manual_seed(3)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def make_ids(batch: int = 2, length: int = PROMPT) -> Tensor:
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def prefill(model: Any, ids: Tensor, kind: str = "dynamic", mask: Tensor | None = None) -> Any:
    """The cache of all tokens but the last."""
    transformers = pytest.importorskip("transformers")
    cache = None
    if kind == "static":
        cache = transformers.StaticCache(config=model.config, max_cache_len=40)
    mask = None if mask is None else mask[:, :-1]
    return model(ids[:, :-1], past_key_values=cache, attention_mask=mask, use_cache=True).past_key_values


def go_on(model: Any, ids: Tensor, cache: Any, mask: Tensor | None = None) -> Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    out = model.generate(ids, past_key_values=cache, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert out.shape[1] == ids.shape[1] + 8
    return out


def snapshot(layers: list[Pair]) -> list[Pair]:
    return [(key.clone(), value.clone()) for key, value in layers]


def assert_same(got: list[Pair], expected: list[Pair]) -> None:
    for pair, other in zip(got, expected, strict=True):
        for tensor, wanted in zip(pair, other, strict=True):
            assert torch.equal(tensor, wanted)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_layers_are_views_of_the_filled_part(name: str, kind: str) -> None:
    model, ids = make_model(name), make_ids()
    cache = prefill(model, ids, kind)
    layers = cache_layers(cache, geometry=CacheGeometry.of(model))
    assert len(layers) == 3
    for layer, (key, value) in zip(cache.layers, layers):
        assert key.shape == value.shape == (2, 2, PROMPT - 1, 16)
        assert key.data_ptr() == layer.keys.data_ptr()
        assert value.data_ptr() == layer.values.data_ptr()
        assert key.stride() == layer.keys.stride()
    # What the model itself computes without a cache object of its own: the layers hold it all.
    dynamic = prefill(model, ids)
    for (key, value), reference in zip(layers, dynamic.layers):
        torch.testing.assert_close(key, reference.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(value, reference.values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_rebuilt_cache_goes_on_as_the_untouched_one(name: str, kind: str, padded: bool) -> None:
    model, ids = make_model(name), make_ids()
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = 0
        ids = ids.masked_fill(mask == 0, 0)
    cache = prefill(model, ids, kind, mask)
    expected = go_on(model, ids, copy.deepcopy(cache), mask)

    layers = cache_layers(cache)
    before = snapshot(layers)
    rebuilt = rebuild_cache(cache, layers)
    assert type(rebuilt) is type(cache)
    assert [type(layer) for layer in rebuilt.layers] == [type(layer) for layer in cache.layers]
    assert torch.equal(go_on(model, ids, rebuilt, mask), expected)
    # The input did not move while the rebuilt cache went on, and still goes on by itself.
    assert_same(cache_layers(cache), before)
    assert int(cache.get_seq_length()) == PROMPT - 1
    assert torch.equal(go_on(model, ids, cache, mask), expected)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_an_edit_reaches_the_model_and_only_the_rebuilt_cache(kind: str) -> None:
    model, ids = make_model("Qwen3"), make_ids()
    cache = prefill(model, ids, kind)
    layers = cache_layers(cache)
    before = snapshot(layers)
    edited = list(layers)
    edited[1] = (layers[1][0] + 3.0, layers[1][1] * -2.0)
    rebuilt = rebuild_cache(cache, edited)
    assert_same(cache_layers(rebuilt), [before[0], (before[1][0] + 3.0, before[1][1] * -2.0), before[2]])
    with torch.no_grad():
        untouched = model(ids[:, -1:], past_key_values=copy.deepcopy(cache)).logits
        informed = model(ids[:, -1:], past_key_values=rebuilt).logits
    assert (untouched - informed).abs().max() > 1e-4
    assert_same(cache_layers(cache), before)


def test_a_rebuilt_static_cache_owns_its_memory() -> None:
    model, ids = make_model("Gemma2"), make_ids()
    cache = prefill(model, ids, "static")
    rebuilt = rebuild_cache(cache, cache_layers(cache))
    for old, new in zip(cache.layers, rebuilt.layers):
        for name in ("keys", "values", "cumulative_length"):
            was, now = getattr(old, name), getattr(new, name)
            assert was.untyped_storage().data_ptr() != now.untyped_storage().data_ptr(), name
            assert was.shape == now.shape
            # The model attends to the whole buffer under a mask: beyond the filled part it must be finite.
            assert torch.equal(was, now)


def test_a_rebuilt_dynamic_cache_shares_what_was_not_edited() -> None:
    model, ids = make_model("Llama"), make_ids()
    cache = prefill(model, ids)
    layers = cache_layers(cache)
    rebuilt = rebuild_cache(cache, [(layers[0][0].clone(), layers[0][1]), *layers[1:]])
    assert rebuilt.layers[0].keys is not cache.layers[0].keys
    assert rebuilt.layers[0].values is cache.layers[0].values
    assert rebuilt.layers[2].keys is cache.layers[2].keys
    # Growing the one leaves the other alone.
    with torch.no_grad():
        model(ids[:, -1:], past_key_values=rebuilt)
    assert (rebuilt.get_seq_length(), cache.get_seq_length()) == (PROMPT, PROMPT - 1)


@pytest.mark.parametrize("form", [list, tuple])
def test_plain_sequences(form: type) -> None:
    pairs = form(make_cache(SHAPE, 2, 5, layout="token_major"))
    layers = cache_layers(pairs, geometry=GEOMETRY)
    assert all(key is pairs[i][0] and value is pairs[i][1] for i, (key, value) in enumerate(layers))
    rebuilt = rebuild_cache(pairs, layers)
    assert isinstance(rebuilt, tuple)
    assert all(isinstance(pair, tuple) for pair in rebuilt)
    assert not is_cache(pairs)


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0)])
def test_empty_caches_pass(batch: int, length: int) -> None:
    assert len(cache_layers(make_cache(SHAPE, batch, length), geometry=GEOMETRY)) == 3


def test_the_given_length_is_taken_only_where_reading_it_would_wait() -> None:
    model, ids = make_model("Qwen3"), make_ids()
    cache = prefill(model, ids, "static")
    # On the CPU the cache's own length is at hand: a wrong one given is not used.
    assert cache_layers(cache, length=3)[0][0].shape[2] == PROMPT - 1

    class OnDevice(Tensor):
        """A length whose value nobody may read, as on a GPU."""

        device = torch.device("cuda", 0)  # type: ignore[assignment]

        def __int__(self) -> int:
            raise AssertionError("the length was read from the device")

    for layer in cache.layers:
        layer.cumulative_length = layer.cumulative_length.as_subclass(OnDevice)
    assert cache_layers(cache, length=5)[0][0].shape[2] == 5
    for wrong in (41, -1):
        with pytest.raises(ShapeError, match=r"layers\[0\]: expected a length in \[0, 40\]"):
            cache_layers(cache, length=wrong)
    with pytest.raises(AssertionError, match="was read"):
        cache_layers(cache)


# --- what is refused ---------------------------------------------------------------------------------------------


def test_a_window_that_slid_is_refused() -> None:
    for name in ("Gemma2", "Mistral-windowed"):
        model = make_model(name, sliding_window=6)
        for kind in ("dynamic", "static"):
            # One token fewer than slides out: complete. (A dynamic window of 6 keeps 5.)
            cache_layers(prefill(model, make_ids(length=6), kind))
            with pytest.raises(GeometryError, match=r"holds \d of 8 positions") as caught:
                cache_layers(prefill(model, make_ids(), kind), name="receiver_cache")
            assert caught.value.argument == "receiver_cache.layers[0]"
        with pytest.raises(GeometryError, match="holds 5 of 6 positions"):  # one that slid out is enough
            cache_layers(prefill(model, make_ids(length=7)))


def test_uninitialised_caches_are_refused() -> None:
    transformers = pytest.importorskip("transformers")
    config = make_model("Qwen2").config
    for cache in (
        transformers.DynamicCache(config=config),
        transformers.StaticCache(config=config, max_cache_len=8),
    ):
        with pytest.raises(GeometryError, match="uninitialised"):
            cache_layers(cache)
    early = transformers.DynamicCache(config=config)
    early.early_initialization(2, 2, 16, torch.float32, torch.device("cpu"))
    with pytest.raises(GeometryError, match="uninitialised"):
        cache_layers(early)
    with pytest.raises(GeometryError, match="expected 3 layers, got 0"):
        cache_layers(transformers.DynamicCache(), geometry=GEOMETRY)


def test_layers_with_more_than_keys_and_values_are_refused() -> None:
    utils = pytest.importorskip("transformers.cache_utils")
    key = torch.randn(1, 2, 3, 16)
    quantized: Any = type("Quantized", (utils.QuantizedLayer,), {"_quantize": None, "_dequantize": None})
    # Not every transformers 5 has all of them.
    names = ("DynamicIndexedLayer", "LinearAttentionLayer", "LinearAttentionAndFullAttentionLayer", "DummyLayer")
    others = [getattr(utils, name)() for name in names if hasattr(utils, name)]
    assert others
    for layer in (quantized.__new__(quantized), *others):
        layer.keys = layer.values = key
        with pytest.raises(GeometryError, match=f"got {type(layer).__name__}") as caught:
            cache_layers(utils.Cache(layers=[layer]))
        assert "DynamicLayer or StaticLayer" in caught.value.expected


def test_a_users_subclass_is_served() -> None:
    utils = pytest.importorskip("transformers.cache_utils")

    class Mine(utils.DynamicLayer):  # type: ignore[misc, name-defined]
        note = "mine"

    layer = Mine()
    layer.update(torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16))
    cache = utils.Cache(layers=[layer])
    cache.tag = "kept"
    rebuilt = rebuild_cache(cache, cache_layers(cache))
    assert isinstance(rebuilt.layers[0], Mine)
    assert rebuilt.tag == "kept"


def test_encoder_decoder_and_offloaded_caches_are_refused() -> None:
    transformers = pytest.importorskip("transformers")
    pair = transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
    with pytest.raises(DTypeError, match="encoder-decoder"):
        cache_layers(pair)
    offloaded = prefill(make_model("Qwen2"), make_ids())
    offloaded.offloading = True
    with pytest.raises(DeviceError, match="offloading"):
        cache_layers(offloaded)


def _with(layer: int, part: int, tensor: Any) -> list[Any]:
    pairs: list[Any] = [list(pair) for pair in make_cache(SHAPE, 2, 5)]
    pairs[layer][part] = tensor
    return pairs


BAD: dict[str, tuple[Any, type[LCFError], str]] = {
    "a tensor": (torch.zeros(3, 2, 2, 5, 16), DTypeError, "cache: expected a transformers"),
    "None": (None, DTypeError, "cache: expected a transformers"),
    "layers": (make_cache(Geometry(2, 2, 16), 2, 5), GeometryError, "cache: expected 3 layers, got 2"),
    "triples": ([(1, 2, 3)] * 3, DTypeError, r"cache\[0\]: expected a \(key, value\) pair, got tuple of 3"),
    "heads": (make_cache(Geometry(3, 4, 16), 2, 5), GeometryError, "layer 0 key: expected 2 KV heads of 16, got 4"),
    "head dim": (_with(1, 0, torch.zeros(2, 2, 5, 8)), GeometryError, "layer 1 key: .* got 2 of 8"),
    "no tensor": (_with(2, 1, None), DTypeError, "layer 2 value: expected a tensor, got NoneType"),
    "dims": (_with(1, 1, torch.zeros(2, 2, 80)), ShapeError, r"layer 1 value: expected \(B, H, N, D\)"),
    "ints": (_with(0, 0, torch.zeros(2, 2, 5, 16, dtype=torch.long)), DTypeError, "layer 0 key: .*float"),
    "length": (_with(2, 0, torch.zeros(2, 2, 6, 16)), ShapeError, "layer 2 key: .* as in layer 0"),
    "batch": (_with(1, 1, torch.zeros(1, 2, 5, 16)), ShapeError, "layer 1 value: .* as in layer 0"),
    "dtype": (_with(1, 0, torch.zeros(2, 2, 5, 16).half()), DTypeError, "layer 1 key: .*float32 .*float16"),
    "value's dtype": (_with(1, 1, torch.zeros(2, 2, 5, 16).half()), DTypeError, "layer 1 value: .*float16"),
    "device": (_with(2, 1, torch.zeros(2, 2, 5, 16, device="meta")), DeviceError, "layer 2 value: .*cpu.*meta"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_caches_name_the_place(case: str) -> None:
    cache, error, text = BAD[case]
    with pytest.raises(error, match=text):
        cache_layers(cache, geometry=GEOMETRY)


def test_model_parallel_caches_are_refused() -> None:
    model, ids = make_model("Qwen2"), make_ids()
    cache = prefill(model, ids)
    cache.layers[2].keys = cache.layers[2].keys.to("meta")
    with pytest.raises(DeviceError, match="layer 2 key"):
        cache_layers(cache, geometry=CacheGeometry.of(model))


def test_nothing_of_transformers_is_needed_to_tell_a_cache() -> None:
    # A look-alike that was defined elsewhere: recognised by its layers' class names.
    class DynamicLayer:
        is_sliding = False

        def __init__(self) -> None:
            self.keys, self.values = torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16)

    class Holder:
        def __init__(self) -> None:
            self.layers = [DynamicLayer(), DynamicLayer()]

    cache = Holder()
    layers = cache_layers(cache)
    assert len(layers) == 2
    assert isinstance(rebuild_cache(cache, layers).layers[0], DynamicLayer)


def test_a_cache_is_given_by_the_name_that_the_model_has_for_it() -> None:
    """transformers renames the argument within its fifth version; nothing of ours warns of it."""

    class Earlier:
        def forward(self, input_ids: Any, past_key_values: Any = None) -> None: ...

    class Later:
        def forward(self, input_ids: Any, cache: Any = None) -> None: ...

    assert cache_argument(Earlier(), "it") == {"past_key_values": "it"}
    assert cache_argument(Later(), "it") == {"cache": "it"}
    model = make_model("Qwen3")
    ids = torch.arange(5)[None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read_whole(model, ids, torch.ones_like(ids))) == 3
