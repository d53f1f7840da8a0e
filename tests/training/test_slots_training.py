"""Training of slots: the step against plain calls, slot dropout, the guard loss, resuming, the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_folders import save_tiny_model, write_lines
from tiny_slots import BY_LENGTH, by_length, family_model
from tiny_training import RandomData, read_log, tiny_adapter, tiny_model, tiny_settings, tiny_store
from torch import Tensor

from lcf_fast import CacheGeometry, LatentSlots, LCFConfig
from lcf_fast.cli import main
from lcf_fast.errors import DTypeError, GeometryError, LCFError
from lcf_fast.reading.prefill import dynamic_cache, prefill
from lcf_fast.training import prefills as prefills_module
from lcf_fast.training import step as step_module
from lcf_fast.training.batches import Batch, collate
from lcf_fast.training.failures import RunError
from lcf_fast.training.held_out import held_out_loss
from lcf_fast.training.prefills import StoredPrefills
from lcf_fast.training.settings import TrainingSettings
from lcf_fast.training.step import OnlinePrefills, TrainingStep, frozen, receiver_prefill
from lcf_fast.training.tokenizing import TokenizedExample
from lcf_fast.training.trainer import Trainer

SLOTS = 4


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    return tuple(frozen(tiny_model(k, s), device="cpu", precision="fp32") for k, s in (("qwen2", 1), ("qwen3", 2)))  # type: ignore[return-value]


def adapter_of(models: tuple[Any, Any], *, dropout: float = 0.0) -> LatentSlots:
    sharer, receiver = (CacheGeometry.of(model) for model in models)
    torch.manual_seed(5)
    made = LatentSlots(LCFConfig(sharer, receiver, bottleneck=64, slots=SLOTS, dropout=dropout))
    with torch.no_grad():
        made.get_parameter("up_weight").mul_(4.0)
    return made


def batch_of(examples: int = 6) -> Batch:
    settings = tiny_settings(batch_size=examples, micro_batch_size=examples)
    return RandomData(settings, cross_context=True).batch(0, 0)


def one_by_one(adapter: LatentSlots, models: tuple[Any, Any], batch: Batch, placement: str, shift: int = 0) -> Tensor:
    """Each item's loss by plain calls of the models: no padding, response tokens fed one at a time.

    ``shift``: whose message an item gets, so many places before it.
    """
    sharer, receiver = models
    losses = []
    for i in range(len(batch.ids)):
        j = (i - shift) % len(batch.ids)
        prompt = batch.receiver_ids[i][batch.receiver_mask[i].bool()]
        heard = batch.sharer_ids[j][batch.sharer_mask[j].bool()]
        response = batch.response_ids[i][batch.response_mask[i].bool()]
        message = adapter.summarize(sharer(heard[None], use_cache=True).past_key_values)
        if placement == "append":
            own = receiver(prompt[None, :-1], use_cache=True).past_key_values
            cache = dynamic_cache(adapter.append(receiver, [(x.keys, x.values) for x in own.layers], message))
        else:
            cache = adapter.prefix(receiver, message)
            receiver(prompt[None, :-1], past_key_values=cache)
        token, total = prompt[-1], torch.zeros(())
        for wanted in response:
            logits = receiver(token[None, None], past_key_values=cache).logits[0, -1]
            total = total - logits.log_softmax(-1)[wanted]
            token = wanted
        losses.append(total)
    return torch.stack(losses)


@pytest.mark.parametrize("placement", ["append", "prefix"])
def test_the_step_is_what_plain_calls_give(placement: str, models: tuple[Any, Any]) -> None:
    """Loss and gradients; ragged, padded rows against rows by themselves."""
    adapter, batch = adapter_of(models), batch_of()
    step = TrainingStep(adapter, models[1], OnlinePrefills(*models), placement=placement)
    loss = step(batch)
    step.backward(loss)
    assert step.stopwatch.seconds()["adapter"] > 0
    got = {name: p.grad for name, p in adapter.named_parameters()}
    adapter.zero_grad(set_to_none=True)
    expected = one_by_one(adapter, models, batch, placement).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    expected.backward()
    for name, parameter in adapter.named_parameters():
        gradient = got[name]
        assert gradient is not None and parameter.grad is not None
        scale = float(parameter.grad.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-3 * scale)


@pytest.mark.parametrize("per_span", [False, True])
@pytest.mark.parametrize("placement", ["append", "prefix"])
def test_an_item_slides_out_of_a_window_as_it_does_alone(placement: str, per_span: bool) -> None:
    """A window counts columns: neither padding nor another item's slots take any of it."""
    sharer, receiver = family_model("qwen3", 1), family_model("gemma3", 2, sliding_window=16)
    torch.manual_seed(5)
    sides = CacheGeometry.of(sharer), CacheGeometry.of(receiver)
    adapter = LatentSlots(LCFConfig(*sides, bottleneck=64, slots=2, per_span=per_span)).eval()
    step = TrainingStep(adapter, receiver, OnlinePrefills(sharer, receiver), placement=placement)
    made = torch.Generator().manual_seed(3)
    examples = []
    for name, (tokens, spans) in enumerate([(6, 1), (25, 4), (12, 6)]):
        prompt, response, told = (torch.randint(3, 60, (n,), generator=made).tolist() for n in (tokens, 3, 12))
        bounds = [(12 * p // spans, 12 * (p + 1) // spans) for p in range(spans)] if per_span else [(0, 12)]
        examples.append(TokenizedExample(str(name), prompt, response, told, spans=bounds))
    expected = torch.stack([step(collate([example])) for example in examples]).sum()
    gradients = torch.autograd.grad(expected, list(adapter.parameters()))
    together = step(collate(examples))
    torch.testing.assert_close(together, expected, rtol=1e-5, atol=1e-4)
    for got, wanted in zip(torch.autograd.grad(together, list(adapter.parameters())), gradients):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", BY_LENGTH)
def test_a_prefix_turns_by_the_frequencies_of_the_prompt_behind_it(kind: str) -> None:
    sharer, receiver = family_model("qwen3", 1), family_model("llama", 2, **by_length(kind))
    adapter = adapter_of((sharer, receiver)).eval()
    step = TrainingStep(adapter, receiver, OnlinePrefills(sharer, receiver), placement="prefix")
    prompt, response, told = (list(range(3, 3 + n)) for n in (50, 3, 12))
    batch = collate([TokenizedExample("0", prompt, response, told, spans=[(0, 12)])])
    edited = step.edit(batch, step._prefiller(batch))
    message = adapter.summarize(prefill(sharer, torch.tensor([told]), torch.ones(1, 12)))
    wanted = adapter.prefix(receiver, message, length=SLOTS + 49)
    for (key, _), layer in zip(edited, wanted.layers):
        torch.testing.assert_close(key[:, :, :SLOTS], layer.keys, rtol=1e-4, atol=1e-4)


def test_the_guard_is_the_hinge_on_a_neighbours_message(models: tuple[Any, Any]) -> None:
    adapter, batch = adapter_of(models), batch_of()
    matched = one_by_one(adapter, models, batch, "append")
    mismatched = one_by_one(adapter, models, batch, "append", shift=1)
    tokens = batch.response_mask.sum(1)
    margin = (mismatched - matched) / tokens
    between = float(margin.median())  # some items within it, some beyond
    for guard in (max(0.05, between + 0.1), 3.0):
        hinge = (guard - margin).clamp_min(0)
        expected = matched.sum() + 0.7 * (tokens * hinge).sum()
        step = TrainingStep(adapter, models[1], OnlinePrefills(*models), guard_weight=0.7, guard_margin=guard)
        loss = step(batch)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
        assert float(loss) > float(matched.sum())
    step.backward(loss)
    assert all(p.grad is not None for p in adapter.parameters())
    one = batch_of(1)  # whose neighbour it is itself
    plain = TrainingStep(adapter, models[1], OnlinePrefills(*models))
    assert torch.equal(step(one), plain(one))


def test_the_guard_serves_lcf_x_too(models: tuple[Any, Any]) -> None:
    adapter, batch = tiny_adapter(*models, cross_context=True, dropout=0.0).eval(), batch_of()
    with torch.no_grad():
        adapter.get_parameter("up_weight").mul_(20.0)
    prefills = OnlinePrefills(*models)
    plain = TrainingStep(adapter, models[1], prefills)(batch)
    guarded = TrainingStep(adapter, models[1], prefills, guard_weight=1.0, guard_margin=5.0)(batch)
    assert float(guarded) > float(plain)


def test_slot_dropout_sends_any_number_and_only_in_training(models: tuple[Any, Any]) -> None:
    adapter, batch = adapter_of(models), batch_of()
    step = TrainingStep(adapter, models[1], OnlinePrefills(*models), slot_dropout=True)
    caches = step._prefiller(batch)
    adapter.train()

    def count() -> int:
        return step.edit(batch, caches)[0][0].shape[2] - (batch.receiver_ids.shape[1] - 1)

    torch.manual_seed(0)
    counts = [count() for _ in range(120)]
    assert set(counts) == {1, 2, 3, 4}
    assert min(counts.count(k) for k in (1, 2, 3, 4)) > 15  # evenly: 30 each, deviation 5
    torch.manual_seed(0)
    assert [count() for _ in range(20)] == counts[:20]
    adapter.eval()
    assert {count() for _ in range(5)} == {SLOTS}


def test_held_out_loss_is_measured_as_it_is_used(models: tuple[Any, Any]) -> None:
    adapter = adapter_of(models, dropout=0.3).train()
    for placement in ("append", "prefix"):
        step = TrainingStep(adapter, models[1], OnlinePrefills(*models), placement=placement, slot_dropout=True)
        found = [held_out_loss(step, step._prefiller, [batch_of()]) for _ in range(2)]
        assert found[0] == found[1]
        assert found[0].edited != found[0].alone
        assert adapter.training

    def fails(batch: Batch) -> Any:
        raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        held_out_loss(step, fails, [batch_of()])
    assert adapter.training


@pytest.mark.parametrize("stored", [False, True], ids=["online", "stored"])
def test_before_the_prompt_nobody_reads_it_without_slots(
    stored: bool, models: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The receiver's plain prefill is for slots behind it, and for the loss without any."""
    adapter, settings, reads = adapter_of(models).eval(), tiny_settings(), []
    if stored:
        tiny_store(tmp_path, settings, cross_context=True, with_receiver=False)
        prefills: Any = StoredPrefills(tmp_path, adapter, models[1], settings)
    else:
        prefills = OnlinePrefills(*models)

    def counted(receiver: Any, batch: Batch) -> Any:
        reads.append(batch)
        return receiver_prefill(receiver, batch)

    for module in (step_module, prefills_module):
        monkeypatch.setattr(module, "receiver_prefill", counted)
    batch = RandomData(settings, cross_context=True).batch(0, 0)
    prefix = TrainingStep(adapter, models[1], prefills, placement="prefix", guard_weight=0.1)
    prefix.backward(prefix(batch))
    assert not reads
    TrainingStep(adapter, models[1], prefills, placement="append")(batch)
    assert len(reads) == 1
    held_out_loss(prefix, prefills, [batch])
    assert len(reads) == 2


# --- whole runs
# ---------------------------------------------------------------------


def trainer(out: Path, settings: TrainingSettings) -> Trainer:
    sharer, receiver = tiny_model("qwen2", 1), tiny_model("qwen3", 2)
    adapter = adapter_of((sharer, receiver), dropout=0.1)
    data = RandomData(settings, cross_context=True)
    return Trainer(adapter, receiver, data, out, settings=settings, sharer=sharer, save_every=2, progress=False)


@pytest.mark.parametrize(
    "changes",
    [{"placement": "prefix"}, {"guard_weight": 0.5, "slot_dropout": True}],
    ids=["prefix", "guard and slot dropout"],
)
def test_a_run_learns_and_goes_on_bitwise(changes: dict[str, Any], tmp_path: Path) -> None:
    settings = tiny_settings(steps=4, batch_size=4, micro_batch_size=2, learning_rate=1e-2, **changes)
    whole = trainer(tmp_path / "whole", settings).run()
    assert isinstance(whole, LatentSlots)
    stopped = trainer(tmp_path / "stopped", settings)
    step = stopped.data.batch

    def until(number: int, index: int) -> Batch:
        if number == 3:
            raise KeyboardInterrupt
        return step(number, index)

    stopped.data.batch = until  # type: ignore[assignment, method-assign]
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    again = trainer(tmp_path / "stopped", settings).run(resume=True)
    for (name, a), b in zip(again.named_parameters(), whole.parameters()):
        assert torch.equal(a, b), name
    assert read_log(tmp_path / "stopped") == read_log(tmp_path / "whole")
    saved = LatentSlots.from_pretrained(tmp_path / "whole" / "adapter")
    assert torch.equal(saved.get_parameter("slot_query"), whole.get_parameter("slot_query"))
    for folder in ("adapter", "checkpoints/step-00000004/adapter"):
        assert LatentSlots.from_pretrained(tmp_path / "whole" / folder).trained_placement == settings.placement
    defaults = TrainingSettings()
    other = replace(settings, guard_margin=2.0)
    plain = replace(settings, **{name: getattr(defaults, name) for name in changes})  # which a checkpoint leaves out
    for changed, name in ((other, "guard_margin"), (plain, next(iter(changes)))):
        with pytest.raises(RunError, match=name):
            trainer(tmp_path / "stopped", changed).run(resume=True)


def test_settings_of_before_are_written_as_they_were() -> None:
    later = {"placement", "slot_dropout", "guard_weight", "guard_margin"}
    assert not later & TrainingSettings().to_dict().keys()
    settings = TrainingSettings(slot_dropout=True, guard_weight=0.5)
    assert later & settings.to_dict().keys() == {"slot_dropout", "guard_weight"}
    for each in (settings, TrainingSettings()):
        assert TrainingSettings.from_dict(each.to_dict()) == each


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"placement": "between"}, GeometryError),
        ({"slot_dropout": 1}, DTypeError),
        ({"guard_weight": -1.0}, GeometryError),
        ({"guard_margin": 0.0}, GeometryError),
    ],
)
def test_bad_settings(change: dict[str, Any], error: type[LCFError]) -> None:
    with pytest.raises(error) as caught:
        TrainingSettings(**change)
    assert caught.value.argument == next(iter(change))


def test_what_does_not_go_together(models: tuple[Any, Any]) -> None:
    with pytest.raises(GeometryError, match="another item"):
        TrainingSettings(guard_weight=1.0, micro_batch_size=1)
    shared, crossing = (tiny_adapter(*models, cross_context=cross) for cross in (False, True))
    prefills = OnlinePrefills(*models)
    for adapter, options in (
        (crossing, {"slot_dropout": True}),
        (crossing, {"placement": "prefix"}),
        (shared, {"guard_weight": 1.0}),
    ):
        with pytest.raises(GeometryError, match=next(iter(options))):
            TrainingStep(adapter, models[1], prefills, **options)  # type: ignore[arg-type]


# --- the command
# ---------------------------------------------------------------------


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    for name, kind in (("sharer", "qwen2"), ("receiver", "qwen3")):
        save_tiny_model(tmp_path / name, kind)
    words = ["red", "blue", "green", "grey", "white", "black", "pink"]
    rows = [
        {"sharer_context": [f"The sky is {word}."], "receiver_context": "", "question": "The sky?", "answer": word}
        for word in words
    ]
    write_lines(tmp_path / "cross.jsonl", rows)
    models = ["--sharer", str(tmp_path / "sharer"), "--receiver", str(tmp_path / "receiver")]
    small = ["--steps", "3", "--batch-size", "4", "--micro-batch-size", "2", "--precision", "fp32", "--device", "cpu"]
    return ["train", *models, "--data", str(tmp_path / "cross.jsonl"), "--quiet", *small]


def test_the_command_trains_slots(arguments: list[str], tmp_path: Path) -> None:
    more = ["--slots", "4", "--bottleneck", "64", "--slot-dropout", "--placement", "prefix", "--guard-weight", "0.2"]
    assert main([*arguments, "--out", str(tmp_path / "run"), *more, "--guard-margin", "0.5"]) == 0
    adapter = LatentSlots.from_pretrained(tmp_path / "run" / "adapter")
    assert (adapter.config.mode, adapter.config.slots, adapter.config.bottleneck) == ("slots", 4, 64)
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-00000003" / "state.json").read_text())
    wanted = {"slot_dropout": True, "placement": "prefix", "guard_weight": 0.2, "guard_margin": 0.5}
    assert {name: state["settings"][name] for name in wanted} == wanted
    again = ["--cross-context", "--init-from", str(tmp_path / "run" / "adapter")]
    assert main([*arguments, "--out", str(tmp_path / "again"), *again]) == 0
    other = LatentSlots.from_pretrained(tmp_path / "again" / "adapter")
    assert other.config == adapter.config
    assert other.trained_placement == adapter.trained_placement == "prefix"  # as what it began with
    told = ["--cross-context", "--placement", "append", "--init-from", str(tmp_path / "run" / "adapter")]
    with pytest.warns(UserWarning, match="trained with 'prefix'"):
        assert main([*arguments, "--out", str(tmp_path / "told"), *told]) == 0
    assert LatentSlots.from_pretrained(tmp_path / "told" / "adapter").trained_placement == "append"


def test_it_trains_on_what_is_cached(arguments: list[str], tmp_path: Path) -> None:
    """The first step has the same loss bitwise: prefills do not know what will be made of them."""
    slots = ["--slots", "4", "--bottleneck", "64"]
    assert main([*arguments, "--out", str(tmp_path / "run"), *slots]) == 0
    assert main(["cache", *arguments[1:], "--cross-context", "--out", str(tmp_path / "store")]) == 0
    cached = ["--cached", str(tmp_path / "store")]
    assert main([*arguments, "--out", str(tmp_path / "again"), *slots, *cached]) == 0
    logs = [read_log(tmp_path / name) for name in ("run", "again")]
    assert logs[0][0] == logs[1][0]
    for one, other in zip(*logs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--slots", "4", "--keep-layers", "0"], "--keep-layers"),
        (["--slots", "4", "--gate-init", "1"], "--gate-init"),
        (["--slots", "0"], "slots"),
        (["--cross-context", "--slot-dropout"], "slot_dropout"),
        (["--cross-context", "--guard-weight", "1", "--micro-batch-size", "1"], "another item"),
    ],
)
def test_what_the_command_refuses(
    more: list[str], text: str, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--out", str(tmp_path / "run"), *more]) == 2
    assert text in capsys.readouterr().err
