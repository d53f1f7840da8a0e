"""One forward step: frozen prefills, the edit, and the frozen receiver's loss on the response.

Both models read their prompts without gradients. The receiver's cache of the prompt but its last token is edited by the
adapter; the receiver then reads that last token and the response, attending to the edited cache, and its cross-entropy
on the response is what the adapter learns from (spec, sections 2 and 5). Rows may be ragged: prompts are padded on the
left, responses on the right, and positions count real tokens only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..caches import Pair
from ..config import CacheGeometry
from ..errors import GeometryError, ShapeError
from ..reading.prefill import DTYPES, dynamic_cache, positions_of, prefill
from .timing import Stopwatch

if TYPE_CHECKING:
    from ..adapter import LatentCacheFlow
    from .batches import Batch

__all__ = ["OnlinePrefills", "Prefill", "TrainingStep", "frozen"]

@dataclass(frozen=True)
class Prefill:
    """Frozen caches of a batch, one ``(key, value)`` a layer of the whole model.

    Attributes:
        sharer: ``(B, Hs, M, Ds)`` a layer; M is the length of ``sharer_ids``, less the last token where both models
            read the same tokens. Layers that the adapter does not read may hold anything of that shape.
        receiver: ``(B, Hr, N - 1, Dr)`` a layer: the prompt but its last token.
    """

    sharer: Sequence[Pair]
    receiver: Sequence[Pair]


#: What gives the caches of a batch: the models themselves, or a store of what they once computed.
Prefiller = Callable[["Batch"], Prefill]


def frozen(model: Any, *, device: torch.device | str, precision: str) -> Any:
    """The model itself, moved and cast in place, in eval mode and without gradients."""
    return model.to(device=device, dtype=DTYPES[precision]).eval().requires_grad_(False)


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
        return Prefill(theirs, receiver_prefill(self.receiver, batch))


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

    Raises:
        GeometryError: a receiver of another geometry than the adapter's.
    """

    def __init__(
        self, adapter: LatentCacheFlow, receiver: Any, prefiller: Prefiller, stopwatch: Stopwatch | None = None
    ) -> None:
        super().__init__()
        if (found := CacheGeometry.of(receiver)) != adapter.config.receiver:
            raise GeometryError("receiver", expected=f"{adapter.config.receiver} as the adapter's", got=str(found))
        self.adapter = adapter
        self._frozen = (receiver,)
        self._prefiller = prefiller
        self.stopwatch = Stopwatch(receiver.device) if stopwatch is None else stopwatch

    def forward(self, batch: Batch) -> Tensor:
        """Scalar float32: the sum over the batch's response tokens. Call `backward` with what it returns."""
        if batch.receiver_ids.shape[1] < 2:
            raise ShapeError("receiver_ids", expected="prompts of two tokens or more", got="prompts of one token")
        with self.stopwatch.of("prefill"):
            caches = self._prefiller(batch)
        with self.stopwatch.of("adapter"):
            edited = self.edit(batch, caches)
        return self.loss(batch, edited)

    def backward(self, loss: Tensor) -> None:
        """``loss.backward()``, counting the adapter's part of it."""
        loss.backward()
        if self._edit_done is not None:
            self.stopwatch.add("adapter", self._edit_done)
            self._edit_done = None

    _edit_done: Any = None

    def edit(self, batch: Batch, caches: Prefill) -> Sequence[Pair]:
        """The receiver's cache of the prompt but its last token, edited by the adapter."""
        device = caches.receiver[0][0].device
        mask = batch.receiver_mask[:, :-1].to(device)
        _, sharer_mask = sharer_tokens(batch)
        sharer_mask = sharer_mask.to(device)
        if self.adapter.config.cross_context:
            message = self.adapter.summarize(caches.sharer, batch.spans, attention_mask=sharer_mask)
            edited = self.adapter.inject(caches.receiver, message, attention_mask=mask)
        else:
            index = None if batch.sharer_index is None else batch.sharer_index[:, :-1].to(device)
            edited = self.adapter.fuse(
                caches.sharer,
                caches.receiver,
                sharer_index=index,
                attention_mask=mask,
                sharer_attention_mask=sharer_mask,
            )
        self._watch(edited)
        return edited

    def _watch(self, edited: Sequence[Pair]) -> None:
        # The receiver's backward is over when all of the edited cache has its gradient; what follows is the adapter's.
        watched = [tensor for pair in edited for tensor in pair if tensor.requires_grad]
        if watched:

            def arrived(_: Any) -> None:
                self._edit_done = self.stopwatch.mark()

            torch.autograd.graph.register_multi_grad_hook(watched, arrived)

    def loss(self, batch: Batch, edited: Sequence[Pair]) -> Tensor:
        """Sum of the receiver's cross-entropy on the response, given the edited cache."""
        (receiver,) = self._frozen
        device = edited[0][0].device
        cache = dynamic_cache(edited)
        response, response_mask = batch.response_ids.to(device), batch.response_mask.to(device).bool()
        prompt_mask = batch.receiver_mask.to(device).long()
        last = batch.receiver_ids[:, -1:].to(device)
        mask = torch.cat([prompt_mask, response_mask[:, :-1].long()], 1)
        logits = receiver(
            input_ids=torch.cat([last, response[:, :-1]], 1),
            attention_mask=mask,
            position_ids=positions_of(mask)[:, prompt_mask.shape[1] - 1 :],
            past_key_values=cache,
            use_cache=True,
        ).logits
        # Only rows that count become float32: the vocabulary is what takes memory here.
        return nn.functional.cross_entropy(logits[response_mask].float(), response[response_mask], reduction="sum")
