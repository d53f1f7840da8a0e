"""The test tools themselves: a budget that passes everything would hide every other fault."""

from __future__ import annotations

import os

import pytest
import torch

from helpers import (
    ADVERSARIES,
    CACHE_LAYOUTS,
    GATES,
    Geometry,
    assert_same_rows,
    assert_within_budget,
    beyond_int32,
    guarded,
    make_cache,
    make_weights,
    rows_beyond_int32,
)


def test_fresh_memory_is_poisoned(device: torch.device) -> None:
    assert torch.isnan(torch.empty(5, device=device)).all()
    assert torch.isnan(torch.empty_like(torch.ones(2, 2, dtype=torch.bfloat16, device=device))).all()
    assert torch.isnan(torch.ones(1, device=device).new_empty(3)).all()


def test_triton_runs_interpreted_unless_on_a_gpu(device: torch.device) -> None:
    triton = pytest.importorskip("triton")
    assert triton.knobs.runtime.interpret == (device.type == "cpu" and os.environ["TRITON_INTERPRET"] == "1")


def budget_case() -> tuple[torch.Tensor, torch.Tensor]:
    truth = torch.randn(64, 65, dtype=torch.float64)
    return truth, truth.bfloat16()


def test_budget_passes_what_is_as_good_as_torch() -> None:
    truth, plain = budget_case()
    assert_within_budget(plain.clone(), truth, plain)
    assert_within_budget(plain[:0], truth[:0], plain[:0])
    assert_within_budget(torch.zeros(3), torch.zeros(3, dtype=torch.float64), torch.zeros(3))


@pytest.mark.parametrize(
    "fault", ["one_element", "many_elements", "bias", "nan", "dtype", "shape", "infinite_truth", "single_truth"]
)
def test_budget_catches(fault: str) -> None:
    truth, plain = budget_case()
    got = plain.clone()
    if fault == "one_element":
        got[3, 4] += 0.25
    elif fault == "many_elements":  # two fifths: what neither the largest nor the median sees
        got.view(-1)[::5] += 0.05
        got.view(-1)[1::5] += 0.05
    elif fault == "infinite_truth":
        truth[0, 0] = torch.inf
    elif fault == "single_truth":
        truth = truth.float()
    elif fault == "bias":
        got *= 1.02
    elif fault == "nan":
        got[0, 0] = torch.nan
    elif fault == "dtype":
        got = got.float()
    else:
        got = got[:, 1:]
    with pytest.raises(AssertionError):
        assert_within_budget(got, truth, plain)


def test_budget_is_not_blinded_by_one_huge_element() -> None:
    truth = torch.randn(64, 65, dtype=torch.float64)
    truth[0, 0] = 1e6 + 1 / 3
    plain = truth.bfloat16()
    got = plain.clone()
    got[1:] *= 1.05
    with pytest.raises(AssertionError, match="median"):
        assert_within_budget(got, truth, plain)


def test_rows_in_other_places_are_held_to_their_bits_or_nearly() -> None:
    rows = torch.randn(4, 64)
    assert_same_rows(rows.clone(), rows)
    with pytest.raises(AssertionError):
        assert_same_rows(rows + 1e-4, rows)


@pytest.mark.parametrize("where", [-1, 6])
def test_guard_sees_a_write_beyond_the_tensor(where: int) -> None:
    tensor, check = guarded((2, 3), torch.float16)
    assert torch.isnan(tensor).all()
    tensor.fill_(1.0)
    check()
    tensor.as_strided((1,), (1,), tensor.storage_offset() + where).fill_(torch.nan)
    with pytest.raises(AssertionError, match="before" if where < 0 else "after"):
        check()


@pytest.mark.parametrize("layout", CACHE_LAYOUTS)
def test_layouts_change_the_strides_and_not_the_values(layout: str) -> None:
    geometry = Geometry(1, 3, 8)
    (plain,) = make_cache(geometry, 2, 5, generator=torch.Generator().manual_seed(1))
    (pair,) = make_cache(geometry, 2, 5, layout=layout, generator=torch.Generator().manual_seed(1))  # type: ignore[arg-type]
    for got, same in zip(pair, plain):
        assert got.stride(-1) == 1
        if layout == "expanded":
            assert got.stride(0) == 0
            assert torch.equal(got[1], same[0])
            continue
        assert torch.equal(got, same)
        assert (got.stride(), got.storage_offset()) != (same.stride(), 0) or layout == "contiguous"
    assert (pair[0].stride() != pair[1].stride()) == (layout == "unlike")


@pytest.mark.parametrize("kind", ADVERSARIES)
def test_adversaries_are_finite_and_what_randn_is_not(kind: str) -> None:
    for tensor in make_cache(Geometry(1, 2, 16), 2, 7, adversary=kind, dtype=torch.float16)[0]:  # type: ignore[arg-type]
        assert torch.isfinite(tensor).all()
        low, high = float(tensor.min()), float(tensor.max())
        assert {
            "zeros": low == high == 0,
            "all_equal": low == high != 0,
            "huge_element": high == 300 and float(tensor.abs().median()) < 1,
            "large_offset": low > 30,
            "tiny": 0 < high < 0.002,
        }[kind]


def test_what_lies_beside_a_cache_is_nan() -> None:
    ((key, value),) = make_cache(Geometry(1, 1, 8), 1, 5, layout="padded")
    assert torch.isnan(key.as_strided((5, 8), (8, 1), 40)).all()
    ((key, value),) = make_cache(Geometry(1, 1, 8), 1, 5, layout="offset")
    assert torch.isnan(value.as_strided((1,), (1,), 0)).all() and value.storage_offset() == 1


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_last_row_lies_beyond_32_bits(axis: int) -> None:
    shape = [1, 1, 1, 8]
    shape[axis] = 3
    far = beyond_int32(tuple(shape), axis)  # type: ignore[arg-type]
    assert 2 * far.stride(axis) == 2**31
    far.fill_(1.0)
    assert bool((far == 1).all())


@pytest.mark.parametrize("rows", [33, 65, 66])
def test_only_the_last_of_many_rows_lies_beyond_32_bits(rows: int) -> None:
    far = rows_beyond_int32(rows)
    assert far.shape == (1, 1, rows, 64)
    assert (rows - 2) * far.stride(2) < 2**31 <= (rows - 1) * far.stride(2)
    far.fill_(1.0)
    assert bool((far == 1).all())


@pytest.mark.parametrize("gates", GATES)
def test_weights_have_the_public_names_and_shapes(gates: str) -> None:
    sharer, receiver = Geometry(3, 2, 8), Geometry(5, 3, 16)
    weights = make_weights(sharer, receiver, 64, cross_context=True, gates=gates, saturated=True)
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == {
        "down_weight": (5, 64, 128),
        "down_bias": (5, 64),
        "norm_weight": (5, 2, 64),
        "ffn_in_weight": (5, 2, 256, 64),
        "ffn_out_weight": (5, 2, 64, 256),
        "up_weight": (5, 2, 48, 32),
        "up_bias": (5, 2, 48),
        "head_gate_weight": (5, 2, 3, 64),
        "head_gate_bias": (5, 2, 3),
        "gate_logit": (5, 2),
        "span_query": (5, 2, 8),
        "global_query": (5, 2, 8),
    }
    assert torch.equal(weights["gate_logit"][0] > 0, torch.tensor(GATES[gates][0]))
    assert (weights["head_gate_bias"].abs() == 60).all()
