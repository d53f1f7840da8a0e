"""Spans, masks and offset mappings as users and tokenizers hand them over, read into plain lists and int64 tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import FLOATS, INTEGERS, check_has_memory, check_tensor, describe
from .errors import DTypeError, ShapeError, SpanError
from .span_text import Bounds

__all__ = ["LARGEST", "bounds_of", "ints", "items", "mapping_rows", "offsets_of", "real_positions", "real_tokens"]
__all__ += ["rows", "text_list"]

LARGEST = 2**31 - 1  # offsets are int32


def items(name: str, value: Any, expected: str) -> list[Any]:
    """A list or tuple (or array) as a list."""
    value = _plain(value)
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise DTypeError(name, expected=expected, got=describe(value))
    return list(value)


def ints(name: str, value: Any, columns: int | None) -> Tensor:
    """``(n,)`` int64 on the CPU, or ``(n, columns)``; refuses floats and bools, which int64 would take in."""
    expected = "ints" if columns is None else f"entries of {columns} ints"
    if not isinstance(value, Tensor):
        listed = items(name, value, f"a list of {expected}")
        if not listed:
            return torch.empty((0,) if columns is None else (0, columns), dtype=torch.int64, device="cpu")
        try:
            value = torch.tensor(listed, device="cpu")
        except (TypeError, ValueError, RuntimeError):  # what torch raises for text, ragged rows, ints over int64
            if any(isinstance(entry, Sequence) and len(entry) != columns for entry in listed):
                raise ShapeError(name, expected=expected, got="others") from None
            raise DTypeError(name, expected=f"{expected}, of 64 bits at most", got="others") from None
    check_has_memory(name, check_tensor(name, value))
    if value.dtype not in INTEGERS:
        raise DTypeError(name, expected=expected, got=describe(value))
    if value.dim() != (1 if columns is None else 2) or (columns is not None and value.shape[1] != columns):
        raise ShapeError(name, expected=f"a list of {expected}", got=describe(value))
    return value.detach().cpu().long()


def rows(name: str, value: Any, columns: int | None) -> list[Any]:
    """One entry an item, each ``(N,)`` or ``(N, columns)``; one such entry alone is a batch of one."""
    single = 1 if columns is None else 2
    if isinstance(value, Tensor):
        if value.dim() not in (single, single + 1):
            shape = "(B, N)" if columns is None else f"(B, N, {columns})"
            raise ShapeError(name, expected=shape, got=describe(value))
        return [value] if value.dim() == single else list(value)
    listed = items(name, value, "a tensor or a list of one entry an item")
    if columns is None:
        return [listed] if not listed or _is_scalar(listed[0]) else listed
    entry = next((e for e in listed if not _is_scalar(e) and len(e)), None)
    return [listed] if entry is not None and _is_scalar(entry[0]) else listed


def bounds_of(name: str, pairs: Tensor) -> Bounds:
    """``(n, 2)`` int64 as a list of ranges that are not empty, checked to be ranges of positions."""
    wrong = ((pairs[:, 0] < 0) | (pairs[:, 0] > pairs[:, 1]) | (pairs[:, 1] > LARGEST)).nonzero().flatten()
    if len(wrong):
        got = str(tuple(pairs[wrong[0]].tolist()))
        raise SpanError(f"{name}[{int(wrong[0])}]", expected=f"0 <= start <= stop <= {LARGEST}", got=got)
    return [(start, stop) for start, stop in pairs.tolist() if start < stop]


def offsets_of(name: str, offsets: Tensor) -> list[int]:
    """``(n,)`` int64 as a list, checked to be two offsets or more that do not decrease."""
    if len(offsets) < 2:
        raise SpanError(name, expected="two offsets or more", got=str(len(offsets)))
    if bool((offsets[1:] < offsets[:-1]).any()):
        raise SpanError(name, expected="offsets that do not decrease", got=f"{offsets.tolist()}"[:200])
    if int(offsets[0]) < 0 or int(offsets[-1]) > LARGEST:
        got = f"{int(offsets[0])} to {int(offsets[-1])}"
        raise SpanError(name, expected=f"offsets within [0, {LARGEST}]", got=got)
    listed: list[int] = offsets.tolist()
    return listed


def mapping_rows(value: Any, batch: int) -> list[Tensor]:
    """An offset mapping as one ``(N, 2)`` int64 an item, checked to be ranges."""
    listed = rows("offset_mapping", value, 2)
    if not listed and batch == 1:
        listed = [[]]  # one text without a token
    if len(listed) != batch:
        raise ShapeError("offset_mapping", expected=f"{batch} items", got=str(len(listed)))
    mapping = [ints(f"offset_mapping[{i}]", row, 2) for i, row in enumerate(listed)]
    for i, row in enumerate(mapping):
        if bool(((row[:, 0] < 0) | (row[:, 0] > row[:, 1])).any()):
            raise SpanError(f"offset_mapping[{i}]", expected="0 <= start <= stop", got="other ranges")
    return mapping


def real_tokens(mask: Any, counts: Sequence[int]) -> list[Tensor]:
    """An attention mask as one bool ``(N,)`` an item, whose items have ``counts`` tokens; None: all are real."""
    if mask is None:
        return [torch.ones(count, dtype=torch.bool, device="cpu") for count in counts]
    listed = rows("attention_mask", mask, None)
    if len(listed) != len(counts):
        raise ShapeError("attention_mask", expected=f"{len(counts)} items", got=str(len(listed)))
    real = [_mask_row(f"attention_mask[{i}]", row) for i, row in enumerate(listed)]
    for i, (row, count) in enumerate(zip(real, counts)):
        if len(row) != count:
            raise ShapeError(f"attention_mask[{i}]", expected=f"{count} tokens", got=str(len(row)))
    return real


def real_positions(name: str, lengths: Any) -> list[Sequence[int]]:
    """Positions of each item's real tokens: from a length, one an item, or an attention mask ``(B, N)``."""
    if isinstance(lengths, int) and not isinstance(lengths, bool):
        lengths = [lengths]
    if not isinstance(lengths, Tensor):
        lengths = items(name, lengths, "an int, one an item, or an attention mask")
        flat = all(_is_scalar(entry) for entry in lengths)
    elif lengths.dim() in (1, 2):
        flat = lengths.dim() == 1
    else:
        raise ShapeError(name, expected="(B,) lengths or a (B, N) attention mask", got=describe(lengths))
    if not flat:
        masks = [_mask_row(f"{name}[{i}]", row) for i, row in enumerate(lengths)]
        return [row.nonzero().flatten().tolist() for row in masks]
    counts = ints(name, lengths, None).tolist()
    for i, count in enumerate(counts):
        if not 0 <= count <= LARGEST:
            raise SpanError(f"{name}[{i}]", expected=f"a length from 0 to {LARGEST}", got=str(count))
    return [range(count) for count in counts]


def text_list(texts: Any) -> list[str]:
    """One text, or one an item."""
    listed = [texts] if isinstance(texts, str) else items("texts", texts, "a str or a list of str")
    for i, text in enumerate(listed):
        if not isinstance(text, str):
            raise DTypeError(f"texts[{i}]", expected="a str", got=describe(text))
    return listed


def _mask_row(name: str, row: Any) -> Tensor:
    if not isinstance(row, Tensor):
        listed = items(name, row, "a list of zeros and ones")
        try:
            row = torch.tensor(listed, device="cpu")
        except (TypeError, ValueError, RuntimeError):  # as in `ints`
            raise DTypeError(name, expected="zeros and ones", got="others") from None
    check_has_memory(name, check_tensor(name, row))
    if row.dtype not in (torch.bool, *INTEGERS, *FLOATS):
        raise DTypeError(name, expected="bool or integer, zero at padding", got=describe(row))
    if row.dim() != 1:
        raise ShapeError(name, expected="(N,)", got=describe(row))
    real: Tensor = row.detach().cpu() != 0
    return real


def _plain(value: Any) -> Any:
    """NumPy arrays, which tokenizers return too, as lists; all else as it is."""
    return value.tolist() if hasattr(value, "tolist") and not isinstance(value, Tensor) else value


def _is_scalar(value: Any) -> bool:
    return not isinstance(value, Sequence) and getattr(value, "ndim", 0) == 0
