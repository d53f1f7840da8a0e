"""The demo from agents to results: trains, measures, decides."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..slots import LatentSlots
from .agents import AgentSize, recall_accuracy, table_accuracy
from .channels import CHANNELS, MATCHED, MISMATCHED, first_token_times
from .experiments import (
    Agents,
    Findings,
    Study,
    adapter_of,
    carry_out,
    channels_of,
    items_of,
    learn_receiver,
    learn_sharer,
)
from .export import save_agent, save_items, save_message
from .jobs import Display, Job, Workers
from .lessons import Stage
from .statistics import Accuracy, Verdict, accuracy, verdict
from .tasks import CHANCE, CrossItems, SecretTable

__all__ = ["FULL", "QUICK", "Agent", "Channel", "Experiment", "Plan", "Results", "run_demo"]


@dataclass(frozen=True)
class Plan:
    """How much is done.

    Attributes:
        sharer, receiver: the two models' sizes.
        cross: LCF-X's training, by number of facts; that of the nearest smaller number serves for others.
        shared: LCF's training.
        slots: training of slots, whatever the number of facts.
        most_facts: that an agent learns to recall from its context: its own two and those told in text.
        agent_steps: at which an agent is taken as it is; None: when it has learned its task.
        items: that each accuracy of LCF-X is measured on (LCF: all pairs held out).
        rounds: that each time to first token is the median of.
    """

    sharer: AgentSize
    receiver: AgentSize
    cross: dict[int, tuple[Stage, ...]]
    shared: tuple[Stage, ...]
    slots: tuple[Stage, ...]
    items: int
    rounds: int
    most_facts: int = 6
    agent_steps: int | None = None


@dataclass(frozen=True)
class Agent:
    """What an agent has learned: accuracies of recall by number of facts in the context, and of the secret table."""

    role: str
    size: AgentSize
    parameters: int
    recall: dict[int, float]
    table: float


@dataclass(frozen=True)
class Channel:
    """One channel of an experiment; ``first_token`` in seconds, ``sent`` in bytes for one item."""

    name: str
    accuracy: Accuracy
    sent: int
    first_token: float


@dataclass(frozen=True)
class Experiment:
    """One adapter, and what came through each channel."""

    name: str
    method: str
    facts: int
    spans: int
    parameters: int
    training_steps: int
    training_cpu: float
    channels: tuple[Channel, ...]
    verdict: Verdict
    slots: int = 0

    def channel(self, name: str) -> Channel:
        return next(channel for channel in self.channels if channel.name == name)


@dataclass(frozen=True)
class Results:
    """Everything that a run found; times in seconds."""

    seed: int
    quick: bool
    workers: int
    machine: str
    versions: dict[str, str]
    chance: float
    agents: tuple[Agent, ...]
    experiments: tuple[Experiment, ...]
    cpu: float
    wall: float


_FULL_RECEIVER = AgentSize(layers=4, width=128, heads=4, kv_heads=4)
_FULL_SHARER = AgentSize(layers=5, width=96, heads=3, kv_heads=3)
FULL = Plan(
    sharer=_FULL_SHARER,
    receiver=_FULL_RECEIVER,
    cross={
        1: (Stage(350),),
        2: (Stage(600, keys=2), Stage(400, keys=4), Stage(500)),
        3: (Stage(450, keys=4), Stage(450)),
    },
    shared=(Stage(350),),
    slots=(Stage(1500),),
    items=1000,
    rounds=30,
)
#: Everything is done, and nothing learned: for tests, and to see that it works at all.
QUICK = Plan(
    sharer=AgentSize(layers=2, width=64, heads=2, kv_heads=2),
    receiver=AgentSize(layers=2, width=64, heads=2, kv_heads=1),
    cross={1: (Stage(10),)},
    shared=(Stage(10),),
    slots=(Stage(10),),
    items=50,
    rounds=3,
    agent_steps=30,
)


def run_demo(
    plan: Plan, *, facts: Sequence[int], seed: int, out: Path, workers: int, slots: Sequence[int] = ()
) -> Results:
    """Train both agents and an adapter for each experiment, and measure every channel.

    Args:
        facts: numbers of facts that the sharer holds, one LCF-X experiment each.
        seed: of everything random: weights, table, items.
        out: each adapter is saved to ``out/adapters/<name>``, the agents to ``out/agents``, and LCF-X's items, as what
            `lcf-fast eval` reads, to ``out/items``, a message of slots to ``out/messages/<name>.lcf``, with a picture.
        workers: processes, of one thread each.
        slots: numbers of slots, one experiment each for each number of facts.

    Raises:
        PlateauError: an agent does not learn its task.
    """
    began, cpu = time.perf_counter(), _cpu_seconds()
    seeds = range(100_000 * seed, 100_000 * (seed + 1), 1000)
    most, steps = plan.most_facts, plan.agent_steps
    with Workers(workers, Display()) as pool:
        sharer_data, receiver_data = pool.run(
            [  # the longer one first
                Job("sharer", learn_sharer, (plan.sharer, seeds[1], most, steps, seeds[0])),
                Job("receiver", learn_receiver, (plan.receiver, seeds[11], most, steps)),
            ]
        )
        agents = Agents(plan.sharer, plan.receiver, sharer_data, receiver_data, seeds[0])
        studies = [
            Study("LCF-X", n, plan.cross[max(m for m in plan.cross if m <= n)], plan.items, seeds[20 + n])
            for n in facts
        ]
        for i, k in enumerate(slots):
            studies += [Study("slots", n, plan.slots, plan.items, seeds[40 + 10 * i + n], k) for n in facts]
        studies.append(Study("LCF", 1, plan.shared, plan.items, seeds[20]))
        longest_first = sorted(studies, key=lambda study: -study.steps)
        found = pool.run([Job(study.name, carry_out, (study, agents)) for study in longest_first])
    findings = {study.name: each for study, each in zip(longest_first, found)}
    sharer, receiver = agents.load()
    for role, model in (("sharer", sharer), ("receiver", receiver)):
        save_agent(model, out / "agents" / role)
    _save_items(studies, agents, out / "items")
    experiments = [_experiment(study, findings[study.name], agents, sharer, receiver, plan, out) for study in studies]
    generator = torch.Generator().manual_seed(seeds[31])
    described = [
        _described(role, model, size, plan, agents.table(), generator)
        for role, model, size in (("sharer", sharer, plan.sharer), ("receiver", receiver, plan.receiver))
    ]
    return Results(
        seed=seed,
        quick=steps is not None,
        workers=workers,
        machine=_machine(),
        versions=_versions(),
        chance=CHANCE,
        agents=tuple(described),
        experiments=tuple(experiments),
        cpu=_cpu_seconds() - cpu,
        wall=time.perf_counter() - began,
    )


def _save_items(studies: Sequence[Study], agents: Agents, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for study in studies:
        if study.method == "LCF-X":
            items = items_of(study, agents.table(), torch.Generator().manual_seed(study.seed + 2))
            assert isinstance(items, CrossItems)
            save_items(items, folder / f"facts-{study.facts}.jsonl")


def _experiment(
    study: Study, findings: Findings, agents: Agents, sharer: Any, receiver: Any, plan: Plan, out: Path
) -> Experiment:
    """Bytes and times are measured here, when nothing else of the demo runs."""
    adapter = adapter_of(study, findings, sharer, receiver)
    name = study.name.lower().replace(", ", "-").replace(" ", "-")
    adapter.save_pretrained(out / "adapters" / name)
    channels = channels_of(study, adapter, sharer, receiver)
    items = items_of(study, agents.table(), torch.Generator().manual_seed(study.seed + 3))
    if isinstance(adapter, LatentSlots) and isinstance(items, CrossItems):
        save_message(adapter, sharer, items[:1], out / "messages" / name)
    sent = channels.sent(items[:1])
    times = first_token_times(channels.ways(items[:1], items[1:2]), plan.rounds)
    right = findings.right
    return Experiment(
        name=study.name,
        method=study.method,
        facts=study.facts,
        spans=study.facts if study.method == "LCF-X" else 0,
        slots=study.slots,
        parameters=adapter.parameter_count(),
        training_steps=study.steps,
        training_cpu=findings.training_cpu,
        channels=tuple(Channel(c, accuracy(right[c]), sent[c], times[c]) for c in CHANNELS),
        verdict=verdict(right[MATCHED], right[MISMATCHED]),
    )


def _described(
    role: str, model: Any, size: AgentSize, plan: Plan, table: SecretTable, generator: torch.Generator
) -> Agent:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    recall = {n: recall_accuracy(model, n, generator, lines=plan.items) for n in (1, 2, 4, plan.most_facts)}
    return Agent(role, size, parameters, recall, table_accuracy(model, table))


def _cpu_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    return sum(os.times()[:4])


def _machine() -> str:
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return f"{model}, {os.cpu_count()} CPUs"


def _versions() -> dict[str, str]:
    names = ("torch", "transformers")
    return {"lcf_fast": __version__, "python": platform.python_version(), **{n: metadata.version(n) for n in names}}
