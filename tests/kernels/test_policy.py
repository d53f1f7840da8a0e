"""Launch policy as data: the choice for a size, and that importing it costs nothing."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lcf_fast.kernels import policy
from lcf_fast.kernels.common import head_chunk, heads_block, hidden_chunk

WIDTHS = (64, 128, 256, 512)
CHIPS = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942", policy.INTERPRETER)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_size_has_a_tile(width: int, itemsize: int, chip: str) -> None:
    options = policy.tile_options(width, itemsize, chip)
    tokens = [config.block_tokens for config in options]
    assert tokens == sorted(tokens, reverse=True)
    for config in options:
        for size in (config.block_tokens, config.block_channels, config.block_hidden, config.num_warps):
            assert size & (size - 1) == 0, config
        assert config.block_tokens >= 16


@pytest.mark.parametrize(
    ("tokens", "block"),
    [
        (2048, 256),  # 28 layers x 8 tiles: two rounds of 256, as long as four of 128
        (4096, 256),  # four rounds of 256 against seven of 128: a seventh more tokens, a quarter less through L2
        (1536, 128),  # two rounds of 256 against three of 128: a third more
        (1024, 128),  # 28 x 4 = 112 of 256 would not fill the chip
        (640, 128),  # 28 x 5 = 140 still fill 132 multiprocessors
        (512, 64),  # 28 x 4 = 112 would not
        (256, 64),  # 112 again: not all, but 16 rows would pull the weights four times as often
        (129, 64),
        (128, 16),
        (1, 16),
    ],
)
def test_the_tile_shrinks_to_fill_the_chip(tokens: int, block: int) -> None:
    assert policy.tile_config(128, 2, "sm_90", 28, tokens).block_tokens == block


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("width", WIDTHS)
def test_what_is_chosen_is_a_row_of_that_width_size_and_chip(width: int, itemsize: int, chip: str) -> None:
    tiles, splits = policy.tile_options(width, itemsize, chip), policy.split_options(width, itemsize, chip)
    for size in ((1, 1), (9, 40), (28, 128), (28, 2048)):
        assert policy.tile_config(width, itemsize, chip, *size) in tiles
        assert policy.split_config(width, itemsize, chip, *size) in (None, *splits)
    if itemsize == 4 and chip != policy.INTERPRETER:  # products on the plain cores, unrolled
        backward = policy.backward_config, policy.ffn_weights_config, policy.columns_config
        rows = [*tiles, *(of(width, itemsize, chip) for of in backward)]
        assert {row.block_tokens for row in rows} == {16}


def test_how_many_programs_fill_a_chip_goes_by_the_chip() -> None:
    """140 tiles of 64: more than an H100 has multiprocessors, less than half of what an MI300X has."""
    assert policy.tile_config(128, 2, "sm_100", 28, 320).block_tokens == 64
    assert policy.tile_config(128, 2, "gfx942", 28, 320).block_tokens == 16
    assert policy.split_counts("gfx942", 28, 36, 8) == (9, 2)


def test_gradients_of_weights_share_more_of_what_they_read() -> None:
    """On sm_90: whole heads of W_down and W_up, more hidden units. Elsewhere the row of the other backward kernels."""
    for width in (64, 128, 256):
        assert policy.columns_config(width, 2, "sm_90").block_channels == 128
    for width in (128, 256):
        least = policy.backward_config(width, 2, "sm_90").block_hidden
        assert policy.ffn_weights_config(width, 2, "sm_90").block_hidden > least
    for of in (policy.columns_config, policy.ffn_weights_config):
        assert of(128, 2, "sm_80") == policy.backward_config(128, 2, "sm_80")
    for relative in ("sm_86", "sm_87", "sm_120"):
        assert policy.backward_config(128, 2, relative) == policy.backward_config(128, 2, "sm_80")


def split_of(tokens: int, layers: int = 28, width: int = 128, itemsize: int = 2, chip: str = "sm_90") -> int | None:
    config = policy.split_config(width, itemsize, chip, layers, tokens)
    return None if config is None else config.block_tokens


def test_few_tokens_are_split_by_two_tiles() -> None:
    found = {tokens: split_of(tokens) for tokens in (1, 16, 17, 32, 33, 64, 65, 128, 129, 2048)}
    assert found == {1: 16, 16: 16, 17: 16, 32: 16, 33: 32, 64: 32, 65: 64, 128: 64, 129: None, 2048: None}
    assert split_of(128, layers=9) == 64
    assert split_of(1, layers=28 * 3) is None, "a batch of three fills half the chip by itself"
    assert split_of(64, layers=28 * 2) == 32
    assert split_of(65, layers=28 * 2) is None
    assert split_of(1, chip=policy.INTERPRETER) is None
    assert split_of(1, width=256, itemsize=4) is None
    assert split_of(1, width=128, itemsize=4) == 16


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_size_has_a_split(width: int, itemsize: int, chip: str) -> None:
    options = policy.split_options(width, itemsize, chip)
    tokens = [config.block_tokens for config in options]
    if itemsize == 4 and width > 128 and chip != policy.INTERPRETER:
        assert not tokens, "float32 this wide is not split"
        return
    assert tokens == sorted(tokens)
    assert tokens[0] == 16
    for config in options:
        for size in (config.block_tokens, config.block_channels, config.block_hidden, config.num_warps):
            assert size & (size - 1) == 0, config


@pytest.mark.parametrize(
    ("programs", "steps", "heads", "counts"),
    [
        (28, 36, 8, (5, 2)),  # 140 programs of 8 steps, the last of 4; 56 that pull the rest of the weights
        (56, 36, 8, (3, 1)),
        (9, 36, 8, (12, 4)),  # 15 would be 3 steps each, as 12 are
        (9, 36, 2, (12, 2)),
        (1, 4, 8, (4, 8)),  # no more parts than steps, nor splits than heads
        (112, 36, 8, (2, 1)),
    ],
)
def test_how_many_programs_share_a_tile(programs: int, steps: int, heads: int, counts: tuple[int, int]) -> None:
    assert policy.split_counts("sm_90", programs, steps, heads) == counts


def test_a_bigger_batch_keeps_the_tile_large() -> None:
    assert policy.tile_config(128, 2, "sm_90", 28 * 8, 128).block_tokens == 128
    assert policy.tile_config(128, 2, "sm_90", 28 * 8, 2048).block_tokens == 256


@pytest.mark.parametrize(
    ("chip", "known"),
    [
        ("sm_90", "sm_90"), ("sm_86", "sm_89"), ("sm_87", "sm_80"), ("sm_103", "sm_100"), ("sm_120", "sm_89"),
        ("sm_75", "sm_89"), ("gfx950", "gfx942"), ("gfx90a", "gfx942"), ("riscv", "sm_90"),
    ],
)  # fmt: skip
def test_relatives_share_rows(chip: str, known: str) -> None:
    assert policy.known_target(chip) == known


def test_float32_weights_beside_16_bit_caches_take_a_stage_less() -> None:
    """They wait in shared memory as they are; `tests/compile` holds what is launched to what a chip has."""
    few = (128, 2, "sm_90", 28, 17)
    own, wider = policy.split_config(*few), policy.split_config(*few, 4)
    assert own is not None and policy.split_config(*few, 2) == own
    assert wider == replace(own, down_stages=own.down_stages - 1, finish_stages=own.finish_stages - 1)
    many = (128, 2, "sm_90", 28, 2048)
    assert policy.tile_config(*many, 4) == replace(policy.tile_config(*many), num_stages=2)
    single = (128, 4, "sm_90", 28, 2048)
    assert policy.tile_config(*single, 4) == policy.tile_config(*single)
    assert policy.stages(1, 2, 4) == 1
    for width, least in ((512, 1), (256, 2)):
        assert policy.injection_config(width, 2, "sm_90", 28, 2048).num_stages == least
    fewer = (512, 2, "sm_90", 28, 128)
    assert policy.injection_config(*fewer) == policy.tile_config(*fewer), "32 rows fit at two stages"


TF32 = {
    "by its old name": "torch.backends.cuda.matmul.allow_tf32 = True",
    "by the newer name": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "everywhere": "torch.set_float32_matmul_precision('high')",
    "": "torch.set_float32_matmul_precision('high'); torch.backends.cuda.matmul.fp32_precision = 'ieee'",
}


@pytest.mark.parametrize("how", [*TF32])
def test_tf32_is_used_where_torch_is_allowed_it_however_that_is_said(how: str) -> None:
    """In a process of its own: torch does not let the old and the newer setting be mixed, or be read across."""
    asked = "from lcf_fast.kernels.common import dot_precision as p; print(p(torch.float32), p(torch.bfloat16))"
    code = f"import torch; {TF32[how]}; {asked}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["tf32" if how else "ieee", "ieee"], done.stderr


def test_heads_and_chunks() -> None:
    assert [head_chunk(dim, 64) for dim in (64, 80, 96, 128, 256)] == [64, 32, 32, 64, 64]
    assert [heads_block(heads) for heads in (1, 8, 16, 17, 40)] == [16, 16, 16, 32, 64]
    assert [hidden_chunk(hidden, 128) for hidden in (64, 128, 192, 512)] == [64, 128, 64, 128]


def test_policy_imports_neither_torch_nor_triton() -> None:
    path = Path(policy.__file__).parent
    code = (
        "import importlib, sys\n"
        f"sys.path.append({str(path.parent)!r})\n"
        f"for name in {sorted(p.stem for p in path.glob('*policy.py'))}:\n"
        f"    importlib.import_module({path.name!r} + '.' + name)\n"
        "assert not {'torch', 'triton'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
