"""The Triton kernels, checked in Triton's interpreter on a few positions of the real caches. Never timed.

Runs as a process of its own, ``python -m bench.interpreted FILE``: Triton reads ``TRITON_INTERPRET`` when a kernel is
defined. The parent writes FILE, reads one line of JSON from stdout, and works on meanwhile.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from . import ROOT
from .cases import Case, Group, cases_of

#: Positions that are checked: one tile and a rest, or less than a tile.
TOKENS = 33
#: Receiver layers that are checked, of all that share a kernel.
LAYERS = 2
LIMIT_S = 400.0


@dataclass
class Check:
    """A running check; `results` waits for it."""

    process: subprocess.Popen[str]
    folder: tempfile.TemporaryDirectory[str]

    def results(self) -> list[dict[str, Any]]:
        """One entry a case and dtype: op, dtype, tokens, layers, within (null: could not be run), error, reason."""
        try:
            out, err = self.process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            return [_failed(f"not done after {LIMIT_S:.0f} s")]
        finally:
            self.folder.cleanup()
        lines = out.strip().splitlines()
        if self.process.returncode != 0 or not lines:
            last = (err.strip().splitlines() or ["no output"])[-1]
            return [_failed(f"the check itself failed: {last}")]
        results: list[dict[str, Any]] = json.loads(lines[-1])
        return results


def _failed(reason: str) -> dict[str, Any]:
    row: dict[str, Any] = {"op": "every kernel", "dtype": None, "tokens": TOKENS, "layers": LAYERS}
    return {**row, "within": False, "error": None, "reason": reason}


def start(caches: Any, width: int, dtypes: list[str], *, everything: bool) -> Check:
    """Begin to check caches (`bench.inputs.Caches`, cut to `TOKENS`) at these dtypes.

    Args:
        everything: all cases but those that others stand for; otherwise those that between them run every kernel.
    """
    import torch

    folder = tempfile.TemporaryDirectory(prefix="lcf-bench-")
    file = Path(folder.name) / "caches.pt"
    torch.save(
        {
            "sharer": caches.sharer,
            "receiver": caches.receiver,
            "context": caches.context,
            "spans": caches.spans,
            "width": width,
            "dtypes": dtypes,
            "everything": everything,
        },
        file,
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.interpreted", str(file)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return Check(process, folder)


def checked_cases(group: Group, *, everything: bool) -> list[Case]:
    """The cases of a group that are checked, as `start` says; none where the package lacks their kernels."""
    if any(find_spec(f"lcf_fast.kernels.{name}") is None for name in group.kernels):
        return []
    return [case for case in cases_of(group) if case.checked or (everything and case.interpreted)]


def check(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Every case on the interpreted kernels, against float64."""
    import torch

    import lcf_fast

    from . import cases, errors, inputs, variants

    whole = inputs.Caches(data["sharer"], data["receiver"], data["context"], data["spans"])
    results = []
    for name in data["dtypes"]:
        dtype = getattr(torch, name)
        sharer, receiver, context = (
            [(key.to(dtype), value.to(dtype)) for key, value in part]
            for part in (whole.sharer, whole.receiver, whole.context)
        )
        caches = inputs.Caches(sharer, receiver, context, whole.spans)
        for group in cases.GROUPS:
            chosen = checked_cases(group, everything=data["everything"])
            if not chosen:
                continue
            # Slots are in every layer of a cache, so their adapter is one of two models of few layers.
            given = caches.last(LAYERS) if group.slots else caches
            geometries = inputs.geometry_of(given.sharer), inputs.geometry_of(given.receiver)
            config = inputs.make_config(group, *geometries, data["width"])
            weights = inputs.make_weights(config, device=torch.device("cpu"), dtype=dtype)
            kept = tuple(range(config.receiver.layers))[-LAYERS:]
            operands = inputs.make_operands(group, given, config, weights, kept=kept)
            run = variants.REFERENCE[group.name]
            truth = variants.flatten(run(operands.double()), kept)
            plain = variants.flatten(run(operands), kept)
            for case in chosen:
                entry: dict[str, Any] = {
                    "op": case.name,
                    "dtype": name,
                    "tokens": caches.receiver[0][0].shape[2],
                    "layers": 1 if case.scope == "one layer" else len(kept),
                    "within": None,
                    "error": None,
                    "reason": None,
                }
                try:
                    with lcf_fast.use_backend("triton"):
                        got = variants.flatten(variants.OURS[case.name](operands), kept)
                    judgement = errors.judge(got, truth, plain)
                    entry["error"], entry["within"] = judgement.to_dict(), judgement.within
                except lcf_fast.BackendError as error:  # no Triton here
                    entry["reason"] = str(error)
                except Exception as error:  # a kernel that raises is a result, not the end of the job
                    entry["within"], entry["reason"] = False, f"{type(error).__name__}: {error}"
                results.append(entry)
    return results


def main() -> None:
    import torch

    torch.set_num_threads(1)
    data = torch.load(sys.argv[1], weights_only=True)
    with torch.no_grad():
        print(json.dumps(check(data)))


if __name__ == "__main__":
    main()
