"""From a text's units to tokens by an offset mapping: by hand, and with real tokenizers made here in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from against_reference import EXAMPLES
from hypothesis import given

from lcf_fast import DTypeError, LCFError, ShapeError, SpanError
from lcf_fast.span_text import Bounds
from lcf_fast.spans import (
    from_characters,
    paragraph_bounds,
    paragraphs,
    sentence_bounds,
    sentences,
    turn_bounds,
    turns,
)

TEXT = "One. Two\n\nThree"
#        0123 4567 8 9 10
TOKENS = [(0, 0), (0, 3), (3, 4), (4, 8), (8, 10), (10, 15), (0, 0)]  # [BOS] One . ␣Two ↵↵ Three [EOS]


# --- by hand
# ---------------------------------------------------------------------------------------------------------


def test_units_by_hand() -> None:
    assert paragraphs(TEXT, TOKENS).bounds() == [[(1, 5), (5, 6)]]
    # " Two" begins with white space of the first sentence; its first character that is not white decides.
    assert sentences(TEXT, TOKENS).bounds() == [[(1, 3), (3, 5), (5, 6)]]
    assert sentences(TEXT, TOKENS).is_span is None


@pytest.mark.parametrize(
    "mapping",
    [
        [TOKENS],
        torch.tensor(TOKENS),
        torch.tensor([TOKENS], dtype=torch.int32),
        np.array([TOKENS]),
        [torch.tensor(TOKENS)],
        [[list(pair) for pair in TOKENS]],
    ],
)
def test_a_mapping_in_every_form(mapping: Any) -> None:
    assert paragraphs([TEXT], mapping).bounds() == paragraphs(TEXT, mapping).bounds() == [[(1, 5), (5, 6)]]


@pytest.mark.parametrize(
    ("mapping", "expected"),
    [
        # "\n\nThree" is one token: it belongs to what its text belongs to.
        ([(0, 8), (8, 15)], [(0, 1), (1, 2)]),
        # ".\n\n" the other way round: "Two\n\n" is one token.
        ([(0, 3), (3, 5), (5, 10), (10, 15)], [(0, 3), (3, 4)]),
        # One that has text of both is the first's.
        ([(0, 4), (5, 12), (12, 15)], [(0, 2), (2, 3)]),
        # No token at all in the second.
        ([(0, 4), (5, 15)], [(0, 2)]),
        # White space of its own, token by token.
        ([(0, 8), (8, 9), (9, 10), (10, 15)], [(0, 3), (3, 4)]),
    ],
)
def test_tokens_on_a_boundary(mapping: list[tuple[int, int]], expected: list[tuple[int, int]]) -> None:
    assert paragraphs(TEXT, mapping).bounds() == [expected]


def test_white_space_before_the_first_and_behind_the_last() -> None:
    text = "\n\n a\n\nb\n"
    mapping = [(0, 2), (2, 3), (3, 4), (4, 6), (6, 7), (7, 8)]
    assert paragraphs(text, mapping).bounds() == [[(0, 4), (4, 6)]]
    assert paragraphs("  \n\n ", [(0, 2), (2, 4), (4, 5)]).bounds() == [[(0, 3)]]


def test_special_tokens_and_padding() -> None:
    """In no span but between two tokens of one; so a gap between spans, not before or after them."""
    text = "a b\n\nc"
    mapping = [(0, 0), (0, 1), (0, 0), (1, 3), (3, 5), (0, 0), (5, 6), (0, 0)]
    spans = paragraphs(text, mapping)
    assert spans.bounds() == [[(1, 5), (6, 7)]]
    assert spans.to_mask(8).int().tolist() == [[[0, 1, 1, 1, 1, 0, 1, 0]]]
    # Padding with characters of its own (here beyond the text) is hidden by the mask.
    padded = [(99, 99), (3, 99), (0, 1), (1, 3), (3, 5), (5, 6)]
    assert paragraphs(text, [padded], torch.tensor([[0, 0, 1, 1, 1, 1]])).bounds() == [[(2, 5), (5, 6)]]


def test_trimmed_offsets() -> None:
    """A token of white space alone then has no characters; it belongs to the unit before all the same."""
    mapping = [(0, 0), (0, 1), (1, 2), (3, 3), (4, 5), (5, 6), (7, 7), (0, 0)]  # [BOS] a . ␣ ␣b . ␣ [EOS]
    assert sentences("a.  b. ", mapping).bounds() == [[(1, 4), (4, 7)]]
    assert sentences(" a.", [(1, 1), (1, 2), (2, 3)]).bounds() == [[(0, 3)]]
    # Where no white space lies before it, it is a special token.
    assert sentences("a. b", [(0, 1), (1, 2), (2, 2), (3, 4), (4, 4)]).bounds() == [[(0, 2), (3, 4)]]


def test_characters_of_several_tokens_and_tokens_within_white_space() -> None:
    # Bytes of one character share its offsets.
    assert sentences("é. 😀😀", [(0, 1), (0, 1), (1, 2), (2, 4), (3, 4), (3, 4), (4, 5), (4, 5)]).bounds() == [
        [(0, 3), (3, 8)]
    ]
    # Tokens that lie in the white space which the one before them begins with: the tokens' order stays.
    nested = [(0, 1), (1, 2), (2, 5), (3, 4), (3, 4), (5, 7)]
    assert sentences("a.  b c", nested).bounds() == [[(0, 2), (2, 6)]]


def test_batches_of_texts_with_different_numbers_of_units() -> None:
    texts = ["a\n\nb\n\nc", "a", ""]
    mapping = torch.tensor(
        [
            [(0, 1), (1, 3), (3, 4), (4, 6), (6, 7)],
            [(0, 0), (0, 0), (0, 0), (0, 0), (0, 1)],
            [(0, 0)] * 5,
        ]
    )
    assert paragraphs(texts, mapping).bounds() == [[(0, 2), (2, 4), (4, 5)], [(4, 5)], []]
    ragged = [[(0, 1), (1, 3), (3, 4), (4, 6), (6, 7)], [(0, 1)], []]
    assert paragraphs(texts, ragged).bounds() == [[(0, 2), (2, 4), (4, 5)], [(0, 1)], []]
    assert paragraphs(texts, ragged, [[1, 1, 1, 0, 0], [1], []]).bounds() == [[(0, 2), (2, 3)], [(0, 1)], []]
    assert paragraphs("", []).bounds() == [[]]
    assert paragraphs([], []).batch == 0
    assert paragraphs(["", ""], [[], []]).bounds() == [[], []]


def test_characters_that_overlap_and_leave_gaps() -> None:
    mapping = [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10)]
    spans = from_characters([[(6, 10), (0, 4), (2, 8), (4, 4)]], mapping)
    assert spans.bounds() == [[(0, 2), (1, 4), (3, 5)]]
    assert spans.tracks == 2
    assert from_characters([[(0, 8), (2, 4)]], mapping).bounds() == [[(0, 4), (1, 2)]]  # one within another
    # Ranges that hold no token's character give nothing, and far ones cost nothing.
    assert from_characters([[(11, 12), (8, 2**31 - 1)]], mapping).bounds() == [[(4, 5)]]
    assert from_characters([[]], mapping).bounds() == [[]]


def test_a_token_that_reaches_out_of_the_ranges_is_not_lost() -> None:
    """A word with the space before it, or with the line break behind it."""
    text = "user: Hello there.\nbye"
    mapping = [(0, 4), (4, 5), (5, 11), (11, 17), (17, 19), (19, 22)]
    content = [[(6, 18)]]
    assert from_characters(content, mapping).bounds() == [[(2, 5)]]
    assert from_characters(content, mapping, texts=text).bounds() == [[(2, 5)]]
    # Of a range that holds its space alone, it counts by that.
    assert from_characters([[(4, 6)]], mapping, texts=text).bounds() == [[(1, 3)]]
    # Side by side no token is in both, with the text by its first character that is not white space.
    halves = [[(0, 6), (6, 22)]]
    assert from_characters(halves, mapping).bounds() == [[(0, 3), (3, 6)]]
    assert from_characters(halves, mapping, texts=[text]).bounds() == [[(0, 2), (2, 6)]]


def expected_bounds(
    text: str, mapping: Sequence[tuple[int, int]], mask: Sequence[int], units: Bounds
) -> list[tuple[int, int]]:
    """By the definition: a token's unit is that of its first visible character, else of its first."""
    tokens: dict[int, list[int]] = {}
    for token, ((start, stop), real) in enumerate(zip(mapping, mask, strict=True)):
        characters = range(start - (0 < start == stop), stop)  # trimmed white space has no characters of its own
        if real and len(characters):
            anchor = next((at for at in characters if not text[at].isspace()), characters[0])
            unit = next(number for number, (a, b) in enumerate(units) if a <= anchor < b)
            tokens.setdefault(unit, []).append(token)
    return sorted((held[0], held[-1] + 1) for held in tokens.values())


@st.composite
def tokenized(draw: st.DrawFn) -> tuple[str, list[tuple[int, int]], list[bool]]:
    """A text, tokens that tile it (some characters twice, as bytes), special tokens anywhere, and padding."""
    text = draw(st.text(alphabet="ab. \n!。", max_size=24))
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(text) - 1)), max_size=12)))
    edges = [0, *(cut for cut in cuts if cut < len(text)), len(text)]
    mapping = [(a, b) for a, b in zip(edges, edges[1:]) if a < b]
    mapping = [pair for pair in mapping for _ in range(draw(st.integers(1, 2)) if pair[1] - pair[0] == 1 else 1)]
    for _ in range(draw(st.integers(0, 3))):
        mapping.insert(draw(st.integers(0, len(mapping))), (0, 0))
    left, right = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    mask = [False] * left + [True] * len(mapping) + [False] * right
    return text, [(0, 1)] * left + mapping + [(0, 1)] * right, mask


@EXAMPLES
@given(tokenized(), st.booleans())
def test_every_token_is_in_the_span_of_its_first_visible_character(
    drawn: tuple[str, list[tuple[int, int]], list[bool]], by_sentence: bool
) -> None:
    text, mapping, mask = drawn
    units = (sentence_bounds if by_sentence else paragraph_bounds)(text)
    spans = (sentences if by_sentence else paragraphs)([text], [mapping], [mask])
    assert spans.tracks == 1
    assert spans.bounds() == [expected_bounds(text, mapping, mask, units)]
    inside = spans.to_mask(len(mapping))[0, 0].tolist()
    for token, (start, stop) in enumerate(mapping):
        assert inside[token] or start == stop or not mask[token], "a token of the text that is in no span"


# --- with tokenizers
# ---------------------------------------------------------------------------------------------------------

CORPUS = [
    "One two three. Four five!\n\nSix seven.\nEight.  Nine, é😀 漢字。完\r\n\r\nTen eleven twelve.",
    "user assistant system",
]


@pytest.fixture(scope="module", params=["bytes", "bytes trimmed", "metaspace"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    """BPE over bytes (a character may be several tokens) or over characters, with special tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    made = tokenizers.Tokenizer(models.BPE(unk_token=None))
    if request.param == "metaspace":
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        made.decoder = decoders.Metaspace()
        alphabet = sorted({*"".join(CORPUS), "▁"})
    else:
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    framed = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    if request.param == "metaspace":
        made.post_processor = framed
    else:
        trimmed = processors.ByteLevel(add_prefix_space=False, trim_offsets=request.param == "bytes trimmed")
        made.post_processor = processors.Sequence([trimmed, framed])
    return made


TEXTS = [
    "One two. Three four!\n\nFive é😀. Six\r\n\r\n  漢字。完 seven.\n",
    "\n\nOne.",
    "",
    "Eight.  Nine\n \n\n😀😀 Ten! é. Eleven",
    " \n ",
]


@pytest.mark.parametrize("side", ["left", "right", None])
@pytest.mark.parametrize("split", [paragraphs, sentences])
def test_real_offset_mappings(tokenizer: Any, side: str | None, split: Any) -> None:
    if side is None:
        tokenizer.no_padding()
    else:
        tokenizer.enable_padding(direction=side, pad_id=0, pad_token="<pad>")
    encoded = tokenizer.encode_batch(TEXTS)
    mapping = [encoding.offsets for encoding in encoded]
    mask = [encoding.attention_mask for encoding in encoded]
    spans = split(
        TEXTS, mapping if side is None else torch.tensor(mapping), None if side is None else torch.tensor(mask)
    )
    units = [(paragraph_bounds if split is paragraphs else sentence_bounds)(text) for text in TEXTS]
    for i, (encoding, bounds) in enumerate(zip(encoded, spans.bounds(), strict=True)):
        assert bounds == expected_bounds(TEXTS[i], encoding.offsets, encoding.attention_mask, units[i])
        assert all(before[1] <= after[0] for before, after in zip(bounds, bounds[1:]))
        for token, special in enumerate(encoding.special_tokens_mask):
            held = [bound for bound in bounds if bound[0] <= token < bound[1]]
            assert len(held) == 1 - special, f"{encoding.tokens[token]!r} of text {i} is in {len(held)} spans"


def test_turns_of_a_rendered_chat(tokenizer: Any) -> None:
    """The two ways to turns agree on where they begin; by characters the template is left out."""
    tokenizer.no_padding()
    messages = [
        {"role": "system", "content": "One two."},
        {"role": "user", "content": "user é😀 three\n\nfour!"},
        {"role": "assistant", "content": "Five."},
    ]
    rendered = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    encoding = tokenizer.encode(rendered, add_special_tokens=False)
    by_ids = turns(encoding.ids, tokenizer.token_to_id("<|im_start|>")).bounds()[0]
    by_text = from_characters([turn_bounds(rendered, messages)], encoding.offsets, texts=rendered).bounds()[0]
    assert len(by_ids) == len(by_text) == 3
    assert (by_ids[0][0], by_ids[-1][1]) == (0, len(encoding.ids))
    for message, (start, stop), (first, last) in zip(messages, by_ids, by_text, strict=True):
        assert start < first < last < stop
        assert encoding.tokens[start] == "<|im_start|>"
        said = rendered[encoding.offsets[first][0] : encoding.offsets[last - 1][1]]
        assert said.strip() == message["content"]


# --- what is refused
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "argument", "call"),
    [
        (DTypeError, "texts", lambda: paragraphs(3, [TOKENS])),
        (DTypeError, "texts[1]", lambda: paragraphs(["a", b"b"], [TOKENS, TOKENS])),
        (ShapeError, "offset_mapping", lambda: paragraphs([TEXT, TEXT], [TOKENS])),
        (ShapeError, "offset_mapping", lambda: paragraphs([TEXT, TEXT], TOKENS)),
        (ShapeError, "offset_mapping", lambda: paragraphs(TEXT, torch.tensor(TOKENS)[:, 0])),
        (ShapeError, "offset_mapping[0]", lambda: paragraphs(TEXT, torch.ones(1, 3, 3, dtype=torch.int64))),
        (ShapeError, "offset_mapping[0]", lambda: paragraphs(TEXT, [[(0, 3), (3,)]])),
        (DTypeError, "offset_mapping[0]", lambda: paragraphs(TEXT, torch.tensor([TOKENS]).float())),
        (DTypeError, "offset_mapping[0]", lambda: paragraphs(TEXT, [[(0, 3), (None, 4)]])),
        (ShapeError, "offset_mapping", lambda: paragraphs(TEXT, [0, 3])),
        (DTypeError, "offset_mapping", lambda: paragraphs(TEXT, None)),
        (SpanError, "offset_mapping[0]", lambda: paragraphs(TEXT, [(0, 3), (5, 4)])),
        (SpanError, "offset_mapping[0]", lambda: paragraphs(TEXT, [(-2, 3)])),
        (SpanError, "offset_mapping[0]", lambda: paragraphs(TEXT, [(0, 3), (3, 16)])),
        (
            SpanError,
            "offset_mapping[1]",
            lambda: paragraphs(["a", "a b"], [[(0, 1)], [(0, 1), (2, 3), (0, 0), (0, 1)]]),
        ),
        (ShapeError, "attention_mask", lambda: paragraphs(TEXT, TOKENS, torch.ones(2, 7))),
        (ShapeError, "attention_mask[0]", lambda: paragraphs(TEXT, TOKENS, torch.ones(1, 6))),
        (DTypeError, "attention_mask[0]", lambda: paragraphs(TEXT, TOKENS, [["a"] * 7])),
        (DTypeError, "bounds", lambda: from_characters(None, TOKENS)),
        (DTypeError, "bounds[0]", lambda: from_characters([3], TOKENS)),
        (ShapeError, "bounds[0]", lambda: from_characters([(0, 3)], TOKENS)),
        (SpanError, "bounds[0][0]", lambda: from_characters([[(4, 3)]], TOKENS)),
        (SpanError, "bounds[0]", lambda: from_characters([[(4, 16)]], TOKENS, texts=TEXT)),
        (ShapeError, "texts", lambda: from_characters([[(0, 3)]], TOKENS, texts=[TEXT, TEXT])),
    ],
)
def test_bad_input(error: type[LCFError], argument: str, call: Any) -> None:
    with pytest.raises(error) as raised:
        call()
    assert raised.value.argument == argument
    assert type(raised.value) is error
