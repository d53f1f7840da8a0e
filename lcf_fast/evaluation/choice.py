"""Multiple choice: the receiver's answer is the choice whose letter has the largest logit after the prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import IndexRangeError, ShapeError
from .failures import EvaluationError

__all__ = ["FrontierPoint", "accuracy_of", "choice_token_ids", "graded", "letters", "predicted_choices"]
__all__ += ["routing_frontier", "weighted_accuracy"]

#: After one of these the letter follows at once; after anything else, with a space between.
_OPENING = "([{<\"'“‘*_/|>]"


def letters(count: int) -> str:
    """The first letters, one a choice.

    Raises:
        EvaluationError: fewer than 2 choices or more than 26.
    """
    if not 2 <= count <= len(ascii_uppercase):
        raise EvaluationError("choices", expected=f"2 to {len(ascii_uppercase)}", got=str(count))
    return ascii_uppercase[:count]


def choice_token_ids(tokenizer: Any, prompt: str, count: int, *, separator: str | None = None) -> tuple[int, ...]:
    """The token that each choice's letter would be, were it the next thing behind ``prompt``.

    Tokenizers have one token for ``A`` and another for `` A`` (or ``▁A``); which of them can follow depends on how the
    prompt ends, so it is found by tokenizing the prompt with the letter.

    Args:
        tokenizer: of the receiver, as transformers has them.
        prompt: the whole text as the receiver gets it, chat template and all, without special tokens to be added.
        count: how many choices.
        separator: what stands between prompt and letter, "" or " ". None: a space, unless the prompt ends with white
            space, an opening bracket, a quotation mark, or the end of a template's tag.

    Raises:
        EvaluationError: the prompt's tokens change when a letter follows (a trailing space that belongs to the
            letter's token), or a letter is not one token of its own.
    """
    if not prompt:
        raise EvaluationError("prompt", expected="a text", got="an empty one")
    if separator is None:
        separator = "" if prompt[-1].isspace() or prompt[-1] in _OPENING else " "
    names = letters(count)
    texts = [prompt, *(prompt + separator + letter for letter in names)]
    before, *after = (list(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])
    found = []
    for letter, ids in zip(names, after):
        if ids[: len(before)] != before:
            expected = "a text whose tokens stay as they are when a choice's letter follows (no space at its end)"
            raise EvaluationError("prompt", expected=expected, got=f"one that ends with {prompt[-12:]!r}")
        if len(ids) != len(before) + 1:
            expected = f"one with which {letter!r} is one token (or put it at the prompt's end and pass '')"
            got = f"{separator!r}, which makes {len(ids) - len(before)} tokens"
            raise EvaluationError("separator", expected=expected, got=got)
        found.append(int(ids[-1]))
    if len(set(found)) != count:
        raise EvaluationError("tokenizer", expected="another token for each letter", got=f"ids {found}")
    return tuple(found)


def predicted_choices(logits: Tensor, token_ids: Sequence[Sequence[int]]) -> list[int]:
    """The choice of each row, 0 the first; of equal logits the first choice.

    Args:
        logits: ``(B, V)``, of the next token after each prompt.
        token_ids: of each row, its choices' tokens (`choice_token_ids`); rows may differ in their number.

    Raises:
        ShapeError: not ``(B, V)`` with one entry of ``token_ids`` a row. IndexRangeError: no such token.
        EvaluationError: a row without choices, or a logit that is NaN.
    """
    if logits.ndim != 2 or len(token_ids) != logits.shape[0]:
        raise ShapeError("logits", expected=f"({len(token_ids)}, V)", got=str(tuple(logits.shape)))
    most = max((len(ids) for ids in token_ids), default=0)
    if not all(token_ids):
        raise EvaluationError("token_ids", expected="at least one choice a row", got="a row without any")
    for ids in token_ids:
        if not all(0 <= id < logits.shape[1] for id in ids):
            raise IndexRangeError("token_ids", expected=f"0 to {logits.shape[1] - 1}", got=str(tuple(ids)))
    padded = torch.tensor([[*ids, *[ids[0]] * (most - len(ids))] for ids in token_ids], dtype=torch.int64, device="cpu")
    scores = logits.detach().gather(1, padded.reshape(len(token_ids), most).to(logits.device)).double().cpu().numpy()
    if np.isnan(scores).any():
        raise EvaluationError("logits", expected="numbers", got="NaN")
    # A padded column repeats the row's first choice, so it can tie with it but never come before it; NumPy's argmax
    # takes the first of equals, torch's any.
    return [int(choice) for choice in scores.argmax(1)] if most else []


def graded(predictions: Sequence[int], answers: Sequence[int | None]) -> list[bool]:
    """Which predictions are right.

    Raises:
        ShapeError: not as many predictions as answers. EvaluationError: a question without an answer.
    """
    if len(predictions) != len(answers):
        raise ShapeError("predictions", expected=f"{len(answers)}, one a question", got=str(len(predictions)))
    for number, answer in enumerate(answers):
        if answer is None:
            expected = "the index of the right choice; leave such questions out, or take a split that has answers"
            raise EvaluationError(f"answers[{number}]", expected=expected, got="none")
    return [said == right for said, right in zip(predictions, answers)]


def accuracy_of(right: Sequence[bool]) -> float:
    """The share of right answers; EvaluationError without any answer."""
    if not right:
        raise EvaluationError("right", expected="at least one answer", got="none")
    return sum(map(bool, right)) / len(right)


def weighted_accuracy(sets: Mapping[str, Sequence[bool]]) -> float:
    """Of several sets, each weighing as many times as it has questions; EvaluationError where a set has none."""
    if not sets:
        raise EvaluationError("sets", expected="at least one", got="none")
    for name, right in sets.items():
        if not right:
            raise EvaluationError(f"sets[{name!r}]", expected="at least one answer", got="none")
    return sum(sum(map(bool, right)) for right in sets.values()) / sum(map(len, sets.values()))


@dataclass(frozen=True)
class FrontierPoint:
    """The best accuracy that any routing has at this mean cost a question."""

    cost: float
    accuracy: float


def routing_frontier(
    right: Mapping[str, Sequence[bool]], costs: Mapping[str, Sequence[float]]
) -> tuple[FrontierPoint, ...]:
    """What a router could reach that knew which channel answers each question right.

    Each question goes to one channel. The first point sends every question to its cheapest channel; each later one
    pays for more questions to be answered right, those first where the cheapest right channel costs the least more.
    Every right answer is worth the same, so no routing of that cost is better. The last point is the best of channels
    for every question.

    Args:
        right: of each channel, which questions it answers right, the same questions in the same order.
        costs: of each channel and question, what it costs, at least 0 (bytes, seconds).

    Raises:
        EvaluationError: no channel, no question, other channels in ``costs``, or a cost that is no finite number of
            at least 0. ShapeError: channels of different numbers of questions.
    """
    if not right or right.keys() != costs.keys():
        raise EvaluationError("costs", expected=f"of {', '.join(right) or 'a channel'}", got=", ".join(costs) or "none")
    count = len(next(iter(right.values())))
    for name in right:
        if len(right[name]) != count or len(costs[name]) != count:
            got = f"{len(right[name])} answers and {len(costs[name])} costs"
            raise ShapeError(f"right[{name!r}]", expected=f"{count} answers and costs", got=got)
        if not all(math.isfinite(cost) and cost >= 0 for cost in costs[name]):
            raise EvaluationError(f"costs[{name!r}]", expected="finite numbers of at least 0", got="others")
    if not count:
        raise EvaluationError("right", expected="at least one question", got="none")
    spent, solved = 0.0, 0
    extras: list[float] = []
    for question in range(count):
        cheapest = min(costs[name][question] for name in right)
        solving = [costs[name][question] for name in right if right[name][question]]
        spent += cheapest
        if solving:
            extras.append(min(solving) - cheapest)
    points: list[FrontierPoint] = []
    dearest = 0.0
    for extra in sorted(extras):
        if extra > dearest:
            points.append(FrontierPoint(spent / count, solved / count))
            dearest = extra
        spent, solved = spent + extra, solved + 1
    return (*points, FrontierPoint(spent / count, solved / count))
