"""Writing a file so that no reader ever sees half of it, and into a folder that no other process writes to."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ["only_writer", "whole_file", "write_whole"]


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold a folder, made if need be, until the block or the process ends, against all others that would hold it.

    Where the system or the file system has no such locks, nothing is held.

    Raises:
        BlockingIOError: another holds it. OSError: the folder cannot be made or opened.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(error.errno, "another run is writing there", str(folder)) from None
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to bit by bit: at ``path``, and on the disk, when the block ends; if it raises, not at all.

    Written under another name, then moved; what was at ``path`` before stays until then.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_whole(path: Path, data: bytes) -> None:
    """All of ``data`` or nothing, and on the disk when this returns."""
    with whole_file(path) as file:
        file.write(data)
