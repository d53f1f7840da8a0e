"""The two kernels of few tokens at every configuration of the policy: cases of the compile gate."""

from __future__ import annotations

from typing import Any

from case import Case, make
from tile_cases import FLOATS, LAYERS, WEIGHTS

from lcf_fast.kernels import fusion_split
from lcf_fast.kernels.common import head_chunk, heads_block
from lcf_fast.kernels.policy import SPLIT_TOKENS, SplitConfig, split_config, split_options


def split_cases(
    width: int,
    dtype: str,
    config: SplitConfig,
    *,
    message: bool = False,
    index: bool = False,
    inplace: bool = True,
    aligned: bool = True,
    single_weights: bool = False,
    sharer: tuple[int, int] = (2, 64),
    receiver: tuple[int, int] = (8, 128),
) -> list[Case]:
    """Both kernels at one configuration."""
    tables = ("sharer_keys", "sharer_values", "receiver_keys", "receiver_values", "codes")
    types: dict[str, Any] = dict.fromkeys(tables, ("i64",) * LAYERS)
    types |= dict.fromkeys((*WEIGHTS, "out"), f"*{dtype}")
    types |= {"index": "*i32", "start": "*fp32" if message else f"*{dtype}", "partials": "*fp32"}
    if single_weights:
        types |= dict.fromkeys((*WEIGHTS, "start"), "*fp32")
    if message:
        sharer = (1, 1024)  # the launcher gives channels only
    constexprs = {
        "LAYERS": LAYERS,
        "HAS_SHARER": not message,
        "HAS_INDEX": index,
        "IS_INPLACE": inplace,
        "IS_WIDE": False,
        "IS_SHARER_ALIGNED": aligned,
        "IS_RECEIVER_ALIGNED": aligned,
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
        "BLOCK_H": heads_block(receiver[0]),
        "EPS": 1e-6,
        "SHARER_DTYPE": FLOATS[dtype],
        "DTYPE": FLOATS[dtype],
        "PRECISION": "ieee",
    }
    marks = "".join(
        mark
        for mark, on in (
            ("-message", message),
            ("-index", index),
            ("-out", not inplace),
            ("-odd", not aligned),
            ("-single", single_weights),
        )
        if on
    )
    heads = "" if receiver == (8, 128) else f"-{receiver[0]}x{receiver[1]}"
    made = []
    for name, kernel, stages in (
        ("down-partial", fusion_split.down_partial_kernel, config.down_stages),
        ("finish", fusion_split.finish_kernel, config.finish_stages),
    ):
        own = {key: value for key, value in constexprs.items() if key in kernel.arg_names}
        made.append(
            make(
                f"{name}-{width}-{dtype}-{config.block_tokens}{marks}{heads}",
                kernel,
                types,
                own,
                config.num_warps,
                stages,
                ("codes",) if aligned else tables,
                expect_mma=dtype != "fp32",
            )
        )
    return made


def cases(chip: str) -> list[Case]:
    """What is compiled for ``chip``: every width at its smallest tile; on sm_90 every tile and every form."""
    built = []
    for width in (64, 128, 256, 512):
        built += split_cases(width, "bf16", split_options(width, 2, chip)[0])
        single = split_config(width, 2, chip, 1, 1, 4)
        assert single is not None
        built += split_cases(width, "bf16", single, single_weights=True)
    if chip != "sm_90":
        built += split_cases(128, "bf16", split_options(128, 2, chip)[-1])
    if chip == "sm_90":
        for width in (64, 128, 256, 512):
            for config in split_options(width, 2, chip)[1:]:
                built += split_cases(width, "bf16", config)
            wider = split_config(width, 2, chip, 1, SPLIT_TOKENS, 4)
            assert wider is not None
            built += split_cases(width, "bf16", wider, single_weights=True)
        small = split_options(128, 2, chip)[0]
        built += split_cases(128, "bf16", small, message=True)
        built += split_cases(128, "bf16", small, inplace=False, index=True)
        built += split_cases(128, "bf16", small, aligned=False)
        built += split_cases(128, "bf16", small, receiver=(5, 80))
        built += split_cases(128, "fp32", split_options(128, 4, chip)[0])
    return built
