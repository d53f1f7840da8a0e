"""The demo's jobs: an agent that learns, and an adapter that is trained and asked."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..adapter import LatentCacheFlow
from ..placement import Placement
from ..slots import LatentSlots
from .agents import AgentSize, make_agent, teach_recall, teach_table
from .channels import CHANNELS, CrossChannels, SharedChannels, SlotsChannels
from .jobs import Watch, pack, unpack
from .lessons import Sample, Stage, make_adapter, make_slots_adapter, train_adapter
from .tasks import CrossItems, SecretTable, SharedItems, cross_items, others

__all__ = [
    "Agents",
    "Findings",
    "Study",
    "adapter_of",
    "carry_out",
    "channels_of",
    "items_of",
    "learn_receiver",
    "learn_sharer",
]


@dataclass(frozen=True)
class Agents:
    """Both models as bytes, and the seed of the secret table."""

    sharer_size: AgentSize
    receiver_size: AgentSize
    sharer: bytes
    receiver: bytes
    table_seed: int

    def load(self) -> tuple[Any, Any]:
        """Sharer and receiver."""
        models = []
        for size, data in ((self.sharer_size, self.sharer), (self.receiver_size, self.receiver)):
            model = make_agent(size, 0)
            unpack(model, data)
            models.append(model.eval())
        return models[0], models[1]

    def table(self) -> SecretTable:
        return secret_table(self.table_seed)


@dataclass(frozen=True)
class Study:
    """One adapter's task: facts, with LCF-X in as many spans or with so many slots; or with LCF the secret table."""

    method: Literal["LCF-X", "LCF", "slots"]
    facts: int
    stages: tuple[Stage, ...]
    items: int
    seed: int
    slots: int = 0

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    @property
    def name(self) -> str:
        if self.method == "LCF":
            return "LCF, secret table"
        facts = f"{self.facts} fact{'s' if self.facts > 1 else ''}"
        return f"{self.slots} slot{'s' if self.slots > 1 else ''}, {facts}" if self.slots else f"LCF-X, {facts}"


@dataclass(frozen=True)
class Findings:
    """Of a study: the adapter's weights, between which models it was trained and where its slots stand (None: it has
    none), as the adapter says; which answers are right by channel, and CPU seconds of the training."""

    adapter: bytes
    trained_between: dict[str, str]
    placement: Placement | None
    right: dict[str, list[bool]]
    training_cpu: float


def secret_table(seed: int) -> SecretTable:
    """The same for the same seed, in every process."""
    return SecretTable(torch.Generator().manual_seed(seed))


def learn_receiver(size: AgentSize, seed: int, most_facts: int, most_steps: int | None, watch: Watch) -> bytes:
    """Job: an agent that recalls."""
    watch("begins")
    return pack(teach_recall(size, seed, most_facts=most_facts, watch=watch, most_steps=most_steps))


def learn_sharer(
    size: AgentSize, seed: int, most_facts: int, most_steps: int | None, table_seed: int, watch: Watch
) -> bytes:
    """Job: an agent that recalls and has the secret table by heart."""
    watch("begins")
    model = teach_recall(size, seed, most_facts=most_facts, watch=watch, most_steps=most_steps)
    table = secret_table(table_seed)
    return pack(teach_table(model, table, seed + 1, most_facts=most_facts, watch=watch, most_steps=most_steps))


def carry_out(study: Study, agents: Agents, watch: Watch) -> Findings:
    """Job: train the study's adapter and ask the receiver over every channel."""
    watch("begins")
    sharer, receiver = agents.load()
    table = agents.table()
    adapter = _fresh(study, sharer, receiver, study.seed)
    began = time.process_time()
    lessons = [(stage, _sample(study, stage, table)) for stage in study.stages]
    train_adapter(adapter, sharer, receiver, lessons, seed=study.seed + 1, watch=watch)
    spent = time.process_time() - began
    watch("measuring")
    generator = torch.Generator().manual_seed(study.seed + 2)
    items = items_of(study, table, generator)
    answers = channels_of(study, adapter, sharer, receiver).answers(items, others(items, generator))
    right = {channel: (answers[channel] == items.answers).tolist() for channel in CHANNELS}
    placement = adapter.trained_placement if isinstance(adapter, LatentSlots) else None
    return Findings(pack(adapter), adapter.trained_between, placement, right, spent)


def items_of(study: Study, table: SecretTable, generator: torch.Generator) -> CrossItems | SharedItems:
    """What the study is measured on: of the table, all pairs that no adapter is trained on."""
    return table.held_out if study.method == "LCF" else cross_items(study.items, study.facts, generator)


def channels_of(study: Study, adapter: Any, sharer: Any, receiver: Any) -> Any:
    """`CrossChannels`, `SlotsChannels` or `SharedChannels`."""
    kind = {"LCF": SharedChannels, "LCF-X": CrossChannels, "slots": SlotsChannels}[study.method]
    return kind(adapter, sharer, receiver)


def _fresh(study: Study, sharer: Any, receiver: Any, seed: int) -> LatentCacheFlow | LatentSlots:
    if study.slots:
        return make_slots_adapter(sharer, receiver, slots=study.slots, seed=seed)
    return make_adapter(sharer, receiver, cross_context=study.method == "LCF-X", seed=seed)


def adapter_of(study: Study, findings: Findings, sharer: Any, receiver: Any) -> LatentCacheFlow | LatentSlots:
    """The adapter that a study trained."""
    adapter = _fresh(study, sharer, receiver, 0)
    unpack(adapter, findings.adapter)
    adapter.trained_between = dict(findings.trained_between)
    if isinstance(adapter, LatentSlots):
        adapter.trained_placement = findings.placement
    return adapter.eval()


def _sample(study: Study, stage: Stage, table: SecretTable) -> Sample:
    if study.method == "LCF":
        return lambda items, generator: table.sample(items, generator).batch()
    return lambda items, generator: cross_items(items, study.facts, generator, keys=stage.keys).batch()
