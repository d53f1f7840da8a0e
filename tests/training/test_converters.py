"""OpenHermes 2.5 and HotpotQA, from small files in their published layouts."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lcf_fast.cli import main
from lcf_fast.reading.data_errors import DataError
from lcf_fast.training.converters import LeftOut, convert_hotpotqa, convert_openhermes, hotpotqa_row, openhermes_row
from lcf_fast.training.data import CrossExample, SharedExample, read_examples
from lcf_fast.training.rows import RowError


def saved(path: Path, items: Any) -> Path:
    path.write_text(json.dumps(items, indent=2), encoding="utf-8")
    return path


# --- OpenHermes 2.5
# ---------------------------------------------------------------------------------------------------------


def hermes(*turns: tuple[str, str], **fields: Any) -> dict[str, Any]:
    """An item as published: most fields are null, and what a conversation's turns carry differs."""
    nothing = ["custom_instruction", "topic", "model_name", "model", "skip_prompt_formatting", "category", "views"]
    nothing += ["language", "id", "title", "idx", "hash", "avatarUrl", "system_prompt"]
    told = [{"from": speaker, "value": text, "weight": None} for speaker, text in turns]
    return {**dict.fromkeys(nothing), "conversations": told, "source": "airoboros2.2", **fields}


PLAIN = hermes(("human", "Every day, a tree drops 7 leaves. é?"), ("gpt", "28 leaves."))


def test_openhermes_rows() -> None:
    assert openhermes_row(PLAIN, "a") == {
        "id": "a",
        "messages": [
            {"role": "user", "content": "Every day, a tree drops 7 leaves. é?"},
            {"role": "assistant", "content": "28 leaves."},
        ],
    }
    turns = (("human", "Why?"), ("gpt", "So."))
    inside = openhermes_row(hermes(("system", "Be brief."), *turns, system_prompt="Be long."), "a")
    beside = openhermes_row(hermes(*turns, system_prompt="Be brief."), "a")
    assert inside == beside
    assert [message["role"] for message in inside["messages"]] == ["system", "user", "assistant"]
    assert openhermes_row(hermes(*turns, system_prompt="  "), "a") == openhermes_row(hermes(*turns), "a")


BROKEN_HERMES = [
    (3, "the item is no object with fields"),
    ({"source": "x"}, "the item has no conversations"),
    ({"conversations": "Why?"}, "conversations: str instead of list"),
    (hermes(("human", "Why?"), ("chatgpt", "So.")), "conversations[1]: from 'chatgpt', none of system, human, gpt"),
    ({"conversations": [{"from": "human"}]}, "conversations[0] has no value"),
    (hermes(("human", "Why?")), "the last message is the user's, not the assistant's"),
    (hermes(("human", "Why?"), ("gpt", "")), "messages[1].content is empty"),
    (hermes(("gpt", "So.")), "no user's turn"),
    (hermes(), "messages: an empty list"),
]


def test_openhermes_to_lines_that_are_read(tmp_path: Path) -> None:
    items = [PLAIN, *(item for item, _ in BROKEN_HERMES), hermes(("human", "Why?"), ("gpt", "So."))]
    source = saved(tmp_path / "openhermes2_5.json", items)
    result = convert_openhermes(source, tmp_path / "out.jsonl")
    assert (result.written, result.left_out, result.read) == (2, {}, len(items))
    assert [number for number, _ in result.broken] == list(range(2, 2 + len(BROKEN_HERMES)))
    for (_, found), (_, reason) in zip(result.broken, BROKEN_HERMES):
        assert reason in found
    made = read_examples(tmp_path / "out.jsonl", on_error="refuse")
    assert made.examples == (
        SharedExample("openhermes-1", (("user", "Every day, a tree drops 7 leaves. é?"), ("assistant", "28 leaves."))),
        SharedExample(f"openhermes-{len(items)}", (("user", "Why?"), ("assistant", "So."))),
    )
    assert result.summary().startswith(
        "11 items read, 2 written; 9 broken items (2: the item is no object with fields; 3:"
    )
    # As JSON lines it is the same, and a line that is no JSON is one broken item more.
    lines = tmp_path / "lines.jsonl"
    lines.write_text("\n".join([*map(json.dumps, items), "{"]), encoding="utf-8")
    again = convert_openhermes(lines, tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()
    assert again.broken[:-1] == result.broken
    assert again.broken[-1][0] == len(items) + 1


def test_openhermes_from_parquet(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    from pyarrow import Table, parquet

    items = [PLAIN, hermes(("human", "Why?"), ("gpt", "So."), system_prompt="Be brief.")]
    parquet.write_table(Table.from_pylist(items), tmp_path / "train.parquet")
    assert convert_openhermes(tmp_path / "train.parquet", tmp_path / "out.jsonl").written == 2
    convert_openhermes(saved(tmp_path / "list.json", items), tmp_path / "list.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "list.jsonl").read_bytes()


# --- HotpotQA
# ---------------------------------------------------------------------------------------------------------


def hotpot(number: int = 0, **fields: Any) -> dict[str, Any]:
    """An item as published: titles and sentences of ten paragraphs, two of which support the answer."""
    titles = [f"Title {number}-{i}" for i in range(10)]
    context = [[title, [f"First of {title}.", f" Second of {title}."]] for title in titles]
    facts = [[titles[3], 0], [titles[7], 1], [titles[7], 0]]
    made = {"supporting_facts": facts, "level": "hard", "question": "Which?", "context": context, "answer": "That."}
    return {**made, "_id": f"5a7a{number:04d}", "type": "bridge", **fields}


def parts(row: dict[str, Any]) -> tuple[list[str], list[str]]:
    return row["sharer_context"], row["receiver_context"].split("\n\n")


def test_hotpotqa_is_cut_into_two_contexts_with_one_supporting_paragraph_each() -> None:
    for number in range(40):
        item = hotpot(number)
        sharer, receiver = parts(hotpotqa_row(item, 42))
        texts = {title: f"{title}\n{title.replace('Title', 'First of Title')}." for title, _ in item["context"]}
        every = sorted(sharer + receiver)
        assert (len(sharer), len(receiver)) == (5, 5)
        assert [text.split("\n")[0] for text in every] == sorted(texts)
        assert every == sorted(f"{t}\nFirst of {t}. Second of {t}." for t in texts)
        supporting = {f"Title {number}-3", f"Title {number}-7"}
        for side in (sharer, receiver):
            assert len({text.split("\n")[0] for text in side} & supporting) == 1
        row = hotpotqa_row(item, 42)
        assert (row["id"], row["question"], row["answer"]) == (item["_id"], "Which?", "That.")


def test_the_cut_follows_from_the_seed_and_the_id_alone() -> None:
    items = [hotpot(number) for number in range(30)]
    first = [hotpotqa_row(item, 42) for item in items]
    random.Random(0).random()
    assert [hotpotqa_row(item, 42) for item in reversed(items)] == first[::-1]
    assert [hotpotqa_row(item, 43) for item in items] != first
    # And stays in every version of this package and of Python.
    names = [text.split("\n")[0].removeprefix("Title 0-") for text in first[0]["sharer_context"]]
    assert names == ["3", "9", "1", "4", "5"]


def test_no_place_and_no_paragraph_is_favoured() -> None:
    rows = [hotpotqa_row(hotpot(number), 42) for number in range(1000)]
    at = Counter[int]()
    heard = Counter[str]()
    for row in rows:
        sharer = [text.split("\n")[0].rpartition("-")[2] for text in row["sharer_context"]]
        heard.update(sharer)
        at.update(i for i, name in enumerate(sharer) if name in ("3", "7"))
    assert sum(at.values()) == 1000
    assert all(150 <= at[i] <= 250 for i in range(5))  # 200, and four standard deviations
    assert all(435 <= heard[str(i)] <= 565 for i in range(10))  # 500


CONTEXT, FACTS = hotpot()["context"], hotpot()["supporting_facts"]
BROKEN_HOTPOT = [
    (None, "the item is no object with fields"),
    (hotpot(type=None), "the item has no type"),
    (hotpot(_id=None), "the item has no _id"),
    (hotpot(context=CONTEXT[:8]), "8 paragraphs instead of 10"),
    (hotpot(context=[*CONTEXT[:9], CONTEXT[0]]), "two paragraphs of one title"),
    (hotpot(context=[*CONTEXT[:9], ["Title", "no list"]]), "context[9]: no list of sentences"),
    (hotpot(context=[*CONTEXT[:9], ["Title"]]), "context[9]: not a title and what belongs to it"),
    (hotpot(supporting_facts=FACTS[:1]), "1 supporting titles instead of 2"),
    (hotpot(supporting_facts=[FACTS[0], ["Elsewhere", 0]]), "a supporting title that is no paragraph's"),
    (hotpot(supporting_facts=None), "the item has no supporting_facts"),
    (hotpot(question=None), "the item has no question"),
    (hotpot(answer=" "), "answer is empty"),
    (hotpot(answer=7), "answer: int instead of str"),
    (hotpot(2, answer=""), "answer is empty"),  # which does not stand in the way of a sound one
    (hotpot(0), "the _id '5a7a0000' has come before"),
]


def test_hotpotqa_to_lines_that_are_read(tmp_path: Path) -> None:
    items = [hotpot(0), hotpot(1, type="comparison"), *(item for item, _ in BROKEN_HOTPOT), hotpot(2)]
    result = convert_hotpotqa(saved(tmp_path / "hotpot_train_v1.1.json", items), tmp_path / "out.jsonl")
    assert (result.written, result.left_out, result.read) == (2, {"comparison questions": 1}, len(items))
    assert [number for number, _ in result.broken] == list(range(3, 3 + len(BROKEN_HOTPOT)))
    for (_, found), (_, reason) in zip(result.broken, BROKEN_HOTPOT, strict=True):
        assert reason in found
    assert "left out: 1 (comparison questions); 15 broken items (3: " in result.summary()
    first, second = read_examples(tmp_path / "out.jsonl", on_error="refuse").examples
    assert isinstance(first, CrossExample)
    assert (first.id, second.id) == ("5a7a0000", "5a7a0002")
    assert len(first.sharer_context) == 5
    assert first.receiver_context.count("\n\n") == 4
    assert first.question == "Which?"


def test_only_bridge_questions() -> None:
    with pytest.raises(LeftOut, match="comparison questions"):
        hotpotqa_row(hotpot(type="comparison"), 42)


# --- both
# ---------------------------------------------------------------------------------------------------------


def test_a_broken_item_is_refused_if_asked_and_nothing_is_written(tmp_path: Path) -> None:
    source = saved(tmp_path / "in.json", [PLAIN, hermes(("human", "Why?"))])
    with pytest.raises(DataError, match="the last message is the user's") as raised:
        convert_openhermes(source, tmp_path / "out.jsonl", on_error="refuse")
    assert raised.value.argument == f"{source}, item 2"
    assert os.listdir(tmp_path) == ["in.json"]


def test_what_was_there_stays_where_a_conversion_fails(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("before")
    for items in ([hotpot(type="comparison")], [hotpot(answer="")], []):
        with pytest.raises(DataError, match="an item to write"):
            convert_hotpotqa(saved(tmp_path / "in.json", items), tmp_path / "out.jsonl")
    (tmp_path / "in.json").write_text(json.dumps([hotpot()])[:-20])
    with pytest.raises(DataError, match="a JSON list"):
        convert_hotpotqa(tmp_path / "in.json", tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == "before"
    assert sorted(os.listdir(tmp_path)) == ["in.json", "out.jsonl"]


def test_source_and_target_are_two_files(tmp_path: Path) -> None:
    source = saved(tmp_path / "in.json", [PLAIN])
    before = source.read_bytes()
    (tmp_path / "link.json").symlink_to(source)
    for target in (source, tmp_path / "link.json"):
        with pytest.raises(DataError, match="another file than the source"):
            convert_openhermes(source, target)
    assert source.read_bytes() == before
    with pytest.raises(DataError, match="no such file"):
        convert_openhermes(tmp_path / "missing.json", tmp_path / "out.jsonl")
    with pytest.raises(DataError, match="'skip' or 'refuse'"):
        convert_openhermes(source, tmp_path / "out.jsonl", on_error="ignore")  # type: ignore[arg-type]


def test_half_a_surrogate_pair_is_a_broken_item(tmp_path: Path) -> None:
    source = saved(tmp_path / "in.json", [PLAIN, hermes(("human", "\ud83d"), ("gpt", "So."))])
    assert convert_openhermes(source, tmp_path / "out.jsonl").broken[0][0] == 2
    with pytest.raises(RowError, match="id: half a surrogate pair"):
        hotpotqa_row(hotpot(5, _id="\ud83d"), 42)


# --- lcf-fast convert
# ---------------------------------------------------------------------------------------------------------


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = saved(tmp_path / "in.json", [hotpot(i) for i in range(4)]), tmp_path / "out.jsonl"
    assert main(["convert", "hotpotqa", str(source), str(target), "--seed", "7"]) == 0
    assert capsys.readouterr().out == f"{target}: 4 items read, 4 written\n"
    convert_hotpotqa(source, tmp_path / "same.jsonl", seed=7)
    assert target.read_bytes() == (tmp_path / "same.jsonl").read_bytes()
    convert_hotpotqa(source, tmp_path / "other.jsonl")
    assert target.read_bytes() != (tmp_path / "other.jsonl").read_bytes()


def test_command_names_what_is_broken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = saved(tmp_path / "in.json", [PLAIN, 3, PLAIN]), tmp_path / "out.jsonl"
    options = ["convert", "openhermes", str(source), str(target)]
    assert main([*options, "--broken", str(tmp_path / "broken.txt")]) == 0
    assert "1 broken item (2: the item is no object with fields)" in capsys.readouterr().err
    assert (tmp_path / "broken.txt").read_text() == "2\tthe item is no object with fields\n"
    for name in ("in.json", "out.jsonl"):  # which the list would take the place of
        before = (tmp_path / name).read_bytes()
        assert main([*options, "--broken", str(tmp_path / "." / name)]) == 2
        assert "--broken: expected another file than" in capsys.readouterr().err
        assert (tmp_path / name).read_bytes() == before
    target.unlink()
    assert main([*options, "--on-error", "refuse"]) == 2
    assert "item 2: expected a sound one, got the item is no object" in capsys.readouterr().err
    assert not target.exists()
    assert main(["convert", "openhermes", str(tmp_path / "missing"), str(target)]) == 2
    assert "no such file" in capsys.readouterr().err
