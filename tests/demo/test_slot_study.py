"""The study of slots from end to end, without learning; its table and picture from figures that are known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from lcf_fast import LatentCacheFlow, LatentSlots, Message
from lcf_fast.cli import main
from lcf_fast.demo.channels import read
from lcf_fast.demo.slot_report import study_markdown, write_study
from lcf_fast.demo.slot_study import FULL_STUDY, QUICK_STUDY, _load_agent, method_name, run_study
from lcf_fast.demo.tasks import cross_items, others
from lcf_fast.errors import CheckpointError


def test_everything_is_done_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["study", "--quick", "--out", str(tmp_path), "--seeds", "3", "--slots", "0", "2", "--workers", "1"]
    assert main([*command, "--dropout", "2"]) == 0
    study = json.loads((tmp_path / "study.json").read_text(encoding="utf-8"))
    assert study_markdown(study) in capsys.readouterr().out
    assert (tmp_path / "study.md").read_text(encoding="utf-8") == study_markdown(study)
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
    assert [(cell["slots"], cell["dropout"]) for cell in study["cells"]] == [(0, False), (2, False), (2, True)]
    assert LatentCacheFlow.from_pretrained(tmp_path / "adapters/3-0").config.mode == "lcf_x"
    adapter = LatentSlots.from_pretrained(tmp_path / "adapters/3-2")
    cell = study["cells"][1]
    assert (adapter.config.slots, adapter.parameter_count()) == (2, cell["parameters"])
    # What the cell says is what that adapter makes that model answer.
    model = _load_agent(QUICK_STUDY, tmp_path, 3)
    generator = torch.Generator().manual_seed(90_003)
    for facts in QUICK_STUDY.facts:
        items = cross_items(QUICK_STUDY.items, facts, generator)
        other = items[others(items, generator)]
        for name, told in (("matched", items), ("mismatched", other)):
            with torch.no_grad():
                sent = adapter.summarize(read(model, told.sharer_ids)).to_bytes(dtype="bfloat16")
                cache = adapter.append(model, read(model, items.receiver_ids[:, :-1]), Message.from_bytes(sent).to(
                    torch.float32))  # fmt: skip
                at = torch.full((len(items), 1), items.receiver_ids.shape[1] + 1)
                from lcf_fast.reading.prefill import dynamic_cache

                logits = model(
                    input_ids=items.receiver_ids[:, -1:], position_ids=at, past_key_values=dynamic_cache(cache)
                ).logits
            assert int((logits[:, -1].argmax(-1) == items.answers).sum()) == cell[name][str(facts)]
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert main([*command, "--dropout", "0", "--no-plot"]) == 0
    assert {path: path.stat().st_mtime_ns for path in made} == made, "what was there was made again"
    capsys.readouterr()
    assert main([word for word in command if word != "--quick"]) == 2
    assert "a study of this version and plan" in capsys.readouterr().err


def test_another_plan_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match="another folder"):
        run_study(QUICK_STUDY, tmp_path, seeds=[0], slots=[1], dropout=None, workers=1)


def known() -> dict[str, Any]:
    def cell(seed: int, slots: int, right: dict[int, int], **more: Any) -> dict[str, Any]:
        kept: dict[int, dict[int, int]] = {}
        return {
            "seed": seed, "slots": slots, "dropout": False, "parameters": 1000 + slots, "sent": 100 * (slots + 1),
            "items": 200, "training_cpu": 1.0, "matched": right, "mismatched": dict.fromkeys(right, 10),
            "zero": dict.fromkeys(right, 12), "kept": kept, **more,
        }  # fmt: skip

    cut = cell(0, 2, {1: 198, 4: 150}, dropout=True, kept={1: {1: 180, 4: 60}})
    return {
        "plan": {"facts": [1, 4], "steps": 1500, "items": 200},
        "seeds": [0, 1],
        "text": [{"seed": s, "told": {1: 200, 4: 199}, "none": {1: 12, 4: 14}, "items": 200} for s in (0, 1)],
        "cells": [
            *(cell(s, 0, {1: 200, 4: 70 + 2 * s}) for s in (0, 1)),
            *(cell(s, 2, {1: 200, 4: 190 - 4 * s}) for s in (0, 1)),
            cut,
            {**cut, "seed": 1},
        ],
        "first_token": {
            method_name(k, drops): {"matching message": 0.004} for k, drops in ((0, False), (2, False), (2, True))
        },
    }


@pytest.mark.parametrize("stored", [False, True])
def test_the_table_says_what_was_found(stored: bool, tmp_path: Path) -> None:
    study = json.loads(json.dumps(known())) if stored else known()
    text = study_markdown(study)
    rows = {row.split(" | ")[0].strip("| "): row for row in text.splitlines() if row.startswith("| ")}
    assert "| 1,000 | 100 | 100.0 (100.0 to 100.0) / 5.0 | 35.5 (35.0 to 36.0) / 5.0 | 4.0 |" in rows["LCF-X"]
    assert "| 94.0 (93.0 to 95.0) / 5.0 |" in rows["2 slots"]
    assert "| 75.0 (75.0 to 75.0) / 5.0 |" in rows["2 slots, any number sent"]
    assert "| 90.0 (90.0 to 90.0) | 30.0 (30.0 to 30.0) |" in rows["… the first 1 of them"]
    assert "| 2, 8 | 100.0 (100.0 to 100.0) | 99.5 (99.5 to 99.5) |" in rows["facts as text"]
    assert "Zero messages: at most 6.0%; another item's: at most 5.0%." in text
    written = write_study(study, tmp_path)
    assert [path.name for path in written] == ["study.json", "study.md", "study.png"]
    assert json.loads(written[0].read_text(encoding="utf-8")) == json.loads(json.dumps(study))


def test_no_more_parameters_than_lcf_x() -> None:
    """The issue's own comparison: the study's 16 slots have fewer parameters than LCF-X on the same model."""
    from lcf_fast.demo.agents import make_agent
    from lcf_fast.demo.lessons import make_adapter, make_slots_adapter

    model = make_agent(FULL_STUDY.size, 0)
    crossing = make_adapter(model, model, cross_context=True, seed=0).parameter_count()
    counts = [make_slots_adapter(model, model, slots=k, seed=0).parameter_count() for k in (4, 8, 16)]
    assert counts[:2] == [331_008, 333_056]
    assert counts[2] < crossing
    assert replace(FULL_STUDY, steps=1).facts == (1, 2, 4, 8)


@pytest.mark.parametrize("more", [["--seeds", "-1"], ["--slots", "65"], ["--dropout", "65"], ["--workers", "0"]])
def test_what_is_refused(more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "--quick", "--out", str(tmp_path / "out"), *more]) == 2
    assert more[0] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
