"""How an op is called: through torch's dispatcher where something must see it, past it where nothing does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from .autocast import without_autocast
from .backends import current_backend, resolve, use_backend
from .errors import BackendError
from .layouts import Layers

__all__ = [
    "count_edits",
    "is_plain",
    "keep",
    "needs_grad",
    "refuse_tangents",
    "register_gradient",
    "served_by",
    "undispatched",
]


def needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def is_plain(tensor: Tensor) -> bool:
    """Whether the dispatcher may be bypassed: not while tracing, compiling or under a tensor subclass."""
    return not torch.compiler.is_compiling() and type(tensor) in (Tensor, torch.nn.Parameter)


def served_by(device: torch.device, dtype: torch.dtype, width: int | None = None, hidden: int | None = None) -> str:
    """The back end, or its error, before anything runs. A compiled graph chooses when it runs, not when traced."""
    return "compiled" if torch.compiler.is_compiling() else resolve(device, dtype, width, hidden)


def undispatched(run: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Call an op's implementation without the dispatcher: host time is a published figure."""
    refuse_tangents(arguments)
    if not torch.is_grad_enabled():
        return run(*arguments)
    with torch.no_grad():
        return run(*arguments)


def refuse_tangents(arguments: Iterable[Any]) -> None:
    """Forward-mode derivatives would be lost without a word where no dispatcher sees the tensors."""
    # Of torch's own, without a promise: where a version lacks it, every call looks at its tensors.
    if getattr(forward_ad, "_current_level", 0) < 0:
        return
    for argument in arguments:
        if isinstance(argument, (list, tuple)):
            refuse_tangents(argument)
        elif isinstance(argument, Layers):
            refuse_tangents(argument.tensors)
        elif isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None:
            expected = "inputs without tangents (fast paths have no forward-mode derivative, lcf_fast.reference has)"
            raise BackendError("forward_ad", expected=expected, got=f"a dual tensor, {tuple(argument.shape)}")


def count_edits(tensors: Iterable[Tensor]) -> None:
    """Tell autograd that a kernel has written into these, so that it refuses gradients of what they were."""
    increment_version([*tensors])


def keep(ctx: Any, tensors: Iterable[Tensor]) -> None:
    """Save for an op's gradient. Autograd takes no tensor made in inference mode, as frozen models' caches may be."""
    ctx.save_for_backward(*[tensor.clone() if tensor.is_inference() else tensor for tensor in tensors])


def register_gradient(op: Any, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
    """An op's gradient, by the back end that was chosen when the op ran: on a GPU autograd calls ``backward`` in a
    thread of its own, where no `use_backend` holds. It may be called under autocast, as the op may."""

    def remembered(ctx: Any, inputs: Any, output: Any) -> None:
        setup_context(ctx, inputs, output)
        ctx.backend = current_backend()

    @without_autocast
    def chosen(ctx: Any, *grads: Tensor) -> Any:
        with use_backend(ctx.backend):
            return backward(ctx, *grads)

    op.register_autograd(chosen, setup_context=remembered)
