"""KVComm as a channel: sharers with the receiver's own weights hand on the cache of what they read, in some layers.

After KVComm (arXiv 2510.03346); training-free. A sharer prefills its context alone. The receiver prefills
its prompt with the sharer's keys and values before its own in the chosen layers, its positions going on where the
context ends. Layer 0 is always shared whole; all other layers keep the context's first token, an attention sink.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..caches import Pair, cache_argument
from ..config import CacheGeometry
from ..errors import GeometryError, IndexRangeError, ShapeError
from ..reading.model_fingerprint import model_sample
from ..reading.prefill import dynamic_cache, positions_of, read_on, sliding_window
from .agent import Agent, padded_left
from .base import Channel, Clock, Prepared, check_requests
from .controls import Control, Noise, check_control, controlled_cache, sent_for
from .kvcomm_attention import Layout, check_implementation, ragged_attention
from .kvcomm_selection import LayerSelection, alpha_for, layer_scores, top_layers
from .request import Request
from .routing import rows_told

__all__ = ["KVCommChannel", "LayerSelection"]


@dataclass
class _Plan:
    """What is to be read: tokens of each row's prompt, and by sharer its rows with their contexts' tokens."""

    prompts: list[list[int]]
    contexts: dict[str, dict[int, list[int]]]


@dataclass
class _Shared:
    """What has come from the sharers.

    ``cache``: ``(B, H, S, D)`` in the whole layers, ``(B, H, segments, D)`` in the others. ``mask``: ``(B, S)``.
    ``layout``: None where no row has a context. ``sent``: bytes, for each row.
    """

    cache: list[Pair]
    mask: Tensor
    layout: Layout | None
    sent: list[int]


class KVCommChannel(Channel):
    """Sharers of the same weights read their own contexts; the receiver attends to some layers of their caches.

    A request that a sharer has no context for is not helped by it. Where several help with one, each begins at the
    position at which the one before has ended. In a call the receiver's ``attn_implementation`` (sdpa or eager) is
    wrapped, and set back after it: one call at a time for each model. What ``generate`` sees as the tokens before the
    prompt are repeats of the prompt's first: the context's own do not cross, and so neither a penalty on repetition nor
    a streamer knows them.

    Args:
        receiver: who answers.
        sharers: with the same model object, or one of the same configuration and weights (a sample is compared).
        ratio: share of layers that `calibrate` chooses, which cross whole beside layer 0; 1.0 shares all, and needs no
            calibration.
        layers: to share, beside layer 0, instead of calibrating: indices, or a saved `LayerSelection`.
        alpha: weight of the attention mass in `calibrate`; None: 0.8 for Qwen, 1 for others.
        original_mask: the mask of the original code: in layers that are not shared its columns are the wrong ones, so
            that while the prompt is read its tokens see later ones, too.
        name: as reports call it.
        control: what is sent (`lcf_fast.channels.controls`).
        seed: of the random control.

    Raises:
        GeometryError: a sharer of other weights, names that are not unique, a ratio or alpha out of range, a model
            whose layers are not all attention; of a call also where no layers are chosen yet. IndexRangeError: layers
            that the model does not have. BackendError, of a call as well: an attention implementation that cannot be
            wrapped.
    """

    def __init__(
        self,
        receiver: Agent,
        sharers: Sequence[Agent],
        *,
        ratio: float = 0.5,
        layers: Sequence[int] | LayerSelection | None = None,
        alpha: float | None = None,
        original_mask: bool = False,
        name: str = "kvcomm",
        control: str = "matched",
        seed: int = 0,
    ) -> None:
        super().__init__(receiver, sharers)
        self.name, self.control, self.seed = name, check_control(control), seed
        self.geometry = CacheGeometry.of(receiver.model)
        _check_model(receiver)
        check_implementation(receiver.model)
        self.sharers = _by_name(receiver, sharers)
        self.ratio, self.original_mask = ratio, original_mask
        self.alpha = alpha_for(receiver.model.config) if alpha is None else alpha
        everything = top_layers(layer_scores([0.0] * self.geometry.layers, self.alpha), ratio)  # checks both
        self.layers: tuple[int, ...] | None = None
        if isinstance(layers, LayerSelection):
            if layers.model != model_sample(receiver.model, "fp32"):
                expected = f"a selection calibrated on the model of {receiver.name!r} (calibrate anew)"
                raise GeometryError("layers", expected=expected, got="one of another model")
            self.layers = layers.layers
        elif layers is not None:
            self.layers = _checked_layers(layers, self.geometry.layers)
        elif len(everything) == self.geometry.layers:
            self.layers = everything

    @property
    def whole_layers(self) -> frozenset[int]:
        """Layers whose cache crosses whole: the chosen ones and layer 0.

        Raises:
            GeometryError: none chosen yet.
        """
        if self.layers is None:
            expected = "layers to share (`channel.calibrate(request)` chooses them; or give `layers=`)"
            raise GeometryError("layers", expected=expected, got="none")
        return frozenset({0, *self.layers})

    @torch.no_grad()
    def calibrate(self, request: Request) -> LayerSelection:
        """Choose the layers by one request, for all calls from now on; `LayerSelection.save` keeps it.

        All layers are shared, the prompt is read causally, and the attention of its tokens to the context is measured.

        Raises:
            GeometryError: a request that no sharer has a context for. And as `answer` does.
        """
        clock = Clock(*self._devices)
        plan = self._plan([request], [request], 0)
        everything = frozenset(range(self.geometry.layers))
        shared = self._share(plan, [request], everything, clock, "matched")
        if shared.layout is None:
            expected = f"a context for a sharer of {', '.join(self.sharers)}"
            raise GeometryError("request", expected=expected, got="none")
        with ragged_attention(self.receiver.model) as attention:
            attention.layout, attention.mass = shared.layout, {}
            try:
                ids, mask = self._padded(plan.prompts)
                self._read_prompt(shared, ids, mask)
                found = attention.mass
            finally:
                attention.layout = attention.mass = None
        mass = tuple(found[layer] for layer in range(self.geometry.layers))
        scores = tuple(layer_scores(mass, self.alpha))
        self.layers = top_layers(scores, self.ratio)
        model = model_sample(self.receiver.model, "fp32")
        return LayerSelection(self.layers, self.ratio, self.alpha, mass, scores, model)

    def call(self) -> AbstractContextManager[Any]:
        """As `Channel.call`: layers of different lengths need an attention that knows them."""
        return ragged_attention(self.receiver.model)

    def check(self, requests: Sequence[Request], room: int) -> None:
        """As `Channel.check`."""
        plan = self._plan(requests, sent_for(requests, self.control), room)
        for row, prompt in enumerate(plan.prompts):
            contexts = sum(len(read[row]) for read in plan.contexts.values() if row in read)
            self._check_asked(contexts + len(prompt), room)

    def prepare(self, requests: Sequence[Request], clock: Clock, room: int) -> Prepared:
        """As `Channel.prepare`, with layers of different lengths: to be gone on from within the same
        `call`, as `answer` and `next_logits` do."""
        check_requests(requests)
        whole = self.whole_layers
        told = sent_for(requests, self.control)
        plan = self._plan(requests, told, room)
        shared = self._share(plan, told, whole, clock, self.control)
        ids, mask = self._padded(plan.prompts)
        with ragged_attention(self.receiver.model) as attention, clock.of("receiver"):
            attention.layout = shared.layout
            # The original reads all of the prompt at once, so that earlier tokens see the last one, too. The last is
            # then read again, from the same cache: it sees everything either way.
            last = mask.shape[1] if self.original_mask else mask.shape[1] - 1
            cache = self._read_prompt(shared, ids[:, :last], mask[:, :last])
            if self.original_mask:
                cache = [(key[:, :, :-1], value[:, :, :-1]) for key, value in cache]
        firsts = torch.tensor([[prompt[0]] for prompt in plan.prompts], device=ids.device)
        ids = torch.cat([firsts.expand(-1, shared.mask.shape[1]), ids], 1)
        return Prepared(ids, torch.cat([shared.mask, mask], 1), cache, shared.sent)

    # --- reading
    # -----------------------------------------------------------------------------------------

    def _plan(self, requests: Sequence[Request], told: Sequence[Request], room: int) -> _Plan:
        """Tokens of the requests' prompts and of the contexts that go with ``told``, checked against the model's
        limits."""
        receiver = self.receiver
        prompts = receiver.prompts([request.asked() for request in requests], room)
        contexts: dict[str, dict[int, list[int]]] = {}
        for name, sharer in self.sharers.items():
            rows = rows_told(told, name, self.sharers)
            if rows:
                texts = {row: "\n\n".join(told[row].sharer_contexts[name]) for row in rows}
                contexts[name] = {row: sharer.reader.text(text)[0] for row, text in texts.items()}
        for row, prompt in enumerate(prompts):
            length = sum(len(read[row]) for read in contexts.values() if row in read)
            receiver.check_length(length + len(prompt), room)
        columns = sum(max(map(len, read.values())) for read in contexts.values()) + max(map(len, prompts))
        window = sliding_window(receiver.model)
        if contexts and window is not None and columns + room > window:
            expected = f"contexts and prompt within the sliding window of {window} tokens (shorten the contexts)"
            raise ShapeError(receiver.name, expected=expected, got=f"{columns} and {room} to come")
        return _Plan(prompts, contexts)

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        return padded_left(prompts, self.receiver.padding(), self.receiver.device)

    def _share(
        self, plan: _Plan, told: Sequence[Request], whole: frozenset[int], clock: Clock, control: Control
    ) -> _Shared:
        """Let the sharers read; gather what crosses, a segment of columns for each."""
        device, batch = self.receiver.device, len(plan.prompts)
        lengths, sent, helpers = [0] * batch, [0] * batch, [0] * batch
        segments: list[list[Pair]] = []
        masks = [torch.zeros(batch, 0, dtype=torch.int64, device=device)]
        starts: list[int] = []
        for name, read in plan.contexts.items():
            rows = list(read)
            with clock.of("sharer"):
                mask, cache = _read(self.sharers[name], list(read.values()), [lengths[row] for row in rows])
            with clock.of("communication"):
                noise = Noise([told[row] for row in rows], name, self.seed)
                cache = controlled_cache(cache, mask, control, noise)
                crossing = [
                    pair if layer in whole else (pair[0][:, :, :1], pair[1][:, :, :1])
                    for layer, pair in enumerate(cache)
                ]
                starts.append(sum(part.shape[1] for part in masks))
                segments.append(
                    [(_placed(k, rows, batch, device), _placed(v, rows, batch, device)) for k, v in crossing]
                )
                masks.append(_placed(mask, rows, batch, device))
            a_token = sum(t.element_size() * t.shape[1] * t.shape[3] for t in cache[0])
            for row, tokens in read.items():
                lengths[row] += len(tokens)
                helpers[row] += 1
                sent[row] += a_token * (len(whole) * len(tokens) + len(cache) - len(whole))
        if not segments:
            return _Shared([], masks[0], None, sent)
        with clock.of("communication"):
            layers = [[segment[layer] for segment in segments] for layer in range(self.geometry.layers)]
            joined = [tuple(torch.cat(side, 2) for side in zip(*pairs)) for pairs in layers]
            mask = torch.cat(masks, 1)
        ahead = [length - count for length, count in zip(lengths, helpers)]
        beyond = torch.tensor(ahead, device=device) if self.original_mask else None
        layout = Layout(whole, mask.shape[1], tuple(starts), beyond)
        return _Shared([(key, value) for key, value in joined], mask, layout, sent)

    def _read_prompt(self, shared: _Shared, ids: Tensor, mask: Tensor) -> list[Pair]:
        """The receiver's cache after ``ids (B, n)``, read behind what was shared."""
        cache = dynamic_cache(shared.cache)
        return read_on(self.receiver.model, cache, ids, torch.cat([shared.mask, mask], 1))


def _read(agent: Agent, rows: Sequence[Sequence[int]], starts: Sequence[int]) -> tuple[Tensor, list[Pair]]:
    """Mask ``(B, S)``, padded on the right, and cache of contexts whose first tokens are at positions ``starts``."""
    from transformers import DynamicCache

    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[agent.padding()] * (width - len(row))] for row in rows], device=agent.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=agent.device)
    cache = DynamicCache()
    agent.model.base_model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions_of(mask) + torch.tensor(starts, device=agent.device)[:, None],
        use_cache=True,
        **cache_argument(agent.model.base_model, cache),
    )
    return mask, [(layer.keys, layer.values) for layer in cache.layers]


def _placed(part: Tensor, rows: list[int], batch: int, device: torch.device) -> Tensor:
    """Some rows of a batch, among rows of zeros, on the receiver's device."""
    part = part.to(device)
    if rows == list(range(batch)):
        return part
    whole = part.new_zeros(batch, *part.shape[1:])
    whole[rows] = part
    return whole


# --- checks
# -----------------------------------------------------------------------------------------------


def _check_model(agent: Agent) -> None:
    """Refuse what attends in other ways than to all that came before, or within a sliding window."""
    config = agent.model.config
    if config.get_text_config() is not config:
        expected = "a text model, not one of several parts (load its language model alone)"
        raise GeometryError(agent.name, expected=expected, got=type(agent.model).__name__)
    others = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if others or getattr(config, "attention_chunk_size", None):
        expected = "layers of full or sliding-window attention"
        raise GeometryError(agent.name, expected=expected, got=", ".join(sorted(others)) or "chunked attention")


def _by_name(receiver: Agent, sharers: Sequence[Agent]) -> dict[str, Agent]:
    found: dict[str, Agent] = {}
    digest = None
    for sharer in sharers:
        if sharer.name in found:
            raise GeometryError("sharers", expected="names of their own", got=f"{sharer.name!r} twice")
        if sharer.model is not receiver.model:
            digest = digest or model_sample(receiver.model, "fp32")
            dtypes = sharer.model.dtype, receiver.model.dtype
            if model_sample(sharer.model, "fp32") != digest or dtypes[0] != dtypes[1]:
                expected = f"the receiver's model (configuration, weights, {dtypes[1]}): KVComm shares within one model"
                got = f"{type(sharer.model).__name__} of other configuration, weights or dtype ({dtypes[0]})"
                raise GeometryError(f"sharer {sharer.name!r}", expected=expected, got=got)
            _check_model(sharer)
        found[sharer.name] = sharer
    return found


def _checked_layers(layers: Sequence[int], count: int) -> tuple[int, ...]:
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < count:
            raise IndexRangeError("layers", expected=f"layers in [0, {count})", got=repr(layer))
    if not layers or len(set(layers)) < len(layers):
        raise GeometryError("layers", expected="one layer or more, each once", got=str(tuple(layers)))
    return tuple(sorted(layers))
