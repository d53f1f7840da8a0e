"""Whose messages are: in threads, and when the adapter is gone."""

from __future__ import annotations

import gc
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import RECEIVER, SHARER, make_adapter

from helpers import make_cache
from lcf_fast import CacheGeometry, LatentCacheFlow, LatentSlots, LCFConfig, Message
from lcf_fast.checkpoint import load_any

OTHER = CacheGeometry(2, 1, 24)  # another sharer model


@pytest.mark.parametrize("slots", [0, 2])
def test_a_side_outlives_its_adapter(slots: int, tmp_path: Path) -> None:
    """Trained and saved when the adapter that it writes to is no longer in memory, it still knows whose it is."""
    config = LCFConfig(SHARER, RECEIVER, bottleneck=64, cross_context=True, slots=slots)
    adapter: Any = LatentSlots(config) if slots else LatentCacheFlow(config)
    digest = adapter.origin.adapter
    sides = [adapter.sharer_side(), type(adapter.sharer_side()).for_receiver(adapter, OTHER)]
    del adapter
    gc.collect()
    for side, geometry in zip(sides, (SHARER, OTHER)):
        with torch.no_grad():
            side.down_weight.add_(1.0)
        side.save_pretrained(tmp_path)
        read = load_any(tmp_path)
        assert side.adapter_digest == read.adapter_digest == read.origin.adapter == digest
        with torch.no_grad():
            message = Message.from_bytes(side.summarize(make_cache(geometry, 1, 4)).to_bytes())
        assert message.origin == side.origin == read.origin


def test_two_threads_make_the_first_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they have seen of the weights is one and the same: either message still knows its origin."""
    adapter, cache = make_adapter(True), make_cache(SHARER, 1, 4)
    with torch.no_grad():
        adapter.get_parameter("span_query").add_(1.0)  # not seen before
    weights = adapter._weights

    def slowly() -> Any:
        time.sleep(0.05)
        return weights()

    monkeypatch.setattr(adapter, "_weights", slowly)
    with ThreadPoolExecutor(2) as pool:
        states = list(pool.map(lambda _: adapter._state(), range(2)))
    assert states[0] is states[1]
    with ThreadPoolExecutor(2) as pool:
        messages = list(pool.map(lambda _: adapter.summarize(cache), range(2)))
    assert messages[0].origin == messages[1].origin == adapter.origin
