"""``lcf-fast eval``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..training.commands import json_object, template_options_for

if TYPE_CHECKING:
    from ..channels import Agent
    from .asked import Source
    from .run import AskedSet, Entrant, Trial

__all__ = ["add_eval_command"]

_EXAMPLES = """examples:
  lcf-fast eval --out out/eval
      without a download: two small agents, trained on the spot, with all channels; minutes on two cores
  lcf-fast eval --sharer S --receiver R --adapter run/adapter --data questions.jsonl --out results
      lines of sharer_context, receiver_context, question, answer (cross context), or of prompt, response (shared)
  lcf-fast eval --sharer S --receiver R --adapter lcf/adapter --set arc-c --out results
      shared context: multiple choice by the logits of the letters; the set is downloaded
  lcf-fast eval ... --set arc-c=arc.jsonl --limit 200     a local file, and 200 questions of it
  lcf-fast eval ... --spans paragraphs windows:200 sentences one     LCF-X's adapter with its context cut otherwise

The same command goes on where it was stopped. In OUT: predictions.jsonl (a line a question, channel and control),
summary.json, report.md, bytes.png and first_token.png.
"""
_DESCRIPTION = """Ask the receiver over every channel that is at hand, with the matching message, another question's,
zeros, numbers of the same moments, and what the receiver itself makes of what it has read. A gain that survives another
question's message is no content."""

#: Of real models, and of the small agents, whose answers are one token and who know no language.
_DEFAULTS: dict[str, tuple[Any, Any]] = {
    "text_tokens": ([50, 200], [1]),
    "text_instruction": (None, ""),
    "text_template": (None, "{question}{note}"),
    "ratio": ([0.5], [0.3, 0.5, 0.7]),
    "max_new_tokens": (32, 1),
    "batch_size": (8, 25),
    "precision": ("bf16", "fp32"),
}

#: Options that say nothing unless one of these channels is there.
_CARRIED_BY = {"placement": ("slots",), "spans": ("lcf_x", "slots"), "dtype": ("lcf_x", "slots"), "ratio": ("kvcomm",)}


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
    add = parser.add_argument
    add("--sharer", metavar="MODEL", help="a transformers model: folder or hub id; without one: two small agents")
    add("--receiver", metavar="MODEL", help="as --sharer")
    add("--adapter", metavar="DIR", type=Path, action="append", default=[], help="LCF, LCF-X, slots")
    add("--c2c", metavar="DIR", type=Path, help="a fuser of Cache-to-Cache, in its released layout")
    add("--out", metavar="OUT", type=Path, required=True, help="folder of the results")
    own = parser.add_argument_group("the receiver as its own sharer")
    own.add_argument("--own-adapter", metavar="DIR", type=Path, action="append", default=[],
                     help="as --adapter, trained with the receiver in the sharer's place")  # fmt: skip
    own.add_argument("--own-c2c", metavar="DIR", type=Path, help="as --c2c, trained so")
    small = parser.add_argument_group("small agents (without --sharer and --receiver)")
    small.add_argument("--agents", metavar="DIR", type=Path,
                       help="where they are, or are put once trained; default: out/agents")  # fmt: skip
    small.add_argument("--agents-seed", type=int, metavar="N", help="of their training; default: 0")
    small.add_argument("--quick", action="store_true", help="seconds: everything is done, nothing learned")
    asked = parser.add_argument_group("questions")
    asked.add_argument("--data", metavar="SET", action="append", default=[], help="JSON lines, parquet, or a hub id")
    asked.add_argument("--hotpotqa", metavar="FILE", type=Path, help="HotpotQA as published: its bridge questions")
    asked.add_argument("--set", metavar="NAME[=FILE]", action="append", default=[],
                       help=f"multiple choice: {', '.join(SETS)}; without a file from the hub")  # fmt: skip
    asked.add_argument("--limit", type=int, metavar="N", help="of each set N questions, drawn by the seed")
    how = parser.add_argument_group("how")
    how.add_argument("--channels", nargs="+", metavar="NAME", help="these alone; default: all that suit the questions")
    how.add_argument("--no-controls", action="store_true", help="the matching message alone")
    how.add_argument("--compare", nargs="+", metavar="A:B", help="A against B, tested; default: ours against the rest")
    how.add_argument("--text-tokens", type=int, nargs="+", metavar="K", help="longest notes; default: 50 200")
    how.add_argument("--text-instruction", metavar="TEXT", help="to a sharer that writes")
    how.add_argument("--text-template", metavar="TEXT", help="a note in the receiver's prompt; default: {note}")
    how.add_argument("--dtype", default="bfloat16", help="of messages on the wire; default: bfloat16")
    how.add_argument("--placement", choices=["append", "prefix"], help="of slots; default: as they were trained")
    how.add_argument("--spans", nargs="+", metavar="SCHEME", help="of LCF-X: paragraphs, sentences, one, windows:N; "
                     "the first with all controls; default: paragraphs")  # fmt: skip
    how.add_argument("--ratio", type=float, nargs="+", metavar="R",
                     help="of layers that KVComm shares, beside layer 0; default: 0.5")  # fmt: skip
    how.add_argument("--template-options", type=json_object, metavar="JSON",
                     help="for both chat templates; default: as the adapters were trained")  # fmt: skip
    how.add_argument("--max-new-tokens", type=int, metavar="N", help="of an answer; default: 32")
    how.add_argument("--batch-size", type=int, metavar="N", help="questions at a time; default: 8")
    how.add_argument("--precision", choices=["bf16", "fp32"], help="of the models; default: bf16")
    how.add_argument("--device", help="such as cuda or cpu; default: a GPU if there is one")
    how.add_argument("--seed", type=int, default=42, help="of what is drawn; default: 42")
    how.add_argument("--no-plots", action="store_true", help="no pictures, which need matplotlib")
    parser.set_defaults(run=_run)


@dataclass(frozen=True)
class _Material:
    """What takes part in a set, as folders."""

    adapters: tuple[Path, ...]
    own_adapters: tuple[Path, ...]
    c2c: Path | None
    own_c2c: Path | None
    spans: tuple[str, ...]


def _run(arguments: argparse.Namespace) -> None:
    from ..quantization import storage_of
    from ..reading.chat import window_size
    from ..training.models import check_transformers, hide_loading
    from .plots import check_plot
    from .run import check_size
    from .statistics import check_scipy

    check_scipy()
    if not arguments.no_plots:
        check_plot()
    pairs = _pairs(arguments)
    for name in ("batch_size", "max_new_tokens", "limit"):
        if (size := getattr(arguments, name)) is not None:
            check_size(f"--{name.replace('_', '-')}", size)
    for spans in arguments.spans or ():
        window_size(spans)
    storage_of(arguments.dtype)
    hide_loading()
    small = _is_small(arguments)
    if small:
        check_transformers("eval")
    told = [name for name in _CARRIED_BY if getattr(arguments, name) not in (None, "bfloat16")]
    for name, defaults in _DEFAULTS.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, defaults[small])
    wanted = _small_sets(arguments) if small else _sets(arguments)

    from ..devices import chosen_device
    from ..reading.model_fingerprint import model_sample
    from .loading import load_agents
    from .report import markdown
    from .run import evaluate, write_report

    device = chosen_device(arguments.device)
    folders = dict.fromkeys(folder for _, material in wanted for folder in material.adapters + material.own_adapters)
    options = template_options_for(folders, arguments.template_options)
    agents = load_agents(arguments.sharer, arguments.receiver, arguments.precision, device, options)
    trials = _trials(arguments, wanted, agents, device, told)
    names = ("sharer", "receiver", "precision", "limit", "seed")
    settings = {name: getattr(arguments, name) for name in names}
    if options:
        settings["template_options"] = options
    # A path alone would not tell a model that has been trained on since.
    settings["models"] = {role: model_sample(agent.model, arguments.precision) for role, agent in agents.items()}
    summary = evaluate(
        trials,
        arguments.out,
        pairs=pairs,
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
        settings=settings,
        progress=True,
    )
    written = write_report(summary, arguments.out, plots=not arguments.no_plots)
    print(markdown(summary))
    print(f"Written: {', '.join(map(str, written))}")


def _is_small(arguments: argparse.Namespace) -> bool:
    from .failures import EvaluationError

    models = (arguments.sharer, arguments.receiver)
    if all(models):
        for name in ("agents", "agents_seed", "quick"):
            if (given := getattr(arguments, name)) is not None and given is not False:
                expected = "the small agents, which is without --sharer and --receiver"
                raise EvaluationError(f"--{name.replace('_', '-')}", expected=expected, got="both of them")
        return False
    if any(models):
        raise EvaluationError("--sharer and --receiver", expected="both, or neither for the small agents", got="one")
    given = [
        f"--{name.replace('_', '-')}"
        for name in ("adapter", "own_adapter", "c2c", "own_c2c", "data", "hotpotqa", "set")
        if getattr(arguments, name)
    ]
    if given:
        expected = "--sharer and --receiver along with it (the small agents bring their own)"
        raise EvaluationError(given[0], expected=expected, got="neither")
    return True


def _sets(arguments: argparse.Namespace) -> list[tuple[AskedSet, _Material]]:
    from .asked import asked_sets
    from .failures import EvaluationError

    sets = asked_sets(_source(arguments), _say)
    if not sets:
        raise EvaluationError("questions", expected="--data, --hotpotqa or --set", got="none of them")
    adapters = tuple(arguments.adapter), tuple(arguments.own_adapter)
    material = _Material(*adapters, arguments.c2c, arguments.own_c2c, tuple(arguments.spans or ("paragraphs",)))
    return [(asked, material) for asked in sets]


def _small_sets(arguments: argparse.Namespace) -> list[tuple[AskedSet, _Material]]:
    """The small agents' sets; the models and what is missing of them are made."""
    from ..demo.run import FULL, QUICK
    from ..demo.suite import prepare_suite
    from .asked import asked_lines

    plan = QUICK if arguments.quick else FULL
    # Of so little work most would be the start of other processes.
    workers = 1 if arguments.quick else 2
    folder, seed = arguments.agents or Path("out/agents"), arguments.agents_seed or 0
    suite = prepare_suite(folder, seed=seed, plan=plan, workers=workers)
    arguments.sharer, arguments.receiver = str(suite.sharer), str(suite.receiver)
    source = _source(arguments)
    found = []
    for part in suite.sets:
        spans = tuple(arguments.spans or part.spans)
        material = _Material(part.adapters, part.own_adapters, part.c2c, part.own_c2c, spans)
        found.append((asked_lines(str(part.data), source, _say, name=part.name), material))
    return found


def _source(arguments: argparse.Namespace) -> Source:
    from .asked import Source

    data, choices = tuple(arguments.data), tuple(arguments.set)
    decoys = not arguments.no_controls
    return Source(data, arguments.hotpotqa, choices, arguments.limit, arguments.seed, decoys)


def _trials(
    arguments: argparse.Namespace,
    wanted: Sequence[tuple[AskedSet, _Material]],
    agents: dict[str, Agent],
    device: Any,
    told: Sequence[str],
) -> list[Trial]:
    """Who takes part in which set; what serves several sets is loaded once. ``told``: options that are for somebody."""
    from .entrants import suits
    from .failures import EvaluationError
    from .run import Trial

    everyone: dict[_Material, list[Entrant]] = {}
    for _, material in wanted:
        if material not in everyone:
            together = [asked for asked, other in wanted if other == material]
            everyone[material] = _entrants(arguments, agents, device, material, together)
    names = arguments.channels or []
    known = list(dict.fromkeys(entrant.name for some in everyone.values() for entrant in some))
    for name in names:
        if name not in known:
            raise EvaluationError("--channels", expected=f"some of {', '.join(known)}", got=repr(name))
    for name in told:
        if not any(each.startswith(_CARRIED_BY[name]) for each in known):
            expected = f"{' or '.join(_CARRIED_BY[name])} among the channels, which it is of"
            raise EvaluationError(f"--{name}", expected=expected, got=", ".join(known))
    trials = []
    for asked, material in wanted:
        able = [one for one in everyone[material] if suits(one, asked) and (not names or one.name in names)]
        if able:
            trials.append(Trial(asked, tuple(able)))
        else:
            _say(f"{asked.name}: left out: none of {', '.join(names)} suits it", True)
    if not trials:
        expected = "a channel that suits the questions (of cross or of shared context)"
        raise EvaluationError("--channels", expected=expected, got=", ".join(names))
    return trials


def _entrants(
    arguments: argparse.Namespace,
    agents: dict[str, Agent],
    device: Any,
    material: _Material,
    sets: Sequence[AskedSet],
) -> list[Entrant]:
    from .entrants import entrants
    from .loading import load_adapters, load_fuser

    receiver, sharer = agents["receiver"], agents["sharer"]
    theirs = {"sharer": sharer.model, "receiver": receiver.model}
    own = dict.fromkeys(theirs, receiver.model)
    options = {"instruction": arguments.text_instruction, "template": arguments.text_template}
    crossing = (item.request for asked in sets for item in asked.items if item.request.sharer_contexts)
    # KVComm serves fewer models than the others: whoever leaves it out must not be stopped by its calibration.
    sharing = not arguments.channels or any(name.startswith("kvcomm") for name in arguments.channels)
    return entrants(
        receiver,
        sharer,
        adapters=load_adapters(material.adapters, theirs, device),
        own_adapters=load_adapters(material.own_adapters, own, device),
        fuser=None if material.c2c is None else load_fuser(material.c2c, theirs, device),
        own_fuser=None if material.own_c2c is None else load_fuser(material.own_c2c, own, device),
        text_tokens=arguments.text_tokens,
        text_options={name: value for name, value in options.items() if value is not None},
        dtype=arguments.dtype,
        placement=arguments.placement,
        spans=material.spans,
        ratios=arguments.ratio,
        calibration=next(crossing, None) if sharing else None,
        controls=not arguments.no_controls,
        seed=arguments.seed,
    )


def _pairs(arguments: argparse.Namespace) -> list[tuple[str, str]] | None:
    from .failures import EvaluationError

    if arguments.compare is None:
        return None
    made = []
    for given in arguments.compare:
        first, _, second = given.partition(":")
        if not first or not second or first == second:
            raise EvaluationError("--compare", expected="two channels as FIRST:SECOND", got=repr(given))
        made.append((first, second))
    return made


def _say(text: str, needed: bool) -> None:
    if needed or sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)
