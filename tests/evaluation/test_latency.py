"""The latency protocol: turns, warm-up, figures, the record, and what is refused before any model is built."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from lcf_fast.channels.request import Answer, Request, Timings
from lcf_fast.evaluation import latency
from lcf_fast.evaluation.failures import EvaluationError
from lcf_fast.evaluation.latency import (
    PARTS,
    Protocol,
    default_protocol,
    figures,
    measure,
    read_cells,
    run_latency,
)
from lcf_fast.evaluation.latency_models import CROSS, SHARED, Group
from lcf_fast.evaluation.latency_report import latency_markdown

CPU = torch.device("cpu")
SHORT = Protocol(
    batch=2, context_tokens=10, question_tokens=3, max_new_tokens=2, rounds=3, warmup=2, brief_warmup=False
)


class Fake:
    """A channel that takes as many seconds as calls have come before it, of all channels."""

    def __init__(self, name: str, calls: list[tuple[str, int, int]], new: int | None = None) -> None:
        self.name, self.calls, self.new = name, calls, new
        reader = SimpleNamespace(ids=lambda text: text.split())
        self.receiver = SimpleNamespace(reader=reader, greedy=lambda: {"greedy": True})

    def answer(self, requests: Sequence[Request], *, max_new_tokens: int, greedy: bool) -> list[Answer]:
        assert greedy
        self.calls.append((self.name, len(requests), max_new_tokens))
        seconds = float(len(self.calls))
        ids = torch.zeros(max_new_tokens if self.new is None else self.new)
        said = 0.0 if self.name.startswith("text_") else seconds / 4
        timings = Timings(sharer=0.0, communication=said, receiver=0.0, first_token=seconds, end=2 * seconds)
        return [Answer("", ids, 7, timings) for _ in requests]

    def launches(self, requests: Sequence[Request]) -> int:
        self.calls.append((self.name, len(requests), 0))
        return 40


def fakes(
    *names: str, group: str = SHARED, calls: list[tuple[str, int, int]] | None = None, limit: int = 4096, **more: Any
) -> tuple[Group, list[str]]:
    """A group of such channels, and the names of those that were made, in order."""
    made: list[str] = []
    seen = [] if calls is None else calls

    def making(name: str) -> Callable[[], Any]:
        def make() -> Any:
            made.append(name)
            return Fake(name, seen, **more)

        return make

    settings = {"sharer": "S", "receiver": "R"}
    found = Group(group, lambda: {name: making(name) for name in names}, ("a", "b"), (50,), limit, settings)
    return found, made


def run(groups: Sequence[Group], out: Path, *protocols: Protocol, **more: Any) -> list[dict[str, Any]]:
    return run_latency(groups, protocols or (SHORT,), out, device=CPU, settings={"precision": "fp32"}, **more)


# --- turns and figures


def test_channels_take_turns_and_warm_up_does_not_count() -> None:
    calls: list[tuple[str, int, int]] = []
    group, _ = fakes("none", "text_50", "lcf", calls=calls)
    makers = group.open()
    kept = {name: make() for name, make in makers.items()}
    found = measure({name: lambda name=name: kept[name] for name in kept}, group, SHORT)  # type: ignore[misc]
    order = [name for name, _, _ in calls]
    rounds = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert len(rounds) == SHORT.warmup + SHORT.rounds
    assert all(sorted(one) == ["lcf", "none", "text_50"] for one in rounds)
    assert [one[0] for one in rounds] == ["none", "text_50", "lcf", "none", "text_50"], "always the same one first"
    assert all(call[1:] == (2, 2) for call in calls)
    for name in kept:
        counted = [i + 1 for i, one in enumerate(order) if one == name][SHORT.warmup :]
        assert found[name]["ms"]["first_token"]["median"] == 1e3 * np.median(counted)
        assert found[name]["rounds"] == 3
        slow = found["text_50"]["ms"]["first_token"]["median"]
        assert found[name]["speedups"] == {"text_50": slow / found[name]["ms"]["first_token"]["median"]}


def test_figures_are_medians_and_quartiles() -> None:
    seconds = [5.0, 1.0, 2.0, 9.0]
    times = [Timings(0.1 * s, s * s / 10, 0.2 * s, s, 2 * s) for s in seconds]
    found = figures(times, 12.5)
    assert set(found["ms"]) == set(PARTS)
    low, middle, high = np.percentile([1e3 * s for s in seconds], [25, 50, 75])
    assert found["ms"]["first_token"] == pytest.approx({"low": low, "median": middle, "high": high})
    assert found["ms"]["end"]["median"] == pytest.approx(2 * middle)
    assert found["communication_share"] == pytest.approx(np.median(seconds) / 10), "not of medians"
    assert (found["bytes"], found["launches"], found["rounds"]) == (12.5, None, 4)
    single = figures(times[:1], 0)
    assert set(single["ms"]["end"].values()) == {1e4}


def test_launches_are_counted_on_a_gpu_behind_all_that_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, int, int]] = []
    groups = [fakes("text_50", "lcf", group=name, calls=calls)[0] for name in (SHARED, CROSS)]
    monkeypatch.setattr(latency, "about", lambda device: {"device": "G", "threads": 1})
    cells = run_latency(groups, [SHORT], tmp_path, device=torch.device("cuda"))
    found = [[one["launches"] for one in cell["channels"].values()] for cell in cells]
    assert found == [[0, 40], [0, 40]] and read_cells(tmp_path / latency.RESULTS) == cells
    assert [call for call in calls if not call[2]] == calls[-2:] == [("lcf", 2, 0)] * 2
    # Of a run that was stopped before it could count.
    file = tmp_path / latency.RESULTS
    data = json.loads(file.read_text())
    data["cells"][1]["channels"]["lcf"]["launches"] = None
    file.write_text(json.dumps(data))
    made = len(calls)
    assert run_latency(groups, [SHORT], tmp_path, device=torch.device("cuda")) == cells
    assert calls[made:] == [("lcf", 2, 0)] and read_cells(file) == cells


def test_an_answer_that_ends_early_is_no_figure() -> None:
    group, _ = fakes("none", new=1)
    with pytest.raises(EvaluationError, match="answers of 2 tokens, got one of 1"):
        measure(group.open(), group, SHORT)


def test_defaults_suit_the_device_and_give_way() -> None:
    gpu = default_protocol(torch.device("cuda"), 8)
    assert gpu.context_tokens == 1000
    assert gpu.rounds >= 10
    assert gpu.warmup >= 1
    assert not gpu.brief_warmup
    cpu = [default_protocol(CPU, batch) for batch in (1, 8)]
    assert all(one.brief_warmup and one.context_tokens < 100 for one in cpu)
    given = default_protocol(CPU, 8, context_tokens=500, rounds=None, warmup=0)
    assert (given.context_tokens, given.rounds, given.warmup) == (500, cpu[1].rounds, 0)


# --- the record


def test_a_finished_cell_is_not_run_again(tmp_path: Path) -> None:
    shared, made = fakes("none", "text_50")
    cross, made_too = fakes("none", "lcf_x", group=CROSS)
    first = run([shared, cross], tmp_path)
    assert made == ["none", "text_50"], "made more than once, or both groups at a time"
    assert made_too == ["none", "lcf_x"]
    before = (tmp_path / "latency.json").read_bytes()
    assert run([shared, cross], tmp_path) == first
    assert len(made) == len(made_too) == 2
    assert (tmp_path / "latency.json").read_bytes() == before
    more = run([shared, cross], tmp_path, SHORT, replace(SHORT, batch=1))
    assert [(cell["group"], cell["batch"]) for cell in more] == [(SHARED, 2), (SHARED, 1), (CROSS, 2), (CROSS, 1)]
    assert more[0] == first[0]
    assert len(made) == 4


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    shared, made = fakes("none")
    broken, _ = fakes("none", group=CROSS, new=0)
    with pytest.raises(EvaluationError, match="answers"):
        run([shared, broken], tmp_path)
    whole, _ = fakes("none", group=CROSS)
    assert len(run([shared, whole], tmp_path)) == 2
    assert made == ["none"]


@pytest.mark.parametrize(
    ("protocol", "channels", "names"),
    [
        (replace(SHORT, rounds=4), None, "rounds: 4 instead of 3"),
        (replace(SHORT, context_tokens=11), None, "context_tokens"),
        (SHORT, ["none"], "channels"),
    ],
)
def test_other_settings_are_not_mixed_in(
    protocol: Protocol, channels: list[str] | None, names: str, tmp_path: Path
) -> None:
    group, made = fakes("none", "text_50")
    run([group], tmp_path)
    before = (tmp_path / "latency.json").read_bytes()
    with pytest.raises(EvaluationError, match=names) as caught:
        run([group], tmp_path, protocol, channels=channels)
    assert "another folder" in str(caught.value)
    assert (tmp_path / "latency.json").read_bytes() == before
    assert len(made) == 2


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 2, "cells": []}', '{"format": 1, "cells": [{}]}'])
def test_a_damaged_record_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "latency.json").write_text(text)
    group, made = fakes("none")
    with pytest.raises(EvaluationError, match="another folder"):
        run([group], tmp_path)
    assert made == []
    assert (tmp_path / "latency.json").read_text() == text


def test_the_record_says_where_and_how(tmp_path: Path) -> None:
    group, _ = fakes("none", "text_50")
    (cell,) = run([group], tmp_path)
    assert read_cells(tmp_path / "latency.json") == [cell]
    assert cell["settings"]["context_tokens"] == 10
    assert cell["settings"]["channels"] == ["none", "text_50"]
    assert {"commit", "device", "torch", "transformers", "python"} <= set(cell["about"])
    assert str(tmp_path) not in (tmp_path / "latency.json").read_text()


# --- bad input


@pytest.mark.parametrize("field", ["batch", "context_tokens", "question_tokens", "max_new_tokens", "rounds"])
def test_nothing_less_than_one(field: str) -> None:
    with pytest.raises(EvaluationError, match=f"--{field.replace('_', '-')}: expected 1 or more, got 0"):
        replace(SHORT, **cast(Any, {field: 0}))
    with pytest.raises(EvaluationError, match="--warmup"):
        replace(SHORT, warmup=-1)


def test_what_is_wrong_is_said_before_anything_is_built(tmp_path: Path) -> None:
    group, made = fakes("none", "lcf", limit=300)
    other, made_too = fakes("none", group=CROSS, limit=300)
    with pytest.raises(EvaluationError, match="some of none, lcf, got lcfx"):
        run([group, other], tmp_path, channels=["none", "lcfx"])
    with pytest.raises(EvaluationError, match="each once"):
        run([group], tmp_path, SHORT, SHORT)
    with pytest.raises(EvaluationError, match="one batch size"):
        run_latency([group], [], tmp_path, device=CPU)
    # 300 positions less 3 + 50 + 2 + 64 for the rest: one context of 181, or two of 90.
    run([fakes("none", limit=300)[0]], tmp_path / "fits", replace(SHORT, context_tokens=181))
    run([fakes("none", limit=300, group=CROSS)[0]], tmp_path / "fits", replace(SHORT, context_tokens=90))
    with pytest.raises(EvaluationError, match="181 at most") as caught:
        run([group], tmp_path, replace(SHORT, context_tokens=182))
    assert caught.value.argument == "--context-tokens"
    with pytest.raises(EvaluationError, match="90 at most"):
        run([group, other], tmp_path, replace(SHORT, context_tokens=91))
    assert made == made_too == []
    assert not (tmp_path / "latency.json").exists()


def test_a_group_without_a_wanted_channel_is_left_out(tmp_path: Path) -> None:
    shared, made = fakes("none", "lcf")
    cross, _ = fakes("none", "lcf_x", group=CROSS)
    (cell,) = run([shared, cross], tmp_path, channels=["lcf_x"])
    assert cell["group"] == CROSS
    assert list(cell["channels"]) == ["lcf_x"]
    assert made == []
    assert cell["channels"]["lcf_x"]["speedups"] == {}


# --- the table


def test_the_table_says_what_the_record_holds(tmp_path: Path) -> None:
    group, _ = fakes("none", "text_50", "c2c_as_released")
    cells = json.loads(json.dumps(run([group], tmp_path)))
    one = cells[0]["channels"]["c2c_as_released"]
    one["ms"]["first_token"]["median"], one["communication_share"], one["launches"] = 1234.5, 0.256, 2740
    lines = latency_markdown(cells).splitlines()
    (row,) = (line for line in lines if line.startswith("| `c2c_as_released`"))
    columns = [column.strip() for column in row.strip("|").split("|")]
    assert columns[1] == "—", "a part that the channel has not"
    assert columns[4] == "1,234"
    assert columns[6:9] == ["25.6", "7", "2,740"]
    assert columns[9] == f"{one['speedups']['text_50']:.2f}×"
    (header,) = (line for line in lines if line.startswith("| channel"))
    assert header.count("|") == row.count("|")
    (none,) = (line for line in lines if line.startswith("| `none`"))
    assert none.split("|")[9].strip() == "—", "launches on a CPU"
    text = "\n".join(lines)
    assert "Batch 2, contexts of 10 tokens, question 3, answer 2; 3 rounds after 2 of warm-up" in text
    assert cast(str, cells[0]["about"]["device"]) in text
