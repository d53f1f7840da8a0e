"""What each case must at least move and do, by hand: the bytes and FLOPs that floors and rates are counted by."""

from __future__ import annotations

import torch
from bench_jobs import LCF, LCFX

from bench import c2c, cases
from lcf_fast import LCFConfig
from lcf_fast.config import c2c_parameters_per_layer


def per_token(case: str, config: LCFConfig) -> cases.Work:
    """What one more token costs, over 28 layers in two-byte elements: weights drop out."""
    work = next(one.work for one in cases.CASES if one.name == case)
    more, less = (work(cases.Shape(config, n, n, layers=28, itemsize=2)) for n in (1001, 1000))
    return cases.Work(more.bytes - less.bytes, more.flops - less.flops)


def test_lcf_a_token() -> None:
    """Design, section 3: 243.7 KB and 38.65 MFLOP over 28 layers."""
    work = per_token("fuse_layers", LCF)
    assert work.bytes == 243_712
    assert work.flops == 38_649_856


def test_lcf_reads_its_weights_once() -> None:
    """Spec, section 3: 38.8 MB in two bytes a parameter; the hard gates are read on the host."""
    work = cases.fuse_layers(cases.Shape(LCF, 0, 0, layers=28, itemsize=2))
    assert work.bytes == 2 * LCF.parameter_count()
    assert work.flops == 0


def test_pooling_reads_the_cache_once() -> None:
    """Design, section 3: 2,000 tokens of Qwen3-0.6B are 229 MB."""
    work = per_token("summarize_layers", LCFX)
    assert work.bytes == 28 * 2 * 1024 * 2
    assert round(2000 * work.bytes / 1e6) == 229


def test_inject_reads_no_sharer() -> None:
    work = per_token("adapter.inject", LCFX)
    assert work.bytes == 28 * 4 * 1024 * 2
    assert work.flops == 28 * 2 * (2048 * 128 + 16 * 128**2 + 1024 * 128 + 2 * 8 * 128)
    weights = cases.inject(cases.Shape(LCFX, 0, 0, layers=28, itemsize=2)).bytes
    queries, columns, bias, message = 2 * 1024, 2048 * 128, 128, 4 * 128
    assert weights == 28 * (2 * (LCFX.parameters_per_layer - queries - columns - bias) + message)


def test_every_part_of_lcfx_is_counted_once() -> None:
    shape = cases.Shape(LCFX, 7, 11, layers=3, itemsize=4)
    whole, parts = cases.summarize_and_inject(shape), (cases.summarize_layers(shape), cases.inject(shape))
    assert whole.bytes == sum(part.bytes for part in parts)
    assert whole.flops == sum(part.flops for part in parts)


def test_ops_of_one_layer() -> None:
    """Ten tokens, d = 128, 2 x 128 channels of the sharer's and 2 x 1,024 of the receiver's; latents in float32."""
    shape = cases.Shape(LCF, 10, 0, layers=28, itemsize=2)
    weights = 2304 * 128 + 128 + 16 * 128**2 + 2 * 128
    projection = cases.joint_projection(shape)
    assert projection.bytes == 10 * (2304 * 2 + 128 * 4) + weights * 2
    assert projection.flops == 10 * 2 * (2304 * 128 + 16 * 128**2)
    weights = 2 * 1024 * 64 + 2 * 1024 + 2 * (8 * 128 + 8) + 2
    injection = cases.gated_injection(shape)
    assert injection.bytes == 10 * (4 * 1024 * 2 + 128 * 4) + weights * 2
    assert injection.flops == 10 * 2 * (1024 * 128 + 2 * 8 * 128)
    pool = cases.attention_pool(cases.Shape(LCFX, 0, 10, layers=28, itemsize=2, batch=3))
    assert pool.bytes == 30 * 2 * 1024 * 2 + (3 * 2 + 2) * 1024 * 2  # the cache; K*, V* of each item, two queries
    assert pool.flops == 30 * 3 * 2 * 1024  # a score, and K and V with its weight


def test_the_fold_is_of_each_item_and_reads_its_weights_once() -> None:
    shape = cases.Shape(LCFX, 0, 0, layers=28, itemsize=2, batch=3)
    work, fold = cases.summarize_layers(shape), 2 * 1024 * 128
    assert work.bytes == 28 * (cases.attention_pool(shape).bytes + (fold + 128) * 2 + 3 * 128 * 4)
    assert work.flops == 28 * 3 * 2 * fold


def test_training_reads_caches_and_weights_again_and_writes_gradients() -> None:
    shape = cases.Shape(LCF, 5, 0, layers=28, itemsize=2, batch=2)
    whole, forward, weights = cases.train(shape), cases.fuse_layers(shape), 2 * LCF.parameter_count()
    assert whole.bytes == 3 * weights + 2 * 28 * 10 * (2304 + 2048) * 2
    assert whole.flops == 3 * forward.flops - 28 * 10 * 2 * 2304 * 128  # nobody asks for the caches' gradient


def test_c2c_has_the_papers_size() -> None:
    with torch.device("meta"):
        fuser = c2c.make_fuser(cases.QWEN25, cases.QWEN3, 1, device=torch.device("meta"), dtype=torch.float32)
    assert fuser.parameter_count() == 17_066_002 == c2c_parameters_per_layer(cases.QWEN25, cases.QWEN3)
    work = cases.c2c_fuser(cases.Shape(LCF, 1, 0, layers=28, itemsize=2))
    assert round(work.flops / 1e6) == 956
    assert work.bytes == 28 * ((2 * 128 + 4 * 1024) * 2 + 17_066_002 * 2)  # R read, and written edited
