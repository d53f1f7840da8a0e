"""Mutated messages by the thousand: `Message.from_bytes` refuses each with a MessageError, or it is whole.

A raw mutant must never be taken. One that was signed again gets past the checksum to the parser behind it; what
that takes must be a message throughout. Everything is drawn from a seed, so a failure's number brings it back.
"""

from __future__ import annotations

import json
import math
import random
import resource
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from messages import (
    EVERYTHING,
    PREAMBLE,
    SLOT_CONTENTS,
    assert_same,
    edited,
    header_of,
    make_message,
    resigned,
    with_header,
)

from lcf_fast import CacheGeometry, Message, MessageError
from lcf_fast.fingerprint import is_digest

KEY = b"key of the fuzzed"


def corpus() -> list[bytes]:
    """Every storage, every choice of contents, one item and several, with a key and without."""
    generator = torch.Generator().manual_seed(1)
    one = make_message(generator=generator, metadata={"topic": "café", "n": '"1"'})
    batch = make_message(generator=generator, batch=2, layers=(0, 2, 3), width=5, spans=1)
    wide = make_message(generator=generator, sharer=CacheGeometry(2, 1, 2), dtype=torch.float64, layers=(4,))
    slots = make_message(generator=generator, slots=3, batch=2, contents=SLOT_CONTENTS)
    return [
        slots.to_bytes(),
        slots.to_bytes(dtype="int8", contents=SLOT_CONTENTS),
        one.to_bytes(),
        one.to_bytes(dtype="bfloat16", contents=EVERYTHING),
        one.to_bytes(dtype="int8", contents=EVERYTHING),
        batch.to_bytes(dtype="fp8", contents=("latent", "summary")),
        batch.to_bytes(dtype="float16", contents=("summary", "span_weights")),
        wide.to_bytes(contents=("summary",)),
        batch.to_bytes(dtype="int8", key=KEY),
    ]


# --- mutations, each bytes to bytes
# ---------------------------------------------------------------------

#: What stands in place of a number, a text or a list in JSON.
ODD: tuple[Any, ...] = (
    *(0, 1, 2, 3, -1, 127, 1 << 16, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 64, 10**400, 1.0, 0.5, math.inf, math.nan),
    *(True, False, None, "", "0", "0-4", "0-4,4", "4-0", "1,0", "0-99999", "\ud800", "\x00", "é" * 99, "float32"),
    *("int8", "F32", "I8", [], {}, [0], [0, 0], [1, 2, 3], [[]], {"a": 1}, {"latent": "float32"}, {"": ""}),
)
#: What is put into JSON as text, where it may no longer be JSON.
SCRAPS = (
    "{",
    "}",
    "[",
    "]",
    '"',
    "\\",
    "\\u0000",
    "\\ud800",
    ",",
    ":",
    "null",
    "NaN",
    "1e999",
    " ",
    "\n",
    "\xff",
    "0" * 40,
)


def flip(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    mutant = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        mutant[rng.randrange(len(mutant))] ^= 1 << rng.randrange(8)
    return bytes(mutant)


def flip_payload(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    size = len(header_of(data)[2])
    mutant = bytearray(data)
    mutant[len(data) - 1 - rng.randrange(size)] = rng.choice((0, 1, 0x7E, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return bytes(mutant)


def truncate(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    return data[: rng.randrange(len(data))]


def extend(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    return data + rng.choice((bytes(rng.randint(1, 16)), rng.randbytes(rng.randint(1, 64)), data[: rng.randint(1, 99)]))


def splice(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    other = rng.choice(others)
    cut = rng.choice((PREAMBLE, PREAMBLE + 8, rng.randrange(len(data)), len(data) - len(header_of(data)[2])))
    start = rng.choice((cut, rng.randrange(len(other)), len(other) - len(header_of(other)[2])))
    return data[:cut] + other[start:]


def cut_out(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + data[start + rng.choice((1, 4, 8, 64)) :]


def double(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    start = rng.randrange(len(data))
    stop = min(len(data), start + rng.choice((1, 4, 8, 64)))
    return data[:stop] + data[start:]


def number(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """A field of the preamble, or the length of the header."""
    at, size = rng.choice(((8, 4), (12, 4), (16, 8), (PREAMBLE, 8), (PREAMBLE, 8)))
    old = int.from_bytes(data[at : at + size], "little")
    value = rng.choice((0, 1, 2, old + 1, old - 1, old + 8, old - 8, len(data), 1 << 30, -1, rng.getrandbits(8 * size)))
    return data[:at] + (value % (1 << 8 * size)).to_bytes(size, "little") + data[at + size :]


def replace_in(value: Any, rng: random.Random) -> Any:
    """``value`` with one of its leaves (or branches) gone, odd, or off by a little."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        found, name = dict(value), rng.choice(list(value))
        if rng.random() < 0.1:
            found.pop(name)
        elif rng.random() < 0.1:
            more = ("more", "latent", "summary", "span_weights", "latent_scale", "slots", "tokens")
            found[rng.choice(more)] = found[name]
        else:
            found[name] = replace_in(found[name], rng)
        return found
    if isinstance(value, list) and value and rng.random() < 0.9:
        items, at = list(value), rng.randrange(len(value))
        items[at] = replace_in(items[at], rng)
        return rng.choice((items, items, items, items[:-1], [*items, items[0]], items[::-1]))
    if type(value) is int and rng.random() < 0.6:
        return value + rng.choice((-8, -4, -1, 1, 4, 8))
    if isinstance(value, str) and value and rng.random() < 0.5:
        at = rng.randrange(len(value))
        return value[:at] + rng.choice(("", "0", "9", ",", "-", "f", "é", value[at:])) + value[at + 1 :]
    return rng.choice(ODD)


def edit_description(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    def change(header: dict[str, Any]) -> None:
        description = replace_in(header_of(data)[1], rng)
        header["__metadata__"]["lcf_fast"] = json.dumps(description)

    return edited(data, entry=change)


def edit_header(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    return with_header(data, json.dumps(replace_in(header_of(data)[0], rng)))


def edit_text(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """The header's text, which is JSON after this or not."""
    text = json.dumps(header_of(data)[0], ensure_ascii=rng.random() < 0.5, separators=(",", ":"))
    for _ in range(rng.choice((1, 1, 3))):
        at = rng.randrange(len(text))
        text = text[:at] + rng.choice(SCRAPS) + text[at + rng.choice((0, 0, 1, 2)) :]
    return with_header(data, text.encode("utf-8" if rng.random() < 0.9 else "latin-1", "replace"))


def nest(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    depth = rng.choice((2, 20, 200, 2_000, 20_000))
    deep = rng.choice(("[" * depth, "[" * depth + "]" * depth, '{"a":' * depth))
    text = json.dumps(header_of(data)[0])
    at = rng.randrange(len(text))
    return with_header(data, rng.choice((text[:at] + deep + text[at:], text[:-1] + ',"a":' + deep + "}")))


Mutation = Callable[[bytes, random.Random, list[bytes]], bytes]
MUTATIONS: tuple[Mutation, ...] = (
    *(flip, flip_payload, truncate, extend, splice, cut_out, double, number),
    *(edit_description, edit_description, edit_header, edit_header, edit_text, nest),
)


# --- what must hold
# ---------------------------------------------------------------------


def assert_valid(message: Message, key: bytes | None) -> None:
    """Throughout, by rules of this test's own; and so that its own bytes say the same again."""
    sharer, receiver, origin = message.sharer, message.receiver, message.origin
    assert sharer is not None and receiver is not None and origin is not None
    layers = message.receiver_layers
    assert layers and list(layers) == sorted(set(layers)) and layers[0] >= 0 and layers[-1] < receiver.layers
    assert type(message.spans) is int and message.spans >= 1
    assert is_digest(origin.adapter) and is_digest(origin.sharer)
    assert all(isinstance(text, str) for item in message.metadata.items() for text in item)
    tensors = message.tensors
    assert "latent" in tensors or "summary" in tensors
    batch = len(message.split())
    width, slots = tensors["latent"].shape[-1] if "latent" in tensors else 0, message.slots
    assert not slots or ("summary" not in tensors and "span_weights" not in tensors)
    tokens = tensors["slot_weights"].shape[-1] if "slot_weights" in tensors else 0
    shapes = {
        "latent": (len(layers), batch, *([slots] if slots else []), width),
        "slot_weights": (len(layers), batch, sharer.kv_heads, slots, tokens),
        "summary": (len(layers), 2, batch, sharer.kv_heads, sharer.head_dim),
        "span_weights": (len(layers), batch, sharer.kv_heads, message.spans),
    }
    for name, tensor in tensors.items():
        assert tuple(tensor.shape) == shapes[name] and min(tensor.shape) > 0, name
        assert torch.isfinite(tensor).all(), name
    for name in tensors.keys() & {"span_weights", "slot_weights"}:
        assert tensors[name].min() >= 0 and tensors[name].max() < 1.01
    again = Message.from_bytes(message.to_bytes(contents=tuple(tensors), key=key), key=key)
    assert_same(again, message)


def mutated(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """One to three mutations of ``data``, of which something is left to change at each."""
    mutant = data
    for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
        # The later ones see whatever the earlier left, so not those that take a whole message apart.
        mutation = rng.choice(MUTATIONS if mutant is data else (flip, truncate, extend, cut_out, double, number))
        if len(mutant) > PREAMBLE + 8:
            mutant = mutation(mutant, rng, others)
    return mutant


def run(count: int, seed: int) -> Counter[str]:
    """``count`` mutants, one in four raw and the rest signed again; how often each outcome came."""
    rng = random.Random(seed)
    originals = corpus()
    outcomes: Counter[str] = Counter()
    index = 0
    while index < count:
        data = rng.choice(originals)
        key = KEY if data is originals[-1] else None
        mutant, raw = mutated(data, rng, originals), index % 4 == 0
        if raw:
            # The mutations of JSON sign what they make; here the digest stays what it was.
            mutant = mutant[:24] + data[24:PREAMBLE] + mutant[PREAMBLE:]
        else:
            mutant = resigned(mutant, key or b"")
        if mutant == data:  # a byte cut out beside one like it
            continue
        index += 1
        where = f"mutant {index} of seed {seed}"
        reader = rng.choice((key, key, key, None, b"another")) if rng.random() < 0.05 else key
        message = taken(bytearray(mutant) if index % 2 else mutant, reader)
        if isinstance(message, MessageError):
            assert str(message).isascii() and len(str(message)) < 500, where
            outcomes[f"{'raw' if raw else 'signed'}: {message.argument}"] += 1
            continue
        assert not raw, f"{where}: changed, and taken"
        outcomes["signed: taken"] += 1
        try:
            assert_valid(message, key)
        except Exception as error:
            raise AssertionError(f"{where}: taken, and not whole") from error
    return outcomes


def taken(data: bytes | bytearray, key: bytes | None) -> Message | MessageError:
    """What the reader makes of ``data``: any error but a MessageError is a failure of the test."""
    try:
        return Message.from_bytes(data, key=key)
    except MessageError as error:
        return error


#: Where a mutant must have ended now and then, or the mutations reach less of the reader than they did.
REACHED = (
    *("raw: message.digest", "raw: message.length", "raw: message.magic", "signed: taken"),
    *("signed: message.version", "signed: message.flags", "signed: message.key", "signed: message.header"),
    *("signed: message.description", "signed: message.layers", "signed: message.dtype", "signed: message.origin"),
    *("signed: message.batch", "signed: message.spans", "signed: message.width", "signed: message.metadata"),
    *("signed: message.sharer", "signed: message.receiver", "signed: message.format", "signed: message.latent"),
    *("signed: message.header.latent.shape", "signed: message.header.latent.dtype", "signed: message.header.summary"),
    *("signed: message.header.latent.data_offsets", "signed: message.summary", "signed: message.latent_scale"),
    *("signed: message.slots", "signed: message.tokens", "signed: message.header.slot_weights"),
)


def assert_reached(outcomes: Counter[str], count: int) -> None:
    print(json.dumps(dict(outcomes.most_common()), indent=1))
    assert not [place for place in REACHED if not outcomes[place]]
    assert outcomes["signed: taken"] > count // 50
    assert sum(outcomes.values()) == count


def test_2_000_mutants() -> None:
    assert_reached(run(2_000, seed=3), 2_000)


@pytest.mark.slow
def test_200_000_mutants() -> None:
    assert_reached(run(200_000, seed=4), 200_000)


# --- memory
# ---------------------------------------------------------------------


@contextmanager
def address_space(spare: int) -> Iterator[None]:
    """No more than ``spare`` bytes beyond what the process has mapped: what asks for more fails."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + spare, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def promising() -> dict[str, bytes]:
    """Messages of a few hundred bytes that speak of gigabytes, each in another place, signed where it helps."""
    data = corpus()[2]
    size = 1 << 33

    def giant(header: dict[str, Any]) -> None:
        header["latent"] = {"dtype": "F32", "shape": [5, 1 << 30, 8], "data_offsets": [0, 5 * (1 << 30) * 32]}
        description = {**header_of(data)[1], "batch": 1 << 30}
        header["__metadata__"]["lcf_fast"] = json.dumps(description)

    def many_layers(description: dict[str, Any]) -> None:
        description["layers"] = ",".join(["0-4095"] * 8_000)
        description["receiver"] = [4096, 1, 1]

    def slots(description: dict[str, Any]) -> None:
        description["slots"] = 1 << 20

    return {
        "slots": edited(corpus()[1], field=slots),
        "length": data[:16] + size.to_bytes(8, "little") + data[24:],
        "header's length": resigned(data[:PREAMBLE] + size.to_bytes(8, "little") + data[PREAMBLE + 8 :]),
        "shape": edited(data, entry=giant),
        "layers": edited(data, field=many_layers),
        "digits": with_header(data, json.dumps(header_of(data)[0]).replace("[0, 160]", f"[0, {'9' * 60_000}]")),
    }


@pytest.mark.parametrize("place", promising())
def test_promises_allocate_nothing(place: str) -> None:
    data = promising()[place]
    with pytest.raises(MessageError):  # once before, so that what is made once and kept does not count
        Message.from_bytes(data)
    tracemalloc.start()
    try:
        # What Python allocates is counted; what torch would allocate fails, as 64 MiB are less than any promise.
        with address_space(1 << 26), pytest.raises(MessageError):
            Message.from_bytes(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000, f"{peak} bytes"


def test_the_limit_on_memory_works() -> None:
    with address_space(1 << 26), pytest.raises((MemoryError, RuntimeError)):
        torch.empty(1 << 33, dtype=torch.uint8)
