"""A message as bytes, and back: errors and times beside those of other ways to send the same tensor.

Host work: the message lies on the CPU by then, so it is timed there wherever the rest of the job runs. The others carry
a tensor and nothing else; ours says what it is, and finds damage.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from lcf_fast import Message

from . import timing
from .cases import HOST_GROUPS, Group, Shape, cases_of
from .errors import Judgement, judge_rounding
from .inputs import Caches, Operands, geometry_of, make_config, make_operands, make_weights
from .rows import add_speedups, add_time, new_row
from .settings import Settings

CPU = torch.device("cpu")
#: What the message is stored in, by group.
STORAGE = {"encode": "bfloat16", "decode": "bfloat16", "encode_int8": "int8", "decode_int8": "int8"}
#: Largest magnitude of a quantised number.
TOP = 127


@dataclass(frozen=True)
class Way:
    """One way to send a latent.

    Attributes:
        name: as the tables call it; None: the case's own.
        kind: as `bench.variants.Variant` has it.
        encode: bytes of a message, in the storage of that name.
        decode: what these bytes hold.
        latent: ``(L, B, d)`` float of what was decoded; not timed.
    """

    name: str | None
    kind: str
    encode: Callable[[Message, str], bytes]
    decode: Callable[[bytes], Any]
    latent: Callable[[Any], Tensor]


def stored(message: Message, storage: str) -> dict[str, Tensor]:
    """The latent as whoever has a tensor library only would store it; int8 with a scale a layer and item."""
    assert message.latent is not None
    if storage != "int8":
        return {"latent": message.latent.to(getattr(torch, storage))}
    scale = message.latent.abs().amax(-1, keepdim=True) / TOP
    return {"latent": (message.latent / scale).round().clamp(-TOP, TOP).to(torch.int8), "scale": scale}


def restored(tensors: dict[str, Tensor]) -> Tensor:
    """What `stored` took: a float latent as it is, a quantised one as float32."""
    return tensors["latent"].float() * tensors["scale"] if "scale" in tensors else tensors["latent"]


def _torch_save(message: Message, storage: str) -> bytes:
    buffer = io.BytesIO()
    torch.save(stored(message, storage), buffer)
    return buffer.getvalue()


def latent_of(message: Message) -> Tensor:
    """The latent, which is there: `stored` and all ways send it."""
    assert message.latent is not None
    return message.latent


WAYS = (
    Way(
        None,
        "ours",
        lambda message, storage: message.to_bytes(dtype=storage),
        lambda data: Message.from_bytes(data),
        latent_of,
    ),
    Way(
        "torch.save, torch.load",
        "reference",
        _torch_save,
        lambda data: restored(torch.load(io.BytesIO(data), weights_only=True)),
        lambda latent: latent,
    ),
    Way(
        "safetensors",
        "baseline",
        lambda message, storage: save(stored(message, storage)),
        lambda data: restored(load(data)),
        lambda latent: latent,
    ),
)


def rows(settings: Settings, caches: Caches, width: int, *, bandwidth: float) -> list[dict[str, Any]]:
    """One row a way and group, plain JSON, as `Job.rows` gives them. What is out of bounds has no time.

    Args:
        caches: cut to size; the message is that of their context.
        bandwidth: of copying memory on the CPU, GB/s.
    """
    groups = [group for group in HOST_GROUPS if cases_of(group, settings.only)]
    if not groups:
        return []
    config = make_config(groups[0], geometry_of(caches.sharer), geometry_of(caches.receiver), width)
    weights = make_weights(config, device=settings.device, dtype=settings.dtype)
    operands = make_operands(groups[0], caches, config, weights)
    # As a user comes by it: geometries and origin known.
    message = operands.adapter.summarize(operands.sharer_cache, operands.context_spans).to("cpu")
    return [row for group in groups for row in _group_rows(settings, group, operands, message, bandwidth)]


def _group_rows(
    settings: Settings, group: Group, operands: Operands, message: Message, bandwidth: float
) -> list[dict[str, Any]]:
    (case,) = cases_of(group)
    storage = STORAGE[group.name]
    tokens = operands.sharer_layers[0][0].shape[2]
    itemsize = getattr(torch, storage).itemsize
    shape = Shape(operands.config, tokens, tokens, len(operands.kept), itemsize, batch=latent_of(message).shape[1])
    found, calls = [], {}
    for way in WAYS:
        name = way.name or case.name
        data = way.encode(message, storage)
        judgement = judge(way.latent(way.decode(data)), latent_of(message), storage)
        found.append(
            new_row(
                group,
                shape,
                case.work(shape),
                op=case.name if way.kind == "ours" else group.name,
                variant=name,
                kind=way.kind,
                spans=operands.context_spans.counts[0],
                dtype=storage,
                within=judgement.within,
                judgement=judgement,
                note=case.note if way.kind == "ours" else "",
                reason="" if judgement.within else f"no time: the error is {judgement.used:.3g} times its bound",
            )
        )
        if judgement.within:
            encodes = group.name.startswith("encode")
            calls[name] = [partial(way.encode, message, storage) if encodes else partial(way.decode, data)]
    times = timing.measure(calls, CPU, settings.seconds) if calls else {}
    for row in found:
        if row["variant"] in times:
            add_time(row, times[row["variant"]], "hot", bandwidth)
    add_speedups(found)
    return found


def judge(got: Tensor, latent: Tensor, storage: str) -> Judgement:
    """Hold a decoded latent against the one that was encoded: half a step of ``storage`` a number."""
    exact = latent.double()
    if storage == "int8":
        # A step a layer and item; the scale and the product with it are float32, and rounded too.
        steps = (exact.abs().amax(-1, keepdim=True) / TOP).expand_as(exact) * (1 + 1e-5)
    else:
        steps = exact.abs() * torch.finfo(getattr(torch, storage)).eps
    return judge_rounding(got.double(), exact, steps / 2)
