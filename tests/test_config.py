"""Geometry, configuration, layer maps and the figures of spec.md section 3."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lcf_fast import CacheGeometry, DTypeError, GeometryError, IndexRangeError, LCFConfig, layer_map
from lcf_fast.config import c2c_parameters_per_layer, check_layer_list, check_routing

QWEN25 = CacheGeometry(24, 2, 64)  # Qwen2.5-0.5B-Instruct
QWEN3 = CacheGeometry(28, 8, 128)  # Qwen3-0.6B


# --- parameter counts: every figure of the table
# -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("bottleneck", "layers", "per_layer", "total", "megabytes"),
    [
        (64, 28, 281_810, 7_890_680, 15.8),
        (128, 28, 692_626, 19_393_528, 38.8),
        (128, 19, 692_626, 13_159_894, 26.3),
        (128, 9, 692_626, 6_233_634, 12.5),
        (128, 6, 692_626, 4_155_756, 8.3),
        (256, 28, 1_907_474, 53_409_272, 106.8),
        (512, 28, 5_910_034, 165_480_952, 331.0),
    ],
)
def test_lcf_parameter_counts(bottleneck: int, layers: int, per_layer: int, total: int, megabytes: float) -> None:
    config = LCFConfig(QWEN25, QWEN3, bottleneck=bottleneck)
    assert config.parameters_per_layer == per_layer
    assert config.parameter_count(layers) == total
    assert round(config.parameter_count(layers) * 2 / 1e6, 1) == megabytes
    if layers == 28:
        assert config.parameter_count() == total
    with pytest.raises(DTypeError, match="layers"):
        config.parameter_count(float(layers))  # type: ignore[arg-type]


def test_what_the_paper_prints_of_lcf_128_and_256() -> None:
    config = LCFConfig(QWEN25, QWEN3)
    assert round(config.parameters_per_layer / 1e3) == 693  # 693K
    assert round(config.parameter_count() / 1e6, 1) == 19.4  # 19.4M
    assert round(config.parameter_count() * 2 / 1e6) == 39  # 39 MB
    wide = LCFConfig(QWEN25, QWEN3, bottleneck=256).parameter_count()
    assert (round(wide / 1e6, 1), round(wide * 2 / 1e6)) == (53.4, 107)


def test_lcf_x_parameter_count() -> None:
    config = LCFConfig(QWEN3, QWEN3, cross_context=True)
    projector = LCFConfig(QWEN3, QWEN3).parameters_per_layer
    assert projector == 922_002
    assert config.parameters_per_layer - projector == 2_048
    assert config.parameter_count() == 25_873_400
    assert config.parameter_count() - 28 * projector == 57_344  # pool queries
    assert round(config.parameter_count() * 2 / 1e6, 1) == 51.7
    assert round(config.parameter_count() / 1e6, 2) == 25.87


def test_c2c_parameter_count() -> None:
    per_layer = c2c_parameters_per_layer(QWEN25, QWEN3)
    assert per_layer == 17_066_002
    assert 28 * per_layer == 477_848_056
    assert round(28 * per_layer * 2 / 1e6, 1) == 955.7
    assert round(28 * per_layer / 1e6, 1) == 477.8


@pytest.mark.parametrize(("layers", "ratio"), [(28, "24.6"), (9, "76.7"), (6, "115")])
def test_ratios_to_c2c(layers: int, ratio: str) -> None:
    c2c = 28 * c2c_parameters_per_layer(QWEN25, QWEN3)
    got = c2c / LCFConfig(QWEN25, QWEN3).parameter_count(layers)
    assert f"{got:.{len(ratio.partition('.')[2])}f}" == ratio


def test_c2c_count_is_that_of_its_layers() -> None:
    # peers.md's description built from real layers, at widths that tell hidden and intermediate apart.
    sharer, receiver, hidden, intermediate = CacheGeometry(3, 2, 8), CacheGeometry(3, 4, 6), 10, 14

    def block(width: int) -> list[torch.nn.Module]:
        linear = torch.nn.Linear
        return [torch.nn.RMSNorm(hidden), linear(hidden, width, bias=False), linear(width, hidden, bias=False)]

    def network() -> list[torch.nn.Module]:
        return [
            torch.nn.Linear(sharer.channels + receiver.channels, hidden),
            *block(intermediate),
            *block(hidden),
            torch.nn.Linear(hidden, receiver.kv_heads),
            *block(intermediate),
            torch.nn.Linear(hidden, receiver.channels),
        ]

    modules = torch.nn.ModuleList([*network(), *network()])
    count = sum(p.numel() for p in modules.parameters()) + 2
    assert c2c_parameters_per_layer(sharer, receiver, hidden=hidden, intermediate=intermediate) == count


@pytest.mark.parametrize("cross_context", [False, True])
@pytest.mark.parametrize("blocks", [1, 3])
def test_the_counts_are_those_of_the_module(cross_context: bool, blocks: int) -> None:
    from lcf_fast import LatentCacheFlow

    config = LCFConfig(
        CacheGeometry(3, 2, 8),
        CacheGeometry(5, 3, 6),
        bottleneck=10,
        cross_context=cross_context,
        ffn_blocks=blocks,
        ffn_expansion=3,
    )
    adapter = LatentCacheFlow(config)
    assert sum(p.numel() for p in adapter.parameters()) == config.parameter_count()
    pruned = LatentCacheFlow(config, keep_layers=[1, 4])
    assert sum(p.numel() for p in pruned.parameters()) == config.parameter_count(2)


@pytest.mark.parametrize(("slots", "parameters"), [(4, 331_008), (8, 333_056)])
def test_slots_parameter_count(slots: int, parameters: int) -> None:
    """Four layers of 64 channels on both sides, d = 64."""
    side = CacheGeometry(4, 2, 32)
    assert LCFConfig(side, side, bottleneck=64, slots=slots).parameter_count() == parameters


def test_the_published_pair_with_slots_has_fewer_parameters_than_lcf_x() -> None:
    config = LCFConfig(QWEN3, QWEN3, slots=8)
    # slots and their queries, W_down of 2 Cs alone, two blocks, W_up of all of the latent for K and for V
    per_layer = 8 * (1024 + 128) + (2048 * 128 + 128) + 2 * (8 * 128**2 + 128) + 2 * (128 * 1024 + 1024)
    assert config.parameters_per_layer == per_layer
    assert per_layer < LCFConfig(QWEN3, QWEN3, cross_context=True).parameters_per_layer


# --- layer maps
# --------------------------------------------------------------------------------------------------


def test_last_aligned_of_the_published_pair() -> None:
    assert layer_map("last_aligned", 24, 28) == (0, 0, 0, 0, *range(24))


@pytest.mark.parametrize("sharer", range(1, 9))
@pytest.mark.parametrize("receiver", range(1, 9))
def test_last_aligned_is_the_formula(sharer: int, receiver: int) -> None:
    expected = [max(0, min(sharer - 1, t + sharer - receiver)) for t in range(receiver)]
    assert list(layer_map("last_aligned", sharer, receiver)) == expected


@pytest.mark.parametrize("sharer", [1, 2, 3, 7, 24, 40])
@pytest.mark.parametrize("receiver", [1, 2, 3, 8, 28, 64])
def test_relative_depth_is_nearest_and_ends_meet(sharer: int, receiver: int) -> None:
    got = layer_map("relative_depth", sharer, receiver)
    assert len(got) == receiver
    assert got[-1] == sharer - 1
    if receiver > 1:
        assert got[0] == 0
        for t, layer in enumerate(got):
            # In units of 1/(receiver - 1) of a sharer layer, so that a tie is exact. Of two nearest, the
            # deeper.
            distance = [abs(s * (receiver - 1) - t * (sharer - 1)) for s in range(sharer)]
            nearest = [s for s in range(sharer) if distance[s] == min(distance)]
            assert layer == nearest[-1]
    assert list(got) == sorted(got)


def test_relative_depth_tie_goes_deeper_and_one_layer_reads_the_last() -> None:
    assert layer_map("relative_depth", 2, 3) == (0, 1, 1)
    assert layer_map("relative_depth", 4, 3) == (0, 2, 3)
    assert layer_map("relative_depth", 24, 1) == (23,)
    assert layer_map("relative_depth", 1, 4) == (0, 0, 0, 0)


def test_explicit_map() -> None:
    config = LCFConfig(QWEN25, CacheGeometry(3, 8, 128), layer_map=[23, 0, 5])
    assert config.sharer_layers == (23, 0, 5)
    assert config.layer_map == (23, 0, 5)
    assert hash(config) == hash(dataclasses.replace(config))


@pytest.mark.parametrize(
    ("spec", "error", "argument"),
    [
        ("first_aligned", GeometryError, "layer_map"),
        ([0, 1], GeometryError, "layer_map"),
        ([0, 1, 24], IndexRangeError, "layer_map[2]"),
        ([0, -1, 3], IndexRangeError, "layer_map[1]"),
        ([0, 1.0, 3], DTypeError, "layer_map[1]"),
        ([True, 1, 3], DTypeError, "layer_map[0]"),
        (7, DTypeError, "layer_map"),
        (torch.tensor(7), DTypeError, "layer_map"),
    ],
)
def test_bad_layer_maps(spec: Any, error: type[Exception], argument: str) -> None:
    with pytest.raises(error) as caught:
        LCFConfig(QWEN25, CacheGeometry(3, 8, 128), layer_map=spec)
    assert caught.value.argument == argument  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("kept", "reads", "error", "argument"),
    [
        ((0, 3), (0, 0), IndexRangeError, "receiver_layers"),
        ((-1, 0), (0, 0), IndexRangeError, "receiver_layers"),
        ((0, 2), (0, 2), IndexRangeError, "sharer_layers"),
        ((0, 2), (-1, 0), IndexRangeError, "sharer_layers"),
        ((), (), GeometryError, "receiver_layers"),
        ((2, 0), (0, 0), GeometryError, "receiver_layers"),
        ((2, 2), (0, 0), GeometryError, "receiver_layers"),
        ((0, 2), (1,), GeometryError, "sharer_layers"),
        ((0, 2), (1, 1, 1), GeometryError, "sharer_layers"),
    ],
)
def test_bad_routing(kept: tuple[int, ...], reads: tuple[int, ...], error: type[Exception], argument: str) -> None:
    """Of buffers and files: a negative layer would be read from the end."""
    sides = CacheGeometry(3, 8, 128), CacheGeometry(2, 2, 64)  # receiver, sharer
    check_routing((0, 2), (1, 1), *sides)
    with pytest.raises(error) as caught:
        check_routing(kept, reads, *sides, "file.")
    assert caught.value.argument == f"file.{argument}"  # type: ignore[attr-defined]


@pytest.mark.parametrize("layers", [[0, True], [0, 1.0], "01", {0, 1}, None])
def test_what_is_no_list_of_layers(layers: Any) -> None:
    assert check_layer_list("layers", [0, 1]) == (0, 1)
    with pytest.raises(DTypeError, match="layers: expected a list of ints"):
        check_layer_list("layers", layers)


# --- LCFConfig
# ---------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_contract() -> None:
    config = LCFConfig(QWEN25, QWEN3)
    assert dataclasses.asdict(config) == {
        "sharer": {"layers": 24, "kv_heads": 2, "head_dim": 64},
        "receiver": {"layers": 28, "kv_heads": 8, "head_dim": 128},
        "bottleneck": 128,
        "layer_map": "last_aligned",
        "cross_context": False,
        "ffn_blocks": 2,
        "ffn_expansion": 4,
        "norm_eps": 1e-6,
        "dropout": 0.1,
        "gate_init": 0.0,
        "slots": 0,
        "per_span": False,
    }
    assert LCFConfig(QWEN25, QWEN3, cross_context=True).gate_init == 1.0
    assert LCFConfig(QWEN25, QWEN3, cross_context=True, gate_init=-2).gate_init == -2.0
    assert config.in_channels == 2 * 128 + 2 * 1024


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"bottleneck": 127}, GeometryError),
        ({"slots": 2.0}, DTypeError),
        ({"bottleneck": 0}, GeometryError),
        ({"bottleneck": 64.0}, DTypeError),
        ({"ffn_blocks": 0}, GeometryError),
        ({"ffn_expansion": -1}, GeometryError),
        ({"norm_eps": -1e-6}, GeometryError),
        ({"norm_eps": float("nan")}, GeometryError),
        ({"norm_eps": 10**400}, GeometryError),
        ({"dropout": 1.0}, GeometryError),
        ({"dropout": -0.1}, GeometryError),
        ({"dropout": "0.1"}, DTypeError),
        ({"dropout": False}, DTypeError),
        ({"gate_init": float("inf")}, GeometryError),
        ({"cross_context": 1}, DTypeError),
        ({"slots": -1}, GeometryError),
        ({"slots": True}, DTypeError),
        ({"slots": False}, DTypeError),
        ({"slots": 4.0}, DTypeError),
        ({"sharer": (24, 2, 64)}, DTypeError),
        ({"receiver": None}, DTypeError),
    ],
)
def test_bad_fields_are_named(change: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        LCFConfig(**{"sharer": QWEN25, "receiver": QWEN3, **change})
    assert caught.value.argument == next(iter(change))  # type: ignore[attr-defined]


def test_modes() -> None:
    assert LCFConfig(QWEN25, QWEN3).mode == "lcf"
    assert LCFConfig(QWEN25, QWEN3, cross_context=True).mode == "lcf_x"
    slots = LCFConfig(QWEN25, QWEN3, slots=4)
    assert (slots.mode, slots.cross_context, slots.in_channels) == ("slots", True, 2 * 128)


def test_what_has_no_slots_is_written_as_before_there_were_any() -> None:
    assert "slots" not in LCFConfig(QWEN25, QWEN3).to_dict()
    assert LCFConfig(QWEN25, QWEN3, slots=4).to_dict()["slots"] == 4


@pytest.mark.parametrize("fields", [(0, 2, 64), (24, -2, 64), (24, 2, 0), (4097, 2, 64)])
def test_geometry_fields_are_within_reason(fields: tuple[int, int, int]) -> None:
    CacheGeometry(4096, 2, 64)
    with pytest.raises(GeometryError):
        CacheGeometry(*fields)


def test_geometry_fields_are_ints() -> None:
    with pytest.raises(DTypeError, match=r"head_dim: expected an int, got 64\.0"):
        CacheGeometry(24, 2, 64.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("spec", ["last_aligned", "relative_depth", tuple(t % 24 for t in range(28))])
@pytest.mark.parametrize("mode", [{}, {"cross_context": True}, {"slots": 8}])
def test_json_round_trip(spec: Any, mode: dict[str, Any]) -> None:
    config = LCFConfig(QWEN25, QWEN3, bottleneck=64, layer_map=spec, norm_eps=0.0, dropout=0.0, **mode)
    again = LCFConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.sharer_layers == config.sharer_layers
    assert type(again.layer_map) is type(config.layer_map)


@pytest.mark.parametrize(
    ("path", "value", "argument", "text"),
    [
        (("bottelneck",), 64, "config", "also bottelneck"),
        (("sharer", "heads"), 2, "config.sharer", "also heads"),
        (("sharer",), None, "config.sharer", "NoneType"),
    ],
)
def test_from_dict_names_what_is_wrong(path: tuple[str, ...], value: Any, argument: str, text: str) -> None:
    data = LCFConfig(QWEN25, QWEN3).to_dict()
    inner = data if len(path) == 1 else data[path[0]]
    inner[path[-1]] = value
    with pytest.raises((GeometryError, DTypeError), match=text) as caught:
        LCFConfig.from_dict(data)
    assert caught.value.argument == argument


def test_from_dict_names_what_is_missing() -> None:
    data = LCFConfig(QWEN25, QWEN3).to_dict()
    del data["receiver"], data["sharer"]["head_dim"]
    with pytest.raises(GeometryError, match="receiver"):
        LCFConfig.from_dict(data)
    with pytest.raises(GeometryError, match="head_dim"):
        LCFConfig.from_dict({**data, "receiver": QWEN3.__dict__})


# --- CacheGeometry.of
# --------------------------------------------------------------------------------------------


def transformers_config(name: str, **kwargs: Any) -> Any:
    return getattr(pytest.importorskip("transformers"), name)(**kwargs)


SMALL = {"num_hidden_layers": 3, "hidden_size": 48, "num_attention_heads": 6}


@pytest.mark.parametrize(
    ("name", "kwargs", "expected"),
    [
        # The two published architectures, as their config.json has them.
        (
            "Qwen2Config",
            {
                "num_hidden_layers": 24,
                "hidden_size": 896,
                "num_attention_heads": 14,
                "num_key_value_heads": 2,
                "use_sliding_window": False,
                "sliding_window": 32768,
                "max_window_layers": 21,
            },
            (24, 2, 64),
        ),
        (
            "Qwen3Config",
            {
                "num_hidden_layers": 28,
                "hidden_size": 1024,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
                "head_dim": 128,
            },
            (28, 8, 128),
        ),
        ("Qwen2Config", {**SMALL, "num_key_value_heads": 2}, (3, 2, 8)),
        ("Qwen3Config", {**SMALL, "num_key_value_heads": 2, "head_dim": 32}, (3, 2, 32)),
        ("LlamaConfig", SMALL, (3, 6, 8)),
        ("LlamaConfig", {**SMALL, "num_key_value_heads": None, "head_dim": None}, (3, 6, 8)),
        ("LlamaConfig", {**SMALL, "num_key_value_heads": 3, "head_dim": 20}, (3, 3, 20)),
        ("MistralConfig", {**SMALL, "num_key_value_heads": 2, "sliding_window": 16}, (3, 2, 8)),
        ("MixtralConfig", {**SMALL, "num_key_value_heads": 2}, (3, 2, 8)),
        ("GemmaConfig", {**SMALL, "num_key_value_heads": 1, "head_dim": 16}, (3, 1, 16)),
        ("Gemma2Config", {**SMALL, "num_key_value_heads": 2, "head_dim": 16}, (3, 2, 16)),
        ("Gemma3TextConfig", {**SMALL, "num_key_value_heads": 2, "head_dim": 16}, (3, 2, 16)),
        ("Phi3Config", {**SMALL, "num_key_value_heads": 2}, (3, 2, 8)),
        ("GPT2Config", {"n_layer": 3, "n_embd": 48, "n_head": 6}, (3, 6, 8)),
        ("GPTNeoXConfig", SMALL, (3, 6, 8)),
        ("FalconConfig", SMALL, (3, 1, 8)),
        ("FalconConfig", {**SMALL, "multi_query": False}, (3, 6, 8)),
        ("FalconConfig", {**SMALL, "num_kv_heads": 2, "new_decoder_architecture": True}, (3, 6, 8)),
    ],
)
def test_of_transformers_configs(name: str, kwargs: dict[str, Any], expected: tuple[int, int, int]) -> None:
    assert CacheGeometry.of(transformers_config(name, **kwargs)) == CacheGeometry(*expected)


def test_of_a_multimodal_config_is_its_text_models() -> None:
    text = {**SMALL, "num_key_value_heads": 2, "head_dim": 16}
    assert CacheGeometry.of(transformers_config("Gemma3Config", text_config=text)) == CacheGeometry(3, 2, 16)


@pytest.mark.parametrize(
    ("name", "kwargs", "text"),
    [
        # Heads or dims that differ by layer; Gemma 4's full attention has its own.
        ("Gemma4TextConfig", {}, r"4 KV heads of 256 in layers 0, 1, 2, 3 and 21 more; .* 512 in layers 5, 11"),
        ("Gemma4Config", {}, "512"),
        (
            "LlamaConfig",
            {**SMALL, "per_layer_config": {1: {"num_key_value_heads": 2}}},
            "6 KV heads of 8 in layers 0, 2; 2 KV heads of 8 in layer 1",
        ),
        # Layers that read another layer's cache, so that there are fewer caches than layers.
        ("Gemma3nTextConfig", {}, "reuses another layer's in layers 20, 21"),
        # No key-value cache, or more than that.
        ("Qwen3NextConfig", {}, "'linear_attention' in layers 0, 1, 2, 4"),
        ("JambaConfig", {}, "'linear_attention'"),
        ("Mamba2Config", {}, "'linear_attention'"),
        ("FalconH1Config", {}, "'hybrid'"),
        ("RecurrentGemmaConfig", {}, "in layers 0, 1, 3, 4"),
        ("DeepseekV3Config", {}, "latent attention"),
        ("T5Config", {}, "encoder-decoder"),
        ("T5GemmaConfig", {}, "encoder-decoder"),
        ("MllamaConfig", {}, "cross-attention in layers 3, 8"),
    ],
)
def test_configs_whose_layers_differ_are_refused(name: str, kwargs: dict[str, Any], text: str) -> None:
    with pytest.raises(GeometryError, match=text) as caught:
        CacheGeometry.of(transformers_config(name, **kwargs))
    assert caught.value.argument == "config"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"num_key_value_heads": 2, "head_dim": 16}, (4, 2, 16)),
        ({"head_dim": None}, (4, 4, 8)),
        ({"num_key_value_heads": [2, 2, 2, 2]}, (4, 2, 8)),
        ({"head_dim": 8, "global_head_dim": 8}, (4, 4, 8)),
        ({"num_key_value_heads": 2, "num_global_key_value_heads": 1, "attention_k_eq_v": False}, (4, 2, 8)),
        ({"v_head_dim": 8}, (4, 4, 8)),
    ],
)
def test_of_plain_objects(fields: dict[str, Any], expected: tuple[int, int, int]) -> None:
    config = SimpleNamespace(num_hidden_layers=4, num_attention_heads=4, hidden_size=32, **fields)
    assert CacheGeometry.of(config) == CacheGeometry(*expected)
    assert CacheGeometry.of(SimpleNamespace(config=config)) == CacheGeometry(*expected)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"num_key_value_heads": [2, 2, 1, 2]}, "in layers 0, 1, 3; 1 KV heads of 8 in layer 2"),
        ({"head_dim": 8, "global_head_dim": 16}, "4 KV heads of 8 in layers 0, 2; 4 KV heads of 16 in layers 1, 3"),
        ({"num_key_value_heads": 2, "num_global_key_value_heads": 1}, "1 KV heads of 8 in layers 1, 3"),
        ({"num_kv_shared_layers": 1}, "in layer 3"),
        ({"v_head_dim": 4}, "values of 4"),
        ({"layer_types": None, "block_types": ["attention", "recurrent"]}, "'recurrent' in layers 1, 3"),
        ({"num_attention_heads": None}, "without it"),
        ({"hidden_size": None}, "head_dim or hidden_size"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"num_hidden_layers": [2, 2]}, r"1 to 4096 layers, got SimpleNamespace with \[2, 2\]"),
        ({"num_hidden_layers": 10**9}, "1 to 4096 layers"),
        ({"num_hidden_layers": 0}, "1 to 4096 layers"),
        ({"num_attention_heads": (2, 4)}, "a language model's config, got SimpleNamespace, of which one cannot be"),
        ({"layer_types": 5}, "a language model's config"),
        ({"num_attention_heads": 0}, "a language model's config"),
    ],
)
def test_plain_objects_that_do_not_fit(fields: dict[str, Any], text: str) -> None:
    types = ["sliding_attention", "full_attention"] * 2
    base = {"num_hidden_layers": 4, "num_attention_heads": 4, "hidden_size": 32, "layer_types": types}
    with pytest.raises(GeometryError, match=text):
        CacheGeometry.of(SimpleNamespace(**{**base, **fields}))


def test_of_what_is_no_config() -> None:
    assert CacheGeometry.of(QWEN3) is QWEN3
    with pytest.raises(GeometryError, match="num_hidden_layers"):
        CacheGeometry.of(object())
    with pytest.raises(GeometryError, match="a model or its config, got the class object"):
        CacheGeometry.of(object)


@pytest.mark.parametrize("name", ["ClapAudioConfig", "DonutSwinConfig", "LxmertConfig", "SwinConfig"])
def test_configs_of_models_that_are_no_language_models(name: str) -> None:
    """They have tuples and dictionaries under the names that are read."""
    with pytest.raises(GeometryError) as caught:
        CacheGeometry.of(transformers_config(name))
    assert caught.value.argument == "config"


def test_of_real_models_is_the_shape_of_their_cache() -> None:
    transformers = pytest.importorskip("transformers")
    models: list[tuple[str, dict[str, Any]]] = [
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 16}),
        ("Llama", {}),
        ("Mistral", {"sliding_window": None}),
        ("Gemma", {"head_dim": 16}),
        ("Gemma3Text", {"head_dim": 16}),
        ("Falcon", {}),
        ("Falcon", {"multi_query": False}),
        ("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ]
    for name, extra in models:
        config = transformers_config(
            f"{name}Config", **SMALL, num_key_value_heads=2, vocab_size=32, intermediate_size=32, **extra
        )
        model = transformers.AutoModelForCausalLM.from_config(config)
        cache = model(torch.arange(5)[None], use_cache=True).past_key_values
        shape = cache.layers[0].keys.shape
        assert CacheGeometry.of(model) == CacheGeometry(len(cache.layers), shape[1], shape[3])
        assert CacheGeometry.of(config) == CacheGeometry.of(model)


def test_config_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; import lcf_fast.config as c;"
        "c.LCFConfig(c.CacheGeometry(24, 2, 64), c.CacheGeometry(28, 8, 128));"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
