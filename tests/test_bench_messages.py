"""The main job's rows for messages: pools that grow, are merged and overlap, sums of messages, and bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from bench_jobs import CPU, LCFX, ROW, AsOnGpu, small_job

from bench import cases, inputs, runner, timing, variants, wire
from bench.settings import Settings
from helpers import Geometry, make_cache
from lcf_fast import Message


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# --- formulas


def test_merging_reads_states_and_no_cache() -> None:
    """Four states of 28 layers, 8 heads: three keys and values of 128 and eight statistics, float32; and the fold."""
    short, long = (cases.merge(cases.Shape(LCFX, n, n, layers=28, itemsize=2)) for n in (10, 10_000))
    assert short == long
    weights = cases.summarize_layers(cases.Shape(LCFX, 0, 0, layers=28, itemsize=2))
    assert short.bytes - weights.bytes == 4 * 28 * 8 * (3 * 2 * 128 + 8) * 4
    grown, at_once = (
        case(cases.Shape(LCFX, 10, 10, layers=28, itemsize=2)) for case in (cases.extend, cases.summarize_layers)
    )
    assert grown.bytes - at_once.bytes == 2 * (short.bytes - weights.bytes)


def test_three_more_messages_are_three_more_latents() -> None:
    shape = cases.Shape(LCFX, 100, 0, layers=28, itemsize=2)
    assert cases.inject_several(shape).bytes - cases.inject(shape).bytes == 3 * 28 * 128 * 4


def test_a_message_of_the_published_pair() -> None:
    """Spec, section 4: 7,168 bytes in bfloat16, from a float32 latent, and as it is back."""
    shape = cases.Shape(LCFX, 500, 500, layers=28, itemsize=2)
    assert cases.encode(shape).bytes == 2 * 7168 + 7168 and cases.decode(shape).bytes == 2 * 7168
    shape = cases.Shape(LCFX, 500, 500, layers=28, itemsize=1)
    int8 = 28 * (128 + 4)
    assert cases.encode(shape).bytes == cases.decode(shape).bytes == 2 * 7168 + int8


# --- operands


def test_windows_overlap_and_every_token_is_in_one() -> None:
    for context in (1, 3, 30, 512, 2048):
        spans = inputs._half_overlapping(context)
        o = small_job("windows").operands
        o.spans_host = spans
        bounds = o.context_spans.bounds()[0]
        assert {token for start, stop in bounds for token in range(start, stop)} == set(range(context))
        assert spans.shape[1] == (1 if context == 1 else 2)
    assert bounds[:3] == [(0, 200), (100, 300), (200, 400)] and bounds[-1] == (1900, 2048)


@pytest.mark.parametrize("ends", [[0, 10, 10, 30], [0, 7, 15, 22, 30], [0, 30]])
def test_pieces_cut_spans_apart(ends: list[int]) -> None:
    operands = small_job("merge").operands
    operands.spans_host = torch.tensor([ends], dtype=torch.int32)
    pieces = operands.pieces
    assert len(pieces) == cases.PIECES
    for layer, (key, value) in enumerate(operands.sharer_layers):
        for half, whole in enumerate((key, value)):
            parts = [cache[layer][half] for cache, _ in pieces]
            assert torch.equal(torch.cat(parts, 2), whole)
            assert parts[1].untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    lengths = [cache[0][0].shape[2] for cache, _ in pieces]
    for cut in (sum(lengths[:i]) for i in range(1, len(lengths))):
        assert 0 < cut < 30 and cut not in ends


def test_partial_pools_are_as_large_as_is_counted() -> None:
    operands = small_job("merge").operands
    shape = cases.Shape(operands.config, 30, 30, layers=3, itemsize=4)
    assert [part.nbytes for part in operands.parts] == [cases._states(shape)] * cases.PIECES


def test_merging_never_reads_the_cache() -> None:
    operands = small_job("merge").operands
    want = variants.flatten(variants.OURS["adapter.merge"](operands), operands.kept)
    for pair in operands.sharer_layers:
        for tensor in pair:
            tensor.fill_(float("nan"))
    got = variants.flatten(variants.OURS["adapter.merge"](operands), operands.kept)
    assert all(torch.equal(one, other) for one, other in zip(got, want)) and torch.isfinite(got[0]).all()


def test_several_messages_add_up_to_the_one() -> None:
    operands = small_job("inject").operands
    messages = operands.sent_by_several
    assert len(messages) == cases.MESSAGES
    whole, less = (wire.latent_of(operands.adapter.combine(some)) for some in (messages, messages[1:]))
    assert operands.message is not None
    torch.testing.assert_close(whole, operands.message)
    assert not torch.allclose(less, operands.message, rtol=0.01)


def test_who_pools_again_is_counted_so_and_its_caches_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def rotated(self: inputs.Operands, count: int, **how: Any) -> list[inputs.Operands]:
        asked.append(how)
        return [self]

    monkeypatch.setattr(inputs.Operands, "rotated", rotated)
    monkeypatch.setattr(timing, "l2_bytes", lambda device: 1)
    monkeypatch.setattr(timing, "graphed", list)
    for name in ("host_us", "kernels_launched", "peak_mb"):
        monkeypatch.setattr(timing, name, lambda call: None)
    job = small_job("merge", AsOnGpu)
    for row in job.rows():
        work = cases.merge(job.shape) if row["kind"] == "ours" else cases.summarize_layers(job.shape)
        assert (row["bytes"], row["flops"]) == (work.bytes, work.flops)
        assert row["kind"] == "ours" or row["time"] is None or row["variant"].startswith("pooling again: ")
    small_job("summarize", AsOnGpu).rows()
    assert [how["reads_caches"] for how in asked] == [False, True]


def test_rotated_states_share_the_caches_and_nothing_else() -> None:
    operands = small_job("merge").operands
    sets = operands.rotated(5, one_layer=False, reads_caches=False)
    assert len(sets) == 5 and all(one.sharer_layers[0][0] is operands.sharer_layers[0][0] for one in sets)
    for name in ("down_weight", "global_query"):
        assert len({one.weights[name].data_ptr() for one in sets}) == 5
    states = [part.states for one in sets for part in one.parts]
    assert len({tensor.data_ptr() for tensor in states}) == 5 * cases.PIECES
    assert all(one.adapter.down_weight.data_ptr() == one.weights["down_weight"].data_ptr() for one in sets)


# --- bytes


def host_rows(**settings: Any) -> list[dict[str, Any]]:
    one, context = (make_cache(Geometry(3, 2, 64), 1, n) for n in (1, 30))
    caches = inputs.Caches(one, one, context, [0, 10, 30])
    given = Settings(CPU, torch.float32, (1,), context=30, widths=(64,), seconds=0.02, **settings)
    return wire.rows(given, caches, 64, bandwidth=10.0)


def test_messages_as_bytes_are_judged_and_timed() -> None:
    rows = host_rows()
    assert {row["group"] for row in rows} == {group.name for group in cases.HOST_GROUPS} == set(wire.STORAGE)
    assert [row["op"] for row in rows if row["kind"] == "ours"] == [case.name for case in cases.HOST_CASES]
    for row in rows:
        assert set(row) == ROW
        assert row["within"] is True and row["time"]["regime"] == "hot" and row["reason"] is None
        # Each number is rounded once, so the three ways are off by the same.
        assert row["error"]["rel_rms"] == pytest.approx(
            rows[0 if row["dtype"] == "bfloat16" else 6]["error"]["rel_rms"]
        )
        assert 0.1 < row["error"]["used"] <= 1 and (row["tokens"], row["spans"], row["layers"]) == (30, 2, 3)
        assert (row["speedup"] is not None) == (row["kind"] == "ours") == (row["note"] is not None)
    json.dumps(rows, allow_nan=False)
    assert {row["group"] for row in host_rows(only=("decode", "Message.to_bytes (int8)"))} == {"decode", "encode_int8"}
    assert host_rows(only=("merge",)) == []


def test_writing_and_reading_are_timed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: dict[str, set[bool]] = {}

    def measure(calls: dict[str, list[Any]], *rest: Any) -> dict[str, timing.Timing]:
        ours = next(name for name in calls if name.startswith("Message."))
        kinds[ours] = {isinstance(call(), bytes) for some in calls.values() for call in some}
        assert len(calls) == len(wire.WAYS)
        return {name: timing.Timing.of([1.0]) for name in calls}

    monkeypatch.setattr(timing, "measure", measure)
    host_rows()
    assert kinds == {case.name: {"to_bytes" in case.name} for case in cases.HOST_CASES}


def test_a_message_that_comes_back_as_another_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Message.from_bytes

    def wrong(data: Any, **rest: Any) -> Message:
        message = right(data, **rest)
        assert message.latent is not None
        message.latent.view(-1)[5] *= 1.02
        return message

    monkeypatch.setattr(Message, "from_bytes", wrong)
    ours = [row for row in host_rows() if row["kind"] == "ours"]
    assert [row["within"] for row in ours] == [False] * 4 and not any(row["time"] or row["speedup"] for row in ours)
    assert ours[0]["error"]["used"] > 1 and ours[0]["reason"].startswith("no time")


@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_rounding_is_within_half_a_step(storage: str) -> None:
    latent = (
        torch.randn(3, 2, 64, generator=torch.Generator().manual_seed(1))
        * torch.tensor([1e-6, 1.0, 1e6])[:, None, None]
    )
    latent[1, 1] = 0.0
    message = Message(latent, (0, 1, 2), 1)
    tensors = wire.stored(message, storage)
    if storage == "int8":
        tensors["scale"][1, 1] = 0.0  # what is all zeros has no step
        tensors["latent"][1, 1] = 0
    judgement = wire.judge(wire.restored(tensors), latent, storage)
    assert judgement.within and judgement.used > 0.9
    coarse = wire.restored(tensors).float()
    coarse[0, 0, 0] *= 1.02
    assert not wire.judge(coarse, latent, storage).within
    for bad in (float("nan"), float("inf")):
        coarse[0, 0, 0] = bad
        judgement = wire.judge(coarse, latent, storage)
        assert not judgement.within
        json.dumps(judgement.to_dict(), allow_nan=False)
    assert not wire.judge(coarse[:1], latent, storage).within


def test_bytes_are_timed_on_the_cpu_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """And held against the bandwidth of the CPU."""
    cache = make_cache(Geometry(3, 2, 64), 1, 30)
    caches = inputs.Caches(cache, cache, cache, [0, 10, 30])
    seen: list[torch.device] = []

    def bandwidth(device: torch.device) -> float:
        seen.append(device)
        return 10.0

    monkeypatch.setattr(timing, "copy_bandwidth", bandwidth)
    given = AsOnGpu(CPU, torch.float32, (20,), context=30, widths=(64,), seconds=0.02, only=("encode",))
    found = runner.Found()
    runner._run_host(given, found, caches, runner.Silent(), 4000.0)
    (rows,) = found.rows.values()
    assert seen == [CPU] and rows[0]["copy_share"] == pytest.approx(rows[0]["gb_s"] / 10)
    assert all(row["host_us"] is None and row["kernels"] is None for row in rows)
    runner._run_host(Settings(CPU, torch.float32, (20,), 30, only=("lcf",)), found, caches, runner.Silent(), 1.0)
    assert list(found.rows.values()) == [rows] and not found.left_out


@pytest.mark.parametrize(
    ("error", "reason", "failures"),
    [(KeyboardInterrupt(), "interrupted", 0), (ValueError("bad bytes"), "it raised ValueError", 1)],
)
def test_a_width_that_fails_leaves_what_was_measured(
    error: BaseException, reason: str, failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make_cache(Geometry(3, 2, 64), 1, 30)
    caches = inputs.Caches(cache, cache, cache, [0, 10, 30])

    def rows(settings: Settings, caches: Any, width: int, *, bandwidth: float) -> list[dict[str, Any]]:
        if width == 128:
            raise error
        return [{"bottleneck": width}]

    monkeypatch.setattr(wire, "rows", rows)
    found = runner.Found(rows={3: [{"bottleneck": 0}]})
    given = Settings(CPU, torch.float32, (20,), 30, widths=(64, 128, 256), only=("encode", "decode"))
    runner._run_host(given, found, caches, runner.Silent(), 1.0)
    left = [(one["group"], one["bottleneck"], one["why"]) for one in found.left_out]
    interrupted = not failures
    assert left == [
        (group, width, reason) for width in ((128, 256) if interrupted else (128,)) for group in ("encode", "decode")
    ]
    measured = [row["bottleneck"] for index in sorted(found.rows) for row in found.rows[index]]
    assert measured == ([0, 64] if interrupted else [0, 64, 256])
    assert len(found.failures) == failures
