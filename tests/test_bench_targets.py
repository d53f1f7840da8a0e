"""Targets are read from the right rows and held to their bounds: on made-up results, which are no measurements."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import cases, measures, plan, targets
from bench.cases import AS_RELEASED
from bench.measures import Evidence, Pick, evidence_of
from bench.settings import default_settings
from bench.targets import BATCH, FEW, LCF, POOL, PRUNED, SLOTS, TRAIN, WHOLE

GPU = "Made-up GPU"
COPY, MATMUL = 2000.0, 400.0
EAGER, GRAPH = "reference (eager)", ", CUDA graph"
Files = list[dict[str, Any]]


def made(pick: Pick, ms: float | None, variant: str = "", **columns: Any) -> dict[str, Any]:
    row = {
        "group": pick.group,
        "variant": variant or pick.variant,
        "kind": "baseline" if variant and not variant.startswith(pick.variant) else "ours",
        "tokens": pick.tokens,
        "context": pick.context,
        "batch": pick.batch,
        "bottleneck": 128,
        "dtype": "bfloat16",
        "time": None if ms is None else {"median_ms": ms},
        "reason": "no time: the error is 3 times its bound" if ms is None else None,
        "host_us": None,
        "activation_mb": None,
    }
    return row | columns


def files() -> Files:
    """Every target met, each by a little."""
    pool_ms = cases.summarize_layers(POOL.shape()).bytes / COPY / 1e6 / 0.91
    lcf_ms, batch_ms = (
        factor * targets.tokens_alone(pick.shape()).bytes / COPY / 1e6 for pick, factor in ((LCF, 1.4), (BATCH, 1.3))
    )
    rows = [
        made(LCF, 1.2 * lcf_ms),  # a plain call takes longer
        made(LCF, lcf_ms, LCF.variant + GRAPH),
        made(LCF, 31 * lcf_ms, EAGER),
        made(LCF, 8.5 * lcf_ms, EAGER + GRAPH),
        made(LCF, 4.9 * lcf_ms, "torch.compile max-autotune"),
        made(LCF, 6 * lcf_ms, "torch.compile"),
        made(LCF, 121 * lcf_ms, "C2C fuser"),
        made(LCF, 240 * lcf_ms, f"C2C fuser{AS_RELEASED}"),
        made(BATCH, 1.5 * batch_ms),
        made(BATCH, batch_ms, BATCH.variant + GRAPH),
        *(made(pick, 0.02 + pick.tokens / 20_000, pick.variant + GRAPH, host_us=9.0) for pick in FEW),
        *(made(pick, 0.05, host_us=50.0 + pick.tokens / 16) for pick in FEW),
        made(POOL, pool_ms),
        made(POOL, 3.1 * pool_ms, EAGER),
        made(POOL, 1.1 * pool_ms, "SDPA"),
        made(WHOLE, 0.5),
        made(WHOLE, 0.19, WHOLE.variant + GRAPH),
        made(WHOLE, 26.0, EAGER),
        made(TRAIN, 5.0, activation_mb=90.0),
        made(TRAIN, 21.0, EAGER, activation_mb=1000.0),
        made(PRUNED, 0.9 * lcf_ms),
        made(PRUNED, 0.39 * lcf_ms, PRUNED.variant + GRAPH),
        made(SLOTS, 0.9),
        made(SLOTS, 0.09, SLOTS.variant + GRAPH),
    ]
    widths = ((64, "bfloat16"), (256, "bfloat16"), (512, "bfloat16"), (128, "float16"), (128, "float32"))
    swept = [
        made(LCF, ms, variant, bottleneck=width, dtype=dtype)
        for width, dtype in widths
        for ms, variant in ((1.0, ""), (1.2, EAGER))
    ]
    about = {"device": GPU, "device_type": "cuda"}
    rates = {"copy_gb_s": COPY, "matmul_tflop_s": MATMUL, "left_out": [], "failures": []}
    steps = [{"step": step, "status": "passed"} for step in ("gpu", "numerics", "memcheck", "racecheck", "bench")]
    lcf = {"communication_share": 0.019, "speedups": {}}
    lcf_x = {"communication_share": 0.018, "speedups": {"text_50": 5.1, "text_200": 8.6}}
    return [
        {"about": about, "settings": {"sweep": False}, "rows": rows, **rates},
        {"about": about, "settings": {"sweep": True}, "rows": swept, **rates},
        {
            "format": 1,
            "cells": [
                {"group": "shared context", "batch": 1, "about": about, "channels": {"lcf": lcf}},
                {"group": "cross context", "batch": 1, "about": about, "channels": {"lcf_x": lcf_x}},
            ],
        },
        {"about": {"gpu": GPU}, "steps": steps},
    ]


def outcomes(given: Files) -> dict[tuple[str, str], targets.Outcome]:
    (evidence,) = evidence_of(given)
    return {(o.target.item, o.target.name): o for o in targets.judged(evidence)}


def row_of(given: Files, pick: Pick, variant: str = "", sweep: bool = False) -> dict[str, Any]:
    rows = given[int(sweep)]["rows"]
    size = pick.group, variant or pick.variant, pick.tokens, pick.batch
    return next(row for row in rows if (row["group"], row["variant"], row["tokens"], row["batch"]) == size)


def test_every_target_can_be_met_and_has_a_name_of_its_own() -> None:
    found = outcomes(files())
    assert len(found) == len(targets.TARGETS)
    assert {name for name, outcome in found.items() if outcome.met is not True} == set()


def test_without_results_nothing_is_met_or_missed() -> None:
    for outcome in targets.judged(Evidence()):
        assert outcome.met is None and outcome.measured is None
    text = targets.table(Evidence())
    assert text.count("| not measured |") == len(targets.TARGETS)
    assert f"0 met, 0 missed, {len(targets.TARGETS)} not measured" in text and "until a run has its own" in text


def slower(pick: Pick, factor: float, variant: str = "", column: str = "") -> Callable[[Files], None]:
    def change(given: Files) -> None:
        row = row_of(given, pick, variant)
        if column:
            row[column] *= factor
        else:
            row["time"]["median_ms"] *= factor

    return change


def channel(group: int, name: str, key: str, value: float) -> Callable[[Files], None]:
    def change(given: Files) -> None:
        one = given[2]["cells"][group]["channels"][name]
        if key == "communication_share":
            one[key] = value
        else:
            one["speedups"][key] = value

    return change


def failed_step(given: Files) -> None:
    given[3]["steps"][2]["status"] = "timeout"


def failed_row(given: Files) -> None:
    given[1]["failures"] = ["adapter.fuse, 8 tokens"]


def swept_loss(given: Files) -> None:
    given[1]["rows"][2]["time"]["median_ms"] = 1.3


def swept_gap(given: Files) -> None:
    for row in given[1]["rows"][:2]:
        row["group"] = "inject"


FUSE, FEW_TOKENS = "LCF, 2,048 tokens", "LCF, 1 to 128 tokens"
BROKEN: list[tuple[Callable[[Files], None], set[str]]] = [
    (failed_step, {"checks that failed"}),
    (failed_row, {"benchmark rows out of bounds"}),
    (slower(LCF, 0.95, EAGER), {"faster than eager"}),
    (slower(LCF, 0.7, "torch.compile"), {"faster than torch.compile"}),
    (slower(LCF, 0.95, "torch.compile max-autotune"), {"faster than torch.compile"}),
    (slower(LCF, 0.9, EAGER + GRAPH), {"both in CUDA graphs, faster than eager"}),
    (slower(LCF, 0.98, "C2C fuser"), {"faster than C2C's fuser"}),
    (slower(BATCH, 1.1, BATCH.variant + GRAPH), {targets.OVER_FLOOR}),
    (slower(FEW[3], 1.2, FEW[3].variant + GRAPH), {f"{targets.GRAPHED}, the longest"}),
    (slower(FEW[0], 1.3, column="host_us"), {"host time a call, the longest"}),
    (slower(FEW[1], 1.2, FEW[1].variant + GRAPH, "host_us"), {"host time a replay, the longest"}),
    (slower(POOL, 1.02), {"of the copy bandwidth"}),
    (slower(POOL, 0.95, EAGER), {"faster than eager"}),
    (slower(POOL, 0.85, "SDPA"), {"faster than two calls of scaled_dot_product_attention"}),
    (slower(WHOLE, 1.06, WHOLE.variant + GRAPH), {f"pool, fold, inject: {targets.GRAPHED}"}),
    (slower(WHOLE, 1.06), {"faster than eager"}),
    (slower(TRAIN, 0.9, EAGER), {"faster than eager autograd"}),
    (slower(TRAIN, 1.2, column="activation_mb"), {"activations at the highest, of eager's"}),
    (slower(PRUNED, 1.05, PRUNED.variant + GRAPH), {"time at 2,048 tokens, of 28 layers', both in CUDA graphs"}),
    (channel(0, "lcf", "communication_share", 0.021), {"LCF's communication, of the time to first token"}),
    (channel(1, "lcf_x", "communication_share", 0.021), {"LCF-X's communication, of the time to first token"}),
    (channel(1, "lcf_x", "text_200", 8.4), {"LCF-X's first token before text's of 200"}),
    (channel(1, "lcf_x", "text_50", 4.9), {"LCF-X's first token before text's of 50"}),
    (swept_loss, {"faster than eager, at the least"}),
    (swept_gap, {"widths and dtypes without a time"}),
    (slower(SLOTS, 1.2, SLOTS.variant + GRAPH), {f"pool 2,000 tokens, deliver to 28 layers: {targets.GRAPHED}"}),
]


@pytest.mark.parametrize(("change", "missed"), BROKEN)
def test_each_bound_is_held(change: Callable[[Files], None], missed: set[str]) -> None:
    given = deepcopy(files())
    change(given)
    assert {name for (_, name), outcome in outcomes(given).items() if outcome.met is False} == missed


def test_the_bound_itself_is_enough() -> None:
    given = files()
    for change in (channel(0, "lcf", "communication_share", 0.02), channel(1, "lcf_x", "text_50", 5.0)):
        change(given)
    row_of(given, FEW[0])["host_us"] = row_of(given, FEW[3])["host_us"] = 60.0
    found = outcomes(given)
    assert [o.measured for o in found.values() if o.measured == o.target.bound and o.target.bound] == [60.0, 0.02, 5.0]
    assert all(outcome.met for outcome in found.values())


def test_other_widths_dtypes_and_batches_are_not_read() -> None:
    given = files()
    for other in ({"bottleneck": 64}, {"dtype": "float32"}):
        given[0]["rows"][:0] = [made(LCF, 9.0, LCF.variant + GRAPH, **other)]
    lcf = {"communication_share": 0.9, "speedups": {}}
    given[2]["cells"][:0] = [{**given[2]["cells"][0], "batch": 8, "channels": {"lcf": lcf}}]
    assert all(outcome.met for outcome in outcomes(given).values())


def test_what_was_not_measured_is_no_success(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps(files()[0]), encoding="utf-8")
    assert targets.main([str(file)]) == 1


def test_every_target_is_missed_by_some_change_above() -> None:
    """But for the first floor, which moves with all that is compared with it."""
    assert {target.name for target in targets.TARGETS} == set().union(*(missed for _, missed in BROKEN))
    given = files()
    slower(LCF, 1.08, LCF.variant + GRAPH)(given)
    assert outcomes(given)[FUSE, targets.OVER_FLOOR].met is False


def test_a_floor_is_counted_for_the_rates_of_the_run() -> None:
    """Design, section 3: 2,048 tokens are 243.7 KB and 38.65 MFLOP each; 1.5 times that is 174 µs."""
    given = files()
    given[0]["copy_gb_s"], given[0]["matmul_tflop_s"] = 4300.0, 790.0
    ms = row_of(given, LCF, LCF.variant + GRAPH)["time"]["median_ms"]
    measured = outcomes(given)[FUSE, targets.OVER_FLOOR].measured
    moved = 2048 * 243_712 / 4.3e9
    assert measured is not None and ms / measured == pytest.approx(moved, rel=1e-3)
    assert 1.5 * moved == pytest.approx(0.174, abs=5e-4)
    given[0]["matmul_tflop_s"] = 79.0  # now products set it
    slow = outcomes(given)[FUSE, targets.OVER_FLOOR].measured
    assert slow is not None and ms / slow == pytest.approx(2048 * 38_649_856 / 79e9, rel=1e-6)


@pytest.mark.parametrize(
    ("pick", "variant"), [(LCF, EAGER), (LCF, "C2C fuser"), (POOL, "SDPA"), (FEW[2], FEW[2].variant + GRAPH)]
)
def test_what_has_no_row_or_no_time_is_not_measured(pick: Pick, variant: str) -> None:
    given = files()
    row = row_of(given, pick, variant)
    row |= {"time": None, "host_us": None, "reason": "not captured: no"}
    found = {name: o for name, o in outcomes(given).items() if o.met is None}
    assert found and all(outcome.why == "not captured: no" for outcome in found.values())
    assert all(name[0] in (FUSE, FEW_TOKENS, "LCF-X, 32,768 tokens pooled") for name in found)
    given[0]["rows"].remove(row)
    given[0]["left_out"] = [
        {"group": pick.group, "tokens": pick.tokens, "batch": pick.batch, "why": "not reached within 9 s"}
    ]
    again = {name: o for name, o in outcomes(given).items() if o.met is None}
    assert set(again) == set(found) and all(o.why == "not reached within 9 s" for o in again.values())
    (evidence,) = evidence_of(given)
    assert "| not measured (not reached within 9 s) |" in targets.table(evidence)


def test_one_torch_compile_is_enough_and_a_check_that_was_absent_is_open() -> None:
    given = files()
    row_of(given, LCF, "torch.compile max-autotune")["time"] = None
    assert outcomes(given)[FUSE, "faster than torch.compile"].measured == pytest.approx(5.0)
    given[3]["steps"] = given[3]["steps"][:2] + [{"step": "memcheck", "status": "absent"}]
    found = outcomes(given)["correct", "checks that failed"]
    assert found.met is None and found.why == "memcheck, racecheck: absent or not run"
    given[3]["steps"].append({"step": "racecheck", "status": "failed"})
    assert outcomes(given)["correct", "checks that failed"].met is False


def test_a_sweep_that_was_cut_short_cannot_be_met_but_can_be_missed() -> None:
    given = files()
    given[1]["left_out"] = [{"why": "more than 65,536 positions in all"}]
    assert outcomes(given)["every size", "faster than eager, at the least"].met is True
    given[1]["left_out"].append({"why": "not reached within 290 s", "extra": True})
    assert outcomes(given)["every size", "faster than eager, at the least"].met is True
    given[1]["left_out"].append({"why": "not reached within 290 s", "extra": False})
    found = outcomes(given)["every size", "faster than eager, at the least"]
    assert found.met is None and found.why == "1 sizes were not reached; the least of the others: 1.20×"
    swept_loss(given)
    assert outcomes(given)["every size", "faster than eager, at the least"].met is False


def test_results_of_a_cpu_are_no_evidence() -> None:
    given = files()
    for part in (given[0]["about"], *(cell["about"] for cell in given[2]["cells"])):
        part["device_type"] = "cpu"
    assert [one.machine for one in evidence_of([given[0], given[2]])] == []
    with pytest.raises(ValueError, match="no result of"):
        evidence_of([{"sets": []}])


def test_a_later_latency_takes_the_place_of_an_earlier_one() -> None:
    given = files()
    later = deepcopy(given[2])
    (cell,) = [cell for cell in later["cells"] if cell["group"] == "shared context"]
    cell["channels"]["lcf"]["communication_share"] = 0.5
    name = next(target.name for target in targets.TARGETS if target.name.startswith("LCF's communication"))
    found = {key[1]: outcome for key, outcome in outcomes([*given, later]).items()}
    assert (found[name].measured, found[name].met) == (0.5, False)


def test_each_gpu_has_its_own_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = deepcopy(files()[0])
    other["about"] = {"device": "Another", "device_type": "cuda"}
    slower(LCF, 2.0, LCF.variant + GRAPH)([other])
    for number, data in enumerate([*files(), other]):
        (tmp_path / f"{number}.json").write_text(json.dumps(data), encoding="utf-8")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{targets.BEGIN}\nSTALE\n{targets.END}\nafter\n", encoding="utf-8")
    given = [str(tmp_path / f"{number}.json") for number in range(5)]
    assert targets.main([*given, "--write", str(page)]) == 1
    text, printed = page.read_text(encoding="utf-8"), capsys.readouterr().out
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "STALE" not in text
    assert f"**{GPU}**" in text and "**Another**" in text and "**missed**" in text
    assert f"MISSED  LCF, 2,048 tokens: {targets.OVER_FLOOR}: at most 1.5×, 2.8×" in printed
    assert f"{len(targets.TARGETS)} met, 0 missed, 0 not measured. Floors: every byte once at 2,000 GB/s" in text
    assert targets.main(given[:4]) == 0
    page.write_text("no markers", encoding="utf-8")
    assert targets.main([*given, "--write", str(page)]) == 2


def test_a_run_on_a_gpu_makes_every_row_that_a_target_reads() -> None:
    """Groups, sizes and names of ours are those of the plan, so that no target stays open for a slip."""
    for quick in (True, False):
        points = plan.points(default_settings(torch.device("cuda"), quick=quick))
        sizes = {(p.group.name, p.length, p.context if p.group.crossing else None, p.batch) for p in points}
        for pick in (LCF, BATCH, *FEW, POOL, WHOLE, TRAIN, PRUNED, SLOTS):
            assert (pick.group, pick.tokens, pick.context, pick.batch) in sizes, pick
            assert pick.variant in cases.CASE_NAMES
            (first, *_) = cases.cases_of(plan.BY_NAME[pick.group])
            assert pick.variant == first.name  # brief points have the first alone
    assert measures.GRAPH == ", CUDA graph"


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        targets.main(["--help"])
    assert stop.value.code == 0 and "examples:" in capsys.readouterr().out
