"""Published data sets into the lines that `read_examples` reads: OpenHermes 2.5 and HotpotQA.

Both read item by item and write line by line; the file that is written appears whole or not at all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..counting import counted
from ..files import sweep, whole_file
from ..reading.data_errors import DataError
from .data import OnError, check_choice, name_broken, parse_example
from .rows import RowError, file_rows

__all__ = ["Conversion", "LeftOut", "add_convert_command", "convert_hotpotqa", "convert_openhermes"]
__all__ += ["hotpotqa_row", "openhermes_row"]

_SPEAKERS = {"system": "system", "human": "user", "gpt": "assistant"}
_PARAGRAPHS = 10


class LeftOut(Exception):
    """An item that is sound and not wanted; its text says what it is."""


@dataclass(frozen=True)
class Conversion:
    """What became of a data set's items.

    Attributes:
        written: lines written.
        left_out: how many sound items were not wanted, by what they are.
        broken: ``(item number, reason)`` of those that are of no use, 1 the first item (or line).
    """

    written: int
    left_out: dict[str, int]
    broken: tuple[tuple[int, str], ...]

    @property
    def read(self) -> int:
        """Items read."""
        return self.written + sum(self.left_out.values()) + len(self.broken)

    def summary(self) -> str:
        """One line: items read, lines written, what was left out and what is broken, the first of it named."""
        parts = [f"{self.read} items read, {self.written} written"]
        parts += [f"left out: {count} ({what})" for what, count in sorted(self.left_out.items())]
        return "; ".join([*parts, name_broken(self.broken, 10, "broken item")] if self.broken else parts)


def convert_openhermes(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    on_error: OnError = "skip",
    progress: bool = False,
) -> Conversion:
    """OpenHermes 2.5 as published (a JSON list, JSON lines or parquet) into lines of shared context.

    Ids are ``openhermes-`` and the item's number: the published ``id`` is mostly null.

    Args:
        on_error: "skip" leaves broken items out and names them in the result; "refuse" stops at the first.
        progress: whether the number of items read is shown on standard error.

    Raises:
        DataError: no such file, source and target the same file, an item that is broken (if refused), nothing to
            write. BackendError: parquet without the `datasets` library. OSError: as the system says.
    """

    def row(number: int, item: object) -> dict[str, Any]:
        return openhermes_row(item, f"openhermes-{number}")

    return _convert(source, target, on_error, progress, row)


def convert_hotpotqa(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    seed: int = 42,
    on_error: OnError = "skip",
    progress: bool = False,
) -> Conversion:
    """HotpotQA as published (a JSON list; the distractor setting) into lines of cross context.

    Bridge questions only. An item's ten paragraphs are cut into two sets of five with one supporting paragraph in each:
    one set to the sharer, one span a paragraph, the other to the receiver. How they are cut depends on the seed and the
    item's ``_id`` alone.

    Args, raises: as `convert_openhermes`.
    """
    ids: set[str] = set()

    def row(number: int, item: object) -> dict[str, Any]:
        made = hotpotqa_row(item, seed)
        if made["id"] in ids:
            raise RowError(f"the _id {made['id']!r} has come before")
        ids.add(made["id"])
        return made

    return _convert(source, target, on_error, progress, row)


def openhermes_row(item: object, id: str) -> dict[str, Any]:
    """One item of OpenHermes 2.5 as a line of shared context.

    A system prompt that stands beside the conversation, not in it, becomes its first message.

    Raises:
        RowError: an item of another layout, or without a user's turn or an answer.
    """
    conversation = _of(item, "conversations", list)
    messages = []
    for i, turn in enumerate(conversation):
        speaker = _of(turn, "from", str, f"conversations[{i}]")
        if speaker not in _SPEAKERS:
            raise RowError(f"conversations[{i}]: from {speaker!r}, none of {', '.join(_SPEAKERS)}"[:200])
        text = _of(turn, "value", str, f"conversations[{i}]")
        messages.append({"role": _SPEAKERS[speaker], "content": text})
    assert isinstance(item, Mapping)
    system = item.get("system_prompt")
    if isinstance(system, str) and system.strip() and not any(each["role"] == "system" for each in messages):
        messages.insert(0, {"role": "system", "content": system})
    return _readable({"id": id, "messages": messages})


def hotpotqa_row(item: object, seed: int) -> dict[str, Any]:
    """One item of HotpotQA as a line of cross context.

    Raises:
        LeftOut: no bridge question.
        RowError: an item of another layout, not ten paragraphs, or not two of them that support the answer.
    """
    kind = _of(item, "type", str)
    if kind != "bridge":
        raise LeftOut(f"{kind} questions"[:50])
    id = _of(item, "_id", str)
    paragraphs = [_paragraph(f"context[{i}]", entry) for i, entry in enumerate(_of(item, "context", list))]
    if len(paragraphs) != _PARAGRAPHS:
        raise RowError(f"{len(paragraphs)} paragraphs instead of {_PARAGRAPHS}")
    if len({title for title, _ in paragraphs}) < _PARAGRAPHS:
        raise RowError("two paragraphs of one title")
    facts = _of(item, "supporting_facts", list)
    titles = {_pair(f"supporting_facts[{i}]", fact)[0] for i, fact in enumerate(facts)}
    if len(titles) != 2:
        raise RowError(f"{len(titles)} supporting titles instead of 2")
    supporting = [text for title, text in paragraphs if title in titles]
    if len(supporting) != 2:
        raise RowError("a supporting title that is no paragraph's")
    others = [text for title, text in paragraphs if title not in titles]
    # Only `random()` promises the same draws in every version of Python.
    digest = hashlib.blake2b(f"{seed}\n{id}".encode(errors="surrogatepass"), digest_size=8).digest()
    draw = random.Random(int.from_bytes(digest, "big")).random
    supporting, others = _shuffled(supporting, draw), _shuffled(others, draw)
    half = len(others) // 2
    sharer = _shuffled([supporting[0], *others[:half]], draw)
    receiver = _shuffled([supporting[1], *others[half:]], draw)
    made = {"id": id, "sharer_context": sharer, "receiver_context": "\n\n".join(receiver)}
    return _readable({**made, "question": _of(item, "question", str), "answer": _of(item, "answer", str)})


def _convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    on_error: OnError,
    progress: bool,
    row: Callable[[int, object], dict[str, Any]],
) -> Conversion:
    check_choice("on_error", on_error, ("skip", "refuse"))
    source, target = Path(source), Path(target)
    rows = file_rows(source)
    if target.exists() and target.samefile(source):
        raise DataError(str(target), expected="another file than the source", got="the same")
    sweep(target.parent)
    written, left_out, broken = 0, Counter[str](), []
    with whole_file(target) as file:
        for number, item in counted(rows, f"converting {source.name}", shown=progress):
            try:
                if isinstance(item, RowError):
                    raise item
                made = row(number, item)
            except LeftOut as reason:
                left_out[str(reason)] += 1
                continue
            except RowError as error:
                if on_error == "refuse":
                    raise DataError(f"{source}, item {number}", expected="a sound one", got=str(error)) from None
                broken.append((number, str(error)))
                continue
            file.write(json.dumps(made, ensure_ascii=False).encode() + b"\n")
            written += 1
        result = Conversion(written, dict(left_out), tuple(broken))
        if not written:
            raise DataError(str(source), expected="an item to write", got=result.summary())
    return result


def _readable(row: dict[str, Any]) -> dict[str, Any]:
    """The row itself; what would be broken for its reader is broken here."""
    parse_example(row, "")
    return row


def _of(item: object, key: str, kind: type, name: str = "the item") -> Any:
    """A field of an object, of the right type."""
    if not isinstance(item, Mapping):
        raise RowError(f"{name} is no object with fields")
    if item.get(key) is None:
        raise RowError(f"{name} has no {key}")
    value = item[key]
    if not isinstance(value, kind):
        raise RowError(f"{key}: {type(value).__name__} instead of {kind.__name__}")
    return value


def _pair(name: str, value: object) -> tuple[str, Any]:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2 or not isinstance(value[0], str):
        raise RowError(f"{name}: not a title and what belongs to it")
    return value[0], value[1]


def _paragraph(name: str, entry: object) -> tuple[str, str]:
    """A paragraph's title, and the title and its sentences as one text."""
    title, sentences = _pair(name, entry)
    if not isinstance(sentences, list) or not all(isinstance(sentence, str) for sentence in sentences):
        raise RowError(f"{name}: no list of sentences")
    return title, f"{title}\n{''.join(sentences).strip()}".strip()


def _shuffled(texts: list[str], draw: Callable[[], float]) -> list[str]:
    keys = [draw() for _ in texts]
    return [texts[i] for i in sorted(range(len(texts)), key=keys.__getitem__)]


# --- lcf-fast convert
# ---------------------------------------------------------------------------------------------------------

_EXAMPLES = """examples:
  lcf-fast convert openhermes openhermes2_5.json openhermes.jsonl
  lcf-fast convert hotpotqa hotpot_train_v1.1.json hotpotqa.jsonl --seed 42
  lcf-fast convert hotpotqa train.json out.jsonl --on-error refuse      stops at the first broken item
  lcf-fast convert openhermes train.json out.jsonl --broken broken.txt  names every broken item
"""


def add_convert_command(commands: Any) -> None:
    """Add ``lcf-fast convert`` to the subparsers ``commands``."""
    parser = commands.add_parser(
        "convert",
        help="turn a published data set into training data",
        description="Turn a published data set into JSON lines to train on.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("layout", choices=["openhermes", "hotpotqa"], help="which set's published layout IN has")
    parser.add_argument("source", metavar="IN", type=Path, help="JSON (a list or lines); OpenHermes also parquet")
    parser.add_argument("target", metavar="OUT", type=Path, help="the JSON lines to write")
    parser.add_argument("--seed", type=int, help="of HotpotQA's cut into two contexts; default: 42")
    parser.add_argument(
        "--on-error", choices=["skip", "refuse"], default="skip", help="what to do with broken items; default: skip"
    )
    parser.add_argument("--broken", metavar="FILE", type=Path, help="write every broken item's number and reason")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    if arguments.broken is not None:
        for name in ("source", "target"):
            if arguments.broken.resolve() == getattr(arguments, name).resolve():
                what = {"source": "IN", "target": "OUT"}[name]
                raise DataError("--broken", expected=f"another file than {what}", got=str(arguments.broken))
    if arguments.seed is not None and arguments.layout != "hotpotqa":
        raise DataError("--seed", expected="hotpotqa beside it, since nothing else is drawn", got=arguments.layout)
    options: dict[str, Any] = {"on_error": arguments.on_error, "progress": True}
    if arguments.layout == "hotpotqa":
        seed = 42 if arguments.seed is None else arguments.seed
        result = convert_hotpotqa(arguments.source, arguments.target, seed=seed, **options)
    else:
        result = convert_openhermes(arguments.source, arguments.target, **options)
    if arguments.broken is not None:
        with whole_file(arguments.broken) as file:
            for number, reason in result.broken:
                file.write(f"{number}\t{reason}\n".encode(errors="backslashreplace"))
    print(f"{arguments.target}: {result.summary()}", file=sys.stderr if result.broken else sys.stdout)
