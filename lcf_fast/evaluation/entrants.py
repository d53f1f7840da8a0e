"""The channels that two models, and what is at hand for them, can take part with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

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
from ..errors import LCFError
from ..fingerprint import digest_of
from ..slots import LatentSlots
from .failures import EvaluationError
from .predictions import MATCHED, MISMATCHED, RANDOM, SELF, ZERO
from .run import AskedSet, Entrant

__all__ = ["entrants", "suits"]

#: What can be sent in a message's place. Of text there are no zeros, and no noise of the same moments.
_TEXT, _ALL = (MATCHED, MISMATCHED, SELF), (MATCHED, MISMATCHED, ZERO, RANDOM, SELF)


def entrants(
    receiver: Agent,
    sharer: Agent,
    *,
    adapters: Sequence[LatentCacheFlow | LatentSlots] = (),
    fuser: C2CFuser | None = None,
    own_adapters: Sequence[LatentCacheFlow | LatentSlots] = (),
    own_fuser: C2CFuser | None = None,
    text_tokens: Sequence[int] = (50, 200),
    text_options: dict[str, Any] | None = None,
    dtype: str = "bfloat16",
    placement: str | None = None,
    spans: Sequence[str] = ("paragraphs",),
    ratios: Sequence[float] = (0.5,),
    calibration: Request | None = None,
    controls: bool = True,
    seed: int = 0,
) -> list[Entrant]:
    """Everyone who can take part.

    Args:
        adapters: at most one LCF, one LCF-X and one of slots.
        fuser: of C2C.
        own_adapters, own_fuser: the same, trained with the receiver in the sharer's place, for the control of that
            name. Where both models have one geometry and there is none, the adapter itself serves.
        text_tokens: longest notes of the text channels, one channel each.
        text_options: ``instruction`` and ``template`` of those channels, where they are not the channel's own.
        dtype: of the messages of LCF-X and slots.
        placement: of slots; None: as each adapter was trained.
        spans: how LCF-X's contexts are cut: the first under every control, each other one as a channel of its own
            with the matching message alone. The first also cuts those of slots that are made for each span.
        ratios: of layers that KVComm shares beside layer 0, one channel each.
        calibration: a request by which KVComm chooses its layers; None: it does not take part. KVComm needs one model
            on both sides: where the sharer has another, the receiver's own reads in its place.
        controls: False: the matching message alone; whether content crossed is then not known.
        seed: of the random control.

    Raises:
        EvaluationError: two adapters of one kind, own ones without their like among the others, a value that comes
            twice. GeometryError: an adapter for other models. SpanError: another way to cut. DTypeError: another dtype.
        And as KVComm's `calibrate` raises.
    """
    for name, given in (("text_tokens", text_tokens), ("spans", spans), ("ratios", ratios)):
        listed = [f"{value:g}" if isinstance(value, float) else str(value) for value in given]
        if len(set(listed)) < len(listed):
            raise EvaluationError(name, expected="each once", got=", ".join(listed))
    kinds = {one.config.mode for one in adapters}
    for one in own_adapters:
        if one.config.mode not in kinds:
            expected = "one along with it that reads the sharer's cache"
            raise EvaluationError("own_adapters", expected=expected, got=f"{one.config.mode} alone")
    if own_fuser is not None and fuser is None:
        raise EvaluationError("own_fuser", expected="c2c along with it", got="own_c2c alone")
    itself = receiver.called(sharer.name)
    same = sharer.model is receiver.model

    def limited(able: Iterable[str]) -> tuple[str, ...]:
        return tuple(able) if controls else (MATCHED,)

    found = [
        Entrant("none", lambda control: NoneChannel(receiver), (MATCHED,), {}),
        Entrant(
            "full_context",
            lambda control: FullContextChannel(receiver, control=control),
            limited((MATCHED, MISMATCHED)),
            {},
            "cross",
        ),
    ]
    options = dict(text_options or {})
    for most in text_tokens:

        def text(control: str, most: int = most) -> Channel:
            writer = itself if control == SELF else sharer
            return TextChannel(receiver, [writer], most_tokens=most, control=control, **options)

        found.append(Entrant(f"text_{most}", text, limited(_TEXT), {"most_tokens": most, **options}))
    for made, own in ((one, _own(one, own_adapters)) for one in adapters):
        if isinstance(made, LatentSlots):
            found.append(_slots(receiver, sharer, made, own, dtype, placement, spans[0], limited, seed))
        elif made.config.cross_context:
            found += _lcf_x(receiver, sharer, made, own, dtype, spans, limited, seed)
        else:
            found.append(_position_wise("lcf", receiver, sharer, made, own, limited, seed))
    if fuser is not None:
        if own_fuser is None and fuser.sharer_geometry == fuser.receiver_geometry:
            own_fuser = fuser
        found.append(_position_wise("c2c", receiver, sharer, fuser, own_fuser, limited, seed))
    reader = sharer if same else itself
    for ratio in ratios if calibration is not None else ():
        try:
            layers = KVCommChannel(receiver, [reader], ratio=ratio).calibrate(calibration)  # type: ignore[arg-type]
        except LCFError as error:  # a model, or a context, that KVComm does not serve
            expected = f"{error.expected} (or the channels without kvcomm)"
            raise type(error)(f"kvcomm_{ratio:g}: {error.argument}", expected=expected, got=error.got) from error

        def kvcomm(control: str, layers: Any = layers) -> Channel:
            return KVCommChannel(receiver, [reader], layers=layers, control=control, seed=seed)

        settings = {"layers": list(layers.layers), "reader": "sharer" if same else "receiver"}
        found.append(Entrant(f"kvcomm_{ratio:g}", kvcomm, limited(_ALL), settings, "cross"))
    names = [entrant.name for entrant in found]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise EvaluationError("adapters", expected="at most one of a kind", got=f"two of {twice[0]}")
    return found


def suits(entrant: Entrant, asked: AskedSet) -> bool:
    """Whether a channel has something to carry here: what the sharer alone has read, or what both have."""
    crossing = any(item.request.sharer_contexts for item in asked.items)
    return entrant.context in ("either", "cross" if crossing else "shared")


_Limited = Callable[[Iterable[str]], tuple[str, ...]]


def _own(adapter: Any, among: Sequence[Any]) -> Any:
    """The adapter that serves where the receiver is its own sharer; None."""
    same_kind = [one for one in among if one.config.mode == adapter.config.mode]
    if len(same_kind) > 1:
        raise EvaluationError("own_adapters", expected="at most one of a kind", got="two")
    if same_kind:
        return same_kind[0].eval()
    return adapter if adapter.sharer_geometry == adapter.receiver_geometry else None


def _able(own: nn.Module | None) -> tuple[str, ...]:
    return _ALL if own is not None else tuple(control for control in _ALL if control != SELF)


def _weights(module: nn.Module, own: nn.Module | None) -> dict[str, Any]:
    """What a run's cells depend on."""
    digests = {"weights": digest_of({}, dict(module.named_parameters()))}
    return digests if own in (None, module) else {**digests, "own": digest_of({}, dict(own.named_parameters()))}


def _position_wise(
    name: str, receiver: Agent, sharer: Agent, fuser: Any, own: Any, limited: _Limited, seed: int
) -> Entrant:
    """LCF or C2C."""
    theirs = [Sharer(sharer, fuser.eval())]
    ours = [] if own is None else [Sharer(receiver.called(sharer.name), own.eval())]
    for whom in (theirs, ours):
        LCFChannel(receiver, whom)  # refuses other models' before anything runs

    def make(control: str) -> Channel:
        return LCFChannel(receiver, ours if control == SELF else theirs, name=name, control=control, seed=seed)

    return Entrant(name, make, limited(_able(own)), _weights(fuser, own), "shared")


def _lcf_x(
    receiver: Agent,
    sharer: Agent,
    adapter: LatentCacheFlow,
    own: Any,
    dtype: str,
    spans: Sequence[str],
    limited: _Limited,
    seed: int,
) -> list[Entrant]:
    theirs = [Sharer(sharer, adapter.eval())]
    itself, weights = receiver.called(sharer.name), _weights(adapter, own)
    found = []
    for number, cut in enumerate(spans):
        name = "lcf_x" if number == 0 else f"lcf_x_{cut}"

        def make(control: str, name: str = name, cut: str = cut) -> Channel:
            made: dict[str, Any] = {"dtype": dtype, "spans": cut, "name": name, "control": control, "seed": seed}
            if control == SELF and own is not None:
                return LCFXChannel(receiver, own, [Sharer(itself, own)], **made)
            return LCFXChannel(receiver, adapter, theirs, **made)

        able = limited(_able(own)) if number == 0 else (MATCHED,)
        for control in able:
            make(control)  # refuses other models' before anything runs
        found.append(Entrant(name, make, able, {**weights, "dtype": dtype, "spans": cut}, "cross"))
    return found


def _slots(
    receiver: Agent,
    sharer: Agent,
    adapter: LatentSlots,
    own: Any,
    dtype: str,
    placement: str | None,
    spans: str,
    limited: _Limited,
    seed: int,
) -> Entrant:
    itself = receiver.called(sharer.name)
    options: dict[str, Any] = {"dtype": dtype, "placement": placement, "spans": spans, "seed": seed}
    for made in (adapter, own):
        if made is not None:
            made.eval()

    def make(control: str) -> Channel:
        if control == SELF and own is not None:
            return SlotsChannel(receiver, own, [Sharer(itself, own)], control=control, **options)
        return SlotsChannel(receiver, adapter, [Sharer(sharer, adapter)], control=control, **options)

    able = limited(_able(own))
    for control in able:
        make(control)  # refuses other models' before anything runs
    settings = {**_weights(adapter, own), "dtype": dtype, "placement": placement or adapter.placement}
    if own is not None and own.placement != adapter.placement and placement is None:
        settings["own_placement"] = own.placement
    if adapter.per_span:
        settings["spans"] = spans
    return Entrant("slots", make, able, settings, "cross")
