"""``lcf-fast train`` and ``lcf-fast cache``: from two models and a data set to an adapter.

Both take what fixes the examples and their order in the same arguments, so that a store holds what the run reads.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..adapter import LatentCacheFlow
    from ..config import CacheGeometry, LCFConfig
    from ..slots import LatentSlots
    from .batches import ExampleData
    from .data import ExampleSet
    from .prefills import StoredPrefills
    from .settings import TrainingSettings
    from .trainer import Trainer

__all__ = ["add_cache_command", "add_train_command", "json_object", "layer_list", "stored_prefills"]
__all__ += ["template_options_for"]

_TRAIN_EXAMPLES = """examples:
  lcf-fast train --sharer Qwen/Qwen2.5-0.5B-Instruct --receiver Qwen/Qwen3-0.6B --data openhermes.jsonl --out run
      LCF by the published protocol: 300 steps of 260 examples
  lcf-fast train --cross-context --sharer Qwen/Qwen3-0.6B --receiver Qwen/Qwen3-0.6B --data hotpotqa.jsonl --out run
      LCF-X by its protocol: 276 steps of 256 examples
  lcf-fast train --slots 8 --sharer Qwen/Qwen3-0.6B --receiver Qwen/Qwen3-0.6B --data hotpotqa.jsonl --out run
      8 slots of another context as positions of the receiver's cache; --slot-dropout trains for 1 to 8 of them
  lcf-fast train ... --out run --resume             go on from the newest checkpoint, bitwise as if it had not stopped
  torchrun --nproc-per-node 4 -m lcf_fast.cli train ... --out run         the same run on four GPUs
  lcf-fast train ... --cached prefills --out run    on what lcf-fast cache stored with the same arguments

In OUT: log.jsonl (a line a step), checkpoints/, tensorboard/ (if it is installed), and in the end adapter/
and held_out.json.
"""
_CACHE_EXAMPLES = """examples:
  lcf-fast cache --sharer S --receiver R --data set.jsonl --out prefills --dry-run     how large it will be
  lcf-fast cache --sharer S --receiver R --data set.jsonl --out prefills               once; goes on if it was stopped
  lcf-fast train --sharer S --receiver R --data set.jsonl --cached prefills --out run  as often as you like

Give both commands the same --data, --limit, --held-out, --template-options, --cross-context, --steps, --batch-size,
--micro-batch-size, --seed, --max-tokens and --precision, and the same adapter layers, so that what is stored is what is
read.
"""

#: At most so many held-out examples make the loss that a run ends with.
_HELD_OUT = 256
#: Fields of TrainingSettings that are arguments of both commands, and those of the training alone.
_SHARED_SETTINGS = {
    "steps": (int, "optimizer steps; default: 300, with --cross-context 276"),
    "batch_size": (int, "examples a step, over all devices; default: 260, with --cross-context 256"),
    "micro_batch_size": (int, "examples that a device handles at a time: for memory; default: 4"),
    "seed": (int, "of the order of the data, the noise and the fresh adapter; default: 42"),
    "max_tokens": (int, "longest sequence; longer examples are of no use; default: 2048, or the models' limit if less"),
}
_TRAINING_SETTINGS = {
    "learning_rate": (float, "of AdamW, at its highest; default: 1e-4"),
    "weight_decay": (float, "of AdamW; default: 0.01"),
    "warmup": (float, "fraction of the steps in which the rate rises; then it falls; default: 0.1"),
    "clip_norm": (float, "largest norm of the gradient; default: 1"),
}

#: Fields of LCFConfig that are arguments.
_ADAPTER = ("bottleneck", "dropout", "gate_init", "layer_map", "slots", "per_span")


def layer_list(text: str) -> tuple[int, ...]:
    """Layers as an argument: ``6,8-10`` is 6, 8, 9 and 10."""
    layers: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            layers += range(int(first), int(last or first) + 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected layers such as 6,8-10, got {text!r}") from None
    return tuple(layers)


def _layer_map(text: str) -> str | tuple[int, ...]:
    return tuple(map(int, text.split(","))) if text.replace(",", "").isdigit() else text


def json_object(text: str) -> dict[str, Any]:
    """A JSON object as an argument."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}: {error}") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}")
    return found


def template_options_for(adapters: Iterable[Path], told: dict[str, Any] | None) -> dict[str, Any]:
    """For the chat templates: what is told, else what the adapters say that they were trained with.

    Where an adapter was trained with others than are told, that is said on standard error.

    Raises:
        RunError: nothing is told and the adapters were not trained alike. CheckpointError: a damaged adapter's folder.
    """
    from ..checkpoint import template_options
    from .failures import RunError

    trained = {folder: found for folder in adapters if (found := template_options(folder)) is not None}
    used = next(iter(trained.values()), {}) if told is None else told
    others = {folder: found for folder, found in trained.items() if found != used}
    if others and told is None:
        got = "; ".join(f"{json.dumps(found)} of {folder}" for folder, found in trained.items())
        raise RunError("--template-options", expected="one for all (they were not trained alike)", got=got)
    for folder, found in others.items():
        print(f"{folder}: trained with the template options {json.dumps(found)}, now with {json.dumps(used)}",
              file=sys.stderr)  # fmt: skip
    return used


# --- arguments
# ---------------------------------------------------------------------


def add_train_command(commands: Any) -> None:
    """Add ``lcf-fast train`` to the subparsers ``commands``."""
    parser = commands.add_parser(
        "train",
        help="train an adapter between two frozen models",
        description="Train an adapter between two frozen models. Defaults are those of the published protocol.",
        epilog=_TRAIN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_run_arguments(parser, "the run's folder")
    _add_settings(parser, "training", _TRAINING_SETTINGS)
    training = parser.add_argument_group("run")
    training.add_argument(
        "--gate-temperature",
        type=float,
        nargs=2,
        metavar=("FIRST", "LAST"),
        help="of the training gates, at the first and the last step, geometrically between; default: 1 0.001",
    )
    training.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in OUT, if any")
    training.add_argument("--cached", metavar="DIR", type=Path, help="prefills that lcf-fast cache stored")
    training.add_argument("--save-every", type=int, default=50, metavar="STEPS", help="checkpoints; default: 50")
    training.add_argument("--keep", type=int, default=2, metavar="N", help="how many checkpoints stay; default: 2")
    adapter = parser.add_argument_group("adapter")
    adapter.add_argument("--bottleneck", type=int, metavar="D", help="width of the latent; default: 128")
    adapter.add_argument("--dropout", type=float, metavar="P", help="in the bottleneck's blocks; default: 0.1")
    adapter.add_argument(
        "--gate-init", type=float, metavar="LOGIT", help="default: 0, with --cross-context 1 (an open gate)"
    )
    adapter.add_argument("--init-from", metavar="DIR", type=Path, help="begin with this adapter, not with a fresh one")
    slots = parser.add_argument_group("slots")
    slots.add_argument("--slots", type=int, metavar="K", help="train K slots, with --cross-context, which it implies")
    each = "K for each span (paragraph) of the context, which is then pooled by itself"
    slots.add_argument("--per-span", action="store_true", default=None, help=each)
    slots.add_argument("--slot-dropout", action="store_true", help="send the first 1 to K of them, drawn evenly")
    where = "behind the prompt or before it; default: as what --init-from names was trained, else append"
    slots.add_argument("--placement", choices=["append", "prefix"], help=where)
    guard = parser.add_argument_group("guard loss, of LCF-X and slots")
    guard.add_argument("--guard-weight", type=float, metavar="X", help="how much it counts; default: 0")
    guard.add_argument("--guard-margin", type=float, metavar="NATS", help="a token; default: 1")
    parser.set_defaults(run=_train)


def add_cache_command(commands: Any) -> None:
    """Add ``lcf-fast cache`` to the subparsers ``commands``."""
    parser = commands.add_parser(
        "cache",
        help="store the frozen prefills of a run's data once",
        description="Store the frozen prefills that a training run reads, so that it needs no sharer any more.",
        epilog=_CACHE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_run_arguments(parser, "the store's folder: a new one, or one to go on with")
    store = parser.add_argument_group("store")
    only = "leave the receiver's prompts to the training run, which with --placement prefix reads them itself anyway"
    store.add_argument("--sharer-only", action="store_true", help=only)
    store.add_argument("--shard-mb", type=int, default=256, metavar="MB", help="size of a shard; default: 256")
    store.add_argument("--dry-run", action="store_true", help="say how large it will be, and stop")
    parser.set_defaults(run=_cache)


def _add_run_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    parser.add_argument("--sharer", metavar="MODEL", required=True, help="a transformers model: folder or hub id")
    parser.add_argument("--receiver", metavar="MODEL", required=True, help="as --sharer; may be the same")
    parser.add_argument("--out", metavar="OUT", type=Path, required=True, help=out)
    parser.add_argument("--cross-context", action="store_true", help="LCF-X: the sharer reads another context")
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")
    data = parser.add_argument_group("data")
    data.add_argument("--data", metavar="SET", required=True, help="JSON lines, parquet, or a data set's hub id")
    data.add_argument("--split", default="train", help="of a hub's set; default: train")
    data.add_argument("--limit", type=int, metavar="N", help="only N examples, drawn by the seed; default: all")
    data.add_argument(
        "--held-out",
        type=float,
        metavar="FRACTION",
        help="leave out of training, by the examples' ids, and tell the loss on (up to 256 of) them in the end;"
        " default: 0.01, with --cross-context 0",
    )
    data.add_argument(
        "--on-error", choices=["skip", "refuse"], default="skip", help="of broken or unusable examples; default: skip"
    )
    data.add_argument(
        "--template-options",
        type=json_object,
        metavar="JSON",
        help="""for both chat templates, such as '{"enable_thinking": false}'""",
    )
    layers = parser.add_argument_group("layers")
    layers.add_argument(
        "--layer-map", type=_layer_map, metavar="MAP", help="last_aligned (default), relative_depth, or 0,0,1,... "
    )
    layers.add_argument("--keep-layers", type=layer_list, metavar="LAYERS", help="such as 6,8-10; default: all")
    settings = _add_settings(parser, "protocol", _SHARED_SETTINGS)
    settings.add_argument(
        "--precision", choices=["bf16", "fp32"], help="of the frozen models and their caches; default: bf16"
    )
    settings.add_argument("--device", help="such as cuda or cpu; default: a GPU if there is one")


def _add_settings(parser: argparse.ArgumentParser, title: str, fields: dict[str, Any]) -> Any:
    group = parser.add_argument_group(title)
    for name, (kind, text) in fields.items():
        metavar = "N" if kind is int else "X"
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=text)
    return group


# --- runs
# ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """What both commands make of their arguments before they load a model's weights."""

    settings: TrainingSettings
    config: LCFConfig
    data: ExampleData
    held_out: ExampleData | None
    kept: tuple[int, ...]

    @property
    def sharer_layers(self) -> tuple[int, ...]:
        """Layers that the adapter reads."""
        return tuple(sorted({self.config.sharer_layers[layer] for layer in self.kept}))


def _settings(arguments: argparse.Namespace) -> TrainingSettings:
    from ..errors import GeometryError
    from .settings import TrainingSettings

    later = ("placement", "guard_weight", "guard_margin")
    names = [*_SHARED_SETTINGS, *_TRAINING_SETTINGS, "precision", "device", *later]
    if getattr(arguments, "guard_margin", None) is not None and not arguments.guard_weight:
        raise GeometryError("--guard-margin", expected="--guard-weight along with it", got="it alone")
    given: dict[str, Any] = {name: value for name in names if (value := getattr(arguments, name, None)) is not None}
    temperature = getattr(arguments, "gate_temperature", None)
    if getattr(arguments, "slot_dropout", False):
        given["slot_dropout"] = True
    if temperature is not None:
        given["gate_temperature_start"], given["gate_temperature_end"] = temperature
    if "batch_size" in given:  # a batch of fewer than the default's four is one micro-batch
        given.setdefault("micro_batch_size", max(1, min(4, given["batch_size"])))
    return TrainingSettings.cross_context(**given) if arguments.cross_context else TrainingSettings(**given)


def _config(arguments: argparse.Namespace, sharer: CacheGeometry, receiver: CacheGeometry) -> LCFConfig:
    from ..config import LCFConfig

    given = {name: value for name in _ADAPTER if (value := getattr(arguments, name, None)) is not None}
    return LCFConfig(sharer, receiver, cross_context=arguments.cross_context, **given)


def _prepare(arguments: argparse.Namespace, *, shown: bool, first: bool) -> _Run:
    """All that can be wrong and is cheap to find, first. What is left out of the data is said even where little is."""
    from ..errors import IndexRangeError
    from .batches import ExampleData
    from .data import read_examples
    from .models import geometry_of, hide_loading, load_config, load_tokenizer, longest_sequence

    if not shown:
        hide_loading()
    if getattr(arguments, "slots", None) is not None:
        _check_slots(arguments)
        arguments.cross_context = True
    settings = _settings(arguments)
    models = {role: getattr(arguments, role) for role in ("sharer", "receiver")}
    configs = {role: load_config(role, name) for role, name in models.items()}
    sharer, receiver = (geometry_of(role, config) for role, config in configs.items())
    settings = replace(settings, max_tokens=longest_sequence(configs, settings.max_tokens, arguments.max_tokens))
    config = _config(arguments, sharer, receiver)
    kept = tuple(range(receiver.layers)) if arguments.keep_layers is None else arguments.keep_layers
    if any(not 0 <= layer < receiver.layers for layer in kept):
        expected = f"receiver layers in [0, {receiver.layers})"
        raise IndexRangeError("--keep-layers", expected=expected, got=",".join(map(str, kept)))
    tokenizers = {f"{role}_tokenizer": load_tokenizer(role, name) for role, name in models.items()}
    examples = read_examples(
        arguments.data,
        kind="cross" if arguments.cross_context else "shared",
        split=arguments.split,
        on_error=arguments.on_error,
        limit=arguments.limit,
        seed=None if arguments.limit is None else settings.seed,
    )
    fraction = arguments.held_out
    if fraction is None:
        fraction = 0.0 if arguments.cross_context else 0.01
    _say(shown or (first and bool(examples.broken)), examples.summary())
    examples, held = examples.held_out(fraction)
    options = {**tokenizers, "on_error": arguments.on_error, "template_options": arguments.template_options}
    data = ExampleData(examples, settings=settings, progress=shown, **options)
    _say(first and not shown and bool(data.left_out), data.summary())
    return _Run(settings, config, data, _held_out(held, settings, options), kept)


def _check_slots(arguments: argparse.Namespace) -> None:
    """Arguments that say nothing of slots are not taken beside them."""
    from ..errors import GeometryError

    if arguments.slots < 1:
        raise GeometryError("--slots", expected="1 or more", got=str(arguments.slots))
    for name in ("keep_layers", "gate_init", "gate_temperature"):
        if getattr(arguments, name) is not None:
            expected = "nothing beside --slots, which have no gates and all layers"
            raise GeometryError(f"--{name.replace('_', '-')}", expected=expected, got=str(getattr(arguments, name)))


def _held_out(held: ExampleSet, settings: TrainingSettings, options: dict[str, Any]) -> ExampleData | None:
    """As many of the examples held out as are looked at in the end, one a step."""
    from ..reading.data_errors import DataError
    from .batches import ExampleData

    if not len(held):
        return None
    one_each = replace(settings, steps=min(len(held), _HELD_OUT), batch_size=1, micro_batch_size=1)
    try:
        return ExampleData(held, settings=one_each, **{**options, "on_error": "skip"})
    except DataError:  # none of them is of use
        return None


def _train(arguments: argparse.Namespace) -> None:
    from .distributed import Ranks, process_group

    with process_group(arguments.device) as device:
        ranks = Ranks.current(device)
        try:
            _train_on(arguments, ranks)
        except KeyboardInterrupt:
            from .checkpoints import Checkpoints
            from .trainer import CHECKPOINTS

            latest = Checkpoints(arguments.out / CHECKPOINTS).latest()
            _say(ranks.first, f"stopped; --resume goes on from {latest or 'the beginning'}")
            raise SystemExit(130) from None


def _train_on(arguments: argparse.Namespace, ranks: Any) -> None:
    from ..placement import placement_of
    from ..slots import LatentSlots
    from .models import load_model
    from .trainer import LOG_FILE, Trainer, check_unused

    shown = ranks.first and not arguments.quiet
    if not arguments.resume:
        check_unused(arguments.out, ranks)
    run = _prepare(arguments, shown=shown, first=ranks.first)
    adapter = _adapter(arguments, run)
    adapter.trained_template_options = arguments.template_options or {}
    if isinstance(adapter, LatentSlots):
        settings = replace(run.settings, placement=placement_of(adapter, arguments.placement))
        run = replace(run, settings=settings)
    precision = run.settings.precision
    receiver = load_model("receiver", arguments.receiver, precision)
    source: dict[str, Any]
    if arguments.cached is not None:
        source = {"prefiller": stored_prefills(arguments, adapter, receiver, run.settings)}
    elif arguments.sharer == arguments.receiver:
        source = {"sharer": receiver}
    else:
        source = {"sharer": load_model("sharer", arguments.sharer, precision)}
    trainer = Trainer(
        adapter,
        receiver,
        run.data,
        arguments.out,
        settings=run.settings,
        device=ranks.device,
        save_every=arguments.save_every,
        keep=arguments.keep,
        progress=not arguments.quiet,
        **source,
    )
    trainer.run(resume=arguments.resume)
    if ranks.first:
        last = json.loads((arguments.out / LOG_FILE).read_text().splitlines()[-1])
        print(
            f"{arguments.out / 'adapter'}: {adapter.parameter_count():,} parameters,"
            f" loss {last['loss']:.4f} after {last['step']} steps"
        )
        _report_held_out(arguments, run, trainer)


def stored_prefills(
    arguments: argparse.Namespace, adapter: LatentCacheFlow | LatentSlots, receiver: Any, settings: TrainingSettings
) -> StoredPrefills:
    """What ``--cached`` names, held against the models. The sharer is loaded for that alone; it need not be here."""
    from .failures import RunError
    from .models import load_model
    from .prefills import StoredPrefills

    sharer = receiver
    if arguments.sharer != arguments.receiver:
        try:
            sharer = load_model("sharer", arguments.sharer, settings.precision, downloads=False)
        except RunError:
            sharer = None
            print(f"{arguments.sharer}: no weights here to hold against those of {arguments.cached}", file=sys.stderr)
    return StoredPrefills(arguments.cached, adapter, receiver, settings, sharer=sharer)


def _report_held_out(arguments: argparse.Namespace, run: _Run, trainer: Trainer) -> None:
    from ..counting import counted
    from ..files import write_whole
    from .held_out import held_out_loss

    data = run.held_out
    if data is None:
        return
    if arguments.cached is not None:
        print("held out: not measured, since a store has no prefills of those examples")
        return
    ids = list(dict.fromkeys(id for step in range(data.settings.steps) for id in data.ids(step)))
    size = run.settings.micro_batch_size
    batches = [data.of(ids[start : start + size]) for start in range(0, len(ids), size)]
    counting = counted(batches, "held-out batches", total=len(batches), shown=not arguments.quiet)
    found = held_out_loss(trainer.step, trainer.prefiller, counting)
    write_whole(arguments.out / "held_out.json", (json.dumps(asdict(found)) + "\n").encode())
    print(found.summary())


def _adapter(arguments: argparse.Namespace, run: _Run) -> LatentCacheFlow | LatentSlots:
    import torch

    from ..adapter import LatentCacheFlow
    from ..checkpoint import load_adapter
    from ..errors import GeometryError
    from ..slots import LatentSlots

    if arguments.init_from is None:
        torch.manual_seed(run.settings.seed)
        if run.config.slots:
            return LatentSlots(run.config)
        return LatentCacheFlow(run.config, keep_layers=run.kept)
    given = [f"--{name.replace('_', '-')}" for name in _ADAPTER if getattr(arguments, name) is not None]
    if given:
        raise GeometryError(", ".join(given), expected="nothing beside --init-from, which fixes it", got="both")
    adapter = load_adapter(
        arguments.init_from, dtype=torch.float32, sharer=run.config.sharer, receiver=run.config.receiver
    )
    if adapter.config.cross_context != arguments.cross_context:
        kinds = {True: "an LCF-X or slots adapter (--cross-context)", False: "an LCF adapter (no --cross-context)"}
        raise GeometryError(
            "--init-from", expected=kinds[arguments.cross_context], got=kinds[adapter.config.cross_context]
        )
    if arguments.keep_layers is None:
        return adapter
    if isinstance(adapter, LatentSlots):
        raise GeometryError("--keep-layers", expected="all layers with slots", got="some")
    return adapter.prune(arguments.keep_layers)


def _cache(arguments: argparse.Namespace) -> None:
    from ..devices import chosen_device
    from .caching import plan_prefills, write_prefills
    from .failures import RunError
    from .models import load_model

    if (ranks := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise RunError("lcf-fast cache", expected="one process (no torchrun)", got=f"{ranks} of them")
    if not arguments.dry_run:  # which needs none
        chosen_device(arguments.device)
    shown = not arguments.quiet
    run = _prepare(arguments, shown=shown, first=True)
    plan = plan_prefills(
        run.data,
        run.settings,
        run.config.sharer,
        run.config.receiver,
        sharer_layers=run.sharer_layers,
        with_receiver=not arguments.sharer_only,
        shard_bytes=arguments.shard_mb * 1_000_000,
        progress=shown,
    )
    print(plan.summary(), flush=True)
    if arguments.dry_run:
        return
    plan.waiting(arguments.out)  # room for them: before models are loaded
    precision = run.settings.precision
    receiver = load_model("receiver", arguments.receiver, precision)
    same = arguments.sharer == arguments.receiver
    sharer = receiver if same else load_model("sharer", arguments.sharer, precision)
    manifest = write_prefills(arguments.out, plan, run.data, sharer, receiver, progress=shown)
    print(f"{arguments.out}: {manifest.examples:,} examples in {manifest.shards:,} shards")


def _say(shown: bool, text: str) -> None:
    if shown:
        print(text, file=sys.stderr, flush=True)
