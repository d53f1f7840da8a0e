"""The demo from agents to results: trains, measures, decides."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..adapter import LatentCacheFlow
from .agents import AgentSize, recall_accuracy, table_accuracy, teach_recall, teach_table
from .channels import CHANNELS, MATCHED, MISMATCHED, CrossChannels, SharedChannels, first_token_times
from .lessons import Sample, Stage, make_adapter, train_adapter
from .statistics import Accuracy, Verdict, accuracy, verdict
from .tasks import CHANCE, CrossItems, SecretTable, SharedItems, cross_items, others

__all__ = ["FULL", "QUICK", "Agent", "Channel", "Experiment", "Plan", "Results", "run_demo"]


@dataclass(frozen=True)
class Plan:
    """How much is done.

    Attributes:
        sharer, receiver: the two models' sizes.
        cross: stages of LCF-X's training, by number of facts; those of the nearest smaller number serve for others.
        shared: stages of LCF's training.
        most_facts: that an agent learns to recall from its context: its own two and those told in text.
        agent_steps: at which an agent is taken as it is; None: when it has learned its task.
        items: that each accuracy of LCF-X is measured on (LCF: all pairs held out).
        rounds: that each time to first token is the median of.
    """

    sharer: AgentSize
    receiver: AgentSize
    cross: dict[int, tuple[Stage, ...]]
    shared: tuple[Stage, ...]
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
    table: float | None


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

    def channel(self, name: str) -> Channel:
        return next(channel for channel in self.channels if channel.name == name)


@dataclass(frozen=True)
class Results:
    """Everything that a run found; times in seconds."""

    seed: int
    quick: bool
    threads: int
    machine: str
    versions: dict[str, str]
    chance: float
    agents: tuple[Agent, ...]
    experiments: tuple[Experiment, ...]
    cpu: float
    wall: float


#: Told what is being done, and how it goes: (stage, detail).
Watch = Callable[[str, str], None]

_FULL_RECEIVER = AgentSize(layers=4, width=128, heads=4, kv_heads=4)
_FULL_SHARER = AgentSize(layers=5, width=96, heads=3, kv_heads=3)
FULL = Plan(
    sharer=_FULL_SHARER,
    receiver=_FULL_RECEIVER,
    cross={
        1: (Stage(steps=350),),
        2: (Stage(steps=250, keys=2), Stage(steps=900)),
        4: (Stage(steps=250, keys=4), Stage(steps=900)),
    },
    shared=(Stage(steps=350),),
    items=1000,
    rounds=30,
)
#: Everything is done, and nothing learned: for tests, and to see that it works at all.
QUICK = Plan(
    sharer=AgentSize(layers=2, width=64, heads=2, kv_heads=2),
    receiver=AgentSize(layers=2, width=64, heads=2, kv_heads=1),
    cross={1: (Stage(steps=10),)},
    shared=(Stage(steps=10),),
    items=50,
    rounds=3,
    agent_steps=30,
)


def run_demo(plan: Plan, *, facts: Sequence[int], seed: int, out: Path, watch: Watch, progress: bool = True) -> Results:
    """Train both agents and an adapter for each experiment, and measure every channel.

    Args:
        facts: numbers of facts that the sharer holds, one LCF-X experiment each.
        seed: of everything random: weights, table, items.
        out: each adapter is saved to ``out/adapters/<name>``.
        watch: told what goes on. progress: whether adapters' training shows a bar.

    Raises:
        PlateauError: an agent does not learn its task.
    """
    began, cpu = time.perf_counter(), time.process_time()
    seeds = _Seeds(seed)
    table = SecretTable(seeds.generator())
    receiver, sharer = _agents(plan, table, seeds, watch)
    generator = seeds.generator()
    agents = tuple(
        Agent(
            role,
            size,
            sum(parameter.numel() for parameter in model.parameters()),
            {n: recall_accuracy(model, n, generator, lines=plan.items) for n in (1, 2, 4, plan.most_facts)},
            table_accuracy(model, table),
        )
        for role, model, size in (("sharer", sharer, plan.sharer), ("receiver", receiver, plan.receiver))
    )
    pair = _Pair(plan, sharer, receiver, seeds, out, watch, progress)
    experiments = [pair.cross(n) for n in facts]
    experiments.append(pair.shared(table))
    return Results(
        seed=seed,
        quick=plan.agent_steps is not None,
        threads=torch.get_num_threads(),
        machine=_machine(),
        versions=_versions(),
        chance=CHANCE,
        agents=agents,
        experiments=tuple(experiments),
        cpu=time.process_time() - cpu,
        wall=time.perf_counter() - began,
    )


class _Seeds:
    """Seeds that differ from one another and from those of any other run's, in the order in which they are taken."""

    def __init__(self, seed: int) -> None:
        self._next = seed * 10_000

    def take(self) -> int:
        self._next += 10
        return self._next

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.take())


def _agents(plan: Plan, table: SecretTable, seeds: _Seeds, watch: Watch) -> tuple[Any, Any]:
    """The receiver and the sharer, which alone knows the table."""
    steps = plan.agent_steps

    def recaller(role: str, size: AgentSize) -> Any:
        def say(said: str) -> None:
            watch(f"training the {role}", said)

        return teach_recall(size, seeds.take(), most_facts=plan.most_facts, watch=say, most_steps=steps)

    receiver, sharer = recaller("receiver", plan.receiver), recaller("sharer", plan.sharer)
    teach_table(
        sharer,
        table,
        seeds.take(),
        most_facts=plan.most_facts,
        watch=lambda said: watch("training the sharer", said),
        most_steps=steps,
    )
    return receiver, sharer


@dataclass(frozen=True)
class _Pair:
    plan: Plan
    sharer: Any
    receiver: Any
    seeds: _Seeds
    out: Path
    watch: Watch
    progress: bool

    def cross(self, facts: int) -> Experiment:
        """LCF-X, one span a fact."""
        stages = self.plan.cross[max(n for n in self.plan.cross if n <= facts)]
        lessons = [(stage, _cross_sample(facts, max(stage.keys, facts))) for stage in stages]
        adapter = make_adapter(self.sharer, self.receiver, cross_context=True, seed=self.seeds.take())
        name = f"LCF-X, {facts} fact{'s' if facts > 1 else ''}"
        cpu = self._train(name, adapter, lessons)
        generator = self.seeds.generator()
        channels = CrossChannels(adapter, self.sharer, self.receiver)
        items = cross_items(self.plan.items, facts, generator)
        return self._measure(name, "LCF-X", facts, facts, adapter, cpu, stages, channels, items, generator)

    def shared(self, table: SecretTable) -> Experiment:
        """LCF, on the pairs that the adapter was not trained on."""
        stages = self.plan.shared
        lessons = [(stage, _shared_sample(table)) for stage in stages]
        adapter = make_adapter(self.sharer, self.receiver, cross_context=False, seed=self.seeds.take())
        name = "LCF, secret table"
        cpu = self._train(name, adapter, lessons)
        channels = SharedChannels(adapter, self.sharer, self.receiver)
        generator = self.seeds.generator()
        return self._measure(name, "LCF", 1, 0, adapter, cpu, stages, channels, table.held_out, generator)

    def _train(self, name: str, adapter: LatentCacheFlow, lessons: Sequence[tuple[Stage, Sample]]) -> float:
        self.watch(f"training the adapter: {name}", f"{sum(stage.steps for stage, _ in lessons)} steps")
        began = time.process_time()
        train_adapter(adapter, self.sharer, self.receiver, lessons, seed=self.seeds.take(), progress=self.progress)
        adapter.eval().save_pretrained(self.out / "adapters" / name.lower().replace(", ", "-").replace(" ", "-"))
        return time.process_time() - began

    def _measure(
        self,
        name: str,
        method: str,
        facts: int,
        spans: int,
        adapter: LatentCacheFlow,
        cpu: float,
        stages: Sequence[Stage],
        channels: Any,
        items: CrossItems | SharedItems,
        generator: torch.Generator,
    ) -> Experiment:
        self.watch(f"measuring: {name}", f"{len(items)} items, {len(CHANNELS)} channels")
        answers = channels.answers(items, others(items, generator))
        right = {channel: (answers[channel] == items.answers).tolist() for channel in CHANNELS}
        first, second = items[:1], items[1:2]
        sent = channels.sent(first)
        times = first_token_times(channels.ways(first, second), self.plan.rounds)
        return Experiment(
            name=name,
            method=method,
            facts=facts,
            spans=spans,
            parameters=adapter.parameter_count(),
            training_steps=sum(stage.steps for stage in stages),
            training_cpu=cpu,
            channels=tuple(Channel(c, accuracy(right[c]), sent[c], times[c]) for c in CHANNELS),
            verdict=verdict(right[MATCHED], right[MISMATCHED]),
        )


def _cross_sample(facts: int, keys: int) -> Sample:
    return lambda items, generator: cross_items(items, facts, generator, keys=keys).batch()


def _shared_sample(table: SecretTable) -> Sample:
    return lambda items, generator: table.sample(items, generator).batch()


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
