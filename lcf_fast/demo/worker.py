"""How a worker process begins: apart from `lcf_fast.demo.jobs`, since torch, which that imports, takes seconds."""

from __future__ import annotations

import signal
from typing import Any

__all__ = ["begin"]


def begin(mail: Any) -> None:
    """Initializer of a worker; ``mail``: where it tells how its jobs go."""
    # Ctrl-C ends a worker at once: an interrupted job would be followed by the next one that waits.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from . import jobs

    jobs.begin(mail)
