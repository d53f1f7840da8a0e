"""Projection, injection and the fused kernel at every configuration of the policy: cases of the compile gate."""

from __future__ import annotations

from typing import Any

import triton.language as tl
from case import Case, make

from lcf_fast.kernels import fusion, injection, projection
from lcf_fast.kernels.common import TABLE_STEP, head_chunk, heads_block
from lcf_fast.kernels.policy import TileConfig, backward_config, injection_config, tile_config, tile_options

FLOATS = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
#: Qwen2.5-0.5B informs Qwen3-0.6B: 28 layers, tables padded to 32.
LAYERS = -(-28 // TABLE_STEP) * TABLE_STEP
WEIGHTS = (
    "down_weight", "norm_weight", "ffn_in_weight", "ffn_out_weight", "up_weight", "up_bias",
    "head_gate_weight", "head_gate_bias", "gate_logit",
)  # fmt: skip


def tile_constexprs(
    width: int, dtype: str, config: TileConfig, sharer: tuple[int, int], receiver: tuple[int, int]
) -> dict[str, Any]:
    return {
        "SHARER_HEADS": sharer[0],
        "SHARER_DIM": sharer[1],
        "RECEIVER_HEADS": receiver[0],
        "RECEIVER_DIM": receiver[1],
        "WIDTH": width,
        "HIDDEN": 4 * width,
        "BLOCKS": 2,
        "BLOCK_T": config.block_tokens,
        "BLOCK_CS": head_chunk(sharer[1], config.block_channels),
        "BLOCK_CR": head_chunk(receiver[1], config.block_channels),
        "BLOCK_F": config.block_hidden,
        "EPS": 1e-6,
        "DTYPE": FLOATS[dtype],
        "PRECISION": "ieee",
    }


def fusion_case(
    width: int,
    dtype: str,
    config: TileConfig,
    *,
    message: bool = False,
    index: bool = False,
    inplace: bool = True,
    aligned: bool = True,
    noise: bool = False,
    single_weights: bool = False,
    sharer: tuple[int, int] = (2, 64),
    receiver: tuple[int, int] = (8, 128),
) -> Case:
    tables = ("sharer_keys", "sharer_values", "receiver_keys", "receiver_values", "codes")
    types: dict[str, Any] = dict.fromkeys(tables, ("i64",) * LAYERS)
    types |= dict.fromkeys((*WEIGHTS, "out"), f"*{dtype}")
    types |= {"index": "*i32", "start": "*fp32" if message else f"*{dtype}"}
    if noise or single_weights:  # training, whose parameters are float32, as are those of an adapter that it saved
        types |= dict.fromkeys((*WEIGHTS, "start"), "*fp32")
    types |= dict.fromkeys(("keep_scale", "inverse_temperature"), "fp32")
    if message:
        sharer = (1, 1024)  # the launcher gives channels only
    constexprs = {
        **tile_constexprs(width, dtype, config, sharer, receiver),
        "BLOCK_H": heads_block(receiver[0]),
        "LAYERS": LAYERS,
        "HAS_SHARER": not message,
        "HAS_INDEX": index,
        "HAS_NOISE": noise,
        "IS_WIDE": False,
        "IS_INPLACE": inplace,
        "IS_SHARER_ALIGNED": aligned,
        "IS_RECEIVER_ALIGNED": aligned,
        "SHARER_DTYPE": FLOATS[dtype],
    }
    unaligned = ("codes",) if aligned else tables
    marks = "".join(
        mark
        for mark, on in (
            ("-message", message),
            ("-index", index),
            ("-out", not inplace),
            ("-odd", not aligned),
            ("-noise", noise),
            ("-single", single_weights),
        )
        if on
    )
    heads = "" if receiver == (8, 128) else f"-{receiver[0]}x{receiver[1]}"
    name = f"fuse-{width}-{dtype}-{config.block_tokens}{marks}{heads}"
    return make(
        name,
        fusion.fuse_kernel,
        types,
        constexprs,
        config.num_warps,
        config.num_stages,
        unaligned,
        expect_mma=dtype != "fp32",
    )


def projection_case(
    width: int, dtype: str, config: TileConfig, *, single_weights: bool = False, receiver: tuple[int, int] = (8, 128)
) -> Case:
    caches = ("sharer_key", "sharer_value", "receiver_key", "receiver_value")
    types: dict[str, Any] = dict.fromkeys((*caches, *WEIGHTS, "start"), f"*{dtype}")
    types |= {"index": "*i32", "latent": "*fp32"}
    if single_weights:
        types |= dict.fromkeys((*WEIGHTS, "start"), "*fp32")
    constexprs = {
        **tile_constexprs(width, dtype, config, (2, 64), receiver),
        "HAS_SHARER": True,
        "HAS_INDEX": False,
        "IS_WIDE": False,
    }
    name = f"project-{width}-{dtype}-{config.block_tokens}-{receiver[1]}{'-single' if single_weights else ''}"
    kernel = projection.joint_projection_kernel
    return make(name, kernel, types, constexprs, config.num_warps, config.num_stages, expect_mma=dtype != "fp32")


def injection_case(
    width: int, dtype: str, config: TileConfig, *, single_weights: bool = False, receiver: tuple[int, int] = (8, 128)
) -> Case:
    caches = ("receiver_key", "receiver_value", "out_key", "out_value")
    types: dict[str, Any] = dict.fromkeys((*caches, *WEIGHTS), f"*{dtype}")
    types |= {"latent": "*fp32", "edit_mask": "*i1"}
    if single_weights:
        types |= dict.fromkeys(WEIGHTS, "*fp32")
    constexprs = {
        "HAS_MASK": True,
        "IS_WIDE": False,
        "IS_INPLACE": False,
        "HEADS": receiver[0],
        "HEAD_DIM": receiver[1],
        "WIDTH": width,
        "BLOCK_T": config.block_tokens,
        "BLOCK_C": head_chunk(receiver[1], config.block_channels),
        "BLOCK_H": heads_block(receiver[0]),
        "DTYPE": FLOATS[dtype],
        "PRECISION": "ieee",
    }
    name = f"inject-{width}-{dtype}-{config.block_tokens}-{receiver[1]}{'-single' if single_weights else ''}"
    kernel = injection.gated_injection_kernel
    return make(name, kernel, types, constexprs, config.num_warps, config.num_stages, expect_mma=dtype != "fp32")


def cases(chip: str) -> list[Case]:
    """What is compiled for ``chip``: every width at its largest tile, with float32 weights where they take the most;
    on sm_90 every tile and every form."""
    built = [fusion_case(width, "bf16", tile_options(width, 2, chip)[0]) for width in (64, 128, 256, 512)]
    largest, next_largest = tile_options(128, 2, chip)[:2]
    built.append(fusion_case(128, "bf16", largest, message=True))
    built.append(projection_case(128, "bf16", largest))
    built.append(injection_case(128, "bf16", largest))
    many = (28, 32_768)
    for width in (256, 512):
        built.append(fusion_case(width, "bf16", tile_config(width, 2, chip, *many, 4), single_weights=True))
    built.append(injection_case(512, "bf16", injection_config(512, 2, chip, *many)))
    built.append(injection_case(512, "bf16", injection_config(512, 2, chip, *many, 4), single_weights=True))
    if chip == "gfx942":  # training: two stages of float32 weights pass its 64 KB
        config = backward_config(256, 2, chip)
        built.append(fusion_case(256, "bf16", config, inplace=False, single_weights=True))
    if chip == "sm_90":
        for width in (64, 128, 256, 512):
            built += [fusion_case(width, "bf16", config) for config in tile_options(width, 2, chip)[1:]]
        for config in (largest, next_largest):
            built.append(fusion_case(128, "bf16", config, inplace=False, index=True))
            built.append(fusion_case(128, "fp16", config))
        for width in (64, 128):
            built.append(fusion_case(width, "bf16", tile_config(width, 2, chip, *many, 4), single_weights=True))
        built.append(projection_case(512, "bf16", tile_config(512, 2, chip, *many, 4), single_weights=True))
        built.append(fusion_case(128, "bf16", largest, aligned=False))
        built.append(fusion_case(128, "bf16", backward_config(128, 2, chip), inplace=False, noise=True))
        built.append(fusion_case(128, "bf16", largest, receiver=(5, 80)))
        built.append(fusion_case(128, "bf16", largest, receiver=(2, 256)))
        built.append(fusion_case(128, "fp32", tile_options(128, 4, chip)[0]))
    return built
