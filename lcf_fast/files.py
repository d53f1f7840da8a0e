"""Writing a file so that no reader ever sees half of it, and into a folder that no other process writes to."""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

__all__ = ["only_writer", "sweep", "sync_folder", "whole_file", "write_whole"]

#: Names of files that are being written, or were when their process was killed.
_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{16}\.part")
#: A disk without room, which the system tells without a name.
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold a folder, made if need be, until the block or the process ends, against all others that would hold it.

    What a killed process left half written in it is removed. Where the system or the file system has no such locks,
    nothing is held.

    Raises:
        BlockingIOError: another holds it. OSError: the folder cannot be made or opened.
    """
    with suppress(FileExistsError):
        folder.mkdir(parents=True, exist_ok=True)
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    if os.name == "nt":  # which opens no folders
        sweep(folder)
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if not _hold(descriptor):
            raise BlockingIOError(errno.EWOULDBLOCK, "another run is writing there", str(folder))
        sweep(folder)
        yield
    finally:
        os.close(descriptor)


def sweep(folder: Path) -> None:
    """Remove what killed processes left half written in a folder. What another process is writing stays."""
    for path in list(folder.iterdir()) if folder.is_dir() else []:
        if _UNFINISHED.fullmatch(path.name) and path.is_file():
            with suppress(OSError):
                with open(path, "r+b") as file:
                    left = _hold(file.fileno())
                if left:
                    path.unlink()


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to bit by bit: at ``path``, and on the disk, when the block ends; if that raises, not at all.

    Written under another name, then moved; what was at ``path`` before stays until then.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        with open(temporary, "xb") as file:
            _hold(file.fileno())
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        if isinstance(error, OSError) and (error.filename == str(temporary) or error.errno in _FULL):
            error.filename = str(path)  # the name that the caller knows
        with suppress(OSError):
            temporary.unlink()
        raise


def write_whole(path: Path, data: bytes) -> None:
    """All of ``data`` or nothing, and on the disk when this returns."""
    with whole_file(path) as file:
        file.write(data)


def sync_folder(folder: Path) -> None:
    """Bring a folder's entries to the disk, so that a rename outlives a power cut, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # a folder to write to and not to list; on Windows, which opens none, every one
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems sync no folders
            raise
    finally:
        os.close(descriptor)


def _hold(descriptor: int) -> bool:
    """Lock what is open until it is closed; False: another process has. True where there are no locks."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        pass
    return True
