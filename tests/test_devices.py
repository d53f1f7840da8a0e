"""Which device a name stands for, and that one which is not here is a typed error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapters import RECEIVER, SHARER, make_adapter, make_caches

from lcf_fast import LatentSlots, LCFConfig, Message
from lcf_fast.devices import chosen_device
from lcf_fast.errors import DeviceError
from lcf_fast.slot_spans import summarize_spans
from lcf_fast.spans import Spans, paragraphs, turns, windows


def gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("LOCAL_RANK", raising=False)


@pytest.mark.parametrize(
    ("count", "rank", "name", "expected"),
    [
        (0, None, None, "cpu"),
        (0, None, "cpu", "cpu"),
        (1, None, None, "cuda:0"),
        (1, None, "cuda", "cuda:0"),
        (1, None, "cpu", "cpu"),
        (2, "1", None, "cuda:1"),
        (2, "1", "cuda:0", "cuda:0"),
    ],
)
def test_a_gpu_has_its_index(
    count: int, rank: str | None, name: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, count)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert str(chosen_device(name)) == expected


@pytest.mark.parametrize(
    ("count", "rank", "name", "expected"),
    [
        (0, None, "foo", "a name such as cpu or cuda:0, got 'foo'"),
        (0, None, "meta", "a device that this machine has, got 'meta'"),
        (0, None, "hpu", "a device that this machine has, got 'hpu'"),
        (0, None, "cuda", "cpu, as there is no CUDA GPU here, got 'cuda'"),
        (0, None, "cuda:7", "cpu, as there is no CUDA GPU here, got 'cuda:7'"),
        (1, None, "cuda:7", "a GPU that is there: cuda:0, the only one, got cuda:7"),
        (2, None, "cuda:2", "a GPU that is there: cuda:0 to cuda:1, got cuda:2"),
        (2, "2", "cuda", "a GPU that is there: cuda:0 to cuda:1, got cuda:2"),  # more processes than GPUs
    ],
)
def test_what_is_not_here(
    count: int, rank: str | None, name: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, count)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.raises(DeviceError) as caught:
        chosen_device(name)
    assert str(caught.value) == f"--device: expected {expected}"


def _calls() -> dict[str, Callable[[], Any]]:
    """What makes tensors of its own, on caches that lie on the CPU."""
    adapter, crossing = make_adapter(), make_adapter(True)
    by_span = LatentSlots(LCFConfig(SHARER, RECEIVER, bottleneck=64, slots=1, per_span=True)).eval()
    sharer, receiver = make_caches(batch=1)
    mask, index = torch.tensor([[0, 1, 1, 1, 1, 1, 1]]), torch.tensor([[-1, 0, 1, 2, 3, 4, 5]])
    apart = Spans.given([[(0, 3), (5, 7)]])
    return {
        "masks": lambda: adapter.fuse(sharer, receiver, attention_mask=mask),
        "indices": lambda: adapter.fuse(sharer, receiver, sharer_index=index, sharer_attention_mask=mask),
        "lists": lambda: crossing.summarize(sharer, [[0, 3, 7]], attention_mask=mask),
        "windows": lambda: crossing.summarize(sharer, windows(mask, 4, 1), span_weights=True),
        "gaps": lambda: crossing.summarize(sharer, apart),
        "pieces": lambda: apart.piece(1, 6, trim=True).bounds(),
        "offsets": lambda: Spans.given([[0, 3, 7]]).bounds(),
        "turns": lambda: turns([[1, 2, 3, 1, 4]], 1).bounds(),
        "text": lambda: paragraphs("ab\n\ncd", [(0, 2), (2, 4), (4, 6)]).bounds(),
        "growing": lambda: crossing.begin().extend(sharer, [[0, 7]], open=True).extend(sharer).finish(),
        "pools": lambda: crossing.finish(crossing.merge([crossing.pool(sharer), crossing.pool(sharer, [[0, 7]])])),
        "slots": lambda: by_span.summarize(sharer, [[0, 4, 7]]),
        "ragged": lambda: summarize_spans(by_span, sharer, apart),
    }


def test_nothing_follows_torchs_default_device() -> None:
    for call in _calls().values():
        with torch.no_grad():
            expected = call()
            with torch.device("meta"):
                made = call()
        for mine, other in zip(_tensors(made), _tensors(expected), strict=True):
            assert torch.equal(mine, other)


def _tensors(made: Any) -> list[torch.Tensor]:
    if isinstance(made, Message):
        return [*made.tensors.values()]
    if isinstance(made, (list, tuple)):
        return [tensor for part in made for tensor in _tensors(part)]
    return [made if isinstance(made, torch.Tensor) else torch.tensor(made)]
