"""Whether tensors share memory: against the addresses of all their elements."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from lcf_fast.layouts import Layers, has_own_elements
from lcf_fast.overlaps import first_met, first_shared, share_memory

SHAPE = (2, 2, 5, 4)  # (B, H, N, D)


def elements(tensor: Tensor) -> list[int]:
    """The address of each element."""
    steps = product(*[[stride * i for i in range(size)] for size, stride in zip(tensor.shape, tensor.stride())])
    return [tensor.data_ptr() + tensor.itemsize * sum(step) for step in steps]


def truly_shared(tensors: list[Tensor]) -> list[tuple[int, int]]:
    """All pairs of tensors with an element in common."""
    found = [{*elements(tensor)} for tensor in tensors]
    return [(i, j) for j in range(len(tensors)) for i in range(j) if found[i] & found[j]]


def whole(*shape: int) -> Tensor:
    return torch.zeros(shape)


CASES: dict[str, Callable[[], list[Tensor]]] = {
    "apart": lambda: [whole(*SHAPE) for _ in range(4)],
    "in one buffer": lambda: list(whole(4, *SHAPE).unbind(0)),
    "slots of a StaticCache": lambda: [whole(2, 2, 9, 4)[:, :, 2:7] for _ in range(4)],
    "key and value interleaved": lambda: [*whole(2, 5, 2, 2, 4).permute(2, 0, 3, 1, 4)],
    "layers, keys and values interleaved": lambda: [*whole(2, 5, 2, 3, 2, 4).permute(2, 3, 0, 4, 1, 5).flatten(0, 1)],
    "layers beside each other in a head": lambda: [*whole(2, 2, 5, 4, 4).permute(3, 0, 1, 2, 4)],
    "pages": lambda: [*whole(2, 2, 10, 4).unflatten(2, (2, 5)).permute(2, 0, 1, 3, 4)],
    "one twice": lambda: [whole(*SHAPE)] * 2,
    "tokens that overlap": lambda: [(b := whole(2, 2, 9, 4))[:, :, :5], b[:, :, 4:]],
    "heads that overlap": lambda: [(b := whole(2, 3, 5, 4))[:, :2], b[:, 1:]],
    "rows that overlap": lambda: [(b := whole(3, 2, 5, 4))[:2], b[1:]],
    "channels that overlap": lambda: [(b := whole(2, 2, 5, 6))[..., :4], b[..., 2:]],
    "interleaved, shifted by a head": lambda: [(b := whole(2, 5, 4, 4).transpose(1, 2))[:, :2], b[:, 1:3]],
    "the last overlaps the first": lambda: [(b := whole(2, 2, 9, 4))[:, :, :5], whole(*SHAPE), b[:, :, 4:]],
    "an end in another's last element": lambda: [(b := whole(159))[:80].view(SHAPE), b[79:].view(SHAPE)],
    "none": lambda: [whole(2, 2, 0, 4)] * 2,
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_first_two_that_share_an_element(name: str) -> None:
    tensors = CASES[name]()
    expected = truly_shared(tensors)
    assert first_shared(Layers.of(tensors)) == (expected[0] if expected else None)
    assert share_memory(tensors[0], tensors[-1]) == ((0, len(tensors) - 1) in expected)
    half = len(tensors) // 2
    met = [(j - half, i) for i, j in expected if i < half <= j]
    assert first_met(Layers.of(tensors[:half]), Layers.of(tensors[half:])) == min(met, default=None)


def test_slices_of_a_buffer_at_random() -> None:
    """Of different strides, too."""
    rng = random.Random(7)
    outcomes = []
    for _ in range(400):
        buffer = torch.zeros([rng.choice([3, 4, 6]) for _ in range(4)])
        tensors = []
        for _ in range(2):
            axes = rng.sample(range(4), 4)
            steps = [rng.choice([1, 2]) for _ in range(4)]
            starts = [rng.randrange(size - step) for size, step in zip(buffer.shape, steps)]
            cut = [slice(start, start + step + 1, step) for start, step in zip(starts, steps)]
            tensors.append(buffer[tuple(cut)].permute(axes))
        assert [tuple(tensor.shape) for tensor in tensors] == [(2, 2, 2, 2)] * 2
        outcomes.append(bool(truly_shared(tensors)))
        assert share_memory(*tensors) == outcomes[-1]
        assert all(has_own_elements(tensor.shape, tensor.stride()) for tensor in tensors)
    assert 40 < sum(outcomes) < 360


def test_two_sides_at_random() -> None:
    """Of different shapes, strides and dtypes."""
    rng = random.Random(9)
    outcomes = []
    for _ in range(400):
        buffer = torch.zeros([rng.choice([2, 3, 4]) for _ in range(4)])
        sides: list[list[Tensor]] = []
        for dtype in (torch.float32, rng.choice([torch.float32, torch.float16])):
            shape = [rng.randint(0 if rng.random() < 0.05 else 1, size) for size in buffer.shape]
            axes = rng.sample(range(4), 4)
            side = []
            for _ in range(2):
                starts = [rng.randint(0, size - length) for size, length in zip(buffer.shape, shape)]
                cut = tuple(slice(start, start + length) for start, length in zip(starts, shape))
                side.append(buffer.view(dtype)[cut].permute(axes))
            sides.append(side)
        expected = [
            (i, j)
            for (i, other), (j, own) in product(enumerate(sides[1]), enumerate(sides[0]))
            if {*bytes_of(other)} & {*bytes_of(own)}
        ]
        outcomes.append(bool(expected))
        for _ in range(2):
            assert first_met(*map(Layers.of, sides)) == min(expected, default=None)
    assert 100 < sum(outcomes) < 300


def bytes_of(tensor: Tensor) -> list[int]:
    return [address + i for address in elements(tensor) for i in range(tensor.itemsize)]


def test_sides_that_were_found_apart_once_are_looked_at_again_where_one_has_moved() -> None:
    buffer = whole(3, 2, 5, 4)
    own, other = Layers.of([buffer[:2]]), Layers.of([whole(*SHAPE)])
    for _ in range(2):
        assert first_met(own, other) is None
    assert first_met(own, Layers([buffer[1:]], other.layout)) == (0, 0)
    assert first_met(own, other) is None


def test_what_was_found_apart_once_is_looked_at_again_where_it_has_moved() -> None:
    buffer = whole(3, 2, 5, 4)
    layers = Layers.of([buffer[:2], whole(*SHAPE)])
    for _ in range(2):
        assert first_shared(layers) is None
    moved = Layers([buffer[:2], buffer[1:]], layers.layout)
    for _ in range(2):
        assert first_shared(moved) == (0, 1)


def test_what_was_found_apart_once_is_looked_at_again_where_it_has_grown() -> None:
    """At the same addresses, as views of a StaticCache that fills."""
    buffer = whole(2, 2, 9, 4)
    short, grown = ([buffer[:, :, :size], buffer[:, :, 4 : 4 + size]] for size in (4, 5))
    assert first_shared(Layers.of(short)) is None
    assert first_shared(Layers.of(grown)) == (0, 1)
    first, second = ([Layers.of([view]) for view in views] for views in zip(short, grown))
    assert first_met(first[0], second[0]) is None
    assert first_met(first[1], second[0]) == (0, 0)
    assert first_met(second[0], first[0]) is None
    assert first_met(second[0], first[1]) == (0, 0)


@pytest.mark.parametrize(
    ("size", "stride", "expected"),
    [
        ((2, 3), (3, 1), True),
        ((2, 3), (4, 1), True),
        ((3, 2), (1, 3), True),
        ((2, 3), (2, 1), False),  # windows
        ((2, 3), (0, 1), False),  # expanded
        ((1, 3), (0, 1), True),
        ((2, 0), (0, 1), True),
        ((2, 2), (1, 1), False),
    ],
)
def test_elements_of_one_tensor(size: tuple[int, ...], stride: tuple[int, ...], expected: bool) -> None:
    tensor = torch.zeros(20).as_strided(size, stride)
    assert has_own_elements(tensor.shape, tensor.stride()) is expected
    assert expected == (len({*elements(tensor)}) == len(elements(tensor)))
