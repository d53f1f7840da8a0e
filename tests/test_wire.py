"""What `Message.from_bytes` does not read: bytes that are not a message throughout, however they are signed."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from messages import EVERYTHING, PREAMBLE, assert_same, edited, header_of, make_message, resigned, with_header

from lcf_fast import DTypeError, Message, MessageError

KEY = b"between the two of us"


def put(data: bytes, at: int, value: int, size: int) -> bytes:
    return data[:at] + value.to_bytes(size, "little") + data[at + size :]


def in_header(name: str, field: str, value: Any) -> Any:
    return lambda header: header[name].__setitem__(field, value)


def dropping(field: str) -> Any:
    return lambda description: description.pop(field)


def setting(field: str, value: Any) -> Any:
    return lambda description: description.__setitem__(field, value)


DATA = make_message(generator=torch.Generator().manual_seed(5)).to_bytes(contents=EVERYTHING)
HEADER, DESCRIPTION, PAYLOAD = header_of(DATA)
TEXT = json.dumps(HEADER, separators=(",", ":"))
#: Latent and nothing else, 5 * 8 floats.
SMALL = make_message(generator=torch.Generator().manual_seed(5)).to_bytes()
SUMMARY = make_message(generator=torch.Generator().manual_seed(5)).to_bytes(contents=("summary",))
HUGE = 1 << 62
DEEP = "[" * 30_000
HOSTILE: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "length"),
    "half a preamble": (DATA[:40], "length"),
    "a preamble alone": (DATA[:PREAMBLE], "length"),
    "no message": (b"\x80\x04" + DATA[2:], "magic"),
    "sent as text": (DATA.replace(b"\r\n", b"\n"), "magic"),
    "version 0": (resigned(put(DATA, 8, 0, 4)), "version"),
    "version 2": (resigned(put(DATA, 8, 2, 4)), "version"),
    "an unknown flag": (resigned(put(DATA, 12, 2, 4)), "flags"),
    "said to be keyed": (resigned(put(DATA, 12, 1, 4)), "key"),
    "cut off": (DATA[:-1], "length"),
    "cut off and signed": (resigned(DATA[:-1]), "header"),
    "extended": (DATA + b"\0", "length"),
    "extended and signed": (resigned(DATA + b"\0"), "header"),
    "twice": (resigned(DATA + DATA), "header"),
    "promises less": (put(DATA, 16, len(DATA) - 1, 8), "length"),
    "promises eight GB": (put(DATA, 16, 8 << 30, 8), "length"),
    "promises most": (put(DATA, 16, (1 << 64) - 1, 8), "length"),
    "a digest of zeros": (DATA[:24] + bytes(32) + DATA[56:], "digest"),
    "signed with a key": (resigned(DATA, KEY), "digest"),
    "no safetensors": (resigned(DATA[:PREAMBLE] + bytes(8)), "header"),
    "no header": (resigned(DATA[:PREAMBLE] + bytes(16)), "header"),
    "huge header": (resigned(put(DATA, PREAMBLE, (1 << 64) - 1, 8)), "header"),
    "header beyond the end": (resigned(put(DATA, PREAMBLE, len(DATA), 8)), "header"),
    "header to the end": (resigned(put(DATA, PREAMBLE, len(DATA) - PREAMBLE - 8, 8)), "header"),
    "header too long": (with_header(DATA, TEXT + " " * (1 << 16)), "header"),
    "header of an odd length": (with_header(DATA, TEXT + " " * (9 - len(TEXT) % 8), padded=False), "header"),
    "header that is no UTF-8": (with_header(DATA, TEXT.encode().replace(b"latent", b"laten\xff")), "header"),
    "header in UTF-16": (with_header(DATA, TEXT.encode("utf-16")), "header"),
    "header that is no JSON": (with_header(DATA, TEXT[:-1]), "header"),
    "header with a mark before it": (with_header(DATA, "\ufeff" + TEXT), "header"),
    "white space before the header": (with_header(DATA, " " + TEXT), "header"),
    "a header that is a list": (with_header(DATA, "[1]"), "header"),
    "deep header": (with_header(DATA, '{"a":' + DEEP), "header"),
    "deep header that ends": (with_header(DATA, '{"a":' + DEEP + DEEP.replace("[", "]") + "}"), "header"),
    "a tensor twice": (with_header(DATA, TEXT[:-1] + ',"latent":' + json.dumps(HEADER["latent"]) + "}"), "header"),
    "metadata twice": (with_header(DATA, TEXT[:-1] + ',"__metadata__":{}}'), "header"),
    "no metadata": (edited(DATA, entry=lambda header: header.pop("__metadata__")), "header"),
    "metadata is null": (edited(DATA, entry=lambda header: header.update(__metadata__=None)), "header"),
    "empty metadata": (edited(DATA, entry=lambda header: header["__metadata__"].clear()), "header"),
    "more metadata": (edited(DATA, entry=in_header("__metadata__", "format", "pt")), "header"),
    "metadata that is a number": (edited(DATA, entry=in_header("__metadata__", "lcf_fast", 5)), "header"),
    "description that is no JSON": (edited(DATA, entry=in_header("__metadata__", "lcf_fast", "{")), "description"),
    "description that is a list": (edited(DATA, entry=in_header("__metadata__", "lcf_fast", "[]")), "description"),
    "deep description": (edited(DATA, entry=in_header("__metadata__", "lcf_fast", DEEP)), "description"),
    "description with a key twice": (
        edited(DATA, entry=in_header("__metadata__", "lcf_fast", '{"spans":1,' + json.dumps(DESCRIPTION)[1:])),
        "description",
    ),
    "a tensor missing": (edited(DATA, entry=lambda header: header.pop("latent")), "header"),
    "a tensor too many": (edited(DATA, entry=lambda header: header.update(more=header["latent"])), "header"),
    "another name": (edited(DATA, entry=lambda header: header.update(latents=header.pop("latent"))), "header"),
    "a tensor that is null": (edited(DATA, entry=lambda header: header.update(latent=None)), "header.latent"),
    "an entry too many": (edited(DATA, entry=in_header("latent", "more", 1)), "header.latent"),
    "another dtype": (edited(DATA, entry=in_header("latent", "dtype", "I32")), "header.latent.dtype"),
    "an unknown dtype": (edited(DATA, entry=in_header("latent", "dtype", "F33")), "header.latent.dtype"),
    "a dtype that is a list": (edited(DATA, entry=in_header("latent", "dtype", ["F32"])), "header.latent.dtype"),
    "another shape": (edited(DATA, entry=in_header("latent", "shape", [5, 8, 1])), "header.latent.shape"),
    "a shape of floats": (edited(DATA, entry=in_header("latent", "shape", [5.0, 1, 8])), "header.latent.shape"),
    "a shape with true": (edited(DATA, entry=in_header("latent", "shape", [5, True, 8])), "header.latent.shape"),
    "a shape of gigabytes": (edited(DATA, entry=in_header("latent", "shape", [5, HUGE, 8])), "header.latent.shape"),
    "a negative shape": (edited(DATA, entry=in_header("latent", "shape", [-5, -1, 8])), "header.latent.shape"),
    "offsets that are floats": (
        edited(SMALL, entry=in_header("latent", "data_offsets", [0.0, 160.0])),
        "header.latent.data_offsets",
    ),
    "offsets with false": (
        edited(SMALL, entry=in_header("latent", "data_offsets", [False, 160])),
        "header.latent.data_offsets",
    ),
    "one offset": (edited(SMALL, entry=in_header("latent", "data_offsets", [160])), "header.latent.data_offsets"),
    "offsets below zero": (
        edited(SMALL, entry=in_header("latent", "data_offsets", [-8, 152])),
        "header.latent.data_offsets",
    ),
    "offsets turned round": (
        edited(SMALL, entry=in_header("latent", "data_offsets", [160, 0])),
        "header.latent.data_offsets",
    ),
    "offsets beyond the end": (edited(SMALL, entry=in_header("latent", "data_offsets", [8, 168])), "header.latent"),
    "offsets far away": (edited(SMALL, entry=in_header("latent", "data_offsets", [HUGE, HUGE + 160])), "header.latent"),
    "offsets that are odd": (edited(SMALL, entry=in_header("latent", "data_offsets", [1, 161])), "header.latent"),
    "offsets of a number too long": (
        with_header(SMALL, TEXT.replace("[0,160]", f"[{'1' * 5000},160]")),
        "header",
    ),
    "tensors that overlap": (
        edited(DATA, entry=in_header("summary", "data_offsets", [0, 5 * 2 * 8 * 4])),
        "header.summary",
    ),
    "a hole": (
        edited(DATA, entry=in_header("summary", "data_offsets", [o + 8 for o in HEADER["summary"]["data_offsets"]])),
        "header.summary",
    ),
    "no data": (edited(SMALL, payload=b""), "header"),
    "data too long": (edited(SMALL, payload=header_of(SMALL)[2] + bytes(4)), "header"),
    **{
        f"{field}={value!r:.30}": (edited(DATA, field=setting(field, value)), named or field)
        for field, value, named in [
            ("format", "lcf_fast.adapter", None),
            ("format", None, None),
            ("batch", 2, "header.latent.shape"),
            ("batch", 0, None),
            ("batch", True, None),
            ("batch", 1.0, None),
            ("batch", "1", None),
            ("batch", HUGE, None),
            ("batch", None, None),
            ("width", 9, "header.latent.shape"),
            ("width", 0, None),
            ("width", None, None),
            ("width", HUGE, None),
            ("spans", 4, "header.span_weights.shape"),
            ("spans", 0, None),
            ("spans", -3, None),
            ("spans", True, None),
            ("spans", HUGE, None),
            ("layers", "0-5", None),
            ("layers", "0-3", "header.latent.shape"),
            ("layers", "0-3,3", None),
            ("layers", "0,0,1,2,3", None),
            ("layers", "4,3,2,1,0", None),
            ("layers", "4-0", None),
            ("layers", "0,1,2,3,4", None),
            ("layers", "00-4", None),
            ("layers", "0-4,", None),
            ("layers", "-1-3", None),
            ("layers", "0-2-4", None),
            ("layers", "", None),
            ("layers", "0-99999", None),
            ("layers", "0-4," * 6000 + "0-4", None),
            ("layers", "\u0660-4", None),
            ("layers", [0, 1, 2, 3, 4], None),
            ("sharer", [3, 2], None),
            ("sharer", [3, 2, 4, 1], None),
            ("sharer", [3, 4, 2], "header.summary.shape"),
            ("sharer", [3, 2.0, 4], None),
            ("sharer", [3, HUGE, 4], None),
            ("sharer", [0, 2, 4], None),
            ("sharer", None, None),
            ("receiver", [4, 3, 8], "layers"),
            ("receiver", [True, 3, 8], None),
            ("receiver", [5000, 3, 8], None),
            ("receiver", "5,3,8", None),
            ("origin", ["0" * 32], None),
            ("origin", ["0" * 32, "0" * 31], None),
            ("origin", ["0" * 32, "G" * 32], None),
            ("origin", ["0" * 32, 0], None),
            ("origin", None, None),
            ("metadata", {"a": 1}, None),
            ("metadata", {"a": None}, None),
            ("metadata", [], None),
            ("metadata", {"a": "b" * 20_000}, None),
            ("metadata", {"a": "\ud800"}, None),
            ("dtype", {}, None),
            ("dtype", {"span_weights": "float32"}, None),
            ("dtype", {"latent": "float32"}, "header"),
            ("dtype", {**DESCRIPTION["dtype"], "more": "float32"}, None),
            ("dtype", {**DESCRIPTION["dtype"], "latent": "float31"}, "dtype.latent"),
            ("dtype", {**DESCRIPTION["dtype"], "latent": ["float32"]}, "dtype.latent"),
            ("dtype", {**DESCRIPTION["dtype"], "latent": "bfloat16"}, "header.latent.dtype"),
            ("dtype", {**DESCRIPTION["dtype"], "latent": "int8"}, "header"),
            ("dtype", {**DESCRIPTION["dtype"], "span_weights": "int8"}, "dtype.span_weights"),
            ("dtype", "float32", None),
            ("more", 1, "description"),
        ]
    },
    **{f"without {field}": (edited(DATA, field=dropping(field)), "description") for field in DESCRIPTION},
    "a width without a latent": (edited(SUMMARY, field=setting("width", 8)), "width"),
    "a NaN in the description": (
        edited(DATA, entry=in_header("__metadata__", "lcf_fast", json.dumps({**DESCRIPTION, "spans": float("nan")}))),
        "description",
    ),
    "an infinite number": (
        edited(DATA, entry=in_header("__metadata__", "lcf_fast", json.dumps(DESCRIPTION).replace(": 3", ": 1e999"))),
        "spans",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_not_read(name: str) -> None:
    data, argument = HOSTILE[name]
    for form in (data, bytearray(data)):
        with pytest.raises(MessageError) as caught:
            Message.from_bytes(form)
        error = caught.value
        assert error.argument.startswith(f"message.{argument}"), str(error)
        assert str(error).isascii()
        assert len(str(error)) < 400


def test_the_bytes_that_the_hostile_ones_are_made_of_are_read() -> None:
    for data in (DATA, SMALL, SUMMARY, resigned(DATA), with_header(DATA, TEXT), edited(DATA), edited(SMALL)):
        Message.from_bytes(data)


def test_deep_json_is_refused_however_deep_the_caller_is() -> None:
    def below(depth: int) -> None:
        if depth:
            return below(depth - 1)
        for count in (3, 30, 300, 3000):
            for text in ("[" * count + "]" * count, '{"a":' * count + "1" + "}" * count):
                for data in (edited(DATA, entry=in_header("__metadata__", "lcf_fast", text)), with_header(DATA, text)):
                    with pytest.raises(MessageError):
                        Message.from_bytes(data)
                with pytest.raises(MessageError):
                    Message.from_bytes(with_header(DATA, TEXT[:-1] + f',"more":{text}' + "}"))
        return None

    below(0)
    below(500)


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "float16", "float64", "int8", "fp8"])
def test_numbers_that_are_none_are_not_read(storage: str) -> None:
    """NaN and infinity in every tensor and scale, wherever they lie; int8's -128; scales below zero or too large."""
    message = make_message(width=33, batch=2)
    data = message.to_bytes(dtype=storage, contents=EVERYTHING)
    header, _, payload = header_of(data)
    bad: dict[str, list[bytes]] = {
        "F64": [b"\0\0\0\0\0\0\xf0\x7f", b"\0\0\0\0\0\0\xf0\xff", b"\1\0\0\0\0\0\xf0\x7f", b"\0\0\0\0\0\0\xf8\xff"],
        "F32": [b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\1\0\x80\x7f", b"\0\0\xc0\xff"],
        "F16": [b"\0\x7c", b"\0\xfc", b"\1\x7c", b"\0\xfe"],
        "BF16": [b"\x80\x7f", b"\x80\xff", b"\x81\x7f", b"\xc0\xff"],
        "F8_E4M3": [b"\x7f", b"\xff"],
        "I8": [b"\x80"],
    }
    scale = [*bad["F32"], b"\0\0\x80\xbf", b"\xff\xff\x7f\x7f"]  # -1 and float32's largest, which overflows
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        for number in scale if name.endswith("_scale") else bad[entry["dtype"]]:
            for at in (begin, begin + (end - begin) // len(number) // 2 * len(number), end - len(number)):
                with pytest.raises(MessageError) as caught:
                    Message.from_bytes(edited(data, payload=payload[:at] + number + payload[at + len(number) :]))
                assert caught.value.argument in (f"message.{name}", f"message.{name.removesuffix('_scale')}")
    begin, end = header["span_weights"]["data_offsets"]
    code = header["span_weights"]["dtype"]
    for value in (-0.01, 1.01, 2.0):
        dtype = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[code]
        number = bytes(torch.tensor([value], dtype=dtype).view(torch.uint8).tolist())
        with pytest.raises(MessageError, match="span_weights"):
            Message.from_bytes(edited(data, payload=payload[:begin] + number + payload[begin + len(number) :]))


@pytest.mark.parametrize(
    "data", ["text", 5, None, [1, 2], memoryview(bytes(200))[::2]], ids=["text", "int", "none", "list", "strided"]
)
def test_data_without_a_buffer_is_refused(data: Any) -> None:
    with pytest.raises(DTypeError, match="data: expected bytes"):
        Message.from_bytes(data)


def test_max_bytes() -> None:
    assert_same(Message.from_bytes(SMALL, max_bytes=len(SMALL)), Message.from_bytes(SMALL))
    with pytest.raises(MessageError, match="max_bytes"):
        Message.from_bytes(SMALL, max_bytes=len(SMALL) - 1)
    with pytest.raises(MessageError, match=r"67108864 bytes \(max_bytes\), got 67108865"):  # 64 MiB unless told
        Message.from_bytes(put(SMALL, 16, (1 << 26) + 1, 8))
    with pytest.raises(DTypeError, match="max_bytes"):
        Message.from_bytes(SMALL, max_bytes=1e9)  # type: ignore[arg-type]


def test_keys() -> None:
    message = make_message()
    data = message.to_bytes(key=KEY)
    assert_same(Message.from_bytes(data, key=KEY), message, ("latent",))
    for given_key, argument in ((None, "message.key"), (KEY + b"!", "message.digest"), (KEY[:-1], "message.digest")):
        with pytest.raises(MessageError) as caught:
            Message.from_bytes(data, key=given_key)
        assert caught.value.argument == argument
    # Taking the mark of the key off and signing as anyone can does not get past a reader with a key.
    stripped = resigned(put(data, 12, 0, 4))
    assert_same(Message.from_bytes(stripped), message, ("latent",))
    with pytest.raises(MessageError, match="written with a key"):
        Message.from_bytes(stripped, key=KEY)
    for bad in (b"", b"k" * 65):
        with pytest.raises(MessageError, match="key"):
            Message.from_bytes(data, key=bad)
    with pytest.raises(DTypeError, match="key"):
        Message.from_bytes(data, key="text")  # type: ignore[arg-type]


@pytest.mark.parametrize("width", [32, 33, 34])
def test_the_order_of_the_tensors_is_free_as_long_as_they_are_aligned(width: int) -> None:
    """The scales behind their int8 tensor: at byte 5 * 32, or at 5 * 33 or 5 * 34, which are no multiples of 4."""
    message = make_message(width=width)
    data = message.to_bytes(dtype="int8")
    header, _, payload = header_of(data)
    begin, end = header["latent"]["data_offsets"]
    assert header["latent_scale"]["data_offsets"] == [0, begin]  # as the writer has it

    def turned(header: Any) -> None:
        header["latent"]["data_offsets"] = [0, end - begin]
        header["latent_scale"]["data_offsets"] = [end - begin, end]

    other = edited(data, entry=turned, payload=payload[begin:] + payload[:begin])
    if width == 32:
        assert_same(Message.from_bytes(other), Message.from_bytes(data))
    else:
        with pytest.raises(MessageError, match=r"message\.header\.latent_scale: expected data at a multiple of 4"):
            Message.from_bytes(other)
