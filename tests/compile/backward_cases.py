"""The backward kernels of projection, injection and weights: cases of the compile gate."""

from __future__ import annotations

from typing import Any

from case import Case, make
from tile_cases import FLOATS, LAYERS, WEIGHTS

from lcf_fast.kernels import injection_backward, projection_backward, weight_gradients
from lcf_fast.kernels.common import head_chunk, heads_block
from lcf_fast.kernels.policy import TileConfig, backward_config, columns_config, ffn_weights_config

HEADS, HEAD_DIM = 8, 128
#: The kernels with the most in registers.
_LARGEST = ("gradients", "inject-back", "ffn-weights")
_FLOATS = ("states", "dnorm", "dffn_in", "dffn_out", "ddown", "dlatent", "latent", "dscore", "scale",
           "dlogit", "dup", "dbias")  # fmt: skip


def cases(chip: str) -> list[Case]:
    """What is compiled for ``chip``: at the published width what takes the most; on sm_90 all, and every width."""
    built = backward_cases(chip, 128, "bf16", noise=True)
    if chip != "sm_90":
        return [case for case in built if case.name.startswith(_LARGEST)]
    for width in (64, 256, 512):
        built += backward_cases(chip, width, "bf16")
    return built + [case for case in backward_cases(chip, 128, "fp32") if case.name.startswith(_LARGEST)]


def backward_cases(chip: str, width: int, dtype: str, *, noise: bool = False) -> list[Case]:
    """The five kernels, as a backward pass of LCF launches them."""
    chosen = width, 4 if dtype == "fp32" else 2, chip
    config, of_ffn, of_columns = backward_config(*chosen), ffn_weights_config(*chosen), columns_config(*chosen)
    types: dict[str, Any] = dict.fromkeys(("sharer_keys", "sharer_values", "receiver_keys"), ("i64",) * LAYERS)
    types |= dict.fromkeys(("receiver_values", "keys", "values", "codes"), ("i64",) * LAYERS)
    # Parameters are float32 in training, whatever the caches are.
    types |= {"grad": f"*{dtype}"} | dict.fromkeys((*WEIGHTS, "start", *_FLOATS), "*fp32")
    types |= {"operands": f"*{dtype}", "index": "*i32", "keep_scale": "fp32", "inverse_temperature": "fp32"}
    # What is rounded to matrix operands before the kernels of the weights' gradients.
    rounded = types | dict.fromkeys(("latent", "dlatent"), f"*{dtype}")
    common = {"WIDTH": width, "DTYPE": FLOATS[dtype], "PRECISION": "ieee"}
    rows = {"HAS_INDEX": True, "HAS_SHARER": True, "LAYERS": LAYERS}
    ffn = {"HIDDEN": 4 * width, "BLOCKS": 2, "BLOCK_F": config.block_hidden, "EPS": 1e-6, "HAS_NOISE": noise}
    tokens = {**ffn, "IS_PACKED": False}
    weights = {"HIDDEN": 4 * width, "BLOCKS": 2, "BLOCK_F": of_ffn.block_hidden}
    chunk = head_chunk(HEAD_DIM, config.block_channels)
    heads = {"HEADS": HEADS, "HEAD_DIM": HEAD_DIM, "BLOCK_C": chunk}
    columns = {**rows, **heads, "BLOCK_C": head_chunk(HEAD_DIM, of_columns.block_channels)}
    states = {
        "IS_WIDE": False, "IS_SHARER_ALIGNED": True, "IS_RECEIVER_ALIGNED": True, "SHARER_HEADS": 2, "SHARER_DIM": 64,
        "RECEIVER_HEADS": HEADS, "RECEIVER_DIM": HEAD_DIM, "BLOCK_CS": head_chunk(64, config.block_channels),
        "BLOCK_CR": chunk, "SHARER_DTYPE": FLOATS[dtype],
    }  # fmt: skip
    down = {"IS_SHARER": False, "IS_WIDE": False, "IS_ALIGNED": True, "CACHE_DTYPE": FLOATS[dtype]}
    gates = {"HAS_NOISE": noise, "READS_GATE": False, "BLOCK_H": heads_block(HEADS)}
    kernels: dict[str, tuple[Any, TileConfig, dict[str, Any]]] = {
        "states": (projection_backward.states_kernel, config, {**rows, **ffn, **states}),
        "gradients": (projection_backward.gradients_kernel, config, tokens),
        "inject-back": (injection_backward.injection_gradients_kernel, config, {**rows, **heads, **gates}),
        "ffn-weights": (weight_gradients.ffn_weights_kernel, of_ffn, weights),
        "down-weights": (weight_gradients.down_weight_kernel, of_columns, {**columns, **down}),
        "up-weights": (weight_gradients.up_weight_kernel, of_columns, columns),
    }
    return [
        make(
            f"{name}-{width}-{dtype}{'-noise' if noise else ''}",
            kernel,
            rounded if name.endswith("-weights") else types,
            common | {"BLOCK_T": tile.block_tokens} | constexprs,
            tile.num_warps,
            tile.num_stages,
            ("codes",),
            expect_mma=dtype != "fp32",
        )
        for name, (kernel, tile, constexprs) in kernels.items()
    ]
