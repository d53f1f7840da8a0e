"""``lcf-fast demo``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

__all__ = ["add_demo_command"]

_EXAMPLES = """examples:
  lcf-fast demo                      1, 2 and 4 facts with LCF-X, a secret table with LCF; minutes on two cores
  lcf-fast demo --slots 8            8 slots, too: a message that holds more than one thing
  lcf-fast demo --seed 3 --facts 1   other agents, other items; one fact alone
  lcf-fast demo --quick              everything in seconds, with nothing learned
"""
_DESCRIPTION = """Two small agents are trained from scratch; the sharer then knows what the receiver does not. What does
the receiver answer with no message, the matching message, another item's message, a zero message, and with the
facts as text? Writes demo.json, demo.png and the adapters."""


def add_demo_command(commands: Any) -> None:
    """Add ``demo`` to the subparsers."""
    parser = commands.add_parser(
        "demo",
        help="see that a message carries content: two agents trained on the spot",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", metavar="FOLDER", type=Path, default=Path("out/demo"), help="default: out/demo")
    parser.add_argument("--seed", type=int, default=0, help="of weights, table and items; default: 0")
    parser.add_argument("--facts", type=int, nargs="+", default=None, metavar="N", help="1 to 4; default: 1 2 4")
    parser.add_argument("--slots", type=int, nargs="+", default=[], metavar="K", help="slots, too; default: none")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each; default: 2")
    parser.add_argument("--quick", action="store_true", help="seconds: everything is done, nothing learned")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Refuse what cannot be done, then do it all."""
    from ..errors import IndexRangeError
    from ..files import sweep
    from ..training.models import check_transformers, hide_loading
    from .statistics import check_scipy

    most = 4
    facts = arguments.facts or ([1] if arguments.quick else [1, 2, 4])
    for name, values, least, limit in (
        ("--facts", facts, 1, most),
        ("--seed", [arguments.seed], 0, 10**9),
        ("--workers", [arguments.workers], 1, 64),
        ("--slots", arguments.slots, 1, 64),
    ):
        for value in values:
            if not least <= value <= limit:
                raise IndexRangeError(name, expected=f"{least} to {limit}", got=str(value))
    check_scipy()
    check_transformers("demo")
    hide_loading()
    from .report import check_plot, print_results, write_json, write_png

    check_plot()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    sweep(out)

    from rich.console import Console

    from .run import FULL, QUICK, run_demo

    plan = QUICK if arguments.quick else FULL
    slots = sorted(set(arguments.slots))
    if len(slots) > 6:
        raise IndexRangeError("--slots", expected="6 numbers at most", got=str(len(slots)))
    results = run_demo(
        plan, facts=sorted(set(facts)), seed=arguments.seed, out=out, workers=arguments.workers, slots=slots
    )
    write_json(results, out / "demo.json")
    write_png(results, out / "demo.png")
    # Into a file or a pipe nothing is to be cut off at the width of a terminal.
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 160)
    print_results(console, results)
    console.print(f"Written: {out / 'demo.json'}, {out / 'demo.png'}, {out / 'adapters'}")
