"""The demo's agents and items in the forms that everything else reads: model folders with tokenizers, JSON lines.

So what works with published models works with these, without a download: ``lcf-fast train``, `lcf_fast.channels`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..files import write_whole
from ..reading.prefill import prefill
from ..slots import LatentSlots
from .tasks import CrossItems, SharedItems, characters, written

__all__ = ["agent_tokenizer", "save_agent", "save_items", "save_message", "save_questions"]

#: A chat is its contents, one after the other: the agents know no roles.
_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def agent_tokenizer() -> Any:
    """A fast tokenizer of the agents' language: a token a character; line ends, which join texts, are none.

    A character that is not of the language reads as the blank.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = characters()
    made = Tokenizer(models.WordLevel({character: i for i, character in enumerate(known)}, unk_token=known[-1]))
    made.normalizer = normalizers.Replace(Regex(r"\s"), "")
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token=known[-1], pad_token=known[-1])
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def save_agent(model: Any, folder: Path) -> None:
    """A model and its tokenizer, as ``from_pretrained`` of transformers reads them."""
    model.save_pretrained(folder)
    agent_tokenizer().save_pretrained(folder)


def save_items(items: CrossItems, path: Path) -> None:
    """JSON lines of cross context: a paragraph a fact, the key as the question, the value as the answer."""
    sharers = [written(facts) for facts in items.sharer_facts]
    own, keys, answers = (
        written(ids) for ids in (items.receiver_facts.flatten(1), items.keys[:, None], items.answers[:, None])
    )
    lines = [
        {"id": str(i), "sharer_context": theirs, "receiver_context": mine, "question": key, "answer": answer}
        for i, (theirs, mine, key, answer) in enumerate(zip(sharers, own, keys, answers))
    ]
    _write(lines, path)


def save_questions(items: SharedItems, path: Path) -> None:
    """JSON lines of shared context: what both models read, and the answer."""
    asked, answers = written(items.ids), written(items.answers[:, None])
    lines = [{"id": str(i), "prompt": text, "response": said} for i, (text, said) in enumerate(zip(asked, answers))]
    _write(lines, path)


def _write(lines: list[dict[str, Any]], path: Path) -> None:
    write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())


@torch.no_grad()
def save_message(adapter: LatentSlots, sharer: Any, item: CrossItems, path: Path) -> None:
    """One item's message of slots with what each drew on: ``path.lcf``, for `lcf-fast inspect`, and a picture of it.

    The message's metadata has the text that the sharer read.
    """
    from ..inspection import message_map, write_png

    ids = item.sharer_ids
    message = adapter.summarize(prefill(sharer, ids, torch.ones_like(ids)), slot_weights=True)
    (text,) = written(ids)
    path.parent.mkdir(parents=True, exist_ok=True)
    told = replace(message, metadata={"the sharer read": text})
    told.save(path.with_suffix(".lcf"), dtype="bfloat16", contents=("latent", "slot_weights"))
    heat = message_map(message)
    # The picture names the tokens themselves.
    write_png([replace(heat, columns=tuple(text), title=f"what each slot drew on of {text}")], path.with_suffix(".png"))
