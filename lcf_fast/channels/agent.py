"""A model with its tokenizer: how it reads a batch of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from ..caches import Pair
from ..errors import ShapeError
from ..reading.chat import ChatReader
from ..reading.padding import padded
from ..reading.prefill import prefill

__all__ = ["Agent", "padded_left"]

Offsets = list[tuple[int, int]]
#: Of a generation config: no say in which token is said, or in the caller's hands each time.
_KEPT = {
    "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config", "max_new_tokens"
}  # fmt: skip


class Agent:
    """A causal LM of transformers, in eval mode, with the tokenizer that goes with it.

    Args:
        name: how requests and errors call it.
        model: any causal LM that `generate` works with; nothing of it is changed.
        tokenizer: of transformers; a fast one where spans or alignment need offsets.
        template_options: for the chat template, such as ``{"enable_thinking": False}``.
    """

    def __init__(
        self, name: str, model: Any, tokenizer: Any, *, template_options: Mapping[str, Any] | None = None
    ) -> None:
        self.name, self.model = name, model
        self.reader = ChatReader(name, tokenizer, template_options)

    def called(self, name: str) -> Agent:
        """The same agent under another name."""
        other = copy(self)
        other.name = name
        return other

    @property
    def tokenizer(self) -> Any:
        return self.reader.tokenizer

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def limit(self) -> int | None:
        """Positions that the model has; None: its configuration does not say."""
        limit: int | None = getattr(self.model.config, "max_position_embeddings", None)
        return limit

    def prompts(self, chats: Sequence[list[tuple[str, str]]], room: int = 0) -> list[list[int]]:
        """Token ids of each chat, rendered for an answer.

        Raises:
            ShapeError: a prompt of fewer than two tokens, or one that with ``room`` new ones is over the model's limit.
        """
        rows = [self.reader.prompt(self.reader.render(chat))[0] for chat in chats]
        for row in rows:
            self.check_length(len(row), room)
        return rows

    def check_length(self, tokens: int, room: int = 0) -> None:
        """Refuse what the model cannot read."""
        if tokens < 2:
            raise ShapeError(self.name, expected="a prompt of two tokens or more", got=str(tokens))
        if self.limit is not None and tokens + room > self.limit:
            expected = f"{self.limit} tokens at most, as the model's max_position_embeddings (shorten the context)"
            raise ShapeError(self.name, expected=expected, got=f"{tokens} and {room} to come")

    def read(self, ids: Tensor, mask: Tensor) -> list[Pair]:
        """The cache of ``ids (B, N)``, padded on the left where ``mask`` is zero."""
        return prefill(self.model, ids, mask)

    def padding(self) -> int:
        """A token to pad with; it is never attended to.

        ``generate`` fills a row that has ended with it, too: where the tokenizer has none for that, with the one that
        ends a text, since token 0 may be a word like any other.
        """
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0

    def greedy(self) -> dict[str, Any]:
        """Options for ``generate`` to say the likeliest token each time; what ends and fills a text stays the model's.

        ``do_sample=False`` alone is not enough: what a model's generation config holds applies as well, such as the
        penalty on repetition that Qwen2.5 comes with. A config without it would not do either, since ``generate``
        takes from the model's what another one leaves out.
        """
        from transformers import GenerationConfig

        plain = GenerationConfig()
        own = {name for name in self.model.generation_config.to_diff_dict() if hasattr(plain, name)} - _KEPT
        steps: dict[str, Any] = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "use_cache": True}
        return {name: getattr(plain, name) for name in sorted(own)} | steps

    def until_the_end(self, written: Tensor, options: Mapping[str, Any] | None = None) -> list[Tensor]:
        """Each row of new tokens ``(B, T)`` up to and with the first that ends it: the rest is filling. On the CPU.

        ``options``: that ``generate`` was called with.
        """
        given = options or {}
        ends = self.model.generation_config.eos_token_id
        if "eos_token_id" in given:
            ends = given["eos_token_id"]
        elif getattr(given.get("generation_config"), "eos_token_id", None) is not None:
            ends = given["generation_config"].eos_token_id
        known = torch.as_tensor([] if ends is None else ends, dtype=torch.int64, device="cpu").flatten()
        rows = []
        for row in written.cpu():
            at = torch.isin(row, known).nonzero()
            rows.append(row[: int(at[0]) + 1] if len(at) else row)
        return rows


def padded_left(rows: Sequence[Sequence[int]], fill: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """``(B, N)`` ids and mask of ragged rows."""
    ids, mask = padded(rows, left=True, fill=fill)
    return ids.to(device), mask.to(device)
