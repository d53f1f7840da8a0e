"""One step: the same loss and gradient as an example at a time, without padding, without this package's step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_training import RandomData, tiny_adapter, tiny_model, tiny_settings
from torch import Tensor

from lcf_fast import CacheGeometry, LatentCacheFlow, LCFConfig
from lcf_fast.errors import GeometryError, ShapeError
from lcf_fast.training.batches import Batch
from lcf_fast.training.step import OnlinePrefills, Prefill, TrainingStep, frozen

KINDS = ("same", "aligned", "cross")


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    return tuple(frozen(tiny_model(k, s), device="cpu", precision="fp32") for k, s in (("qwen2", 1), ("qwen3", 2)))  # type: ignore[return-value]


def data_of(kind: str, examples: int = 6) -> Batch:
    settings = tiny_settings(batch_size=examples, micro_batch_size=examples)
    return RandomData(settings, cross_context=kind == "cross", aligned=kind == "aligned").batch(0, 0)


def one_by_one(adapter: LatentCacheFlow, sharer: Any, receiver: Any, batch: Batch) -> Tensor:
    """The loss by plain calls of the models: no padding, response tokens fed one at a time."""
    from transformers import DynamicCache

    total = torch.zeros(())
    for i in range(len(batch.ids)):
        prompt = batch.receiver_ids[i][batch.receiver_mask[i].bool()]
        shared = batch.sharer_ids[i][batch.sharer_mask[i].bool()]
        response = batch.response_ids[i][batch.response_mask[i].bool()]
        offset = batch.sharer_ids.shape[1] - len(shared)
        with torch.no_grad():
            theirs = sharer(shared[None], use_cache=True).past_key_values
            mine = receiver(prompt[None, :-1], use_cache=True).past_key_values
        if batch.spans is not None:
            bounds = [(a - offset, b - offset) for a, b in batch.spans.bounds()[i]]
            edited = adapter.inject(mine, adapter.summarize(theirs, [[bounds[0][0], *(b for _, b in bounds)]]))
        else:
            aligned = torch.arange(len(prompt) - 1)
            if batch.sharer_index is not None:
                aligned = batch.sharer_index[i, -len(prompt) : -1]
                aligned = torch.where(aligned < 0, aligned, aligned - offset)
            edited = adapter.fuse(theirs, mine, sharer_index=aligned[None])
        assert isinstance(edited, DynamicCache)
        token = prompt[-1]
        for wanted in response:
            logits = receiver(token[None, None], past_key_values=edited).logits[0, -1]
            total = total - logits.log_softmax(-1)[wanted]
            token = wanted
    return total


@pytest.mark.parametrize("loaded_as", [torch.float32, torch.bfloat16])
def test_a_frozen_model_is_the_one_that_is_loaded_in_use(loaded_as: torch.dtype, tmp_path: Any) -> None:
    """What trains an adapter must be what it will meet: `to(dtype)` would have rounded the rotary frequencies."""
    from transformers import AutoModelForCausalLM

    tiny_model("qwen3", 1).save_pretrained(tmp_path)
    used = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=loaded_as).train()
    model = frozen(loaded, device="cpu", precision="bf16")
    assert not model.training
    for (name, of_use), (_, of_training) in zip(used.named_buffers(), model.named_buffers(), strict=True):
        assert of_use.dtype == of_training.dtype and torch.equal(of_use, of_training), name
    ids = torch.arange(40)[None] % 9
    with torch.no_grad():
        assert torch.equal(used(ids).logits, model(ids).logits)
    assert model.dtype == torch.bfloat16 and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_those_of_one_example_at_a_time(kind: str, models: tuple[Any, Any]) -> None:
    sharer, receiver = models
    adapter = tiny_adapter(sharer, receiver, cross_context=kind == "cross").eval()
    batch = data_of(kind)
    step = TrainingStep(adapter, receiver, OnlinePrefills(sharer, receiver))
    loss = step(batch)
    step.backward(loss)
    gradients = {name: p.grad for name, p in adapter.named_parameters() if p.grad is not None}
    adapter.zero_grad()
    expected = one_by_one(adapter, sharer, receiver, batch)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert len(gradients) >= len(list(adapter.parameters())) - 1
    for name, parameter in adapter.named_parameters():
        if name in gradients and parameter.grad is not None:
            scale = float(parameter.grad.abs().max())
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_without_an_edit_it_is_the_receivers_own_loss(kind: str, models: tuple[Any, Any]) -> None:
    sharer, receiver = models
    adapter = tiny_adapter(sharer, receiver, cross_context=kind == "cross").eval()
    with torch.no_grad():
        adapter.gate_logit.fill_(-1.0)
    batch = data_of(kind)
    expected = 0.0
    for i in range(len(batch.ids)):
        prompt = batch.receiver_ids[i][batch.receiver_mask[i].bool()]
        response = batch.response_ids[i][batch.response_mask[i].bool()]
        labels = torch.cat([torch.full_like(prompt, -100), response])
        mean = receiver(torch.cat([prompt, response])[None], labels=labels[None]).loss
        expected += float(mean) * len(response)
    step = TrainingStep(adapter, receiver, OnlinePrefills(sharer, receiver))
    assert step(batch).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_lies_at_padding_does_not_matter(kind: str, models: tuple[Any, Any]) -> None:
    sharer, receiver = models
    adapter = tiny_adapter(sharer, receiver, cross_context=kind == "cross").eval()
    batch = data_of(kind)
    step = TrainingStep(adapter, receiver, OnlinePrefills(sharer, receiver))
    expected = step(batch).item()
    for ids, mask in (
        ("receiver_ids", "receiver_mask"),
        ("response_ids", "response_mask"),
        ("sharer_ids", "sharer_mask"),
    ):
        padding = getattr(batch, mask) == 0
        assert padding.any()
        getattr(batch, ids)[padding] = 17
    assert step(batch).item() == expected


def test_the_edit_sees_all_but_the_last_token_of_the_prompt(models: tuple[Any, Any]) -> None:
    sharer, receiver = models
    batch = data_of("same")
    seen: list[Prefill] = []

    def recorded(batch: Batch) -> Prefill:
        seen.append(OnlinePrefills(sharer, receiver)(batch))
        return seen[-1]

    step = TrainingStep(tiny_adapter(sharer, receiver), receiver, recorded)
    step(batch)
    length = batch.receiver_ids.shape[1] - 1
    assert {pair[0].shape[2] for pair in (*seen[0].sharer, *seen[0].receiver)} == {length}
    assert not any(t.requires_grad for pair in (*seen[0].sharer, *seen[0].receiver) for t in pair)


def test_only_the_adapter_is_a_submodule_and_gets_gradients(models: tuple[Any, Any]) -> None:
    sharer, receiver = models
    step = TrainingStep(tiny_adapter(sharer, receiver), receiver, OnlinePrefills(sharer, receiver))
    assert {name.split(".")[0] for name, _ in step.named_parameters()} == {"adapter"}
    step.backward(step(data_of("same")))
    assert all(p.grad is None for model in models for p in model.parameters())


def test_times_of_prefill_and_adapter(models: tuple[Any, Any]) -> None:
    sharer, receiver = models
    step = TrainingStep(tiny_adapter(sharer, receiver), receiver, OnlinePrefills(sharer, receiver))
    loss = step(data_of("same"))
    forward = step.stopwatch.seconds()
    assert set(forward) == {"prefill", "adapter"}
    assert min(forward.values()) > 0
    step.backward(loss)
    assert set(step.stopwatch.seconds()) == {"adapter"}  # its backward


def test_bf16_models_and_a_float32_adapter() -> None:
    sharer, receiver = (frozen(tiny_model(k, 1), device="cpu", precision="bf16") for k in ("qwen2", "qwen3"))
    adapter = tiny_adapter(sharer, receiver)
    step = TrainingStep(adapter, receiver, OnlinePrefills(sharer, receiver))
    loss = step(data_of("same"))
    step.backward(loss)
    assert loss.dtype == torch.float32
    assert adapter.down_weight.grad is not None
    assert adapter.down_weight.grad.dtype == torch.float32


def test_bad_input(models: tuple[Any, Any]) -> None:
    sharer, receiver = models
    prefills = OnlinePrefills(sharer, receiver)
    other = LatentCacheFlow(LCFConfig(CacheGeometry(2, 1, 16), CacheGeometry(3, 2, 16), bottleneck=64))
    with pytest.raises(GeometryError, match="receiver"):
        TrainingStep(other, receiver, prefills)
    batch = data_of("same")
    batch.receiver_ids, batch.receiver_mask = batch.receiver_ids[:, -1:], batch.receiver_mask[:, -1:]
    with pytest.raises(ShapeError, match="two tokens"):
        TrainingStep(tiny_adapter(sharer, receiver), receiver, prefills)(batch)
