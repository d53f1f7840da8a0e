"""The channels that two models, and what is at hand for them, can take part with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..adapter import LatentCacheFlow
from ..c2c.fuser import C2CFuser
from ..channels import (
    Agent,
    Channel,
    FullContextChannel,
    KVCommChannel,
    LCFChannel,
    LCFXChannel,
    NoneChannel,
    Request,
    Sharer,
    SlotsChannel,
    TextChannel,
)
from ..slots import LatentSlots
from .failures import EvaluationError
from .run import AskedSet, Entrant

__all__ = ["CROSS_ALONE", "SHARED_ALONE", "entrants", "suits"]

#: What a text can be, and what a message: text has no zeros, and no noise of the same moments.
_TEXT, _ALL = ("matched", "mismatched"), ("matched", "mismatched", "zero", "random")
#: Channels that carry what the sharer alone has read, and those for what both have read.
CROSS_ALONE, SHARED_ALONE = ("full_context", "lcf_x", "slots", "kvcomm"), ("lcf", "c2c")


def entrants(
    receiver: Agent,
    sharer: Agent,
    *,
    adapters: Sequence[LatentCacheFlow | LatentSlots] = (),
    fuser: C2CFuser | None = None,
    text_tokens: Sequence[int] = (50, 200),
    instruction: str | None = None,
    dtype: str = "bfloat16",
    placement: str = "append",
    ratio: float = 0.5,
    calibration: Request | None = None,
    controls: bool = True,
    seed: int = 0,
) -> list[Entrant]:
    """Everyone who can take part.

    Args:
        adapters: at most one LCF, one LCF-X and one of slots.
        fuser: of C2C.
        text_tokens: longest notes of the text channels, one channel each.
        instruction: to a sharer that writes; None: the channel's own.
        dtype: of the messages of LCF-X and slots.
        placement: of slots.
        ratio: of layers that KVComm shares.
        calibration: a request by which KVComm chooses its layers. It takes part where there is one and both agents have
            the very same model.
        controls: False: the matching message alone; whether content crossed is then not known.
        seed: of the random control.

    Raises:
        EvaluationError: two adapters of one kind. GeometryError: an adapter for other models.
    """

    def controlled(all_of_them: tuple[str, ...]) -> tuple[str, ...]:
        return all_of_them if controls else ("matched",)

    def text(most: int) -> Callable[[str], Channel]:
        options: dict[str, Any] = {} if instruction is None else {"instruction": instruction}
        return lambda control: TextChannel(receiver, [sharer], most_tokens=most, control=control, **options)

    found = [
        Entrant("none", lambda control: NoneChannel(receiver), ("matched",), {}),
        Entrant("full_context", lambda control: FullContextChannel(receiver, control=control), controlled(_TEXT), {}),
    ]
    for most in text_tokens:
        own = {"most_tokens": most, "instruction": instruction}
        found.append(Entrant(f"text_{most}", text(most), controlled(_TEXT), own))
    for adapter in adapters:
        if isinstance(adapter, LatentSlots):
            found.append(_slots(receiver, sharer, adapter, dtype, placement, controlled(_ALL), seed))
        else:
            found.append(_latent(receiver, sharer, adapter, dtype, controlled(_ALL), seed))
    if fuser is not None:
        whom = [Sharer(sharer, fuser)]
        LCFChannel(receiver, whom)  # refuses other models' before anything runs
        found.append(
            Entrant(
                "c2c",
                lambda control: LCFChannel(receiver, whom, name="c2c", control=control, seed=seed),
                controlled(_ALL),
                {"parameters": fuser.parameter_count()},
            )
        )
    if calibration is not None and sharer.model is receiver.model:
        selection = KVCommChannel(receiver, [sharer], ratio=ratio).calibrate(calibration)
        found.append(
            Entrant(
                "kvcomm",
                lambda control: KVCommChannel(receiver, [sharer], layers=selection, control=control, seed=seed),
                controlled(_ALL),
                {"layers": list(selection.layers)},
            )
        )
    names = [entrant.name for entrant in found]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise EvaluationError("adapters", expected="at most one of a kind", got=f"two of {twice[0]}")
    return found


def _latent(
    receiver: Agent, sharer: Agent, adapter: LatentCacheFlow, dtype: str, controls: tuple[str, ...], seed: int
) -> Entrant:
    origin = adapter.eval().origin if adapter.config.cross_context else None
    whom = [Sharer(sharer, adapter)]
    if origin is None:
        LCFChannel(receiver, whom)
        return Entrant(
            "lcf",
            lambda control: LCFChannel(receiver, whom, control=control, seed=seed),
            controls,
            {"parameters": adapter.parameter_count()},
        )
    LCFXChannel(receiver, adapter, whom, dtype=dtype)
    return Entrant(
        "lcf_x",
        lambda control: LCFXChannel(receiver, adapter, whom, dtype=dtype, control=control, seed=seed),
        controls,
        {"adapter": origin.adapter, "sharer": origin.sharer, "dtype": dtype},
    )


def _slots(
    receiver: Agent,
    sharer: Agent,
    adapter: LatentSlots,
    dtype: str,
    placement: Any,
    controls: tuple[str, ...],
    seed: int,
) -> Entrant:
    origin, whom = adapter.eval().origin, [Sharer(sharer, adapter)]

    def make(control: str) -> Channel:
        return SlotsChannel(receiver, adapter, whom, dtype=dtype, placement=placement, control=control, seed=seed)

    make("matched")  # refuses other models' before anything runs
    own = {"adapter": origin.adapter, "sharer": origin.sharer, "dtype": dtype, "placement": placement}
    return Entrant("slots", make, controls, own)


def suits(entrant: Entrant, asked: AskedSet) -> bool:
    """Whether a channel has something to carry here: what the sharer alone has read, or what both have."""
    crossing = any(item.request.sharer_contexts for item in asked.items)
    return entrant.name not in (SHARED_ALONE if crossing else CROSS_ALONE)
