"""Attention over layers that hold different parts of a context, through what transformers lets one register.

transformers makes one mask for all layers, as wide as layer 0's cache. Here layer 0 and the chosen layers hold a whole
context before the receiver's own tokens, the others only the first token of it (an attention sink). `NAME` is
registered as an attention and as a mask function: it cuts the mask to the columns that a layer holds, and leaves the
rest to the implementation that the model had. Nothing of a model is patched; its implementation is set for the length
of a call, and set back.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendError

__all__ = ["Layout", "RaggedAttention", "ragged_attention"]

#: As `attn_implementation` while a call runs.
NAME = "lcf_fast_kvcomm"
#: What can be wrapped. Flash attention takes no mask that could be cut per query.
WRAPPED = ("sdpa", "eager")


@dataclass(frozen=True)
class Layout:
    """Which columns of the mask a layer holds.

    The mask's columns: the context's, ``width`` of them, then the receiver's own. The context is made of segments, one
    a sharer, each padded on the right, so that a segment's first column is its first token in every row.

    Attributes:
        whole: layers that hold all columns; layer 0 is one, since its length is what transformers makes masks of.
        width: columns of the context.
        starts: first column of each segment: all of the context that the other layers hold.
        ahead: None: causal. Else ``(B,)``: own tokens that a query sees beyond itself in those other layers.
    """

    whole: frozenset[int]
    width: int
    starts: tuple[int, ...]
    ahead: Tensor | None = None

    def cut(self, mask: Tensor, layer: int, held: int) -> Tensor:
        """``(B, 1, T, W)`` to ``(B, 1, T, held)``, booleans or what is added to scores."""
        if layer in self.whole:
            assert held == mask.shape[-1], (held, mask.shape)
            return mask
        own = mask[..., self.width :]
        if self.ahead is not None:
            columns = torch.arange(own.shape[-1], device=own.device)
            queries = columns[own.shape[-1] - own.shape[-2] :, None]
            seen = columns <= queries + self.ahead[:, None, None, None]
            own = torch.where(seen, own[..., -1:, :], own)  # the last query's row leaves out padding alone
        sinks = [mask[..., start : start + 1] for start in self.starts]
        cut = torch.cat([*sinks, own], -1)
        assert held == cut.shape[-1], (held, cut.shape)
        return cut


@dataclass
class RaggedAttention:
    """What the registered functions go by while `ragged_attention` lasts.

    Attributes:
        model: whose calls it is for.
        implementation: that the model had, and that does the work.
        layout: None: all layers hold the same, and attention is the model's own.
        mass: where not None, ``mass[layer]`` receives the attention that queries pay to the context: the mean over
            heads and queries of a batch without padding.
    """

    model: Any
    implementation: str
    layout: Layout | None = None
    mass: dict[int, float] | None = field(default=None)


_CURRENT: ContextVar[RaggedAttention | None] = ContextVar("lcf_fast_ragged_attention", default=None)


@contextmanager
def ragged_attention(model: Any) -> Iterator[RaggedAttention]:
    """The model's calls in this block, and in this thread, go by the layout that is set in it.

    Within a block for the same model: that one.

    Raises:
        BackendError: an implementation that cannot be wrapped, a model whose implementation cannot be set, or one that
            another thread has in such a block.
    """
    current = _CURRENT.get()
    if current is not None and current.model is model:
        yield current
        return
    before = model.config._attn_implementation
    check_implementation(model)
    _register()
    model.set_attn_implementation(NAME)
    token = _CURRENT.set(RaggedAttention(model, before))
    try:
        if model.config._attn_implementation != NAME:
            expected = "a model whose attention goes through transformers' AttentionInterface"
            raise BackendError("attn_implementation", expected=expected, got=type(model).__name__)
        yield _current()
    finally:
        _CURRENT.reset(token)
        model.set_attn_implementation(before)


def check_implementation(model: Any) -> None:
    """Refuse a model whose attention cannot be wrapped."""
    found = model.config._attn_implementation
    current = _CURRENT.get()
    if found == NAME and current is not None and current.model is model:
        return
    if found == NAME:
        expected = "a model that no other thread answers with (one KVComm call at a time for each model)"
        raise BackendError("model", expected=expected, got="one in the middle of a call")
    if found not in WRAPPED:
        expected = f"{' or '.join(WRAPPED)} (`model.set_attn_implementation('sdpa')`): KVComm cuts the mask per layer"
        raise BackendError("attn_implementation", expected=expected, got=repr(found))
    if found == "eager" and _eager_of(model) is None:
        expected = "eager attention that goes by transformers' AttentionInterface (or sdpa)"
        raise BackendError("attn_implementation", expected=expected, got=type(model).__name__)


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask)


def _current() -> RaggedAttention:
    current = _CURRENT.get()
    if current is None:
        expected = "calls within `ragged_attention`, in the thread that entered it"
        raise BackendError("attn_implementation", expected=expected, got=f"{NAME} outside of it")
    return current


def _mask(*args: Any, **keywords: Any) -> Any:
    """A mask function: the wrapped implementation's, never left to ``is_causal``, which knows no layout."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    implementation = _current().implementation
    return ALL_MASK_ATTENTION_FUNCTIONS[implementation](*args, **{**keywords, "allow_is_causal_skip": False})


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **keywords: Any
) -> Any:
    """An attention function: the wrapped implementation's, with the layer's own mask."""
    current = _current()
    if current.layout is not None:
        assert attention_mask is not None
        attention_mask = current.layout.cut(attention_mask, module.layer_idx, key.shape[2])
        if current.mass is not None:
            weights = _weights(query, key, attention_mask, keywords.get("scaling"), keywords.get("softcap"))
            current.mass[module.layer_idx] = float(weights[..., : current.layout.width].sum(-1).mean())
    return _inner(module, current.implementation)(module, query, key, value, attention_mask, **keywords)


def _inner(module: Any, implementation: str) -> Callable[..., Any]:
    if implementation == "eager":
        found = _eager_of(module)
        assert found is not None  # checked on the model
        return found
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[implementation]
    return function


def _eager_of(module: Any) -> Callable[..., Any] | None:
    """A model family's eager attention, which lies beside its classes and is registered nowhere."""
    for kind in type(module).__mro__:
        found: Callable[..., Any] | None = getattr(sys.modules[kind.__module__], "eager_attention_forward", None)
        if found is not None:
            return found
    return None


def _weights(query: Tensor, key: Tensor, mask: Tensor, scaling: float | None, softcap: float | None) -> Tensor:
    """``(B, heads, T, K)`` attention, float32."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query.float() @ key.float().transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
    return scores.softmax(-1)
