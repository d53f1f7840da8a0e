"""The device of a command's name."""

from __future__ import annotations

import pytest
import torch

from lcf_fast.evaluation.failures import EvaluationError
from lcf_fast.evaluation.loading import chosen_device


def test_a_device_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """With two GPUs, as far as torch says, and with none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert chosen_device(None) == chosen_device("cuda") == torch.device("cuda")
    assert chosen_device("cuda:1") == torch.device("cuda", 1)
    assert chosen_device("cpu") == torch.device("cpu")
    with pytest.raises(EvaluationError, match="--device: expected cuda:0 to cuda:1, got 'cuda:7'"):
        chosen_device("cuda:7")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen_device(None) == torch.device("cpu")
    for name, match in (("cuda:7", "no CUDA GPU here"), ("nonsense", "a name such as cpu")):
        with pytest.raises(EvaluationError, match=match):
            chosen_device(name)
