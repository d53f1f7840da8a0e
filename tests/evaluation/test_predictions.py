"""The record of a run: lines that join, cells that are whole or not there, and what a run goes on from."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lcf_fast.evaluation import predictions as module
from lcf_fast.evaluation.failures import EvaluationError
from lcf_fast.evaluation.predictions import MATCHED, MISMATCHED, Cell, Prediction, PredictionStore, paired_scores

SETTINGS: dict[str, Any] = {"receiver": "r", "sharer": "s", "limit": 3, "prompt": {"text": "é"}}


def cell(channel: str = "lcf", control: str = MATCHED, **settings: Any) -> Cell:
    return Cell("arc-c", channel, control, {**SETTINGS, **settings})


def made(of: Cell, right: list[bool], **fields: Any) -> list[Prediction]:
    return [
        Prediction(f"q{i}", of.set, of.channel, of.control, "AB"[i % 2], correct=found, **fields)
        for i, found in enumerate(right)
    ]


def test_lines_come_back_and_join(tmp_path: Path) -> None:
    store = PredictionStore(tmp_path / "run")
    assert store.read() == []
    first, second = cell(), cell("none")
    one = made(first, [True, False], timings={"first_token": 0.25, "end": 0.5}, sent=7168)
    two = [
        Prediction("q1", "arc-c", "none", MATCHED, "a\nb\u2028\ud800", em=0.0, f1=0.4),
        Prediction("q0", "arc-c", "none", MATCHED, "", em=1, f1=1),
    ]
    store.append(first, one)
    store.append(second, two)
    assert store.read() == PredictionStore(tmp_path / "run").read() == [*one, *two]
    rows = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert [(row["set"], row["id"], row["channel"], row["correct"], row["f1"]) for row in rows] == [
        ("arc-c", "q0", "lcf", True, None),
        ("arc-c", "q1", "lcf", False, None),
        ("arc-c", "q1", "none", None, 0.4),
        ("arc-c", "q0", "none", None, 1),
    ]
    assert rows[0]["timings"] == {"first_token": 0.25, "end": 0.5}
    assert rows[0]["sent"] == 7168
    assert [p.score for p in [*one, *two]] == [1, 0, 0.4, 1]


def test_a_finished_cell_is_known(tmp_path: Path) -> None:
    store = PredictionStore(tmp_path)
    assert not store.is_finished(cell())
    store.append(cell(), made(cell(), [True]))
    again = PredictionStore(tmp_path)
    assert again.is_finished(cell())
    assert again.is_finished(Cell("arc-c", "lcf", MATCHED, dict(reversed(SETTINGS.items()))))
    for other in (cell("lcf_x"), cell(control=MISMATCHED), Cell("mmlu-pro", "lcf", MATCHED, SETTINGS)):
        assert not again.is_finished(other)
    with pytest.raises(EvaluationError, match="not finished"):
        again.append(cell(), made(cell(), [True]))
    with pytest.raises(EvaluationError, match=r"limit: 5 instead of 3$") as caught:
        again.is_finished(cell(limit=5))
    assert "another folder" in caught.value.expected
    with pytest.raises(EvaluationError, match="settings"):
        again.append(cell(limit=5), made(cell(), [True]))
    with pytest.raises(EvaluationError, match="JSON"):
        store.is_finished(cell(limit={1}))
    assert len(PredictionStore(tmp_path).read()) == 1


def test_digests_are_of_the_settings_alone() -> None:
    text = r'{"limit": 3, "prompt": {"text": "\u00e9"}, "receiver": "r", "sharer": "s"}'  # in every version
    expected = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    assert cell().digest == cell("none", MISMATCHED).digest == expected
    assert cell(limit=4).digest != cell().digest
    assert cell(prompt={"text": "e"}).digest != cell().digest


def test_a_cell_that_was_cut_short_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = PredictionStore(tmp_path)
    store.append(cell("none"), made(cell("none"), [False, False]))

    def full(*_: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_whole", full)
        with pytest.raises(OSError, match="no space"):
            store.append(cell(), made(cell(), [True, True, True]))
    assert not store.is_finished(cell())
    for opened in (store, PredictionStore(tmp_path)):
        assert not opened.is_finished(cell())
        assert len(opened.read()) == 2
    # Whatever stands behind the last whole cell goes.
    with open(tmp_path / "predictions.jsonl", "ab") as file:
        file.write(b'{"id": "q9", "set": "ar')
    again = PredictionStore(tmp_path)
    again.append(cell(), made(cell(), [True]))
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 3
    assert [p.correct for p in PredictionStore(tmp_path).read()] == [False, False, True]


WORKER = """
import sys
from lcf_fast.evaluation.predictions import Cell, Prediction, PredictionStore
store = PredictionStore(sys.argv[1])
for number in range(10_000):
    cell = Cell("s", f"c{number}", "matched", {})
    if not store.is_finished(cell):
        made = [Prediction(f"q{i}", "s", f"c{number}", "matched", "x" * 200, correct=True) for i in range(50)]
        store.append(cell, made)
    print(number, flush=True)
"""


def test_a_killed_run_leaves_whole_cells(tmp_path: Path) -> None:
    told = 0
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if int(line) >= told + 10:
                    told = int(line)
                    break
            process.send_signal(signal.SIGKILL)
        store = PredictionStore(tmp_path)
        cells = [p.channel for p in store.read()]
        whole = len(cells) // 50
        assert whole >= told
        assert cells == [f"c{number}" for number in range(whole) for _ in range(50)]


def test_damage_is_named(tmp_path: Path) -> None:
    store = PredictionStore(tmp_path)
    store.append(cell(), made(cell(), [True, False]))
    lines, index = tmp_path / "predictions.jsonl", tmp_path / "cells.json"
    data, whole = lines.read_bytes(), index.read_bytes()
    lines.write_bytes(data.replace(b"true", b"null"))
    with pytest.raises(EvaluationError, match="other lines"):
        PredictionStore(tmp_path).read()
    lines.write_bytes(data[:-5])
    with pytest.raises(EvaluationError, match=f"{len(data) - 5} bytes of {len(data)}"):
        PredictionStore(tmp_path)
    lines.unlink()
    with pytest.raises(EvaluationError, match="0 bytes of"):
        PredictionStore(tmp_path)
    lines.write_bytes(data)
    for broken in (
        b"{",
        b"[]",
        b'{"format": 2, "cells": []}',
        b'{"format": 1}',
        whole.replace(b'"start": 0', b'"start": 3'),
    ):
        index.write_bytes(broken)
        with pytest.raises(EvaluationError, match="another folder"):
            PredictionStore(tmp_path)
    index.write_bytes(whole)
    assert len(PredictionStore(tmp_path).read()) == 2


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    one, two = PredictionStore(tmp_path), PredictionStore(tmp_path)
    one.append(cell("none"), made(cell("none"), [True]))
    with pytest.raises(EvaluationError, match="one run at a time"):
        two.append(cell(), made(cell(), [True]))
    assert len(os.listdir(tmp_path)) == 2
    assert len(PredictionStore(tmp_path).read()) == 1


def test_cells_that_are_refused(tmp_path: Path) -> None:
    store = PredictionStore(tmp_path / "run")
    with pytest.raises(EvaluationError):
        store.append(cell(), [])
    with pytest.raises(EvaluationError, match="one of arc-c/lcf/matched"):
        store.append(cell(), made(cell("none"), [True]))
    with pytest.raises(EvaluationError, match="'q0' twice"):
        store.append(cell(), made(cell(), [True]) * 2)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"correct": True, "f1": 1.0, "em": 1.0},
        {"em": 1.0},
        {"f1": 1.0},
        {"em": 0.0, "f1": 1.5},
        {"em": 0.0, "f1": float("nan")},
        {"correct": True, "control": "other"},
        {"correct": True, "sent": -1},
        {"correct": True, "timings": {"end": float("inf")}},
    ],
)
def test_predictions_that_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(EvaluationError):
        Prediction(**{"id": "q", "set": "s", "channel": "c", "control": MATCHED, "prediction": "A", **fields})


def test_pairs_are_of_the_same_questions() -> None:
    ours, others = cell(), cell(control=MISMATCHED)
    matched, mismatched = made(ours, [True, True, False]), made(others, [False, True, True])
    everything = [*matched, *reversed(mismatched), *made(Cell("mmlu-pro", "lcf", MATCHED, {}), [False])]
    pair = paired_scores(everything, "arc-c", ("lcf", MATCHED), ("lcf", MISMATCHED))
    assert pair == ([1, 1, 0], [0, 1, 1])
    with pytest.raises(EvaluationError, match=r"3 and 2, of which 1 are in one alone \(q2"):
        paired_scores([*matched, *mismatched[:2]], "arc-c", ("lcf", MATCHED), ("lcf", MISMATCHED))
    with pytest.raises(EvaluationError, match="arc-c/c2c/matched"):
        paired_scores(everything, "arc-c", ("lcf", MATCHED), ("c2c", MATCHED))
