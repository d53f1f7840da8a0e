"""What a run tells: a log of JSON lines always, TensorBoard's scalars where it is installed."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .failures import RunError

__all__ = ["RunLog", "Scalars"]


class RunLog:
    """One JSON object a step, a line each, on the disk's side of this process as soon as it is written.

    Args:
        path: the file.
        length: how much of it counts; what follows was written after the checkpoint that the run resumes from, and is
            cut off, so that no step is there twice.

    Raises:
        RunError: the file cannot be written, or is shorter than ``length``.
    """

    def __init__(self, path: Path, length: int = 0) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        except OSError as error:
            raise self._error(error) from error
        try:
            held = os.lseek(self._file, 0, os.SEEK_END)
            if held < length:
                raise RunError(str(path), expected=f"the log up to byte {length}", got=f"{held} bytes")
            if held:
                os.ftruncate(self._file, length)
            os.lseek(self._file, length, os.SEEK_SET)
        except OSError as error:
            self.close()
            raise self._error(error) from error
        except RunError:
            self.close()
            raise

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append a line."""
        data = (json.dumps(entry, allow_nan=False) + "\n").encode()
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except OSError as error:
            raise self._error(error) from error

    def sync(self) -> int:
        """Bring it to the disk; its length."""
        try:
            os.fsync(self._file)
        except OSError as error:
            raise self._error(error) from error
        return os.lseek(self._file, 0, os.SEEK_CUR)

    def close(self) -> None:
        os.close(self._file)

    def _error(self, error: OSError) -> RunError:
        return RunError(str(self.path), expected="a log that can be written", got=error.strerror or str(error))


class Scalars:
    """TensorBoard's event files, or nothing where it is not installed. A run does not stop for them."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        with self._harmless():  # purge: what a killed run wrote beyond its checkpoint
            self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def write(self, entry: Mapping[str, Any]) -> None:
        with self._harmless():
            for name, value in entry.items():
                if self._writer is not None and name != "step":
                    self._writer.add_scalar(f"training/{name}", value, entry["step"])

    def close(self) -> None:
        with self._harmless():
            if self._writer is not None:
                self._writer.close()

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._writer = None
            print(f"no more TensorBoard scalars: {error.strerror or error}", file=sys.stderr, flush=True)
