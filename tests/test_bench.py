"""The main job: its gate on errors, its files, and one small run from end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_jobs import BY_NAME, CPU, ROW, AsOnGpu, small_job, two_models

from bench import c2c, cases, errors, models, report, runner, table, timing, variants
from bench import interpreted as interpreted_check
from bench.__main__ import main
from bench.rows import add_speedups, add_time
from bench.settings import default_settings
from helpers import Geometry, make_cache
from lcf_fast import CacheGeometry, architectures, ops, reference

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# --- another method


def test_c2c_edits_the_receiver_alike_both_ways() -> None:
    sharer, receiver = Geometry(4, 2, 16), Geometry(5, 3, 8)
    sides = CacheGeometry(*sharer), CacheGeometry(*receiver)
    fuser = c2c.make_fuser(*sides, 2, device=CPU, dtype=torch.float32, hidden=32, intermediate=24)
    heard, own = make_cache(sharer, 2, 5), make_cache(receiver, 2, 5)
    kept = [(key.clone(), value.clone()) for key, value in own]
    found, released = c2c.fuse(fuser, heard, own), c2c.fuse_as_released(fuser, heard, own)
    assert len(found) == len(released) == 2
    for ours, theirs, before, was in zip(found, released, own, kept):
        for one, other, old, left in zip(ours, theirs, before, was):
            assert one.shape == old.shape and float((one - old).abs().max()) > 1e-3
            torch.testing.assert_close(one, other)
            assert torch.equal(old, left), "the receiver's own cache was edited"


# --- models and text


def test_the_text_is_long_enough_and_cut_at_paragraphs() -> None:
    parts = models.paragraphs()
    assert sum(len(part.split()) for part in parts) > 2000
    source = models.Source(_model_with_vocabulary(models.BYTES), None, cases.QWEN3, "")
    ids, offsets = models.tokenize(source, parts, 1200)
    assert len(ids) == 1200 and offsets[0] == 0 and offsets[-1] == 1200
    assert offsets[1] == len((parts[0] + "\n\n").encode())
    assert bytes(ids[: offsets[1]]).decode() == parts[0] + "\n\n"
    ids, offsets = models.tokenize(source, parts[:1], 3 * offsets[1] + 5)  # the text again from its start
    assert offsets[2] == 2 * offsets[1] and len(offsets) == 5


def _model_with_vocabulary(size: int) -> Any:
    config = type("Config", (), {"get_text_config": lambda self: self, "vocab_size": size})()
    return type("Model", (), {"config": config})()


def test_the_published_architectures() -> None:
    transformers = pytest.importorskip("transformers")
    for role, geometry in (("sharer", cases.QWEN25), ("receiver", cases.QWEN3)):
        config = architectures.published_config(role, vocabulary=models.BYTES)
        assert CacheGeometry.of(config) == geometry
        with torch.device("meta"):
            body = transformers.AutoModel.from_config(config)
        # The published totals, less the embedding that is cut to the bytes: 494.0M and 596.0M.
        cut = (architectures.PUBLISHED_VOCABULARY - models.BYTES) * config.hidden_size
        total = sum(parameter.numel() for parameter in body.parameters()) + cut
        assert total == {"qwen2": 494_032_768, "qwen3": 596_049_920}[config.model_type]


# --- the gate on errors


def test_the_budget_is_held_for_every_tensor() -> None:
    truth = [torch.linspace(-1, 1, 1000, dtype=torch.float64), torch.ones(10, dtype=torch.float64)]
    plain = [tensor.float() for tensor in truth]
    assert errors.judge(plain, truth, plain).within
    off = [plain[0], plain[1] + 1e-5]
    judgement = errors.judge(off, truth, plain)
    assert not judgement.within and judgement.used > 1
    for bad in (float("nan"), float("inf")):
        hurt = [plain[0].clone(), plain[1]]
        hurt[0][3] = bad
        judgement = errors.judge(hurt, truth, plain)
        assert not judgement.within
        json.dumps(judgement.to_dict(), allow_nan=False)
    assert not errors.judge(plain[:1], truth, plain).within


@pytest.mark.parametrize(("ulps", "as_ours", "as_a_baseline"), [(1, True, True), (6, False, True), (12, False, False)])
def test_a_baseline_may_be_off_by_eight_units_in_the_last_place(ulps: int, as_ours: bool, as_a_baseline: bool) -> None:
    truth = [torch.linspace(1, 2, 1000, dtype=torch.float64)]
    plain = [truth[0].float()]
    off = [plain[0] + ulps * torch.finfo(torch.float32).eps * plain[0]]
    assert errors.judge(off, truth, plain).within is as_ours
    assert errors.judge(off, truth, plain, baseline_dtype=torch.float32).within is as_a_baseline


def test_one_large_error_is_not_averaged_away() -> None:
    truth = [torch.linspace(-1, 1, 10**6, dtype=torch.float64)]
    plain = [truth[0].float()]
    hurt = [plain[0].clone()]
    hurt[0][5] += 1e-5
    judgement = errors.judge(hurt, truth, plain)
    assert judgement.rel_rms < 1e-7 and not judgement.within


@pytest.mark.parametrize("group", sorted(BY_NAME))
def test_every_case_is_judged_and_timed(group: str) -> None:
    rows = small_job(group).rows()
    ours = [row for row in rows if row["kind"] == "ours"]
    assert [row["op"] for row in ours] == [case.name for case in cases.cases_of(BY_NAME[group])]
    for row in rows:
        assert (row["time"] is None) == (row["reason"] is not None)
        if row["variant"] == "torch.compile":
            assert row["time"] is None and row["reason"].startswith("not run")
        else:
            assert row["time"]["low_ms"] <= row["time"]["median_ms"] <= row["time"]["high_ms"]
            assert row["kind"] == "other" or row["within"] is True, row
    assert all(row["speedup"] > 0 and row["copy_share"] > 0 for row in ours)
    json.dumps(rows, allow_nan=False)


def test_training_is_judged_by_every_gradient_and_says_what_it_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {row["variant"]: row for row in small_job("train").rows()}
    ours, eager = rows["fuse_layers (train)"], rows["reference (eager)"]
    assert ours["within"] and ours["time"]
    assert ours["saved_mb"] == eager["saved_mb"] > 0  # on a CPU both are the reference under autograd
    right = reference.rms_norm
    monkeypatch.setattr(variants.ops, "fuse_layers", lambda *a, live: _doubled(right, monkeypatch, *a))
    assert small_job("train").rows()[0]["within"] is False


def _doubled(right: Any, monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> Any:
    """A forward pass that is right and whose norms' gradient is twice what it should be."""

    def norm(z: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
        return right(z, 2 * scale - scale.detach(), eps)

    with monkeypatch.context() as patch:
        patch.setattr(reference, "rms_norm", norm)
        return reference.fuse_layers(*arguments)


@pytest.mark.parametrize("group", ["lcf", "pool", "injection", "summarize", "merge"])
def test_rows_of_a_gpu_are_cold_and_hot_and_graphed(group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def graphed(calls: list[Any]) -> list[Any]:
        seen.append(len(calls))
        return list(calls)

    monkeypatch.setattr(timing, "l2_bytes", lambda device: 2_000_000)
    monkeypatch.setattr(timing, "graphed", graphed)
    for name, value in (("host_us", 12.5), ("peak_mb", 1.5)):
        monkeypatch.setattr(timing, name, lambda call, value=value: value)
    job = small_job(group, AsOnGpu)
    rows = job.rows()
    assert min(seen) > 1, "inputs are not rotated"
    timed = [row for row in rows if row["time"]]
    graphs = [row for row in timed if row["variant"].endswith(", CUDA graph")]
    # What copies from or to the host: no graph can.
    single = [row for row in timed if cases.AS_RELEASED in row["variant"] or row["variant"] == "adapter.extend"]
    assert len(single) == (group in ("lcf", "summarize")) and len(timed) - len(single) == 2 * len(graphs) >= 4
    for row in timed:
        assert row["time"]["regime"] == "cold" and row["time_hot"]["median_ms"] > 0 and row["host_us"] == 12.5
        assert row["kernels"] is None and row["peak_mb"] == (None if row in graphs else 1.5)
    counted = runner.Found(counts=job.counts)
    monkeypatch.setattr(timing, "kernels_launched", lambda call: 3)
    runner._count(replace(job.settings, stop_after=-60.0), counted, runner.Silent(), started=time.perf_counter())
    assert all(row["kernels"] is None for row in timed), "no time is left"
    runner._count(job.settings, counted, runner.Silent(), started=time.perf_counter())
    assert all(row["kernels"] == (None if row in graphs else 3) for row in timed)
    assert all(row["speedup"] and row["within"] for row in timed if row["kind"] == "ours")
    json.dumps(rows, allow_nan=False)


@pytest.fixture
def timed_by_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's path, on which a variant takes as many milliseconds as it has sets of inputs."""

    def measure(calls: dict[str, list[Any]], **_: Any) -> dict[str, timing.Timing]:
        return {name: timing.Timing.of([float(len(some))]) for name, some in calls.items()}

    monkeypatch.setattr(timing, "measure", measure)
    monkeypatch.setattr(timing, "l2_bytes", lambda device: 400_000)
    monkeypatch.setattr(timing, "graphed", list)
    for name in ("host_us", "peak_mb"):
        monkeypatch.setattr(timing, name, lambda call: None)


@pytest.mark.usefixtures("timed_by_sets")
def test_cold_times_are_of_many_sets_of_inputs_and_hot_ones_of_one() -> None:
    job = small_job("pool", AsOnGpu)
    read_and_written = cases.cases_of(job.group)[0].work(job.shape).bytes
    timed = [row for row in job.rows() if row["time"]]
    assert timed and all(row["time_hot"]["median_ms"] == 1 for row in timed)
    assert {row["time"]["median_ms"] for row in timed} == {timing.rotation_sets(read_and_written // 2, 400_000)} != {1}
    assert {row["layers"] for row in timed} == {1}, "as the op's bytes are"


@pytest.mark.usefixtures("timed_by_sets")
def test_what_is_compiled_is_timed_and_its_kernels_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """By then its code is gone, and what would be counted is its compiling."""
    modes: list[str | None] = []

    def compiled(group: str, mode: str | None) -> Any:
        modes.append(mode)
        return variants.REFERENCE[group]

    monkeypatch.setattr("bench.job.compiled", compiled)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    job = small_job("inject", AsOnGpu, compile_until=1e9)
    timed = [row["variant"] for row in job.rows() if row["time"]]
    assert modes == [None, "max-autotune-no-cudagraphs"]
    plain = [name for name in timed if not name.endswith(", CUDA graph")]
    assert {"torch.compile", "torch.compile max-autotune"} < {*plain}
    assert [row["variant"] for row, _ in job.counts] == [name for name in plain if "torch.compile" not in name]


@pytest.mark.parametrize(("hurry_after", "how"), [(1e12, {"seconds": 0.05}), (-1.0, {"seconds": 0.0, "least": 2})])
def test_a_late_run_takes_two_samples(hurry_after: float, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def measure(calls: Any, device: torch.device, **given: Any) -> dict[str, timing.Timing]:
        asked.append(given)
        return {}

    monkeypatch.setattr(timing, "measure", measure)
    small_job("pool", hurry_after=hurry_after).rows()
    assert asked == [how]


def test_what_cannot_be_captured_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(calls: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(timing, "l2_bytes", lambda device: 1)
    monkeypatch.setattr(timing, "graphed", fails)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for name in ("host_us", "kernels_launched", "peak_mb"):
        monkeypatch.setattr(timing, name, lambda call: None)
    rows = small_job("projection", AsOnGpu).rows()
    graphs = [row for row in rows if row["variant"].endswith(", CUDA graph")]
    assert len(graphs) == 2 and all(row["time"] is None for row in graphs)
    assert graphs[0]["reason"] == "not captured: operation not permitted when stream is capturing"
    assert all(row["time"]["regime"] == "cold" and row["time_hot"] is None for row in rows if row["time"])


def test_what_is_out_of_bounds_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four units in the last place, which a baseline might be off by."""
    right = ops.gated_injection
    monkeypatch.setattr(ops, "gated_injection", lambda *a, **k: tuple(x * (1 + 5e-7) for x in right(*a, **k)))
    rows = small_job("injection").rows()
    (ours,) = (row for row in rows if row["kind"] == "ours")
    assert ours["within"] is False and ours["time"] is None and ours["gb_s"] is None and ours["speedup"] is None
    assert ours["error"]["used"] > 1 and ours["reason"].startswith("no time")
    assert next(row for row in rows if row["kind"] == "reference")["time"] is not None
    assert report.cells(ours, report.COLUMNS)[2] == "–"


def test_a_loss_is_a_loss() -> None:
    def row(kind: str, name: str, ms: float) -> dict[str, Any]:
        return {"kind": kind, "variant": name, "time": {"median_ms": ms}}

    rows = [row("ours", "op", 4.0), row("reference", "naive", 8.0), row("baseline", "fast", 2.0)]
    rows.append(row("other", "C2C", 1.0))
    add_speedups(rows)
    assert rows[0]["speedup"] == 0.5 and rows[0]["against"] == "fast" and rows[0]["speedup_reference"] == 2.0


HEADLINE = {
    "kind": "ours", "group": "lcf", "op": "adapter.fuse", "variant": "adapter.fuse", "tokens": 512, "layers": 28,
    "bottleneck": 128, "batch": 1, "dtype": "float32", "speedup_reference": 1.2, "within": True,
}  # fmt: skip


def test_the_targets_of_a_cpu_are_of_its_headline_rows() -> None:
    settings = default_settings(CPU, quick=True)
    for reached, met in ((1.2, True), (1.19, False), (None, False)):
        (found,) = runner._targets([HEADLINE | {"speedup_reference": reached}], settings)
        assert (found["op"], found["target"], found["reached"], found["met"]) == ("adapter.fuse", 1.2, reached, met)
    other = {"kind": "reference", "group": "pool", "tokens": 128, "layers": 9, "bottleneck": 64, "batch": 2}
    others = [HEADLINE | {name: value} for name, value in {**other, "dtype": "float16"}.items()]
    assert runner._targets(others, settings) == []
    assert runner._targets([HEADLINE], default_settings(torch.device("cuda"), quick=True)) == []


def test_a_baseline_that_is_out_of_bounds_is_no_failure_of_ours() -> None:
    rows = [HEADLINE | {"within": False}, HEADLINE | {"kind": "baseline", "variant": "SDPA", "within": False}]
    found = runner._found(default_settings(CPU, quick=True), runner.Found(rows={0: rows}), [], [])
    assert found["failures"] == ["adapter.fuse, 512 tokens"]


def test_rates_are_those_of_the_median_time() -> None:
    row: dict[str, Any] = {"bytes": 3_000_000_000, "flops": 4_000_000_000_000}
    add_time(row, timing.Timing(2.0, 1.0, 4.0, 5), "cold", 1000.0)
    assert (row["gb_s"], row["copy_share"], row["tflop_s"]) == pytest.approx((1500.0, 1.5, 2000.0))
    assert row["time"] == {"median_ms": 2.0, "low_ms": 1.0, "high_ms": 4.0, "samples": 5, "regime": "cold"}


def test_sdpa_pools_the_same() -> None:
    job = small_job("summarize")
    truth = variants.flatten(variants.REFERENCE["summarize"](job.operands.double()), job.operands.kept)
    sdpa = next(one for one in variants.baselines("summarize", job.operands) if one.name == "SDPA")
    for got, exact in zip(variants.flatten(sdpa.run(job.operands), job.operands.kept), truth):
        torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-5)


# --- the whole


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text and "--quick" in text and "adapter.fuse" in text


def test_cuda_is_refused_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["--device", "cuda"]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err


def test_a_file_in_the_folders_place_is_found_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bench.runner.run", None)  # would raise if it were called
    (tmp_path / "out").write_text("mine")
    for out in (tmp_path / "out", tmp_path / "out" / "below"):
        assert main(["--device", "cpu", "--out", str(out)]) == 2
        assert capsys.readouterr().err.startswith(f"bench: --out {out}: ")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    pytest.importorskip("transformers")
    return two_models(tmp_path_factory.mktemp("models"))


def arguments(tiny: tuple[str, str], out: Path, *more: str) -> list[str]:
    sharer, receiver = tiny
    given = ["--quick", "--device", "cpu", "--tokens", "24", "--context", "40", "--bottleneck", "64"]
    return [*given, "--sharer", sharer, "--receiver", receiver, "--out", str(out), *more]


def test_a_broken_op_fails_the_job(
    tiny: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bench.interpreted.start", lambda *a, **k: None)
    right = ops.attention_pool
    monkeypatch.setattr(ops, "attention_pool", lambda *a, **k: right(*a, **k)[::-1])  # key and value swapped
    assert main(arguments(tiny, tmp_path, "--only", "attention_pool")) == 1
    printed = capsys.readouterr().out
    assert "OUT OF BOUNDS: attention_pool, 40 tokens" in printed
    (line,) = (line for line in printed.splitlines() if line.startswith("  attention_pool"))
    assert line.split()[2] == "✗" and line.split()[3] == "–" and len(line.split()) == 4, line
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert results["failures"] == ["attention_pool, 40 tokens"]
    (ours,) = (row for row in results["rows"] if row["kind"] == "ours")
    assert ours["time"] is None and ours["error"]["rel_rms"] > 0.1


def test_stopped_in_its_last_step_it_writes_what_was_measured(
    tiny: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bench.interpreted.start", lambda *a, **k: None)
    monkeypatch.setattr("bench.wire.rows", stop)
    assert main(arguments(tiny, tmp_path, "--only", "attention_pool", "encode")) == 1
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [row["variant"] for row in results["rows"] if row["kind"] == "ours"] == ["attention_pool"]
    assert results["failures"] == []
    assert [(one["group"], one["why"]) for one in results["left_out"]] == [("encode", "interrupted")]


ABOUT = {"commit", "device", "device_type", "driver", "torch", "triton", "transformers", "python", "threads"}


def test_the_job_from_end_to_end(tiny: tuple[str, str], tmp_path: Path) -> None:
    """As a user starts it, interpreter and all."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    only = ["fuse_layers", "gated_injection", "adapter.extend", "slots.append (k = 8)", "decode"]
    done = subprocess.run(
        [sys.executable, "-m", "bench", *arguments(tiny, tmp_path / "out", "--only", *only)],
        cwd=ROOT,
        env={**environment, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    files = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert files == ["cpu.json", "plot.png", "results.json"]
    text = (tmp_path / "out" / "results.json").read_text(encoding="utf-8")
    assert str(tmp_path) not in text and str(ROOT) not in text and tiny[0] not in text
    results = json.loads(text)
    assert results["schema"] == 1 and set(results["about"]) >= ABOUT
    assert results["failures"] == [] and results["copy_gb_s"] > 0
    ops_run = {row["op"] for row in results["rows"] if row["kind"] == "ours"}
    assert ops_run == {*only[:4], "Message.from_bytes"}
    assert all(set(row) == ROW for row in results["rows"])
    interpreted = results["interpreted"]
    checked = [case for group in cases.GROUPS for case in interpreted_check.checked_cases(group, everything=False)]
    assert [one["op"] for one in interpreted] == [case.name for case in checked]
    assert all(one["within"] is True for one in interpreted), interpreted
    assert "speed-up" in done.stdout and "within bounds" in done.stdout
    png = (tmp_path / "out" / "plot.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 10_000
    printed_error = done.stdout.split("  fuse_layers ")[1].split()[0]
    section = table.section(results)
    assert f"| `fuse_layers` | 3 | 24 | 64 | {printed_error} |" in section
    for name in ("adapter.extend", "slots.append (k = 8)", "Message.from_bytes"):
        note = next(case.note for case in cases.CASES + cases.HOST_CASES if case.name == name)
        assert section.count(f"`{name}`: {note}.") == 1 and done.stdout.count(note) == 1
    assert "message from bytes, on the CPU, all layers (3): N = 40 in" in done.stdout


# --- the README's table


def test_the_readme_holds_what_the_generator_makes() -> None:
    files = sorted((ROOT / "bench" / "results").glob("*.json"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert files and table.replaced(readme, table.table(files)) == readme, f"run: {table.COMMAND}"


def test_committed_results_name_no_machine() -> None:
    for file in (ROOT / "bench" / "results").glob("*.json"):
        text = file.read_text(encoding="utf-8")
        assert not any(mark in text for mark in ('"/', " /", "~/", "hostname")), file
        assert json.loads(text)["failures"] == []


@pytest.mark.parametrize("content", [None, "{", "[]", '{"cells": []}', '{"sets": []}'])
def test_what_is_no_result_is_refused_by_name(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "some.json"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    assert table.main([str(file)]) == 1
    printed = capsys.readouterr()
    assert str(file) in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_a_table_says_that_its_commit_is_not_all() -> None:
    results = json.loads((ROOT / "bench" / "results" / "cpu.json").read_text(encoding="utf-8"))
    assert "uncommitted" not in table.section(results)
    results["about"]["uncommitted_changes"] = True
    assert f"commit {results['about']['commit'][:12]} with uncommitted changes;" in table.section(results)


def test_the_fastest_other_way_is_the_one_at_the_same_size() -> None:
    size = {"group": "lcf", "tokens": 8, "batch": 2, "context": 5, "bottleneck": 64, "dtype": "float32"}
    right = {**size, "variant": "fast", "time": {"median_ms": 1.5}}
    changes = {"group": "lcfx", "tokens": 9, "batch": 3, "context": 6, "bottleneck": 65, "dtype": "bfloat16"}
    others = [{**right, name: value, "time": {"median_ms": 9.0}} for name, value in changes.items()]
    rows = [*others, {**right, "variant": "slow"}, right]
    assert table._fastest({**size, "against": "fast"}, rows) == "fast, 1.5"


def test_a_target_that_is_missed_is_called_so() -> None:
    results = json.loads((ROOT / "bench" / "results" / "cpu.json").read_text(encoding="utf-8"))
    target = {"target": 3, "op": "lcf", "tokens": 8, "layers": 2}
    missed = [{**target, "reached": reached, "met": False} for reached in (None, 2.5)]
    results["targets"] = [*missed, {**target, "reached": 3.5, "met": True}]
    text = table.section(results)
    for said in ("not measured, **missed**.", "2.50×, **missed**.", "3.50×."):
        assert f"8 tokens, 2 layers: {said}" in text


def test_markers_must_be_there() -> None:
    assert table.replaced(f"a\n{table.BEGIN}\nold\n{table.END}\nz", "new") == f"a\n{table.BEGIN}\nnew\n{table.END}\nz"
    for text in ("none", table.BEGIN, f"{table.END}{table.BEGIN}", f"{table.BEGIN}{table.BEGIN}{table.END}"):
        with pytest.raises(ValueError, match="expected"):
            table.replaced(text, "new")
