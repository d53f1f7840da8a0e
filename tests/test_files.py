"""Files that appear whole or not at all, and what a killed process leaves of them."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lcf_fast.files import only_writer, sweep, whole_file, write_whole

ROOT = Path(__file__).resolve().parents[1]
DIES = """
import os, signal, sys
from pathlib import Path
from lcf_fast.files import whole_file
with whole_file(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def left_by_a_kill(path: Path) -> str:
    """What a process that was writing ``path`` when it was killed has left."""
    before = set(names(path.parent))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    assert subprocess.run([sys.executable, "-c", DIES, str(path)], env=environment).returncode == -signal.SIGKILL
    (left,) = set(names(path.parent)) - before
    return left


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", b"old")

    def interrupted() -> None:
        with whole_file(tmp_path / "a") as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_whole(tmp_path / "a", b"new")
    assert caught.value.filename == str(tmp_path / "a")
    assert names(tmp_path) == []


def test_its_name_is_on_the_disk_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append((os.path.isdir(f"/proc/self/fd/{descriptor}"), names(tmp_path)))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_whole(tmp_path / "a", b"new")
    assert [folder for folder, _ in synced] == [False, True]
    assert synced[1][1] == ["a"], "the folder is brought to the disk before the file has its name"


@pytest.mark.parametrize("how", ["sweep", "only_writer"])
def test_what_a_kill_left_is_removed_and_nothing_else(how: str, tmp_path: Path) -> None:
    write_whole(tmp_path / "a", b"old")
    left = left_by_a_kill(tmp_path / "a")
    others = [".a", f"{left}.txt", left[1:], f"x{left}"]
    for name in others:
        (tmp_path / name).touch()
    with whole_file(tmp_path / "b") as file:  # another process's, as far as the lock tells
        (mine,) = set(names(tmp_path)) - {"a", left, *others}
        if how == "sweep":
            sweep(tmp_path)
        else:
            with only_writer(tmp_path):
                pass
        assert names(tmp_path) == sorted(["a", mine, *others])
        file.write(b"new")
    assert names(tmp_path) == sorted(["a", "b", *others])


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    sweep(tmp_path / "missing")
    (tmp_path / "file").touch()
    sweep(tmp_path / "file")
    with pytest.raises(NotADirectoryError, match="file"), only_writer(tmp_path / "file"):
        pass
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match="folder"):
        write_whole(tmp_path / "folder", b"")
    with pytest.raises(NotADirectoryError) as caught:
        write_whole(tmp_path / "file" / "a", b"")
    assert caught.value.filename == str(tmp_path / "file" / "a"), "the name that was given, not that of its part"
