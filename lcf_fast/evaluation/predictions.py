"""The record of a run: every prediction a line of JSON, appended cell by cell, so that a run goes on where it stopped.

A *cell* is one channel under one control on one set. Its predictions are appended when all of them are there; a second
file beside them says which cells are whole. What a killed run left behind the last whole cell is cut off by the next.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..files import write_whole
from .failures import EvaluationError

__all__ = ["CONTROLS", "MATCHED", "MISMATCHED", "RANDOM", "SELF", "ZERO"]
__all__ += ["Cell", "Prediction", "PredictionStore", "paired_scores"]

#: What the message is of: the item itself, another item, zeros, noise of the same moments, the receiver as its own
#: sharer. Channels without a message (`none`, `full_context`) are run as `matched` alone.
MATCHED, MISMATCHED, ZERO, RANDOM, SELF = CONTROLS = ("matched", "mismatched", "zero", "random", "self")

_FORMAT = 1
_ENTRY = {"set", "channel", "control", "digest", "settings", "start", "stop", "blake2b"}


@dataclass(frozen=True)
class Prediction:
    """What one channel made the receiver say to one question. Joined with other channels' by ``set`` and ``id``.

    Attributes:
        channel: by its name; ``none`` is the receiver alone.
        control: one of `CONTROLS`.
        prediction: the answer's text, or the chosen letter.
        correct: of multiple choice, else None.
        em, f1: of extractive answers, 0 to 1, else None.
        timings: seconds, as `lcf_fast.channels.Timings` names them (``first_token``, ``end`` ...).
        sent: bytes that crossed.

    Raises:
        EvaluationError: neither ``correct`` nor ``em`` and ``f1``, or both; an unknown control; a number out of range.
    """

    id: str
    set: str
    channel: str
    control: str
    prediction: str
    correct: bool | None = None
    em: float | None = None
    f1: float | None = None
    timings: Mapping[str, float] | None = None
    sent: int | None = None

    def __post_init__(self) -> None:
        if self.control not in CONTROLS:
            raise EvaluationError("control", expected=" or ".join(CONTROLS), got=repr(self.control))
        if (self.correct is None) == (self.em is None) or (self.em is None) != (self.f1 is None):
            got = f"correct {self.correct}, em {self.em}, f1 {self.f1}"
            raise EvaluationError(f"prediction {self.id!r}", expected="either correct or em and f1", got=got)
        for name, share in (("em", self.em), ("f1", self.f1)):
            if share is not None and not 0 <= share <= 1:
                raise EvaluationError(f"prediction {self.id!r}: {name}", expected="0 to 1", got=str(share))
        numbers = {**(self.timings or {}), "sent": 0 if self.sent is None else self.sent}
        for name, number in numbers.items():
            if not (math.isfinite(number) and number >= 0):
                raise EvaluationError(f"prediction {self.id!r}: {name}", expected="0 or more", got=str(number))

    @property
    def score(self) -> float:
        """1 or 0 of multiple choice, F1 of extractive answers."""
        if self.correct is not None:
            return float(self.correct)
        assert self.f1 is not None
        return self.f1


@dataclass(frozen=True)
class Cell:
    """One channel under one control on one set, and the settings that its predictions depend on.

    Attributes:
        settings: what JSON can hold: models, adapter, prompt, limit, seed. A cell of other settings is another one.
    """

    set: str
    channel: str
    control: str
    settings: Mapping[str, Any]

    @property
    def key(self) -> tuple[str, str, str]:
        return self.set, self.channel, self.control

    @property
    def digest(self) -> str:
        """Of the settings, 16 hex digits: the same in every process, whatever order they are given in."""
        return hashlib.blake2b(_json(dict(self.settings), sort_keys=True), digest_size=8).hexdigest()


class PredictionStore:
    """``predictions.jsonl`` and ``cells.json`` of one folder. One run at a time writes into a folder.

    Args:
        folder: made where it is not there yet, when the first cell is appended.

    Raises:
        EvaluationError: the folder's files are damaged, or of a form that this version does not know.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.path, self._index_path = self.folder / "predictions.jsonl", self.folder / "cells.json"
        self._cells = self._read_index()
        size = self.path.stat().st_size if self.path.exists() else 0
        if size < self._end:
            raise self._damaged(self.path, f"{size} bytes of {self._end}")

    def is_finished(self, cell: Cell) -> bool:
        """Whether the cell's predictions are in the store.

        Raises:
            EvaluationError: the same channel, control and set are there with other settings: that run must not be
                mixed with this one.
        """
        entry = self._entry(cell)
        if entry is None:
            return False
        if entry["digest"] == cell.digest:
            return True
        self._same(entry["settings"], cell, {*entry["settings"], *cell.settings})
        return True

    def check_shared(self, cell: Cell, names: Collection[str]) -> None:
        """That all cells of the set, of whatever channel, are of the cell's ``names`` among the settings.

        Raises:
            EvaluationError: one is not: scores of theirs and of this one's would not be of the same questions.
        """
        for entry in self._cells:
            if entry["set"] == cell.set:
                self._same(entry["settings"], cell, names)

    def _same(self, then: Mapping[str, Any], cell: Cell, names: Collection[str]) -> None:
        """Refuse a cell of which one of these settings has changed."""
        now = json.loads(_json(dict(cell.settings)))
        changed = sorted(name for name in names if then.get(name) != now.get(name))
        if changed:
            expected = f"the settings of the run that began in {self.folder} (go on with those, or take another folder)"
            shown = "; ".join(f"{name}: {now.get(name)!r} instead of {then.get(name)!r}"[:120] for name in changed[:4])
            raise EvaluationError("settings", expected=expected, got=shown)

    @property
    def finished(self) -> list[tuple[str, str, str]]:
        """Set, channel and control of each cell that is there."""
        return [(entry["set"], entry["channel"], entry["control"]) for entry in self._cells]

    def append(self, cell: Cell, predictions: Sequence[Prediction]) -> None:
        """All of a cell's predictions, or none: whenever the process ends, the cell is whole or not there.

        Raises:
            EvaluationError: no prediction, one of another cell, an id that comes twice, a cell that is there already,
                another run's cells since this store was opened. OSError: the file cannot be written.
        """
        _check_cell(cell, predictions)
        if self.is_finished(cell):
            raise EvaluationError("cell", expected="one that is not finished", got="/".join(cell.key))
        if self._read_index() != self._cells:
            raise EvaluationError(str(self.folder), expected="one run at a time in a folder", got="another run's cells")
        data = b"".join(_json(asdict(prediction)) + b"\n" for prediction in predictions)
        self.folder.mkdir(parents=True, exist_ok=True)
        start = self._end
        with open(self.path, "r+b" if self.path.exists() else "w+b") as file:
            file.truncate(start)
            file.seek(start)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # Until the index is written the lines behind its end do not count.
        entry = {
            "set": cell.set,
            "channel": cell.channel,
            "control": cell.control,
            "digest": cell.digest,
            "predictions": len(predictions),
            "start": start,
            "stop": start + len(data),
            "blake2b": hashlib.blake2b(data, digest_size=16).hexdigest(),
            "settings": json.loads(_json(dict(cell.settings))),
        }
        cells = [*self._cells, entry]
        write_whole(self._index_path, json.dumps({"format": _FORMAT, "cells": cells}, indent=1).encode() + b"\n")
        self._cells = cells

    def read(self) -> list[Prediction]:
        """All predictions of finished cells, in the order in which they were appended.

        Raises:
            EvaluationError: the lines are not those that were written.
        """
        made: list[Prediction] = []
        if not self._cells:
            return made
        with open(self.path, "rb") as file:
            for entry in self._cells:
                file.seek(entry["start"])
                data = file.read(entry["stop"] - entry["start"])
                if hashlib.blake2b(data, digest_size=16).hexdigest() != entry["blake2b"]:
                    raise self._damaged(self.path, f"other lines from byte {entry['start']} to {entry['stop']}")
                made += [_prediction(json.loads(line)) for line in data.splitlines()]
        return made

    @property
    def _end(self) -> int:
        return int(self._cells[-1]["stop"]) if self._cells else 0

    def _entry(self, cell: Cell) -> dict[str, Any] | None:
        found = [e for e in self._cells if (e["set"], e["channel"], e["control"]) == cell.key]
        return found[0] if found else None

    def _read_index(self) -> list[dict[str, Any]]:
        if not self._index_path.exists():
            return []
        try:
            index = json.loads(self._index_path.read_bytes())
            if index["format"] != _FORMAT:
                raise self._damaged(self._index_path, f"format {index['format']!r}")
            cells: list[dict[str, Any]] = index["cells"]
            end = 0
            for cell in cells:
                if cell["start"] != end or not {*cell} >= _ENTRY:
                    raise self._damaged(self._index_path, f"a cell that begins at {cell['start']}, not at {end}")
                end = int(cell["stop"])
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, EvaluationError):
                raise
            raise self._damaged(self._index_path, f"{type(error).__name__}: {error}") from None
        return cells

    def _damaged(self, path: Path, got: str) -> EvaluationError:
        expected = f"an evaluation's whole record in format {_FORMAT} (start again in another folder)"
        return EvaluationError(str(path), expected=expected, got=got)


def paired_scores(
    predictions: Iterable[Prediction], set: str, first: tuple[str, str], second: tuple[str, str]
) -> tuple[list[float], list[float]]:
    """Scores of the same questions from two cells of one set, in the first one's order.

    Args:
        first, second: ``(channel, control)``.

    Raises:
        EvaluationError: a cell without predictions, or two that are not of the same questions.
    """
    sides: dict[tuple[str, str], dict[str, float]] = {first: {}, second: {}}
    for prediction in predictions:
        side = sides.get((prediction.channel, prediction.control))
        if side is not None and prediction.set == set:
            side[prediction.id] = prediction.score
    for cell, side in sides.items():
        if not side:
            raise EvaluationError(f"{set}/{cell[0]}/{cell[1]}", expected="predictions", got="none")
    one, two = sides[first], sides[second]
    if one.keys() != two.keys():
        apart = sorted(one.keys() ^ two.keys())
        got = f"{len(one)} and {len(two)}, of which {len(apart)} are in one alone ({', '.join(apart[:3])} ...)"
        raise EvaluationError(f"{set}: {first} and {second}", expected="the same questions", got=got)
    return list(one.values()), [two[id] for id in one]


def _check_cell(cell: Cell, predictions: Sequence[Prediction]) -> None:
    if not predictions:
        raise EvaluationError("predictions", expected="at least one", got="none")
    ids: dict[str, None] = {}
    for prediction in predictions:
        if (prediction.set, prediction.channel, prediction.control) != cell.key:
            got = "/".join((prediction.set, prediction.channel, prediction.control))
            raise EvaluationError(f"prediction {prediction.id!r}", expected=f"one of {'/'.join(cell.key)}", got=got)
        if prediction.id in ids:
            raise EvaluationError("predictions", expected="each id once", got=f"{prediction.id!r} twice")
        ids[prediction.id] = None


def _prediction(row: dict[str, Any]) -> Prediction:
    return Prediction(**{field.name: row[field.name] for field in fields(Prediction)})


def _json(value: Any, *, sort_keys: bool = False) -> bytes:
    # ASCII: a model's text may hold half a surrogate pair, and no reader splits lines at U+2028.
    try:
        return json.dumps(value, sort_keys=sort_keys, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise EvaluationError("settings", expected="what JSON can hold", got=str(error)) from None
