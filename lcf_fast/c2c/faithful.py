"""The fuser as the released code runs it, operation by operation: for timing beside ours, and for nothing else.

Written from the description of what that code does in a prefill (github.com/thu-nics/C2C, 69eb705): both caches are
cloned whole, the receiver's twice; in each layer four tensors are flattened by a copy and then concatenated by another;
closed gates are computed and multiplied by zero; the gate is float32, which promotes all that follows; and four
blocking copies to the host keep what analysis scripts may read. Inference only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..caches import Pair, cache_layers, rebuild_cache
from ..errors import DTypeError, LCFError, ShapeError
from .fuser import C2CFuser, part_of, with_rest
from .projector import C2CProjector

__all__ = ["Captured", "FaithfulFuser", "faithful_fuse"]

#: What one layer leaves on the host: both sides' weights ``(B, Hr, N, 1)`` and gate logits.
Captured = tuple[Tensor, Tensor, float, float]


@torch.no_grad()
def faithful_fuse(
    fuser: C2CFuser, sharer_cache: Any, receiver_cache: Any, captured: list[Captured] | None = None
) -> Any:
    """What :meth:`C2CFuser.fuse` gives in eval mode, to rounding, at the released code's cost.

    Args:
        fuser: its parameters must have the caches' dtype.
        sharer_cache, receiver_cache: caches of one batch size and one length.
        captured: gets what each layer leaves on the host.

    Returns:
        A new cache of the receiver's kind.

    Raises:
        GeometryError, ShapeError, DTypeError: naming the argument.
    """
    config, captured = fuser.config, [] if captured is None else captured
    receiver = cache_layers(receiver_cache, name="receiver_cache", geometry=config.receiver)
    sharer = cache_layers(sharer_cache, name="sharer_cache", geometry=config.sharer)
    _check(fuser, sharer, receiver)
    kept_aside = _clone(receiver)
    theirs, ours = _clone(sharer), _clone(receiver)
    for projector, t, s in zip(fuser.projectors, fuser.kept, fuser.reads):
        assert isinstance(projector, C2CProjector)
        key, value = _forward(projector, theirs[s], ours[t], captured)
        ours[t][0][:, :, :] = key
        ours[t][1][:, :, :] = value
    del kept_aside  # never read, as there; alive until here, as there
    return rebuild_cache(receiver_cache, ours)


class FaithfulFuser:
    """A fuser whose :meth:`fuse` runs the released operations, to be timed where a fuser is taken.

    They know neither masks nor an index: what these ask for is done around them, and costs what it costs.

    Args:
        fuser: in eval mode, of the caches' dtype.
    """

    def __init__(self, fuser: C2CFuser) -> None:
        self.fuser, self.config = fuser, fuser.config
        self.sharer_geometry, self.receiver_geometry = fuser.sharer_geometry, fuser.receiver_geometry
        self.sharer_layers = fuser.sharer_layers

    @torch.no_grad()
    def fuse(
        self,
        sharer_cache: Any,
        receiver_cache: Any,
        *,
        sharer_index: Tensor | None = None,
        positions: tuple[int, int] | None = None,
        attention_mask: Tensor | None = None,
        sharer_attention_mask: Tensor | None = None,
    ) -> Any:
        """As :meth:`C2CFuser.fuse`, to rounding."""
        call = self.fuser.checked(
            sharer_cache, receiver_cache, sharer_index, positions, attention_mask, sharer_attention_mask
        )
        if call.stop == call.start or call.sharer[0][0].shape[2] == 0:
            return rebuild_cache(receiver_cache, call.receiver)
        theirs = [_rows(pair, call.rows) if call.rows is not None else part_of(pair, call) for pair in call.sharer]
        edited = faithful_fuse(self.fuser, theirs, [part_of(pair, call) for pair in call.receiver])
        layers = list(call.receiver)
        for t in self.fuser.kept:
            new = list(edited[t])
            if call.mask is not None:
                shown = call.mask[:, None, :, None]
                new = [torch.where(shown, n, o) for n, o in zip(new, part_of(layers[t], call))]
            key, value = (with_rest(o, n, call) for o, n in zip(layers[t], new))
            layers[t] = (key, value)
        return rebuild_cache(receiver_cache, layers)


def _rows(pair: Pair, rows: Tensor) -> Pair:
    """The rows ``(B, N)`` of a cache: ``(B, H, N, D)`` each."""
    key, value = (t.gather(2, rows[:, None, :, None].expand(-1, t.shape[1], -1, t.shape[3])) for t in pair)
    return key, value


def _check(fuser: C2CFuser, sharer: list[Pair], receiver: list[Pair]) -> None:
    (own, _), (other, _) = receiver[0], sharer[0]
    if (own.shape[0], own.shape[2]) != (other.shape[0], other.shape[2]):
        expected = f"batch size and length {(own.shape[0], own.shape[2])} as the receiver's"
        raise ShapeError("sharer_cache", expected=expected, got=str((other.shape[0], other.shape[2])))
    for parameter in fuser.parameters():
        if not parameter.dtype == own.dtype == other.dtype:
            got = f"{parameter.dtype}, {own.dtype} and {other.dtype}"
            raise DTypeError("fuser", expected="one dtype of parameters and both caches", got=got)
    if fuser.training:
        raise LCFError("fuser", expected="a fuser in eval mode (fuser.eval())", got="training mode")


def _clone(layers: list[Pair]) -> list[Pair]:
    return [(key.clone(), value.clone()) for key, value in layers]


def _flat(cache: Tensor) -> Tensor:
    batch, heads, length, dim = cache.shape
    return cache.transpose(1, 2).contiguous().view(batch, length, heads * dim)


def _mlp(blocks: nn.Module, h: Tensor) -> Tensor:
    for block in blocks.blocks:  # type: ignore[union-attr]
        inner = block.w1(block.norm(h))
        h = h + block.w2(nn.functional.gelu(inner))
    return h


def _forward(p: C2CProjector, sharer: Pair, receiver: Pair, captured: list[Captured]) -> Pair:
    modules = dict(p.named_children())
    batch, heads, length, dim = receiver[0].shape
    flat = [(_flat(s), _flat(r)) for s, r in zip(sharer, receiver)]
    joined = [torch.cat(pair, dim=-1) for pair in flat]
    hidden = [modules[f"{side}_in"](x) for side, x in zip(("key", "value"), joined)]
    hidden = [_mlp(modules[f"{side}_mlp1"], h) for side, h in zip(("key", "value"), hidden)]
    updates, weights, edited = [], [], []
    for side, h in zip(("key", "value"), hidden):
        update = modules[f"{side}_proj_out"](_mlp(modules[f"{side}_proj_mlp2"], h))
        updates.append(update.view(batch, length, heads, dim).transpose(1, 2))
    for side, h in zip(("key", "value"), hidden):
        scalar = modules[f"{side}_scalar_head"](_mlp(modules[f"{side}_scalar_mlp2"], h))
        weights.append(scalar.permute(0, 2, 1).unsqueeze(-1))
    logits = [p.get_parameter(f"{side}_gate_logit") for side in ("key", "value")]
    gates = [(logit.view(1, 1, 1, 1) > 0).float() for logit in logits]
    weights = [torch.sigmoid(weight) for weight in weights]
    for own, gate, weight, update in zip(receiver, gates, weights, updates):
        edited.append(own + gate * weight * update)
    on_host = [weight.detach().cpu() for weight in weights]
    numbers = [float(logit.detach().cpu().item()) for logit in logits]
    captured.append((on_host[0], on_host[1], numbers[0], numbers[1]))
    return edited[0], edited[1]
