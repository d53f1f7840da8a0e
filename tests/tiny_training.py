"""A training run on tiny random models and random tokens; import as ``from tiny_training import ...``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lcf_fast import CacheGeometry, LatentCacheFlow, LCFConfig
from lcf_fast.spans import Spans
from lcf_fast.training.batches import Batch
from lcf_fast.training.caching import plan_prefills, write_prefills
from lcf_fast.training.prefills import Manifest
from lcf_fast.training.settings import TrainingSettings
from lcf_fast.training.trainer import Trainer

VOCABULARY = 61
#: Kinds of data, by the keywords that make it.
KINDS: dict[str, dict[str, bool]] = {"same": {}, "aligned": {"aligned": True}, "cross": {"cross_context": True}}
#: What a log line says of time, and so is never the same twice.
TIMES = ("seconds", "tokens_per_second", "prefill_share", "adapter_share")


def tiny_model(kind: str, seed: int, vocabulary: int = VOCABULARY) -> Any:
    """A random causal LM of two layers and width 32: Qwen3 or, with one KV head, Qwen2."""
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
    }
    if kind == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**sizes, num_key_value_heads=2, head_dim=16)).eval()
    return Qwen2ForCausalLM(Qwen2Config(**sizes, num_key_value_heads=1)).eval()


def tiny_adapter(sharer: Any, receiver: Any, *, cross_context: bool = False, dropout: float = 0.1) -> LatentCacheFlow:
    """Fresh, with open gates."""
    config = LCFConfig(
        CacheGeometry.of(sharer),
        CacheGeometry.of(receiver),
        bottleneck=64,
        cross_context=cross_context,
        dropout=dropout,
        gate_init=1.0,
    )
    torch.manual_seed(5)
    return LatentCacheFlow(config)


def padded(rows: Sequence[Sequence[int]], *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """``(B, N)`` ids and mask of ragged rows."""
    longest = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.int64)
    for i, row in enumerate(rows):
        where = slice(longest - len(row), longest) if left else slice(0, len(row))
        ids[i, where] = torch.tensor(row)
        mask[i, where] = 1
    return ids, mask


class RandomData:
    """Random ragged examples, ``examples`` of them over and over; each is the same wherever it comes up.

    LCF where both read the same tokens; with ``aligned``, where the sharer reads others and an index aligns them; or
    LCF-X.
    """

    def __init__(
        self,
        settings: TrainingSettings,
        *,
        cross_context: bool = False,
        aligned: bool = False,
        examples: int = 1000,
    ) -> None:
        self.settings, self.cross_context, self.aligned, self.examples = settings, cross_context, aligned, examples

    def ids(self, step: int) -> list[str]:
        size = self.settings.batch_size
        return [str(i % self.examples) for i in range(step * size, (step + 1) * size)]

    def batch(self, step: int, index: int) -> Batch:
        size = self.settings.micro_batch_size
        return self.of(self.ids(step)[index * size : (index + 1) * size])

    def digest(self) -> str:
        ids = [id for step in range(self.settings.steps) for id in self.ids(step)]
        return str((self.cross_context, self.aligned, ids))

    def of(self, ids: Sequence[str]) -> Batch:
        rows = [self._rows(name) for name in ids]
        prompt, prompt_mask = padded([row["prompt"] for row in rows], left=True)
        response, response_mask = padded([row["response"] for row in rows], left=False)
        sharer, sharer_mask = prompt, prompt_mask
        index, spans = None, None
        if self.aligned or self.cross_context:
            sharer, sharer_mask = padded([row["sharer"] for row in rows], left=True)
            starts = [sharer.shape[1] - len(row["sharer"]) for row in rows]
        if self.aligned:
            # Every second token of the prompt has a row of the sharer's.
            index = torch.full_like(prompt, -1)
            for i, (row, start) in enumerate(zip(rows, starts)):
                for n in range(0, len(row["prompt"]), 2):
                    index[i, prompt.shape[1] - len(row["prompt"]) + n] = start + n % len(row["sharer"])
        if self.cross_context:
            spans = Spans.given([[(s, s + 2), (s + 2, sharer.shape[1])] for s in starts])
        return Batch(
            ids=tuple(ids),
            receiver_ids=prompt,
            receiver_mask=prompt_mask,
            response_ids=response,
            response_mask=response_mask,
            sharer_ids=sharer,
            sharer_mask=sharer_mask,
            sharer_index=index,
            spans=spans,
        )

    def _rows(self, name: str) -> dict[str, list[int]]:
        generator = torch.Generator().manual_seed(int(name))
        rows = {}
        for part, least, most in (("prompt", 3, 9), ("response", 1, 6), ("sharer", 4, 8)):
            length = int(torch.randint(least, most, (), generator=generator))
            rows[part] = torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()
        return rows


def tiny_settings(**changes: Any) -> TrainingSettings:
    defaults = {"steps": 6, "batch_size": 5, "micro_batch_size": 2, "precision": "fp32", "device": "cpu", "seed": 3}
    return TrainingSettings(**{**defaults, "learning_rate": 1e-3, **changes})


def tiny_trainer(
    out: Path, settings: TrainingSettings, *, cross_context: bool = False, aligned: bool = False, **keywords: Any
) -> Trainer:
    """Everything from its seed, so that two of these are the same run."""
    sharer, receiver = tiny_model("qwen2", 1), tiny_model("qwen3", 2)
    dropout = keywords.pop("dropout", 0.1)
    adapter = tiny_adapter(sharer, receiver, cross_context=cross_context, dropout=dropout)
    data = RandomData(settings, cross_context=cross_context, aligned=aligned)
    if "prefiller" not in keywords:
        keywords.setdefault("sharer", sharer)
    keywords = {"data": data, "save_every": 2, "progress": False, **keywords}
    return Trainer(adapter, receiver, out=out, settings=settings, **keywords)


def tiny_store(
    out: Path,
    settings: TrainingSettings,
    *,
    cross_context: bool = False,
    aligned: bool = False,
    examples: int = 1000,
    **keywords: Any,
) -> Manifest:
    """The prefills of what `tiny_trainer` with these settings reads."""
    data = RandomData(settings, cross_context=cross_context, aligned=aligned, examples=examples)
    sharer, receiver = tiny_model("qwen2", 1), tiny_model("qwen3", 2)
    plan = plan_prefills(data, settings, CacheGeometry.of(sharer), CacheGeometry.of(receiver), **keywords)
    return write_prefills(out, plan, data, sharer, receiver)


def read_log(out: Path) -> list[dict[str, Any]]:
    """The log, less what it says of time."""
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in entry.items() if name not in TIMES} for entry in entries]
