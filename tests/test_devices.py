"""Which device a name stands for, and that one which is not here is a typed error."""

from __future__ import annotations

import pytest
import torch

from lcf_fast.devices import chosen_device
from lcf_fast.errors import DeviceError


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
