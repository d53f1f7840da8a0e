"""A call of an adapter as a CUDA graph: recorded once over the very tensors it is given, then run again at one launch.

For loops whose sizes do not change, such as a server's fixed batches: write new caches into the same tensors, replay,
read the same result. On the host a replay costs the driver's launch and nothing of this package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, ClassVar

import torch
from torch import Tensor

from .caches import cache_layers, is_cache
from .errors import BackendError, GeometryError, LCFError, SpanError
from .identity import HasOrigin
from .message import Message
from .spans import Spans

__all__ = ["Captured", "Captures"]

#: The kind of device that records graphs.
_GRAPHS = "cuda"


class Captured:
    """A recorded call. Made by ``adapter.capture``.

    It holds on to every tensor that the recording reads or writes, so these may be written to but not be exchanged for
    others. Gates, kept layers and positions are as they were; parameters may change in place.

    Attributes:
        result: what the call returns, on tensors that each replay writes anew; of an operation in place the cache that
            it edits. Undefined until the first replay. Clone what must outlast the next one, and let a model go on
            from a copy: a DynamicCache that grows holds other tensors from then on.
    """

    def __init__(self, replay: Callable[[], None], result: Any, kept: Sequence[Any]) -> None:
        self._replay, self._kept, self.result = replay, kept, result

    def replay(self) -> Any:
        """Run it on what the tensors now hold, on the current stream and without waiting for it; returns `result`."""
        self._replay()
        return self.result


class Captures(HasOrigin):
    """What records the calls of an adapter; ``_captured`` names them."""

    _captured: ClassVar[tuple[str, ...]]
    training: bool

    def capture(self, operation: str, /, *args: Any, **kwargs: Any) -> Captured:
        """Record a call of an operation as a CUDA graph; see `Captured`.

        Nothing is edited: the caches of an operation in place are set back after it has been warmed up. Spans, weights
        and other small arguments that lie on the host are copied to the GPU first, and stay as they are.

        Args:
            operation: ``"fuse"``, ``"fuse_"``, ``"inject"``, ``"inject_"`` or ``"summarize"``; of slots
                ``"summarize"``, ``"expand"`` or ``"place"``.
            args, kwargs: as the operation takes them; caches and messages on the adapter's GPU. A StaticCache needs a
                mask or an index, since its own length is not read in a recording.

        Raises:
            GeometryError: another operation. BackendError: an adapter in training mode or not on a CUDA GPU; a call
                that waits for the device. SpanError: ``Spans`` with gaps. And what the operation raises.
        """
        device = self._check_capture(operation)
        call: Callable[..., Any] = getattr(self, operation)
        with torch.no_grad(), _as_it_was(operation, args, kwargs):
            call(*args, **kwargs)  # everything is checked as it lies, on the host too
            here = [_on_device(value, device) for value in args]
            named = {name: _on_device(value, device, name) for name, value in kwargs.items()}
            replay, result = _recorded(lambda: call(*here, **named), device)
        kept = [*_tensors(here), *_tensors(named), *self._weights().values()]
        return Captured(replay, result, [self, here, named, kept])

    def _check_capture(self, operation: str) -> torch.device:
        if operation not in self._captured:
            raise GeometryError("operation", expected=f"one of {', '.join(self._captured)}", got=repr(operation))
        if self.training:
            expected = "an adapter in eval mode (a recording would draw the same noise for ever)"
            raise BackendError("adapter", expected=expected, got="training mode")
        device = next(iter(self._weights().values())).device
        if device.type != _GRAPHS:
            raise BackendError("adapter", expected="one on a CUDA GPU, which records graphs", got=f"one on {device}")
        return device


def _recorded(run: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
    """Warm up on a side stream, then record."""
    with torch.cuda.device(device):
        return _recorded_here(run)


def _recorded_here(run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    stream, before = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(before)
    try:
        with torch.cuda.stream(stream):
            run()  # compiles
            mode = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("error")  # what waits for the device is found before it spoils a recording
            try:
                with _as_a_typed_error():
                    run()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
    finally:
        before.wait_stream(stream)  # after a failure, too: a cache is set back after what the warm-up wrote
    graph = torch.cuda.CUDAGraph()
    with _as_a_typed_error(), recording(graph):
        result = run()
    return graph.replay, result


@contextmanager
def recording(graph: torch.cuda.CUDAGraph, pool: Any = None) -> Iterator[None]:
    """`torch.cuda.graph` that leaves a usable device behind where the recording fails.

    torch then leaves its stream as the current one, an allocator that waits for the recording's end and may refuse the
    next one, and generators that take the next random number for part of a recording.
    """
    stream = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, pool=pool):
            yield
    except Exception:
        torch.cuda.set_stream(stream)
        end = getattr(torch._C, "_cuda_endAllocateToPool", None)  # torch's own, without a promise
        for last in (
            lambda: end and end(torch.cuda.current_device(), graph.pool() if pool is None else pool),
            torch.cuda.synchronize,
            _record_nothing,  # from begin to end, as generators are to see it
        ):
            with suppress(RuntimeError):  # that there is nothing to end
                last()
        raise


def _record_nothing() -> None:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device=torch.cuda.current_device())


@contextmanager
def _as_a_typed_error() -> Iterator[None]:
    """torch's complaint of a call that waits for the device."""
    try:
        yield
    except (LCFError, torch.cuda.OutOfMemoryError):
        raise
    except RuntimeError as error:
        said = (str(error).strip().splitlines() or [""])[0]
        expected = "a call that does not wait for the device (a StaticCache needs a mask or an index)"
        raise BackendError("operation", expected=expected, got=said) from error


@contextmanager
def _as_it_was(operation: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[None]:
    """Set the cache of an operation in place back to what it held; that of the others is not touched."""
    if not operation.endswith("_"):
        yield
        return
    at = 1 if operation == "fuse_" else 0
    cache = kwargs.get("receiver_cache", args[at] if len(args) > at else None)
    mask = kwargs.get("attention_mask")
    length = mask.shape[1] if isinstance(mask, Tensor) and mask.dim() == 2 else None
    layers = cache_layers(cache, name="receiver_cache", length=length)
    saved = [(key.clone(), value.clone()) for key, value in layers]
    try:
        yield
    finally:
        for (key, value), (old_key, old_value) in zip(layers, saved):
            key.copy_(old_key)
            value.copy_(old_value)


def _on_device(value: Any, device: torch.device, name: str = "") -> Any:
    """Small arguments from the host: a recording cannot copy them. Caches, messages and ranges stay as they are."""
    if isinstance(value, Spans):
        if value.is_span is not None:
            expected = "Spans without gaps, or a (B, P+1) tensor of offsets, to be recorded"
            raise SpanError("spans", expected=expected, got="Spans with tokens between them")
        value = value.offsets if value.tracks > 1 else value.offsets[:, 0]
    if isinstance(value, Tensor):
        return value.to(device)
    if name == "weights" and value is not None:
        return torch.as_tensor(value, dtype=torch.float32, device=device)
    if isinstance(value, list) and value and all(_are_offsets(row) for row in value):
        widest = max(map(len, value))
        return torch.tensor([[*row, *[row[-1]] * (widest - len(row))] for row in value], device=device)
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those of arguments. Of a cache what it holds now: one that grows lets go of it."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Message):
        yield from value.tensors.values()
    elif is_cache(value):
        for layer in value.layers:
            yield from (layer.keys, layer.values)
    elif isinstance(value, (list, tuple, dict)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors(one)


def _are_offsets(row: Any) -> bool:
    return isinstance(row, (list, tuple)) and all(type(offset) is int for offset in row)
