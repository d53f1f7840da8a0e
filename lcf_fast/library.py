"""The torch.library boundary: each op with its schema, its fake, and its gradient.

One boundary a call. An op picks its back end when it runs, so compiled graphs obey `use_backend` too; but for their
backward pass on a GPU, which runs in a thread of autograd's own: there ``LCF_FAST_BACKEND`` holds. A gradient sits
behind an op of its own, one opaque node for ``torch.compile``: kernels that recompute, or on the eager back end the
reference formula, recomputed.

Every op is functional or declares what it mutates; no output shares memory with an input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import eager, reference
from .backends import resolve
from .dispatch import count_edits, keep, register_gradient
from .layouts import Layers

PROJECTION_WEIGHTS = ("down_weight", "down_bias", "norm_weight", "ffn_in_weight", "ffn_out_weight")
INJECTION_WEIGHTS = ("up_weight", "up_bias", "head_gate_weight", "head_gate_bias", "gate_logit")
WEIGHTS = PROJECTION_WEIGHTS + INJECTION_WEIGHTS

Pair = tuple[Tensor, Tensor]


def unit_rows(tensor: Tensor) -> Tensor:
    """The kernels need stride 1 along the head dim and take every other stride as it is."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def with_unit_rows(layers: Layers) -> Layers:
    """`unit_rows` of all layers, which mostly have them."""
    return layers if layers.layout.has_unit_rows else Layers.of([*map(unit_rows, layers.tensors)])


def pairs_of(flat: Sequence[Tensor]) -> list[Pair]:
    """``[k0, v0, k1, v1, ...]`` to ``[(k0, v0), (k1, v1), ...]``."""
    return list(zip(flat[0::2], flat[1::2]))


def recompute_gradients(
    formula: Callable[[Sequence[Any]], Sequence[Tensor]],
    inputs: Sequence[Any],
    needed: Sequence[bool],
    grads: Sequence[Tensor],
) -> list[Tensor]:
    """Gradients of ``formula(inputs)`` for the inputs that are ``needed``, in order; zeros where it does not depend."""
    # An op's implementation runs below autograd; to differentiate inside one, its key must be let through again.
    keys: Any = torch._C
    autograd_key = keys.DispatchKeySet(keys.DispatchKey.AutogradFunctionality)
    exclude = keys._dispatch_tls_local_exclude_set() - autograd_key
    with keys._ForceDispatchKeyGuard(keys._dispatch_tls_local_include_set(), exclude), torch.enable_grad():
        return _differentiate(formula, inputs, needed, grads)


def _differentiate(
    formula: Callable[[Sequence[Any]], Sequence[Tensor]],
    inputs: Sequence[Any],
    needed: Sequence[bool],
    grads: Sequence[Tensor],
) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() if need else x for x, need in zip(inputs, needed)]
    outputs = formula(leaves)
    wanted = [leaf for leaf, need in zip(leaves, needed) if need]
    live = [(output, grad) for output, grad in zip(outputs, grads) if output.requires_grad]
    if not live:
        return [torch.zeros_like(leaf) for leaf in wanted]
    found = torch.autograd.grad([o for o, _ in live], wanted, [g for _, g in live], allow_unused=True)
    made = [torch.zeros_like(leaf) if grad is None else grad.contiguous() for grad, leaf in zip(found, wanted)]
    # An op's outputs must be memory of their own; a sum over a batch of one is the gradient that came in.
    taken = {grad.untyped_storage().data_ptr() for grad in grads}
    for i, grad in enumerate(made):
        place = grad.untyped_storage().data_ptr()
        if place in taken:
            made[i] = grad.clone()
        taken.add(place)
    return made


def like_needed(inputs: Sequence[Any], needed: Sequence[bool]) -> list[Tensor]:
    """The fake of a backward op."""
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x, need in zip(inputs, needed) if need]


def spread(grads: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    """Put the gradients of the needed inputs back in their places."""
    left = iter(grads)
    return [next(left) if need else None for need in needed]


# --- joint projection ---------------------------------------------------------------------------------------------


def run_joint_projection(
    sharer_key: Tensor | None,
    sharer_value: Tensor | None,
    receiver_key: Tensor,
    receiver_value: Tensor,
    weights: Sequence[Tensor],
    index: Tensor | None,
    message: Tensor | None,
    norm_eps: float,
) -> Tensor:
    named = dict(zip(PROJECTION_WEIGHTS, weights))
    if resolve(receiver_key.device, receiver_key.dtype, weights[0].shape[0], weights[3].shape[1]) == "triton":
        from .kernels import projection

        return projection.joint_projection(
            None if sharer_key is None else unit_rows(sharer_key),
            None if sharer_value is None else unit_rows(sharer_value),
            unit_rows(receiver_key),
            unit_rows(receiver_value),
            named,
            index=index,
            message=None if message is None else message.float().contiguous(),
            norm_eps=norm_eps,
        )
    return eager.joint_projection(
        sharer_key, sharer_value, receiver_key, receiver_value, named,
        sharer_index=index, message=message, norm_eps=norm_eps,
    )  # fmt: skip


joint_projection = torch.library.custom_op("lcf_fast::joint_projection", run_joint_projection, mutates_args=())


@joint_projection.register_fake
def _(
    sharer_key: Tensor | None,
    sharer_value: Tensor | None,
    receiver_key: Tensor,
    receiver_value: Tensor,
    weights: Sequence[Tensor],
    index: Tensor | None,
    message: Tensor | None,
    norm_eps: float,
) -> Tensor:
    shape = (receiver_key.shape[0], receiver_key.shape[2], weights[0].shape[0])
    return receiver_key.new_empty(shape, dtype=reference.accumulation_dtype(receiver_key.dtype))


def _projection_inputs(
    tensors: Sequence[Any], has_sharer: bool, has_message: bool
) -> tuple[Pair | None, Pair, Any, dict[str, Any]]:
    """What `_projection_setup` saved: sharer, receiver, message, weights."""
    rest = list(tensors)
    sharer = (rest.pop(0), rest.pop(0)) if has_sharer else None
    receiver = (rest.pop(0), rest.pop(0))
    message = rest.pop(0) if has_message else None
    return sharer, receiver, message, dict(zip(PROJECTION_WEIGHTS, rest))


def _projection_formula(
    inputs: Sequence[Any], index: Tensor | None, has_sharer: bool, has_message: bool, norm_eps: float
) -> Sequence[Tensor]:
    sharer, receiver, message, weights = _projection_inputs(inputs, has_sharer, has_message)
    sharer_key, sharer_value = (None, None) if sharer is None else sharer
    receiver_key, receiver_value = receiver
    return (
        reference.joint_projection(
            sharer_key,
            sharer_value,
            receiver_key,
            receiver_value,
            weights,
            sharer_index=index,
            message=message,
            norm_eps=norm_eps,
        ),
    )


@torch.library.custom_op("lcf_fast::joint_projection_backward", mutates_args=())
def joint_projection_backward(
    grad: Tensor,
    inputs: Sequence[Tensor],
    needed: Sequence[bool],
    index: Tensor | None,
    has_sharer: bool,
    has_message: bool,
    norm_eps: float,
) -> list[Tensor]:
    sharer, receiver, message, weights = _projection_inputs(inputs, has_sharer, has_message)
    key, width, hidden = receiver[0], weights["down_weight"].shape[0], weights["ffn_in_weight"].shape[1]
    if resolve(key.device, key.dtype, width, hidden) == "triton":
        from .kernels import fusion_backward

        caches = 2 * has_sharer
        found = fusion_backward.joint_projection_backward(
            grad,
            None if sharer is None else (unit_rows(sharer[0]), unit_rows(sharer[1])),
            (unit_rows(receiver[0]), unit_rows(receiver[1])),
            weights,
            index=index,
            message=None if message is None else message.float().contiguous(),
            norm_eps=norm_eps,
            wants_sharer=any(needed[:caches]),
            wants_receiver=any(needed[caches : caches + 2]),
        )
        flat: list[Any] = [*found.sharer[0]] if found.sharer is not None else [None] * caches
        flat += [*found.receiver[0]] if found.receiver is not None else [None, None]
        flat += [found.message] * has_message + [found.weights[name] for name in PROJECTION_WEIGHTS]
        return [gradient.to(x.dtype) for gradient, x, need in zip(flat, inputs, needed) if need]

    def formula(leaves: Sequence[Any]) -> Sequence[Tensor]:
        return _projection_formula(leaves, index, has_sharer, has_message, norm_eps)

    return recompute_gradients(formula, inputs, needed, (grad,))


@joint_projection_backward.register_fake
def _(
    grad: Tensor,
    inputs: Sequence[Tensor],
    needed: Sequence[bool],
    index: Tensor | None,
    has_sharer: bool,
    has_message: bool,
    norm_eps: float,
) -> list[Tensor]:
    return like_needed(inputs, needed)


def _projection_setup(ctx: Any, inputs: Any, output: Any) -> None:
    sharer_key, sharer_value, receiver_key, receiver_value, weights, index, message, ctx.norm_eps = inputs
    ctx.has_sharer, ctx.has_message = sharer_key is not None, message is not None
    tensors = [sharer_key, sharer_value] * ctx.has_sharer + [receiver_key, receiver_value]
    tensors += [message] * ctx.has_message + list(weights)
    ctx.needed = [t.requires_grad for t in tensors]
    ctx.has_index = index is not None
    keep(ctx, [*tensors, *([index] if index is not None else [])])


def _projection_backward(ctx: Any, grad: Tensor) -> Any:
    tensors = list(ctx.saved_tensors)
    index = tensors.pop() if ctx.has_index else None
    found = joint_projection_backward(grad, tensors, ctx.needed, index, ctx.has_sharer, ctx.has_message, ctx.norm_eps)
    grads = spread(found, ctx.needed)
    sharer = [grads.pop(0), grads.pop(0)] if ctx.has_sharer else [None, None]
    receiver = [grads.pop(0), grads.pop(0)]
    message = grads.pop(0) if ctx.has_message else None
    return *sharer, *receiver, grads, None, message, None


register_gradient(joint_projection, _projection_backward, setup_context=_projection_setup)


# --- gated injection ----------------------------------------------------------------------------------------------


def _inject(
    key: Tensor, value: Tensor, latent: Tensor, weights: Sequence[Tensor], edit_mask: Tensor | None, inplace: bool
) -> Pair:
    named = dict(zip(INJECTION_WEIGHTS, weights))
    if resolve(key.device, key.dtype, latent.shape[2]) == "triton":
        from .kernels import injection

        if not inplace:
            key, value = unit_rows(key), unit_rows(value)
        edited = injection.gated_injection(key, value, latent, named, edit_mask=edit_mask, inplace=inplace)
        if inplace:
            count_edits(edited)
        return edited
    run = eager.gated_injection_ if inplace else eager.gated_injection
    return run(key, value, latent, named, edit_mask=edit_mask)


def run_gated_injection(
    receiver_key: Tensor,
    receiver_value: Tensor,
    latent: Tensor,
    weights: Sequence[Tensor],
    edit_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    edited = _inject(receiver_key, receiver_value, latent, weights, edit_mask, False)
    given = (receiver_key, receiver_value)
    key, value = (
        new.clone(memory_format=torch.contiguous_format) if new is old else new.contiguous()
        for new, old in zip(edited, given)
    )
    return key, value


gated_injection = torch.library.custom_op("lcf_fast::gated_injection", run_gated_injection, mutates_args=())


@gated_injection.register_fake
def _(
    receiver_key: Tensor,
    receiver_value: Tensor,
    latent: Tensor,
    weights: Sequence[Tensor],
    edit_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return receiver_key.new_empty(receiver_key.shape), receiver_value.new_empty(receiver_value.shape)


def run_gated_injection_(
    receiver_key: Tensor,
    receiver_value: Tensor,
    latent: Tensor,
    weights: Sequence[Tensor],
    edit_mask: Tensor | None,
) -> None:
    _inject(receiver_key, receiver_value, latent, weights, edit_mask, True)


gated_injection_ = torch.library.custom_op(
    "lcf_fast::gated_injection_", run_gated_injection_, mutates_args=("receiver_key", "receiver_value")
)


@gated_injection_.register_fake
def _(
    receiver_key: Tensor,
    receiver_value: Tensor,
    latent: Tensor,
    weights: Sequence[Tensor],
    edit_mask: Tensor | None,
) -> None:
    return None


@torch.library.custom_op("lcf_fast::gated_injection_backward", mutates_args=())
def gated_injection_backward(
    grads: Sequence[Tensor], inputs: Sequence[Tensor], needed: Sequence[bool], edit_mask: Tensor | None
) -> list[Tensor]:
    receiver_key, latent = inputs[0], inputs[2]
    if resolve(receiver_key.device, receiver_key.dtype, latent.shape[2]) == "triton":
        from .kernels import fusion_backward

        named = dict(zip(INJECTION_WEIGHTS, inputs[3:]))
        grad_key, grad_value = grads
        dlatent, found = fusion_backward.gated_injection_backward(
            grad_key, grad_value, latent, named, edit_mask=edit_mask
        )  # fmt: skip
        flat = [grad.clone() for grad in grads] + [dlatent] + [found[name] for name in INJECTION_WEIGHTS]
        return [gradient.to(x.dtype).contiguous() for gradient, x, need in zip(flat, inputs, needed) if need]

    def formula(leaves: Sequence[Any]) -> Sequence[Tensor]:
        key, value, latent, *weights = leaves
        named = dict(zip(INJECTION_WEIGHTS, weights))
        return reference.gated_injection(key, value, latent, named, edit_mask=edit_mask)

    return recompute_gradients(formula, inputs, needed, grads)


@gated_injection_backward.register_fake
def _(
    grads: Sequence[Tensor], inputs: Sequence[Tensor], needed: Sequence[bool], edit_mask: Tensor | None
) -> list[Tensor]:
    return like_needed(inputs, needed)


def _injection_setup(ctx: Any, inputs: Any, output: Any) -> None:
    key, value, latent, weights, edit_mask = inputs
    tensors = [key, value, latent, *weights]
    ctx.needed = [t.requires_grad for t in tensors]
    ctx.has_mask = edit_mask is not None
    keep(ctx, [*tensors, *([edit_mask] if ctx.has_mask else [])])


def _injection_backward(ctx: Any, grad_key: Tensor, grad_value: Tensor) -> Any:
    tensors = list(ctx.saved_tensors)
    mask = tensors.pop() if ctx.has_mask else None
    found = gated_injection_backward([grad_key, grad_value], tensors, ctx.needed, mask)
    key, value, latent, *weights = spread(found, ctx.needed)
    return key, value, latent, weights, None


register_gradient(gated_injection, _injection_backward, setup_context=_injection_setup)
