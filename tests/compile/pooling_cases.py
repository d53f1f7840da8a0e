"""The pooling kernels and the fold at the policy's configurations: cases of the compile gate."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from case import Case, make

from lcf_fast.kernels import fold, merging, pooling, pooling_backward
from lcf_fast.kernels.pooling_policy import fold_config, pooling_config

#: Qwen3-0.6B: 28 layers, tables padded to 32; 8 KV heads.
LAYERS = 32
HEADS = 8
FLOATS = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


def pool_case(head_dim: int, dtype: str, *, has_mask: bool = False, aligned: bool = True, slack: int = 0) -> Case:
    """A chunk of tokens to its state. 16-bit dtypes must use tensor instructions."""
    config = pooling_config(head_dim, BYTES[dtype], "sm_90")
    tables = ("keys", "values")
    types: dict[str, Any] = dict.fromkeys(tables, ("i64",) * LAYERS)
    types |= dict.fromkeys(("span_query", "global_query"), f"*{dtype}")
    types |= {"offsets": "*i32", "mask": "*i1" if has_mask else "*i32", "states": "*fp32", "stats": "*fp32"}
    constexprs = {
        "LAYERS": LAYERS,
        "HEADS": HEADS,
        "HEAD_DIM": head_dim,
        "BLOCK_T": config.block_tokens,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "GROUP": config.group_spans,
        "SCALE": head_dim**-0.5,
        "HAS_MASK": has_mask,
        "SLACK": slack,
        "IS_WIDE": False,
        "IS_ALIGNED": aligned,
        "DTYPE": FLOATS[dtype],
    }
    if has_mask:
        constexprs["stride_mask_token"] = 1
    name = f"pool-{head_dim}-{dtype}{'-mask' if has_mask else ''}{'' if aligned else '-odd'}{'-piece' * slack}"
    return make(
        name,
        pooling.pool_chunk_kernel,
        types,
        constexprs,
        config.num_warps,
        unaligned=() if aligned else tables,
        expect_mma=dtype != "fp32",
        max_registers=config.max_registers,
    )


def merge_case(head_dim: int, dtype: str, *, is_last: bool) -> Case:
    """States to a state, or to the pooled key and value in ``dtype``."""
    config = pooling_config(head_dim, BYTES[dtype], "sm_90")
    names = ("states", "stats", "out_states", "out_stats")
    types: dict[str, Any] = dict.fromkeys(names, "*fp32") | {"global_query": f"*{dtype}"}
    types |= dict.fromkeys(("out_key", "out_value"), f"*{dtype}")
    constexprs = {
        "HEADS": HEADS,
        "HEAD_DIM": head_dim,
        "BLOCK_C": config.merge_chunks,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "SCALE": head_dim**-0.5,
        "IS_LAST": is_last,
        "OUT_DTYPE": FLOATS[dtype],
    }
    name = f"merge-{head_dim}-{dtype}{'-last' if is_last else ''}"
    return make(name, merging.merge_kernel, types, constexprs, config.merge_warps)


def fold_case(channels: int, batch: int, dtype: str) -> Case:
    """The summary through W_down, d = 128."""
    config = fold_config(channels, batch)
    types = {"summary": "*fp32", "down_weight": f"*{dtype}", "down_bias": f"*{dtype}", "latent": "*fp32"}
    constexprs = {
        "CHANNELS": channels,
        "WIDTH": 128,
        "BLOCK_B": config.block_batch,
        "BLOCK_W": config.block_width,
        "BLOCK_C": config.block_channels,
        "STAGES": config.num_stages,
    }
    return make(f"fold-{channels}-{batch}-{dtype}", fold.fold_kernel, types, constexprs, config.num_warps)


def backward_cases(head_dim: int, dtype: str, *, has_cache_grad: bool = False) -> list[Case]:
    """A token's numbers (reads the cache once), and the sums (reads the keys again)."""
    config = pooling_config(head_dim, BYTES[dtype], "sm_90")
    constexprs = {
        "LAYERS": LAYERS,
        "HEADS": HEADS,
        "HEAD_DIM": head_dim,
        "BLOCK_T": config.block_tokens,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "SCALE": head_dim**-0.5,
        "IS_ALIGNED": True,
        "DTYPE": FLOATS[dtype],
    }
    types: dict[str, Any] = dict.fromkeys(("keys", "values"), ("i64",) * LAYERS)
    types |= dict.fromkeys(("span_query", "global_query", "grad_key", "grad_value"), f"*{dtype}")
    types |= dict.fromkeys(("grad", "numbers", "span_numbers", "partials"), "*fp32") | {"entries": "*i32"}
    name = f"{head_dim}-{dtype}"
    sums = constexprs | {"HAS_CACHE_GRAD": has_cache_grad}
    return [
        make(f"tokens-{name}", pooling_backward.token_numbers_kernel, types, constexprs, config.num_warps),
        make(
            f"backward-{name}{'-cache' if has_cache_grad else ''}",
            pooling_backward.pool_backward_kernel,
            types,
            sums,
            config.num_warps,
        ),
    ]


def span_cases() -> list[Case]:
    """The spans' numbers and the cross-span softmax of the backward."""
    types = {"numbers": "*fp32", "entries": "*i32", "offsets": "*i32", "span_numbers": "*fp32"}
    constexprs = {"HEADS": HEADS, "BLOCK": pooling_backward.WALK}
    return [
        make("spans", pooling_backward.span_numbers_kernel, types, constexprs, 4),
        make("across", pooling_backward.cross_span_kernel, types, {"BLOCK": pooling_backward.WALK}, 4),
    ]


CASES = [
    *(pool_case(head_dim, dtype) for head_dim in (64, 128, 256) for dtype in ("bf16", "fp32")),
    pool_case(80, "bf16"),
    pool_case(96, "fp16"),
    pool_case(128, "bf16", has_mask=True),
    pool_case(128, "bf16", aligned=False),
    pool_case(128, "bf16", has_mask=True, slack=1),
    *(merge_case(head_dim, "fp32", is_last=True) for head_dim in (64, 128, 256)),
    merge_case(128, "bf16", is_last=True),
    merge_case(128, "fp32", is_last=False),
    merge_case(256, "fp32", is_last=False),
    fold_case(1024, 1, "bf16"),
    fold_case(1024, 1, "fp32"),
    fold_case(1024, 8, "bf16"),
    fold_case(128, 2, "bf16"),
    *backward_cases(128, "bf16", has_cache_grad=True),
    *backward_cases(128, "fp32")[1:],
    *backward_cases(256, "bf16")[1:],
    *span_cases(),
]


def cases(chip: str) -> list[Case]:
    """What is compiled for ``chip``: on sm_90 all, elsewhere one of a kind, to save time."""
    if chip == "sm_90":
        return CASES
    return [case for case in CASES if "128-bf16" in case.name or case.name in ("fold-1024-1-bf16", "spans", "across")]
