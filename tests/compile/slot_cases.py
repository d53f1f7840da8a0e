"""The slot kernels at the policy's configurations: cases of the compile gate."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from case import Case, make

from lcf_fast.kernels import (
    projection_backward,
    slot_pooling,
    slot_pooling_backward,
    slot_projection,
    slot_projection_backward,
    weight_gradients,
)
from lcf_fast.kernels.common import head_chunk
from lcf_fast.kernels.policy import TileConfig, backward_config, columns_config, ffn_weights_config
from lcf_fast.kernels.slot_policy import (
    SlotExpandConfig,
    slot_backward_config,
    slot_expand_config,
    slot_expand_options,
    slot_fold_config,
    slot_pool_config,
)

#: Qwen3-0.6B: 28 layers, tables padded to 32; 8 KV heads.
LAYERS = 32
HEADS = 8
FLOATS = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
#: Of the kernels of training, those with the least in registers.
_SMALL = ("ffn-weights-noise", "columns")
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


def mask_types(unread: str, has_mask: bool, has_groups: bool) -> dict[str, str]:
    """Of a mask, of groups with the tokens before and after each; of none, ``unread`` in their place."""
    mask = "*i32" if has_mask else unread
    return {"mask": mask, "first": "*i64" if has_groups else mask, "after": "*i64" if has_groups else mask}


def pool_case(
    chip: str,
    head_dim: int,
    dtype: str,
    slots: int,
    *,
    has_mask: bool = False,
    has_groups: bool = False,
    aligned: bool = True,
    exact_query: bool = False,
    whole: bool = False,
) -> Case:
    """A chunk of tokens to a state a slot. 16-bit dtypes must use tensor instructions."""
    has_mask = has_mask or has_groups
    most = slot_pooling.GROUPED_SLOTS if has_groups else slots
    config = slot_pool_config(head_dim, BYTES[dtype], min(slots, most), chip)
    tables = ("keys", "values")
    types: dict[str, Any] = dict.fromkeys(tables, ("i64",) * LAYERS)
    types["query"] = "*fp32" if exact_query else f"*{dtype}"
    types |= mask_types(types["query"], has_mask, has_groups)
    types |= dict.fromkeys(("states", "stats", "out_key", "out_value"), "*fp32")
    constexprs = {
        "LAYERS": LAYERS,
        "HEADS": HEADS,
        "HEAD_DIM": head_dim,
        "BLOCK_K": config.block_slots,
        "BLOCK_T": config.block_tokens,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "SCALE": head_dim**-0.5,
        "HAS_MASK": has_mask,
        "HAS_GROUPS": has_groups,
        "IS_ALIGNED": aligned,
        "IS_WIDE": False,
        "IS_QUERY_EXACT": exact_query,
        "IS_WHOLE": whole,
        "DTYPE": FLOATS[dtype],
        "PRECISION": "ieee",
    }
    if has_mask:
        constexprs["stride_mask_token"] = 1  # what stride 1 is specialised to
    mask_mark = "-groups" if has_groups else "-mask"
    marks = ((mask_mark, has_mask), ("-odd", not aligned), ("-exact", exact_query), ("-whole", whole))
    name = f"slots-{head_dim}-{dtype}-{slots}{''.join(mark for mark, on in marks if on)}"
    return make(
        name,
        slot_pooling.pool_slots_kernel,
        types,
        constexprs,
        config.num_warps,
        config.masked_stages if has_mask else config.num_stages,
        () if aligned else tables,
        expect_mma=dtype != "fp32",
    )


def merge_case(chip: str, head_dim: int, *, is_last: bool) -> Case:
    """States of chunks to one, or to the pooled key and value."""
    config = slot_pool_config(head_dim, 2, 8, chip)
    names = ("states", "stats", "out_states", "out_stats", "out_key", "out_value")
    constexprs = {
        "HEADS": HEADS,
        "HEAD_DIM": head_dim,
        "BLOCK_P": config.merge_parts,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "IS_LAST": is_last,
    }
    name = f"merge-slots-{head_dim}{'-last' if is_last else ''}"
    return make(name, slot_pooling.merge_slots_kernel, dict.fromkeys(names, "*fp32"), constexprs, config.merge_warps)


def backward_case(chip: str, head_dim: int, dtype: str, slots: int, *, has_groups: bool = False) -> Case:
    """A chunk's part of the queries' gradient, with a mask."""
    config = slot_backward_config(head_dim, BYTES[dtype], slots, chip)
    types: dict[str, Any] = dict.fromkeys(("keys", "values"), ("i64",) * LAYERS)
    types |= mask_types("", True, has_groups)
    names = ("query", "stats", "centers", "grad_key", "grad_value", "partials", "residuals")
    types |= dict.fromkeys(names, "*fp32")
    constexprs = {
        "stride_mask_token": 1,
        "LAYERS": LAYERS,
        "HEADS": HEADS,
        "HEAD_DIM": head_dim,
        "BLOCK_K": config.block_slots,
        "BLOCK_T": config.block_tokens,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "SCALE": head_dim**-0.5,
        "HAS_MASK": True,
        "HAS_GROUPS": has_groups,
        "IS_ALIGNED": True,
        "IS_WIDE": False,
        "DTYPE": FLOATS[dtype],
        "PRECISION": "ieee",
    }
    return make(
        f"slots-backward-{head_dim}-{dtype}-{slots}{'-groups' if has_groups else ''}",
        slot_pooling_backward.pool_slots_backward_kernel,
        types,
        constexprs,
        config.num_warps,
        config.masked_stages,
        expect_mma=dtype != "fp32",
    )


def fold_case(chip: str, dtype: str, rows: int, *, channels: int = 1024, width: int = 128) -> Case:
    """Pooled slots through W_down."""
    config = slot_fold_config(BYTES[dtype], rows, chip)
    types: dict[str, Any] = dict.fromkeys(("slot_key", "slot_value", "latent"), "*fp32")
    types |= dict.fromkeys(("down_weight", "down_bias", "slot_embedding"), f"*{dtype}")
    constexprs = {
        "CHANNELS": channels,
        "WIDTH": width,
        "BLOCK_R": config.block_rows,
        "BLOCK_W": config.block_width,
        "BLOCK_C": head_chunk(channels, config.block_channels),
        "DTYPE": FLOATS[dtype],
        "PRECISION": "ieee",
    }
    return make(
        f"slots-down-{channels}-{dtype}-{config.block_rows}",
        slot_projection.fold_slots_kernel,
        types,
        constexprs,
        config.num_warps,
        config.num_stages,
        expect_mma=dtype != "fp32",
    )


def expand_case(
    width: int,
    dtype: str,
    config: SlotExpandConfig,
    *,
    head_dim: int = 128,
    aligned: bool = True,
    weights: str = "",
    noise: bool = False,
) -> Case:
    """Latents through FFN blocks and up-projection; ``weights``: their dtype, if not the destination's."""
    tables = ("keys", "values")
    types: dict[str, Any] = dict.fromkeys(tables, ("i64",) * LAYERS) | {"latent": "*fp32", "keep_scale": "fp32"}
    names = ("norm_weight", "ffn_in_weight", "ffn_out_weight", "up_weight", "up_bias")
    types |= dict.fromkeys(names, f"*{weights or dtype}")
    constexprs = {
        "LAYERS": LAYERS,
        "IS_ALIGNED": aligned,
        "HAS_NOISE": noise,
        "HEADS": HEADS,
        "HEAD_DIM": head_dim,
        "WIDTH": width,
        "HIDDEN": 4 * width,
        "BLOCKS": 2,
        "BLOCK_R": config.block_rows,
        "BLOCK_C": head_chunk(head_dim, config.block_channels),
        "BLOCK_F": config.block_hidden,
        "SPLITS": config.splits,
        "EPS": 1e-6,
        "DTYPE": FLOATS[dtype],
        "PRECISION": "ieee",
    }
    marks = ("" if head_dim == 128 else f"-{head_dim}") + ("" if aligned else "-odd") + (weights and f"-{weights}")
    marks += "-noise" if noise else ""
    return make(
        f"expand-{width}-{dtype}-{config.block_rows}{marks}",
        slot_projection.expand_slots_kernel,
        types,
        constexprs,
        config.num_warps,
        config.num_stages,
        () if aligned else tables,
        expect_mma=dtype != "fp32",
    )


def training_cases(chip: str, width: int, dtype: str, *, channels: int = 1024) -> list[Case]:
    """The kernels of the expansion's backward, on packed rows with dropout; its and the fold's columns of weights.

    Parameters are float32 in training, whatever the products' dtype.
    """
    chosen = width, BYTES[dtype], chip
    config, of_ffn, of_columns = backward_config(*chosen), ffn_weights_config(*chosen), columns_config(*chosen)
    names = (
        "latent", "states", "dnorm", "dffn_in", "dffn_out", "dlatent", "ddown",
        "norm_weight", "ffn_in_weight", "ffn_out_weight", "up_weight",
    )  # fmt: skip
    types: dict[str, Any] = dict.fromkeys(names, "*fp32") | dict.fromkeys(("grad", "operands"), f"*{dtype}")
    types |= {"keep_scale": "fp32"}
    types |= dict.fromkeys(("keys", "values"), ("i64",) * LAYERS) | {"index": "*i32"}
    common = {"WIDTH": width, "DTYPE": FLOATS[dtype], "PRECISION": "ieee"}
    chunk = head_chunk(channels, config.block_channels)
    blocks = common | {
        "HAS_NOISE": True, "IS_PACKED": True, "HIDDEN": 4 * width, "BLOCKS": 2, "BLOCK_T": config.block_tokens,
        "BLOCK_F": config.block_hidden, "EPS": 1e-6,
    }  # fmt: skip
    weights = common | {
        "HIDDEN": 4 * width, "BLOCKS": 2, "BLOCK_T": of_ffn.block_tokens, "BLOCK_F": of_ffn.block_hidden,
    }  # fmt: skip
    up = common | {"CHANNELS": channels, "BLOCK_R": config.block_tokens, "BLOCK_C": chunk}
    columns = common | {
        "LAYERS": LAYERS, "HAS_INDEX": False, "HAS_SHARER": False, "IS_SHARER": False, "IS_WIDE": False,
        "IS_ALIGNED": True, "HEADS": 1, "HEAD_DIM": channels, "BLOCK_T": of_columns.block_tokens,
        "BLOCK_C": head_chunk(channels, of_columns.block_channels), "CACHE_DTYPE": FLOATS[dtype],
    }  # fmt: skip
    kernels: dict[str, tuple[Any, TileConfig, dict[str, Any]]] = {
        "states-noise": (slot_projection_backward.slot_states_kernel, config, blocks),
        "up": (slot_projection_backward.up_slots_backward_kernel, config, up),
        "gradients-noise": (projection_backward.gradients_kernel, config, blocks),
        "ffn-weights": (weight_gradients.ffn_weights_kernel, of_ffn, weights),
        "columns": (weight_gradients.down_weight_kernel, of_columns, columns),
    }
    return [
        make(
            f"train-slots-{width}-{dtype}-{name}",
            kernel,
            types | {"dlatent": f"*{dtype}"} if name == "columns" else types,
            constexprs,
            tile.num_warps,
            tile.num_stages,
            expect_mma=dtype != "fp32",
        )
        for name, (kernel, tile, constexprs) in kernels.items()
    ]


def cases(chip: str) -> list[Case]:
    """What is compiled for ``chip``: the published width at 8 and 64 slots; on sm_90 every width and form.

    Training runs in float32. Not held to the gate: d = 512 there, where three kernels spill in their loops.
    """
    built = [pool_case(chip, 128, "bf16", slots) for slots in (8, 64)]
    built.append(pool_case(chip, 128, "bf16", 8, has_mask=True))
    built.append(pool_case(chip, 128, "bf16", 8, has_groups=True))
    built.append(backward_case(chip, 128, "bf16", 8, has_groups=True))
    built.append(merge_case(chip, 128, is_last=True))
    built += [backward_case(chip, 128, "bf16", slots) for slots in (8, 64)]
    built += [fold_case(chip, "bf16", rows) for rows in (8, 64)]
    small = slot_expand_config(128, 2, 2, chip, 28, 8, 132)
    built += [expand_case(128, "bf16", config) for config in (slot_expand_options(128, 2, chip)[0], small)]
    noisy = slot_expand_config(128, 2, 2, chip, 28, 4096, 132, has_noise=True)
    built.append(expand_case(128, "bf16", noisy, noise=True))
    training = training_cases(chip, 128, "fp32")
    if chip != "sm_90":
        built += [case for case in training if not case.name.endswith(_SMALL)]
        # What shared memory or registers are scarcest for there.
        built.append(expand_case(512, "bf16", slot_expand_options(512, 2, chip)[0]))
        built.append(pool_case(chip, 256, "bf16", 64))
        return built
    built += training + training_cases(chip, 128, "bf16") + training_cases(chip, 256, "fp32")
    built += [pool_case(chip, head_dim, "bf16", slots) for head_dim in (64, 256) for slots in (8, 64)]
    built += [pool_case(chip, head_dim, "fp32", slots) for head_dim, slots in ((128, 8), (128, 64), (256, 8))]
    built.append(pool_case(chip, 80, "bf16", 32))
    built.append(pool_case(chip, 96, "fp16", 8, whole=True))
    built.append(pool_case(chip, 128, "bf16", 8, aligned=False))
    built += [pool_case(chip, 128, "bf16", slots, exact_query=True) for slots in (8, 64)]
    built.append(pool_case(chip, 128, "bf16", 1, has_groups=True, exact_query=True, whole=True))
    built.append(pool_case(chip, 128, "bf16", 64, has_groups=True))
    built.append(pool_case(chip, 128, "fp32", 8, has_groups=True))
    built.append(backward_case(chip, 128, "bf16", 64, has_groups=True))
    built.append(backward_case(chip, 256, "bf16", 64))
    built.append(backward_case(chip, 128, "fp32", 64))
    built += [fold_case(chip, "fp16", 8), fold_case(chip, "fp32", 8)]
    built.append(fold_case(chip, "bf16", 32, channels=240, width=70))
    for width in (64, 256, 512):
        built += [expand_case(width, "bf16", config) for config in slot_expand_options(width, 2, chip)]
    built += [expand_case(width, "fp32", slot_expand_options(width, 4, chip)[0]) for width in (128, 512)]
    built.append(expand_case(128, "fp32", slot_expand_options(128, 4, chip)[0], noise=True))
    built.append(expand_case(128, "fp16", small, head_dim=80))
    built.append(expand_case(128, "bf16", small, aligned=False))
    built.append(expand_case(128, "bf16", slot_expand_config(128, 2, 4, chip, 28, 8, 132), weights="fp32"))
    built.append(merge_case(chip, 256, is_last=False))
    return built
