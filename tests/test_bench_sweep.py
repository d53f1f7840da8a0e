"""Batches; the plans of a run and of a sweep: what is run, what comes first, what is named; a sweep from end to end."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench_jobs import BY_NAME, CPU, ROW, AsOnGpu, small_job, two_models

from bench import cases, inputs, job, plan, runner, sweep_table, table, timing, variants, warm
from bench.__main__ import main
from bench.settings import LONGEST, SWEEPS, Settings, default_settings, sweep_settings
from helpers import Geometry, make_cache
from lcf_fast import ops
from lcf_fast.kernels import policy

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# --- batches


def test_rows_of_a_batch_are_pieces_of_the_text_and_then_the_first_again() -> None:
    long = make_cache(Geometry(2, 1, 8), 1, 25)
    whole = inputs.Caches(long, long, long, [0, 4, 9, 25])
    cut = whole.cut(10, 8, batch=3)
    assert cut.spans == [0, 4, 8]
    for (key, _), (old, _) in zip(cut.receiver, long):
        assert torch.equal(key, torch.cat([old[:, :, :10], old[:, :, 10:20], old[:, :, :10]]))
    for (_, value), (_, old) in zip(cut.context, long):
        assert torch.equal(value, torch.cat([old[:, :, start : start + 8] for start in (0, 8, 16)]))


@pytest.mark.parametrize("group", sorted(BY_NAME))
def test_every_case_serves_a_batch(group: str) -> None:
    made = small_job(group, batch=2, seconds=0.0)
    rows, one = made.rows(), small_job(group).shape
    assert all(row["batch"] == 2 for row in rows)
    for row in rows:
        assert row["kind"] == "other" or row["time"] is None or row["within"] is True, row
    ours = [row for row in rows if row["kind"] == "ours"]
    assert all(row["time"] for row in ours)
    for case, row in zip(cases.cases_of(BY_NAME[group]), ours):
        assert (row["bytes"], row["flops"]) == (case.work(made.shape).bytes, case.work(made.shape).flops)
        assert case.work(one).flops < row["flops"] <= 2 * case.work(one).flops


def test_of_long_rows_the_last_positions_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "MOST_JUDGED", 12)
    good = small_job("lcf_pruned", batch=2, seconds=0.0).rows()[0]
    assert good["within"] is True and good["error"]["rule"].endswith("the last 6 positions")
    right = ops.fuse_layers

    def wrong(*given: Any, **more: Any) -> Any:
        made = right(*given, **more)
        made[0][0][1, :, at] += 0.01
        return made

    monkeypatch.setattr(ops, "fuse_layers", wrong)
    for at, within in ((19, False), (14, False), (13, True)):
        assert small_job("lcf_pruned", batch=2, seconds=0.0).rows()[0]["within"] is within, at
    judged = {group: small_job(group)._last() for group in ("lcf", "inject", "train", "slots_append", "summarize")}
    assert judged == {"lcf": 12, "inject": 12, "train": None, "slots_append": None, "summarize": None}


def test_a_brief_point_has_one_case_of_ours_and_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "l2_bytes", lambda device: 400_000)
    monkeypatch.setattr(timing, "graphed", list)
    monkeypatch.setattr(timing, "host_us", lambda call: 3.0)
    names = ["adapter.inject", "reference (eager)", "reference, folded"]
    rows = small_job("inject", AsOnGpu, brief=True, seconds=0.0).rows()
    assert [row["variant"] for row in rows] == [f"{n}{end}" for n in names for end in ("", ", CUDA graph")]
    assert all(row["time"]["regime"] == "cold" and row["time_hot"] is None for row in rows)
    assert [row["host_us"] for row in rows] == [3.0, 3.0, None, None, None, None]
    assert all(row["kernels"] is row["peak_mb"] is None for row in rows)
    monkeypatch.setattr(job, "MOST_GRAPHED", 39)
    assert [row["variant"] for row in small_job("inject", AsOnGpu, brief=True, batch=2, seconds=0.0).rows()] == names


def test_ours_that_raises_has_no_time_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any, **more: Any) -> Any:
        raise RuntimeError("out of resource: shared memory\nmore")

    monkeypatch.setattr(ops, "gated_injection", broken)
    ours, *others = small_job("injection").rows()
    assert (
        ours["within"] is False and ours["reason"] == "no time: it raised RuntimeError: out of resource: shared memory"
    )
    assert others[0]["time"]
    monkeypatch.setattr(ops, "gated_injection", lambda *a: (_ for _ in ()).throw(RuntimeError("CUDA error: launch")))
    with pytest.raises(RuntimeError, match="CUDA error"):
        small_job("injection").rows()


def test_activations_are_what_lies_between_the_passes_and_what_the_second_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = variants.OURS["fuse_layers (train)"]
    operands = small_job("train").operands
    result = sum(tensor.nbytes for pair in operands.receiver for tensor in pair)
    gradients = sum(part.nbytes for name, part in operands.weights.items() if name != "gate_logit")
    allocated = iter([1000, 1000 + result + 5_000_000])  # before and after the forward pass
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: next(allocated))
    peak = 1000 + result + 5_000_000 + result + gradients + 2_000_000
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    assert run.activation_mb(operands) == 7.0  # type: ignore[attr-defined]


# --- plans


def test_a_run_on_a_gpu_has_every_size_that_a_target_reads_and_has_it_first() -> None:
    for quick, widths in ((True, (128,)), (False, (128,)), (False, (128, 256))):
        settings = replace(default_settings(CUDA, quick=quick), widths=widths)
        points = plan.points(settings)
        assert len(set(points)) == len(points)
        order = plan.urgent(points, settings)
        assert sorted(order) == list(range(len(points)))
        first = [points[index] for index in order[: len(plan.TARGET_SIZES)]]
        for size, point in zip(plan.TARGET_SIZES, first):
            assert (point.group.name, point.batch, point.width) == (size.group, size.batch, 128)
            assert not point.group.prompt or point.tokens == size.tokens
            assert not point.group.crossing or point.context == size.context
        chosen = plan.points(replace(settings, targets=False))
        assert points[: len(chosen)] == chosen and all((p.batch, p.context) == (1, 2000) for p in chosen)


def test_a_run_on_a_cpu_is_the_product_in_its_order() -> None:
    settings = default_settings(CPU, quick=False)
    points = plan.points(settings)
    assert plan.urgent(points, settings) == list(range(len(points)))
    assert all((point.batch, point.brief, point.context) == (1, False, 2048) for point in points)
    assert {p.group.name for p in points if p.tokens == 128} == {g.name for g in cases.GROUPS if g.prompt}
    two = plan.points(replace(settings, batches=(1, 3), only=("lcf",)))
    assert [(p.batch, p.tokens) for p in two] == [(b, n) for b in (1, 3) for n in (512, 128, 2048)]


def test_a_sweep_covers_its_axes_and_names_what_is_too_large() -> None:
    points, left_out = plan.sweep_points(SWEEPS["cuda"])
    tokens, batches, widths = (1, 8, 32, 128, 512, 2048, 8192, 32_768), (1, 8, 32), (64, 128, 256, 512)
    seen = {(p.group.name, p.batch, p.length, p.width, str(p.dtype)) for p in points}
    seen |= {(o["group"], o["batch"], o["tokens"], o["bottleneck"], f"torch.{o['dtype']}") for o in left_out}
    dtypes = ("torch.bfloat16", "torch.float16", "torch.float32")
    wanted = {(g, b, n, d, t) for g in cases.WHOLE for b in batches for n in tokens for d in widths for t in dtypes}
    wanted |= {("summarize", b, n, d, t) for b in batches for n in (2000, LONGEST) for d in widths for t in dtypes}
    assert seen == wanted and len(points) + len(left_out) == len(wanted)
    assert all(p.batch * p.length * p.dtype.itemsize <= 131_072 for p in points)
    assert {o["why"] for o in left_out} == {f"more than {n} positions in all" for n in ("65,536", "32,768")}
    assert {(p.batch, p.length) for p in points} >= {(1, 32_768), (8, 8192), (32, 2048), (32, 1)}
    first = points[: sum(p.width == 128 and p.dtype == torch.bfloat16 for p in points)]
    assert all((p.width, p.dtype) == (128, torch.bfloat16) for p in first)
    assert first[0].said() == "LCF: projection to injection, all layers: N = 2048, d = 128, bfloat16"
    compared = [(p.group.name, p.batch, p.tokens, p.width) for p in points if not p.brief]
    assert sorted(compared) == sorted(SWEEPS["cuda"].compared)
    assert all(p.dtype == torch.bfloat16 for p in points if not p.brief)
    asked = [p for p in points if not p.extra]
    assert points[: len(asked)] == asked and len(asked) < 150  # 0.8 s each, of the time that compiling leaves
    assert {p.width for p in asked} == set(widths) and {str(p.dtype) for p in asked} == set(dtypes)
    assert {p.batch for p in asked} == set(batches) and {p.length for p in asked} == {*tokens, 2000}
    assert all(p.left_out("late")["extra"] is p.extra for p in points)


# --- from end to end


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    pytest.importorskip("transformers")
    return two_models(tmp_path_factory.mktemp("models"))


def sweep(models: tuple[str, str], out: Path, *more: str) -> int:
    sizes = ["--tokens", "24", "1", "--batch", "1", "2", "--context", "40", "--bottleneck", "64"]
    folders = ["--sharer", models[0], "--receiver", models[1], "--out", str(out)]
    return main(["--sweep", "--device", "cpu", *sizes, *folders, *more])


def test_a_sweep_from_end_to_end(models: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert sweep(models, tmp_path) == 0
    printed = capsys.readouterr().out
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cpu-sweep.json", "plot.png", "results.json"]
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert results["settings"]["sweep"] is True and results["left_out"] == [] and results["matmul_tflop_s"] > 0
    rows = results["rows"]
    assert all(set(row) == ROW for row in rows)
    ours = [row for row in rows if row["kind"] == "ours"]
    sizes = [("lcf", 24), ("inject", 24), ("lcf", 1), ("inject", 1), ("summarize", 40)]
    assert [(r["group"], r["tokens"], r["batch"]) for r in ours] == [(*size, b) for b in (1, 2) for size in sizes]
    found = list(sweep_table.speedups(rows))
    assert [row for row, _ in found] == ours and all(speedup > 0 for _, speedup in found)
    text = table.section(results)
    assert "| dtype | d | batch | N = 1 | N = 24 |" in text and "| float32 | 64 | 2 |" in text
    assert "Slower than eager" in text and "Slower than eager" in printed
    assert str(tmp_path) not in json.dumps(results)


def test_what_a_sweep_does_not_reach_is_named(models: tuple[str, str], tmp_path: Path) -> None:
    settings = replace(sweep_settings(CPU, SWEEPS["cpu"]), sharer=models[0], receiver=models[1], widths=(64,))
    sizes = replace(SWEEPS["cpu"], tokens=(4,), widths=(64,), contexts=(6,), batches=(1, 1000))
    results = runner.run(replace(settings, sweep=sizes, tokens=(4,), context=6, stop_after=-1.0))
    assert results["rows"] == [] and results["failures"] == []
    assert {(one["batch"], one["why"]) for one in results["left_out"]} == {
        (1, "not reached within -1 s"),
        (1000, "more than 1,024 positions in all"),
    }
    assert "not reached within -1 s: 3 sizes" in sweep_table.markdown(results)


@pytest.mark.parametrize(
    ("error", "reason", "later"),
    [
        (torch.cuda.OutOfMemoryError("no"), "more memory than there is", 4),
        (ValueError("bad size"), "it raised ValueError", 4),
        (RuntimeError("CUDA error: an illegal memory access"), "it raised RuntimeError", 0),
        (KeyboardInterrupt(), "interrupted", 0),
    ],
)
def test_one_size_that_fails_leaves_the_others(
    models: tuple[str, str], monkeypatch: pytest.MonkeyPatch, error: BaseException, reason: str, later: int
) -> None:
    right = runner.Job.rows
    for name in ("copy_bandwidth", "matmul_rate"):
        monkeypatch.setattr(timing, name, lambda *_: 10.0)

    def rows(self: Any) -> Any:
        if self.group.name == "inject" and self.point.tokens == 24:
            raise error
        return right(self)

    monkeypatch.setattr(runner.Job, "rows", rows)
    sizes = replace(SWEEPS["cpu"], tokens=(24, 1), widths=(64,), contexts=(40,), batches=(1,))
    settings = replace(sweep_settings(CPU, sizes), sharer=models[0], receiver=models[1], seconds=0.0)
    results = runner.run(settings)
    first = results["left_out"][0]
    assert (first["group"], first["tokens"], first["why"]) == ("inject", 24, reason)
    done = {(row["group"], row["tokens"]) for row in results["rows"]}
    assert len(done) == 1 + (3 if later else 0) and ("lcf", 24) in done
    assert len(results["left_out"]) == (1 if later else 4)
    assert bool(results["failures"]) == reason.startswith("it raised")


def test_a_loss_anywhere_is_named() -> None:
    def row(kind: str, name: str, ms: float, tokens: int) -> dict[str, Any]:
        sizes = {"batch": 8, "tokens": tokens, "context": None, "bottleneck": 64, "dtype": "float16"}
        return {"kind": kind, "variant": name, "group": "lcf", "title": "LCF", "time": {"median_ms": ms}, **sizes}

    rows = [row("ours", "op", 4.0, 1), row("reference", "reference (eager)", 8.0, 1)]
    rows += [row("baseline", "reference, folded", 2.0, 1), row("baseline", "torch.compile", 1.0, 1)]
    rows += [row("ours", "op", 3.0, 5), row("reference", "reference (eager)", 9.0, 5)]
    rows += [row("ours", "op, CUDA graph", 30.0, 5)]
    assert [(r["tokens"], s) for r, s in sweep_table.speedups(rows)] == [(1, 0.5), (5, 3.0)]
    assert [(r["tokens"], s) for r, s in sweep_table.losses(rows)] == [(1, 0.5)]
    text = sweep_table.markdown({"rows": rows, "left_out": []})
    assert "Slower than eager in 1 of 2: `op` at N = 8 × 1, d = 64, float16: 0.50×." in text
    assert "| float16 | 64 | 8 | 4 (0.5×) | 3 (3×) |" in text


def test_kernels_are_compiled_beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = warm.commands(SWEEPS["cuda"])
    assert len(commands) == 12 and commands[0][1:] == ["-m", "bench.warm", "bfloat16", "128"]
    scripts = ["pass", "raise SystemExit(1)", "import time; time.sleep(60)", "print('warm')"]
    monkeypatch.setattr(warm, "commands", lambda sweep: [[sys.executable, "-c", script] for script in scripts])
    monkeypatch.setattr(warm, "LIMIT_S", 4.0)
    started = time.monotonic()
    assert warm.compile_beside(SWEEPS["cuda"]) == 2 and time.monotonic() - started < 40


def test_every_swept_group_is_called_at_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[str, int, int]] = []
    for name in ("adapter.fuse", "adapter.inject", "summarize_layers"):
        right = variants.OURS[name]

        def spy(o: inputs.Operands, name: str = name, right: Any = right) -> Any:
            pooled = name == "summarize_layers"
            key = (o.sharer if pooled else o.receiver)[0][0]
            called.append((name, key.shape[0], key.shape[2]))
            if key.shape[0] == 3:
                raise RuntimeError("too few registers")
            return right(o)

        monkeypatch.setitem(warm.OURS, name, spy)
    monkeypatch.setattr(warm, "SIZES", ((1, 4), (3, 5)))
    monkeypatch.setattr(warm, "CONTEXTS", ((2, 9),))
    chosen = warm.swept(torch.float32, 64)
    failed = warm.touch(CPU, chosen, sharer=cases.CacheGeometry(2, 1, 16), receiver=cases.CacheGeometry(2, 1, 32))
    edits = [(name, *size) for name in ("adapter.fuse", "adapter.inject") for size in ((1, 4), (3, 5))]
    assert called == [*edits, ("summarize_layers", 2, 9)]
    assert ["N = 3 × 5" in text and "too few registers" in text for text in failed] == [True, True]


def test_every_case_of_a_run_is_called_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []


    def spy(name: str) -> Any:
        return lambda operands: called.append(name)

    for name in variants.OURS:
        monkeypatch.setitem(warm.OURS, name, spy(name))
    chosen = [replace(point, tokens=5, context=9) for point in plan.points(default_settings(CUDA, quick=True))]
    assert warm.touch(CPU, chosen, sharer=cases.CacheGeometry(2, 1, 16), receiver=cases.CacheGeometry(28, 1, 32)) == []
    assert {*called} == {case.name for case in cases.CASES}


def test_kernels_of_every_swept_size_are_compiled_before() -> None:
    """As `fusion_plan` chooses: the tile of few tokens, or of many."""
    sweep, layers = SWEEPS["cuda"], cases.QWEN3.layers

    def tiles(sizes: Any, width: int, dtype: torch.dtype) -> set[Any]:
        chip = width, dtype.itemsize, "sm_90"
        return {
            policy.split_config(*chip, layers * batch, tokens) or policy.tile_config(*chip, layers * batch, tokens)
            for batch, tokens in sizes
        }

    for width in sweep.widths:
        for dtype in sweep.dtypes:
            swept = tiles([(b, n) for b in sweep.batches for n in sweep.tokens], width, dtype)
            assert swept <= tiles(warm.SIZES, width, dtype), (width, dtype)


def test_what_a_gpu_had_measured_is_kept_after_each_size(
    models: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("copy_bandwidth", "matmul_rate"):
        monkeypatch.setattr(timing, name, lambda *_: 10.0)
    monkeypatch.setattr(runner.warm, "compile_beside", lambda _: 0)
    monkeypatch.setattr(runner, "lcf_fast", SimpleNamespace(use_backend=lambda _: nullcontext()))
    monkeypatch.setattr(runner.Job, "rows", lambda job: [{**dict.fromkeys(ROW), "kind": "reference", "layers": 1}])
    sizes = replace(SWEEPS["cpu"], tokens=(24, 1), widths=(64,), contexts=(40,), batches=(1,))
    as_on_gpu = AsOnGpu(**{**vars(sweep_settings(CPU, sizes)), "sharer": models[0], "receiver": models[1]})
    kept: list[dict[str, Any]] = []
    whole = runner.run(as_on_gpu, keep=kept.append)
    assert [len(one["rows"]) for one in kept] == [1, 2, 3, 4, 5]
    assert [len(one["left_out"]) for one in kept] == [4, 3, 2, 1, 0] and whole["left_out"] == []
    assert {one["why"] for one in kept[0]["left_out"]} == {runner.ENDED}
    assert set(kept[-1]) == set(whole) and kept[-1]["rows"] == whole["rows"]


def test_defaults_of_a_sweep() -> None:
    gpu = sweep_settings(CUDA, SWEEPS["cuda"])
    assert gpu.stop_after < 300 and gpu.compile_until > 0 and gpu.dtype == torch.bfloat16
    assert isinstance(gpu, Settings) and sweep_settings(CPU, SWEEPS["cpu"]).compile_until == 0
