"""The same cases under pytest-benchmark: ``pytest bench --benchmark-only``.

``LCF_BENCH_TOKENS`` (default 128) sets N, and ``LCF_BENCH_COMPILE=1`` adds torch.compile, which takes minutes to
compile. A result that is out of bounds fails before it is timed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch

import lcf_fast
from bench import errors, models, variants, wire
from bench.cases import CASES, GROUPS, HOST_CASES
from bench.inputs import Caches, Operands, geometry_of, make_config, make_operands, make_weights

TOKENS = int(os.environ.get("LCF_BENCH_TOKENS", "128"))
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
BY_NAME = {group.name: group for group in GROUPS}


@lru_cache(maxsize=1)
def caches() -> Caches:
    """Of the two published architectures, random weights."""
    parts = models.paragraphs()
    sharer, receiver = (models.load(None, role, device=DEVICE, dtype=DTYPE) for role in ("sharer", "receiver"))
    ids, _ = models.tokenize(receiver, parts[:10], TOKENS)
    context, spans = models.tokenize(receiver, parts[10:], 2 * TOKENS)
    return Caches(models.prefill(sharer, ids), models.prefill(receiver, ids), models.prefill(receiver, context), spans)


@lru_cache(maxsize=1)
def operands(group: str) -> Operands:
    made = caches()
    config = make_config(BY_NAME[group], geometry_of(made.sharer), geometry_of(made.receiver), 128)
    return make_operands(BY_NAME[group], made, config, make_weights(config, device=DEVICE, dtype=DTYPE))


def bench(benchmark: Any, group: str, run: Callable[[Operands], Any], layers: str) -> None:
    given = operands(group)
    benchmark.group = f"{BY_NAME[group].title}, N = {TOKENS}"
    benchmark.extra_info.update(device=DEVICE.type, dtype=str(DTYPE), layers=layers)

    def call() -> Any:
        result = run(given)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return result

    benchmark.pedantic(call, rounds=5, iterations=1, warmup_rounds=1)


@pytest.fixture(autouse=True)
def _on_the_right_back_end() -> Any:
    with torch.no_grad(), lcf_fast.use_backend("triton" if DEVICE.type == "cuda" else "eager"):
        yield


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ours(benchmark: Any, case: Any) -> None:
    given, reference = operands(case.group), variants.REFERENCE[case.group]
    truth, plain, got = (
        variants.flatten(run(one), given.kept)
        for run, one in ((reference, given.double()), (reference, given), (variants.OURS[case.name], given))
    )
    judgement = errors.judge(got, truth, plain)
    assert judgement.within, judgement
    bench(benchmark, case.group, variants.OURS[case.name], case.scope)


@pytest.mark.parametrize("case", HOST_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("way", wire.WAYS, ids=lambda way: way.name or "ours")
def test_messages_as_bytes(benchmark: Any, way: Any, case: Any) -> None:
    given, storage = operands("summarize"), wire.STORAGE[case.group]
    message = given.adapter.summarize(given.sharer_cache, given.context_spans).to("cpu")
    data = way.encode(message, storage)
    judgement = wire.judge(way.latent(way.decode(data)), wire.latent_of(message), storage)
    assert judgement.within, judgement
    benchmark.group = f"{case.name}, N = {2 * TOKENS}"
    benchmark.extra_info.update(device="cpu", dtype=storage, layers=case.scope, bytes=len(data))
    call = (lambda: way.encode(message, storage)) if case.group.startswith("encode") else (lambda: way.decode(data))
    benchmark.pedantic(call, rounds=5, iterations=10, warmup_rounds=1)


@pytest.mark.parametrize("group", sorted(BY_NAME))
def test_others(benchmark: Any, group: str) -> None:
    """The naive reference."""
    bench(benchmark, group, variants.REFERENCE[group], "as ours")


@pytest.mark.skipif(os.environ.get("LCF_BENCH_COMPILE") != "1", reason="asked for with LCF_BENCH_COMPILE=1")
@pytest.mark.parametrize("group", sorted(BY_NAME))
def test_compiled(benchmark: Any, group: str) -> None:
    torch.compiler.reset()
    bench(benchmark, group, variants.compiled(group, None), "as ours")
