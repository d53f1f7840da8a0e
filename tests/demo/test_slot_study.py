"""The study of slots from end to end, without learning; its table and picture from figures that are known."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from lcf_fast import LatentCacheFlow, LatentSlots, Message
from lcf_fast.cli import main
from lcf_fast.demo.agents import AgentSize, make_agent
from lcf_fast.demo.channels import read
from lcf_fast.demo.slot_report import study_markdown, write_study
from lcf_fast.demo.slot_study import FULL_STUDY, QUICK_STUDY, _load_agent, run_study
from lcf_fast.demo.study_methods import METHODS, VARIANTS, Method, method_of, side_by_side
from lcf_fast.demo.tasks import CrossItems, cross_items, others
from lcf_fast.errors import CheckpointError, GeometryError


def test_everything_is_done_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["study", "--quick", "--out", str(tmp_path), "--seeds", "3", "--workers", "1"]
    methods = ["lcf", "lcf_x", "slots_2", "slots_2_dropout", "slots_2_prefix", "slots_1_per_span"]
    assert main([*command, "--methods", *methods]) == 0
    study = json.loads((tmp_path / "study.json").read_text(encoding="utf-8"))
    assert study_markdown(study) in capsys.readouterr().out
    assert (tmp_path / "study.md").read_text(encoding="utf-8") == study_markdown(study)
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
    assert [cell["method"] for cell in study["cells"]] == methods
    assert set(study["first_token"]) == {*methods, "no message", "facts as text"}
    for key, mode in (("lcf", "lcf"), ("lcf_x", "lcf_x")):
        assert LatentCacheFlow.from_pretrained(tmp_path / f"adapters/3-{key}").config.mode == mode
    adapter = LatentSlots.from_pretrained(tmp_path / "adapters/3-slots_2")
    cell = study["cells"][2]
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
    assert main([*command, "--methods", "slots_2", "--no-plot"]) == 0
    assert {path: path.stat().st_mtime_ns for path in made} == made, "what was there was made again"
    capsys.readouterr()
    assert main([word for word in command if word != "--quick"]) == 2
    assert "a study of this version and plan" in capsys.readouterr().err


def test_another_plan_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match="another folder"):
        run_study(QUICK_STUDY, tmp_path, seeds=[0], methods=["slots_1"], workers=1)


def known() -> dict[str, Any]:
    def cell(seed: int, method: str, right: dict[int, int], **more: Any) -> dict[str, Any]:
        kept: dict[int, dict[int, int]] = {}
        return {
            "seed": seed, "method": method, "parameters": 1234, "sent": dict.fromkeys(right, 1100),
            "items": 200, "training_cpu": 1.0, "matched": right, "mismatched": dict.fromkeys(right, 10),
            "zero": dict.fromkeys(right, 12), "kept": kept, **more,
        }  # fmt: skip

    cut = cell(0, "slots_2_dropout", {1: 198, 4: 150}, kept={1: {1: 180, 4: 60}})
    names = ["lcf", "lcf_x", "slots_2", "slots_2_dropout", "no message", "facts as text"]
    return {
        "plan": {"facts": [1, 4], "steps": 1500, "items": 200},
        "seeds": [0, 1],
        "text": [{"seed": s, "told": {1: 200, 4: 199}, "none": {1: 12, 4: 14}, "items": 200} for s in (0, 1)],
        "cells": [
            *(cell(s, "lcf", {1: 200, 4: 100}, sent={1: 2000, 4: 4000}) for s in (0, 1)),
            *(cell(s, "lcf_x", {1: 200, 4: 70 + 2 * s}, zero={1: 12, 4: 16 - s}) for s in (0, 1)),
            *(cell(s, "slots_2", {1: 200, 4: 190 - 4 * s}) for s in (0, 1)),
            cut,
            {**cut, "seed": 1},
        ],
        "first_token": {name: 0.001 * (i + 1) for i, name in enumerate(names)},
    }


@pytest.mark.parametrize("stored", [False, True])
def test_the_table_says_what_was_found(stored: bool, tmp_path: Path) -> None:
    study = json.loads(json.dumps(known())) if stored else known()
    text = study_markdown(study)
    rows = {row.split(" | ")[0].strip("| "): row for row in text.splitlines() if row.startswith("| ")}
    assert "| 1,234 | 1,100 | 100.0 (100.0 to 100.0) / 5.0 | 35.5 (35.0 to 36.0) / 5.0 | 2.0 |" in rows["LCF-X"]
    assert "| 2,000, 4,000 | 100.0 (100.0 to 100.0) / 5.0 | 50.0 " in rows["LCF, position by position"]
    assert rows["no message"].endswith("| 5.0 |")
    assert "| 94.0 (93.0 to 95.0) / 5.0 |" in rows["2 slots"]
    assert "| 75.0 (75.0 to 75.0) / 5.0 |" in rows["2 slots, any number sent"]
    assert "| 90.0 (90.0 to 90.0) | 30.0 (30.0 to 30.0) |" in rows["… the first 1 of them"]
    assert "| 2, 8 | 100.0 (100.0 to 100.0) | 99.5 (99.5 to 99.5) |" in rows["facts as text"]
    assert "Zero messages: at most 8.0%; another item's: at most 5.0%." in text
    written = write_study(study, tmp_path)
    assert [path.name for path in written] == ["study.json", "study.md", "study.png"]
    assert json.loads(written[0].read_text(encoding="utf-8")) == json.loads(json.dumps(study))


def test_no_more_parameters_than_lcf_x() -> None:
    """The issue's own comparison: the study's 16 slots have fewer parameters than LCF-X on the same model."""
    from lcf_fast.demo.lessons import make_adapter, make_slots_adapter

    model = make_agent(FULL_STUDY.size, 0)
    crossing = make_adapter(model, model, cross_context=True, seed=0).parameter_count()
    counts = [make_slots_adapter(model, model, slots=k, seed=0).parameter_count() for k in (4, 8, 16)]
    assert counts[:2] == [331_008, 333_056]
    assert counts[2] < crossing
    assert replace(FULL_STUDY, steps=1).facts == (1, 2, 4, 8)


@pytest.mark.parametrize("more", [["--seeds", "-1"], ["--methods", "slots_65"], ["--workers", "0"]])
def test_what_is_refused(more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "--quick", "--out", str(tmp_path / "out"), *more]) == 2
    assert more[0] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_transformers_it_is_one_line_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["study", "--quick", "--workers", "1", "--out", str(tmp_path / "out")]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("lcf-fast study: error: study: expected transformers, which pip install")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["slots_0", "slots_08", "lcf_8", "slots_8_", "slots_8_cheap", "slots_8_spans", "c2c"])
def test_no_such_method(key: str) -> None:
    with pytest.raises(GeometryError, match="--methods"):
        method_of(key)


def test_methods_have_names_of_their_own() -> None:
    keys = [*METHODS, *(f"slots_8_{variant}" for variant in VARIANTS)]
    assert len(set(keys)) == len(keys)
    methods = [method_of(key) for key in keys]
    assert [method.key for method in methods] == keys
    assert len({method.name for method in methods}) == len(keys)


# --- what the variants change
# ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Any:
    return make_agent(QUICK_STUDY.size, 0).eval().requires_grad_(False)


def items_of(facts: int, count: int = 3) -> CrossItems:
    return cross_items(count, facts, torch.Generator().manual_seed(facts))


def trained(key: str, model: Any, steps: int = 3) -> tuple[Method, Any]:
    method = method_of(key)
    adapter = method.make(model, 1)
    method.train(adapter, model, steps, 2, seed=5, watch=lambda said: None)
    return method, adapter.eval()


def test_heads_that_share_queries_share_them_after_training(model: Any) -> None:
    method, adapter = trained("slots_2_shared", model)
    query = adapter.slot_query
    fresh = method.make(model, 1).get_parameter("slot_query")
    heads = QUICK_STUDY.size.kv_heads
    assert torch.equal(query, query[:, :, :1].expand_as(query))
    assert not torch.equal(query, fresh), "nothing was learned"
    tied = query[:, :, 0].numel() * (heads - 1)
    assert method.parameters(adapter) == adapter.parameter_count() - tied


def test_shared_queries_of_two_heads() -> None:
    model = make_agent(AgentSize(layers=1, width=64, heads=4, kv_heads=2), 0).eval().requires_grad_(False)
    method, adapter = trained("slots_2_shared", model)
    assert torch.equal(adapter.slot_query[:, :, 0], adapter.slot_query[:, :, 1])
    assert method.parameters(adapter) < adapter.parameter_count()


def test_a_slot_a_fact_pools_that_fact_alone(model: Any) -> None:
    method, adapter = trained("slots_1_per_span", model)
    items = items_of(2)
    cache = read(model, items.sharer_ids)
    sent = Message.from_bytes(method.channels(adapter, model).message(cache, items))
    latent: Any = sent.latent
    assert latent.shape[1:3] == (3, 2)
    for fact in range(2):
        part = [(key[:, :, 2 * fact : 2 * fact + 2], value[:, :, 2 * fact : 2 * fact + 2]) for key, value in cache]
        alone: Any = adapter.summarize(part).latent
        torch.testing.assert_close(latent[:, :, fact].float(), alone[:, :, 0], rtol=0.01, atol=0.01)


def test_one_block(model: Any) -> None:
    adapter = method_of("slots_2_one_block").make(model, 0)
    assert adapter.config.ffn_blocks == 1


def test_a_prefix_is_seen_by_the_whole_prompt(model: Any) -> None:
    """The receiver's answer is that of a model which reads slots, then the prompt."""
    method, adapter = trained("slots_2_prefix", model)
    channels, items = method.channels(adapter, model), items_of(1)
    sent = channels.message(read(model, items.sharer_ids), items)
    cache = adapter.prefix(model, Message.from_bytes(sent).to(torch.float32))
    for token in items.receiver_ids.T:  # one by one, as generate() reads it
        at = torch.full((3, 1), cache.get_seq_length())
        logits = model(input_ids=token[:, None], position_ids=at, past_key_values=cache, use_cache=True).logits
    assert torch.equal(channels.answer(items.receiver_ids, sent), logits[:, -1].argmax(-1))


@pytest.mark.parametrize("facts", [1, 4])
def test_lcf_edits_positions_that_both_have(facts: int, model: Any) -> None:
    method = method_of("lcf")
    adapter: Any = method.make(model, 0).eval()
    torch.nn.init.ones_(adapter.get_parameter("gate_logit"))
    channels, items = method.channels(adapter, model), items_of(facts)
    cache = read(model, items.sharer_ids)
    sent = channels.message(cache, items)
    told = safetensors.torch.load(sent)["cache"]
    positions = min(2 * facts, 4)
    assert told.shape[-2] == positions
    assert told.dtype == torch.bfloat16
    torch.testing.assert_close(told[0, 0].float(), cache[0][0][:, :, :positions], atol=0.05, rtol=0.01)
    own = read(model, items.receiver_ids[:, :-1])
    seen = []

    def fuse(sharer: Any, receiver: Any, *, sharer_index: Tensor) -> Any:
        seen.append(sharer_index)
        return LatentCacheFlow.fuse(adapter, sharer, receiver, sharer_index=sharer_index)

    channels.adapter = SimpleNamespace(fuse=fuse)
    channels.answer(items.receiver_ids, sent)
    assert seen[0].tolist() == [[0, 1, 2, 3] if facts > 1 else [0, 1, -1, -1]] * 3
    edited = fuse([(key.float(), value.float()) for key, value in told], own, sharer_index=seen[0])
    moved = (edited[0][0] != own[0][0]).any(-1).any(1)
    assert moved.tolist() == [[True, True, facts > 1, facts > 1]] * 3
    assert not any(part.any() for part in safetensors.torch.load(channels.nothing(sent)).values())
    batch = side_by_side(items)
    assert batch.spans is None
    assert batch.sharer_index is not None
    assert torch.equal(batch.sharer_index[:, :-1], seen[0])
