"""Two processes on one machine: a sharer that has read something, and a receiver that has not.

    python examples/two_processes.py

The receiver starts the sharer and gives it the sharer's half of an adapter. The sharer pools its cache to a message and
sends it over a local socket; the receiver checks it, edits its own cache with it, and compares that with what one
process alone makes of the same caches. Here the caches are random numbers; in use they are what two language models
hold after their prompts. What crosses the socket are tensors and a little JSON, nothing that unpickles.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile

import torch

from lcf_fast import CacheGeometry, LatentCacheFlow, LCFConfig
from lcf_fast.sharer import SharerSide
from lcf_fast.transport import receive_message, send_message

SHARER = CacheGeometry(layers=3, kv_heads=2, head_dim=32)
RECEIVER = CacheGeometry(layers=4, kv_heads=2, head_dim=64)
SPANS = [[0, 150, 320, 400]]


def cache(geometry: CacheGeometry, tokens: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """One (key, value) a layer, each (batch, KV heads, tokens, head dim)."""
    random = torch.Generator().manual_seed(seed)
    shape = (1, geometry.kv_heads, tokens, geometry.head_dim)
    return [
        (torch.randn(shape, generator=random), torch.randn(shape, generator=random)) for _ in range(geometry.layers)
    ]


def share(folder: str, port: int) -> None:
    """The sharer's process."""
    side = SharerSide.from_pretrained(folder)
    heard = cache(SHARER, tokens=400, seed=1)
    with torch.no_grad():
        message = side.summarize(heard, SPANS)
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sent = send_message(sock, message)
    whole = sum(key.nbytes + value.nbytes for key, value in heard)
    print(f"sharer: sent {sent:,} bytes for a cache of {whole:,}", flush=True)


def main() -> None:
    """The receiver's process."""
    torch.manual_seed(0)
    adapter = LatentCacheFlow(LCFConfig(SHARER, RECEIVER, bottleneck=64, cross_context=True)).eval()
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as server:
        adapter.sharer_side().save_pretrained(folder)
        server.settimeout(60.0)
        command = [sys.executable, __file__, folder, str(server.getsockname()[1])]
        with subprocess.Popen(command), server.accept()[0] as sock:
            message = receive_message(sock, max_bytes=100_000, timeout=60.0)

    own = cache(RECEIVER, tokens=20, seed=2)
    with torch.no_grad():
        edited = adapter.inject(own, message)  # refuses a message that was made for another adapter
        alone = adapter.inject(own, adapter.summarize(cache(SHARER, tokens=400, seed=1), SPANS))
    changed = not torch.equal(edited[0][0], own[0][0])
    equal = all(torch.equal(a, b) for one, two in zip(edited, alone) for a, b in zip(one, two))
    print(f"receiver: spans {message.spans}; cache edited: {changed}; equal to one process alone: {equal}")


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        share(sys.argv[1], int(sys.argv[2]))
