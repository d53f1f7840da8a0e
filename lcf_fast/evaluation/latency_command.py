"""``lcf-fast latency``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from .latency_models import Group

__all__ = ["add_latency_command"]

_EXAMPLES = """examples:
  lcf-fast latency                      the published architectures with random weights; nothing is downloaded
  lcf-fast latency --batch 1 --channels text_50 text_200 lcf lcf_x
  lcf-fast latency --context-tokens 4000 --rounds 20 --out long
  lcf-fast latency --sharer Qwen/Qwen2.5-0.5B-Instruct --receiver Qwen/Qwen3-0.6B --adapter run/adapter --c2c fuser

The same command goes on where it was stopped. In OUT: latency.json (medians, quartiles, settings, machine) and
latency.md (the tables). Times do not depend on what weights are worth: without --sharer and --receiver they are random.
"""
_DESCRIPTION = """Time every channel to the receiver's first token and to its last: sharer, communication, prefill; and
its bytes, its launches, and how much faster than text it is. Shared context (LCF, C2C), then cross context (LCF-X,
KVComm)."""
_LENGTHS = ("context_tokens", "question_tokens", "max_new_tokens", "rounds", "warmup")


def add_latency_command(commands: Any) -> None:
    """Add ``latency`` to the subparsers."""
    parser = commands.add_parser(
        "latency",
        help="time channels side by side, without a download",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whom = parser.add_argument_group("models")
    whom.add_argument("--sharer", metavar="MODEL", help="a transformers model: folder or hub id; with --receiver")
    whom.add_argument("--receiver", metavar="MODEL", help="as --sharer; the same: KVComm takes part")
    whom.add_argument("--adapter", metavar="DIR", type=Path, action="append", default=[], help="LCF, LCF-X or both")
    whom.add_argument("--c2c", metavar="DIR", type=Path, help="a fuser of Cache-to-Cache, in its released layout")
    whom.add_argument("--precision", choices=["bf16", "fp32"], help="of models; default: bf16 on a GPU, fp32 on a CPU")
    whom.add_argument("--device", help="such as cuda or cpu; default: a GPU if there is one")
    how = parser.add_argument_group("how (defaults: on a CPU what ends within ten minutes; what was chosen is printed)")
    how.add_argument("--batch", type=int, nargs="+", default=[1, 8], metavar="N", help="requests a call; default: 1 8")
    how.add_argument("--context-tokens", type=int, metavar="N", help="of a context; default: 1000 on a GPU")
    how.add_argument("--question-tokens", type=int, metavar="N", help="default: 32 on a GPU")
    how.add_argument("--max-new-tokens", type=int, metavar="N", help="of every answer; default: 16 on a GPU")
    how.add_argument("--rounds", type=int, metavar="N", help="that count; default: 10 on a GPU")
    how.add_argument("--warmup", type=int, metavar="N", help="rounds before them; default: 2 on a GPU")
    how.add_argument("--text-tokens", type=int, nargs="+", default=[50, 200], metavar="K", help="default: 50 200")
    how.add_argument("--channels", nargs="+", metavar="NAME", help="these alone; default: all")
    parser.add_argument("--out", metavar="OUT", type=Path, default=Path("out/latency"), help="default: out/latency")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from ..devices import chosen_device
    from ..files import write_whole
    from ..training.models import hide_loading
    from .failures import EvaluationError
    from .latency import default_protocol, run_latency, said
    from .latency_report import latency_markdown

    if (arguments.sharer is None) != (arguments.receiver is None):
        given = "--sharer" if arguments.receiver is None else "--receiver"
        raise EvaluationError("models", expected="--sharer and --receiver, or neither of them", got=f"{given} alone")
    if arguments.sharer is None and (arguments.adapter or arguments.c2c is not None):
        expected = "--sharer and --receiver with --adapter or --c2c"
        raise EvaluationError("models", expected=expected, got="neither of them")
    if min(arguments.text_tokens) < 1 or len(set(arguments.text_tokens)) < len(arguments.text_tokens):
        expected = "numbers of at least 1, each once"
        raise EvaluationError("--text-tokens", expected=expected, got=str(arguments.text_tokens))
    hide_loading()
    device = chosen_device(arguments.device)
    precision = arguments.precision or ("fp32" if device.type == "cpu" else "bf16")
    lengths = {name: getattr(arguments, name) for name in _LENGTHS}
    protocols = [default_protocol(device, batch, **lengths) for batch in arguments.batch]
    groups = _groups(arguments, device, precision)
    print(f"On {device}, in {precision}: " + "; ".join(map(said, protocols)) + ".", flush=True)
    cells = run_latency(
        groups,
        protocols,
        arguments.out,
        device=device,
        channels=arguments.channels,
        settings={"precision": precision, "text_tokens": arguments.text_tokens},
        progress=True,
    )
    table = latency_markdown(cells)
    write_whole(arguments.out / "latency.md", table.encode())
    print(f"\n{table}\nWritten: {arguments.out / 'latency.json'}, {arguments.out / 'latency.md'}")


def _groups(arguments: argparse.Namespace, device: torch.device, precision: str) -> list[Group]:
    from ..reading.prefill import DTYPES
    from .latency_models import given_groups, random_groups

    dtype = DTYPES[precision]
    if arguments.sharer is None:
        return random_groups(arguments.text_tokens, device=device, dtype=dtype)
    from ..fingerprint import digest_of
    from ..training.models import load_config
    from .loading import load_adapters, load_agents, load_fuser

    sharer, receiver = arguments.sharer, arguments.receiver
    configs = {"sharer": load_config("sharer", sharer), "receiver": load_config("receiver", receiver)}
    adapters = load_adapters(arguments.adapter, configs, device, dtype)
    fuser = None if arguments.c2c is None else load_fuser(arguments.c2c, configs, device, dtype)
    made = [*adapters, *([] if fuser is None else [fuser])]
    return given_groups(
        arguments.text_tokens,
        lambda: load_agents(sharer, receiver, precision, device),
        configs,
        adapters=adapters,
        fuser=fuser,
        one_model=sharer == receiver,
        settings={
            "sharer": sharer,
            "receiver": receiver,
            "adapters": [str(folder) for folder in arguments.adapter],
            "c2c": None if arguments.c2c is None else str(arguments.c2c),
            # Times depend on an adapter's layers and on which of its gates are open: more than its path tells.
            "weights": [digest_of({}, dict(one.named_parameters())) for one in made],
        },
    )
