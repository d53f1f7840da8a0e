"""The command ``lcf-fast``: subcommands, and what they print.

Each subcommand is a function that adds its parser and one that runs; what a run needs is imported when it runs, so
that ``--help`` is quick. Bad input ends with one line on standard error and the exit code 2.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .demo.command import add_demo_command
from .demo.study_command import add_study_command
from .errors import CheckpointError, LCFError
from .evaluation.eval_command import add_eval_command
from .evaluation.latency_command import add_latency_command
from .training.commands import add_cache_command, add_train_command
from .training.converters import add_convert_command
from .training.prune_command import add_prune_command

if TYPE_CHECKING:
    from rich.console import Console

    from .inspection import AdapterReport, MessageReport, SideReport, SlotsReport

__all__ = ["main"]

#: What is said of a command that Ctrl-C has stopped, where it has kept what it had done.
_GOES_ON = dict.fromkeys(("cache", "eval", "latency", "study"), "; the same command goes on from there")
#: Rows of a table of spans; a message may carry thousands.
_MOST_SPANS = 20


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; ``argv`` without the program's name, None: the process's own."""
    parser = argparse.ArgumentParser(prog="lcf-fast", description="Latent Cache Flow: adapters and messages.")
    parser.add_argument("--version", action="version", version=f"lcf-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_inspect(commands)
    add_convert_command(commands)
    add_train_command(commands)
    add_cache_command(commands)
    add_prune_command(commands)
    add_eval_command(commands)
    add_latency_command(commands)
    add_demo_command(commands)
    add_study_command(commands)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except (LCFError, OSError) as error:
        said = str(error)
        if isinstance(error, OSError) and error.strerror:
            said = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
        print(f"lcf-fast {arguments.command}: error: {_printable(said)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"lcf-fast {arguments.command}: stopped{_GOES_ON.get(arguments.command, '')}", file=sys.stderr)
        return 130
    return 0


# --- inspect
# ---------------------------------------------------------------------

_EXAMPLES = """examples:
  lcf-fast inspect adapters/qwen            an adapter's folder: geometry, parameters, gates and norms a layer
  lcf-fast inspect sides/qwen               a sharer's half by itself: the same, and whom its messages are for
  lcf-fast inspect notes.lcf                a message's file: sizes, origin, norms a layer, weight a span, tokens a slot
  lcf-fast inspect notes.lcf --plot w.png   layers by spans (or by items), or slots by tokens, as a heat map
  lcf-fast inspect notes.lcf --json         the same as JSON, with every number
"""


def _add_inspect(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect",
        help="look inside an adapter or a message",
        description="Look inside an adapter or a message. Nothing in the file is trusted, and nothing unpickled.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = "a folder of an adapter or a sharer's half, or a message's file"
    parser.add_argument("path", metavar="PATH", type=Path, help=what)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="write a PNG heat map (needs matplotlib)")
    parser.add_argument("--item", type=int, help="the item whose spans or slots are shown; default: 0")
    parser.add_argument("--key-file", metavar="FILE", type=Path, help="the key that the message was written with")
    parser.add_argument("--max-bytes", type=int, metavar="N", help="refuse longer messages; default: 64 MiB")
    parser.set_defaults(run=_inspect)


def _inspect(arguments: argparse.Namespace) -> None:
    from .inspection import AdapterReport, SideReport, SlotsReport, inspect, write_png
    from .message import MAX_BYTES

    for name in ("item", "key_file", "max_bytes"):
        if getattr(arguments, name) is not None and arguments.path.is_dir():
            expected, got = "a message's file beside it", f"{arguments.path}, a folder"
            raise CheckpointError(f"--{name.replace('_', '-')}", expected=expected, got=got)
    item = arguments.item or 0
    key = None if arguments.key_file is None else arguments.key_file.read_bytes()
    most = MAX_BYTES if arguments.max_bytes is None else arguments.max_bytes
    report, maps = inspect(arguments.path, key=key, max_bytes=most, item=item)
    if arguments.plot is not None:
        write_png(maps, arguments.plot)
    if arguments.json:
        print(json.dumps(asdict(report), indent=1))
    elif isinstance(report, AdapterReport):
        _print_adapter(_console(), report)
    elif isinstance(report, SlotsReport):
        _print_slots(_console(), report)
    elif isinstance(report, SideReport):
        _print_side(_console(), report)
    else:
        _print_message(_console(), report, item)


def _print_adapter(console: Console, report: AdapterReport) -> None:
    kept, every = len(report.layers), report.receiver[0]
    _facts(
        console,
        f"{report.kind} adapter {report.path}",
        {
            "sharer": _geometry(report.sharer),
            "receiver": _geometry(report.receiver),
            "kept layers": f"{kept} of {every}",
            "bottleneck": str(report.bottleneck),
            "parameters": f"{report.parameters:,} ({report.dtype})",
            "bytes": f"{report.parameter_bytes:,} of parameters, {report.file_bytes:,} on disk",
            "open gates": f"{report.open_gates} of {2 * kept}",
        },
    )
    _table(
        console,
        ("layer", "reads", "key gate", "value gate", "|down| sharer", "|down| receiver", "|up| key", "|up| value"),
        (
            (
                str(layer.receiver_layer),
                str(layer.sharer_layer),
                f"{layer.key_gate:+.3g} {'open' if layer.key_open else 'shut'}",
                f"{layer.value_gate:+.3g} {'open' if layer.value_open else 'shut'}",
                f"{layer.down_sharer_norm:.4g}",
                f"{layer.down_receiver_norm:.4g}",
                f"{layer.up_key_norm:.4g}",
                f"{layer.up_value_norm:.4g}",
            )
            for layer in report.layers
        ),
    )


def _print_slots(console: Console, report: SlotsReport) -> None:
    _facts(
        console,
        f"slots adapter {report.path}",
        {
            "sharer": _geometry(report.sharer),
            "receiver": _geometry(report.receiver),
            "slots": str(report.slots),
            "placement": report.placement or "not said (append)",
            "bottleneck": str(report.bottleneck),
            "parameters": f"{report.parameters:,} ({report.dtype})",
            "bytes": f"{report.parameter_bytes:,} of parameters, {report.file_bytes:,} on disk",
            "a message": f"{report.message_bytes:,} bytes in bfloat16, and its header",
        },
    )
    _table(
        console,
        ("layer", "reads", "|query|, mean of slots", "|embedding|, mean of slots", "|down|", "|up| key", "|up| value"),
        (
            (
                str(layer.receiver_layer),
                str(layer.sharer_layer),
                _mean(layer.query_norms),
                _mean(layer.embedding_norms),
                f"{layer.down_norm:.4g}",
                f"{layer.up_key_norm:.4g}",
                f"{layer.up_value_norm:.4g}",
            )
            for layer in report.layers
        ),
    )


def _print_side(console: Console, report: SideReport) -> None:
    _facts(
        console,
        f"sharer's half of {report.kind} {report.path}",
        {
            "sharer": _geometry(report.sharer),
            "receiver": _geometry(report.receiver),
            **({"slots": str(report.slots)} if report.slots else {}),
            "bottleneck": str(report.bottleneck),
            "parameters": f"{report.parameters:,} ({report.dtype})",
            "bytes": f"{report.parameter_bytes:,} of parameters, {report.file_bytes:,} on disk",
            "for adapter": report.adapter_digest,
            "itself": report.sharer_digest,
        },
    )
    queries = ("|query|, mean of slots", "|embedding|, mean of slots") if report.slots else ("|span|", "|global|")
    _table(
        console,
        ("layer", "reads", *queries, "|down|"),
        (
            (
                str(layer.receiver_layer),
                str(layer.sharer_layer),
                *(
                    (_mean(layer.query_norms), _mean(layer.embedding_norms))
                    if report.slots
                    else (f"{norm:.4g}" for norm in layer.query_norms)
                ),
                f"{layer.down_norm:.4g}",
            )
            for layer in report.layers
        ),
    )


def _print_message(console: Console, report: MessageReport, item: int) -> None:
    total = report.header_bytes + report.payload_bytes
    facts = {
        "form": f"version {report.version}, {'signed with a key' if report.keyed else 'checksum only, no key'}",
        "bytes": f"{total:,} = header {report.header_bytes:,} + payload {report.payload_bytes:,}",
        "stored as": ", ".join(f"{name} {dtype}" for name, dtype in report.stored_as.items()),
        "sharer": _geometry(report.sharer),
        "receiver": _geometry(report.receiver),
        "layers": f"{len(report.layers)} of {report.receiver[0]}",
        "width": "no latent" if report.width is None else str(report.width),
        "items": str(report.batch),
        **({"slots": str(report.slots)} if report.slots else {"spans": str(report.spans)}),
        "for adapter": report.adapter_digest,
        "made by": report.sharer_digest,
    }
    facts |= {f"metadata {name}": text for name, text in report.metadata.items()}
    _facts(console, f"message {report.path}", facts)
    _table(
        console,
        ("layer", "|latent|", "|K*|", "|V*|"),
        (
            (str(layer.receiver_layer), *map(_mean, (layer.latent_norms, layer.key_norms, layer.value_norms)))
            for layer in report.layers
        ),
        title=None if report.batch == 1 else f"norms, mean of {report.batch} items",
    )
    if report.slots_of is not None:
        slots = report.slots_of[item]
        _table(
            console,
            ("slot", "spread over, tokens", "tokens that weigh most: weight"),
            (
                (
                    str(slot.slot),
                    f"{slot.effective:.1f}",
                    ", ".join(f"{token}: {weight:.3f}" for token, weight in zip(slot.tokens, slot.weights)),
                )
                for slot in slots[:_MOST_SPANS]
            ),
            title=f"what each slot drew on, item {item}, mean over heads and layers"
            + ("" if len(slots) <= _MOST_SPANS else f": the first {_MOST_SPANS} of {len(slots)}"),
        )
    if report.spans_of is not None:
        spans = sorted(report.spans_of[item], key=lambda span: -span.mean_weight)
        shown = spans[:_MOST_SPANS]
        title = f"attention weight of each span, item {item}, mean over heads"
        _table(
            console,
            ("span", "mean over layers", "largest", "in layer"),
            (
                (str(span.span), f"{span.mean_weight:.4f}", f"{span.strongest_weight:.4f}", str(span.strongest_layer))
                for span in shown
            ),
            title=title if len(shown) == len(spans) else f"{title}: the {len(shown)} heaviest of {len(spans)}",
        )


# --- printing
# ---------------------------------------------------------------------


def _console() -> Console:
    from rich.console import Console

    # Into a file or a pipe nothing is to be cut off at the width of a terminal.
    return Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 160)


def _facts(console: Console, title: str, facts: dict[str, str]) -> None:
    from rich.table import Table

    console.print(_printable(title), style="bold")
    table = Table(box=None, show_header=False)
    for name, value in facts.items():
        table.add_row(_text(name), _text(value))
    console.print(table)


def _table(console: Console, header: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    from rich.table import Table

    if title is not None:  # on a line of its own: the table's own title would be broken at the table's width
        console.print(title)
    table = Table()
    for name in header:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*map(_text, row))
    console.print(table)


def _text(value: str) -> Any:
    from rich.text import Text

    return Text(_printable(value))


def _printable(text: str) -> str:
    """Without what could steer a terminal: a message's metadata is a stranger's."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def _geometry(sizes: Sequence[int]) -> str:
    return "{} layers, {} KV heads, head dim {}".format(*sizes)


def _mean(norms: Sequence[float] | None) -> str:
    return "-" if norms is None else f"{sum(norms) / len(norms):.4g}"


if __name__ == "__main__":
    sys.exit(main())
