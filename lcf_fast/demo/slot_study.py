"""How much a message can hold: LCF, LCF-X and slots of several numbers, on one to eight facts, over seeds.

One model is both sharer and receiver. Every adapter is trained alike, on one to eight facts at a time, as many steps of
as many items by the same loop; it is then asked about a message of its own, another item's, and zeros. What a folder
holds is not run again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import load_any
from ..errors import CheckpointError
from ..files import sweep, write_whole
from ..message import Message
from .agents import AgentSize, answers_of, make_agent, recall_accuracy, teach_recall
from .channels import MATCHED, NONE, TEXT, CrossChannels, first_token_times, read
from .jobs import Display, Job, Watch, Workers, pack, unpack
from .study_methods import Method, method_of
from .tasks import CrossItems, cross_items, others

__all__ = ["FULL_STUDY", "QUICK_STUDY", "Cell", "StudyPlan", "run_study"]

_FORMAT = 2


@dataclass(frozen=True)
class StudyPlan:
    """How much is done.

    Attributes:
        size: of the model.
        facts: numbers of facts that are asked about; training draws from one to the greatest, evenly, a step.
        steps: of each adapter's training.
        agent_steps: at which the model is taken as it is; None: when it has learned to recall.
        items: that each accuracy is measured on.
        rounds: that each time to first token is the median of.
    """

    size: AgentSize
    facts: tuple[int, ...]
    steps: int
    items: int
    rounds: int
    agent_steps: int | None = None


FULL_STUDY = StudyPlan(AgentSize(layers=4, width=128, heads=4, kv_heads=2), (1, 2, 4, 8), 1500, 1000, 30)
#: Everything is done, and nothing learned.
QUICK_STUDY = StudyPlan(AgentSize(layers=2, width=64, heads=2, kv_heads=1), (1, 2), 6, 40, 2, agent_steps=20)


@dataclass(frozen=True)
class Cell:
    """One method with one seed. Accuracies by number of facts, as right answers of ``items``.

    Attributes:
        method: its key.
        sent: bytes of one item's message, by number of facts.
        matched, mismatched, zero: with the item's own message, another item's, and zeros.
        kept: matched with the first k' slots alone, by k' and then by facts; of slot dropout.
    """

    seed: int
    method: str
    parameters: int
    sent: dict[int, int]
    items: int
    training_cpu: float
    matched: dict[int, int]
    mismatched: dict[int, int]
    zero: dict[int, int]
    kept: dict[int, dict[int, int]]


def run_study(
    plan: StudyPlan, out: Path, *, seeds: Sequence[int], methods: Sequence[str], workers: int
) -> dict[str, Any]:
    """Train and measure what the folder lacks; all figures, as `study.json` has them.

    Args:
        methods: keys, as in `study_methods`.
        workers: processes, of one thread each.

    Raises:
        GeometryError: no such method. CheckpointError: the folder holds another plan's figures.
        PlateauError: a model does not learn to recall.
    """
    chosen = [method_of(key) for key in methods]
    _check_mark(out, plan)
    for folder in (out, _agent_path(out, 0).parent):
        sweep(folder)
    with Workers(workers, Display()) as pool:
        unlearned = [seed for seed in seeds if not _agent_path(out, seed).exists()]
        pool.run([Job(f"model {seed}", _learn, (plan, out, seed)) for seed in unlearned])
        missing = [(seed, one) for one in chosen for seed in seeds if not _cell_path(out, seed, one).exists()]
        pool.run([Job(f"{one.name}, seed {seed}", _carry_out, (plan, out, seed, one)) for seed, one in missing])
    cells = [_read_cell(_cell_path(out, seed, one)) for one in chosen for seed in seeds]
    recalls = [json.loads(_agent_path(out, seed).with_suffix(".json").read_text(encoding="utf-8")) for seed in seeds]
    return {
        "plan": asdict(plan),
        "seeds": list(seeds),
        "text": [{"seed": seed, **recall} for seed, recall in zip(seeds, recalls)],
        "cells": [asdict(cell) for cell in cells],
        "first_token": _times(plan, out, seeds[0], chosen),
    }


# --- jobs
# ---------------------------------------------------------------------


def _learn(plan: StudyPlan, out: Path, seed: int, watch: Watch) -> None:
    """Job: the model of a seed, and how well it answers with the facts as text and with none."""
    watch("begins")
    most = max(plan.facts) + 2  # with its own two
    model = teach_recall(plan.size, 50_000 + seed, most_facts=most, watch=watch, most_steps=plan.agent_steps)
    generator = torch.Generator().manual_seed(60_000 + seed)
    right: dict[str, dict[int, int]] = {"told": {}, "none": {}}
    for n in plan.facts:
        items = cross_items(plan.items, n, generator)
        told = torch.cat([items.sharer_ids, items.receiver_ids], 1)
        right["told"][n] = int((answers_of(model, told) == items.answers).sum())
        right["none"][n] = int((answers_of(model, items.receiver_ids) == items.answers).sum())
    recall = recall_accuracy(model, most, generator, lines=plan.items)
    path = _agent_path(out, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path.with_suffix(".json"), json.dumps({**right, "items": plan.items, "recall": recall}).encode())
    write_whole(path, pack(model))


def _carry_out(plan: StudyPlan, out: Path, seed: int, method: Method, watch: Watch) -> None:
    """Job: train an adapter, ask over it, and put both into the folder."""
    watch("begins")
    model = _load_agent(plan, out, seed)
    adapter: Any = method.make(model, 70_000 + seed)
    began = time.process_time()
    method.train(adapter, model, plan.steps, max(plan.facts), seed=80_000 + seed, watch=watch)
    spent = time.process_time() - began
    watch("measuring")
    adapter.eval()
    channels = method.channels(adapter, model)
    generator = torch.Generator().manual_seed(90_000 + seed)
    found: dict[str, dict[int, int]] = {"sent": {}, "matched": {}, "mismatched": {}, "zero": {}}
    kept: dict[int, dict[int, int]] = {}
    for n in plan.facts:
        items = cross_items(plan.items, n, generator)
        matched, mismatched = (_sent(channels, told) for told in (items, items[others(items, generator)]))
        for name, sent in (("matched", matched), ("mismatched", mismatched), ("zero", channels.nothing(matched))):
            found[name][n] = _right(channels, items, sent)
        found["sent"][n] = len(_sent(channels, items[:1]))
        for k in _fewer(method.slots) if method.variant == "dropout" else ():
            cut = Message.from_bytes(matched).take_slots(k).to_bytes()
            kept.setdefault(k, {})[n] = _right(channels, items, cut)
    cell = Cell(seed, method.key, method.parameters(adapter), items=plan.items, training_cpu=spent, **found, kept=kept)
    adapter.save_pretrained(_adapter_path(out, seed, method))
    write_whole(_cell_path(out, seed, method), json.dumps(asdict(cell)).encode())


def _fewer(slots: int) -> list[int]:
    """1, 2, 4 ... below k."""
    return [k for k in (1, 2, 4, 8, 16, 32) if k < slots]


@torch.no_grad()
def _sent(channels: CrossChannels, items: CrossItems) -> bytes:
    return channels.message(read(channels.sharer, items.sharer_ids), items)


@torch.no_grad()
def _right(channels: CrossChannels, items: CrossItems, sent: bytes) -> int:
    return int((channels.answer(items.receiver_ids, sent) == items.answers).sum())


def _times(plan: StudyPlan, out: Path, seed: int, methods: Sequence[Method]) -> dict[str, float]:
    """Median seconds to the first token, by method, and of text and nothing; when nothing else of the study runs."""
    model = _load_agent(plan, out, seed)
    items = cross_items(2, max(plan.facts), torch.Generator().manual_seed(95_000 + seed))
    ways: dict[str, Callable[[], object]] = {}
    for method in methods:
        channels = method.channels(load_any(_adapter_path(out, seed, method)), model)
        with torch.no_grad():
            all_ways = channels.ways(items[:1], items[1:2])
        ways |= {method.key: all_ways[MATCHED], **{name: all_ways[name] for name in (NONE, TEXT)}}
    return first_token_times(ways, plan.rounds)


# --- the folder
# ---------------------------------------------------------------------


def _check_mark(out: Path, plan: StudyPlan) -> None:
    mark, mine = out / "plan.json", json.dumps({"format": _FORMAT, "plan": repr(plan)}, indent=1)
    if mark.exists():
        if (found := mark.read_text(encoding="utf-8")) != mine:
            expected = "a study of this version and plan (or take another folder)"
            raise CheckpointError(str(out), expected=expected, got=f"one of {found[:60]!r}")
        return
    out.mkdir(parents=True, exist_ok=True)
    write_whole(mark, mine.encode())


def _agent_path(out: Path, seed: int) -> Path:
    return out / "models" / f"{seed}.safetensors"


def _adapter_path(out: Path, seed: int, method: Method) -> Path:
    return out / "adapters" / f"{seed}-{method.key}"


def _cell_path(out: Path, seed: int, method: Method) -> Path:
    return _adapter_path(out, seed, method) / "cell.json"


def _read_cell(path: Path) -> Cell:
    row = json.loads(path.read_text(encoding="utf-8"))
    for name in ("sent", "matched", "mismatched", "zero"):
        row[name] = {int(n): count for n, count in row[name].items()}
    row["kept"] = {int(k): {int(n): right for n, right in by.items()} for k, by in row["kept"].items()}
    return Cell(**row)


def _load_agent(plan: StudyPlan, out: Path, seed: int) -> Any:
    model = make_agent(plan.size, 0)
    unpack(model, _agent_path(out, seed).read_bytes())
    return model.eval()
