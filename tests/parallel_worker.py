"""One rank of tests/test_parallel.py: ``python parallel_worker.py RANK RANKS FOLDER``. Pools its share of each case."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from adapters import RECEIVER, SHARER, make_adapter
from safetensors.torch import save_file
from torch import Tensor

from helpers import Pair, make_cache
from lcf_fast import CacheGeometry, LatentSlots, LCFConfig
from lcf_fast.errors import LCFError
from lcf_fast.parallel import summarize_parallel
from lcf_fast.spans import Spans, windows

#: Those that slots take part in, too; they know no spans, and pool all that is no padding.
SLOT_CASES = ("one_span", "ragged", "offsets", "long")
#: By name: batch, tokens, spans, shares of the ranks in per cent, whether rows are padded.
CASES: dict[str, tuple[int, int, Any, tuple[int, ...], bool]] = {
    "one_span": (1, 60, None, (50, 50, 0), False),
    "ragged": (2, 61, Spans.given([[(0, 7), (7, 40), (40, 61)], [(5, 59)]]), (30, 50, 20), True),
    "overlapping": (1, 200, windows(200, 50, 30), (10, 41, 49), False),
    "offsets": (2, 40, [[0, 13, 40], [0, 39]], (100, 0, 0), False),
    "long": (1, 100_000, [[0, 1, 37_000, 37_001, 90_000, 100_000]], (37, 23, 40), False),
}


def case_inputs(name: str) -> tuple[list[Pair], Any, Tensor | None]:
    """The whole context of a case: the sharer's cache, spans, mask."""
    batch, tokens, spans, _, padded = CASES[name]
    geometry = CacheGeometry(SHARER.layers, SHARER.kv_heads, SHARER.head_dim)
    cache = make_cache(geometry, batch, tokens, generator=torch.Generator().manual_seed(tokens))
    mask = None
    if padded:
        mask = torch.ones(batch, tokens, dtype=torch.int64)
        mask[0, 20:26], mask[1, :9] = 0, 0
    return cache, spans, mask


def slots_half() -> LatentSlots:
    """As of what `make_adapter` reads, with slots."""
    torch.manual_seed(6)
    return LatentSlots(LCFConfig(SHARER, RECEIVER, bottleneck=64, slots=3)).eval()


def share(name: str, rank: int, ranks: int) -> slice:
    """The tokens of a rank; the last takes what is left."""
    tokens, shares = CASES[name][1], CASES[name][3]
    cuts = [tokens * sum(shares[:r]) // 100 for r in range(ranks)] + [tokens]
    return slice(cuts[rank], cuts[rank + 1])


def main() -> None:
    rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    sent: list[int] = []
    all_gather = dist.all_gather

    def counted(received: list[Tensor], tensor: Tensor, group: Any = None) -> Any:
        sent.append(tensor.nbytes)
        return all_gather(received, tensor, group=group)

    dist.all_gather = counted  # type: ignore[assignment]
    adapter, slots, bytes_sent = make_adapter(True), slots_half(), {}
    results: dict[str, Tensor] = {}
    for name in CASES:
        cache, spans, mask = case_inputs(name)
        mine = share(name, rank, ranks)
        piece = [(key[:, :, mine], value[:, :, mine]) for key, value in cache]
        sent.clear()
        message = summarize_parallel(adapter, piece, spans, attention_mask=None if mask is None else mask[:, mine])
        results |= {f"{name}.latent": message.tensors["latent"], f"{name}.summary": message.tensors["summary"]}
        bytes_sent[name] = {"bytes": sum(sent), "spans": message.spans}
        if name in SLOT_CASES:
            sent.clear()
            half: Any = slots if name == "one_span" else slots.sharer_side()
            made = summarize_parallel(half, piece, attention_mask=None if mask is None else mask[:, mine])
            results[f"{name}.slots"] = made.tensors["latent"]
            bytes_sent[f"{name}.slots"] = {"bytes": sum(sent), "spans": made.spans}
    cache, _, _ = case_inputs("one_span")
    group = dist.new_group([ranks - 2, ranks - 1])  # of three, one whose ranks are others in the whole
    if rank >= ranks - 2:
        half_of_it = slice(0, 23) if rank == ranks - 2 else slice(23, None)
        piece = [(key[:, :, half_of_it], value[:, :, half_of_it]) for key, value in cache]
        results["group"] = summarize_parallel(adapter, piece, group=group).tensors["latent"]
        results["group.slots"] = summarize_parallel(slots, piece, group=group).tensors["latent"]
    errors = {}
    wrong = cache[:2] if rank == 1 else cache  # a layer is missing on one rank alone
    later = [*cache[:2], (cache[2][0][..., :8], cache[2][1])] if rank == 1 else cache
    doubled = [(key.double(), value.double()) for key, value in cache] if rank == 1 else cache
    twice = [(key.repeat(2, 1, 1, 1), value.repeat(2, 1, 1, 1)) for key, value in cache] if rank == 1 else cache
    gap = [(0, 10), (20, 30)] if rank == 1 else [(0, 10), (10, 20), (20, 30)]  # of the same offsets
    no_token = torch.zeros(1, 60, dtype=torch.int64)
    attempts: dict[str, tuple[Any, Any, Any, Tensor | None]] = {
        "cache": (adapter, wrong, None, None),
        "later layer": (adapter, later, None, None),
        "double": (adapter, doubled, None, None),
        "spans": (adapter, cache, [[0, 10 + rank]], None),
        "batch": (adapter, twice, None, None),
        "gap": (adapter, cache, Spans.given([gap]), None),
        "items": (adapter, cache, Spans.given([[(0, 10)]] * 2), None),
        "beyond": (adapter, cache, [[0, 60 * ranks + 1]], None),
        "nothing": (adapter, cache, [[3, 3]], None),
        "half": (make_adapter() if rank == 1 else adapter, cache, None, None),
        "slots, cache": (slots, wrong, None, None),
        "slots, later layer": (slots, later, None, None),
        "slots, batch": (slots, twice, None, None),
        "slots, double": (slots, doubled, None, None),
        "slots, spans": (slots, cache, [[0, 60]] if rank == 1 else None, None),
        "slots, nothing": (slots, cache, None, no_token),
    }
    for name, (half, attempted, offsets, mask) in attempts.items():
        try:
            summarize_parallel(half, attempted, offsets, attention_mask=mask)
        except LCFError as error:
            errors[name] = f"{type(error).__name__}: {error}"
    save_file(results, folder / f"{rank}.safetensors")
    (folder / f"{rank}.json").write_text(json.dumps({"sent": bytes_sent, "errors": errors}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
