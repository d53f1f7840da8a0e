"""bench/NOTES.md: its targets are those of the committed results, its predictions are what `bench.cases` counts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench import cases, published, targets
from bench.measures import floors
from bench.published import NOTES
from bench.targets import BATCH, COPY_GB_S, FEW, LCF, MATMUL_TFLOP_S, POOL, TRAIN
from lcf_fast.kernels import policy

TEXT = NOTES.read_text(encoding="utf-8")
EXPERIMENTS = TEXT.partition("## First experiments")[2]
PROCESSORS, CHUNK = 132, 64
#: The policy's tile at 2,048 tokens and the one below it; what an L2 cache holds and hands out.
TILE, LESS, L2_BYTES, L2_GB_S = 256, 128, 50e6, 5500


def row(begins: str) -> str:
    (found,) = (line for line in EXPERIMENTS.splitlines() if line.startswith(f"| {begins}"))
    return found


def us(work: cases.Work) -> tuple[float, float]:
    moved, done = floors(work, COPY_GB_S, MATMUL_TFLOP_S)
    return 1e3 * moved, 1e3 * done


def test_the_table_is_that_of_the_committed_results() -> None:
    table = "\n\n".join(map(targets.table, targets.read(targets.committed())))
    assert targets.replaced(TEXT, table, targets.BEGIN, targets.END) == TEXT, f"run: {published.COMMAND}"
    counts = targets.table(targets.Evidence()).count("| not measured |")
    assert counts == len(targets.TARGETS)


def test_tokens_and_weights_of_lcf() -> None:
    whole = cases.fuse_layers(LCF.shape()).bytes
    weights = cases.fuse_layers(replace(LCF.shape(), tokens=0)).bytes
    said = f"{(whole - weights) / 1e6:.0f} MB for the tokens ({us(cases.Work(whole - weights, 0))[0]:.0f} µs)"
    assert f"{said}, and {weights / 1e6:.1f} MB for the weights" in TEXT


def test_few_tokens() -> None:
    weights = cases.fuse_layers(replace(FEW[0].shape(), tokens=0))
    one, four = (us(weights)[0] * PROCESSORS / (28 * programs) for programs in (1, 4))
    text = row("LCF, 1 to 16 tokens")
    assert f"{weights.bytes / 1e6:.1f} MB of weights through 28 multiprocessors" in text
    assert f": {one:.0f} µs; through 112: {four:.0f} µs" in text


def test_bytes_beside_products() -> None:
    moved, done = us(cases.fuse_layers(LCF.shape()))
    text = row("LCF, 2,048 tokens: two programs")
    assert f"{moved:.0f} µs of bytes and {done:.0f} µs of products: {moved + done:.0f} µs" in text
    bound = next(target.bound for target in targets.TARGETS if target.floor and target.floor.pick is LCF)
    enough = bound * us(targets.tokens_alone(LCF.shape()))[0]
    assert f"{moved:.0f} µs at best, {enough:.0f} µs are enough" in text


def test_latents_of_training() -> None:
    shape = TRAIN.shape()
    rows, layers = shape.batch * shape.tokens, shape.layers
    again = cases.joint_projection(shape).flops * layers
    size = rows * layers * shape.config.bottleneck * cases.LATENT_BYTES
    made, kept = us(cases.Work(0, again))[1], us(cases.Work(2 * size, 0))[0]
    whole = us(cases.train(shape))[1] + made
    text = row("LCF, forward and backward")
    assert f"{again / 1e9:.0f} GFLOP, {made:.0f} µs; kept, {size / 1e6:.0f} MB written and read, {kept:.0f} µs" in text
    assert f"{made - kept:.0f} µs less of {whole:,.0f}" in text


def test_rounds() -> None:
    tiles = 28 * 2048 // TILE
    rounds = tiles / PROCESSORS
    said = f"{tiles} tiles of {TILE} tokens are {rounds:.2f} rounds, run as 2: {100 * (1 - rounds / 2):.0f}% less"
    assert said in row("LCF, 2,048 tokens: programs that stay")
    assert policy.tile_config(128, 2, "sm_90", 28, 2048).block_tokens == TILE


def test_what_a_chunk_may_issue() -> None:
    """At 90% of the copy bandwidth; four warps, and four instructions a clock at 1,755 MHz."""
    shape = POOL.shape()
    chunk = CHUNK * 2 * shape.config.sharer.head_dim * shape.itemsize
    clocks = chunk / (0.9 * COPY_GB_S * 1e9 / PROCESSORS) * 1755e6
    text = row("LCF-X, pooling")
    assert f"has {round(clocks, -1):,.0f} clocks" in text
    assert f"{100 * 1380 / clocks:.0f}% of what can be issued, then {100 * 928 / clocks:.0f}%" in text


def test_states_of_chunks() -> None:
    """A part of a state is 8 D bytes, for keys and values of 2 D elements a token."""
    head, item = POOL.shape().config.sharer.head_dim, POOL.shape().itemsize
    more = 2 * 8 * head / (CHUNK * 2 * head * item)
    text = row("LCF-X, 32,768 tokens pooled")
    assert f"{8 * head // 1024} KB is written and read for every chunk of {CHUNK * 2 * head * item // 1024} KB" in text
    for share in (more, more / 2):
        assert f"{100 * share:.1f}%" in text and f": {100 / (1 + share):.0f}%" in text


def test_nothing_is_passed_off_as_measured() -> None:
    """As long as no results of a GPU are committed."""
    if targets.read(targets.committed())[0].machine:
        pytest.skip("there are some")
    lines = [line for line in EXPERIMENTS.splitlines() if line.startswith("| ")][2:]
    assert lines and all(line.endswith("| not measured |") for line in lines)


def l2_bytes(pick: targets.Pick, tile: int) -> tuple[float, float, float]:
    """What tiles pull through L2: weights, the rows, the receiver's rows once more."""
    shape = pick.shape()
    weights = cases.fuse_layers(replace(shape, tokens=0)).bytes
    rows = cases.fuse_layers(shape).bytes - weights
    receiver = 28 * shape.batch * shape.tokens * 2 * 1024 * 2
    return shape.batch * shape.tokens // tile * weights, rows - receiver, receiver


def test_what_l2_moves() -> None:
    weights, once, again = l2_bytes(LCF, TILE)
    total = weights + once + again
    more, _, _ = l2_bytes(LCF, LESS)
    total_less = more + once + again
    batch, batch_less = (1e-3 * sum(l2_bytes(BATCH, tile)) / L2_GB_S for tile in (TILE, LESS))
    text = " ".join(TEXT.split())
    rows = 28 * LCF.shape().tokens
    for claim in (
        f"a layer's {weights * TILE / rows / 1e6:.2f} MB of weights",
        f"the rows are {once / 1e6:.0f} MB and {again / 1e6:.0f} MB",
        f"weights are {more / 1e6:.0f} MB for tiles of {LESS}, {weights / 1e6:.0f} MB for {TILE}",
        f"{round(total_less / 1e6, -1):,.0f} and {round(total / 1e6, -1):,.0f} MB",
        f"{round(1e-3 * total_less / L2_GB_S, -1):.0f} and {1e-3 * total / L2_GB_S:.0f} µs where L2 gives 5,500 GB/s",
        f"it is {round(batch_less, -1):,.0f} and {round(batch, -1):,.0f} µs",
        f"hold {PROCESSORS * TILE * once / rows / 1e6:.0f} MB of rows (of {LESS}: "
        f"{PROCESSORS * LESS * once / rows / 1e6:.0f} MB)",
        f"up to {again / 1e6:.0f} MB or {1e-3 * again / COPY_GB_S:.0f} µs more",
    ):
        assert claim in text, claim


def test_what_the_edit_finds_in_l2() -> None:
    """Rows are read keys first and edited backwards: what was read since, of all tiles in flight, is to fit."""
    layer = PROCESSORS * 2 * 1024 * 2  # of a token, keys and values, of all multiprocessors' tiles
    there = {tile: min(1.0, L2_BYTES / (tile * layer)) for tile in (TILE, LESS)}
    assert there[LESS] == pytest.approx(0.75, abs=0.05), "all values and half of the keys"
    assert there[TILE] == pytest.approx(1 / 3, abs=0.05), "a third"
    again = l2_bytes(LCF, TILE)[2]
    # Forwards, values first: of 128 tokens values are half of what is read again, of 256 not even those fit.
    less, more = sorted(round((there[tile] - forwards) * again / 1e6) for tile, forwards in ((LESS, 0.5), (TILE, 0.0)))
    assert f"{round(less, -1)} to {round(more, -1)} MB less" in row("LCF, 2,048 tokens: the edit")
