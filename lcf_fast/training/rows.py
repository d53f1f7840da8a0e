"""Rows of a data file, one at a time: JSON lines, a JSON list, parquet, a set of the `datasets` library.

Every reader yields ``(number, row)``, numbers counted from 1 as a text editor counts lines. A row that cannot be read,
where those after it can, comes as a `RowError`, which its reader counts and names.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from ..errors import BackendError
from ..reading.data_errors import DataError

__all__ = ["Row", "RowError", "file_rows", "hub_rows"]

_CHUNK = 1 << 20  # characters
_WHITE = " \t\n\r"  # JSON's
# What may be left of a buffer behind a number whose rest is not read yet: "1" of "1.5e3", or "1" and ".5e".
_NUMBER_GOES_ON = re.compile(r"[0-9.eE+-]*")


class RowError(ValueError):
    """Why one row is of no use, in its text."""


Row = tuple[int, Any]


def file_rows(path: Path) -> Iterator[Row]:
    """Rows of a file or, of parquet, also of a folder of them.

    A name that ends in ``.parquet`` (or a folder) is parquet; otherwise a file that begins with ``[`` is a JSON list,
    read piece by piece, and any other JSON lines. Blank lines count as lines but are no rows.

    Raises:
        DataError: no such file; parquet that cannot be read; a JSON list that is damaged, since nothing behind the
            damage can be told apart. BackendError: parquet without the `datasets` library. OSError: as the system says.
    """
    if path.is_dir():
        parts = sorted(path.glob("*.parquet"))
        if not parts:
            raise DataError(str(path), expected="a folder of .parquet files", got="one without any")
        return _parquet_rows(path, parts)
    if not path.is_file():
        raise DataError(str(path), expected="a data file", got="no such file")
    if path.suffix == ".parquet":
        return _parquet_rows(path, [path])
    with open(path, "rb") as file:
        first = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    return _list_rows(path) if first.startswith(b"[") else _line_rows(path)


def hub_rows(name: str, split: str) -> Iterator[Row]:
    """Rows of a hub's data set, through the `datasets` library, which downloads and keeps it.

    Raises:
        BackendError: the library is not installed. DataError: it cannot load the set, or has no such split.
    """
    return _library_rows(name, f"a data set with a split {split!r}", name, split=split)


def _parquet_rows(path: Path, parts: Sequence[Path]) -> Iterator[Row]:
    # The library takes names for patterns. Streaming leaves no copy in its cache.
    files = [glob.escape(str(part)) for part in parts]
    return _library_rows(
        str(path), "parquet that can be read", "parquet", split="train", data_files=files, streaming=True
    )


def _line_rows(path: Path) -> Iterator[Row]:
    with open(path, "rb") as file:  # bytes: a line of JSON ends at \n alone, and bad UTF-8 spoils one line only
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.isspace() or not line:
                continue
            try:
                yield number, json.loads(line.rstrip(b"\r\n").decode("utf-8"))
            except UnicodeDecodeError as error:
                yield number, RowError(f"not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}")
            except json.JSONDecodeError as error:
                yield number, RowError(f"not JSON: {error.msg} at column {error.colno}")
            except (ValueError, RecursionError) as error:  # a number of thousands of digits; nested thousands deep
                yield number, RowError(f"JSON that cannot be read: {error}")


def _list_rows(path: Path) -> Iterator[Row]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = _ListReader(path, file)
        try:
            yield from reader.rows()
        except UnicodeDecodeError:
            raise reader.damaged("not UTF-8") from None


class _ListReader:
    """A JSON list's elements, without the whole of it in memory."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self.path, self.file = path, file
        self.buffer, self.at, self.number = "", 0, 0

    def rows(self) -> Iterator[Row]:
        decoder = json.JSONDecoder()
        self.take("[")
        if self.peek() == "]":
            self.at += 1
        else:
            while True:
                self.number += 1
                self.peek()
                yield self.number, self.value(decoder)
                if self.take(",]") == "]":
                    break
        if self.peek():
            raise self.damaged("more text behind the list's end")

    def value(self, decoder: json.JSONDecoder) -> Any:
        while True:
            try:
                value, end = decoder.raw_decode(self.buffer, self.at)
            except json.JSONDecodeError as error:
                if self.fill():
                    continue
                raise self.damaged(error.msg) from None
            except (ValueError, RecursionError) as error:
                raise self.damaged(str(error)) from None
            if _NUMBER_GOES_ON.fullmatch(self.buffer, end) and self.fill():
                continue
            self.at = end
            return value

    def take(self, wanted: str) -> str:
        found = self.peek()
        if not found or found not in wanted:
            raise self.damaged(f"{found!r} where one of {wanted!r} belongs" if found else "the file ends")
        self.at += 1
        return found

    def peek(self) -> str:
        """The next character that is not white space, "" at the end."""
        while True:
            while self.at < len(self.buffer) and self.buffer[self.at] in _WHITE:
                self.at += 1
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if not self.fill():
                return ""

    def fill(self) -> bool:
        # At least doubled, so that a long element is not tried again and again for a little more of it each time.
        more = self.file.read(max(_CHUNK, len(self.buffer) - self.at))
        self.buffer, self.at = self.buffer[self.at :] + more, 0
        return bool(more)

    def damaged(self, what: str) -> DataError:
        return DataError(str(self.path), expected="a JSON list", got=f"{what}, at item {max(self.number, 1)}")


def _library_rows(shown: str, wanted: str, name: str, **options: Any) -> Iterator[Row]:
    try:
        import datasets  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError:
        expected = "the datasets library, which pip install 'lcf-fast[train]' brings"
        raise BackendError(shown, expected=expected, got="an environment without it") from None

    def rows() -> Iterator[Row]:
        try:
            yield from enumerate(datasets.load_dataset(name, **options), 1)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(shown, expected=wanted, got=first[:300]) from error

    return rows()
