"""Examples: what a line may hold, what is broken and is named, and the sets that are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from lcf_fast.reading.data_errors import DataError
from lcf_fast.training import data as data_module
from lcf_fast.training.data import CrossExample, ExampleSet, SharedExample, parse_example, read_examples
from lcf_fast.training.rows import RowError

USER, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
CROSS = {"sharer_context": ["One.", "Two."], "receiver_context": "Three.", "question": "Why?", "answer": "So."}


def without(fields: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != key}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """JSON lines of rows, a str as it stands."""

    def write(*rows: Any, name: str = "data.jsonl") -> Path:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return tmp_path / name

    return write


# --- one example
# ---------------------------------------------------------------------------------------------------------


def test_every_form() -> None:
    pair = SharedExample("line-3", (("user", "Why?"), ("assistant", "So.")))
    assert parse_example({"prompt": "Why?", "response": "So."}, "line-3") == pair
    assert parse_example({"messages": [USER, ANSWER]}, "line-3") == pair
    assert parse_example({"messages": [USER, ANSWER], "id": 7, "source": "x", "tools": None}, "line-3").id == "7"
    assert parse_example({"messages": (USER, ANSWER), "response": None, "id": None}, "line-3") == pair
    system = {"role": "system", "content": ""}  # may be empty, as all but the last
    made = parse_example({"messages": [system, USER, ANSWER, USER, ANSWER]}, "a")
    assert isinstance(made, SharedExample)
    assert [role for role, _ in made.messages] == ["system", "user", "assistant", "user", "assistant"]
    crossing = CrossExample("a", ("One.", "Two."), "Three.", "Why?", "So.")
    assert parse_example(CROSS, "a") == crossing
    assert parse_example({**CROSS, "sharer_context": "\nOne.\n\n Two.\n"}, "a") == crossing
    assert parse_example({**CROSS, "receiver_context": ""}, "a") == CrossExample(
        "a", ("One.", "Two."), "", "Why?", "So."
    )


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (3, "a number instead of an object with fields"),
        (None, "null instead of an object"),
        ([USER], "a list instead of an object"),
        ({}, "no messages, prompt or sharer_context among its fields: "),
        ({"text": "x", "label": 1}, "among its fields: text, label"),
        ({"conversations": []}, "lcf-fast convert openhermes"),
        ({"messages": []}, "messages: an empty list instead of a list of messages"),
        ({"messages": "Why?"}, "messages: a text instead of a list"),
        ({"messages": [USER, 3]}, "messages[1]: a number instead of an object"),
        ({"messages": [USER, {"role": "gpt", "content": "So."}]}, "messages[1]: role 'gpt', none of system, developer"),
        ({"messages": [USER, {"content": "So."}]}, "messages[1]: role None"),
        ({"messages": [USER]}, "the last message is the user's, not the assistant's"),
        ({"messages": [ANSWER]}, "no user's turn"),
        ({"messages": [{"role": "user", "content": " "}, ANSWER]}, "no user's turn"),
        ({"messages": [USER, {"role": "assistant"}]}, "no messages[1].content"),
        ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "messages[1].content is empty"),
        ({"messages": [USER, {"role": "assistant", "content": ["So."]}]}, "messages[1].content: a list instead"),
        ({"messages": [USER, ANSWER], "response": "So."}, "both messages and a response"),
        ({"messages": [USER, ANSWER], "sharer_context": "x"}, "fields of both kinds"),
        ({"prompt": "Why?"}, "no response"),
        ({"prompt": "Why?", "response": ""}, "response is empty"),
        ({"prompt": "\t", "response": "So."}, "prompt is empty"),
        ({"response": "So."}, "no prompt"),
        ({"prompt": "Why?", "response": "\ud800"}, "response: half a surrogate pair"),
        ({"prompt": "Why?", "response": True}, "response: a boolean instead of a text"),
        ({"prompt": "Why?", "response": "So.", "id": 1.5}, "id: a number instead of a text or an integer"),
        ({"prompt": "Why?", "response": "So.", "id": ""}, "id is empty"),
        (without(CROSS, "sharer_context"), "no sharer_context"),
        (without(CROSS, "receiver_context"), "no receiver_context"),
        (without(CROSS, "question"), "no question"),
        (without(CROSS, "answer"), "no answer"),
        ({**CROSS, "answer": " "}, "answer is empty"),
        ({**CROSS, "sharer_context": []}, "sharer_context: an empty list instead of a text or a list of texts"),
        ({**CROSS, "sharer_context": " "}, "sharer_context is empty"),
        ({**CROSS, "sharer_context": ["One.", ""]}, "sharer_context[1] is empty"),
        ({**CROSS, "sharer_context": ["One.", 2]}, "sharer_context[1]: a number instead of a text"),
    ],
)
def test_what_is_broken_says_why(row: Any, reason: str) -> None:
    with pytest.raises(RowError) as raised:
        parse_example(row, "line-1")
    assert reason in str(raised.value)


NAMES = ["messages", "role", "content", "prompt", "response", "id", *CROSS]
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=150, deadline=None)
@given(ANY)
def test_any_json_is_an_example_or_says_why_not(row: Any) -> None:
    try:
        made = parse_example(row, "line-1")
    except RowError as error:
        reason = str(error)
    else:
        reason = ""
        assert made.id
        assert made.messages[-1][1].strip() if isinstance(made, SharedExample) else made.answer.strip()
    assert reason or isinstance(row, dict)


# --- a set
# ---------------------------------------------------------------------------------------------------------


def test_broken_lines_are_named_and_skipped(write: Callable[..., Path]) -> None:
    pair = {"prompt": "Why?", "response": "So."}
    path = write(pair, "{", {**pair, "response": ""}, "", {**pair, "id": "x"}, {**pair, "id": "x"}, pair)
    found = read_examples(path)
    assert [example.id for example in found.examples] == ["line-1", "x", "line-7"]
    assert [number for number, _ in found.broken] == [2, 3, 6]
    assert dict(found.broken)[6] == "the id 'x' has come before, at 5"
    assert found.kind == "shared"
    assert len(found) == 3
    summary = found.summary()
    assert summary.startswith("3 examples (shared context); left out: 3 broken lines (2: not JSON: ")
    assert "3: response is empty; 6: the id" in summary


def test_broken_lines_are_refused_if_asked(write: Callable[..., Path]) -> None:
    path = write({"prompt": "Why?", "response": "So."}, {"prompt": "Why?", "response": " "})
    with pytest.raises(DataError, match="response is empty") as raised:
        read_examples(path, on_error="refuse")
    assert raised.value.argument == f"{path}:2"
    assert len(read_examples(path)) == 1


def test_sets_of_no_use(write: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"at least one example, got none; 5 broken lines \(1: .*; and 2 more\)$"):
        read_examples(write(*[{"text": "x"}] * 5))
    with pytest.raises(DataError, match=r"at least one example, got none$"):
        read_examples(write())
    with pytest.raises(DataError, match=r":2: expected examples of one kind, shared context, got one of cross context"):
        read_examples(write({"prompt": "Why?", "response": "So."}, CROSS))
    with pytest.raises(DataError, match=r":1: expected examples of one kind, cross context, got one of shared"):
        read_examples(write({"prompt": "Why?", "response": "So."}), kind="cross")
    with pytest.raises(DataError, match="no such file"):
        read_examples(tmp_path / "missing.jsonl")
    for wrong in ({"kind": "both"}, {"on_error": "warn"}, {"limit": 0}, {"limit": 1.5}):
        with pytest.raises(DataError) as raised:
            read_examples(write(CROSS), **wrong)  # type: ignore[arg-type]
        assert raised.value.argument == next(iter(wrong))
    with pytest.raises(DataError, match="source: expected a path"):
        read_examples(3)  # type: ignore[arg-type]


def test_a_list_and_parquet_hold_the_same(write: Callable[..., Path], tmp_path: Path) -> None:
    rows = [{**CROSS, "id": f"item {i}"} for i in range(5)]
    expected = read_examples(write(*rows))
    assert expected.kind == "cross"
    assert read_examples(write(json.dumps(rows, indent=1), name="list.json")) == expected
    pytest.importorskip("datasets")
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert read_examples(str(tmp_path / "rows.parquet")) == expected
    mixed = [
        {"messages": [USER, ANSWER], "prompt": None, "response": None},
        {"prompt": "a", "response": "b", "messages": None},
    ]
    parquet.write_table(Table.from_pylist(mixed), tmp_path / "mixed.parquet")
    assert [example.id for example in read_examples(tmp_path / "mixed.parquet").examples] == ["line-1", "line-2"]


def test_a_name_is_a_file_where_there_is_one_and_else_the_hub(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def hub_rows(name: str, split: str) -> Any:
        asked.append((name, split))
        return iter([(1, CROSS)])

    monkeypatch.setattr(data_module, "hub_rows", hub_rows)
    monkeypatch.chdir(tmp_path)
    assert len(read_examples("owner/name", split="validation")) == 1
    assert asked == [("owner/name", "validation")]
    write(CROSS, CROSS, name="plain")
    assert len(read_examples("plain")) == 2
    for missing in ("missing.jsonl", "./missing", "a/b/c", "folder/data.parquet"):
        with pytest.raises(DataError, match="no such file"):
            read_examples(missing)
    assert len(asked) == 1


def test_limit_and_seed(write: Callable[..., Path]) -> None:
    rows = [{"id": f"{i}", "prompt": "Why?", "response": "So."} for i in range(30)]
    path = write(*rows, "{")
    first = read_examples(path, limit=7)
    assert [example.id for example in first.examples] == [f"{i}" for i in range(7)]
    assert not first.broken  # what comes behind is not read
    sample = read_examples(path, limit=7, seed=3)
    names = [example.id for example in sample.examples]
    assert names == [example.id for example in read_examples(path, seed=3).examples][:7]
    assert names == [example.id for example in read_examples(write(*rows[::-1], name="b"), limit=7, seed=3).examples]
    assert names != [example.id for example in read_examples(path, limit=7, seed=4).examples]
    assert sorted(names) != sorted(example.id for example in first.examples)
    assert [number for number, _ in sample.broken] == [31]


def test_held_out_examples_stay_held_out() -> None:
    examples = tuple(SharedExample(f"{i}", (("user", "Why?"), ("assistant", "So."))) for i in range(4000))
    whole = ExampleSet(examples, ((3, "broken"),), "shared")
    kept, held = whole.held_out(0.1)
    assert 320 <= len(held) <= 480  # 400, and more than four standard deviations
    assert len(kept) + len(held) == 4000
    assert not {e.id for e in kept.examples} & {e.id for e in held.examples}
    assert (kept.broken, held.broken) == (((3, "broken"),), ())
    # More data, another order: each stays on its side.
    part, part_held = ExampleSet(examples[1000:3000][::-1], (), "shared").held_out(0.1)
    assert {e.id for e in part_held.examples} <= {e.id for e in held.examples}
    assert {e.id for e in part.examples} <= {e.id for e in kept.examples}
    assert {e.id for e in whole.held_out(0.01)[1].examples} <= {e.id for e in held.examples}
    assert len(whole.held_out(0)[1]) == 0
    for wrong in (-0.1, 1, float("nan")):
        with pytest.raises(DataError, match="fraction"):
            whole.held_out(wrong)
