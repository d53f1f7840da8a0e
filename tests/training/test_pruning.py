"""Layers ranked and dropped: by gates, by a metric of any kind, by the receiver's loss."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import KINDS, RandomData, tiny_adapter, tiny_model, tiny_settings

from lcf_fast import CacheGeometry, IndexRangeError, LatentCacheFlow, LCFConfig, use_backend
from lcf_fast.pruning import PruningError, audit_gates, closed_gates, rank_layers, write_plot
from lcf_fast.reading.data_errors import DataError
from lcf_fast.training.ablation import rank_layers_by_loss
from lcf_fast.training.batches import Batch
from lcf_fast.training.step import OnlinePrefills, Prefill, TrainingStep

SHARER, RECEIVER = CacheGeometry(3, 1, 8), CacheGeometry(6, 2, 8)
HARMFUL, DEAD, VITAL = 1, 2, 5
#: What a layer's edit is worth to `Worth`; layers 0, 3 and 4 are useful, 3 and 4 as much as each other.
WORTH = {0: 1.0, HARMFUL: -4.0, DEAD: 100.0, 3: 2.0, 4: 2.0, VITAL: 8.0}


def six_layers(*, cross_context: bool = False, keep_layers: Sequence[int] | None = None) -> LatentCacheFlow:
    torch.manual_seed(1)
    config = LCFConfig(SHARER, RECEIVER, bottleneck=64, cross_context=cross_context, gate_init=1.0)
    adapter = LatentCacheFlow(config, keep_layers=keep_layers)
    with torch.no_grad():
        gates = torch.linspace(0.5, 1.5, 12).view(6, 2)
        gates[DEAD] = torch.tensor([0.0, -0.5])
        gates[3, 0] = -2.0  # with its other gate open: not dead
        adapter.gate_logit.copy_(gates[adapter.receiver_layers])
    return adapter


def cache(geometry: CacheGeometry, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, geometry.kv_heads, 9, geometry.head_dim)
    return [
        (torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))
        for _ in range(geometry.layers)
    ]


def edit(adapter: LatentCacheFlow) -> list[tuple[torch.Tensor, torch.Tensor]]:
    if adapter.config.cross_context:
        edited = adapter.inject(cache(RECEIVER, 2), adapter.summarize(cache(SHARER, 1), [[0, 4, 9], [0, 2, 9]]))
    else:
        edited = adapter.fuse(cache(SHARER, 1), cache(RECEIVER, 2))
    return list(edited)


class Worth:
    """Counts the layers that an adapter does edit, each for what it is worth."""

    def __init__(self, sign: float = 1.0) -> None:
        self.sign, self.calls = sign, 0

    def __call__(self, adapter: LatentCacheFlow) -> float:
        self.calls += 1
        assert not adapter.training
        assert not torch.is_grad_enabled()
        pairs = zip(edit(adapter), cache(RECEIVER, 2), strict=True)
        changed = [
            not torch.equal(after[0], before[0]) or not torch.equal(after[1], before[1]) for after, before in pairs
        ]
        return self.sign * sum(WORTH[layer] for layer, edited in enumerate(changed) if edited)


@pytest.mark.parametrize("higher_is_better", [True, False])
@pytest.mark.parametrize("cross_context", [False, True])
def test_dead_harmful_and_vital_layers_come_out_as_such(cross_context: bool, higher_is_better: bool) -> None:
    adapter, metric = six_layers(cross_context=cross_context), Worth(1.0 if higher_is_better else -1.0)
    before = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    gates = adapter.gate_logit
    report = rank_layers(adapter, metric, higher_is_better=higher_is_better, name="worth")

    assert {layer.receiver_layer: layer.importance for layer in report.layers} == {**WORTH, DEAD: None}
    assert (report.of("dead"), report.of("harmful")) == ((DEAD,), (HARMFUL,))
    assert report.ranked() == (VITAL, 3, 4, 0)
    assert [report.keep(k) for k in (1, 2, 3, 4)] == [(5,), (3, 5), (3, 4, 5), (0, 3, 4, 5)]
    assert report.keep() == (0, 3, 4, 5)
    assert report.whole == metric.sign * 9
    assert report.alone == 0
    assert report.layers[VITAL].metric_without == metric.sign * 1
    assert (report.layers[3].key_gate, report.layers[3].verdict) == (-2.0, "useful")
    assert metric.calls == 2 + 5

    # The adapter is as it was: mode, weights, and the very parameter that an optimizer may hold.
    assert adapter.training
    assert adapter.gate_logit is gates
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.state_dict().items())
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["layers"][DEAD]["verdict"] == "dead"


def test_a_layer_that_makes_no_difference_is_not_harmful() -> None:
    report = rank_layers(six_layers(), lambda adapter: 1.0)
    assert report.of("harmful") == ()
    assert report.keep() == tuple(layer for layer in range(6) if layer != DEAD)


def test_layers_are_named_by_the_receiver_in_a_pruned_adapter_too() -> None:
    report = rank_layers(six_layers(keep_layers=[HARMFUL, DEAD, 3, VITAL]).eval(), Worth(), higher_is_better=True)
    assert report.ranked() == (VITAL, 3)
    assert (report.of("dead"), report.of("harmful")) == ((DEAD,), (HARMFUL,))


@pytest.mark.parametrize("cross_context", [False, True])
def test_pruned_edits_are_those_with_the_others_gates_closed(cross_context: bool, tmp_path: Path) -> None:
    kept = [0, 3, VITAL]
    adapter = six_layers(cross_context=cross_context).eval()
    whole = adapter.parameter_count()
    with torch.no_grad(), use_backend("eager"):
        with closed_gates(adapter, [HARMFUL, DEAD, 4]):
            closed = edit(adapter)
        every = edit(adapter)
        adapter.prune(kept).save_pretrained(tmp_path)
        loaded = LatentCacheFlow.from_pretrained(tmp_path)
        assert loaded.receiver_layers.tolist() == kept
        for pruned in (edit(adapter), edit(loaded)):
            for layer, (pair, other) in enumerate(zip(pruned, closed, strict=True)):
                assert torch.equal(pair[0], other[0])
                assert torch.equal(pair[1], other[1])
                # With other layers beside it a product may be added up in another order: the same to rounding.
                apart = float((pair[1] - every[layer][1]).abs().max())
                assert apart < 1e-5 if layer in [*kept, DEAD] else apart > 1e-3
    assert adapter.parameter_count() * 2 == whole


def test_gates_are_back_after_an_error() -> None:
    adapter = six_layers()
    gates, values = adapter.gate_logit, adapter.gate_logit.detach().clone()

    def metric(adapter: LatentCacheFlow) -> float:
        if adapter.gate_logit[0, 0] < 0 < adapter.gate_logit[VITAL, 0]:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        rank_layers(adapter, metric)
    assert adapter.gate_logit is gates
    assert torch.equal(gates, values)
    assert adapter.training

    with pytest.raises(IndexRangeError, match="layers: expected"), closed_gates(adapter, [6]):
        pass
    assert adapter.gate_logit is gates


def test_messages_still_fit_an_adapter_that_was_ranked(tmp_path: Path) -> None:
    six_layers(cross_context=True).save_pretrained(tmp_path)
    adapter = LatentCacheFlow.from_pretrained(tmp_path, dtype=torch.bfloat16)  # known by the digest that was saved
    origin = adapter.origin
    rank_layers(adapter, Worth(), higher_is_better=True)
    assert adapter.origin == origin


def test_what_cannot_be_ranked_is_refused() -> None:
    adapter = six_layers()
    calls = Worth()
    with torch.no_grad():
        adapter.gate_logit.fill_(0.0)
    with pytest.raises(PruningError, match="both gates of all 6 layers are closed"):
        rank_layers(adapter, calls)
    assert calls.calls == 0
    with pytest.raises(PruningError, match="none: 6 dead, 0 harmful"):
        audit_gates(adapter).keep()

    adapter = six_layers()
    with pytest.raises(PruningError, match="nan without layer 3"):
        rank_layers(adapter, lambda a: float("nan") if a.gate_logit[3, 1] < 0 < a.gate_logit[0, 1] else 1.0)
    audit = audit_gates(adapter)
    assert (audit.keep(), audit.of("dead")) == ((0, 1, 3, 4, 5), (DEAD,))
    with pytest.raises(PruningError, match="ranked by a metric"):
        audit.keep(2)

    report = rank_layers(adapter, Worth(), higher_is_better=True)
    for wrong in (0, 5, True):
        with pytest.raises(PruningError, match="1 to 4, since of 6 layers 1 are dead, 1 harmful"):
            report.keep(wrong)
    # Nothing but harmful layers.
    with pytest.raises(PruningError, match="none: 1 dead, 5 harmful"):
        rank_layers(adapter, lambda a: float((a.gate_logit > 0).sum()), higher_is_better=False).keep()


class CountedPrefills:
    def __init__(self, prefiller: OnlinePrefills) -> None:
        self.prefiller, self.calls = prefiller, 0

    def __call__(self, batch: Batch) -> Prefill:
        self.calls += 1
        return self.prefiller(batch)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_without_each_layer_is_that_with_its_gates_closed(kind: str) -> None:
    pytest.importorskip("transformers")
    sharer, receiver = tiny_model("qwen2", 1), tiny_model("qwen3", 2)
    adapter = tiny_adapter(sharer, receiver, cross_context=kind == "cross")
    with torch.no_grad():
        adapter.get_parameter("up_bias")[1] += 3.0  # an edit that no loss can miss
    data = RandomData(tiny_settings(), **KINDS[kind])
    batches = [data.batch(0, index) for index in range(3)]
    prefiller = CountedPrefills(OnlinePrefills(sharer, receiver))
    step = TrainingStep(adapter, receiver, prefiller)
    report = rank_layers_by_loss(step, prefiller, batches)

    assert prefiller.calls == 3  # one a batch, whatever the number of layers
    assert adapter.training
    tokens = sum(int(batch.response_mask.sum()) for batch in batches)
    assert (report.examples, report.response_tokens) == (5, tokens)

    def loss(_: Any) -> float:
        return sum(step(batch).double().item() for batch in batches) / tokens

    slow = rank_layers(adapter, loss)
    measured = [(report.whole, slow.whole), (report.alone, slow.alone)]
    measured += [(a.metric_without, b.metric_without) for a, b in zip(report.layers, slow.layers, strict=True)]
    for fast, by_gates in measured:
        assert fast == pytest.approx(by_gates, rel=1e-6)
    assert len({round(fast, 4) for fast, _ in measured if fast is not None}) == 4
    assert [layer.verdict for layer in report.layers] == [layer.verdict for layer in slow.layers]
    assert report.metric == "loss"
    assert not report.higher_is_better

    with pytest.raises(DataError, match="batches"):
        rank_layers_by_loss(step, prefiller, [])
    with torch.no_grad():
        adapter.gate_logit.fill_(-1.0)
    with pytest.raises(PruningError, match="closed"):
        rank_layers_by_loss(step, prefiller, batches)


def test_the_plot_is_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = pytest.importorskip("matplotlib.image")
    adapter = six_layers()
    report = rank_layers(adapter, Worth(), higher_is_better=True)
    for name, shown, kept in (("ranked", report, (3, 5)), ("audit", audit_gates(adapter), ())):
        path = tmp_path / f"{name}.png"
        write_plot(shown, path, kept)
        pixels = image.imread(path, format="png")
        assert pixels.std() > 0.05
        assert pixels.shape[0] > (500 if name == "ranked" else 300)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["audit.png", "ranked.png"]
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(RuntimeError, match="pip install"):
        write_plot(report, tmp_path / "other.png")
