"""``lcf-fast prune``: an adapter's layers ranked, and the best of them saved as an adapter."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .commands import json_object, layer_list, stored_prefills, template_options_for

if TYPE_CHECKING:
    from ..adapter import LatentCacheFlow
    from ..pruning import PruningReport
    from .batches import Batch, ExampleData
    from .held_out import HeldOutLoss
    from .step import Prefiller

__all__ = ["add_prune_command"]

_EXAMPLES = """examples:
  lcf-fast prune run/adapter nine --keep 9 --sharer S --receiver R --data set.jsonl --plot layers.png
      drop dead and harmful layers, keep the nine that the receiver's loss on held-out examples needs most
  lcf-fast prune run/adapter better --sharer S --receiver R --data set.jsonl
      drop dead and harmful layers only
  lcf-fast prune run/adapter live --audit-only           drop dead layers only; reads neither models nor data
  lcf-fast prune run/adapter six --layers 6,8-10,15,21   keep these

Of --data it reads what lcf-fast train leaves out with the same --held-out; with --held-out 0 all of it.
"""
_NEEDED = ("sharer", "receiver", "data")
#: All that is for measuring, and what it is where nothing is given.
_MEASURING: dict[str, Any] = {
    **dict.fromkeys((*_NEEDED, "cached", "device", "held_out", "max_tokens", "template_options")),
    **{"precision": "bf16", "split": "train", "examples": 256, "seed": 42, "micro_batch_size": 4, "on_error": "skip"},
}


def add_prune_command(commands: Any) -> None:
    """Add ``lcf-fast prune`` to the subparsers ``commands``."""
    parser = commands.add_parser(
        "prune",
        help="keep the layers of an adapter that matter",
        description="Rank an adapter's layers by their gates and by what the receiver's loss is without each;"
        "\nsave an adapter of the best of them. Nothing is trained.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("adapter", metavar="ADAPTER", type=Path, help="a trained adapter's folder")
    parser.add_argument("out", metavar="OUT", type=Path, help="the pruned adapter's folder, a new one")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--keep", type=int, metavar="K", help="the K most important; default: all but dead and harmful")
    which.add_argument("--audit-only", action="store_true", help="all but those whose gates are both closed")
    which.add_argument("--layers", type=layer_list, metavar="LAYERS", help="these, such as 6,8-10; nothing is measured")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="write gates and importance as a PNG (matplotlib)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")
    models = parser.add_argument_group("models, which ranking needs")
    models.add_argument("--sharer", metavar="MODEL", help="a transformers model: folder or hub id")
    models.add_argument("--receiver", metavar="MODEL", help="as --sharer; may be the same")
    models.add_argument("--precision", choices=["bf16", "fp32"], help="of both models; default: bf16")
    models.add_argument("--device", help="such as cuda or cpu; default: a GPU if there is one")
    data = parser.add_argument_group("data, which ranking needs")
    data.add_argument("--data", metavar="SET", help="JSON lines, parquet, or a data set's hub id")
    data.add_argument("--split", help="of a hub's set; default: train")
    data.add_argument(
        "--held-out",
        type=float,
        metavar="FRACTION",
        help="that training left out, to be read here; 0: read all; default: as of lcf-fast train, 0.01, for LCF-X 0",
    )
    data.add_argument("--examples", type=int, metavar="N", help="read at most N of them; default: 256")
    data.add_argument("--seed", type=int, help="which N; default: 42")
    data.add_argument("--micro-batch-size", type=int, metavar="N", help="examples at a time; default: 4")
    most = "longest sequence; default: 2048, or the models' limit if less"
    data.add_argument("--max-tokens", type=int, metavar="N", help=most)
    as_trained = "for both chat templates; default: as the adapter was trained"
    data.add_argument("--cached", metavar="DIR", type=Path, help="prefills of them that lcf-fast cache stored")
    data.add_argument("--on-error", choices=["skip", "refuse"], help="of broken ones; default: skip")
    data.add_argument("--template-options", type=json_object, metavar="JSON", help=as_trained)
    parser.set_defaults(run=_prune, **_MEASURING)


@dataclass(frozen=True)
class _Measured:
    """Models and examples, ready to be read."""

    receiver: Any
    prefiller: Prefiller
    data: ExampleData
    ids: tuple[str, ...]
    size: int
    shown: bool

    def batches(self, what: str) -> Iterator[Batch]:
        from ..counting import counted

        places = range(0, len(self.ids), self.size)
        for start in counted(places, what, total=len(places), shown=self.shown):
            yield self.data.of(self.ids[start : start + self.size])


def _prune(arguments: argparse.Namespace) -> None:
    from ..pruning import PruningError, audit_gates, check_matplotlib
    from .failures import RunError

    if arguments.plot is not None:
        check_matplotlib()
        if not arguments.plot.absolute().parent.is_dir():
            raise RunError("--plot", expected="a file in a folder that is there", got=str(arguments.plot))
    adapter, configs = _load_adapter(arguments)
    parameters = adapter.parameter_count()
    report, measured = audit_gates(adapter), None
    by_name = arguments.layers is not None
    if not (arguments.audit_only or by_name):
        measured = _measure(arguments, adapter, configs, report)
        report = _rank(adapter, measured)
    try:
        kept = tuple(sorted(arguments.layers)) if by_name else report.keep(arguments.keep)
        adapter.prune(kept)
        adapter.save_pretrained(arguments.out)
    except (PruningError, OSError):
        if measured is not None:  # that work is not lost
            _show(arguments, report, (), None)
        raise
    after = None if measured is None else _loss(adapter, measured)
    _show(arguments, report, kept, after)
    if not arguments.json:
        print(
            f"{arguments.out}: {len(kept)} of {len(report.layers)} layers,"
            f" {adapter.parameter_count():,} of {parameters:,} parameters"
        )
        if after is not None and report.whole is not None:
            print(
                f"loss {report.whole:.4f} with all layers, {after.edited:.4f} with those kept, {after.alone:.4f} with"
                f" none ({after.examples:,} examples, {after.response_tokens:,} response tokens)"
            )


def _load_adapter(arguments: argparse.Namespace) -> tuple[LatentCacheFlow, dict[str, Any]]:
    """The adapter and the models' configurations, all arguments checked that need no models' weights."""
    from ..adapter import LatentCacheFlow
    from ..checkpoint import CONFIG_FILE, has_slots
    from ..errors import IndexRangeError
    from .failures import RunError
    from .models import geometry_of, load_config

    if (arguments.out / CONFIG_FILE).exists():
        raise RunError("OUT", expected="a folder without an adapter", got=f"{arguments.out}, which holds one")
    if arguments.out.exists() and not arguments.out.is_dir():
        raise RunError("OUT", expected="a folder, or none yet", got=f"{arguments.out}, a file")
    if has_slots(arguments.adapter):  # before models are asked for, which would not help
        expected = "LCF or LCF-X (slots adapters are not pruned: every layer has slots)"
        raise RunError("ADAPTER", expected=expected, got=f"{arguments.adapter}, an adapter of slots")
    given = [name for name, default in _MEASURING.items() if getattr(arguments, name) != default]
    if arguments.audit_only or arguments.layers is not None:
        if given:
            option = "--audit-only" if arguments.audit_only else "--layers"
            got = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise RunError(option, expected="no models and data, which nothing is measured on", got=got)
    elif missing := [f"--{name}" for name in _NEEDED if name not in given]:
        got = f"no {', '.join(missing)}"
        raise RunError("lcf-fast prune", expected="models and data to rank layers with (or --audit-only)", got=got)
    configs = {role: load_config(role, getattr(arguments, role)) for role in _NEEDED[:2]} if given else {}
    models: dict[str, Any] = {role: geometry_of(role, config) for role, config in configs.items()}
    adapter = LatentCacheFlow.from_pretrained(arguments.adapter, **models)
    held = adapter.receiver_layers.tolist()
    for layer in arguments.layers or ():
        if layer not in held:
            raise IndexRangeError("--layers", expected=f"receiver layers among {held}", got=str(layer))
    return adapter, configs


def _measure(
    arguments: argparse.Namespace, adapter: LatentCacheFlow, configs: dict[str, Any], report: PruningReport
) -> _Measured:
    """Data, then models: what is cheap to find wrong first."""
    from ..devices import chosen_device
    from ..pruning import PruningError, live_layers
    from ..reading.data_errors import DataError
    from .batches import ExampleData
    from .data import read_examples
    from .models import hide_loading, load_model, load_tokenizer, longest_sequence
    from .settings import TrainingSettings
    from .step import OnlinePrefills, frozen

    live, shown = len(live_layers(report)), not arguments.quiet
    if arguments.keep is not None and not 1 <= arguments.keep <= live:
        got = str(arguments.keep)
        raise PruningError("--keep", expected=f"1 to {live}, the layers with an open gate", got=got)
    for name in ("examples", "micro_batch_size"):
        if (value := getattr(arguments, name)) < 1:
            raise DataError(f"--{name.replace('_', '-')}", expected="1 or more", got=str(value))
    device = chosen_device(arguments.device)
    if not shown:
        hide_loading()
    tokenizers = {f"{role}_tokenizer": load_tokenizer(role, getattr(arguments, role)) for role in _NEEDED[:2]}
    crossing = adapter.config.cross_context
    kind: Any = "cross" if crossing else "shared"
    examples = read_examples(
        arguments.data, kind=kind, split=arguments.split, on_error=arguments.on_error, progress=shown
    )
    _say(shown or bool(examples.broken), examples.summary())
    fraction = arguments.held_out
    if fraction is None:
        fraction = 0.0 if crossing else 0.01
    if fraction:
        every, examples = len(examples), examples.held_out(fraction)[1]
        if not len(examples):
            expected = "a fraction that is an example or more, or 0 to read all of --data"
            raise DataError("--held-out", expected=expected, got=f"{fraction} of {every} examples: none")
    settings = TrainingSettings(
        steps=min(len(examples), arguments.examples),
        batch_size=1,
        micro_batch_size=1,
        max_tokens=longest_sequence(configs, TrainingSettings.max_tokens, arguments.max_tokens),
        seed=arguments.seed,
        precision=arguments.precision,
        device=arguments.device,
    )
    data = ExampleData(
        examples,
        settings=settings,
        on_error=arguments.on_error,
        template_options=template_options_for([arguments.adapter], arguments.template_options),
        progress=shown,
        **tokenizers,
    )
    _say(not shown and bool(data.left_out), data.summary())
    # Where examples are left out, the last steps begin the next epoch.
    ids = tuple(dict.fromkeys(id for step in range(settings.steps) for id in data.ids(step)))

    options: dict[str, Any] = {"device": device, "precision": arguments.precision}
    receiver = frozen(load_model("receiver", arguments.receiver, arguments.precision), **options)
    adapter.to(device)
    prefiller: Prefiller
    if arguments.cached is not None:
        prefiller = stored_prefills(arguments, adapter, receiver, settings)
    elif arguments.sharer == arguments.receiver:
        prefiller = OnlinePrefills(receiver, receiver)
    else:
        sharer = frozen(load_model("sharer", arguments.sharer, arguments.precision), **options)
        prefiller = OnlinePrefills(sharer, receiver)
    return _Measured(receiver, prefiller, data, ids, arguments.micro_batch_size, shown)


def _rank(adapter: LatentCacheFlow, measured: _Measured) -> PruningReport:
    from .ablation import rank_layers_by_loss
    from .step import TrainingStep

    step = TrainingStep(adapter, measured.receiver, measured.prefiller)
    return rank_layers_by_loss(step, measured.prefiller, measured.batches("batches, each with every ablation"))


def _loss(adapter: LatentCacheFlow, measured: _Measured) -> HeldOutLoss:
    """Of the pruned adapter, on the same examples."""
    from .held_out import held_out_loss
    from .step import TrainingStep

    step = TrainingStep(adapter, measured.receiver, measured.prefiller)
    return held_out_loss(step, measured.prefiller, measured.batches("batches, with the layers kept"))


# --- what is shown
# ---------------------------------------------------------------------


def _show(arguments: argparse.Namespace, report: PruningReport, kept: Sequence[int], after: HeldOutLoss | None) -> None:
    from ..pruning import write_plot

    if arguments.json:
        found = {**report.to_dict(), "kept": list(kept), "pruned": None if after is None else after.edited}
        print(json.dumps(found, indent=1))
    else:
        _print_table(report, kept)
    if arguments.plot is not None:
        write_plot(report, arguments.plot, kept)


def _print_table(report: PruningReport, kept: Sequence[int]) -> None:
    from rich.console import Console
    from rich.table import Table

    ranks = {layer: str(i) for i, layer in enumerate(report.ranked(), 1)}
    table = Table()
    for name in ("layer", "key gate", "value gate", "verdict", "loss without it", "importance", "rank", "kept"):
        table.add_column(name, justify="right")
    for layer in report.layers:
        table.add_row(
            str(layer.receiver_layer),
            f"{layer.key_gate:+.2e}",
            f"{layer.value_gate:+.2e}",
            layer.verdict,
            "-" if layer.metric_without is None else f"{layer.metric_without:.4f}",
            "-" if layer.importance is None else f"{layer.importance:+.2e}",
            ranks.get(layer.receiver_layer, "-"),
            "yes" if layer.receiver_layer in kept else "no",
        )
    # Into a file or a pipe nothing is to be cut off at the width of a terminal.
    Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 120).print(table)


def _say(shown: bool, text: str) -> None:
    if shown:
        print(text, file=sys.stderr, flush=True)
