"""A run's predictions as figures: each leads with what the matching message does and another's does not."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median

from .choice import FrontierPoint, routing_frontier
from .comparisons import Comparison, compare, default_pairs
from .failures import EvaluationError
from .predictions import CONTROLS, MATCHED, MISMATCHED, SELF, Prediction
from .statistics import Accuracy, Equivalence, Interval, accuracy, equivalence, mean_interval
from .verdicts import ALPHA, Scores, Verdict, verdicts

__all__ = ["CellResult", "ChannelResult", "SetResult", "Summary", "check_pairs", "summarize", "summary_json"]

#: The channel of the receiver alone.
NONE = "none"


@dataclass(frozen=True)
class CellResult:
    """One channel under one control.

    Attributes:
        score: accuracy (Wilson's interval) or mean F1 (bootstrap), 95%.
        exact: the share of exact matches, of extractive sets.
        sent: median bytes; None where not measured.
        timings: median seconds of each part that was measured.
    """

    control: str
    items: int
    score: Interval
    exact: float | None
    sent: float | None
    timings: dict[str, float]


@dataclass(frozen=True)
class ChannelResult:
    """One channel on one set.

    Attributes:
        cells: one a control that was run, in the order of `CONTROLS`.
        verdict: None where matched or mismatched was not run.
        equivalence: of matched and mismatched; None as ``verdict``, or of a single question.
        speedups: how many times faster the first token comes than with each text channel.
    """

    channel: str
    cells: tuple[CellResult, ...]
    verdict: Verdict | None
    equivalence: Equivalence | None
    speedups: dict[str, float]

    def cell(self, control: str) -> CellResult | None:
        found = [cell for cell in self.cells if cell.control == control]
        return found[0] if found else None


@dataclass(frozen=True)
class SetResult:
    """One set of questions.

    Attributes:
        measure: "accuracy" or "F1".
        routing: matched answers (right, or exact matches) against mean bytes a question, were each question sent to
            the cheapest channel that answers it right. Empty where bytes were not measured.
        comparisons: of channels with each other, corrected together.
    """

    set: str
    measure: str
    questions: int
    channels: tuple[ChannelResult, ...]
    routing: tuple[FrontierPoint, ...]
    comparisons: tuple[Comparison, ...] = ()


@dataclass(frozen=True)
class Summary:
    """All of a run.

    Attributes:
        weighted: accuracy with the matching message over all multiple-choice sets, each question weighing the same,
            of the channels that were run on all of them.
        judged: how many verdicts were corrected together (Holm), each of one channel on one set.
        alpha: below which content is said to have crossed.
        notes: what else is to be known about the sets.
    """

    sets: tuple[SetResult, ...]
    weighted: dict[str, Accuracy]
    judged: int
    alpha: float
    notes: tuple[str, ...] = ()


_Table = dict[str, dict[str, dict[str, dict[str, Prediction]]]]  # set, channel, control, id


def summarize(
    predictions: Iterable[Prediction],
    *,
    pairs: Sequence[tuple[str, str]] | None = None,
    alpha: float = ALPHA,
    seed: int = 0,
    progress: bool = False,
) -> Summary:
    """Figures of every set, channel and control that the predictions hold, in the order in which they come.

    Args:
        pairs: channels to compare on each set that both were run on; None: `default_pairs`.
        alpha: of the verdicts.
        seed: of the bootstrap.
        progress: whether it is shown how many verdicts have been made.

    Raises:
        EvaluationError: no prediction, one that comes twice, cells of one set that are not of the same questions, or
            a set with both kinds of answers; a pair of one channel, or one that no set holds both of.
    """
    table: _Table = {}
    for prediction in predictions:
        cell = table.setdefault(prediction.set, {}).setdefault(prediction.channel, {})
        if prediction.id in (rows := cell.setdefault(prediction.control, {})):
            named = "/".join((prediction.set, prediction.channel, prediction.control, prediction.id))
            raise EvaluationError("predictions", expected="each question once a cell", got=f"{named} twice")
        rows[prediction.id] = prediction
    if not table:
        raise EvaluationError("predictions", expected="at least one", got="none")
    for name, channels in table.items():
        _check_questions(name, channels)
    check_pairs(table, pairs)
    judged = _verdicts(table, alpha, seed, progress)
    sets = tuple(_set(name, channels, judged, pairs, seed) for name, channels in table.items())
    return Summary(sets, _weighted(table), len(judged), alpha)


def check_pairs(sets: Mapping[str, Collection[str]], pairs: Sequence[tuple[str, str]] | None) -> None:
    """Refuse a pair of channels of which no set has both. ``sets``: the channels of each."""
    for first, second in pairs or ():
        if not any(first in channels and second in channels for channels in sets.values()):
            ran = ", ".join(dict.fromkeys(channel for channels in sets.values() for channel in channels))
            raise EvaluationError("pairs", expected=f"two of {ran}, on one set", got=f"{first} and {second}")


def summary_json(summary: Summary) -> str:
    """All figures as JSON; times in seconds, shares from 0 to 1."""
    return json.dumps(asdict(summary), indent=1, allow_nan=False) + "\n"


def _check_questions(name: str, channels: dict[str, dict[str, dict[str, Prediction]]]) -> None:
    cells = {f"{channel}/{control}": rows for channel, cell in channels.items() for control, rows in cell.items()}
    (first, asked), *rest = cells.items()
    for other, rows in rest:
        if rows.keys() != asked.keys():
            apart = sorted(rows.keys() ^ asked.keys())
            got = f"{len(apart)} questions in one of them alone ({', '.join(apart[:3])} ...)"
            raise EvaluationError(f"{name}: {first} and {other}", expected="the same questions", got=got)
    if len({row.correct is None for rows in cells.values() for row in rows.values()}) > 1:
        raise EvaluationError(name, expected="answers of one kind", got="multiple choice and extractive ones")


def _scores(rows: dict[str, Prediction], like: dict[str, Prediction]) -> list[float]:
    """Of the questions in ``like``, in its order."""
    return [rows[id].score for id in like]


def _verdicts(table: _Table, alpha: float, seed: int, progress: bool) -> dict[tuple[str, str], Verdict]:
    pairs = {}
    for name, channels in table.items():
        alone = channels.get(NONE, {}).get(MATCHED)
        for channel, cell in channels.items():
            if MATCHED in cell and MISMATCHED in cell:
                like = cell[MATCHED]
                pairs[name, channel] = Scores(
                    _scores(like, like),
                    _scores(cell[MISMATCHED], like),
                    None if alone is None else _scores(alone, like),
                    _scores(cell[SELF], like) if SELF in cell else None,
                )
    return verdicts(pairs, alpha=alpha, seed=seed, progress=progress)


def _set(
    name: str,
    channels: dict[str, dict[str, dict[str, Prediction]]],
    judged: dict[tuple[str, str], Verdict],
    pairs: Sequence[tuple[str, str]] | None,
    seed: int,
) -> SetResult:
    results = []
    first_tokens: dict[str, float] = {}
    for channel, cell in channels.items():
        cells = tuple(_cell(control, list(cell[control].values()), seed) for control in CONTROLS if control in cell)
        alike = None
        if (channel_verdict := judged.get((name, channel))) and len(cell[MATCHED]) > 1:
            alike = equivalence(_scores(cell[MATCHED], cell[MATCHED]), _scores(cell[MISMATCHED], cell[MATCHED]))
        results.append(ChannelResult(channel, cells, channel_verdict, alike, {}))
        matched = results[-1].cell(MATCHED)
        if matched is not None and matched.timings.get("first_token", 0) > 0:
            first_tokens[channel] = matched.timings["first_token"]
    texts = {channel: time for channel, time in first_tokens.items() if channel.startswith("text")}
    for result in results:
        own = first_tokens.get(result.channel)
        if own is not None:
            result.speedups.update({text: time / own for text, time in texts.items() if text != result.channel})
    some = next(iter(next(iter(channels.values())).values()))
    measure = "F1" if next(iter(some.values())).correct is None else "accuracy"
    return SetResult(
        name, measure, len(some), tuple(results), _routing(channels), _comparisons(channels, pairs, seed)
    )


def _comparisons(
    channels: dict[str, dict[str, dict[str, Prediction]]], pairs: Sequence[tuple[str, str]] | None, seed: int
) -> tuple[Comparison, ...]:
    matched = {channel: cell[MATCHED] for channel, cell in channels.items() if MATCHED in cell}
    wanted = default_pairs(matched) if pairs is None else pairs
    able = [pair for pair in wanted if pair[0] in matched and pair[1] in matched]
    return tuple(compare([row for rows in matched.values() for row in rows.values()], able, seed=seed))


def _cell(control: str, rows: Sequence[Prediction], seed: int) -> CellResult:
    exact = None
    if rows[0].correct is None:
        score = mean_interval([row.score for row in rows], seed=seed)
        exact = sum(row.em or 0.0 for row in rows) / len(rows)
    else:
        found = accuracy([_is_right(row) for row in rows])
        score = Interval(found.share, found.low, found.high)
    sent = [row.sent for row in rows if row.sent is not None]
    parts = {part for row in rows for part in row.timings or {}}
    timings = {p: median(row.timings[p] for row in rows if row.timings and p in row.timings) for p in sorted(parts)}
    return CellResult(control, len(rows), score, exact, median(sent) if sent else None, timings)


def _routing(channels: dict[str, dict[str, dict[str, Prediction]]]) -> tuple[FrontierPoint, ...]:
    matched = {channel: cell[MATCHED] for channel, cell in channels.items() if MATCHED in cell}
    if not matched or any(row.sent is None for rows in matched.values() for row in rows.values()):
        return ()
    ids = list(next(iter(matched.values())))
    right = {channel: [_is_right(rows[id]) for id in ids] for channel, rows in matched.items()}
    costs = {channel: [float(rows[id].sent or 0) for id in ids] for channel, rows in matched.items()}
    return routing_frontier(right, costs)


def _is_right(row: Prediction) -> bool:
    return bool(row.em if row.correct is None else row.correct)


def _weighted(table: _Table) -> dict[str, Accuracy]:
    asked = {name: channels for name, channels in table.items() if _is_choice(channels)}
    made: dict[str, Accuracy] = {}
    for channel in dict.fromkeys(channel for channels in asked.values() for channel in channels):
        if all(MATCHED in channels.get(channel, {}) for channels in asked.values()):
            rows = [row for channels in asked.values() for row in channels[channel][MATCHED].values()]
            made[channel] = accuracy([_is_right(row) for row in rows])
    return made


def _is_choice(channels: dict[str, dict[str, dict[str, Prediction]]]) -> bool:
    return all(row.correct is not None for cell in channels.values() for rows in cell.values() for row in rows.values())
