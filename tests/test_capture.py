"""`adapter.capture` without a GPU: what it refuses; with recording stood in for, what it hands over and leaves alone.

The recording itself is tested on a GPU (tests/gpu/test_capture.py).
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adapters import assert_equal, cloned, make_adapter, make_caches
from tiny_slots import family_model, slots_adapter
from torch import Tensor

from lcf_fast import BackendError, GeometryError, LCFError, Message, ShapeError, SpanError, Spans, capture
from lcf_fast.capture import Captured

CPU = torch.device("cpu")
#: Calls that the stand-in makes.
WARM_UP = 2


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A CPU that records: the call is made as often as a GPU's recording makes it, and again by each replay."""
    calls: list[Any] = []

    def recorded(run: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
        found: list[Any] = []

        def once() -> None:
            found.append(run())

        assert not torch.is_grad_enabled()
        for _ in range(WARM_UP):
            once()
        calls.append(device)
        return once, found[-1]

    monkeypatch.setattr(capture, "_GRAPHS", "cpu")
    monkeypatch.setattr(capture, "_recorded", recorded)
    return calls


# --- what is refused


@pytest.mark.parametrize("operation", ["fuse", "fuse_", "inject", "inject_", "summarize"])
def test_a_cpu_records_nothing(operation: str) -> None:
    adapter = make_adapter(operation not in ("fuse", "fuse_"))
    with pytest.raises(BackendError, match="CUDA GPU") as error:
        adapter.capture(operation, *make_caches())
    assert (error.value.argument, error.value.got) == ("adapter", "one on cpu")


def test_slots_on_a_cpu_record_nothing() -> None:
    sharer, receiver = family_model("qwen2", 1), family_model("qwen3", 2)
    adapter = slots_adapter(sharer, receiver)
    for operation in ("summarize", "expand", "place"):
        with pytest.raises(BackendError, match="CUDA GPU"):
            adapter.capture(operation, None)


@pytest.mark.parametrize("operation", ["append", "prune", "train", "_fuse", "capture", ""])
def test_other_operations_are_refused(operation: str) -> None:
    for adapter in (make_adapter(), slots_adapter(family_model("qwen2", 1), family_model("qwen3", 2))):
        with pytest.raises(GeometryError) as error:
            adapter.capture(operation)
        assert error.value.argument == "operation" and "summarize" in error.value.expected


def test_training_mode_is_refused(recorder: list[Any]) -> None:
    sharer, receiver = make_caches()
    with pytest.raises(BackendError, match="training mode"):
        make_adapter().train().capture("fuse", sharer, receiver)
    assert not recorder


def test_what_the_operation_refuses_is_refused_before_anything_is_written(recorder: list[Any]) -> None:
    sharer, receiver = make_caches()
    before = cloned(receiver)
    wrong: list[tuple[str, tuple[Any, ...], dict[str, Any], type[LCFError]]] = [
        ("fuse_", (make_caches(length=6)[0], receiver), {}, ShapeError),
        ("fuse_", (sharer, receiver), {"attention_mask": torch.ones(2, 9)}, ShapeError),
        ("inject_", (receiver, None), {}, GeometryError),
    ]
    for operation, args, kwargs, kind in wrong:
        with pytest.raises(kind):
            make_adapter().capture(operation, *args, **kwargs)
    with pytest.raises(TypeError):
        make_adapter().capture("fuse", sharer)
    with pytest.raises(LCFError):
        make_adapter().capture("fuse_", sharer)
    assert_equal(receiver, before)
    assert not recorder


def test_spans_with_gaps_are_refused(recorder: list[Any]) -> None:
    sharer = make_caches(sharer_length=9)[0]
    gaps = Spans.given([[[0, 3], [5, 9]], [[0, 3], [5, 9]]])
    assert gaps.is_span is not None
    with pytest.raises(SpanError, match="without gaps"):
        make_adapter(True).capture("summarize", sharer, gaps)


class Fake:
    """Stands in for torch.cuda where a recording needs a stream and a graph."""

    OutOfMemoryError = torch.cuda.OutOfMemoryError

    def __init__(self) -> None:
        self.mode: Any = 0
        self.replayed = self.waits = 0
        self.Stream = self.CUDAGraph = lambda: self
        self.stream = self.graph = lambda *_, **__: nullcontext()
        self.devices: list[Any] = []
        self.current_stream = lambda: self
        self.set_stream = self.synchronize = lambda *_: None
        self.current_device = lambda: "cpu"
        self.pool = lambda: (0, 1)
        self.get_sync_debug_mode = lambda: self.mode

    def device(self, device: Any) -> Any:
        self.devices.append(device)
        return nullcontext()

    def wait_stream(self, other: Any) -> None:
        self.waits += 1

    def set_sync_debug_mode(self, mode: Any) -> None:
        self.mode = mode

    def replay(self) -> None:
        self.replayed += 1


@pytest.mark.parametrize("waits_at", [2, 3])
def test_what_waits_for_the_device_is_a_typed_error_and_the_mode_is_set_back(
    monkeypatch: pytest.MonkeyPatch, waits_at: int
) -> None:
    """Found in the second warm-up; and in the recording, should torch find it only there."""
    fake = Fake()
    seen: list[Any] = []
    monkeypatch.setattr(capture.torch, "cuda", fake)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *_: None, raising=False)  # torch with CUDA

    def run() -> int:
        seen.append(fake.mode)
        if len(seen) == waits_at:
            raise RuntimeError("called a synchronizing CUDA operation\nmore")
        return 7

    with pytest.raises(BackendError, match=r"got called a synchronizing CUDA operation$") as error:
        capture._recorded(run, CPU)
    assert error.value.argument == "operation" and "mask" in error.value.expected
    assert seen == [0, "error", 0][:waits_at] and fake.mode == 0 and fake.devices == [CPU]
    assert fake.waits == 2  # the current stream goes on behind the warm-up, which may have edited what is set back
    for kind in (ShapeError("x", expected="a", got="b"), torch.cuda.OutOfMemoryError("no")):
        with pytest.raises(type(kind)), capture._as_a_typed_error():
            raise kind
    seen.clear()
    waits_at = 9
    replay, result = capture._recorded(run, CPU)
    replay()
    assert (result, fake.replayed, seen) == (7, 1, [0, "error", 0])


@pytest.mark.parametrize("own_pool", [True, False])
def test_a_recording_that_fails_leaves_torch_as_it_was(monkeypatch: pytest.MonkeyPatch, own_pool: bool) -> None:
    """torch keeps the recording's stream, an allocator that waits for its end, and generators within it until another
    recording ends."""
    done: list[Any] = []

    class Fails:
        def __init__(self, _: Any, pool: Any = None) -> None:
            self.pool = pool

        def __enter__(self) -> None:
            done.append(("begun", self.pool))

        def __exit__(self, *_: Any) -> None:
            raise RuntimeError("operation failed due to a previous error during capture")

    def end(*given: Any) -> None:
        done.append(given)
        if not own_pool:
            raise RuntimeError("nothing to end")

    graph, pool = SimpleNamespace(pool=lambda: (0, 9)), None if own_pool else (0, 7)
    fakes = {
        "current_stream": lambda: "before", "graph": Fails, "set_stream": done.append,
        "current_device": lambda: 0, "synchronize": lambda: done.append("synchronized"), "CUDAGraph": lambda: None,
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: done.append(f"zeros on {device}"))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    with pytest.raises(RuntimeError, match="previous error"), capture.recording(graph, pool):  # type: ignore[arg-type]
        done.append("ran")
    ended = (0, (0, 9) if own_pool else (0, 7))
    begun = ("begun", pool)
    assert done == [begun, "ran", "before", ended, "synchronized", ("begun", None), "zeros on 0"]


# --- what is recorded


def latent_of(message: Message) -> Tensor:
    assert message.latent is not None
    return message.latent


def refill(cache: list[tuple[Tensor, Tensor]]) -> None:
    for key, value in cache:
        key.normal_()
        value.normal_()


def test_fuse_runs_again_on_what_the_tensors_then_hold(recorder: list[Any]) -> None:
    adapter = make_adapter()
    sharer, receiver = make_caches()
    captured = adapter.capture("fuse", sharer, receiver, positions=(1, 6))
    assert isinstance(captured, Captured) and recorder == [CPU]
    for cache in (sharer, receiver):
        refill(cache)
    seen: list[Any] = []
    captured._replay = lambda: seen.append(adapter.fuse(sharer, receiver, positions=(1, 6)))
    assert captured.replay() is captured.result and len(seen) == 1


@pytest.mark.parametrize("by_name", [False, True])
def test_an_operation_in_place_leaves_its_cache_until_it_is_replayed(recorder: list[Any], by_name: bool) -> None:
    sharer, receiver = make_caches()
    crossing = make_adapter(True)
    message = crossing.summarize(make_caches(sharer_length=9)[0], None)
    for adapter, operation, first in ((make_adapter(), "fuse_", sharer), (crossing, "inject_", message)):
        before = cloned(receiver)
        expected = getattr(adapter, operation[:-1])(*((first, receiver) if operation == "fuse_" else (receiver, first)))
        named = {"receiver_cache": receiver, ("sharer_cache" if operation == "fuse_" else "message"): first}
        args = (first, receiver) if operation == "fuse_" else (receiver, first)
        captured = adapter.capture(operation, **named) if by_name else adapter.capture(operation, *args)
        assert_equal(receiver, before)
        assert captured.replay() is receiver
        assert_equal(receiver, expected)


def test_a_call_that_fails_when_it_is_recorded_leaves_the_cache(
    monkeypatch: pytest.MonkeyPatch, recorder: list[Any]
) -> None:
    def fails(run: Callable[[], Any], device: torch.device) -> Any:
        run()
        raise BackendError("operation", expected="a call that does not wait for the device", got="one that does")

    monkeypatch.setattr(capture, "_recorded", fails)
    sharer, receiver = make_caches()
    before = cloned(receiver)
    with pytest.raises(BackendError, match="one that does"):
        make_adapter().capture("fuse_", sharer, receiver)
    assert_equal(receiver, before)


def test_what_lies_on_the_host_goes_to_the_device_once(monkeypatch: pytest.MonkeyPatch, recorder: list[Any]) -> None:
    adapter = make_adapter(True)
    sharer, receiver = make_caches(sharer_length=9)
    given: list[tuple[Any, dict[str, Any]]] = []
    right = adapter.summarize

    def summarize(cache: Any, spans: Any = None, **more: Any) -> Any:
        given.append((spans, more))
        return right(cache, spans, **more)

    monkeypatch.setattr(adapter, "summarize", summarize)
    mask = torch.ones(2, 9, dtype=torch.long)
    want = latent_of(right(sharer, [[0, 4, 9], [0, 9]], attention_mask=mask))
    captured = adapter.capture("summarize", sharer, [[0, 4, 9], [0, 9]], attention_mask=mask)
    assert isinstance(given[0][0], list) and len(given) == 1 + WARM_UP
    for spans, more in given[1:]:
        assert spans.tolist() == [[0, 4, 9], [0, 9, 9]] and spans.device == CPU
        assert more["attention_mask"].device == CPU
    assert torch.equal(captured.result.latent, want)
    overlapping = Spans.given([[[0, 5], [3, 9]], [[0, 5], [3, 9]]])
    plain = Spans.given([[0, 4, 9], [0, 4, 9]])
    for spans in (overlapping, plain):
        given.clear()
        found = adapter.capture("summarize", sharer, spans).result
        assert all(isinstance(one, Tensor) for one, _ in given[1:])
        assert torch.equal(latent_of(found), latent_of(right(sharer, spans)))
    several = [right(sharer, None), right(sharer, plain)]
    inject, weighing = adapter.inject, []

    def injected(*args: Any, weights: Any) -> Any:
        weighing.append(type(weights))
        return inject(*args, weights=weights)

    monkeypatch.setattr(adapter, "inject", injected)
    weighed = adapter.capture("inject", receiver, several, weights=[1.0, 0.5]).result
    assert_equal(weighed, inject(receiver, several, weights=[1.0, 0.5]))
    assert weighing == [list] + [Tensor] * WARM_UP


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attention_mask", torch.ones(1, 9)),
        ("spans", Spans.given([[[0, 4], [4, 9]]])),
        ("spans", [[0, 4, 9]]),
        ("weights", [1.0, 0.5]),
    ],
    ids=["tensor", "Spans", "offsets", "weights"],
)
def test_where_what_lies_on_the_host_goes(name: str, value: Any) -> None:
    assert capture._on_device(value, torch.device("meta"), name).device.type == "meta"


def test_every_tensor_is_held(recorder: list[Any]) -> None:
    """A graph reads by address: what it reads must not be freed under it, though a cache grows and lets go of it."""
    transformers = pytest.importorskip("transformers")
    adapter, crossing = make_adapter(), make_adapter(True)
    sharer, receiver = make_caches()
    growing = transformers.DynamicCache()
    for layer, (key, value) in enumerate(receiver):
        growing.update(key, value, layer)
    own = [tensor for layer in growing.layers for tensor in (layer.keys, layer.values)]
    message = crossing.summarize(make_caches(sharer_length=9)[0], None)
    sent = message.tensors.values()
    spans = torch.tensor([[0, 4, 9], [0, 9, 9]])
    heard = make_caches(sharer_length=9)[0]
    for captured, wanted in (
        (adapter.capture("fuse_", sharer, receiver_cache=growing), [*flat(sharer), *own, *adapter.parameters()]),
        (crossing.capture("inject", receiver, message), [*flat(receiver), *sent, *crossing.parameters()]),
        (crossing.capture("summarize", heard, spans=spans), [*flat(heard), spans, *crossing.parameters()]),
    ):
        held = {tensor.data_ptr() for tensor in captured._kept[-1]}
        assert {tensor.data_ptr() for tensor in wanted} <= held
    growing.update(receiver[0][0], receiver[0][1], 0)
    assert growing.layers[0].keys.data_ptr() != own[0].data_ptr()


def flat(cache: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [tensor for pair in cache for tensor in pair]


def test_slots_are_made_and_placed(recorder: list[Any]) -> None:
    sharer, receiver = family_model("qwen2", 1), family_model("qwen3", 2)
    adapter = slots_adapter(sharer, receiver)
    with torch.no_grad():
        cache = sharer(torch.arange(12)[None] % 7, use_cache=True).past_key_values
        message = adapter.summarize(cache)
        positions = torch.arange(5, 5 + message.slots)[None]
        assert torch.equal(latent_of(adapter.capture("summarize", cache).result), latent_of(message))
        assert_equal(adapter.capture("expand", message).result, adapter.expand(message))
        placed = adapter.capture("place", receiver, message, positions)
        assert_equal(placed.result, adapter.place(receiver, message, positions))
    placed._replay = lambda: None  # a graph holds no Python object; the model's frequencies are read by address
    held = [weakref.ref(receiver), weakref.ref(adapter)]
    del receiver, adapter
    gc.collect()
    assert all(one() is not None for one in held)
