"""``lcf-fast eval``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .run import AskedSet

__all__ = ["add_eval_command"]

_EXAMPLES = """examples:
  lcf-fast eval --sharer S --receiver R --adapter run/adapter --data questions.jsonl --out results
      cross context: lines of sharer_context, receiver_context, question, answer
  lcf-fast eval --sharer S --receiver R --adapter lcf/adapter --set arc-c --out results
      shared context: multiple choice by the logits of the letters; the set is downloaded
  lcf-fast eval ... --set arc-c=arc.jsonl --limit 200     a local file, and 200 questions of it

The same command goes on where it was stopped. In OUT: predictions.jsonl (a line a question, channel and control),
summary.json, report.md, bytes.png and first_token.png.
"""
_DESCRIPTION = """Ask the receiver over every channel that is at hand, with the matching message, another question's,
zeros, and numbers of the same moments. A gain that survives another question's message is no content."""


def add_eval_command(commands: Any) -> None:
    """Add ``eval`` to the subparsers."""
    from .sets import SETS

    parser = commands.add_parser(
        "eval",
        help="compare channels on the same questions, with controls",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sharer", metavar="MODEL", required=True, help="a transformers model: folder or hub id")
    parser.add_argument("--receiver", metavar="MODEL", required=True, help="as --sharer; the same: KVComm takes part")
    parser.add_argument("--adapter", metavar="DIR", type=Path, action="append", default=[], help="LCF, LCF-X, slots")
    parser.add_argument("--c2c", metavar="DIR", type=Path, help="a fuser of Cache-to-Cache, in its released layout")
    parser.add_argument("--out", metavar="OUT", type=Path, required=True, help="folder of the results")
    asked = parser.add_argument_group("questions")
    asked.add_argument("--data", metavar="SET", action="append", default=[], help="cross context: JSON lines, parquet")
    asked.add_argument("--hotpotqa", metavar="FILE", type=Path, help="HotpotQA as published: its bridge questions")
    asked.add_argument(
        "--set",
        metavar="NAME[=FILE]",
        action="append",
        default=[],
        help=f"multiple choice: {', '.join(SETS)}; without a file from the hub",
    )
    asked.add_argument("--limit", type=int, metavar="N", help="of each set N questions, drawn by the seed")
    how = parser.add_argument_group("how")
    how.add_argument("--channels", nargs="+", metavar="NAME", help="these alone; default: all that suit the questions")
    how.add_argument("--no-controls", action="store_true", help="the matching message alone")
    how.add_argument("--text-tokens", type=int, nargs="+", default=[50, 200], metavar="K", help="default: 50 200")
    how.add_argument("--text-instruction", metavar="TEXT", help="to a sharer that writes")
    how.add_argument("--dtype", default="bfloat16", help="of messages on the wire; default: bfloat16")
    how.add_argument(
        "--placement", choices=["append", "prefix"], default="append", help="of slots; default: append"
    )
    how.add_argument("--ratio", type=float, default=0.5, help="of layers that KVComm shares; default: 0.5")
    how.add_argument("--max-new-tokens", type=int, default=32, metavar="N", help="of an answer; default: 32")
    how.add_argument("--batch-size", type=int, default=8, metavar="N", help="questions at a time; default: 8")
    how.add_argument("--precision", choices=["bf16", "fp32"], default="bf16", help="of the models; default: bf16")
    how.add_argument("--device", help="such as cuda or cpu; default: a GPU if there is one")
    how.add_argument("--seed", type=int, default=42, help="of what is drawn; default: 42")
    how.add_argument("--no-plots", action="store_true", help="no pictures, which need matplotlib")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from .failures import EvaluationError
    from .plots import check_plot

    if not arguments.no_plots:
        check_plot()
    sets = _sets(arguments)
    if not sets:
        raise EvaluationError("questions", expected="--data, --hotpotqa or --set", got="none of them")

    import torch

    from ..c2c.fuser import C2CFuser
    from ..channels import Agent
    from ..checkpoint import load_any
    from ..training.models import load_model, load_tokenizer
    from .entrants import entrants, suits
    from .report import markdown
    from .run import evaluate, write_report

    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    models = {
        role: load_model(role, getattr(arguments, role), arguments.precision).to(device)
        for role in dict.fromkeys(("receiver", "sharer"))
        if role == "receiver" or arguments.sharer != arguments.receiver
    }
    agents = {
        role: Agent(role, models.get(role, models["receiver"]), load_tokenizer(role, getattr(arguments, role)))
        for role in ("receiver", "sharer")
    }
    adapters = [
        load_any(folder, device=device, sharer=agents["sharer"].model, receiver=agents["receiver"].model)
        for folder in arguments.adapter
    ]
    fuser = None
    if arguments.c2c is not None:
        both = {role: agents[role].model for role in agents}
        fuser = C2CFuser.from_pretrained(arguments.c2c, device=device, **both).eval()
    everyone = entrants(
        agents["receiver"],
        agents["sharer"],
        adapters=adapters,
        fuser=fuser,
        text_tokens=arguments.text_tokens,
        instruction=arguments.text_instruction,
        dtype=arguments.dtype,
        placement=arguments.placement,
        ratio=arguments.ratio,
        calibration=next((i.request for one in sets for i in one.items if i.request.sharer_contexts), None),
        controls=not arguments.no_controls,
        seed=arguments.seed,
    )
    known = [entrant.name for entrant in everyone]
    unknown = [name for name in arguments.channels or () if name not in known]
    if unknown:
        raise EvaluationError("--channels", expected=f"some of {', '.join(known)}", got=unknown[0])
    names = ("sharer", "receiver", "precision", "limit", "seed")
    settings = {name: getattr(arguments, name) for name in names}
    for asked in sets:
        chosen = [
            entrant
            for entrant in everyone
            if (entrant.name in arguments.channels if arguments.channels else suits(entrant, asked))
        ]
        summary = evaluate(
            chosen,
            [asked],
            arguments.out,
            batch_size=arguments.batch_size,
            max_new_tokens=arguments.max_new_tokens,
            settings=settings,
            progress=True,
        )
    written = write_report(summary, arguments.out, plots=not arguments.no_plots)
    print(markdown(summary))
    print(f"Written: {', '.join(map(str, written))}")


def _sets(arguments: argparse.Namespace) -> list[AskedSet]:
    """Questions, each with another one as its decoy; what is of no use is said."""
    from ..channels import Request
    from ..training.data import CrossExample, Example, read_examples
    from .run import AskedSet, Item, choice_item, with_decoys
    from .sets import read_hotpotqa, read_questions

    def crossing(example: Example) -> Item:
        assert isinstance(example, CrossExample)
        contexts = {"sharer": example.sharer_context}
        return Item(example.id, Request(example.question, example.receiver_context, contexts), example.answer)

    found = []
    options = {"limit": arguments.limit, "seed": arguments.seed}
    for source in arguments.data:
        examples = read_examples(source, kind="cross", **options)
        _say(examples.summary(), bool(examples.broken))
        found.append(AskedSet(Path(source).stem, with_decoys([crossing(one) for one in examples.examples])))
    if arguments.hotpotqa is not None:
        hotpotqa = read_hotpotqa(arguments.hotpotqa, **options)
        _say(hotpotqa.summary(), bool(hotpotqa.broken))
        found.append(AskedSet("hotpotqa", with_decoys([crossing(one) for one in hotpotqa.items])))
    for given in arguments.set:
        name, _, source = given.partition("=")
        questions = read_questions(name, source or None, progress=True, **options)
        _say(questions.summary(), bool(questions.broken))
        found.append(AskedSet(name, with_decoys([choice_item(one) for one in questions.items])))
    return found


def _say(text: str, needed: bool) -> None:
    if needed or sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)
