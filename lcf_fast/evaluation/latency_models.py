"""Whom the latency protocol times: the published architectures with random weights, or models that are given.

A group's channels are named before anything is built, and each is built when its turn comes: a C2C fuser of the
published size alone takes as much memory as a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice, product
from string import ascii_lowercase
from typing import Any

import torch

from ..adapter import LatentCacheFlow
from ..architectures import published_config, random_model
from ..c2c.config import C2CConfig
from ..c2c.faithful import FaithfulFuser
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
    TextChannel,
)
from ..config import CacheGeometry, LCFConfig
from .failures import EvaluationError

__all__ = ["CROSS", "SHARED", "Group", "Makers", "given_groups", "random_groups", "stand_in_tokenizer"]

#: Both read the same; each reads its own.
SHARED, CROSS = "shared context", "cross context"
Makers = dict[str, Callable[[], Channel]]
#: Of a text for real tokenizers: common words, most of them a token each.
_COMMON = """the of and to in is that for it was on are as with his they at be this from have or by one had not but what
all were when we there can an your which their said if do will each about how up out them then she many some so"""
_ROLES = ("user", "assistant", "system")


@dataclass(frozen=True)
class Group:
    """Channels that take turns.

    Attributes:
        name: `SHARED` or `CROSS`.
        open: makers of its channels by name, anew; models are built when the first channel is made that needs them, and
            live as long as what this returned.
        words: to make contexts of.
        text_tokens: longest notes of its text channels.
        limit: positions that its models have.
        settings: who takes part, for the record.
    """

    name: str
    open: Callable[[], Makers]
    words: Sequence[str]
    text_tokens: tuple[int, ...]
    limit: int
    settings: Mapping[str, Any]


# --- random weights
# -------------------------------------------------------------------------------------------------


def stand_in_tokenizer(size: int) -> Any:
    """A tokenizer of ``size`` words, split at white space, a word a token, none of which ends a text or is left out.

    A model of random weights writes random ids: a note of k of them is k tokens of the prompt that it is put into. The
    words have four letters: with a space five bytes a token, about what English takes.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = list(islice(_words(), size - 1))
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[?]", *words])}, unk_token="[?]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False)


def _words() -> Any:
    """Names of roles, which a chat is rendered with, then words of four letters."""
    yield from _ROLES
    yield from (word for word in map("".join, product(ascii_lowercase, repeat=4)) if word not in _ROLES)


def random_groups(
    text_tokens: Sequence[int],
    *,
    device: torch.device,
    dtype: torch.dtype,
    sharer: Any = None,
    receiver: Any = None,
    bottleneck: int = 128,
    c2c: Mapping[str, Any] | None = None,
) -> list[Group]:
    """Shared context from the sharer to the receiver, cross context from the receiver's model to itself.

    Args:
        sharer, receiver: configs of transformers, of one vocabulary; None: Qwen2.5-0.5B's and Qwen3-0.6B's.
        bottleneck: of LCF and LCF-X.
        c2c: widths of C2C's fuser other than the published ones.

    Raises:
        EvaluationError: vocabularies of two sizes.
    """
    configs = {"sharer": sharer or published_config("sharer"), "receiver": receiver or published_config("receiver")}
    sizes = {role: int(config.vocab_size) for role, config in configs.items()}
    if len(set(sizes.values())) > 1:
        raise EvaluationError("vocab_size", expected="one vocabulary of both models", got=str(sizes))
    sides = {role: CacheGeometry.of(config) for role, config in configs.items()}
    labels = {
        role: f"{_kind(role, given, configs[role])}, random weights, vocabulary {sizes[role]:,}, a word a token"
        for role, given in (("sharer", sharer), ("receiver", receiver))
    }

    @cache
    def tokenizer() -> Any:
        return stand_in_tokenizer(sizes["receiver"])

    def build(role: str) -> Agent:
        from transformers import AutoModelForCausalLM

        return _endless(Agent(role, random_model(AutoModelForCausalLM, configs[role], device, dtype), tokenizer()))

    @cache
    def own() -> Agent:  # of both groups
        return build("receiver")

    def adapter(config: LCFConfig) -> LatentCacheFlow:
        return LatentCacheFlow(config, device=device, dtype=dtype).eval().requires_grad_(False)

    def fuser() -> C2CFuser:
        made = C2CFuser(C2CConfig(sides["sharer"], sides["receiver"], **dict(c2c or {})), device=device, dtype=dtype)
        for name, parameter in made.requires_grad_(False).named_parameters():
            if name.endswith("gate_logit"):
                parameter.fill_(1.0)
        return made.eval()

    def open_shared() -> Makers:
        agents = _by_role(own, cache(lambda: build("sharer")))
        config = LCFConfig(sides["sharer"], sides["receiver"], bottleneck=bottleneck, gate_init=1.0)
        return _shared(agents, text_tokens, lambda: adapter(config), cache(fuser))

    def open_cross() -> Makers:
        agents = _by_role(own, cache(lambda: Agent("sharer", own().model, tokenizer())))
        config = LCFConfig(sides["receiver"], sides["receiver"], bottleneck=bottleneck, cross_context=True)
        return _cross(agents, text_tokens, lambda: adapter(config), words)

    words = tuple(islice(_words(), len(_ROLES), sizes["receiver"] - 1))
    limits = {role: _limit(config) for role, config in configs.items()}
    notes, width = tuple(text_tokens), {"bottleneck": bottleneck}
    return [
        Group(SHARED, open_shared, words, notes, min(limits.values()), {**labels, **width, "c2c": dict(c2c or {})}),
        Group(CROSS, open_cross, words, notes, limits["receiver"], {**labels, "sharer": labels["receiver"], **width}),
    ]


def _kind(role: str, given: Any, config: Any) -> str:
    if given is None:
        return f"{'Qwen2.5-0.5B' if role == 'sharer' else 'Qwen3-0.6B'} architecture"
    return f"{config.model_type} of {CacheGeometry.of(config).layers} layers"


# --- models that are given
# ------------------------------------------------------------------------------------------


def given_groups(
    text_tokens: Sequence[int],
    load: Callable[[], Mapping[str, Agent]],
    configs: Mapping[str, Any],
    *,
    adapters: Sequence[LatentCacheFlow] = (),
    fuser: C2CFuser | None = None,
    one_model: bool,
    settings: Mapping[str, Any],
) -> list[Group]:
    """Both groups from one sharer to one receiver, with the channels that something is there for.

    Args:
        load: the ``"sharer"`` and the ``"receiver"``; called when a channel is made.
        configs: theirs.
        adapters: at most one LCF and one LCF-X, in eval mode, of the models' dtype; as ``fuser``.
        one_model: both are the very same model, so that KVComm takes part.

    Raises:
        EvaluationError: two adapters of one kind.
    """
    kinds: dict[bool, LatentCacheFlow] = {}
    for adapter in adapters:
        if adapter.config.cross_context in kinds:
            name = "LCF-X" if adapter.config.cross_context else "LCF"
            raise EvaluationError("--adapter", expected="at most one LCF and one LCF-X", got=f"two {name}")
        kinds[adapter.config.cross_context] = adapter

    @cache
    def loaded() -> dict[str, Agent]:
        return {role: _endless(agent) for role, agent in load().items()}

    def giving(adapter: LatentCacheFlow | C2CFuser | None) -> Any:
        return None if adapter is None else lambda: adapter

    agents = _by_role(lambda: loaded()["receiver"], lambda: loaded()["sharer"])
    limit, notes, words = min(map(_limit, configs.values())), tuple(text_tokens), tuple(_COMMON.split())

    def open_cross() -> Makers:
        makers = _cross(agents, notes, giving(kinds.get(True)), words)
        return makers if one_model else {name: make for name, make in makers.items() if name != "kvcomm"}

    def open_shared() -> Makers:
        return _shared(agents, notes, giving(kinds.get(False)), giving(fuser))

    return [
        Group(SHARED, open_shared, words, notes, limit, settings),
        Group(CROSS, open_cross, words, notes, limit, settings),
    ]


def _limit(config: Any) -> int:
    return int(getattr(config, "max_position_embeddings", None) or 1 << 31)


def _endless(agent: Agent) -> Agent:
    """Nothing that it writes ends a text: what is timed has the length that was asked for."""
    agent.model.generation_config.eos_token_id = None
    return agent


# --- channels
# -------------------------------------------------------------------------------------------------------


def _by_role(receiver: Callable[[], Agent], sharer: Callable[[], Agent]) -> Callable[[str], Agent]:
    return lambda role: receiver() if role == "receiver" else sharer()


def _notes(agents: Callable[[str], Agent], text_tokens: Sequence[int]) -> Makers:
    def text(most: int) -> Callable[[], Channel]:
        return lambda: TextChannel(agents("receiver"), [agents("sharer")], most_tokens=most)

    return {f"text_{most}": text(most) for most in text_tokens}


def _shared(
    agents: Callable[[str], Agent],
    text_tokens: Sequence[int],
    adapter: Callable[[], LatentCacheFlow] | None,
    fuser: Callable[[], C2CFuser] | None,
) -> Makers:
    def fusing(name: str, made: Callable[[], Any]) -> Callable[[], Channel]:
        return lambda: LCFChannel(agents("receiver"), [Sharer(agents("sharer"), made())], name=name)

    makers: Makers = {"none": lambda: NoneChannel(agents("receiver")), **_notes(agents, text_tokens)}
    if adapter is not None:
        makers["lcf"] = fusing("lcf", adapter)
    if fuser is not None:
        makers["c2c"] = fusing("c2c", fuser)
        makers["c2c_as_released"] = fusing("c2c_as_released", lambda: FaithfulFuser(fuser()))
    return makers


def _cross(
    agents: Callable[[str], Agent],
    text_tokens: Sequence[int],
    adapter: Callable[[], LatentCacheFlow] | None,
    words: Sequence[str],
) -> Makers:
    def latent() -> Channel:
        assert adapter is not None
        made = adapter()
        return LCFXChannel(agents("receiver"), made, [Sharer(agents("sharer"), made)])

    def shared_layers() -> Channel:
        channel = KVCommChannel(agents("receiver"), [agents("sharer")])
        # Which layers it shares depends on what it is calibrated on, how many does not.
        context, question = " ".join(words[:64]), " ".join(words[-8:])
        channel.calibrate(Request(question, sharer_contexts={"sharer": (context,)}))
        return channel

    makers: Makers = {
        "none": lambda: NoneChannel(agents("receiver")),
        "full_context": lambda: FullContextChannel(agents("receiver")),
        **_notes(agents, text_tokens),
    }
    if adapter is not None:
        makers["lcf_x"] = latent
    return {**makers, "kvcomm": shared_layers}
