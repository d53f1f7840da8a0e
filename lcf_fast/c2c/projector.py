"""One receiver layer's part of a C2C fuser: two independent networks, of the keys and of the values.

For X in {K, V}: ``h = block(W_in [S_X, R_X] + b_in)``, ``w = sigmoid(W_head block(h) + b_head)`` a token and head,
``u = W_out blocks(h) + b_out``, ``R_X' = R_X + gate_X * w * u``. A block is ``h + W2 gelu(W1 rmsnorm(h))``.

Parameters are named as in the released state dicts. What differs from the released code is the cost alone: the input is
packed in one pass, no tensor is promoted, a closed gate's network is not run, and the gates are known on the host.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..caches import Pair
from .config import C2CConfig

__all__ = ["C2CProjector", "open_gates", "pack_rows"]

SIDES = ("key", "value")
NORM_EPS = 1e-6


class _Block(nn.Module):
    """``h + dropout(W2 gelu(W1 rmsnorm(h)))``: exact GELU, bias-free linears."""

    def __init__(self, hidden: int, inner: int, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden, eps=NORM_EPS, device=device, dtype=dtype)
        self.w1 = nn.Linear(hidden, inner, bias=False, device=device, dtype=dtype)
        self.w2 = nn.Linear(inner, hidden, bias=False, device=device, dtype=dtype)

    def forward(self, h: Tensor, dropout: float, generator: torch.Generator | None) -> Tensor:
        """``(rows, hidden)``, in the dtype of ``h`` whatever the parameters' is."""
        dtype = h.dtype
        inner = F.rms_norm(h, h.shape[-1:], self.norm.weight.to(dtype), NORM_EPS)
        inner = F.gelu(F.linear(inner, self.w1.weight.to(dtype)))
        if not dropout:
            return torch.addmm(h, inner, self.w2.weight.to(dtype).t())
        added = F.linear(inner, self.w2.weight.to(dtype))
        kept = torch.empty_like(added).bernoulli_(1 - dropout, generator=generator)
        return h + added * kept.div_(1 - dropout)


class _Blocks(nn.Module):
    def __init__(
        self, count: int, hidden: int, inner: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(hidden, inner, device, dtype) for _ in range(count))

    def forward(self, h: Tensor, dropout: float, generator: torch.Generator | None) -> Tensor:
        for block in self.blocks:
            h = block(h, dropout, generator)
        return h


class C2CProjector(nn.Module):
    """The edit of one receiver layer.

    Like any module a fresh one is in training mode: dropout, and soft gates
    ``sigmoid((logit + G) / gate_temperature)``, ``G`` standard Gumbel, drawn once a batch item, head and token. In eval
    mode a gate is open where its logit is above zero. The logits start at 0, closed.

    Args:
        config: geometries and widths.
        device, dtype: of the parameters, as in ``nn.Linear``.
    """

    key_gate_logit: nn.Parameter
    value_gate_logit: nn.Parameter
    gate_temperature: Tensor

    def __init__(
        self, config: C2CConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        d, joint = config.hidden, config.sharer.channels + config.receiver.channels

        def blocks(count: int, inner: int) -> _Blocks:
            return _Blocks(count, d, inner, device, dtype)

        for side in SIDES:
            self.add_module(f"{side}_in", nn.Linear(joint, d, device=device, dtype=dtype))
            self.add_module(f"{side}_mlp1", blocks(1, config.intermediate))
            self.add_module(f"{side}_scalar_mlp2", blocks(1, d))
            heads = nn.Linear(d, config.receiver.kv_heads, device=device, dtype=dtype)
            self.add_module(f"{side}_scalar_head", heads)
            self.add_module(f"{side}_proj_mlp2", blocks(config.update_blocks, config.intermediate))
            out = nn.Linear(d, config.receiver.channels, device=device, dtype=dtype)
            self.add_module(f"{side}_proj_out", out)
            self.register_parameter(f"{side}_gate_logit", nn.Parameter(torch.zeros((), device=device, dtype=dtype)))
        temperature = torch.full((), config.initial_temperature, device=device, dtype=dtype)
        self.register_buffer("gate_temperature", temperature)

    def forward(
        self,
        sharer: Pair,
        receiver: Pair,
        *,
        sharer_index: Tensor | None = None,
        edit_mask: Tensor | None = None,
        live: tuple[bool, bool] | None = None,
        generator: torch.Generator | None = None,
    ) -> Pair:
        """One layer's key and value, edited; what a closed gate leaves is the given tensor itself.

        Args:
            sharer: key and value ``(B, Hs, M, Ds)``; ``M = N`` without an index.
            receiver: ``(B, Hr, N, Dr)``; its dtype is that of all products.
            sharer_index: ``(B, N)`` int64 on the receiver's device, in ``[0, M)``.
            edit_mask: ``(B, N)`` bool, False where the position stays as it is, whatever the caches hold there.
            live: the hard gates on the host; None reads them, which on a GPU waits for it. In training all are open.
            generator: of the noise, on the receiver's device; None: the default one.

        Nothing is checked here: see :meth:`lcf_fast.c2c.C2CFuser.fuse`.
        """
        if live is None:
            live = (True, True) if self.training else open_gates([self])[0]
        key, value = (
            self._edit(side, sharer[i], receiver[i], sharer_index, edit_mask, generator) if live[i] else receiver[i]
            for i, side in enumerate(SIDES)
        )
        return key, value

    def _edit(
        self,
        side: str,
        sharer: Tensor,
        receiver: Tensor,
        sharer_index: Tensor | None,
        edit_mask: Tensor | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        batch, heads, length, dim = receiver.shape
        dropout = self.config.dropout if self.training else 0.0

        def linear(name: str, rows: Tensor) -> Tensor:
            module = getattr(self, f"{side}_{name}")
            return F.linear(rows, module.weight.to(rows.dtype), module.bias.to(rows.dtype))

        def blocks(name: str, rows: Tensor) -> Tensor:
            result: Tensor = getattr(self, f"{side}_{name}")(rows, dropout, generator)
            return result

        hidden = blocks("mlp1", linear("in", pack_rows(sharer, receiver, sharer_index, edit_mask)))
        weight = linear("scalar_head", blocks("scalar_mlp2", hidden)).sigmoid()
        weight = weight.view(batch, length, heads).transpose(1, 2)[..., None]
        update = linear("proj_out", blocks("proj_mlp2", hidden))
        update = update.view(batch, length, heads, dim).transpose(1, 2)
        if self.training:
            weight = weight * self._soft_gate(side, weight, generator).to(weight.dtype)
        # One rounding at the end, as of their promoted float32 sum that is then stored in the cache's dtype.
        edited = torch.addcmul(receiver, weight, update)
        return edited if edit_mask is None else torch.where(edit_mask[:, None, :, None], edited, receiver)

    def _soft_gate(self, side: str, like: Tensor, generator: torch.Generator | None) -> Tensor:
        """One draw a batch item, head and token, in float32 or wider: ``(B, Hr, N, 1)``."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        uniform = torch.rand(like.shape, generator=generator, device=like.device, dtype=dtype)
        # `rand` gives 0 now and then, and never 1.
        gumbel = -(-uniform.clamp_min_(1e-20).log()).log()
        logit: Tensor = getattr(self, f"{side}_gate_logit")
        return ((logit + gumbel) / self.gate_temperature).sigmoid()


def open_gates(projectors: list[C2CProjector]) -> list[tuple[bool, bool]]:
    """The hard gates on the host, read in one transfer: ``(key open, value open)`` each."""
    logits = [logit.detach() for p in projectors for logit in (p.key_gate_logit, p.value_gate_logit)]
    opened = [logit > 0 for logit in torch.stack(logits).tolist()]
    return list(zip(opened[::2], opened[1::2]))


def pack_rows(sharer: Tensor, receiver: Tensor, sharer_index: Tensor | None, edit_mask: Tensor | None) -> Tensor:
    """``[S, R]`` a receiver position, heads head-major: ``(B * N, Cs + Cr)``, each element read and written once.

    Rows that ``edit_mask`` leaves out are zero, so that what lies in padding reaches no gradient.
    """
    batch, heads, length, dim = receiver.shape
    own, theirs = receiver.transpose(1, 2), sharer.transpose(1, 2)
    if sharer_index is not None:
        theirs = theirs[torch.arange(batch, device=receiver.device)[:, None], sharer_index]
    columns = theirs.shape[2] * theirs.shape[3]
    rows = receiver.new_empty(batch, length, columns + heads * dim)
    rows[..., :columns].view(theirs.shape).copy_(theirs)
    rows[..., columns:].view(own.shape).copy_(own)
    if edit_mask is not None:
        rows.masked_fill_(~edit_mask[..., None], 0.0)
    return rows.flatten(0, 1)
