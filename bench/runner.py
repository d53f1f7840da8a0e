"""The job from start to end: models, caches, errors, times. Returns the results as plain JSON."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch

import lcf_fast

from . import interpreted, machine, models, timing, wire
from .cases import GROUPS, HOST_GROUPS, QWEN3, WHOLE, Group, cases_of
from .inputs import Caches
from .job import Job
from .settings import Settings, dtype_name

#: Of the results' layout; counts up when a name changes its meaning.
SCHEMA = 1
#: The targets of the CPU path are set for this many tokens, all layers of the published pair, d = 128, float32.
TARGET_TOKENS = 512


class Progress(Protocol):
    """Where the job says what it is doing."""

    def step(self, text: str) -> AbstractContextManager[None]:
        """A step, until the context ends."""
        ...


class Silent:
    """A `Progress` that says nothing."""

    def step(self, text: str) -> AbstractContextManager[None]:
        return nullcontext()


@torch.no_grad()
def run(settings: Settings, progress: Progress | None = None) -> dict[str, Any]:
    """Everything. ``failures`` in the results names what of ours is out of bounds.

    Raises:
        RuntimeError: transformers is missing. OSError, ValueError: a model that cannot be loaded.
    """
    progress = Silent() if progress is None else progress
    started = time.perf_counter()
    rows: list[dict[str, Any]] = []
    # By name, so that nothing falls back in silence.
    with lcf_fast.use_backend("triton" if settings.on_gpu else "eager"):
        caches, check, about_input = _caches(settings, progress)
        checks = []
        if check is not None:
            with progress.step("Triton kernels in the interpreter: errors (not timed)"):
                checks = check.results()
        scheduled = machine.scheduled_ns()
        with progress.step("copy bandwidth"):
            bandwidth = timing.copy_bandwidth(settings.device)
        for width in settings.widths:
            for tokens in settings.tokens:
                cut = caches.first(tokens, settings.context)
                for group in GROUPS:
                    headline = tokens == settings.tokens[0]
                    if not cases_of(group, settings.only) or not (headline or _at_every_size(group, settings)):
                        continue
                    with progress.step(
                        f"{group.title}: N = {tokens if group.prompt else settings.context}, d = {width}"
                    ):
                        rows += Job(settings, group, cut, width, bandwidth=bandwidth, started=started).rows()
            rows += _host_rows(settings, progress, caches, width, bandwidth)
        waited = machine.waited_share(scheduled)
    failures = [
        f"{row['variant']}, {row['tokens']} tokens" for row in rows if row["kind"] == "ours" and row["within"] is False
    ]
    failures += [f"{one['op']}, interpreted, {one['dtype']}" for one in checks if one["within"] is False]
    return {
        "schema": SCHEMA,
        "about": machine.about(settings.device),
        "settings": {
            "quick": settings.quick,
            "dtype": dtype_name(settings.dtype),
            "tokens": list(settings.tokens),
            "context": settings.context,
            "bottleneck": list(settings.widths),
            "only": list(settings.only),
        },
        "input": about_input,
        "copy_gb_s": bandwidth,
        "waited_share": waited,
        "rows": rows,
        "interpreted": checks,
        "targets": _targets(rows, settings),
        "failures": failures,
        "seconds": time.perf_counter() - started,
    }


def _host_rows(
    settings: Settings, progress: Progress, caches: Caches, width: int, bandwidth: float
) -> list[dict[str, Any]]:
    """Rows of what is done on the CPU wherever the rest runs, against the CPU's own copy bandwidth."""
    if not any(cases_of(group, settings.only) for group in HOST_GROUPS):
        return []
    with progress.step(f"messages to bytes and back, on the CPU: d = {width}"):
        if settings.on_gpu:
            bandwidth = timing.copy_bandwidth(torch.device("cpu"))
        cut = caches.first(1, settings.context)  # the prompt takes no part
        return wire.rows(settings, cut, width, bandwidth=bandwidth)


def _at_every_size(group: Group, settings: Settings) -> bool:
    """Whether a group is run at the other sizes too, not at the first of ``tokens`` alone."""
    return group.prompt and (group.name in WHOLE or not settings.quick)


def _caches(settings: Settings, progress: Progress) -> tuple[Caches, interpreted.Check | None, dict[str, Any]]:
    """Build the models, prefill the text, let the models go. Without a GPU the interpreted check starts meanwhile."""
    tokens = max(settings.tokens)
    parts = models.paragraphs()
    prompt, other = parts[: len(parts) // 2], parts[len(parts) // 2 :]
    with progress.step(f"sharer: building it, prefilling {tokens} tokens"):
        sharer = models.load(settings.sharer, "sharer", device=settings.device, dtype=settings.dtype)
        heard = models.prefill(sharer, models.tokenize(sharer, prompt, tokens)[0])
        labels = {"sharer": sharer.label}
        del sharer
    with progress.step("receiver: building it"):
        receiver = models.load(settings.receiver, "receiver", device=settings.device, dtype=settings.dtype)
        labels["receiver"] = receiver.label
    ids, _ = models.tokenize(receiver, prompt, tokens)
    context_ids, spans = models.tokenize(receiver, other, settings.context)
    check = None
    if not settings.on_gpu:
        few = min(interpreted.TOKENS, tokens, settings.context)
        sample = Caches(
            [(key[:, :, :few].clone(), value[:, :, :few].clone()) for key, value in heard],
            models.prefill(receiver, ids[:few]),
            models.prefill(receiver, context_ids[:few]),
            [0, few // 3, few // 3, few // 2, few],  # an empty span among them
        )
        dtypes = ["float32"] if settings.quick else ["float32", "float16", "bfloat16"]
        check = interpreted.start(sample, settings.widths[0], dtypes, everything=not settings.quick)
    with progress.step(f"receiver: prefilling {tokens} tokens, and {settings.context} of another text"):
        caches = Caches(heard, models.prefill(receiver, ids), models.prefill(receiver, context_ids), spans)
    named = [where for where in (settings.sharer, settings.receiver) if where is not None]
    about = {
        **labels,
        "text": "bench/text.txt",
        "prompt_tokens": tokens,
        "context_tokens": settings.context,
        "spans": len(spans) - 1,
        "adapter": "random weights of order 1, all gates open",
        "downloaded": "only what --sharer and --receiver name" if named else "nothing",
    }
    return caches, check, about


def _targets(rows: Sequence[dict[str, Any]], settings: Settings) -> list[dict[str, Any]]:
    """What the CPU path must reach over the naive reference, and what it reached."""
    targets = {group.name: group.target for group in GROUPS if group.target is not None}
    found = []
    for row in rows:
        same = row["tokens"] == TARGET_TOKENS and row["layers"] == QWEN3.layers and row["bottleneck"] == 128
        if row["kind"] != "ours" or row["group"] not in targets or not same:
            continue
        if settings.on_gpu or row["dtype"] != "float32":
            continue
        target, reached = targets[row["group"]], row["speedup_reference"]
        found.append(
            {
                "op": row["op"],
                "tokens": row["tokens"],
                "layers": row["layers"],
                "target": target,
                "reached": reached,
                "met": reached is not None and reached >= target,
            }
        )
    return found
