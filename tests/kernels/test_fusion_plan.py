"""Plans of launches: what shares compiled kernels, and what must not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from helpers import Geometry, make_cache
from lcf_fast.kernels import fusion_plan
from lcf_fast.kernels.fusion_plan import Launch, Sizes
from lcf_fast.layouts import Layout


@pytest.fixture(autouse=True)
def no_plans_are_known() -> Iterator[None]:
    fusion_plan.plan_of.cache_clear()
    yield
    fusion_plan.plan_of.cache_clear()


def launch(head_dim: int = 64, extra: int = 0, tokens: int = 200, precision: str = "ieee") -> Launch:
    """One layer's, on an sm_90; rows lie ``head_dim + extra`` elements apart."""
    ((key, value),) = make_cache(Geometry(1, 2, head_dim + extra), 1, tokens, dtype=torch.float16)
    layout = Layout.of([key[..., :head_dim], value[..., :head_dim]])
    sizes = Sizes(64, 256, 2, 8 * head_dim, 2)
    arguments = (((True, True),), tokens, False, True, False, 1e-6, precision, "sm_90")
    (only,) = fusion_plan.plan_of(layout, layout, sizes, *arguments).launches
    return only


def test_other_lengths_share_compiled_kernels() -> None:
    assert launch().variants is launch(tokens=216).variants


@pytest.mark.parametrize(
    "change",
    [
        lambda: launch(extra=8),  # strides that do not divide by 16
        lambda: launch(head_dim=32),
        lambda: launch(precision="tf32"),
        lambda: launch(tokens=128),  # few: other tiles
    ],
    ids=["strides", "heads", "precision", "tiles"],
)
def test_what_kernels_are_compiled_for_is_apart(change: Callable[[], Launch]) -> None:
    assert launch().variants is not change().variants


@pytest.mark.parametrize("name", ["num_warps", "num_stages"])
def test_rows_that_differ_in_options_alone_are_apart(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `bench.tune` tries them, one after the other."""
    before, chosen = launch(), fusion_plan.tile_config

    def other(*arguments: int) -> object:
        row = chosen(*arguments)  # type: ignore[arg-type]
        return replace(row, **{name: getattr(row, name) + 1})

    monkeypatch.setattr(fusion_plan, "tile_config", other)
    fusion_plan.plan_of.cache_clear()
    after = launch()
    assert after.options[name] == before.options[name] + 1 and after.variants is not before.variants
