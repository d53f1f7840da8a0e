"""The latency protocol: how long each channel takes to a receiver's first token and to its last, and in which parts.

Channels take turns: within a round each is called once, and each round begins with another one, so that whatever
disturbs the machine disturbs them alike. Times are the channels' own (`lcf_fast.channels.clock`), of a whole batch, and
begin with the call to `Channel.answer`; on a GPU a part ends when the device has done it. Warm-up rounds do not count.
A *cell* is a group of channels at one batch size. It is written when it is whole, and not run again.
"""

from __future__ import annotations

import gc
import json
import os
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from ..channels import Channel, Request, TextChannel
from ..channels.request import Timings
from ..counting import counted
from ..files import only_writer, write_whole
from ..machine import about
from ..reading.chat import ChatReader
from .failures import EvaluationError
from .latency_models import CROSS, Group, Makers

__all__ = ["PARTS", "Protocol", "default_protocol", "read_cells", "requests_of", "run_latency"]

RESULTS = "latency.json"
#: As `Timings` has them.
PARTS = ("sharer", "communication", "receiver", "first_token", "end")
#: Paragraphs of a sharer's own context, each a span: as many as one side gets of a split HotpotQA question.
PARAGRAPHS = 5
#: Positions for a chat template and for what a sharer is asked to do.
AROUND = 64
#: Tokens of notes and answers in a brief warm-up.
BRIEF = 8
SEED = 20260807
_FORMAT = 1


@dataclass(frozen=True)
class Protocol:
    """How a cell is measured.

    Attributes:
        batch: requests at a time, of one length.
        context_tokens: of the receiver's context; in the cross-context group the sharer has as long a one of its own.
        question_tokens, max_new_tokens: of the question and of the answer, which nothing ends before.
        rounds, warmup: that count, and that come before.
        brief_warmup: one request, notes and answer of a few tokens: on a CPU that is enough for weights to have been
            touched and code to have been loaded. Otherwise as the rounds that count.

    Raises:
        EvaluationError: less than one of anything but warm-up rounds.
    """

    batch: int
    context_tokens: int
    question_tokens: int
    max_new_tokens: int
    rounds: int
    warmup: int
    brief_warmup: bool

    def __post_init__(self) -> None:
        for name in ("batch", "context_tokens", "question_tokens", "max_new_tokens", "rounds", "warmup"):
            value, least = getattr(self, name), 0 if name == "warmup" else 1
            if value < least:
                expected = f"{least} or more"
                raise EvaluationError(f"--{name.replace('_', '-')}", expected=expected, got=str(value))


def default_protocol(device: torch.device, batch: int, **given: int | None) -> Protocol:
    """What suits a device: on a CPU little, since notes of 200 tokens take it half a minute each.

    ``given``: fields that are not to be the default's, where they are not None.
    """
    if device.type == "cpu":
        chosen = {
            "context_tokens": 64 if batch == 1 else 32,
            "question_tokens": 16,
            "max_new_tokens": 4,
            "rounds": 3 if batch == 1 else 1,
            "warmup": 1,
        }
    else:
        chosen = {"context_tokens": 1000, "question_tokens": 32, "max_new_tokens": 16, "rounds": 10, "warmup": 2}
    chosen |= {name: value for name, value in given.items() if value is not None}
    return Protocol(batch=batch, brief_warmup=device.type == "cpu", **chosen)


def run_latency(
    groups: Sequence[Group],
    protocols: Sequence[Protocol],
    folder: str | os.PathLike[str],
    *,
    device: torch.device,
    channels: Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Measure every group under every protocol; a cell that ``folder`` holds already is not run again.

    Args:
        folder: gets ``latency.json``, after each cell.
        channels: these alone; None: all.
        settings: that all figures depend on, beside the groups' own and the protocol's.
        progress: whether it is shown on standard error how far it is.

    Returns:
        The cells in order: their group, settings, machine, and by channel medians and quartiles.

    Raises:
        EvaluationError: before any model is built: a channel that no group has, a protocol that comes twice for a batch
            size, more tokens than the models have positions for, a cell in the folder that was measured under other
            settings. Later: an answer that is not as long as it was to be. And what channels raise.
    """
    path = Path(folder) / RESULTS
    chosen = _chosen(groups, channels)
    batches = [protocol.batch for protocol in protocols]
    if not batches or len(set(batches)) < len(batches):
        raise EvaluationError("--batch", expected="one batch size or more, each once", got=str(batches))
    machine = about(device)
    common = {**(settings or {}), "device": machine["device"], "threads": machine["threads"]}
    cells = read_cells(path)
    wanted: dict[tuple[str, int], dict[str, Any]] = {}
    for group, makers in chosen:
        for protocol in protocols:
            check_positions(group, protocol)
            own = {**asdict(protocol), **common, **group.settings, "channels": list(makers)}
            _same_settings(path, _cell(cells, group.name, protocol.batch), own)
            wanted[group.name, protocol.batch] = own
    behind: list[Callable[[], None]] = []
    with only_writer(path.parent):
        for group, makers in chosen:
            kept: Makers = {name: cache(make) for name, make in makers.items()}
            for protocol in protocols:
                key = group.name, protocol.batch
                cell = _cell(cells, *key)
                if cell is not None:
                    if None in [one["launches"] for one in cell["channels"].values()]:  # of a run that was stopped
                        behind.append(partial(count_launches, cell["channels"], kept, group, protocol))
                    continue
                if progress:
                    print(f"{group.name}: {said(protocol)}", file=sys.stderr, flush=True)
                found = measure(kept, group, protocol, progress=progress)
                cells.append(
                    {"group": key[0], "batch": key[1], "settings": wanted[key], "about": machine, "channels": found}
                )
                _write(path, cells)
                behind.append(partial(count_launches, found, kept, group, protocol))
            if device.type != "cuda":  # nothing is counted there
                behind.clear()
                del kept
                makers.clear()  # and with them the models of this group
                gc.collect()
        for count in behind:
            count()
            _write(path, cells)
    return [cell for key in wanted if (cell := _cell(cells, *key)) is not None]


def _write(path: Path, cells: Sequence[Mapping[str, Any]]) -> None:
    text = json.dumps({"format": _FORMAT, "cells": cells}, indent=1, allow_nan=False) + "\n"
    write_whole(path, text.encode())


def said(protocol: Protocol) -> str:
    """A protocol in a line."""
    rounds = f"{protocol.rounds} round{'s' if protocol.rounds > 1 else ''}"
    warmup = f"{protocol.warmup} of warm-up{' (brief)' if protocol.brief_warmup else ''}"
    return (
        f"batch {protocol.batch}, contexts of {protocol.context_tokens:,} tokens, question {protocol.question_tokens},"
        f" answer {protocol.max_new_tokens}; {rounds} after {warmup}"
    )


def requests_of(group: str, protocol: Protocol, reader: ChatReader, words: Sequence[str]) -> list[Request]:
    """A batch: each request its own words, all of one length as the receiver's tokenizer counts."""
    draw = random.Random(f"{SEED} {group} {protocol.batch}")

    def text(tokens: int) -> str:
        some = draw.choices(words, k=tokens)
        while len(some) > 1 and (over := len(reader.ids(" ".join(some))) - tokens) > 0:
            some = some[: -max(1, over // 4)]
        return " ".join(some)

    found = []
    for _ in range(protocol.batch):
        question, context = text(protocol.question_tokens), text(protocol.context_tokens)
        sharers: dict[str, tuple[str, ...]] = {}
        if group == CROSS:
            whole, count = protocol.context_tokens, min(PARAGRAPHS, protocol.context_tokens)
            bounds = [whole * i // count for i in range(count + 1)]
            sharers = {"sharer": tuple(text(stop - start) for start, stop in zip(bounds, bounds[1:]))}
        found.append(Request(question, context, sharers))
    return found


def measure(makers: Makers, group: Group, protocol: Protocol, *, progress: bool = False) -> dict[str, dict[str, Any]]:
    """One cell: by channel its figures as JSON."""
    names = list(makers)
    turns = []
    for number in range(protocol.warmup + protocol.rounds):
        first = number % len(names)
        turns += [(number >= protocol.warmup, name) for name in names[first:] + names[:first]]
    times: dict[str, list[Timings]] = {name: [] for name in names}
    sent: dict[str, float] = {}
    requests: list[Request] = []
    done: list[str] = []
    label = f"{group.name}, batch {protocol.batch}: calls"
    for counts, name in counted(turns, label, total=len(turns), shown=progress, more=lambda: " ".join(done[-1:])):
        channel = makers[name]()
        requests = requests or requests_of(group.name, protocol, channel.receiver.reader, group.words)
        if counts:
            options = channel.receiver.greedy()
            answers = channel.answer(requests, max_new_tokens=protocol.max_new_tokens, **options)
            for answer in answers:
                if len(answer.ids) != protocol.max_new_tokens:
                    expected = f"answers of {protocol.max_new_tokens} tokens"
                    raise EvaluationError(name, expected=expected, got=f"one of {len(answer.ids)}")
            times[name].append(answers[0].timings)
            sent[name] = sum(answer.sent for answer in answers) / len(answers)
        else:
            _warm_up(channel, requests, protocol)
        done.append(name)
    found = {name: figures(times[name], sent[name]) for name in names}
    for text in (name for name in names if name.startswith("text_")):
        slow = found[text]["ms"]["first_token"]["median"]
        for one in found.values():
            one["speedups"][text] = slow / one["ms"]["first_token"]["median"]
    return found


def count_launches(found: Mapping[str, dict[str, Any]], makers: Makers, group: Group, protocol: Protocol) -> None:
    """Fill in what the channels' communication launches, on a GPU.

    Behind all that is timed: a profiler slows down what the process launches from then on. What took no time launches
    nothing, and is not called: notes take longer to write than all else.
    """
    for name, one in found.items():
        if one["launches"] is not None:
            continue
        if not one["ms"]["communication"]["high"]:
            one["launches"] = 0
            continue
        channel = makers[name]()
        one["launches"] = channel.launches(requests_of(group.name, protocol, channel.receiver.reader, group.words))


def figures(times: Sequence[Timings], sent: float) -> dict[str, Any]:
    """Medians and quartiles of a channel's calls, ``ms`` of each part; bytes a request. ``launches``: see
    `count_launches`."""
    shares = [one.communication / one.first_token for one in times]
    return {
        "ms": {part: _quartiles([1e3 * getattr(one, part) for one in times]) for part in PARTS},
        "communication_share": median(shares),
        "bytes": sent,
        "launches": None,
        "rounds": len(times),
        "speedups": {},
    }


def _quartiles(values: Sequence[float]) -> dict[str, float]:
    if len(values) < 2:
        return dict.fromkeys(("median", "low", "high"), values[0])
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def _warm_up(channel: Channel, requests: Sequence[Request], protocol: Protocol) -> None:
    new = protocol.max_new_tokens
    if protocol.brief_warmup:
        requests, new = requests[:1], min(BRIEF, new)
        if isinstance(channel, TextChannel):
            most = min(BRIEF, channel.most_tokens)
            channel = TextChannel(channel.receiver, list(channel.sharers.values()), most_tokens=most)
    channel.answer(requests, max_new_tokens=new, **channel.receiver.greedy())


# --- what is refused
# -----------------------------------------------------------------------------------------------


def check_positions(group: Group, protocol: Protocol) -> None:
    """Refuse contexts that a model of the group has no room for, with all that goes around them."""
    contexts = 2 if group.name == CROSS else 1  # full_context reads both
    rest = protocol.question_tokens + max(group.text_tokens, default=0) + protocol.max_new_tokens + AROUND
    if contexts * protocol.context_tokens + rest > group.limit:
        most = max(0, (group.limit - rest) // contexts)
        expected = (
            f"{most:,} at most ({group.name}: of {group.limit:,} positions {rest:,} are for question, note, answer and"
            " template)"
        )
        raise EvaluationError("--context-tokens", expected=expected, got=f"{protocol.context_tokens:,}")


def _chosen(groups: Sequence[Group], channels: Sequence[str] | None) -> list[tuple[Group, Makers]]:
    """Groups with those of their channels that are wanted; groups without any are left out."""
    opened = [(group, group.open()) for group in groups]
    known = list(dict.fromkeys(name for _, makers in opened for name in makers))
    for name in channels or ():
        if name not in known:
            raise EvaluationError("--channels", expected=f"some of {', '.join(known)}", got=name)
    found = [
        (group, {name: make for name, make in makers.items() if channels is None or name in channels})
        for group, makers in opened
    ]
    return [(group, makers) for group, makers in found if makers]


# --- the record
# ----------------------------------------------------------------------------------------------------


def read_cells(path: Path) -> list[dict[str, Any]]:
    """The cells of a ``latency.json``; none where there is no such file.

    Raises:
        EvaluationError: a file that is none, or of a form that this version does not know.
    """
    if not path.exists():
        return []
    expected = f"what lcf-fast latency wrote, in format {_FORMAT} (take another folder)"
    try:
        found = json.loads(path.read_bytes())
        if found["format"] != _FORMAT:
            raise EvaluationError(str(path), expected=expected, got=f"format {found['format']!r}")
        cells: list[dict[str, Any]] = found["cells"]
        for cell in cells:
            _ = cell["group"], cell["batch"], dict(cell["settings"]), dict(cell["about"]), dict(cell["channels"])
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, EvaluationError):
            raise
        raise EvaluationError(str(path), expected=expected, got=f"{type(error).__name__}: {error}") from None
    return cells


def _cell(cells: Sequence[dict[str, Any]], group: str, batch: int) -> dict[str, Any] | None:
    return next((cell for cell in cells if (cell["group"], cell["batch"]) == (group, batch)), None)


def _same_settings(path: Path, cell: dict[str, Any] | None, settings: Mapping[str, Any]) -> None:
    """Refuse to go on with a record of other settings."""
    if cell is None:
        return
    then, now = cell["settings"], json.loads(json.dumps(settings))
    changed = sorted(name for name in {*then, *now} if then.get(name) != now.get(name))
    if changed:
        expected = f"the settings that {path} was measured under (go on with those, or take another folder)"
        shown = "; ".join(f"{name}: {now.get(name)!r} instead of {then.get(name)!r}"[:120] for name in changed[:4])
        where = f"{cell['group']}, batch {cell['batch']}"
        raise EvaluationError(f"settings of {where}", expected=expected, got=shown)
