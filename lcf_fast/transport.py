"""Messages over a stream socket, Unix or TCP: one after the other, each framed by its own preamble.

What arrives is untrusted: nothing is allocated for a message until its first 56 bytes say that it is one, and of a
size that the receiver takes; nothing is used until all of it has been checked (:mod:`lcf_fast.wire`). A socket is no
secret: across machines pass a ``key``, which both sides have, or use TLS.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .errors import DTypeError, IndexRangeError, MessageError
from .message import MAX_BYTES, Message
from .wire import PREAMBLE, check_preamble, decode, stated_length

__all__ = ["receive_message", "send_message"]

#: A year. Sockets count in 64-bit nanoseconds, and some platforms in fewer.
_MAX_TIMEOUT = 366 * 24 * 3600


def send_message(
    sock: socket.socket, message: Message | bytes | bytearray, *, timeout: float | None = None, **arguments: Any
) -> int:
    """Send one message and return the number of bytes sent.

    Args:
        sock: a connected stream socket.
        message: a Message, or the bytes of one that was encoded before (once, for several receivers).
        timeout: seconds for all of it; None: no limit.
        arguments: ``dtype``, ``contents`` and ``key`` of `Message.to_bytes`; none with bytes.

    Raises:
        MessageError and others: as `Message.to_bytes`, before anything is sent; bytes that are not as long as they
            state. OSError: as the socket raises; close it then, part of the message may have been sent.
    """
    if isinstance(message, Message):
        data: bytes | bytearray = message.to_bytes(**arguments)
    elif isinstance(message, (bytes, bytearray)) and not arguments:
        data = message
        if (length := stated_length(data)) != len(data):
            raise MessageError("message", expected=f"{length} bytes as it states", got=str(len(data)))
    else:
        expected = "a Message, or bytes and no further arguments"
        raise DTypeError("message", expected=expected, got=type(message).__name__)
    _check_timeout(timeout)
    with _own_timeout(sock):
        sock.settimeout(timeout)
        sock.sendall(data)
    return len(data)


def receive_message(
    sock: socket.socket, *, key: bytes | None = None, max_bytes: int = MAX_BYTES, timeout: float | None = None
) -> Message:
    """Receive one message; not a byte of what follows it is read.

    Args:
        sock: a connected stream socket.
        key, max_bytes: as in `Message.from_bytes`.
        timeout: seconds for all of it, however slowly it trickles in; None: no limit, wait for ever.

    Raises:
        MessageError: what `Message.from_bytes` refuses; too much of it; the stream ends, breaks off or is too slow.
            Close the socket then: where the next message would begin is not known.
    """
    _check_timeout(timeout)
    deadline = None if timeout is None else time.monotonic() + timeout
    with _own_timeout(sock):
        start = bytearray(PREAMBLE)
        _fill(sock, memoryview(start), deadline)
        data = bytearray(check_preamble(start, key=key, max_bytes=max_bytes))
        data[:PREAMBLE] = start
        _fill(sock, memoryview(data)[PREAMBLE:], deadline)
    return decode(data, key=key, max_bytes=max_bytes)


def _check_timeout(timeout: float | None) -> None:
    """None, or seconds that a socket can count."""
    if timeout is None:
        return
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise DTypeError("timeout", expected="seconds, or None", got=type(timeout).__name__)
    if not 0 <= timeout <= _MAX_TIMEOUT:
        raise IndexRangeError("timeout", expected=f"0 to {_MAX_TIMEOUT} seconds, or None", got=str(timeout)[:80])


def _fill(sock: socket.socket, view: memoryview, deadline: float | None) -> None:
    """Receive until ``view`` is full."""
    done = 0

    def failed(got: str) -> MessageError:
        return MessageError("socket", expected=f"{view.nbytes} more bytes of a message", got=f"{done}, then {got}")

    while done < view.nbytes:
        left = None if deadline is None else deadline - time.monotonic()
        try:
            # Looked at here too: a sender that never lets the socket run dry would never meet its timeout.
            if left is not None and left <= 0:
                raise TimeoutError
            sock.settimeout(left)
            count = sock.recv_into(view[done:])
        except TimeoutError:
            raise failed("the time was up") from None
        except OSError as error:  # reset, unreachable, not connected; TLS that does not come out right
            raise failed(error.strerror or str(error)) from error
        if count == 0:
            raise failed("the end of the stream")
        done += count


@contextmanager
def _own_timeout(sock: socket.socket) -> Iterator[None]:
    """The socket's timeout is the caller's again in the end."""
    before = sock.gettimeout()
    try:
        yield
    finally:
        if sock.fileno() >= 0:
            sock.settimeout(before)
