"""``python -m bench``: errors and times of the ops on caches that real transformers models made.

Builds Qwen2.5-0.5B and Qwen3-0.6B (random weights unless --sharer and --receiver name others; only then anything may
be downloaded), prefills a text, and takes the caches that come out. Then, for each op and for the whole of LCF and
LCF-X: the error against float64, and the time beside that of other ways to the same result. What is out of bounds gets
no time, and the exit status is 1. Without a GPU the CPU path is timed, and the Triton kernels are checked in Triton's
interpreter.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from .settings import Settings

EXAMPLES = """examples:
  python -m bench                                    everything (8 minutes on two cores, 4 on a GPU)
  python -m bench --quick                            two minutes on two cores
  python -m bench --only lcf inject --tokens 512     the whole of LCF, and inject, at one size
  python -m bench --only adapter.extend windows merge encode decode --context 4096     messages
  python -m bench --only slots_summarize slots_deliver slots_append slots    slots
  python -m bench --device cuda --dtype float16 --bottleneck 64 128 256 512
  python -m bench --only lcf --tokens 2048 --batch 8  a batch
  python -m bench --sweep                            every size of the hot paths, against eager (5 minutes on a GPU)
  python -m bench --sweep --dtype bfloat16 --bottleneck 128 --deadline 120
  python -m bench --sharer Qwen/Qwen2.5-0.5B-Instruct --receiver Qwen/Qwen3-0.6B

--out gets results.json (on a GPU after each size), plot.png and a copy of the results named after the device, fit for
bench/results/.
With --sweep, --tokens, --batch, --context, --bottleneck and --dtype narrow its axes.
"""


def parser() -> argparse.ArgumentParser:
    from .cases import ALL_GROUPS, CASE_NAMES

    result = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [group.name for group in ALL_GROUPS] + list(CASE_NAMES)
    add = result.add_argument
    add("--quick", action="store_true", help="fewer sizes and rounds: two minutes on two cores")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="default: bfloat16 on a GPU, float32 on a CPU")
    add("--tokens", type=_positive, nargs="+", metavar="N", help="receiver positions; the first is the headline")
    add("--batch", type=_positive, nargs="+", metavar="B", help="rows of both caches (default: 1)")
    add("--context", type=_positive, metavar="N", help="sharer positions that LCF-X pools")
    add("--bottleneck", type=int, nargs="+", choices=(64, 128, 256, 512), help="latent widths d (default: 128)")
    add("--only", nargs="+", choices=names, metavar="NAME", default=[], help=f"of: {', '.join(names)}")
    add("--sweep", action="store_true", help="the hot paths against eager, from 1 token to 32,768, batch 1 to 32")
    add("--deadline", type=_positive, metavar="S", help="begin no other size after S seconds; what is left is named")
    add("--no-compile", action="store_true", help="leave torch.compile out: it takes long to compile")
    add("--sharer", metavar="PATH_OR_ID", help="a model in place of the random Qwen2.5-0.5B")
    add("--receiver", metavar="PATH_OR_ID", help="in place of the random Qwen3-0.6B; LCF-X has it on both sides")
    add("--out", type=Path, default=Path("out/bench"), metavar="DIR", help="where results go (default: %(default)s)")
    return result


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    try:
        import torch

        import lcf_fast.ops  # noqa: F401
    except ImportError as error:
        print(f"bench: {error}; install first: {sys.executable} -m pip install -e '.[bench]'", file=sys.stderr)
        return 2
    from lcf_fast.files import write_whole

    from . import report, sweep_table
    from .machine import slug
    from .runner import INTERRUPTED, run
    from .settings import DTYPES

    if given.device == "cuda" and not torch.cuda.is_available():
        print(f"bench: --device cuda, but torch {torch.__version__} sees no CUDA GPU", file=sys.stderr)
        return 2
    try:  # before minutes of work that would have nowhere to go
        given.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"bench: --out {given.out}: {error.strerror or error}", file=sys.stderr)
        return 2
    device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    settings = _settings(given, device, DTYPES)
    command = " ".join(["python -m bench", *_public(arguments if arguments is not None else sys.argv[1:])])
    file = given.out / "results.json"

    def keep(so_far: dict[str, Any]) -> None:
        write_whole(file, report.to_json({**so_far, "command": command}))

    try:
        results = run(settings, report.Steps(), keep)
    except (RuntimeError, OSError, ValueError) as error:
        if isinstance(error, RuntimeError) and "transformers" not in str(error):
            raise
        print(f"bench: {error}", file=sys.stderr)
        return 2
    results["command"] = command
    name = slug(results["about"]) + ("-sweep" if given.sweep else "")
    files = [file, given.out / f"{name}.json"]
    for one in files:
        write_whole(one, report.to_json(results))
    try:
        from .plot import draw

        files.append(given.out / "plot.png")
        draw(results, files[-1])
    except ImportError as error:
        print(f"bench: no plot: {error}", file=sys.stderr)
    files = [one for one in files if one.exists()]
    if given.sweep:
        sweep_table.print_results(results)
    else:
        report.print_results(results)
    print(f"wrote {', '.join(map(str, files))}")
    interrupted = any(one["why"] == INTERRUPTED for one in results["left_out"])
    return 1 if results["failures"] or interrupted else 0


def _settings(given: argparse.Namespace, device: torch.device, dtypes: Mapping[str, torch.dtype]) -> Settings:
    from .settings import SWEEPS, default_settings, sweep_settings

    sizes = {
        "tokens": given.tokens,
        "batches": given.batch,
        "widths": given.bottleneck,
    }
    chosen: dict[str, Any] = {name: tuple(dict.fromkeys(some)) for name, some in sizes.items() if some}
    if given.sweep:
        if given.dtype:
            chosen["dtypes"] = (dtypes[given.dtype],)
        if given.context:
            chosen["contexts"] = (given.context,)
        settings = sweep_settings(device, replace(SWEEPS[device.type], **chosen))
    else:
        if given.dtype:
            chosen["dtype"] = dtypes[given.dtype]
        if given.context:
            chosen["context"] = given.context
        settings = default_settings(device, quick=given.quick)
        # Who chooses sizes gets those and no others.
        settings = replace(settings, targets=settings.targets and not chosen, **chosen)
    return replace(
        settings,
        only=tuple(given.only),
        sharer=given.sharer,
        receiver=given.receiver,
        compile_until=0.0 if given.no_compile else settings.compile_until,
        stop_after=given.deadline or settings.stop_after,
    )


def _public(arguments: Sequence[str]) -> list[str]:
    """The command line without --out and without folders: it goes into a file that is published."""
    kept: list[str] = []
    skip = False
    for word in arguments:
        if skip or word == "--out" or word.startswith("--out="):
            skip = word == "--out"
        else:
            kept.append("PATH" if os.path.isabs(word) or word.startswith((".", "~")) else word)
    return kept


if __name__ == "__main__":
    # The interpreter is for the check, in a process of its own: here it would stand in for a GPU.
    os.environ.pop("TRITON_INTERPRET", None)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever stops it gets what has been measured
    sys.exit(main())
