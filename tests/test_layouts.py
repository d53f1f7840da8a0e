"""What is remembered of lists of tensors: found again for the same looks only, and holding none of the tensors."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lcf_fast import layouts
from lcf_fast.layouts import KnownLayouts, Layers, Layout

SHAPE = (1, 2, 5, 8)


def make(count: int = 4) -> list[Tensor]:
    return [torch.randn(SHAPE) for _ in range(count)]


class Subclass(Tensor):
    pass


def test_the_same_looks_are_found() -> None:
    known: KnownLayouts[str] = KnownLayouts()
    tensors = make()
    assert known.find(tensors) is None
    known.remember("seen", tensors)
    assert known.find(tensors) == "seen"
    assert known.find(make()) == "seen"
    assert known.find(make(), "another context") is None
    assert known.find(make(5)) is None
    assert known.find([]) is None


@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.half(),
        lambda t: torch.randn(1, 2, 6, 8),
        lambda t: torch.randn(1, 5, 2, 8).transpose(1, 2),
        lambda t: t.clone().requires_grad_(),
        lambda t: t.as_subclass(Subclass),
        lambda t: t.to("meta"),
        lambda t: None,
        lambda t: nn.Parameter(t, requires_grad=False),
    ],
    ids=["dtype", "shape", "strides", "gradient", "subclass", "device", "no tensor", "parameter"],
)
def test_other_looks_anywhere_are_not(change: Callable[[Tensor], Tensor], at: int) -> None:
    known: KnownLayouts[str] = KnownLayouts()
    tensors = make()
    known.remember("seen", tensors)
    tensors[at] = change(tensors[at])
    assert known.find(tensors) is None


def test_a_tensor_that_is_there_twice_is_not_remembered() -> None:
    """The guards would refuse it at every call; callers give each once."""
    known: KnownLayouts[str] = KnownLayouts()
    one, other = make(2)
    known.remember("seen", [one, other, one])
    assert known.find([one, other, one]) is None


def test_what_comes_once_may_be_left_alone() -> None:
    known: KnownLayouts[str] = KnownLayouts(only_again=True)
    for found in (None, None, "seen"):
        assert known.find(make()) == found
        known.remember("seen", make())
    known.remember("other", make(5))
    assert known.find(make(5)) is None


def test_it_holds_no_tensor_and_no_more_entries_than_it_may() -> None:
    known: KnownLayouts[int] = KnownLayouts(3)
    for tokens in range(1, 6):
        known.remember(tokens, [torch.randn(1, 2, tokens, 8)])
    found = [known.find([torch.randn(1, 2, tokens, 8)]) for tokens in range(1, 6)]
    assert found == [None, None, 3, 4, 5]
    tensors = make()
    known.remember(0, tensors)
    alive = [weakref.ref(tensor) for tensor in tensors]
    del tensors
    gc.collect()
    assert not any(reference() is not None for reference in alive)


def test_tensors_of_inference_mode_are_apart() -> None:
    known: KnownLayouts[str] = KnownLayouts()
    known.remember("seen", make())
    with torch.inference_mode():
        assert known.find(make()) is None
        known.remember("there", make())
        assert known.find(make()) == "there"
    assert known.find(make()) == "seen"


def test_a_layout_says_what_a_launch_needs() -> None:
    plain, strided = torch.randn(SHAPE), torch.randn(1, 2, 5, 16)[..., ::2]
    assert Layout.of([plain, plain]).has_unit_rows
    assert not Layout.of([plain, strided]).has_unit_rows
    assert Layout.of([plain, plain]).first_unwritable is None
    assert Layout.of([plain, strided]).first_unwritable == 1
    assert Layout.of([plain[:1].expand(3, -1, -1, -1), plain]).first_unwritable == 0
    assert Layers.of([plain, strided]).addresses == [plain.data_ptr(), strided.data_ptr()]


def test_a_torch_without_the_guards_looks_anew_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "_TensorGuards", None)
    known: KnownLayouts[str] = KnownLayouts()
    tensors = [torch.zeros(2)]
    known.remember("seen", tensors)
    assert known.find(tensors) is None
