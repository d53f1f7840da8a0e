"""The demo's agents: tiny Qwen3-architecture models, trained from scratch to recall facts from their context.

Recall takes two steps, to see which key a value follows and to find the value of the key that is asked, and until both
are there neither is of use: such training sits on a plateau for long, for some seeds longer than one has. What brings
it over in seconds: lines in which the first step alone is of use (`echo_lines`), and two keys to begin with, then
four, eight, all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LCFError
from .jobs import Watch
from .tasks import KEYS, NOTHING, VOCABULARY, SecretTable, echo_lines, recall_lines

__all__ = [
    "AgentSize",
    "PlateauError",
    "answers_of",
    "make_agent",
    "recall_accuracy",
    "table_accuracy",
    "teach_recall",
    "teach_table",
]

LEARNING_RATE = 2e-3
WARMUP = 30  # steps
LINES, QUESTIONS = 32, 8
ECHO_SHARE = 0.25  # of the steps
FIRST_KEYS = 2
CHECK_EVERY = 25  # steps
PASSED, LEARNED = 0.9, 0.985  # accuracy with the keys so far; with all of them
TABLE_LEARNED = 0.94  # before the last steps, which bring the rest
SETTLING = 75  # steps in which the rate then falls to zero
PATIENCE = 500  # steps at one number of keys; then it starts anew
ATTEMPTS = 3


class PlateauError(LCFError, RuntimeError):
    """An agent did not learn its task, however often it was tried."""


@dataclass(frozen=True)
class AgentSize:
    """Of a Qwen3 model with heads of 32 channels, two query heads to a KV head where ``kv_heads`` says so."""

    layers: int
    width: int
    heads: int
    kv_heads: int


def make_agent(size: AgentSize, seed: int) -> Any:
    """A `Qwen3ForCausalLM` with random weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=size.width,
        intermediate_size=2 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)


# --- learning
# ---------------------------------------------------------------------


def teach_recall(size: AgentSize, seed: int, *, most_facts: int, watch: Watch, most_steps: int | None = None) -> Any:
    """A model that recalls any of up to ``most_facts`` facts; starts anew, with other weights, when it is stuck.

    After ``most_steps``, if given, it is taken as it is.

    Raises:
        PlateauError: stuck every time.
    """
    for attempt in range(ATTEMPTS):
        model = make_agent(size, seed + 1000 * attempt)
        generator = torch.Generator().manual_seed(seed + 1000 * attempt)
        if _learn_recall(model, most_facts, generator, watch, most_steps):
            return model.eval()
    raise PlateauError(
        "seed",
        expected=f"an agent that learns recall in one of {ATTEMPTS} attempts (another seed may)",
        got=f"seed {seed}, {PATIENCE} steps without progress each time",
    )


def _learn_recall(
    model: Any, most_facts: int, generator: torch.Generator, watch: Watch, most_steps: int | None
) -> bool:
    # One fact can be told without a look at its key: a waste of steps until the keys are looked at.
    keys, since, least = FIRST_KEYS, 0, 2

    def lines() -> Iterator[tuple[Tensor, Tensor]]:
        if torch.rand((), generator=generator) < ECHO_SHARE:
            yield echo_lines(LINES, most_facts, generator)
        else:
            facts = int(torch.randint(least, min(keys, most_facts) + 1, (), generator=generator))
            yield recall_lines(LINES, facts, QUESTIONS, generator, keys=keys)

    training = _Training(model)
    while True:
        training.step(lines(), 1.0)
        if training.steps == most_steps:
            return True
        if training.steps % CHECK_EVERY:
            continue
        accuracy = recall_accuracy(model, min(keys, most_facts), generator, keys=keys)
        watch(f"recall among {keys} keys: {accuracy:.0%}")
        if keys == KEYS and accuracy >= LEARNED:
            break
        if keys < KEYS and accuracy >= PASSED:
            keys, since = 2 * keys, training.steps
        elif training.steps - since >= PATIENCE:
            return False
    least = 1
    for left in reversed(range(SETTLING)):
        training.step(lines(), left / SETTLING)
    return True


def teach_table(
    model: Any, table: SecretTable, seed: int, *, most_facts: int, watch: Watch, most_steps: int | None = None
) -> Any:
    """The same model, in place: it learns the secret table by heart, and keeps recall.

    After ``most_steps``, if given, it is taken as it is.

    Raises:
        PlateauError: not within the steps that it has.
    """
    generator = torch.Generator().manual_seed(seed)

    def lines() -> Iterator[tuple[Tensor, Tensor]]:
        facts = int(torch.randint(1, most_facts + 1, (), generator=generator))
        yield recall_lines(LINES // 2, facts, QUESTIONS, generator)
        yield table.lines(4 * LINES, generator, asked=False)
        yield table.lines(4 * LINES, generator, asked=True)

    training = _Training(model)
    for _ in range(4 * PATIENCE):
        training.step(lines(), 1.0)
        if training.steps == most_steps:
            return model.eval()
        if training.steps % CHECK_EVERY == 0:
            accuracy = table_accuracy(model, table)
            watch(f"secret table: {accuracy:.0%}")
            if accuracy >= TABLE_LEARNED:
                break
    else:
        got = f"{accuracy:.0%} after {training.steps} steps"
        raise PlateauError("seed", expected="a sharer that learns the table (another seed may)", got=got)
    for left in reversed(range(SETTLING)):
        training.step(lines(), left / SETTLING)
    return model.eval()


class _Training:
    """AdamW on next-token cross-entropy."""

    def __init__(self, model: Any) -> None:
        self.model, self.steps = model.train(), 0
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)

    def step(self, batches: Iterator[tuple[Tensor, Tensor]], factor: float) -> None:
        self.optimizer.zero_grad()
        for ids, labels in batches:
            predicted, wanted = self.model(input_ids=ids, use_cache=False).logits[:, :-1], labels[:, 1:]
            counts = wanted != NOTHING
            nn.functional.cross_entropy(predicted[counts], wanted[counts]).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * factor * min(1.0, self.steps / WARMUP)
        self.optimizer.step()


# --- being asked
# ---------------------------------------------------------------------


@torch.no_grad()
def answers_of(model: Any, ids: Tensor) -> Tensor:
    """``(B,)``: the token that a model says after ``ids (B, N)``."""
    best: Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(-1)
    return best


def recall_accuracy(model: Any, facts: int, generator: torch.Generator, *, keys: int = KEYS, lines: int = 256) -> float:
    """Share of right answers about one of ``facts`` facts in the context."""
    ids, _ = recall_lines(lines, facts, 1, generator, keys=keys)
    return float((answers_of(model, ids[:, :-1]) == ids[:, -1]).float().mean())


def table_accuracy(model: Any, table: SecretTable) -> float:
    """Share of the secret table that a model knows."""
    everything = table.everything
    return float((answers_of(model, everything.ids) == everything.answers).float().mean())
