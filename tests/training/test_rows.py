"""Rows of data files: JSON lines, JSON lists read piece by piece, parquet through the datasets library."""

from __future__ import annotations

import builtins
import json
import sys
import types
from itertools import islice
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, example, given, settings

from lcf_fast.errors import BackendError
from lcf_fast.reading.data_errors import DataError
from lcf_fast.training import rows as rows_module
from lcf_fast.training.rows import RowError, file_rows, hub_rows

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def read(path: Path, data: bytes) -> list[tuple[int, Any]]:
    """Rows of a file of these bytes; a row that cannot be read as the text of its error."""
    made = list(file_rows(written(path, data)))
    return [(number, str(row) if isinstance(row, RowError) else row) for number, row in made]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data.json"


def test_json_lines_are_numbered_as_an_editor_does(path: Path) -> None:
    data = b'\xef\xbb\xbf{"a": 1}\n\n  \r\n{"a": "\xc3\xa9\\n"}\r\n3'
    assert read(path, data) == [(1, {"a": 1}), (4, {"a": "é\n"}), (5, 3)]
    assert read(path, b"") == []
    # U+2028 and a form feed end no line of JSON.
    assert read(path, '{"a": "\u2028\x85"}\n{"a": 2}'.encode()) == [(1, {"a": "\u2028\x85"}), (2, {"a": 2})]


def test_a_line_that_cannot_be_read_spoils_no_other(path: Path) -> None:
    data = b'{"a": 1}\n{"a": \n{"a": "\xff"}\n' + b"[" * 100_000 + b"\n" + b"9" * 5000 + b'\n{"a": 2}\n'
    found = read(path, data)
    assert [number for number, _ in found] == [1, 2, 3, 4, 5, 6]
    assert found[0][1] == {"a": 1}
    assert found[1][1] == "not JSON: Expecting value at column 7"
    assert found[2][1] == "not UTF-8: byte 0xff at column 8"
    assert found[3][1].startswith("JSON that cannot be read: ")
    assert found[4][1].startswith("JSON that cannot be read: ")
    assert found[5][1] == {"a": 2}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(values=[{}, -0.0, 1.5e300, 1e-7, 12], chunk=1, indent=None, bom=False)
@given(values=st.lists(JSON, max_size=6), chunk=st.integers(1, 9), indent=st.sampled_from([None, 2]), bom=st.booleans())
def test_a_list_in_pieces_is_the_list(
    values: list[Any], chunk: int, indent: int | None, bom: bool, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "_CHUNK", chunk)
    data = json.dumps(values, indent=indent, ensure_ascii=False).encode(errors="surrogatepass")
    if b"\xed" in data:  # half a surrogate pair
        data = json.dumps(values, indent=indent).encode()
    made = list(file_rows(written(path, b"\xef\xbb\xbf" * bom + b" \n" + data + b"\n ")))
    assert made == list(enumerate(values, 1))


@pytest.mark.parametrize("chunk", [1, 1 << 20])
@pytest.mark.parametrize(
    ("data", "before", "error"),
    [
        (b'[{"a": 1}, {"a": }, 3]', 1, "at item 2"),
        (b'[{"a": 1}', 1, "the file ends, at item 1"),
        (b"[1, 2,]", 2, "at item 3"),
        (b"[1 2]", 1, "'2' where one of ',]' belongs, at item 1"),
        (b"[1, 2] 3", 2, "more text behind the list's end"),
        (b"[", 0, "at item 1"),
        (b'[1, "\xff"]', 0, "not UTF-8"),
        (b"[1, " + b"[" * 100_000, 1, "at item 2"),
    ],
)
def test_a_damaged_list_is_refused(
    data: bytes, before: int, error: str, chunk: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "_CHUNK", chunk)
    rows = file_rows(written(path, data))
    assert [number for number, _ in islice(rows, before)] == list(range(1, before + 1))
    with pytest.raises(DataError, match="expected a JSON list") as raised:
        next(rows)
    assert error in raised.value.got
    assert raised.value.argument == str(path)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    for name in ("missing.jsonl", "missing.parquet"):
        with pytest.raises(DataError, match="no such file"):
            file_rows(tmp_path / name)
    with pytest.raises(DataError, match=r"a folder of .parquet files"):
        file_rows(tmp_path)


def test_parquet_and_folders_of_it(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    from pyarrow import Table, parquet

    items = [{"id": "x", "messages": [{"role": "user", "content": "é"}]}, {"id": None, "messages": []}]
    # Names that are patterns to the library.
    parquet.write_table(Table.from_pylist(items), tmp_path / "part-1 [a]*.parquet")
    assert list(file_rows(tmp_path / "part-1 [a]*.parquet")) == [(1, items[0]), (2, items[1])]
    parquet.write_table(Table.from_pylist(items[:1]), tmp_path / "part-2.parquet")
    assert [number for number, _ in file_rows(tmp_path)] == [1, 2, 3]
    broken = written(tmp_path / "broken.parquet", b"PAR1 and no more")
    with pytest.raises(DataError, match="parquet that can be read") as raised:
        list(file_rows(broken))
    assert raised.value.argument == str(broken)


def test_a_hub_set_comes_through_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network: the library is asked for the name and split, and its errors become this package's."""
    asked: list[Any] = []

    def load_dataset(name: str, **options: Any) -> list[dict[str, int]]:
        asked.append((name, options))
        if name != "owner/name":
            raise FileNotFoundError("no such set\nand a long story")
        return [{"a": 1}, {"a": 2}]

    errors = types.SimpleNamespace(DatasetsError=type("DatasetsError", (Exception,), {}))
    library = types.SimpleNamespace(load_dataset=load_dataset, exceptions=errors)
    monkeypatch.setitem(sys.modules, "datasets", library)
    assert list(hub_rows("owner/name", "test")) == [(1, {"a": 1}), (2, {"a": 2})]
    assert asked == [("owner/name", {"split": "test"})]
    with pytest.raises(DataError, match=r"^nobody/name: expected a data set with a split 'train', got no such set$"):
        list(hub_rows("nobody/name", "train"))


def test_without_the_library(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_it = builtins.__import__

    def refuse(name: str, *arguments: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return import_it(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(BackendError, match=r"pip install 'lcf-fast\[train\]'"):
        file_rows(written(path.with_suffix(".parquet"), b""))
    assert read(path, b"{}") == [(1, {})]  # which needs none
