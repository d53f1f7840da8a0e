"""Typed errors: their text, their attributes, what they can be caught as."""

from __future__ import annotations

import pickle

import pytest

from lcf_fast import errors

KINDS = {
    "ShapeError": ValueError,
    "DTypeError": TypeError,
    "DeviceError": ValueError,
    "GeometryError": ValueError,
    "SpanError": ValueError,
    "MessageError": ValueError,
    "IndexRangeError": IndexError,
    "BackendError": RuntimeError,
    "CheckpointError": ValueError,
}


@pytest.mark.parametrize("name", KINDS)
def test_each_error_says_what_where_and_is_caught_as_the_builtin(name: str) -> None:
    kind = getattr(errors, name)
    error = kind("span_offsets", expected="(B, P+1) int", got="(2, 3) float32")
    assert str(error) == "span_offsets: expected (B, P+1) int, got (2, 3) float32"
    assert (error.argument, error.expected, error.got) == ("span_offsets", "(B, P+1) int", "(2, 3) float32")
    assert isinstance(error, errors.LCFError)
    assert isinstance(error, KINDS[name])


def test_index_range_error_is_also_a_value_error() -> None:
    assert issubclass(errors.IndexRangeError, ValueError)


def test_errors_survive_pickling() -> None:
    # As they must to come back from a worker process; keyword-only arguments break the default.
    error = pickle.loads(pickle.dumps(errors.ShapeError("key", expected="4 dims", got="3")))
    assert type(error) is errors.ShapeError
    assert (str(error), error.argument) == ("key: expected 4 dims, got 3", "key")


def test_every_error_is_public() -> None:
    import lcf_fast

    for name in (*KINDS, "LCFError"):
        assert getattr(lcf_fast, name) is getattr(errors, name)
        assert name in errors.__all__
