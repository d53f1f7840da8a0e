"""A context that lies on two or three processes: one message, the same on each, and as that of the whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import make_adapter
from parallel_worker import CASES, SLOT_CASES, case_inputs, slots_half
from safetensors.torch import load_file
from torch import Tensor

from helpers import assert_within_budget, to_double
from lcf_fast import reference
from lcf_fast.errors import DTypeError
from lcf_fast.inputs import span_offsets
from lcf_fast.parallel import summarize_parallel

WORKER = Path(__file__).with_name("parallel_worker.py")


@pytest.fixture(scope="module", params=[2, 3], ids=["two", "three"])
def ranks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[dict[str, Tensor], Any]]:
    """What each process came to: its messages, and what it sent and refused."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(WORKER)]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(request.param), str(folder)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(request.param)
    ]
    try:
        errors = [worker.communicate(timeout=180)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert all(worker.returncode == 0 for worker in workers), "\n".join(errors)
    return [
        (load_file(folder / f"{rank}.safetensors"), json.loads((folder / f"{rank}.json").read_text()))
        for rank in range(request.param)
    ]


@pytest.mark.parametrize("name", CASES)
def test_as_if_it_lay_on_one(name: str, ranks: list[tuple[dict[str, Tensor], Any]]) -> None:
    adapter = make_adapter(True)
    cache, spans, mask = case_inputs(name)
    offsets, pooled = span_offsets(spans, cache[0][0], None if mask is None else mask != 0)
    weights = {key: p.detach() for key, p in adapter.named_parameters()}
    layers = [cache[s] for s in adapter.sharer_layers.tolist()]
    truth = reference.summarize_layers(
        to_double(layers), {key: p.double() for key, p in weights.items()}, offsets, attention_mask=pooled
    )
    plain = reference.summarize_layers(layers, weights, offsets, attention_mask=pooled)
    first = ranks[0][0]
    for part, exact, single in zip(("latent", "summary"), truth, plain):
        assert_within_budget(first[f"{name}.{part}"], exact, single, 4.0)
        for other, _ in ranks[1:]:
            assert torch.equal(other[f"{name}.{part}"], first[f"{name}.{part}"])
    whole = adapter.summarize(cache, spans, attention_mask=mask)
    assert {facts["sent"][name]["spans"] for _, facts in ranks} == {whole.spans}


@pytest.mark.parametrize("name", SLOT_CASES)
def test_slots_as_if_it_lay_on_one(name: str, ranks: list[tuple[dict[str, Tensor], Any]]) -> None:
    """Of an adapter, and of its sharer's half; ragged rows, ranks without a token."""
    adapter = slots_half()
    cache, _, mask = case_inputs(name)
    weights = {key: p.detach() for key, p in adapter.named_parameters()}
    layers = [cache[s] for s in adapter.sharer_layers.tolist()]
    doubled = {key: p.double() for key, p in weights.items()}
    truth = reference.summarize_slots_layers(to_double(layers), doubled, attention_mask=mask)
    plain = reference.summarize_slots_layers(layers, weights, attention_mask=mask)
    first = ranks[0][0][f"{name}.slots"]
    assert_within_budget(first, truth, plain, 4.0)
    for other, facts in ranks:
        assert torch.equal(other[f"{name}.slots"], first)
        assert facts["sent"][f"{name}.slots"]["spans"] == 1


def test_a_group_of_some_processes(ranks: list[tuple[dict[str, Tensor], Any]]) -> None:
    cache, _, _ = case_inputs("one_span")
    for name, half in (("group", make_adapter(True)), ("group.slots", slots_half())):
        whole = half.summarize(cache).tensors["latent"]
        assert [name in found for found, _ in ranks] == [False] * (len(ranks) - 2) + [True] * 2
        for found, _ in ranks[-2:]:
            torch.testing.assert_close(found[name], whole)


def test_what_is_sent_does_not_depend_on_the_length(ranks: list[tuple[dict[str, Tensor], Any]]) -> None:
    sent = {name: {facts["sent"][name]["bytes"] for _, facts in ranks} for name in CASES}
    assert sent["one_span"] == sent["long"]  # 60 tokens and 100,000
    layers, heads, dim = 5, 2, 16
    assert sent["long"] == {layers * heads * (3 * 2 * dim + 8) * 4 + 4 * 8}
    slots = [{facts["sent"][f"{name}.slots"]["bytes"] for _, facts in ranks} for name in ("one_span", "long")]
    assert slots == [{layers * heads * 3 * (2 * dim + 2) * 4 + 4 * 8}] * 2


def test_all_ranks_hear_of_what_is_wrong_on_one(ranks: list[tuple[dict[str, Tensor], Any]]) -> None:
    for rank, (_, facts) in enumerate(ranks):
        errors = facts["errors"]
        assert errors["cache"].startswith("GeometryError" if rank == 1 else "ShapeError: cache_piece"), errors
        told = "GeometryError: adapter: expected an LCF-X" if rank == 1 else "ShapeError: cache_piece: expected right"
        assert errors["half"].startswith(told), errors
        for name in ("spans", "gap"):
            assert errors[name].startswith("SpanError: spans: expected the whole context's"), errors
        assert errors["items"] == "ShapeError: spans: expected spans of 1 items, got of 2", errors
        assert errors["beyond"].startswith("SpanError: spans: expected offsets up to"), errors
        assert errors["nothing"].startswith("SpanError: spans: expected a token"), errors
        for name in ("slots, cache", "later layer", "slots, later layer"):
            told = "GeometryError: cache_piece" if rank == 1 else "ShapeError: cache_piece"
            assert errors[name].startswith(told), errors
        for name in ("batch", "slots, batch"):
            assert errors[name].startswith("ShapeError: cache_piece: expected one batch size on all ranks"), errors
        for name in ("double", "slots, double"):
            assert errors[name] == "DTypeError: cache_piece: expected float64 on all ranks or none, got on 1", errors
        told = "SpanError: spans: expected None" if rank == 1 else "ShapeError: cache_piece: expected right input"
        assert errors["slots, spans"].startswith(told), errors
        assert errors["slots, nothing"].startswith("SpanError: pool: expected a token"), errors


def test_it_needs_a_process_group() -> None:
    cache, _, _ = case_inputs("one_span")
    with pytest.raises(DTypeError, match="torchrun"):
        summarize_parallel(make_adapter(True), cache)
    with pytest.raises(DTypeError, match="torchrun"):
        summarize_parallel(slots_half(), cache)
