"""``lcf-fast study``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

__all__ = ["add_study_command"]

_EXAMPLES = """examples:
  lcf-fast study --out out/slots                       five seeds, LCF-X and 1 to 16 slots; half an hour on two cores
  lcf-fast study --out out/slots --seeds 0 --slots 0 8     one seed; 0 slots: LCF-X
  lcf-fast study --out out/try --quick                 everything in seconds, with nothing learned
"""
_DESCRIPTION = """How much does a message hold? On one small model, as sharer and receiver: LCF-X and messages of slots,
trained alike on one to eight facts at a time, asked about their own message, another item's, and zeros. The same
command goes on where it was stopped. Writes study.json, study.md and study.png."""


def add_study_command(commands: Any) -> None:
    """Add ``study`` to the subparsers."""
    parser = commands.add_parser(
        "study",
        help="see how much a message holds: LCF-X and slots, over seeds",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", metavar="FOLDER", type=Path, default=Path("out/slots"), help="default: out/slots")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], metavar="N", help="default: 0 to 4")
    parser.add_argument("--slots", type=int, nargs="+", default=[0, 1, 2, 4, 8, 16], metavar="K",
                        help="numbers of slots, 0 for LCF-X; default: 0 1 2 4 8 16")  # fmt: skip
    parser.add_argument("--dropout", type=int, default=8, metavar="K",
                        help="slots of one more, of which any number can be sent; 0: none; default: 8")  # fmt: skip
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each; default: 2")
    parser.add_argument("--quick", action="store_true", help="seconds: everything is done, nothing learned")
    parser.add_argument("--no-plot", action="store_true", help="no picture, which needs matplotlib")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from ..errors import IndexRangeError
    from ..training.models import hide_loading
    from .report import check_plot
    from .slot_report import study_markdown, write_study
    from .slot_study import FULL_STUDY, QUICK_STUDY, run_study

    for name, values, least, most in (
        ("--seeds", arguments.seeds, 0, 10**6),
        ("--slots", arguments.slots, 0, 64),
        ("--dropout", [arguments.dropout], 0, 64),
        ("--workers", [arguments.workers], 1, 64),
    ):
        for value in values:
            if not least <= value <= most:
                raise IndexRangeError(name, expected=f"{least} to {most}", got=str(value))
    if not arguments.no_plot:
        check_plot()
    hide_loading()
    study = run_study(
        QUICK_STUDY if arguments.quick else FULL_STUDY,
        arguments.out,
        seeds=list(dict.fromkeys(arguments.seeds)),
        slots=list(dict.fromkeys(arguments.slots)),
        dropout=arguments.dropout or None,
        workers=arguments.workers,
    )
    written = write_study(study, arguments.out, plot=not arguments.no_plot)
    print(study_markdown(study))
    print(f"Written: {', '.join(map(str, written))}")
