"""Tables of README and docs/ are those of the committed results; what makes them leaves the rest of a page alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import published, targets
from bench.cases import QWEN3
from bench.targets import OVER_FLOOR
from lcf_fast import LCFConfig

pytest.importorskip("transformers")


@pytest.mark.parametrize("region", published.REGIONS, ids=lambda region: region.name)
def test_a_table_is_that_of_its_results(region: published.Region) -> None:
    text = (published.ROOT / region.page).read_text(encoding="utf-8")
    assert region.written(text) == text, f"run: {published.COMMAND}"
    begin, end = (f"<!-- {region.name}:{word} -->" for word in ("begin", "end"))
    table = text.partition(begin)[2].partition(end)[0]
    assert table.count("\n|") > 3
    cleared = text.replace(table, "\nold\n")
    assert region.written(cleared) == text


def test_a_table_without_results_is_refused() -> None:
    region = replace(published.REGIONS[0], result="evaluation/no-such-*.json")
    with pytest.raises(ValueError, match="expected bench/results/evaluation/no-such"):
        region.written((published.ROOT / region.page).read_text(encoding="utf-8"))


def test_results_add_to_those_of_the_same_commit_and_versions_alone() -> None:
    about = {"commit": "a", "torch": "1", "triton": "2", "driver": "3"}
    assert published._are_alike(about, {**about, "driver": "4"})
    assert not any(published._are_alike(about, {**about, name: "5"}) for name in ("commit", "torch", "triton"))


def test_every_result_is_published() -> None:
    folder = published.ROOT / "bench" / "results" / "evaluation"
    shown = [path for region in published.REGIONS for path in region.files(published.RESULTS)]
    assert sorted(folder.iterdir()) == sorted(shown)


def test_the_first_table_has_the_figures_of_the_study() -> None:
    """README's row of right answers, by number of facts: LCF-X, then slots."""
    study = json.loads((published.ROOT / "bench/results/evaluation/slots.json").read_text(encoding="utf-8"))

    def means(method: str) -> str:
        cells = [cell for cell in study["cells"] if cell["method"] == method]
        assert len(cells) == 5
        shares = [100 * sum(cell["matched"][n] / cell["items"] for cell in cells) / 5 for n in ("1", "4", "8")]
        return " / ".join(f"{share:.1f}".replace("100.0", "100") for share in shares)

    readme = (published.ROOT / "README.md").read_text(encoding="utf-8")
    (row,) = (line for line in readme.splitlines() if line.startswith("| right answers of small agents"))
    slots = f"{means('slots_8')}% (k = 8); {means('slots_1_per_span')}% (k = 1 for each fact)"
    assert f"| {means('lcf')}%, out of place | {means('lcf_x')}% | {slots} |" in row
    parameters = {LCFConfig(QWEN3, QWEN3).parameter_count(), LCFConfig(QWEN3, QWEN3, slots=8).parameter_count()}
    assert all(f"{count:,}" in readme for count in parameters)


def test_the_slots_guide_has_the_times_of_the_main_job() -> None:
    """What it says beside its tables of two cores: README's table is made anew of other results, a sentence is not."""
    data = json.loads((published.RESULTS / "cpu.json").read_text(encoding="utf-8"))
    ours = {row["op"]: row for row in data["rows"] if (row["kind"], row["tokens"]) == ("ours", 2048)}
    message, delivery, edit = (ours[op] for op in ("slots.summarize (k = 8)", "slots.place (k = 8)", "adapter.inject"))
    times = [f"{row['time']['median_ms']:.3g} ms" for row in (message, delivery, edit)]
    page = " ".join((published.ROOT / "docs" / "slots.md").read_text(encoding="utf-8").split())
    assert (data["about"]["threads"], message["dtype"], message["against"]) == (2, "float32", "SDPA")
    assert "Intel" in data["about"]["device"] and "Xeon" in data["about"]["device"]
    assert (
        "On two cores of an Intel Xeon, in float32 (README's table): a message of 2,048 tokens"
        f" {times[0]}, which is {message['speedup']:.2f} times as fast as scaled dot-product attention, the fastest"
        f" other way; delivery {times[1]}, where LCF-X's edit of 2,048 positions takes {times[2]}." in page
    )


# --- what make gpu leaves


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the pages and results."""
    root = tmp_path / "repository"
    for page in {"README.md", "bench/NOTES.md", *(region.page for region in published.REGIONS)}:
        (root / page).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(published.ROOT / page, root / page)
    shutil.copytree(published.RESULTS, root / "bench" / "results")
    monkeypatch.setattr(published, "ROOT", root)
    monkeypatch.setattr(published, "RESULTS", root / "bench" / "results")
    monkeypatch.setattr(published, "NOTES", root / "bench" / "NOTES.md")
    return root


def as_of_a_gpu(source: Path, **more: Any) -> dict[str, Any]:
    """Committed results of the CPU as if a GPU had given them: made up, and never written to the repository."""
    data: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
    for about in [data["about"]] if "about" in data else [cell["about"] for cell in data["cells"]]:
        about |= {"device": "Made-up GPU", "device_type": "cuda", "driver": "1"}
    return data | more


def left_by_make_gpu(out: Path, results: Path) -> None:
    rates = {"matmul_tflop_s": 9.0, "left_out": []}
    main = as_of_a_gpu(results / "cpu.json", **rates)
    main["rows"] = [row for row in main["rows"] if row["group"] in ("lcf", "pool")]
    sweep = as_of_a_gpu(results / "cpu.json", **rates)
    sweep["rows"] = [row for row in sweep["rows"] if row["group"] in ("lcf", "inject")]
    sweep["settings"]["sweep"] = True
    latency = as_of_a_gpu(results / "evaluation" / "latency-cpu.json")
    steps = [{"step": "gpu", "status": "passed", "seconds": 9.5, "note": "at /somewhere/tests: 60 passed"}]
    summary = {"about": {"gpu": "Made-up GPU", "commit": "a"}, "steps": steps}
    parts = {"bench/results": main, "sweep/results": sweep, "latency/latency": latency, "summary": summary}
    for name, data in parts.items():
        file = out / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(data), encoding="utf-8")


def contents(root: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in root.rglob("*") if file.is_file()}


def test_one_command_takes_what_make_gpu_left(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    out, results = tmp_path / "gpu", repository / "bench" / "results"
    left_by_make_gpu(out, results)
    assert published.main([str(out)]) == 0
    printed = capsys.readouterr().out
    names = ("made-up-gpu.json", "made-up-gpu.svg", "made-up-gpu-sweep.json", "made-up-gpu-sweep.svg")
    assert all((results / name).exists() and name in printed for name in names)
    assert (results / "evaluation" / "latency-made-up-gpu.json").exists()
    checks = json.loads((results / "checks" / "made-up-gpu.json").read_text(encoding="utf-8"))
    assert checks["steps"] == [{"step": "gpu", "status": "passed", "seconds": 9.5}]
    pages = ("README.md", "bench/NOTES.md", "docs/evaluation.md")
    readme, notes, evaluation = ((repository / page).read_text(encoding="utf-8") for page in pages)
    assert "**Made-up GPU**, float32" in readme and "| dtype | d | batch |" in readme
    assert "![Made-up GPU: times](bench/results/made-up-gpu.svg)" in readme and "made-up-gpu-sweep.svg)" in readme
    assert evaluation.count("### Cross context, batch 1\n") == 2 and "Measured on Made-up GPU" in evaluation
    assert "**Made-up GPU**" in notes and "not measured" in notes and "at 9 TFLOP/s" in notes
    assert f"open    LCF, 2,048 tokens: {OVER_FLOOR}" in printed  # the rows are float32
    drawn = (results / "made-up-gpu.svg").read_text(encoding="utf-8")
    assert "<svg" in drawn and "<dc:date>" not in drawn and "adapter.fuse" in drawn
    once = contents(repository)
    assert published.main([str(out)]) == 0
    assert contents(repository) == once


def test_a_second_folder_adds_its_steps_and_an_empty_one_is_refused(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, step, commit in (("one", "gpu", "a"), ("two", "sweep", "a"), ("three", "bench", "b")):
        (tmp_path / folder).mkdir()
        about = {"gpu": "Made-up GPU", "commit": commit}
        summary = {"about": about, "steps": [{"step": step, "status": "passed", "seconds": 1.0}]}
        (tmp_path / folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    checks = repository / "bench" / "results" / "checks" / "made-up-gpu.json"
    assert published.main([str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    assert [step["step"] for step in json.loads(checks.read_text(encoding="utf-8"))["steps"]] == ["gpu", "sweep"]
    assert published.main([str(tmp_path / "three")]) == 0
    assert [step["step"] for step in json.loads(checks.read_text(encoding="utf-8"))["steps"]] == ["bench"]

    def cell(group: str, driver: str) -> dict[str, Any]:
        about = {"device": "Made-up GPU", "device_type": "cuda", "commit": "b", "driver": driver}
        return {"group": group, "batch": 1, "about": about}

    for folder, groups, driver in (("one", ("shared", "cross"), "1"), ("two", ("cross",), "2")):
        (tmp_path / folder / "latency").mkdir()
        text = json.dumps({"format": 1, "cells": [cell(group, driver) for group in groups]})
        (tmp_path / folder / "latency" / "latency.json").write_text(text, encoding="utf-8")
        published.take(tmp_path / folder, checks.parents[1])
    latency = json.loads((checks.parents[1] / "evaluation" / "latency-made-up-gpu.json").read_text(encoding="utf-8"))
    assert latency["cells"] == [cell("shared", "1"), cell("cross", "2")] and latency["format"] == 1
    (tmp_path / "empty").mkdir()
    assert published.main([str(tmp_path / "empty")]) == 2
    assert "expected what make gpu leaves" in capsys.readouterr().err


def test_without_a_folder_nothing_changes(repository: Path) -> None:
    once = contents(repository)
    assert published.main([]) == 0
    assert contents(repository) == once and targets.committed(published.RESULTS)
