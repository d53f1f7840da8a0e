"""The small agents' folder: what an interrupted run leaves of it is no agent."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from lcf_fast.demo import suite
from lcf_fast.demo.agents import AgentSize, make_agent
from lcf_fast.demo.jobs import Job, Workers, pack
from lcf_fast.demo.run import Plan
from lcf_fast.training.models import load_model

pytest.importorskip("transformers")

SIZE = AgentSize(1, 32, 2, 1)
PLAN = Plan(sharer=SIZE, receiver=SIZE, cross={}, shared=(), slots=(), items=1, rounds=1)


class Trained:
    """Stands in for the workers: an agent that has learned its task, for each job."""

    def __init__(self) -> None:
        self.roles: list[str] = []

    def run(self, jobs: Sequence[Job]) -> list[bytes]:
        self.roles += [job.name for job in jobs]
        return [pack(make_agent(SIZE, 1)) for _ in jobs]


def make_agents(folder: Path) -> list[str]:
    """Which agents had to be trained."""
    pool = Trained()
    suite._agents(folder, PLAN, range(0, 100_000, 1000), cast("Workers", pool))
    return pool.roles


def test_an_agent_that_was_half_saved_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(model: Any, folder: Path) -> None:
        if folder.name.startswith("receiver"):  # transformers writes the configuration before the weights
            model.config.save_pretrained(folder)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(model, folder)

    real = suite.save_agent
    with monkeypatch.context() as patch:
        patch.setattr(suite, "save_agent", full)
        with pytest.raises(OSError, match="No space left"):
            make_agents(tmp_path)
    assert make_agents(tmp_path) == ["receiver"]  # the sharer was there
    assert make_agents(tmp_path) == []
    expected = make_agent(SIZE, 1).state_dict()
    for role in ("sharer", "receiver"):
        found = load_model(role, str(tmp_path / "agents" / role), "fp32").state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert sorted(path.name for path in (tmp_path / "agents").iterdir()) == ["receiver", "sharer"]
