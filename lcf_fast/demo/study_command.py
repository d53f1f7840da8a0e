"""``lcf-fast study``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

__all__ = ["add_study_command"]

_EXAMPLES = """examples:
  lcf-fast study --out out/slots                       the table: five seeds of each method; 40 minutes on two cores
  lcf-fast study --out out/slots --methods slots_8 slots_8_shared slots_8_prefix     the same folder, other rows
  lcf-fast study --out out/slots --seeds 0 --methods lcf_x slots_8      one seed
  lcf-fast study --out out/try --quick                 everything in seconds, with nothing learned
"""
_DESCRIPTION = """How much does a message hold? On one small model, as sharer and receiver: LCF, LCF-X and messages of
slots, trained alike on one to eight facts at a time, asked about their own message, another item's, and zeros. The same
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
    parser.add_argument("--methods", nargs="+", default=None, metavar="NAME",
                        help="lcf, lcf_x, slots_K; or slots_K_ and what is changed: per_span (K for each fact by "
                        "itself), dropout (any number can be sent), shared (queries, by all heads), one_block, prefix, "
                        "guard; default: lcf lcf_x slots_1 slots_2 slots_4 slots_8 slots_16 "
                        "slots_1_per_span")  # fmt: skip
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each; default: 2")
    parser.add_argument("--quick", action="store_true", help="seconds: everything is done, nothing learned")
    parser.add_argument("--no-plot", action="store_true", help="no picture, which needs matplotlib")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from ..errors import IndexRangeError
    from ..training.models import check_transformers, hide_loading
    from .report import check_plot
    from .slot_report import study_markdown, write_study
    from .slot_study import FULL_STUDY, QUICK_STUDY, run_study
    from .study_methods import METHODS, method_of

    for name, values, least, most in (
        ("--seeds", arguments.seeds, 0, 10**6),
        ("--workers", [arguments.workers], 1, 64),
    ):
        for value in values:
            if not least <= value <= most:
                raise IndexRangeError(name, expected=f"{least} to {most}", got=str(value))
    methods = list(dict.fromkeys(arguments.methods or METHODS))
    for key in methods:
        method_of(key)
    if not arguments.no_plot:
        check_plot()
    check_transformers("study")
    hide_loading()
    study = run_study(
        QUICK_STUDY if arguments.quick else FULL_STUDY,
        arguments.out,
        seeds=list(dict.fromkeys(arguments.seeds)),
        methods=methods,
        workers=arguments.workers,
    )
    written = write_study(study, arguments.out, plot=not arguments.no_plot)
    print(study_markdown(study))
    print(f"Written: {', '.join(map(str, written))}")
