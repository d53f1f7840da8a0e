"""Published sets from small files in their layouts; the hub's through a stand-in for its library."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from lcf_fast.errors import BackendError
from lcf_fast.evaluation.sets import SETS, Question, QuestionSet, parse_question, read_hotpotqa, read_questions
from lcf_fast.reading.data_errors import DataError
from lcf_fast.training.converters import LeftOut, convert_hotpotqa, hotpotqa_row

ABCD = ["first", "second", "third", "fourth"]


def redux(**fields: Any) -> dict[str, Any]:
    row = {"question": "Which?", "choices": ABCD, "answer": 2, "error_type": "ok", "source": "https://example.org"}
    return {**row, "correct_answer": None, "potential_reason": None, **fields}


def arc(id: str, key: str | None, labels: list[str], stem: str = "Which?") -> dict[str, Any]:
    return {"id": id, "question": stem, "choices": {"text": ABCD[: len(labels)], "label": labels}, "answerKey": key}


def nested(id: str, key: str) -> dict[str, Any]:
    """As in the JSON lines of ARC's and OpenBookQA's authors."""
    choices = [{"text": text, "label": label} for text, label in zip(ABCD, "ABCD")]
    return {"id": id, "question": {"stem": "A nested question", "choices": choices}, "answerKey": key}


def pro(id: int, **fields: Any) -> dict[str, Any]:
    options = [f"option {i}" for i in range(10)]
    row = {"question_id": id, "question": "Which of ten?", "options": options, "answer": "I", "answer_index": 8}
    return {**row, "cot_content": "", "category": "business", "src": "ori_mmlu-business_ethics", **fields}


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def answers(found: QuestionSet[Question]) -> list[tuple[str, int]]:
    return [(question.id, question.answer_index) for question in found.items]


def test_mmlu_redux_and_its_notes(tmp_path: Path) -> None:
    rows = [
        redux(),
        redux(error_type="bad_question_clarity"),
        redux(error_type="wrong_groundtruth", correct_answer="1"),
        redux(error_type="wrong_groundtruth", correct_answer="D"),
        redux(error_type="wrong_groundtruth", correct_answer="first"),
        redux(error_type="wrong_groundtruth", correct_answer="C or D"),
        redux(error_type="wrong_groundtruth"),
        redux(error_type="no_correct_answer", correct_answer="fifth"),
        redux(error_type="expert"),
        redux(error_type="multiple_correct_answers", answer=0),
        redux(error_type=None, subject="anatomy"),
    ]
    found = read_questions("mmlu-redux", lines(tmp_path / "redux.jsonl", rows), on_error="refuse")
    assert answers(found) == [
        ("line-1", 2),
        ("line-2", 2),
        ("line-3", 1),
        ("line-4", 3),
        ("line-5", 0),
        ("line-10", 0),
        ("anatomy-11", 2),
    ]
    assert found.items[0] == Question("line-1", "mmlu-redux", "Which?", tuple(ABCD), 2)
    assert found.left_out == {
        "noted as expert": 1,
        "noted as no_correct_answer": 1,
        "noted as wrong_groundtruth, without one corrected choice": 2,
    }
    assert found.summary().startswith("mmlu-redux: 7 questions; left out: 1 (noted as expert); ")


@pytest.mark.parametrize(
    ("choices", "said", "meant"),
    [
        (["1", "2", "3", "4"], "2", None),  # the third choice, or the one that says two
        (["0", "1", "2", "3"], "2", 2),
        (["2", "4", "6", "8"], "3", 3),
        (["2", "4", "6", "8"], "8", 3),
        (["2", "2 ", "6", "8"], "2", None),
        (["B", "A", "D", "C"], "A", None),
        (["A", "B", "C", "D"], "B", 1),
        (["", "b", "c", "d"], None, None),
    ],
)
def test_a_corrected_answer_that_can_be_read_in_two_ways_is_left_out(
    choices: list[str], said: str | None, meant: int | None
) -> None:
    row = redux(choices=choices, error_type="wrong_groundtruth", correct_answer=said)
    if meant is None:
        with pytest.raises(LeftOut, match="without one corrected choice"):
            parse_question("mmlu-redux", row, "one")
    else:
        assert parse_question("mmlu-redux", row, "one").answer_index == meant


def test_arc_and_openbookqa(tmp_path: Path) -> None:
    rows = [
        arc("Mercury_1", "C", ["A", "B", "C", "D"]),
        arc("NYSEDREGENTS_2", "4", ["1", "2", "3", "4"]),  # New York's questions number their choices
        arc("MCAS_3", "B", ["A", "B", "C"]),
        nested("Mercury_4", "D"),
    ]
    found = read_questions("arc-c", lines(tmp_path / "arc.jsonl", rows), on_error="refuse")
    assert answers(found) == [("Mercury_1", 2), ("NYSEDREGENTS_2", 3), ("MCAS_3", 1), ("Mercury_4", 3)]
    assert found.items[2].choices == tuple(ABCD[:3])
    assert found.items[3].question == "A nested question"
    stem = {"id": "7-980", "question_stem": "The sun is", "choices": arc("", "A", ["A", "B", "C", "D"])["choices"]}
    found = read_questions(
        "openbookqa", lines(tmp_path / "obqa.jsonl", [{**stem, "answerKey": "B"}, nested("8", "A")]), on_error="refuse"
    )
    assert answers(found) == [("7-980", 1), ("8", 0)]
    assert found.items[0].question == "The sun is"


def test_mmlu_pro(tmp_path: Path) -> None:
    padded = pro(71, options=["yes", "no", "N/A", "N/A"], answer="B", answer_index=1)
    found = read_questions("mmlu-pro", lines(tmp_path / "pro.jsonl", [pro(70), padded]), on_error="refuse")
    assert answers(found) == [("70", 8), ("71", 1)]
    assert len(found.items[0].choices) == 10
    assert found.items[1].choices == ("yes", "no")


BROKEN: dict[str, list[tuple[Any, str]]] = {
    "mmlu-redux": [
        (3, "no object with fields"),
        (redux(question=" "), "no question"),
        (redux(choices="ABCD"), "choices: str instead of a list"),
        (redux(choices=[1, 2]), "a choice that is no text"),
        (redux(choices=["one"], answer=0), "1 choices instead of 2 to 26"),
        (redux(answer=None), "no answer: a question without an answer"),
        (redux(answer="C"), "answer: 'C' instead of an index"),
        (redux(answer=True), "answer: True instead of an index"),
        (redux(answer=4), "answer 4 of 4 choices"),
        (redux(error_type="odd"), "error_type 'odd', none of ok,"),
        (redux(question="\ud800"), "half a surrogate pair"),
    ],
    "arc-c": [
        (arc("a", None, ["A", "B"]), "no answerKey: a question without an answer"),
        (arc("a", "", ["A", "B"]), "no answerKey"),
        (arc("a", "E", ["A", "B"]), "answerKey 'E' is not one of the labels ['A', 'B']"),
        (arc("a", "A", ["A", "A"]), "is not one of the labels"),
        ({**arc("a", "A", ["A", "B"]), "id": None}, "no id"),
        ({**arc("a", "A", ["A", "B"]), "choices": None}, "no choices"),
        ({**arc("a", "A", ["A", "B"]), "choices": ["A", "B"]}, "choices: no objects with text and label"),
    ],
    "mmlu-pro": [
        (pro(1, answer="J"), "answer 'J' at answer_index 8"),
        (pro(1, question_id=None), "no question_id"),
        (pro(1, answer_index=10, answer=None), "answer 10 of 10 choices"),
        (pro(1, options=None), "no options"),
    ],
}


@pytest.mark.parametrize("name", list(BROKEN))
def test_broken_rows_are_named_or_refused(name: str, tmp_path: Path) -> None:
    sound = {"mmlu-redux": redux(), "arc-c": arc("x", "A", ["A", "B"]), "mmlu-pro": pro(9)}[name]
    path = tmp_path / "rows.jsonl"
    rows = "".join(json.dumps(row) + "\n" for row, _ in BROKEN[name])
    path.write_text(f"{json.dumps(sound)}\n{rows}{{not JSON\n", encoding="utf-8")
    found = read_questions(name, path)
    assert len(found) == 1
    assert [number for number, _ in found.broken] == list(range(2, 3 + len(BROKEN[name])))
    for (_, reason), (_, expected) in zip(found.broken, BROKEN[name]):
        assert expected in reason
    assert f"{len(found.broken)} broken rows (2: " in found.summary()
    for row, expected in BROKEN[name]:
        lines(path, [sound, row])
        with pytest.raises(DataError) as caught:
            read_questions(name, path, on_error="refuse")
        assert caught.value.argument == f"{path}:2"
        assert expected in caught.value.got


def test_an_id_that_comes_twice_and_a_file_of_no_questions(tmp_path: Path) -> None:
    twice = lines(tmp_path / "twice.jsonl", [pro(1), pro(2), pro(1)])
    found = read_questions("mmlu-pro", twice)
    assert found.broken == ((3, "the id '1' has come before, at 1"),)
    with pytest.raises(DataError, match="without an answer"):
        read_questions("arc-c", lines(tmp_path / "none.jsonl", [arc("a", None, ["A", "B"])]))
    with pytest.raises(DataError, match="no such file"):
        read_questions("arc-c", tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="mmlu-redux"):
        read_questions("mmlu", twice)
    with pytest.raises(DataError):
        read_questions("mmlu-pro", twice, limit=0)
    with pytest.raises(DataError):
        read_questions("mmlu-pro", twice, on_error="stop")  # type: ignore[arg-type]


def test_limits_and_samples(tmp_path: Path) -> None:
    rows = [pro(i) for i in range(50)]
    path = lines(tmp_path / "pro.jsonl", rows)
    assert [q.id for q in read_questions("mmlu-pro", path, limit=3).items] == ["0", "1", "2"]
    sample = read_questions("mmlu-pro", path, limit=10, seed=1).items
    back = read_questions("mmlu-pro", lines(tmp_path / "back.jsonl", rows[::-1]), limit=10, seed=1).items
    assert sample == back
    assert len({q.id for q in sample}) == 10
    assert [q.id for q in sample] != [q.id for q in read_questions("mmlu-pro", path, limit=10, seed=2).items]
    everything = read_questions("mmlu-pro", path, seed=1).items
    assert everything[:10] == sample
    assert len(everything) == 50


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [arc("Mercury_1", "C", ["A", "B", "C", "D"]), arc("MCAS_3", "2", ["1", "2", "3"])]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "test-00000-of-00001.parquet")
    for source in (tmp_path, tmp_path / "test-00000-of-00001.parquet"):
        assert answers(read_questions("arc-c", source, on_error="refuse")) == [("Mercury_1", 2), ("MCAS_3", 1)]


# --- HotpotQA
# ---------------------------------------------------------------------------------------------------------


def hotpot(number: int, **fields: Any) -> dict[str, Any]:
    titles = [f"Title {number}-{i}" for i in range(10)]
    return {
        "_id": f"5a7a{number:04}",
        "question": "Which?",
        "answer": "That.",
        "type": "bridge",
        "level": "hard",
        "supporting_facts": [[titles[3], 0], [titles[7], 1], [titles[3], 1]],
        "context": [[title, [f"First of {title}.", f" Second of {title}."]] for title in titles],
        **fields,
    }


def as_hub(item: dict[str, Any]) -> dict[str, Any]:
    """The same item in the hub's layout."""
    made = {key: value for key, value in item.items() if key != "_id"}
    context, facts = item["context"], item["supporting_facts"]
    made["context"] = {"title": [title for title, _ in context], "sentences": [texts for _, texts in context]}
    made["supporting_facts"] = {"title": [title for title, _ in facts], "sent_id": [at for _, at in facts]}
    return {"id": item["_id"], **made}


def test_hotpotqa_in_each_layout_is_cut_alike(tmp_path: Path) -> None:
    items = [hotpot(0), hotpot(1, type="comparison"), hotpot(2), hotpot(3, context=[])]
    own = tmp_path / "hotpot_dev_distractor_v1.json"
    own.write_text(json.dumps(items), encoding="utf-8")
    found = read_hotpotqa(own, cut_seed=7)
    assert found.left_out == {"comparison questions": 1}
    assert found.broken == ((4, "0 paragraphs instead of 10"),)
    assert [example.id for example in found.items] == ["5a7a0000", "5a7a0002"]
    assert list(found.items[0].sharer_context) == hotpotqa_row(items[0], 7)["sharer_context"]
    hub = read_hotpotqa(lines(tmp_path / "hub.jsonl", [as_hub(item) for item in items]), cut_seed=7)
    assert hub.items == found.items
    convert_hotpotqa(own, tmp_path / "cut.jsonl", seed=7)
    assert read_hotpotqa(tmp_path / "cut.jsonl", cut_seed=99).items == found.items
    assert read_hotpotqa(own, cut_seed=8).items != found.items
    one = as_hub(hotpot(0))
    one["context"]["title"].pop()
    with pytest.raises(DataError, match="9 titles and 10 of sentences"):
        read_hotpotqa(lines(tmp_path / "odd.jsonl", [one]), on_error="refuse")
    with pytest.raises(DataError, match="the item has no type"):
        read_hotpotqa(lines(tmp_path / "other.jsonl", [{"prompt": "a", "response": "b"}]), on_error="refuse")


# --- the hub
# ---------------------------------------------------------------------------------------------------------


class Hub(types.ModuleType):
    """Stands in for `datasets`: what was asked of it, and rows that it holds."""

    class exceptions:
        class DatasetsError(Exception):
            pass

    def __init__(self, parts: dict[str, list[Any]]) -> None:
        super().__init__("datasets")
        self.parts, self.asked = parts, list[tuple[str, str, str]]()

    def get_dataset_config_names(self, name: str) -> list[str]:
        return list(self.parts)

    def load_dataset(self, name: str, part: str, *, split: str) -> list[Any]:
        self.asked.append((name, part, split))
        if part not in self.parts:
            raise ValueError(f"BuilderConfig {part!r} not found.\nAvailable: none")
        return self.parts[part]


def test_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub({"virology": [redux(), redux(answer=None)], "anatomy": [redux(answer=1)]})
    monkeypatch.setitem(sys.modules, "datasets", hub)
    found = read_questions("mmlu-redux")
    name = "edinburgh-dawg/mmlu-redux-2.0"
    assert hub.asked == [(name, "anatomy", "test"), (name, "virology", "test")]
    assert answers(found) == [("anatomy-1", 1), ("virology-1", 2)]
    assert [number for number, _ in found.broken] == ["virology:2"]
    hub.parts = {"ARC-Challenge": [arc("Mercury_1", "C", ["A", "B", "C", "D"])], "distractor": [as_hub(hotpot(0))]}
    assert answers(read_questions("arc-c", split="validation")) == [("Mercury_1", 2)]
    assert hub.asked[-1] == ("allenai/ai2_arc", "ARC-Challenge", "validation")
    assert read_hotpotqa().items[0].id == "5a7a0000"
    assert hub.asked[-1] == ("hotpotqa/hotpot_qa", "distractor", "validation")
    with pytest.raises(DataError, match="BuilderConfig 'default' not found") as caught:
        read_questions("mmlu-pro")
    assert caught.value.argument == "TIGER-Lab/MMLU-Pro"


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in SETS:
        with pytest.raises(BackendError, match=r"lcf-fast\[eval\]"):
            read_questions(name)
