"""Messages over sockets: between processes, and from senders that mean no good."""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from messages import EVERYTHING, PREAMBLE, PUBLISHED, assert_same, make_message, resigned

from lcf_fast import DTypeError, LCFError, Message, MessageError
from lcf_fast.transport import receive_message, send_message

ROOT = Path(__file__).resolve().parents[1]
KEY = b"shared by both"
#: Far above what a loopback needs: a test that waits for ever fails instead.
SOON = 20.0

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def meanwhile(action: Callable[..., Any], *arguments: Any) -> threading.Thread:
    thread = threading.Thread(target=action, args=arguments, daemon=True)
    thread.start()
    return thread


# --- two processes
# ---------------------------------------------------------------------

SHARER = """
import socket, sys, torch
from dataclasses import replace
from lcf_fast import Message
from lcf_fast.transport import receive_message, send_message

with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as sock:
    while True:
        message = receive_message(sock, key=b"shared by both", timeout=20.0)
        if message.metadata.get("say") == "enough":
            break
        send_message(sock, replace(message, latent=message.latent * 2), key=b"shared by both")
"""


def test_two_processes_over_a_loopback() -> None:
    """Another process sends back what it is sent, doubled, until it is told that it is enough."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60.0)
        command = [sys.executable, "-c", SHARER, str(server.getsockname()[1])]
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as child:
            sock, _ = server.accept()
            with sock:
                for batch in (1, 3):
                    message = make_message(batch=batch, metadata={"turn": str(batch)})
                    assert message.latent is not None
                    send_message(sock, message, key=KEY)
                    doubled = receive_message(sock, key=KEY, timeout=SOON)
                    assert_same(doubled, replace(message, latent=message.latent * 2), ("latent",))
                send_message(sock, make_message(metadata={"say": "enough"}), key=KEY)
            assert child.stderr is not None
            said = child.stderr.read()
            assert child.wait(SOON) == 0, said


# --- within one process
# ---------------------------------------------------------------------


def test_messages_follow_each_other(pair: Pair) -> None:
    ours, theirs = pair
    first, second = make_message(), make_message(batch=2)
    sent = send_message(ours, first, dtype="bfloat16", contents=EVERYTHING)
    encoded = second.to_bytes()
    assert send_message(ours, encoded) == len(encoded)
    assert send_message(ours, bytearray(encoded)) == len(encoded)
    assert sent == len(first.to_bytes(dtype="bfloat16", contents=EVERYTHING))
    assert_same(receive_message(theirs), first.to(torch.bfloat16))
    assert_same(receive_message(theirs, timeout=SOON), second, ("latent",))
    assert_same(receive_message(theirs), second, ("latent",))


def test_a_message_larger_than_the_socket_holds(pair: Pair) -> None:
    message = make_message(**PUBLISHED, batch=8)
    thread = meanwhile(lambda: send_message(pair[0], message, contents=EVERYTHING, timeout=SOON))
    assert_same(receive_message(pair[1], timeout=SOON), message)
    thread.join(SOON)


def test_what_is_received_is_not_copied_again(pair: Pair) -> None:
    message = make_message(**PUBLISHED, batch=16)
    data = message.to_bytes(contents=("summary",))
    thread = meanwhile(send_message, pair[0], data)
    tracemalloc.start()
    try:
        received = receive_message(pair[1], timeout=SOON)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    thread.join(SOON)
    assert_same(received, message, ("summary",))
    assert len(data) < peak < len(data) + 500_000


@pytest.mark.parametrize("timeout", [1e12, float("nan"), float("inf"), -1.0, "1", True])
def test_a_timeout_that_a_socket_cannot_count(timeout: Any, pair: Pair) -> None:
    for call in (lambda: send_message(pair[0], make_message(), timeout=timeout),
                 lambda: receive_message(pair[1], timeout=timeout)):  # fmt: skip
        with pytest.raises(LCFError, match=r"^timeout: "):
            call()


def test_the_timeout_of_the_socket_is_left_as_it_was(pair: Pair) -> None:
    ours, theirs = pair
    for before in (None, 7.5):
        ours.settimeout(before)
        theirs.settimeout(before)
        send_message(ours, make_message(), timeout=SOON)
        receive_message(theirs, timeout=SOON)
        with pytest.raises(MessageError, match="the time was up"):
            receive_message(theirs, timeout=0.01)
        with pytest.raises(MessageError, match="the time was up"):
            receive_message(theirs, timeout=0)
        assert ours.gettimeout() == theirs.gettimeout() == before
    # A timeout of the socket's own is not what sending and receiving go by.
    ours.settimeout(0.05)
    thread = threading.Timer(0.3, receive_message, (theirs,))
    thread.start()
    send_message(ours, make_message(**PUBLISHED, batch=8), contents=EVERYTHING)
    thread.join(SOON)
    theirs.settimeout(0.05)
    thread = threading.Timer(0.3, send_message, (ours, make_message()))
    thread.start()
    receive_message(theirs)
    thread.join(SOON)


def test_what_is_not_sent(pair: Pair) -> None:
    ours, theirs = pair
    data = make_message().to_bytes()
    for bad, arguments, kind in (
        (replace(make_message(), made_by=None), {}, MessageError),
        (make_message(), {"dtype": "int4"}, DTypeError),
        (data, {"dtype": "int8"}, DTypeError),
        (data[:-1], {}, MessageError),
        (data + b"\0", {}, MessageError),
        (data[:10], {}, MessageError),
        (b"garbage" * 20, {}, MessageError),
        ("text", {}, DTypeError),
    ):
        with pytest.raises(kind):
            send_message(ours, bad, **arguments)  # type: ignore[arg-type]
    theirs.setblocking(False)
    with pytest.raises(BlockingIOError):
        theirs.recv(1)  # not a byte has been sent


# --- hostile senders
# ---------------------------------------------------------------------


def test_garbage_is_refused_before_more_is_read(pair: Pair) -> None:
    ours, theirs = pair
    garbage = b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n" + b"x" * 100
    ours.sendall(garbage)
    with pytest.raises(MessageError, match=r"message\.magic"):
        receive_message(theirs, timeout=SOON)
    assert theirs.recv(1000) == garbage[PREAMBLE:]


@pytest.mark.parametrize("promise", [1 << 33, (1 << 64) - 1, 10_001, 63, 0])
def test_a_promise_beyond_the_limit_is_refused_before_anything_is_allocated(pair: Pair, promise: int) -> None:
    ours, theirs = pair
    data = make_message().to_bytes()
    ours.sendall(data[:16] + promise.to_bytes(8, "little") + data[24:])
    tracemalloc.start()
    try:
        with pytest.raises(MessageError, match=r"message\.length"):
            receive_message(theirs, max_bytes=10_000, timeout=SOON)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100_000
    assert len(theirs.recv(10_000)) == len(data) - PREAMBLE


@pytest.mark.parametrize("cut", [0, 1, PREAMBLE - 1, PREAMBLE, PREAMBLE + 9, -1])
def test_a_sender_that_goes_away(pair: Pair, cut: int) -> None:
    ours, theirs = pair
    ours.sendall(make_message().to_bytes()[:cut])
    thread = threading.Timer(0.05, ours.close)
    thread.start()
    with pytest.raises(MessageError, match="the end of the stream"):
        receive_message(theirs, timeout=SOON)
    thread.join(SOON)


def test_a_connection_that_is_reset() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        sender = socket.create_connection(server.getsockname())
        receiver, _ = server.accept()
        with receiver:
            sender.sendall(make_message().to_bytes()[:100])
            # Closing without lingering resets the connection.
            sender.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            sender.close()
            with pytest.raises(MessageError, match="socket: expected"):
                receive_message(receiver, timeout=SOON)


def test_a_line_that_fails_otherwise(pair: Pair) -> None:
    """As one that was never connected, is closed on this side, or carries what is no TLS."""

    class Broken:
        def __getattr__(self, name: str) -> Any:
            return getattr(pair[1], name)

        def recv_into(self, view: Any) -> int:
            raise ssl.SSLError("wrong version number")

    with socket.socket() as unconnected:
        for line in (unconnected, Broken()):
            with pytest.raises(MessageError, match="socket: expected 56 more bytes of a message, got 0, then"):
                receive_message(line, timeout=SOON)  # type: ignore[arg-type]
    with pytest.raises(MessageError, match="Bad file descriptor"):
        receive_message(unconnected)


@pytest.mark.parametrize("pause", [0.02, 0.0])
def test_a_sender_that_trickles_does_not_hold_the_receiver(pair: Pair, pause: float) -> None:
    """A byte now and then keeps every single wait short; the time for the whole message still ends."""
    ours, theirs = pair
    data = make_message(**PUBLISHED, batch=64).to_bytes()
    stop = threading.Event()

    def trickle() -> None:
        for at in range(len(data)):
            if stop.wait(pause) if pause else stop.is_set():
                return
            ours.sendall(data[at : at + 1])

    thread = meanwhile(trickle)
    started = time.monotonic()
    with pytest.raises(MessageError, match="the time was up"):
        receive_message(theirs, timeout=0.3)
    assert 0.25 < time.monotonic() - started < 5.0
    stop.set()
    thread.join(SOON)


def test_changed_bytes_and_wrong_keys_are_refused(pair: Pair) -> None:
    ours, theirs = pair
    data = bytearray(make_message().to_bytes(key=KEY))
    data[-1] ^= 1
    for sent, key, argument in (
        (data, KEY, "message.digest"),
        (make_message().to_bytes(key=KEY), b"another", "message.digest"),
        (resigned(make_message().to_bytes(key=KEY)), KEY, "message.digest"),
    ):
        ours.sendall(sent)
        with pytest.raises(MessageError) as caught:
            receive_message(theirs, key=key, timeout=SOON)
        assert caught.value.argument == argument
    ours.sendall(make_message().to_bytes())
    with pytest.raises(MessageError, match="written with a key"):
        receive_message(theirs, key=KEY, timeout=SOON)


def test_a_received_message_can_be_used(pair: Pair) -> None:
    message = make_message()
    send_message(pair[0], message)
    received: Message = receive_message(pair[1])
    assert received.latent is not None
    received.latent.mul_(2)  # its memory is its own
    assert torch.equal(received.latent, message.tensors["latent"] * 2)


def test_the_example_runs() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "two_processes.py"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and done.stderr == ""
    assert "sharer: sent 1,456 bytes for a cache of 614,400" in lines
    assert "receiver: spans 3; cache edited: True; equal to one process alone: True" in lines
