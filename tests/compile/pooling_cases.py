"""The pooling kernels at every configuration that the policy picks for common head widths: cases of the compile gate."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import triton
import triton.language as tl
from case import Case

from lcf_fast.kernels import pooling
from lcf_fast.kernels.pooling_policy import fold_config, pooling_config

LAYERS = 8
FLOATS = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
#: Pooled tensors: the launcher's specialisation knows only strides and pointers that are multiples of 16.
ODD = ("stride_mask_batch", "stride_mask_token", "stride_offsets")


def make(
    name: str,
    kernel: Any,
    types: dict[str, Any],
    constexprs: dict[str, Any],
    num_warps: int,
    num_stages: int = 3,
    unaligned: Iterable[str] = (),
) -> Case:
    """A case whose pointers and strides divide by 16, except ``unaligned`` and the lengths."""
    signature: dict[str, Any] = {}
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, parameter in enumerate(kernel.arg_names):
        kind = "constexpr" if parameter in constexprs else types.get(parameter, "i32")
        signature[parameter] = kind
        if kind == "constexpr" or parameter in unaligned or parameter in kernel.do_not_specialize:
            continue
        if isinstance(kind, tuple):
            attrs.update({(i, j): [["tt.divisibility", 16]] for j in range(len(kind))})
        else:
            attrs[(i,)] = [["tt.divisibility", 16]]
    return Case(name, kernel, signature, constexprs, attrs, num_warps, num_stages, expect_mma=False)


def pool_case(head_dim: int, dtype: str, *, has_mask: bool = False, aligned: bool = True) -> Case:
    """Stage 1."""
    config = pooling_config(head_dim, BYTES[dtype], "sm_90")
    types = dict.fromkeys(("keys", "values"), ("i64",) * LAYERS)
    types |= dict.fromkeys(("span_query", "global_query"), f"*{dtype}")
    types |= {"offsets": "*i32", "mask": "*i1" if has_mask else "*i32", "states": "*fp32", "stats": "*fp32"}
    constexprs = {
        "LAYERS": LAYERS,
        "HEADS": 8,
        "HEAD_DIM": head_dim,
        "BLOCK_T": config.block_tokens,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "GROUP": config.group_spans,
        "SCALE": head_dim**-0.5,
        "HAS_MASK": has_mask,
        "IS_ALIGNED": aligned,
        "DTYPE": FLOATS[dtype],
    }
    if has_mask:
        constexprs["stride_mask_token"] = 1
    name = f"pool-{head_dim}-{dtype}{'-mask' if has_mask else ''}{'' if aligned else '-unaligned'}"
    unaligned = ODD if aligned else (*ODD, "keys", "values")
    return make(name, pooling.pool_chunk_kernel, types, constexprs, config.num_warps, unaligned=unaligned)


def merge_case(head_dim: int, dtype: str, *, is_last: bool) -> Case:
    """Stage 2."""
    config = pooling_config(head_dim, BYTES[dtype], "sm_90")
    names = ("states", "stats", "out_states", "out_stats")
    types: dict[str, Any] = dict.fromkeys(names, "*fp32") | {"global_query": f"*{dtype}"}
    types |= dict.fromkeys(("out_key", "out_value"), f"*{dtype}")
    constexprs = {
        "HEADS": 8,
        "HEAD_DIM": head_dim,
        "BLOCK_C": config.merge_chunks,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "SCALE": head_dim**-0.5,
        "IS_LAST": is_last,
        "OUT_DTYPE": FLOATS[dtype],
    }
    name = f"merge-{head_dim}-{dtype}{'-last' if is_last else ''}"
    return make(name, pooling.merge_kernel, types, constexprs, config.merge_warps)


def fold_case(channels: int, batch: int, dtype: str) -> Case:
    """The fold at d = 128."""
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
    name = f"fold-{channels}-{batch}-{dtype}"
    return make(name, pooling.fold_kernel, types, constexprs, config.num_warps)


CASES = [
    *(pool_case(head_dim, dtype) for head_dim in (64, 128, 256) for dtype in ("bf16", "fp32")),
    pool_case(80, "bf16"),
    pool_case(96, "fp16"),
    pool_case(128, "bf16", has_mask=True),
    pool_case(128, "bf16", aligned=False),
    *(merge_case(head_dim, "fp32", is_last=True) for head_dim in (64, 128, 256)),
    merge_case(128, "bf16", is_last=True),
    merge_case(128, "fp32", is_last=False),
    merge_case(256, "fp32", is_last=False),
    fold_case(1024, 1, "bf16"),
    fold_case(1024, 1, "fp32"),
    fold_case(1024, 8, "bf16"),
    fold_case(128, 2, "bf16"),
]
