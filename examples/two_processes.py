"""Two processes on one machine: a sharer that has read something, and a receiver that has not.

    python examples/two_processes.py

The sharer pools its cache to a message and sends it over a local socket; the receiver checks it, edits its own cache
with it, and compares that with what one process alone makes of the same caches. Here the caches are random numbers; in
use they are what two language models hold after their prompts. What crosses the socket are tensors and a little JSON.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
from dataclasses import replace

import torch

from lcf_fast import CacheGeometry, LatentCacheFlow, LCFConfig, MessageError
from lcf_fast.fingerprint import Origin, receiver_digest, sharer_digest
from lcf_fast.transport import receive_message, send_message

SHARER = CacheGeometry(layers=3, kv_heads=2, head_dim=32)
RECEIVER = CacheGeometry(layers=4, kv_heads=2, head_dim=64)
SPANS = [[0, 150, 320, 400]]

Cache = list[tuple[torch.Tensor, torch.Tensor]]


def cache(geometry: CacheGeometry, tokens: int, seed: int) -> Cache:
    """One (key, value) a layer, each (batch, KV heads, tokens, head dim)."""
    random = torch.Generator().manual_seed(seed)
    shape = (1, geometry.kv_heads, tokens, geometry.head_dim)
    return [
        (torch.randn(shape, generator=random), torch.randn(shape, generator=random)) for _ in range(geometry.layers)
    ]


def origin_of(adapter: LatentCacheFlow) -> Origin:
    """Digests of the adapter's two halves: the same on both sides, or the message is not for this receiver."""
    layers, reads = adapter.receiver_layers.tolist(), adapter.sharer_layers.tolist()
    weights, config = dict(adapter.named_parameters()), adapter.config
    return Origin(
        adapter=receiver_digest(config.receiver, layers, config.norm_eps, weights),
        sharer=sharer_digest(config.sharer, layers, reads, weights),
    )


def share(folder: str, port: int) -> None:
    """The sharer's process: pool, send."""
    adapter = LatentCacheFlow.from_pretrained(folder)
    heard = cache(SHARER, tokens=400, seed=1)
    with torch.no_grad():
        message = adapter.summarize(heard, SPANS)
    message = replace(message, sharer=SHARER, receiver=RECEIVER, made_by=origin_of(adapter))
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sent = send_message(sock, message)
    whole = sum(key.nbytes + value.nbytes for key, value in heard)
    print(f"sharer: sent {sent:,} bytes for a cache of {whole:,}", flush=True)


def receive(folder: str, listener: int) -> None:
    """The receiver's process: receive, check, inject."""
    adapter = LatentCacheFlow.from_pretrained(folder)
    with socket.socket(fileno=listener) as server:
        sock, _ = server.accept()
    with sock:
        message = receive_message(sock, max_bytes=100_000, timeout=60.0)
    if message.origin != origin_of(adapter):
        raise MessageError("message.origin", expected=f"{origin_of(adapter)}", got=f"{message.origin}")
    own = cache(RECEIVER, tokens=20, seed=2)
    with torch.no_grad():
        edited = adapter.inject(own, message)
        alone = adapter.inject(own, adapter.summarize(cache(SHARER, tokens=400, seed=1), SPANS))
    changed = not torch.equal(edited[0][0], own[0][0])
    equal = all(torch.equal(a, b) for one, two in zip(edited, alone) for a, b in zip(one, two))
    print(f"receiver: spans {message.spans}; cache edited: {changed}; equal to one process alone: {equal}", flush=True)


def main() -> None:
    """Save a random adapter, start both processes on it, wait for them."""
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as server:
        torch.manual_seed(0)
        config = LCFConfig(SHARER, RECEIVER, bottleneck=64, cross_context=True)
        LatentCacheFlow(config).save_pretrained(folder)
        me, port, listener = [sys.executable, __file__], server.getsockname()[1], server.fileno()
        receiver = subprocess.Popen([*me, "receive", folder, str(listener)], pass_fds=[listener])
        sharer = subprocess.Popen([*me, "share", folder, str(port)])
        if sharer.wait() or receiver.wait():
            receiver.kill()
            sys.exit(1)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        {"share": share, "receive": receive}[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
