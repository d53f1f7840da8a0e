"""Multiple choice: which token a letter is, predictions, accuracies, and the routing that knows the answers."""

from __future__ import annotations

import itertools
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from tiny_tokenizers import tiny_tokenizer

from lcf_fast.errors import IndexRangeError, ShapeError
from lcf_fast.evaluation.choice import (
    FrontierPoint,
    accuracy_of,
    choice_token_ids,
    graded,
    letters,
    predicted_choices,
    routing_frontier,
    weighted_accuracy,
)
from lcf_fast.evaluation.failures import EvaluationError


@pytest.fixture(scope="module")
def spaced() -> Any:
    """A tokenizer with a token for " A" as for "A", as GPT-2's and Qwen's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(unk_token=None))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|im_start|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator(["answer is A or B or C or D"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made)


def tokens(tokenizer: Any, ids: tuple[int, ...]) -> list[str]:
    return list(tokenizer.convert_ids_to_tokens(list(ids)))


def test_the_letter_that_the_prompt_calls_for(spaced: Any) -> None:
    assert tokens(spaced, choice_token_ids(spaced, "The answer is", 4)) == ["ĠA", "ĠB", "ĠC", "ĠD"]
    for prompt in ("<|im_start|>assistant\n", "The answer is (", "[/INST]", '"', "<|im_start|>"):
        assert tokens(spaced, choice_token_ids(spaced, prompt, 3)) == ["A", "B", "C"]
    assert tokens(spaced, choice_token_ids(spaced, "The answer is", 2, separator="")) == ["A", "B"]
    metaspace = tiny_tokenizer("metaspace")
    assert tokens(metaspace, choice_token_ids(metaspace, "assistant\n", 4)) == ["A", "B", "C", "D"]


def test_a_letter_that_is_no_token_of_its_own(spaced: Any) -> None:
    with pytest.raises(EvaluationError, match="one token"):  # " " and "A" are two tokens there
        choice_token_ids(tiny_tokenizer("bytes"), "The answer is", 4)
    assert len(choice_token_ids(tiny_tokenizer("bytes"), "The answer is ", 4)) == 4  # as the error says
    with pytest.raises(EvaluationError, match="no space at its end"):  # the last space would go into the letter's token
        choice_token_ids(spaced, "The answer is ", 4)
    with pytest.raises(EvaluationError):
        choice_token_ids(spaced, "", 4)
    with pytest.raises(EvaluationError, match="another token for each"):
        choice_token_ids(AllAlike(), "x", 3)
    for count in (0, 1, 27):
        with pytest.raises(EvaluationError):
            letters(count)


class AllAlike:
    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[7], *[[7, 0]] * (len(texts) - 1)]}


def test_predictions_of_rows_with_different_choices() -> None:
    logits = torch.full((4, 9), 5.0)  # what is no choice may have the largest logit of all
    logits[:, 1:5] = torch.tensor([[0.0, 1, 2, 3], [3, 2, 1, 0], [-9, -9, -8, 7], [-2, -1, -1, -3]])
    ids = [(1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3), (1, 2, 3, 4)]
    assert predicted_choices(logits, ids) == [3, 0, 2, 1]  # of equals the first
    assert predicted_choices(logits, [(4, 3), (2, 1), (1,), (2,)]) == [0, 1, 0, 0]
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert predicted_choices(logits.to(dtype), ids) == [3, 0, 2, 1]
    close = torch.tensor([[25.0, 25.000002]])
    assert predicted_choices(close, [(0, 1)]) == [1], "a step of float32 decides"
    assert predicted_choices(logits - torch.inf, ids) == [0, 0, 0, 0]
    assert predicted_choices(torch.empty(0, 9), []) == []


@given(
    st.lists(st.lists(st.integers(-3, 3), min_size=6, max_size=6), min_size=1, max_size=4),
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=5, unique=True), min_size=4, max_size=4),
)
def test_predictions_are_pythons_own_max(rows: list[list[int]], choices: list[list[int]]) -> None:
    choices = choices[: len(rows)]
    found = predicted_choices(torch.tensor(rows, dtype=torch.float32), choices)
    assert found == [max(range(len(ids)), key=lambda i: row[ids[i]]) for row, ids in zip(rows, choices)]


def test_logits_that_are_refused() -> None:
    logits = torch.zeros(2, 5)
    with pytest.raises(ShapeError):
        predicted_choices(logits, [(1, 2)])
    with pytest.raises(ShapeError):
        predicted_choices(logits[0], [(1, 2)])
    with pytest.raises(EvaluationError):
        predicted_choices(logits, [(1, 2), ()])
    for bad in (5, -1):
        with pytest.raises(IndexRangeError):
            predicted_choices(logits, [(1, 2), (1, bad)])
    logits[1, 3] = torch.nan
    assert predicted_choices(logits, [(1, 2), (1, 2)]) == [0, 0]
    with pytest.raises(EvaluationError, match="NaN"):
        predicted_choices(logits, [(1, 2), (3, 1)])


def test_grades_and_accuracies() -> None:
    assert graded([0, 2, 1], [0, 1, 1]) == [True, False, True]
    with pytest.raises(EvaluationError, match=r"answers\[1\].*leave such questions out"):
        graded([0, 2], [0, None])
    with pytest.raises(ShapeError):
        graded([0], [0, 1])
    assert accuracy_of([True, False, True, True]) == 0.75
    # By questions, not by sets: (1 + 3) / (1 + 9), not (1 + 1/3) / 2.
    assert weighted_accuracy({"a": [True], "b": [True] * 3 + [False] * 6}) == 0.4
    for nothing in ({}, {"a": [True], "b": []}):
        with pytest.raises(EvaluationError):
            weighted_accuracy(nothing)
    with pytest.raises(EvaluationError):
        accuracy_of([])


def test_frontier_by_hand() -> None:
    right = {"none": [True, False, False, False], "text": [True, True, False, False], "lcf": [False, True, True, False]}
    costs = {"none": [0.0] * 4, "text": [40.0] * 4, "lcf": [100.0] * 4}
    assert routing_frontier(right, costs) == (
        FrontierPoint(0, 0.25),
        FrontierPoint(10, 0.5),
        FrontierPoint(35, 0.75),
    )
    assert routing_frontier({"none": [False]}, {"none": [3.0]}) == (FrontierPoint(3, 0),)


@given(
    st.lists(
        st.tuples(*[st.tuples(st.booleans(), st.integers(0, 3)) for _ in range(3)]),
        min_size=1,
        max_size=4,
    )
)
def test_frontier_is_the_best_of_all_routings(questions: list[tuple[tuple[bool, int], ...]]) -> None:
    names = "abc"
    right = {name: [question[i][0] for question in questions] for i, name in enumerate(names)}
    costs = {name: [float(question[i][1]) for question in questions] for i, name in enumerate(names)}
    points = routing_frontier(right, costs)
    routings = [
        (
            sum(costs[name][at] for at, name in enumerate(routing)) / len(questions),
            sum(right[name][at] for at, name in enumerate(routing)) / len(questions),
        )
        for routing in itertools.product(names, repeat=len(questions))
    ]
    for point in points:
        reachable = [share for cost, share in routings if cost <= point.cost + 1e-9]
        assert max(reachable) == pytest.approx(point.accuracy)
    assert points[-1].accuracy == pytest.approx(max(share for _, share in routings))
    assert all(a.cost < b.cost and a.accuracy < b.accuracy for a, b in zip(points, points[1:]))


def test_frontiers_that_are_refused() -> None:
    with pytest.raises(EvaluationError):
        routing_frontier({}, {})
    with pytest.raises(EvaluationError):
        routing_frontier({"a": [True]}, {"b": [1.0]})
    with pytest.raises(EvaluationError):
        routing_frontier({"a": []}, {"a": []})
    with pytest.raises(ShapeError):
        routing_frontier({"a": [True], "b": [True, False]}, {"a": [1.0], "b": [1.0, 2.0]})
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(EvaluationError):
            routing_frontier({"a": [True]}, {"a": [bad]})
