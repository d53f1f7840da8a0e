"""Paragraphs, sentences and chat turns of a text, in characters (`lcf_fast.span_text`)."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
from against_reference import EXAMPLES
from hypothesis import given

from lcf_fast import DTypeError, LCFError, SpanError
from lcf_fast.span_text import Bounds, paragraph_bounds, paragraphs_of, sentence_bounds, turn_bounds

#: Text made of what the splitters look at, and some of what they do not.
TEXTS = st.lists(
    st.sampled_from(
        [
            ".",
            "...",
            "…",
            "?",
            "!",
            "。",
            "！",
            '"',
            "”",
            ")",
            "(",
            "*",
            "Dr",
            "e.g",
            "A",
            "7",
            "etc",
            "word",
            "Word",
            "é",
        ]
        + [" ", " ", "\n", "\n\n", "\r\n", "\r", "\t", "\u2028", "\u2029", "\u3000", "😀"]
    ),
    max_size=25,
).map("".join)


def pieces(text: str, bounds: Bounds) -> list[str]:
    return [text[start:stop] for start, stop in bounds]


@EXAMPLES
@given(TEXTS | st.text(max_size=40))
def test_units_tile_the_text(text: str) -> None:
    for split in (paragraph_bounds, sentence_bounds):
        bounds = split(text)
        assert "".join(pieces(text, bounds)) == text
        assert all(start < stop for start, stop in bounds)
        for start, _ in bounds[1:]:
            assert not text[start].isspace(), "a unit after the first begins with white space"
    # A sentence never reaches over a blank line.
    assert {start for start, _ in paragraph_bounds(text)} <= {start for start, _ in sentence_bounds(text)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \n\n ", [" \n\n "]),
        ("one line", ["one line"]),
        ("a\nb\n\nc", ["a\nb\n\n", "c"]),
        ("a\n \t\n\n  c\n", ["a\n \t\n\n  ", "c\n"]),
        ("\n\n a\n\nb\n\n", ["\n\n a\n\n", "b\n\n"]),
        ("a\r\nb\r\n\r\nc", ["a\r\nb\r\n\r\n", "c"]),
        ("a\rb\r\rc", ["a\rb\r\r", "c"]),
        ("a\n\rb", ["a\n\r", "b"]),
        ("a\u2028b\u2028\u2028c\u2029d", ["a\u2028b\u2028\u2028", "c\u2029", "d"]),
        ("a\n\x0c\nb", ["a\n\x0c\n", "b"]),
        ("a\x85b\x85\x85c", ["a\x85b\x85\x85", "c"]),
    ],
)
def test_paragraphs(text: str, expected: list[str]) -> None:
    assert pieces(text, paragraph_bounds(text)) == expected
    assert paragraphs_of(text) == tuple(filter(None, map(str.strip, expected)))


@pytest.mark.parametrize(
    "text",
    [
        # One line each; `|` marks where the next sentence begins.
        "He left. |She came! |Why? |Nobody knows… |The end",
        "What?! |No way!!! |Oh",
        "a line\nbreak alone. |And one\nafter. |x",
        "no full stop\n\n|But a blank line",
        "all small. |how are you? |fine",
        "Pi is 3.14 and e is 2.72. |So?",
        "See https://a.example/b.c?d=e or www.b.example. |Then go on.",
        "Version v1.2.3. |Next",
        "Dr. Who met Mr. X and Prof. Zed. |They talked.",
        "Some, e.g. these, i.e. two, cf. above vs. Below. |Done.",
        "J. R. R. Tolkien and W. H. Auden wrote. |The U.S. Army did not. |End",
        "Messrs. A and B met, a misapprox. |'Mr. C too.",
        "Pears, etc. 5 of them, etc. |(They were ripe, etc. (or so). |Made by Apple Inc. |'Why?",
        "Apples, pears, etc. were sold. |Made by Apple Inc. |They sold.",
        "At 5 p.m. we met. |It was 5 p.m. |Then we left.",
        "See Fig. 3 and No. 5 on p. 7. |No. |I will not.",
        "On Jan. 5 it snowed. |It took 5 ms. |Good.",
        "DON'T. |Go.",
        "1. First.\n|2. Second\n3. Third. |In 1995. |Then",
        "Two.\n |12. Twelfth. |Born in\n1995. |Died in 12. |x",
        '"Stop!" he said. |"Go." |(Now.) |He went.',
        '"Really?" |"Yes."',
        "Well... maybe. |Well... |Maybe… or not",
        "Well.. maybe.... (or so?.. |Well.. |Not",
        "Wait . . . |what . |Then ? |Yes .",
        "**Bold.** |_Next._ |Last",
        "你好。|世界！|“真的？”|他问。」|完",
        "日本語。 |English. |日本｡|語!？|日",
        "‹Ja.› |«Non.» |Oui",
        "हाँ। |नहीं॥ |हाँ",
        "لماذا؟ |لا أعرف. |ہاں۔ |x",
        "A dot at the end of a file.txt is none. |x",
        "Trailing white space. ",
        "…",
        ". |x",
    ],
)
def test_sentences(text: str) -> None:
    plain = text.replace("|", "")
    assert pieces(plain, sentence_bounds(plain)) == text.split("|")


def test_long_texts_take_time_in_proportion() -> None:
    """A word, a run of stops or of white space without end: nothing that is quadratic comes to its end here."""
    size = 200_000
    for text in (
        "." * size,
        "a." * size,
        ". " * size,
        "\n" * size,
        "a" * size + ". B",
        "(" * size + ". (" + "(" * size,
    ):
        for split in (paragraph_bounds, sentence_bounds):
            assert split(text)[-1][1] == len(text)


CHATML = "<|im_start|>{role}\n{content}<|im_end|>\n"
LLAMA3 = "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>"
PLAIN = "[INST] {content} [/INST]"
GEMMA = "<start_of_turn>turn\n{content}<end_of_turn>\n"


@pytest.mark.parametrize("template", [CHATML, LLAMA3, PLAIN, GEMMA])
@pytest.mark.parametrize("trims", [False, True])
def test_turns_of_a_template(template: str, trims: bool) -> None:
    contents = ["Be brief.", "  hi there ", "hello\n\nhello", "hi there"]
    messages = [
        {"role": role, "content": content}
        for role, content in zip(["system", "user", "assistant", "user"], contents, strict=True)
    ]
    shown = [content.strip() if trims else content for content in contents]
    rendered = "".join(template.format(role=m["role"], content=c) for m, c in zip(messages, shown, strict=True))
    bounds = turn_bounds(rendered, messages)
    # Around a trimmed content white space of the template's may count to it: it cannot be told apart.
    found = pieces(rendered, bounds)
    assert [text.strip() for text in found] == [content.strip() for content in contents]
    if not trims:
        assert found == contents
    assert bounds == sorted(bounds)


@pytest.mark.parametrize("template", [CHATML, LLAMA3, "{role}: [TEXT] {content}\n"])
def test_contents_that_the_template_holds_too(template: str) -> None:
    """A user who writes "user", or a piece of a special token: the content is meant, not the template."""
    messages = [
        {"role": "system", "content": "system"},
        {"role": "user", "content": "im"},
        {"role": "assistant", "content": "start"},
        {"role": "user", "content": "user: user"},
        {"role": "assistant", "content": "<|x|>"},
        {"role": "user", "content": "e"},
    ]
    expected, rendered = [], ""
    for message in messages:
        whole = template.format(**message)
        at = len(rendered) + len(template.split("{content}")[0].format(role=message["role"]))
        expected.append((at, at + len(message["content"])))
        rendered += whole
    assert turn_bounds(rendered, messages) == expected


def test_turns_without_text_in_parts_and_as_plain_strings() -> None:
    rendered = "<a>one<img>two<b>three"
    parts = [{"type": "text", "text": "one"}, {"type": "image"}, "two"]
    messages: list[Any] = [{"content": parts}, {"role": "tool", "content": None}, {"content": " "}, "three"]
    bounds = turn_bounds(rendered, messages)
    assert pieces(rendered, bounds) == ["one<img>two", "", "", "three"]
    assert bounds == sorted(bounds)
    assert turn_bounds("a b", ["a", " ", "b"]) == [(0, 1), (1, 1), (2, 3)]
    assert turn_bounds("", []) == []


def test_a_turn_is_found_behind_the_one_before() -> None:
    assert turn_bounds("a b", ["a ", " b"]) == [(0, 2), (2, 3)]  # the space is not in both
    # A role that the template does not name; one that it names again before a later message of the same text.
    assert turn_bounds("abcd d", ["abcd", {"role": "tool", "content": "d"}]) == [(0, 4), (5, 6)]
    messages = [{"role": "user", "content": ["a", "b"]}, {"role": "user", "content": "b"}]
    assert turn_bounds("user: a b user: b", messages) == [(6, 9), (16, 17)]


def test_a_content_that_is_missing_or_out_of_order() -> None:
    messages = [{"role": "user", "content": "first"}, {"role": "assistant", "content": "second" * 20}]
    with pytest.raises(SpanError, match=r"messages\[1\].*none: 'secondsecond.*\.\.\.'") as raised:
        turn_bounds("user: first", messages)
    assert raised.value.argument == "messages[1]"
    with pytest.raises(SpanError, match=r"messages\[1\]"):
        turn_bounds("b a", ["a", "b"])
    with pytest.raises(SpanError, match=r"messages\[1\]"):
        turn_bounds("ab", ["ab", "b"])  # within the one before


@pytest.mark.parametrize(
    "call",
    [
        lambda: paragraph_bounds(b"text"),  # type: ignore[arg-type]
        lambda: sentence_bounds(None),  # type: ignore[arg-type]
        lambda: turn_bounds(["a"], ["a"]),  # type: ignore[arg-type]
        lambda: turn_bounds("a", "a"),
        lambda: turn_bounds("a", [3]),
        lambda: turn_bounds("a", [{"content": [3]}]),
        lambda: turn_bounds("a", [{"content": [{"text": 3}]}]),
        lambda: turn_bounds("a", [{"role": 3, "content": "a"}]),
    ],
)
def test_other_types_are_refused(call: Any) -> None:
    with pytest.raises(DTypeError) as raised:
        call()
    assert isinstance(raised.value, LCFError) and raised.value.expected
