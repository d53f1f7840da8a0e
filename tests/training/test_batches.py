"""Which examples a step reads, and the batches made of them."""

from __future__ import annotations

import random
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from tiny_tokenizers import CHATML_SYSTEM, INST, tiny_tokenizer
from tiny_training import tiny_adapter, tiny_settings

from lcf_fast.errors import IndexRangeError
from lcf_fast.reading.data_errors import DataError, TokenizerError
from lcf_fast.training.batches import Batch, ExampleData, collate
from lcf_fast.training.data import CrossExample, Example, ExampleSet, SharedExample
from lcf_fast.training.tokenizing import TokenizedExample

pytest.importorskip("tokenizers")
pytest.importorskip("transformers")

TOKENIZER = tiny_tokenizer("bytes")
OTHER = tiny_tokenizer("metaspace", template=INST)
WORDS = ["One", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def shared(count: int, *, words: int = 1) -> list[Example]:
    """Examples of lengths that differ."""
    made: list[Example] = []
    for i in range(count):
        asked = " ".join([WORDS[i % 10]] * (words + i % 3))
        made.append(SharedExample(f"e{i}", (("user", asked), ("assistant", WORDS[-i % 10]))))
    return made


def crossing(count: int) -> list[Example]:
    return [CrossExample(f"x{i}", tuple(WORDS[: 1 + i % 4]), WORDS[i % 10], "What?", "Paris") for i in range(count)]


def examples_of(examples: list[Example]) -> ExampleSet:
    return ExampleSet(tuple(examples), (), "cross" if isinstance(examples[0], CrossExample) else "shared")


def data_of(examples: list[Example], *, sharer: Any = TOKENIZER, on_error: Any = "skip", **changes: Any) -> ExampleData:
    return ExampleData(examples_of(examples), sharer, TOKENIZER, tiny_settings(**changes), on_error=on_error)


# --- batches
# ---------------------------------------------------------------------------------------------------------


def test_the_same_tokens_padded() -> None:
    batch = collate([TokenizedExample("a", [5, 6], [7], [5, 6]), TokenizedExample("b", [1, 2, 3], [8, 9], [1, 2, 3])])
    assert batch.ids == ("a", "b")
    assert batch.receiver_ids.tolist() == [[0, 5, 6], [1, 2, 3]]
    assert batch.receiver_mask.tolist() == [[0, 1, 1], [1, 1, 1]]
    assert batch.response_ids.tolist() == [[7, 0], [8, 9]]
    assert batch.response_mask.tolist() == [[1, 0], [1, 1]]
    assert batch.sharer_ids.tolist() == batch.receiver_ids.tolist()
    assert batch.sharer_mask.tolist() == batch.receiver_mask.tolist()
    assert batch.sharer_index is None
    assert batch.spans is None
    assert {t.dtype for t in vars(batch).values() if isinstance(t, torch.Tensor)} == {torch.int64}


def test_an_index_counts_the_padding_of_both() -> None:
    """Also for an example whose tokens are the same for both, beside one whose are not."""
    other = TokenizedExample("a", [5, 6], [7], [1, 2, 3, 4], aligned=[-1, 2])
    longer = TokenizedExample("b", [1, 2, 3], [8], [9], aligned=[0, -1, 0])
    same = TokenizedExample("c", [5, 6], [7], [5, 6])
    batch = collate([other, longer, same])
    assert batch.sharer_ids.tolist() == [[1, 2, 3, 4], [0, 0, 0, 9], [0, 0, 5, 6]]
    assert batch.sharer_mask.tolist() == [[1, 1, 1, 1], [0, 0, 0, 1], [0, 0, 1, 1]]
    assert batch.sharer_index is not None
    assert batch.sharer_index.tolist() == [[-1, -1, 2], [3, -1, 3], [-1, 2, 3]]


def test_spans_count_the_padding() -> None:
    first = TokenizedExample("a", [5, 6], [7], [1, 2, 3, 4], spans=[(1, 3), (3, 4)])
    batch = collate([first, TokenizedExample("b", [5, 6], [7], [1], spans=[(0, 1)])])
    assert batch.spans is not None
    assert batch.spans.bounds() == [[(1, 3), (3, 4)], [(3, 4)]]
    assert batch.sharer_ids.tolist() == [[1, 2, 3, 4], [0, 0, 0, 1]]
    assert batch.sharer_index is None


def test_batches_of_nothing_or_of_two_kinds() -> None:
    same, cross = TokenizedExample("a", [5, 6], [7], [5, 6]), TokenizedExample("b", [5, 6], [7], [1], spans=[(0, 1)])
    for wrong in ([], [same, cross]):
        with pytest.raises(DataError, match="one kind"):
            collate(wrong)


@pytest.mark.parametrize("kind", ["same", "other", "cross"])
def test_a_batch_says_what_its_examples_say(kind: str) -> None:
    data = data_of(crossing(8) if kind == "cross" else shared(8), sharer=TOKENIZER if kind == "same" else OTHER)
    for step in range(3):
        ids = data.ids(step)
        batches = [data.batch(step, i) for i in range(3)]
        assert [len(batch.ids) for batch in batches] == [2, 2, 1]
        assert [id for batch in batches for id in batch.ids] == ids
        for batch in batches:
            for i, id in enumerate(batch.ids):
                check_row(batch, i, data.tokenize(data._examples[id]))


def check_row(batch: Batch, i: int, made: TokenizedExample) -> None:
    """Row ``i`` read back, without its padding."""
    assert batch.receiver_ids[i][batch.receiver_mask[i].bool()].tolist() == made.prompt
    assert batch.response_ids[i][batch.response_mask[i].bool()].tolist() == made.response
    assert batch.sharer_ids[i][batch.sharer_mask[i].bool()].tolist() == made.sharer
    assert bool(batch.receiver_mask[i, -1]) and bool(batch.sharer_mask[i, -1]) and bool(batch.response_mask[i, 0])
    start = int((batch.sharer_mask[i] == 0).sum())
    if made.aligned is None:
        assert batch.sharer_index is None
    else:
        assert batch.sharer_index is not None
        index = batch.sharer_index[i]
        assert bool((index[batch.receiver_mask[i] == 0] == -1).all())
        rows = index[batch.receiver_mask[i].bool()].tolist()
        assert [row if row < 0 else row - start for row in rows] == made.aligned
    if made.spans is None:
        assert batch.spans is None
    else:
        assert batch.spans is not None
        assert batch.spans.bounds()[i] == [(a + start, b + start) for a, b in made.spans]


@pytest.mark.parametrize("kind", ["same", "other", "mixed", "cross"])
def test_a_step_on_a_batch_is_the_sum_of_steps_on_its_examples(kind: str) -> None:
    """With models: so what padding, index and spans say is what the step takes them for."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from lcf_fast.training.step import OnlinePrefills, TrainingStep, frozen

    torch.manual_seed(1)
    sizes = {"vocab_size": len(TOKENIZER), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = Qwen3Config(**sizes, num_attention_heads=2, num_key_value_heads=2, head_dim=16)
    sharer, receiver = (frozen(Qwen3ForCausalLM(config), device="cpu", precision="fp32") for _ in range(2))
    mixed = tiny_tokenizer("bytes", template=CHATML_SYSTEM)
    mixed.add_tokens(["five"])  # so that only what says five is read otherwise
    sharer.resize_token_embeddings(len(mixed))
    tokenizer = {"other": tiny_tokenizer("bytes", merges=False, template=INST), "mixed": mixed}.get(kind, TOKENIZER)
    data = data_of(crossing(8) if kind == "cross" else shared(8), sharer=tokenizer, batch_size=8)
    same = {data.tokenize(data._examples[id]).aligned is None for id in data.ids(0)}
    assert same == {"same": {True}, "other": {False}, "mixed": {True, False}, "cross": {True}}[kind]
    adapter = tiny_adapter(sharer, receiver, cross_context=kind == "cross").eval()
    step = TrainingStep(adapter, receiver, OnlinePrefills(sharer, receiver))
    with torch.no_grad():
        whole = float(step(data.of(data.ids(0))))
        alone = sum(float(step(data.of([id]))) for id in data.ids(0))
    assert whole == pytest.approx(alone, rel=1e-5)


# --- the order
# ---------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**63 - 1))
def test_epochs_of_an_endless_sequence(examples: int, batch: int, seed: int) -> None:
    if examples < batch:
        with pytest.raises(DataError, match="lower batch_size"):
            data_of(shared(examples), batch_size=batch, micro_batch_size=1, seed=seed)
        return
    data = data_of(shared(examples), batch_size=batch, micro_batch_size=1, seed=seed, steps=2)
    sequence = [id for step in range(6) for id in data.ids(step)]
    assert all(len(data.ids(step)) == batch for step in range(6))
    names = {f"e{i}" for i in range(examples)}
    for epoch in range(len(sequence) // examples):
        assert set(sequence[epoch * examples : (epoch + 1) * examples]) == names


def test_the_order_follows_from_seed_epoch_and_ids() -> None:
    base = shared(40)
    steps = [data_of(base, batch_size=8).ids(step) for step in range(15)]
    epochs = [[id for step in steps[at : at + 5] for id in step] for at in (0, 5, 10)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != [example.id for example in base]
    again = data_of(base, batch_size=8)
    assert [again.ids(step) for step in reversed(range(15))] == steps[::-1]  # any step at any time
    assert data_of(base, batch_size=8, seed=4).ids(0) != steps[0]
    moved = base.copy()
    random.Random(1).shuffle(moved)
    assert data_of(moved, batch_size=8).ids(3) == steps[3]
    # What is left out leaves the others' order as it is.
    long: list[Example] = [SharedExample("long", (("user", "One two " * 80), ("assistant", "Paris")))]
    kept = data_of(base + long, batch_size=8, max_tokens=60)
    assert [kept.ids(step) for step in range(15)] == steps
    assert kept.left_out[0][0] == "long"
    # And in every version.
    assert data_of(base, batch_size=8).ids(0) == ["e8", "e28", "e39", "e24", "e1", "e32", "e9", "e13"]


def test_a_digest_is_of_all_that_is_read() -> None:
    base = shared(20)
    run = {"steps": 2, "batch_size": 8}
    digest = data_of(base, **run).digest()
    read = {id for step in range(2) for id in data_of(base, **run).ids(step)}
    moved = base.copy()
    random.Random(1).shuffle(moved)
    asked = data_of(moved, **run)
    assert asked.digest() == digest
    asked.ids(9)  # looks at more examples than the run reads
    assert asked.digest() == digest
    for i, example in enumerate(base):
        assert isinstance(example, SharedExample)
        for turn, (role, text) in enumerate(example.messages):
            turns = list(example.messages)
            turns[turn] = role, text + "."
            changed = [*base[:i], SharedExample(example.id, tuple(turns)), *base[i + 1 :]]
            assert (data_of(changed, **run).digest() == digest) == (example.id not in read)
    assert data_of(base, sharer=OTHER, **run).digest() != digest
    assert data_of(base, **run, seed=4).digest() != digest
    assert data_of(base, steps=1, batch_size=8).digest() != digest
    crossed = crossing(8)
    assert isinstance(crossed[0], CrossExample)
    more = CrossExample(**{**vars(crossed[0]), "sharer_context": ("One", "two")})
    assert data_of(crossed, **run).digest() != data_of([more, *crossed[1:]], **run).digest()


def test_an_order_is_a_fair_shuffle() -> None:
    """Every example comes first about as often as any other, over the seeds: 400 draws of 8."""
    base = shared(8)
    firsts = [data_of(base, batch_size=8, seed=seed, steps=1, micro_batch_size=8).ids(0)[0] for seed in range(200)]
    firsts += [id for epoch in range(1, 201) for id in data_of(base, batch_size=8).ids(epoch)[:1]]
    counts = [firsts.count(f"e{i}") for i in range(8)]
    assert sum((count - 50) ** 2 / 50 for count in counts) < 24.3  # chi-square, 7 degrees of freedom, p = 0.001


# --- what is of no use
# ---------------------------------------------------------------------------------------------------------


def with_long(count: int, long: int) -> list[Example]:
    made = shared(count)
    for i in range(long):
        made.append(SharedExample(f"long{i}", (("user", "One two " * 80), ("assistant", "Paris"))))
    return made


def test_what_is_too_long_is_left_out_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = tiny_settings(max_tokens=60)
    data = ExampleData(examples_of(with_long(12, 5)), TOKENIZER, TOKENIZER, chosen, progress=True)
    assert sorted(id for id, _ in data.left_out) == [f"long{i}" for i in range(5)]
    assert all("instead of 60 tokens at most (max_tokens)" in reason for _, reason in data.left_out)
    assert {id for step in range(8) for id in data.ids(step)} == {f"e{i}" for i in range(12)}
    assert data.summary().startswith("17 of 17 examples tokenized, 12 of use; left out: 5 examples (long")
    assert "and 2 more)" in data.summary()
    assert capsys.readouterr().err == data.summary() + "\n"


def test_what_is_too_long_is_refused_if_asked() -> None:
    with pytest.raises(DataError, match=r"example 'long0': expected 60 tokens at most"):
        data_of(with_long(12, 1), on_error="refuse", max_tokens=60)
    with pytest.raises(DataError, match="'skip' or 'refuse'"):
        data_of(shared(12), on_error="ignore")


def test_fewer_of_use_than_a_step_reads() -> None:
    with pytest.raises(DataError, match=r"examples: expected 5 of use or more.*lower batch_size\), got 3$"):
        data_of(shared(3))
    with pytest.raises(DataError, match=r"got 3 of 9; left out: 6 examples \(long\d: \d+: prompt"):
        data_of(with_long(3, 6), max_tokens=60)


def test_tokenizers_that_cannot_be_aligned() -> None:
    """Refused before the training begins, with an example named."""
    deaf = tiny_tokenizer("characters", template="{{ 'Who are you?' }}")
    with pytest.raises(DataError, match=r"got 0 of 9; left out: 9 examples \(e\d: none of \d+ tokens .*aligns"):
        data_of(shared(9), sharer=deaf)
    with pytest.raises(DataError, match=r"example 'e\d': expected a prompt of which some token aligns"):
        data_of(shared(9), sharer=deaf, on_error="refuse")
    with pytest.raises(TokenizerError, match="eos"):
        ExampleData(examples_of(shared(9)), TOKENIZER, tiny_tokenizer("bytes", eos_token=None), tiny_settings())


def test_only_what_the_steps_read_is_tokenized_at_first() -> None:
    data = data_of(shared(100), steps=3)  # of 5
    assert len(data._usable) == 15
    assert data.summary() == "15 of 100 examples tokenized, 15 of use"
    later = data.ids(7)
    assert later == data_of(shared(100), steps=100).ids(7)
    assert len({id for step in range(20) for id in data.ids(step)}) == 100
    assert data.ids(20)[:1] == data_of(shared(100), steps=21).ids(20)[:1]


def test_ids_steps_and_micro_batches_that_do_not_exist() -> None:
    data = data_of(shared(12))
    for step, index in ((-1, 0), (0, 3), (0, -1)):
        with pytest.raises(IndexRangeError):
            data.batch(step, index)
    with pytest.raises(DataError, match="'nobody'"):
        data.of(["e1", "nobody"])
    with pytest.raises(DataError, match="unique ids, got 6 ids of 12"):
        data_of(shared(6) * 2)


def test_kind_and_defaults() -> None:
    assert data_of(shared(12)).kind == "shared"
    assert data_of(crossing(12)).kind == "cross"
    with pytest.raises(DataError, match="260 of use or more"):
        ExampleData(examples_of(shared(12)), TOKENIZER, TOKENIZER)
