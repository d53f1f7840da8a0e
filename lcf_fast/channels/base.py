"""What all channels share: a batch of requests in, answers with times and bytes out, by `generate` of transformers.

A channel says what the receiver goes on from (`Channel.prepare`): a prompt, and the cache of all of it but the last
token, edited or not. The rest is the receiver's own `generate`: sampling, streaming and stopping criteria work as they
do there. Nothing of a model is patched.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..caches import Pair, cache_argument
from ..errors import BackendError, GeometryError, ShapeError
from ..reading.prefill import dynamic_cache, forgets_at
from .agent import Agent
from .clock import Clock, LaunchCount
from .request import Answer, Request, Timings

__all__ = ["Channel", "Clock", "Prepared"]

#: Options of ``generate`` that drop a cache it is given, make another, or read the prompt behind it once more (so does
#: what drafts tokens), with what leaves each out.
_AGAINST_CACHES: dict[str, Any] = {
    "use_cache": True,
    "cache_implementation": None,
    "assistant_model": None,
    "assistant_early_exit": None,
    "prompt_lookup_num_tokens": None,
    "use_mtp": False,
    "token_healing": False,
}


@dataclass
class Prepared:
    """What the receiver goes on from.

    Attributes:
        ids, mask: ``(B, N)`` prompts, padded on the left.
        cache: ``(B, H, N - 1, D)`` a layer, of all but the last token.
        sent: bytes that crossed, for each request.
    """

    ids: Tensor
    mask: Tensor
    cache: list[Pair]
    sent: list[int]


class Channel(ABC):
    """One way for models to help the receiver.

    Attributes:
        name: as reports call it.
        receiver: who answers.
        edits: whether the cache holds more than the receiver's reading of the prompt, so that reading anew loses it.
    """

    name: str
    edits: bool = True

    def __init__(self, receiver: Agent, sharers: Iterable[Agent] = ()) -> None:
        self.receiver = receiver
        self._agents = (receiver, *sharers)

    @property
    def _devices(self) -> list[torch.device]:
        """Those of all models, which the clock waits for."""
        return [agent.device for agent in self._agents]

    @abstractmethod
    def prepare(self, requests: Sequence[Request], clock: Clock, room: int) -> Prepared:
        """Read, communicate, and leave the last token of each prompt to the receiver.

        ``room``: new tokens that must fit behind the prompt.
        """

    def call(self) -> AbstractContextManager[Any]:
        """What `answer` and `next_logits` run within; entering it is on their clock."""
        return nullcontext()

    def check(self, requests: Sequence[Request], room: int) -> None:
        """Refuse what `prepare` would refuse of these requests, by their texts alone: no model runs.

        Raises:
            As `prepare`: too long for a model, a template that refuses them, a decoy that is missing.
        """
        for prompt in self.receiver.prompts([request.asked() for request in requests], room):
            self._check_asked(len(prompt), room)

    def _check_asked(self, tokens: int, room: int) -> None:
        """Of `check`: a prompt of so many tokens, slots among them."""
        if room > 1:  # a single one may be asked by `next_logits`, which keeps the cache
            self._check_kept(tokens - 1, tokens, room)

    def _check_kept(self, held: int, tokens: int, room: int) -> None:
        """Refuse what ``generate()`` would drop the edited cache of, ``held`` of ``tokens``, without a word."""
        most = forgets_at(self.receiver.model) if self.edits else None
        if most is not None and held <= most < tokens - 1 + room:
            expected = f"all within {most} tokens, or a prompt beyond (generate() reads anew there, without messages)"
            raise ShapeError(self.receiver.name, expected=expected, got=f"{tokens} and {room} to come")

    @torch.no_grad()
    def answer(self, requests: Sequence[Request], *, max_new_tokens: int = 32, **options: Any) -> list[Answer]:
        """The receiver's answers to a batch of requests.

        Args:
            max_new_tokens, options: for ``generate``: ``do_sample``, ``streamer``, ``stopping_criteria`` and so on;
                the model's own generation config holds beside them (`Agent.greedy`: options that leave nothing of it),
                but for what does not go on from a cache.

        Raises:
            GeometryError: no request; a sharer that the channel does not have. ShapeError: too long for a model, or
                across the length at which it drops a cache (Phi-3). BackendError: options that do not go on from a
                cache: drafted tokens (``assistant_model``, ``prompt_lookup_num_tokens``), ``use_cache=False`` and so
                on. And as the channel's own parts raise.
        """
        check_requests(requests)
        options = _going_on(options)
        from transformers import StoppingCriteriaList

        clock = Clock(*self._devices)
        with self.call():
            prepared = self.prepare(requests, clock, max_new_tokens)
            cache = dynamic_cache(prepared.cache)
            self._check_kept(cache.get_seq_length(), prepared.ids.shape[1], max_new_tokens)
            if (times := self._rows_a_request(options)) > 1:  # generate() expands all that it is given but the cache
                cache.batch_repeat_interleave(times)
            criteria = [_Watch(clock), *options.pop("stopping_criteria", ())]
            options.setdefault("pad_token_id", self.receiver.padding())
            out = self.receiver.model.generate(
                prepared.ids,
                attention_mask=prepared.mask,
                max_new_tokens=max_new_tokens,
                stopping_criteria=StoppingCriteriaList(criteria),
                **cache_argument(self.receiver.model, cache),
                **options,
            )
            timings = clock.timings()
        new = (out if isinstance(out, Tensor) else out.sequences)[:, prepared.ids.shape[1] :]
        repeats = new.shape[0] // len(requests)  # num_return_sequences
        ended = self.receiver.until_the_end(new, options)
        texts = self.receiver.tokenizer.batch_decode(ended, skip_special_tokens=True)
        sent = [size for size in prepared.sent for _ in range(repeats)]
        return [Answer(text, ids, size, timings) for text, ids, size in zip(texts, ended, sent)]

    @torch.no_grad()
    def next_logits(self, requests: Sequence[Request]) -> tuple[Tensor, list[int], Timings]:
        """``(B, V)`` logits of each answer's first token, float32, with the bytes sent and the times."""
        check_requests(requests)
        clock = Clock(*self._devices)
        with self.call():
            prepared = self.prepare(requests, clock, 1)
            cache = dynamic_cache(prepared.cache)
            logits = self.receiver.model(
                input_ids=prepared.ids[:, -1:],
                attention_mask=prepared.mask,
                position_ids=prepared.mask.sum(1, keepdim=True) - 1,
                use_cache=True,
                **cache_argument(self.receiver.model, cache),
            ).logits[:, -1]
            clock.token()
            return logits.float(), prepared.sent, clock.timings()

    @torch.no_grad()
    def launches(self, requests: Sequence[Request]) -> int | None:
        """Kernels that the communication of a batch launches on a GPU; None elsewhere. Call it warm."""
        check_requests(requests)
        if self.receiver.device.type != "cuda":
            return None
        clock = LaunchCount(*self._devices)
        self.prepare(requests, clock, 1)
        return clock.launches

    def _rows_a_request(self, options: Mapping[str, Any]) -> int:
        """How many rows ``generate`` makes of one: its beams, or the answers asked for."""
        config = options.get("generation_config") or self.receiver.model.generation_config
        names = ("num_beams", "num_return_sequences")
        return max(int(options.get(name) or getattr(config, name, None) or 1) for name in names)


def _going_on(options: dict[str, Any]) -> dict[str, Any]:
    """Options under which ``generate`` goes on from its cache, whatever the model's own generation config says."""
    from transformers import GenerationConfig

    config, known = options.get("generation_config"), GenerationConfig()
    kept = {name: off for name, off in _AGAINST_CACHES.items() if name == "assistant_model" or hasattr(known, name)}
    for name, off in kept.items():
        given = options.get(name, getattr(config, name, None))
        if given is not None and given != off:
            expected = f"{off}: generate() would not go on from the receiver's cache, and lose what was communicated"
            got = repr(given) if isinstance(given, (bool, int, str)) else type(given).__name__
            raise BackendError(name, expected=expected, got=got)
    return {**options, **kept}


def check_requests(requests: Sequence[Request]) -> None:
    if not requests:
        raise GeometryError("requests", expected="one request or more", got="none")


class _Watch:
    """A stopping criterion that never stops: it sees when the first token is there."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self._clock.token()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
