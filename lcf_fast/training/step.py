"""One forward step: frozen prefills, the edit, and the frozen receiver's loss on the response.

Both models read their prompts without gradients. The receiver's cache of the prompt but its last token is edited by the
adapter; the receiver then reads that last token and the response, attending to the edited cache, and its cross-entropy
on the response is what the adapter learns from (spec, sections 2 and 5). Rows may be ragged: prompts are padded on the
left, responses on the right, and positions count real tokens only.

Slots are not an edit but further positions of that cache, before the last token or before the prompt; then the receiver
reads its prompt with gradients, too. Columns that a row has not stand before all that it has, as in the channel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..caches import Pair, cache_argument, extend_cache
from ..config import CacheGeometry
from ..errors import GeometryError, ShapeError
from ..message import Message
from ..placement import check_placement, slot_positions
from ..reading.padding import padding_first
from ..reading.prefill import DTYPES, dynamic_cache, positions_of, prefill, read_behind
from ..slot_spans import slots_there, summarize_spans
from .timing import Stopwatch

if TYPE_CHECKING:
    from ..adapter import LatentCacheFlow
    from ..slots import LatentSlots
    from ..spans import Spans
    from .batches import Batch

__all__ = ["OnlinePrefills", "Prefill", "TrainingStep", "frozen"]


class Prefill:
    """Frozen caches of a batch, one ``(key, value)`` a layer of the whole model.

    Args:
        sharer: the attribute of that name.
        receiver: gives that attribute; called once, when it is first asked for: where slots stand before the prompt
            the receiver reads it behind them, and nobody needs this.

    Attributes:
        sharer: ``(B, Hs, M, Ds)`` a layer; M is the length of ``sharer_ids``, less the last token where both models
            read the same tokens. Layers that the adapter does not read may hold anything of that shape.
        receiver: ``(B, Hr, N - 1, Dr)`` a layer: the prompt but its last token.
    """

    def __init__(self, sharer: Sequence[Pair], receiver: Callable[[], Sequence[Pair]]) -> None:
        self.sharer = sharer
        self._receiver = receiver

    @cached_property
    def receiver(self) -> Sequence[Pair]:
        return self._receiver()


#: What gives the caches of a batch: the models themselves, or a store of what they once computed.
Prefiller = Callable[["Batch"], Prefill]


def frozen(model: Any, *, device: torch.device | str, precision: str) -> Any:
    """The model itself, moved and cast in place, in eval mode and without gradients.

    Parameters alone are cast, as `from_pretrained` does: ``to(dtype)`` would round the rotary frequencies, too, and at
    position 1,000 turn keys a radian away from those of the model in use.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(DTYPES[precision])
    return model.to(device).eval().requires_grad_(False)


def sharer_tokens(batch: Batch) -> tuple[Tensor, Tensor]:
    """Ids and mask of what the sharer prefills: where both read the same tokens, not the last one either."""
    same = batch.sharer_index is None and batch.spans is None
    stop = batch.sharer_ids.shape[1] - (1 if same else 0)
    return batch.sharer_ids[:, :stop], batch.sharer_mask[:, :stop]


class OnlinePrefills:
    """Prefills by the models themselves, each time anew."""

    def __init__(self, sharer: Any, receiver: Any) -> None:
        self.sharer, self.receiver = sharer, receiver

    def __call__(self, batch: Batch) -> Prefill:
        device = self.receiver.device
        ids, mask = (part.to(device) for part in sharer_tokens(batch))
        theirs = prefill(self.sharer, ids, mask)
        return Prefill(theirs, lambda: receiver_prefill(self.receiver, batch))


def receiver_prefill(receiver: Any, batch: Batch) -> list[Pair]:
    """The receiver's cache of the prompt but its last token."""
    device = receiver.device
    return prefill(receiver, batch.receiver_ids[:, :-1].to(device), batch.receiver_mask[:, :-1].to(device))


class TrainingStep(nn.Module):
    """The sum of a micro-batch's cross-entropy over its response tokens; the adapter is its one submodule.

    The receiver is no submodule: nothing that walks parameters (an optimizer, data parallelism, ``state_dict``) sees
    the frozen model.

    Args:
        adapter: in training mode or not, as its owner has set it.
        receiver: a frozen transformers causal LM on the adapter's device.
        prefiller: where caches come from.
        stopwatch: counts ``prefill`` and ``adapter``, the latter with its backward.
        placement, slot_dropout, guard_weight, guard_margin: as in `TrainingSettings`.

    Raises:
        GeometryError: a receiver of another geometry than the adapter's; settings of slots for an adapter without, or
            a guard loss for one that has no message.
    """

    def __init__(
        self,
        adapter: LatentCacheFlow | LatentSlots,
        receiver: Any,
        prefiller: Prefiller,
        stopwatch: Stopwatch | None = None,
        *,
        placement: str = "append",
        slot_dropout: bool = False,
        guard_weight: float = 0.0,
        guard_margin: float = 1.0,
    ) -> None:
        super().__init__()
        self.placement = check_placement(placement)
        if not adapter.config.slots and (slot_dropout or placement != "append"):
            name = "slot_dropout" if slot_dropout else "placement"
            raise GeometryError(name, expected="a slots adapter", got=adapter.config.mode)
        if guard_weight and not adapter.config.cross_context:
            raise GeometryError("guard_weight", expected="an adapter that sends messages", got="LCF")
        self.slot_dropout, self.guard_weight, self.guard_margin = slot_dropout, guard_weight, guard_margin
        if (found := CacheGeometry.of(receiver)) != adapter.config.receiver:
            raise GeometryError("receiver", expected=f"{adapter.config.receiver} as the adapter's", got=str(found))
        self.adapter = adapter
        self._frozen = (receiver,)
        self._prefiller = prefiller
        self.stopwatch = Stopwatch(receiver.device) if stopwatch is None else stopwatch

    def forward(self, batch: Batch) -> Tensor:
        """Scalar float32: the sum over the batch's response tokens, with the guard loss where there is one.

        Call `backward` with what it returns.
        """
        if batch.receiver_ids.shape[1] < 2:
            raise ShapeError("receiver_ids", expected="prompts of two tokens or more", got="prompts of one token")
        with self.stopwatch.of("prefill"):
            caches = self._prefiller(batch)
            if self.placement == "append":  # else it is not needed, and not made
                _ = caches.receiver
        if self.guard_weight and len(batch.ids) > 1:
            return self._guarded(batch, caches)
        with self.stopwatch.of("adapter"):
            edited = self.edit(batch, caches)
        return self.loss(batch, edited)

    def _guarded(self, batch: Batch, caches: Prefill) -> Tensor:
        """The loss and, of each item, the hinge on what its own message is worth above its neighbour's."""
        with self.stopwatch.of("adapter"):
            message, there = self._message(batch, caches)
            assert message.latent is not None
            other = replace(message, latent=message.latent.roll(1, 1), summary=None)
            sent = [(message, there), (other, None if there is None else there.roll(1, 0))]
            edited = [self._informed(batch, caches, one, slots) for one, slots in sent]
            self._watch([pair for one in edited for pair in one])
        matched, mismatched = (self._losses(batch, one, slots) for one, (_, slots) in zip(edited, sent))
        tokens = batch.response_mask.to(matched.device).sum(1)
        hinge = (self.guard_margin - (mismatched - matched) / tokens).clamp_min(0)
        return matched.sum() + self.guard_weight * (tokens * hinge).sum()

    def backward(self, loss: Tensor) -> None:
        """``loss.backward()``, counting the adapter's part of it."""
        loss.backward()
        if self._edit_done is not None:
            self.stopwatch.add("adapter", self._edit_done)
            self._edit_done = None

    _edit_done: Any = None

    def edit(self, batch: Batch, caches: Prefill) -> Sequence[Pair]:
        """The receiver's cache of the prompt but its last token, edited by the adapter, or with its slots."""
        if self.adapter.config.cross_context:
            edited = self._informed(batch, caches, *self._message(batch, caches))
        else:
            device, adapter = caches.receiver[0][0].device, cast("LatentCacheFlow", self.adapter)
            index = None if batch.sharer_index is None else batch.sharer_index[:, :-1].to(device)
            edited = adapter.fuse(
                caches.sharer,
                caches.receiver,
                sharer_index=index,
                attention_mask=batch.receiver_mask[:, :-1].to(device),
                sharer_attention_mask=sharer_tokens(batch)[1].to(device),
            )
        self._watch(edited)
        return edited

    def _message(self, batch: Batch, caches: Prefill) -> tuple[Message, Tensor | None]:
        """What the sharer sends, and which of its slots each row has, ``(B, k)``; None without slots."""
        mask = sharer_tokens(batch)[1].to(caches.sharer[0][0].device)
        adapter: Any = self.adapter
        if not adapter.config.slots:
            return adapter.summarize(caches.sharer, batch.spans, attention_mask=mask), None
        most = count = adapter.config.slots
        if self.slot_dropout and adapter.training:
            # From torch's generator, as all noise is: a trainer seeds it by the micro-batch's place in the run.
            count = int(torch.randint(1, most + 1, (), device="cpu"))
        if self._spans(batch) is not None:
            return summarize_spans(adapter, caches.sharer, batch.spans, attention_mask=mask, slots=count)
        message: Message = adapter.summarize(caches.sharer, attention_mask=mask, slots=count)
        return message, self._there(batch, message.slots)

    def _spans(self, batch: Batch) -> Spans | None:
        """The spans that are pooled to slots each."""
        return batch.spans if self.adapter.config.per_span else None

    def _there(self, batch: Batch, slots: int) -> Tensor | None:
        """Which of so many slots each row has, ``(B, slots)``; None without slots."""
        if not self.adapter.config.slots:
            return None
        device, spans = self._frozen[0].device, self._spans(batch)
        if spans is None:
            return torch.ones(len(batch.ids), slots, dtype=torch.int64, device=device)
        return slots_there(spans, sharer_tokens(batch)[1], slots).to(device)

    def _informed(self, batch: Batch, caches: Prefill, message: Message, there: Tensor | None) -> Sequence[Pair]:
        """What the receiver goes on from, given a message; ``there (B, k)``: which of its slots a row has."""
        (receiver,) = self._frozen
        adapter: Any = self.adapter
        mask = batch.receiver_mask[:, :-1].to(receiver.device)
        if there is None:
            injected: Sequence[Pair] = adapter.inject(caches.receiver, message, attention_mask=mask)
            return injected
        is_behind = self.placement == "append"
        positions = slot_positions(mask.sum(1) if is_behind else 0, there, len(mask), mask.device)
        length = None if is_behind else int((mask.sum(1) + there.sum(1)).max())
        placed = adapter.place(receiver, message, positions, length=length)
        if is_behind:
            appended: Sequence[Pair] = extend_cache(caches.receiver, caches.receiver, placed)
            if self._spans(batch) is None:  # every row has all slots
                return appended
            return padding_first(appended, torch.cat([mask.long(), there], 1))
        return read_behind(receiver, placed, there, batch.receiver_ids[:, :-1].to(receiver.device), mask)

    def _watch(self, edited: Sequence[Pair]) -> None:
        # The receiver's backward is over when all of the edited cache has its gradient; what follows is the adapter's.
        watched = [tensor for pair in edited for tensor in pair if tensor.requires_grad]
        if watched:

            def arrived(_: Any) -> None:
                self._edit_done = self.stopwatch.mark()

            torch.autograd.graph.register_multi_grad_hook(watched, arrived)

    def loss(self, batch: Batch, edited: Sequence[Pair]) -> Tensor:
        """Sum of the receiver's cross-entropy on the response, given the edited cache."""
        return nn.functional.cross_entropy(*self._predicted(batch, edited), reduction="sum")

    def _losses(self, batch: Batch, edited: Sequence[Pair], there: Tensor | None) -> Tensor:
        """``(B,)``: each item's part of `loss`."""
        losses = nn.functional.cross_entropy(*self._predicted(batch, edited, there), reduction="none")
        mask = batch.response_mask.to(losses.device).bool()
        return losses.new_zeros(mask.shape).masked_scatter(mask, losses).sum(1)

    def _predicted(self, batch: Batch, edited: Sequence[Pair], there: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits ``(R, V)`` and ids ``(R,)`` of all response tokens, item by item.

        ``there``: which slots a row has, where those are not its own message's.
        """
        (receiver,) = self._frozen
        device = edited[0][0].device
        cache = dynamic_cache(edited)
        response, response_mask = batch.response_ids.to(device), batch.response_mask.to(device).bool()
        prompt_mask = batch.receiver_mask.to(device).long()
        slots = edited[0][0].shape[2] - (prompt_mask.shape[1] - 1)
        if slots:
            there = self._there(batch, slots) if there is None else there
            assert there is not None
            prompt_mask = torch.cat([there, prompt_mask], 1).sort(1).values
        last = batch.receiver_ids[:, -1:].to(device)
        mask = torch.cat([prompt_mask, response_mask[:, :-1].long()], 1)
        logits = receiver(
            input_ids=torch.cat([last, response[:, :-1]], 1),
            attention_mask=mask,
            position_ids=positions_of(mask)[:, prompt_mask.shape[1] - 1 :],
            use_cache=True,
            **cache_argument(receiver, cache),
        ).logits
        # Only rows that count become float32: the vocabulary is what takes memory here.
        return logits[response_mask].float(), response[response_mask]
