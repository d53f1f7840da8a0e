"""The demo's agents with everything that `lcf-fast eval` compares on them, made once and kept in a folder.

Beside the adapters of the demo: 8 slots, a C2C fuser of the secret table, and for each method one that was trained with
the receiver in the sharer's place, reading what the receiver itself has read; all by the same loop. A part that the
folder holds is not made again, so that a run goes on where it was stopped.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..c2c import C2CConfig, C2CFuser
from ..config import CacheGeometry
from ..errors import CheckpointError
from ..files import write_whole
from ..training.models import load_model
from .agents import make_agent
from .experiments import learn_receiver, learn_sharer, secret_table
from .export import save_agent, save_items, save_questions
from .jobs import Display, Job, Watch, Workers, unpack
from .lessons import GATE, Sample, Stage, make_adapter, make_slots_adapter, train_adapter
from .run import FULL, Plan
from .tasks import SecretTable, cross_items

__all__ = ["Suite", "SuiteSet", "prepare_suite"]

#: Facts that the sharer holds, a set of questions each.
FACTS = (1, 4)
#: That a message of slots has, whatever the number of facts.
SLOTS = 8
_MARK = "suite.json"
_FORMAT = 1


@dataclass(frozen=True)
class SuiteSet:
    """Questions as `lcf-fast eval` reads them, and what was trained for them: folders. ``own``: for the control."""

    name: str
    data: Path
    adapters: tuple[Path, ...]
    own_adapters: tuple[Path, ...]
    c2c: Path | None = None
    own_c2c: Path | None = None
    #: How LCF-X's contexts are cut: as in training, and for several facts otherwise, too.
    spans: tuple[str, ...] = ("paragraphs",)


@dataclass(frozen=True)
class Suite:
    """Model folders, and the sets."""

    sharer: Path
    receiver: Path
    sets: tuple[SuiteSet, ...]


@dataclass(frozen=True)
class _Part:
    """One thing to be trained. ``method``: "lcf_x", "slots", "lcf" or "c2c". ``own``: the receiver is the sharer."""

    name: str
    method: str
    stages: tuple[Stage, ...]
    seed: int
    facts: int = 1
    own: bool = False


def prepare_suite(folder: Path, *, seed: int = 0, workers: int = 2, plan: Plan = FULL) -> Suite:
    """What the folder lacks is trained; everything else is as it was. Minutes on two cores, seconds when it is there.

    Args:
        seed: of weights, table and items.
        workers: processes, of one thread each.
        plan: sizes and steps.

    Raises:
        CheckpointError: the folder holds another seed's or plan's. PlateauError: an agent does not learn its task.
    """
    _check_mark(folder, seed, plan)
    seeds = range(100_000 * seed, 100_000 * (seed + 1), 1000)  # as the demo's
    table = secret_table(seeds[0])
    adapters, items = folder / "adapters", folder / "items"
    cross = {n: plan.cross[max(m for m in plan.cross if m <= n)] for n in FACTS}
    parts = [
        *(_Part(f"lcf-x-{n}", "lcf_x", cross[n], seeds[20 + n], facts=n) for n in FACTS),
        _Part("lcf-x-own", "lcf_x", cross[1], seeds[41], own=True),
        *(_Part(f"slots-{n}", "slots", plan.slots if n > 1 else cross[1], seeds[45 + n], facts=n) for n in FACTS),
        _Part("slots-own", "slots", cross[1], seeds[50], own=True),
        _Part("lcf", "lcf", plan.shared, seeds[20]),
        _Part("lcf-own", "lcf", plan.shared, seeds[42], own=True),
        _Part("c2c", "c2c", plan.shared, seeds[43]),
        _Part("c2c-own", "c2c", plan.shared, seeds[44], own=True),
    ]
    with Workers(workers, Display()) as pool:
        _agents(folder, plan, seeds, pool)
        missing = [part for part in parts if not (adapters / part.name).exists()]
        missing.sort(key=lambda part: -sum(stage.steps for stage in part.stages))
        pool.run([Job(part.name, _train, (part, folder, seeds[0])) for part in missing])
    items.mkdir(parents=True, exist_ok=True)
    for n in FACTS:
        generator = torch.Generator().manual_seed(seeds[60 + n])
        save_items(cross_items(plan.items, n, generator), items / f"facts-{n}.jsonl")
    save_questions(table.held_out, items / "secret-table.jsonl")
    found = [
        SuiteSet(
            f"facts-{n}",
            items / f"facts-{n}.jsonl",
            (adapters / f"lcf-x-{n}", adapters / f"slots-{n}"),
            (adapters / "lcf-x-own", adapters / "slots-own"),
            spans=("paragraphs", "windows:4", "one") if n > 1 else ("paragraphs",),  # a fact has two tokens
        )
        for n in FACTS
    ]
    lcf, lcf_own, c2c, c2c_own = (adapters / name for name in ("lcf", "lcf-own", "c2c", "c2c-own"))
    found.append(SuiteSet("secret-table", items / "secret-table.jsonl", (lcf,), (lcf_own,), c2c, c2c_own))
    return Suite(folder / "agents" / "sharer", folder / "agents" / "receiver", tuple(found))


def _check_mark(folder: Path, seed: int, plan: Plan) -> None:
    mark = folder / _MARK
    mine = {"format": _FORMAT, "seed": seed, "plan": repr(plan)}
    if mark.exists():
        try:
            found = json.loads(mark.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(str(mark), expected="a suite's mark", got=str(error)) from None
        if found != mine:
            expected = f"agents of seed {seed} and this version (or take another folder)"
            raise CheckpointError(str(folder), expected=expected, got=f"those of {str(found)[:80]}")
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(mark, json.dumps(mine, indent=1).encode() + b"\n")


def _agents(folder: Path, plan: Plan, seeds: range, pool: Workers) -> None:
    most, steps = plan.most_facts, plan.agent_steps
    wanted = {
        "sharer": Job("sharer", learn_sharer, (plan.sharer, seeds[1], most, steps, seeds[0])),
        "receiver": Job("receiver", learn_receiver, (plan.receiver, seeds[11], most, steps)),
    }
    sizes = {"sharer": plan.sharer, "receiver": plan.receiver}
    missing = [role for role in wanted if not (folder / "agents" / role).exists()]
    for role, data in zip(missing, pool.run([wanted[role] for role in missing])):
        model = make_agent(sizes[role], 0)
        unpack(model, data)
        _put(partial(save_agent, model), folder / "agents" / role)


def _load(folder: Path) -> Any:
    return load_model(folder.name, str(folder), "fp32")


def _train(part: _Part, folder: Path, table_seed: int, watch: Watch) -> None:
    """Job: train a part and put it into the folder."""
    watch("begins")
    receiver = _load(folder / "agents" / "receiver")
    sharer = receiver if part.own else _load(folder / "agents" / "sharer")
    made = _fresh(part, sharer, receiver)
    table = secret_table(table_seed)
    lessons = [(stage, _sample(part, stage, table)) for stage in part.stages]
    train_adapter(made, sharer, receiver, lessons, seed=part.seed + 1, watch=watch)
    _put(made.eval().save_pretrained, folder / "adapters" / part.name)


def _put(save: Callable[[Path], None], folder: Path) -> None:
    """What ``save`` writes into a folder, whole or not at all."""
    begun = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(begun, ignore_errors=True)
    save(begun)
    begun.replace(folder)


def _fresh(part: _Part, sharer: Any, receiver: Any) -> Any:
    sharer = receiver if part.own else sharer
    if part.method == "c2c":
        return _make_fuser(sharer, receiver, seed=part.seed)
    if part.method == "slots":
        return make_slots_adapter(sharer, receiver, slots=SLOTS, seed=part.seed)
    return make_adapter(sharer, receiver, cross_context=part.method == "lcf_x", seed=part.seed)


def _make_fuser(sharer: Any, receiver: Any, *, seed: int) -> C2CFuser:
    """A fresh one: as wide as the receiver's cache has channels, which is what the published ones are to theirs."""
    geometry = CacheGeometry.of(receiver)
    width = geometry.channels
    config = C2CConfig(CacheGeometry.of(sharer), geometry, hidden=width, intermediate=width, dropout=0.0)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        made = C2CFuser(config)
        for name, parameter in made.named_parameters():
            if name.endswith("gate_logit"):
                parameter.fill_(GATE)
    return made


def _sample(part: _Part, stage: Stage, table: SecretTable) -> Sample:
    if part.method in ("lcf_x", "slots"):

        def cross(items: int, generator: torch.Generator) -> Any:
            made = cross_items(items, part.facts, generator, keys=stage.keys)
            return made.own_batch() if part.own else made.batch()

        return cross
    return lambda items, generator: table.sample(items, generator).batch()
