"""From examples to tokens, with tokenizers made on the spot."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from tiny_tokenizers import CHATML, CHATML_SYSTEM, INST, tiny_tokenizer

from lcf_fast.reading.chat import ChatReader
from lcf_fast.reading.data_errors import AlignmentError, DataError, TokenizerError, TooLongError
from lcf_fast.span_text import turn_bounds
from lcf_fast.training.data import CrossExample, SharedExample
from lcf_fast.training.tokenizing import ExampleTokenizer, TokenizedExample

pytest.importorskip("tokenizers")
pytest.importorskip("transformers")

#: The receiver's tokenizer, and sharers' whose renderings or tokens differ from its.
RECEIVER = tiny_tokenizer("bytes", template=CHATML)
SHARERS = {
    "single bytes, [INST]": tiny_tokenizer("bytes", template=INST, merges=False),
    "metaspace, [INST]": tiny_tokenizer("metaspace", template=INST),
    "metaspace, ChatML with a system's turn": tiny_tokenizer("metaspace", template=CHATML_SYSTEM),
    "characters, ChatML with a system's turn": tiny_tokenizer("characters", template=CHATML_SYSTEM),
    "characters, plain": tiny_tokenizer("characters", template=None, bos=True),
}
CHAT = (
    ("system", "Be brief."),
    ("user", "  What is the capital of é😀? "),
    ("assistant", "Paris."),
    ("user", "user"),
    ("assistant", " One two.\n"),
)


def shared(*messages: tuple[str, str]) -> SharedExample:
    return SharedExample("chat", messages or CHAT)


def chat(messages: Any) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in messages]


def by_template(tokenizer: Any, messages: Any) -> list[int]:
    """As a user would make them to generate from."""
    ids: list[int] = tokenizer.apply_chat_template(chat(messages), add_generation_prompt=True)["input_ids"]
    return ids


# --- shared context, the same tokens
# ---------------------------------------------------------------------------------------------------------


def test_the_same_tokenizer_reads_the_same_tokens() -> None:
    for other in (RECEIVER, tiny_tokenizer("bytes", template=CHATML), tiny_tokenizer("bytes", template=CHATML_SYSTEM)):
        made = ExampleTokenizer(other, RECEIVER)(shared(("user", "What is"), ("assistant", "One")))
        assert made.prompt == by_template(RECEIVER, [("user", "What is")])
        assert made.sharer == made.prompt
        assert made.aligned is None
        assert made.spans is None


def test_the_response_is_the_last_message_as_it_stands_and_the_end_token() -> None:
    made = ExampleTokenizer(RECEIVER, RECEIVER)(shared())
    assert made.response[-1] == RECEIVER.eos_token_id
    assert RECEIVER.decode(made.response[:-1]) == " One two.\n"
    ending = ExampleTokenizer(RECEIVER, RECEIVER, end_id=2)(shared())
    assert ending.response == [*made.response[:-1], 2]


def test_prompt_and_response_are_what_the_template_makes_of_the_whole_chat() -> None:
    made = ExampleTokenizer(RECEIVER, RECEIVER)(shared())
    whole = RECEIVER.apply_chat_template(chat(CHAT))["input_ids"]
    assert made.prompt + made.response == whole[: len(made.prompt) + len(made.response)]
    assert RECEIVER.decode(whole[len(made.prompt) + len(made.response) :]) == "\n"


def test_options_reach_the_template() -> None:
    plain = ExampleTokenizer(RECEIVER, RECEIVER)(shared())
    made = ExampleTokenizer(RECEIVER, RECEIVER, template_options={"thinking": False})(shared())
    assert RECEIVER.decode(made.prompt) == RECEIVER.decode(plain.prompt) + "<think>\n\n</think>\n\n"


def test_without_a_template() -> None:
    tokenizer = tiny_tokenizer("bytes", template=None)
    made = ExampleTokenizer(tokenizer, tokenizer)(shared(("system", "Be."), ("user", "What is"), ("assistant", "One")))
    assert tokenizer.decode(made.prompt) == "system\nBe.\n\nuser\nWhat is\n\nassistant\n"
    begun = tiny_tokenizer("bytes", template=None, bos=True)
    assert ExampleTokenizer(begun, begun)(shared()).prompt[:2] == [1, made.prompt[0]]
    # A template writes that token itself.
    begun.chat_template = INST
    assert ExampleTokenizer(begun, begun)(shared()).prompt[:2] == [1, begun.convert_tokens_to_ids("[INST]")]


# --- shared context, other tokens
# ---------------------------------------------------------------------------------------------------------


def content_of(tokenizer: Any, text: str, ids: list[int], messages: Any) -> list[tuple[int, str] | None]:
    """Of each token the last character of a trimmed content in it: which, counted over all contents, and itself."""
    reader = ChatReader("tokenizer", tokenizer)
    found, offsets = reader.prompt(text)
    assert found == ids
    assert offsets is not None
    number: dict[int, int] = {}
    for (_, content), (start, stop) in zip(messages, reader.content_bounds(messages, text)):
        assert text[start:stop].strip() == content.strip()
        at = start + len(text[start:stop]) - len(text[start:stop].lstrip())
        number |= {at + i: len(number) + i for i in range(len(content.strip()))}
    inside = [[at for at in range(start, stop) if at in number] for start, stop in offsets]
    return [(number[held[-1]], text[held[-1]]) if held else None for held in inside]


def check_alignment(sharer: Any, made: TokenizedExample, messages: Any) -> None:
    """Each of the receiver's tokens stands with the first of the sharer's that has read all of its content."""
    assert made.aligned is not None
    assert len(made.aligned) == len(made.prompt)
    mine_text = RECEIVER.apply_chat_template(chat(messages), tokenize=False, add_generation_prompt=True)
    theirs_text = ChatReader("sharer", sharer).render(messages)
    mine = content_of(RECEIVER, mine_text, made.prompt, messages)
    theirs = content_of(sharer, theirs_text, made.sharer, messages)
    for own, row in zip(mine, made.aligned):
        if own is None:
            assert row == -1 or theirs[row] is None  # outer white space that both kept
            continue
        read = theirs[row]
        assert row >= 0
        assert read is not None
        assert read[0] >= own[0]
        before = [each for each in theirs[:row] if each is not None]
        assert not before or before[-1][0] <= own[0]
        if read[0] == own[0]:
            assert read[1] == own[1]


@pytest.mark.parametrize("name", SHARERS)
def test_the_sharer_reads_its_own_rendering_and_contents_align(name: str) -> None:
    sharer = SHARERS[name]
    made = ExampleTokenizer(sharer, RECEIVER)(shared(*CHAT[1:]))
    messages = CHAT[1:-1]
    assert made.prompt == by_template(RECEIVER, messages)
    if sharer.chat_template:
        assert made.sharer == by_template(sharer, messages)
    else:
        assert made.sharer[0] == 1
        assert sharer.decode(made.sharer[1:], skip_special_tokens=True).replace(" ", "").startswith("user\n")
    check_alignment(sharer, made, messages)


def test_template_text_aligns_with_nothing_even_where_both_have_it() -> None:
    sharer = SHARERS["characters, ChatML with a system's turn"]
    made = ExampleTokenizer(sharer, RECEIVER)(shared(("user", "capital"), ("assistant", "Paris")))
    tokens = RECEIVER.convert_ids_to_tokens(made.prompt)
    assert made.aligned is not None
    aligned = [(token, row) for token, row in zip(tokens, made.aligned) if row >= 0]
    assert "".join(token for token, _ in aligned) == "capital"
    letters = sharer.convert_ids_to_tokens(made.sharer)
    # Each token with the letter it ends in, and these in the user's turn, not in the system's that the template writes.
    assert [letters[row] for _, row in aligned] == [token[-1] for token, _ in aligned]
    assert "".join(letters[min(made.aligned[i] for i, _ in enumerate(tokens) if made.aligned[i] >= 0) :]).endswith(
        "<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("content", ["u", "user", "helpful", "INST", "You are a helpful user.", "assistant", "\n\ns"])
def test_contents_that_the_template_says_too(content: str) -> None:
    """Searching for them would find the template's own words."""
    for name in ("characters, ChatML with a system's turn", "metaspace, [INST]", "characters, plain"):
        messages = [("user", content), ("assistant", content), ("user", "One " + content)]
        made = ExampleTokenizer(SHARERS[name], RECEIVER)(shared(*messages, ("assistant", "Paris")))
        check_alignment(SHARERS[name], made, messages)
        assert made.aligned is not None
        rows = [row for row in made.aligned if row >= 0]
        assert rows == sorted(rows)
        assert len(set(rows)) >= 3


TEXT = st.text("aé😀 \nuser.<", min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(SHARERS)), st.lists(TEXT, min_size=1, max_size=4), st.one_of(st.none(), TEXT))
def test_any_messages(name: str, contents: list[str], system: str | None) -> None:
    messages = [("user" if i % 2 == 0 else "assistant", content) for i, content in enumerate(contents)]
    messages = messages if system is None else [("system", system), *messages]
    tokenize = ExampleTokenizer(SHARERS[name], RECEIVER)
    if not any(content.strip() for _, content in messages):
        with pytest.raises(AlignmentError):
            tokenize(shared(*messages, ("assistant", "Paris")))
        return
    check_alignment(SHARERS[name], tokenize(shared(*messages, ("assistant", "Paris"))), messages)


def test_a_content_that_a_template_rewrites_is_left_out_of_the_alignment() -> None:
    """As Qwen3's template cuts the thoughts out of earlier answers."""
    template = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
    sharer = tiny_tokenizer("characters", template=template)
    messages = [("user", "What is"), ("assistant", "<think>x</think>Paris"), ("user", "capital")]
    made = ExampleTokenizer(sharer, RECEIVER)(shared(*messages, ("assistant", "One")))
    assert made.aligned is not None
    letters = sharer.convert_ids_to_tokens(made.sharer)
    tokens = RECEIVER.convert_ids_to_tokens(made.prompt)
    seen = "".join(token.replace("Ġ", " ") for token, row in zip(tokens, made.aligned) if row >= 0)
    assert seen == "What iscapital"
    rows = [row for row in made.aligned if row >= 0]
    assert letters[rows[-1]] == "l"
    assert rows == sorted(rows)


def test_nothing_to_align() -> None:
    sharer = tiny_tokenizer("characters", template="{{ 'Who are you?' }}")
    tokenize = ExampleTokenizer(sharer, RECEIVER)
    with pytest.raises(AlignmentError, match=r"example 'chat'.*aligns"):
        tokenize(shared(("user", "One two"), ("assistant", "Paris")))


# --- cross context
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bytes", "trimmed", "metaspace", "characters"])
def test_cross_context(kind: str) -> None:
    sharer = tiny_tokenizer(kind, template=INST, bos=True)
    paragraphs = ("One two.\n\nThree.", "\tFour five! ", "Six")
    example = CrossExample("item", paragraphs, "Ten eleven.\n\nTwelve.", "What is?", "Paris")
    made = ExampleTokenizer(sharer, RECEIVER)(example)
    assert made.sharer[0] == 1  # as its tokenizer begins a text; not in its chat template
    assert made.sharer[1:] == sharer("\n\n".join(paragraphs), add_special_tokens=False)["input_ids"]
    assert made.spans is not None
    assert [bound[0] for bound in made.spans[1:]] == [bound[1] for bound in made.spans[:-1]]
    assert (made.spans[0][0], made.spans[-1][1]) == (1, len(made.sharer))
    for paragraph, (start, stop) in zip(paragraphs, made.spans, strict=True):
        said = sharer.decode(made.sharer[start:stop])
        assert said.replace(" ", "").strip() == paragraph.replace(" ", "").strip() or kind == "characters"
    assert made.prompt == by_template(RECEIVER, [("user", "Ten eleven.\n\nTwelve.\n\nWhat is?")])
    assert made.aligned is None
    assert RECEIVER.decode(made.response) == "Paris<|im_end|>"


def test_a_receiver_without_a_context_of_its_own() -> None:
    example = CrossExample("item", ("One",), " ", "What is?", "Paris")
    assert ExampleTokenizer(RECEIVER, RECEIVER)(example).prompt == by_template(RECEIVER, [("user", "What is?")])


# --- what is refused
# ---------------------------------------------------------------------------------------------------------


def slow(tokenizer: Any) -> Any:
    """The same but without offsets."""

    class Slow:
        is_fast = False
        eos_token_id, bos_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id
        chat_template, apply_chat_template = tokenizer.chat_template, tokenizer.apply_chat_template

        def __call__(self, *arguments: Any, **keywords: Any) -> Any:
            assert "return_offsets_mapping" not in keywords
            return tokenizer(*arguments, **keywords)

    return Slow()


def test_slow_tokenizers_serve_where_no_offsets_are_needed() -> None:
    made = ExampleTokenizer(slow(RECEIVER), RECEIVER)(shared())
    assert (
        made == ExampleTokenizer(RECEIVER, slow(RECEIVER))(shared()) == ExampleTokenizer(RECEIVER, RECEIVER)(shared())
    )
    other = SHARERS["metaspace, [INST]"]
    crossing = CrossExample("item", ("One",), "", "What is?", "Paris")
    for sharer, receiver, example, named in (
        (slow(other), RECEIVER, shared(), "sharer_tokenizer"),
        (other, slow(RECEIVER), shared(), "receiver_tokenizer"),
        (slow(RECEIVER), RECEIVER, crossing, "sharer_tokenizer"),
    ):
        with pytest.raises(TokenizerError, match="fast") as raised:
            ExampleTokenizer(sharer, receiver)(example)
        assert raised.value.argument == named
    assert ExampleTokenizer(RECEIVER, slow(RECEIVER))(crossing).spans == [(0, len(RECEIVER("One")["input_ids"]))]


def test_too_long() -> None:
    made = ExampleTokenizer(RECEIVER, RECEIVER)(shared())
    length = len(made.prompt) + len(made.response)
    assert ExampleTokenizer(RECEIVER, RECEIVER, max_tokens=length)(shared()) == made
    with pytest.raises(
        TooLongError, match=rf"example 'chat': expected {length - 1} tokens at most.*got {length}: prompt"
    ):
        ExampleTokenizer(RECEIVER, RECEIVER, max_tokens=length - 1)(shared())
    crossing = CrossExample("item", ("One two three. " * 20,), "", "What is?", "Paris")
    long = len(ExampleTokenizer(RECEIVER, RECEIVER)(crossing).sharer)
    with pytest.raises(TooLongError, match=rf"example 'item'.*got {long}, which the sharer reads"):
        ExampleTokenizer(RECEIVER, RECEIVER, max_tokens=long - 1)(crossing)


def test_short_prompts_and_templates_that_refuse() -> None:
    bare = tiny_tokenizer("bytes", template="{{ messages[0]['content'] }}")
    with pytest.raises(DataError, match=r"example 'chat': expected a prompt of two tokens or more, got 1"):
        ExampleTokenizer(bare, bare)(shared(("user", "a"), ("assistant", "Paris")))
    refusing = tiny_tokenizer(
        "bytes",
        template="{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system!') }}{% endif %}" + CHATML,
    )
    with pytest.raises(DataError, match=r"example 'chat'.*receiver_tokenizer renders.*No system!"):
        ExampleTokenizer(refusing, refusing)(shared())
    with pytest.raises(DataError, match=r"sharer_tokenizer renders"):
        ExampleTokenizer(tiny_tokenizer("characters", template=refusing.chat_template), RECEIVER)(shared())


def test_tokenizers_that_lack_something() -> None:
    with pytest.raises(TokenizerError, match="eos") as raised:
        ExampleTokenizer(RECEIVER, tiny_tokenizer("bytes", eos_token=None))
    assert raised.value.argument == "receiver_tokenizer"
    assert ExampleTokenizer(RECEIVER, tiny_tokenizer("bytes", eos_token=None), end_id=0).end_id == 0
    for wrong in (None, "Qwen/Qwen3-0.6B", lambda text: text):
        with pytest.raises(TokenizerError, match="AutoTokenizer"):
            ExampleTokenizer(wrong, RECEIVER)


def test_contents_lie_where_turn_bounds_finds_them() -> None:
    """Two ways to the same places, where both can tell."""
    messages = [(role, content.strip()) for role, content in CHAT]
    for tokenizer in (RECEIVER, *SHARERS.values()):
        reader = ChatReader("tokenizer", tokenizer)
        text = reader.render(messages)
        assert reader.content_bounds(messages, text) == turn_bounds(text, chat(messages))


@pytest.mark.parametrize("spans", ["paragraphs", "sentences", "one"])
def test_no_paragraphs_have_no_spans(spans: str) -> None:
    reader = ChatReader("tokenizer", RECEIVER)
    assert reader.paragraphs([], spans=spans) == reader.paragraphs([""], spans=spans) == (reader.text("")[0], [])


def test_contents_lie_where_the_template_has_put_them_and_not_where_it_says_the_same() -> None:
    reader = ChatReader("tokenizer", SHARERS["metaspace, [INST]"])
    messages = [("user", " I "), ("assistant", "S\n")]
    text = reader.render(messages)
    assert text == "<s>[INST] I [/INST] S </s>"
    assert reader.content_bounds(messages, text) == [(10, 11), (20, 21)]
    system = ChatReader("tokenizer", SHARERS["characters, ChatML with a system's turn"])
    messages = [("user", "e"), ("assistant", ""), ("user", "a\n")]
    text = system.render(messages)
    bounds = system.content_bounds(messages, text)
    assert [text[slice(*bound)] for bound in bounds] == ["e", "", "a\n"]
    assert [text[:start].rpartition("<|im_start|>")[2] for start, _ in bounds] == ["user\n", "assistant\n", "user\n"]
