"""Typed errors: which argument, what was expected, what came.

Every error that this package raises on bad input is an :class:`LCFError` and also the built-in error that a
caller would expect (``ValueError``, ``TypeError``, ...), raised before anything is written or launched.
"""

from __future__ import annotations

__all__ = [
    "BackendError",
    "CheckpointError",
    "DTypeError",
    "DeviceError",
    "GeometryError",
    "IndexRangeError",
    "LCFError",
    "MessageError",
    "ShapeError",
    "SpanError",
]


class LCFError(Exception):
    """Base of all errors of this package.

    Args:
        argument: name of the argument (or field, or file) that is wrong, as the caller knows it.
        expected: what would have been right.
        got: what came.
    """

    def __init__(self, argument: str, *, expected: str, got: str) -> None:
        super().__init__(f"{argument}: expected {expected}, got {got}")
        self.argument = argument
        self.expected = expected
        self.got = got

    def __reduce__(self) -> tuple[object, ...]:
        # The default would call the class with the finished text alone, which keyword-only arguments refuse:
        # an error could then not come back from a worker process.
        return _rebuild, (type(self), self.argument, self.expected, self.got)


def _rebuild(kind: type[LCFError], argument: str, expected: str, got: str) -> LCFError:
    return kind(argument, expected=expected, got=got)


class ShapeError(LCFError, ValueError):
    """A tensor has the wrong number of dimensions or the wrong size."""


class DTypeError(LCFError, TypeError):
    """A tensor has the wrong dtype, or an argument the wrong type."""


class DeviceError(LCFError, ValueError):
    """A tensor lies on another device than the rest, or there is no such device."""


class GeometryError(LCFError, ValueError):
    """A model, cache or configuration does not have the geometry (layers, KV heads, head dim) needed."""


class SpanError(LCFError, ValueError):
    """Span offsets decrease, leave the sequence, or hold no token at all."""


class IndexRangeError(LCFError, ValueError, IndexError):
    """An index or a range of positions leaves what it indexes."""


class BackendError(LCFError, RuntimeError):
    """A back end that was asked for by name cannot serve the call."""


class CheckpointError(LCFError, ValueError):
    """An adapter folder is missing, damaged, or written in a form that this version does not know."""


class MessageError(LCFError, ValueError):
    """A message is damaged, of an unknown form, not for this adapter, or lacks what was asked of it."""
