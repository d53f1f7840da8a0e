"""The main job's rows for slots: what they count, who is held against whom, and that no cache is read for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from bench_jobs import BY_NAME, CPU, LCFX, AsOnGpu, small_job

from bench import cases, inputs, interpreted, report, rope, slots, timing, variants
from helpers import Geometry, make_cache
from lcf_fast import LCFConfig, ops

GROUPS = [group.name for group in cases.GROUPS if group.slots]
SLOTS = LCFConfig(cases.QWEN3, cases.QWEN3, bottleneck=128, slots=cases.SLOTS)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def shape(tokens: int = 0, context: int = 0, *, slots: int = 8, itemsize: int = 2, batch: int = 1) -> cases.Shape:
    """The published pair, all layers."""
    return cases.Shape(replace(SLOTS, slots=slots), tokens, context, layers=28, itemsize=itemsize, batch=batch)


# --- formulas


def test_a_message_reads_the_cache_and_its_half_of_the_weights_once() -> None:
    """By hand: 28 layers, k = 8, d = 128, Cs = 1024; 2,000 tokens of two-byte elements; the latent in four."""
    cache = 28 * 2000 * 2 * 1024 * 2
    weights = 28 * (8 * 1024 + 2 * 1024 * 128 + 128 + 8 * 128) * 2
    latent = 28 * 8 * 128 * 4
    work = cases.slots_summarize(shape(context=2000))
    assert work.bytes == cache + weights + latent == 244_694_016
    assert work.flops == 28 * (2000 * 8 * 6 * 1024 + 8 * 2 * 2048 * 128)
    assert cases.slots_summarize(shape(tokens=999, context=2000)) == work  # the receiver takes no part


def test_delivery_moves_the_message_its_weights_and_the_new_positions() -> None:
    latent = 28 * 8 * 128 * 4
    weights = 28 * (2 * (2 * 4 * 128 * 128 + 128) + 2 * 1024 * 128 + 2 * 1024) * 2
    positions = 28 * 8 * 2 * 1024 * 2
    work = cases.slots_deliver(shape())
    assert work.bytes == latent + weights + positions == 30_521_344
    assert work.flops == 28 * 8 * 2 * (16 * 128**2 + 2 * 1024 * 128)
    assert cases.slots_deliver(shape(tokens=999, context=999)) == work


def test_the_two_halves_read_every_parameter_once() -> None:
    read = sum(case(shape()).bytes for case in (cases.slots_summarize, cases.slots_deliver))
    latents, positions = 2 * 28 * 8 * 128 * 4, 28 * 8 * 2 * 1024 * 2
    assert read - latents - positions == 2 * SLOTS.parameter_count()
    both, parts = cases.slots_summarize_and_deliver(shape(5, 7)), (cases.slots_summarize, cases.slots_deliver)
    assert both.bytes == sum(part(shape(5, 7)).bytes for part in parts)
    assert both.flops == sum(part(shape(5, 7)).flops for part in parts)


def test_what_a_batch_and_appending_cost_more() -> None:
    for case in (cases.slots_summarize, cases.slots_deliver, cases.slots_append):
        one, two, three = (case(shape(7, 11, batch=batch)) for batch in (1, 2, 3))
        assert two.bytes - one.bytes == three.bytes - two.bytes > 0 and two.flops == 2 * one.flops
    copied = cases.slots_append(shape(tokens=100)).bytes - cases.slots_deliver(shape()).bytes
    assert copied == 28 * 100 * 2 * 2 * 1024 * 2  # K and V, in and out


def break_even(slots: int, itemsize: int) -> int:
    """The shortest receiver for which delivery of slots moves fewer bytes than `inject`; 0: for any."""
    delivered = cases.slots_deliver(shape(slots=slots, itemsize=itemsize)).bytes
    edited = (cases.inject(cases.Shape(LCFX, n, 0, layers=28, itemsize=itemsize)).bytes for n in range(10**6))
    return next(n for n, moved in enumerate(edited) if delivered < moved)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_slots_are_delivered_with_fewer_bytes_than_lcfx_edits(itemsize: int) -> None:
    """For any receiver at k = 8, since inject reads W_down's receiver half as well; by 6.4 MB of 37 in bfloat16."""
    assert break_even(8, itemsize) == 0
    # What k = 8 saves is worth some 50 slots more, of 129 KB each in bfloat16; then a token more of the receiver's.
    assert [break_even(slots, 2) for slots in (57, 58, 64)] == [0, 1, 4]
    for tokens in (1, 9, 2048):
        edited = cases.inject(cases.Shape(LCFX, tokens, 0, layers=28, itemsize=itemsize)).bytes
        assert cases.slots_append(shape(tokens, itemsize=itemsize)).bytes < edited  # even with the cache copied


# --- operands and variants


def test_slots_have_an_adapter_of_slots_and_its_message() -> None:
    operands = small_job("slots_append").operands
    adapter, message = operands.slots_adapter, operands.sent
    assert adapter.config.slots == cases.SLOTS and not adapter.training
    assert message.latent is not None and message.latent is operands.message
    assert message.latent.shape == (3, 1, cases.SLOTS, 64)
    assert all(adapter.get_parameter(name) is not None for name in operands.weights)
    assert adapter.get_parameter("up_weight").data_ptr() == operands.weights["up_weight"].data_ptr()
    torch.testing.assert_close(adapter.summarize(operands.sharer_cache).latent, message.latent)


def test_angles_by_hand_are_those_of_the_receivers_own_module() -> None:
    geometry = cases.CacheGeometry(3, 2, 64)
    made = rope.make_rope(geometry, 20, 8, CPU)
    assert made.positions.tolist() == [list(range(20, 28))]
    keys = [torch.randn(1, 2, 8, 64) for _ in range(geometry.layers)]
    angles = made.angles(keys[0])
    for key, turned in zip(keys, made.rotary.rotate(keys, made.positions)):
        torch.testing.assert_close(rope.rotated(key, *angles), turned)
        assert float((turned - key).abs().max()) > 0.1


def test_a_slot_at_another_position_or_unrotated_is_out_of_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    right = rope.Rope.angles
    for group in ("slots_deliver", "slots_append", "slots"):
        (good, *_) = small_job(group).rows()
        assert good["within"] is True and good["time"]
    for wrong in (
        lambda self, like: right(replace(self, positions=self.positions + 1), like),
        lambda self, like: tuple(part * 0 + one for part, one in zip(right(self, like), (1, 0))),
    ):
        monkeypatch.setattr(rope.Rope, "angles", wrong)
        for group in ("slots_deliver", "slots_append", "slots"):
            (bad, *_) = small_job(group).rows()
            assert bad["within"] is False and bad["time"] is None, group


@pytest.mark.parametrize("group", ["slots_summarize", "slots"])
def test_swapped_keys_and_values_are_out_of_bounds(group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.summarize_slots_layers
    wrong = lambda sharer, *rest, **more: right([pair[::-1] for pair in sharer], *rest, **more)  # noqa: E731
    monkeypatch.setattr("lcf_fast.ops_slots.summarize_slots_layers", wrong)
    (bad, *_) = small_job(group).rows()
    assert bad["within"] is False and bad["time"] is None


def test_delivery_reads_neither_cache() -> None:
    job = small_job("slots_deliver")
    want = variants.flatten(slots.REFERENCE["slots_deliver"](job.operands), job.operands.kept)
    for pair in (*job.operands.sharer_layers, *job.operands.receiver_layers):
        for tensor in pair:
            tensor.fill_(float("nan"))
    for row in job.rows():
        assert row["within"] is not False
    got = variants.flatten(variants.OURS["slots.place (k = 8)"](job.operands), job.operands.kept)
    assert len(got) == 6 and all(one.shape == (1, 2, cases.SLOTS, 64) for one in got)
    for one, other in zip(got, want):
        torch.testing.assert_close(one, other)


def test_appending_leaves_the_receivers_cache_and_ends_with_the_slots() -> None:
    operands = small_job("slots_append").operands
    was = [key.clone() for key, _ in operands.receiver]
    made = variants.flatten(variants.OURS["slots.append (k = 8)"](operands), operands.kept)
    placed = variants.flatten(variants.OURS["slots.place (k = 8)"](operands), operands.kept)
    for whole, new in zip(made, placed):
        assert whole.shape[2] == 20 + cases.SLOTS
        torch.testing.assert_close(whole[:, :, 20:], new)
    assert all(torch.equal(key, before) for (key, _), before in zip(operands.receiver, was))


@pytest.mark.parametrize("group", GROUPS)
def test_what_is_compiled_gives_the_same(group: str) -> None:
    """A layer at a time, the functions as they are: torch.compile itself takes too long here."""
    operands = small_job(group).operands
    got, want = (
        variants.flatten(run(operands), operands.kept)
        for run in (slots.compiled(group, lambda function: function), slots.REFERENCE[group])
    )
    assert len(got) == len(want)
    for one, other in zip(got, want):
        torch.testing.assert_close(one, other)


# --- rows


def test_rows_of_slots_name_no_spans() -> None:
    for group in GROUPS:
        row = small_job(group).rows()[0]
        prompt = BY_NAME[group].prompt
        assert (row["tokens"], row["context"], row["spans"]) == (20 if prompt else 30, 30, None)
        assert report.pooled(row) == (", context 30" if prompt else "")
    assert report.pooled({**row, "spans": 1}) == " in 1 span"


def test_on_a_gpu_delivery_shares_the_caches_and_rotates_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def rotated(self: inputs.Operands, count: int, **how: Any) -> list[inputs.Operands]:
        asked.append(how)
        return [self]

    monkeypatch.setattr(inputs.Operands, "rotated", rotated)
    monkeypatch.setattr(timing, "l2_bytes", lambda device: 1)
    monkeypatch.setattr(timing, "graphed", list)
    for name in ("host_us", "kernels_launched", "peak_mb"):
        monkeypatch.setattr(timing, name, lambda call: None)
    for group in GROUPS:
        assert small_job(group, AsOnGpu).rows()[0]["within"] is True
    assert [how["reads_caches"] for how in asked] == [name != "slots_deliver" for name in GROUPS]
    monkeypatch.undo()
    sets = small_job("slots_deliver").operands.rotated(4, one_layer=False, reads_caches=False)
    assert len({one.weights["up_weight"].data_ptr() for one in sets}) == 4
    assert all(one.slots_adapter.get_parameter("up_weight") is not None and one.rope is sets[0].rope for one in sets)


# --- Triton's interpreter


def test_slots_are_interpreted_where_their_kernels_are(monkeypatch: pytest.MonkeyPatch) -> None:
    group = BY_NAME["slots"]
    assert interpreted.checked_cases(group, everything=False)
    assert interpreted.checked_cases(BY_NAME["pool"], everything=False)
    monkeypatch.setattr(interpreted, "find_spec", lambda name: None)
    assert interpreted.checked_cases(group, everything=True) == []
    monkeypatch.setattr(interpreted, "find_spec", lambda name: object())
    (case,) = interpreted.checked_cases(group, everything=False)
    assert case.name == "slots.summarize+place (k = 8)"
    every = [case.name for name in GROUPS for case in interpreted.checked_cases(BY_NAME[name], everything=True)]
    assert every == [case.name for case in cases.CASES if case.group in GROUPS]


def test_the_interpreted_check_takes_models_of_few_layers() -> None:
    """Slots lie in every layer of a cache, so their adapter cannot keep a part of the layers."""
    sharer, receiver = Geometry(4, 2, 32), Geometry(3, 2, 64)
    caches = inputs.Caches(make_cache(sharer, 1, 5), make_cache(receiver, 1, 5), make_cache(receiver, 1, 5), [0, 5])
    cut = caches.last(interpreted.LAYERS)
    assert [inputs.geometry_of(part).layers for part in (cut.sharer, cut.receiver, cut.context)] == [2, 2, 2]
    assert cut.receiver[-1][0] is caches.receiver[-1][0] and cut.context[0][1] is caches.context[1][1]
    group = BY_NAME["slots"]
    config = inputs.make_config(group, inputs.geometry_of(cut.sharer), inputs.geometry_of(cut.receiver), 64)
    weights = inputs.make_weights(config, device=CPU, dtype=torch.float32)
    operands = inputs.make_operands(group, cut, config, weights, kept=(0, 1))
    assert len(variants.OURS["slots.summarize+place (k = 8)"](operands)) == 2
