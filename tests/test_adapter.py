"""`LatentCacheFlow`: contract of names and shapes, the methods against the reference, pruning."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapters import RECEIVER, SHARER, assert_close, assert_equal, cloned, expected_of, make_adapter, make_caches
from torch import Tensor

from helpers import make_cache, to_double
from lcf_fast import (
    CacheGeometry,
    DTypeError,
    GeometryError,
    IndexRangeError,
    LatentCacheFlow,
    LCFConfig,
    LCFError,
    Message,
    MessageError,
    reference,
)
from lcf_fast.spans import windows

# --- the module --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [None, [4, 1]])
@pytest.mark.parametrize("cross_context", [False, True])
def test_parameters_have_the_names_shapes_and_order_of_the_contract(
    cross_context: bool, keep: list[int] | None
) -> None:
    adapter = make_adapter(cross_context, keep=keep, ffn_expansion=4)
    layers, d, sharer, receiver = (2 if keep else 5), 64, 32, 24
    expected = {
        "down_weight": (layers, d, 2 * sharer + 2 * receiver),
        "down_bias": (layers, d),
        "norm_weight": (layers, 2, d),
        "ffn_in_weight": (layers, 2, 4 * d, d),
        "ffn_out_weight": (layers, 2, d, 4 * d),
        "up_weight": (layers, 2, receiver, d // 2),
        "up_bias": (layers, 2, receiver),
        "head_gate_weight": (layers, 2, 3, d),
        "head_gate_bias": (layers, 2, 3),
        "gate_logit": (layers, 2),
    }
    if cross_context:
        expected |= {"span_query": (layers, 2, 16), "global_query": (layers, 2, 16)}
    assert [(name, tuple(p.shape)) for name, p in adapter.named_parameters()] == list(expected.items())
    buffers = dict(adapter.named_buffers())
    assert list(buffers) == ["receiver_layers", "sharer_layers"]
    assert buffers["receiver_layers"].tolist() == ([1, 4] if keep else [0, 1, 2, 3, 4])
    assert buffers["sharer_layers"].tolist() == ([0, 2] if keep else [0, 0, 0, 1, 2])
    assert all(buffer.dtype == torch.int64 for buffer in buffers.values())
    assert list(adapter.state_dict()) == [*expected, *buffers]
    assert adapter.parameter_count() == adapter.config.parameter_count(layers)


@pytest.mark.parametrize(("cross_context", "logit"), [(False, 0.0), (True, 1.0)])
def test_initialisation(cross_context: bool, logit: float) -> None:
    config = LCFConfig(SHARER, RECEIVER, bottleneck=64, cross_context=cross_context)
    adapter = LatentCacheFlow(config)
    parameters = dict(adapter.named_parameters())
    assert all(torch.isfinite(p).all() and p.requires_grad for p in parameters.values())
    assert (parameters["gate_logit"] == logit).all()
    assert (parameters["norm_weight"] == 1).all()
    for name in ("down", "up", "head_gate", "ffn_in", "ffn_out"):
        weight = parameters[f"{name}_weight"]
        bound = 1 / math.sqrt(weight.shape[-1])
        for part in (weight, parameters.get(f"{name}_bias", weight)):
            assert part.abs().max() <= bound
            assert float(part.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.25)  # a uniform one's
    if cross_context:
        assert 0 < parameters["span_query"].abs().max() < 0.2
    again = LatentCacheFlow(LCFConfig(SHARER, RECEIVER, gate_init=3.0))
    assert (again.gate_logit == 3).all()


def test_a_fresh_lcf_adapter_edits_nothing() -> None:
    # Its gates' logits are 0.0, and a gate opens above zero: the paper's start.
    sharer, receiver = make_caches()
    fused = LatentCacheFlow(LCFConfig(SHARER, RECEIVER, bottleneck=64)).eval().fuse(sharer, receiver)
    assert all(new is old for pair, was in zip(fused, receiver) for new, old in zip(pair, was))


def test_factory_arguments_and_repr() -> None:
    adapter = LatentCacheFlow(LCFConfig(SHARER, RECEIVER), device="meta", dtype=torch.bfloat16)
    assert {p.dtype for p in adapter.parameters()} == {torch.bfloat16}
    assert {t.device.type for t in adapter.state_dict().values()} == {"meta"}
    assert "LCF, 3x2x16 -> 5x3x8, bottleneck=128, all 5 layers" in repr(adapter)
    assert "LCF-X" in repr(make_adapter(True, keep=[2]))
    assert "layers=(2,)" in repr(make_adapter(True, keep=[2]))
    with pytest.raises(DTypeError, match="config: expected an LCFConfig, got dict"):
        LatentCacheFlow({})  # type: ignore[arg-type]


def test_copies_casts_and_pickles_work_alike() -> None:
    adapter = make_adapter()
    sharer, receiver = make_caches()
    fused = adapter.fuse(sharer, receiver)
    assert_equal(copy.deepcopy(adapter).fuse(sharer, receiver), fused)
    assert_equal(pickle.loads(pickle.dumps(adapter)).fuse(sharer, receiver), fused)
    half = copy.deepcopy(adapter).half()
    assert half.receiver_layers.dtype == torch.int64
    assert_close(half.fuse(sharer, receiver), fused, 2e-3)


def test_a_state_dict_brings_its_layers() -> None:
    adapter, pruned = make_adapter(keep=[0, 1]), make_adapter(keep=[2, 4])
    with torch.no_grad():
        pruned.up_bias.add_(1.0)  # type: ignore[operator]
    sharer, receiver = make_caches()
    adapter.load_state_dict(pruned.state_dict())
    assert_equal(adapter.fuse(sharer, receiver), pruned.fuse(sharer, receiver))
    wrong = pruned.state_dict()
    wrong["receiver_layers"] = torch.tensor([2, 5])
    with pytest.raises(IndexRangeError, match=r"receiver_layers: expected layers in \[0, 5\)"):
        adapter.load_state_dict(wrong)
    for layers, got in (([2, 2], "2, 2"), ([4, 2], "4, 2")):
        wrong["receiver_layers"] = torch.tensor(layers)
        with pytest.raises(GeometryError, match=rf"receiver_layers: expected ascending layers, got \({got}\)"):
            adapter.load_state_dict(wrong)
    assert adapter.receiver_layers.tolist() == [2, 4]
    assert_equal(adapter.fuse(sharer, receiver), pruned.fuse(sharer, receiver))
    rerouted = {"sharer_layers": torch.tensor([1, 0])}
    adapter.load_state_dict(rerouted, strict=False)
    pruned.load_state_dict({**pruned.state_dict(), **rerouted})
    assert_equal(adapter.fuse(sharer, receiver), pruned.fuse(sharer, receiver))


# --- fuse --------------------------------------------------------------------------------------------------------

FUSE_CASES: dict[str, dict[str, Any]] = {
    "all": {},
    "range": {"positions": (2, 5)},
    "empty range": {"positions": (3, 3)},
    "left padding": {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])},
    "bool mask, range": {
        "attention_mask": torch.tensor([[False, True, True, True, True, True, True], [True] * 7]),
        "positions": (0, 6),
    },
    "index": {"sharer_index": torch.tensor([[0, 0, 1, 9, 8, -1, 3], [-1, 4, 4, 4, 2, 1, 0]])},
    "int32 index, mask": {
        "sharer_index": torch.tensor([[0, 0, 1, 9, 8, -1, 3], [-1] * 7], dtype=torch.int32),
        "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1] * 7]),
        "positions": (1, 7),
    },
    "sharer padding": {"sharer_attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])},
    "both padded": {
        "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1] * 6 + [0]]),
        "sharer_attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7]),
    },
    "index into sharer padding": {
        "sharer_index": torch.tensor([[0, 0, 1, 9, 8, -1, 3], [-1, 4, 4, 4, 2, 1, 0]]),
        "sharer_attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1, 0, 1], [1] * 4 + [0] * 6]),
    },
}


def edited_positions(case: dict[str, Any]) -> Tensor:
    """(B, N), by the definition, one position at a time."""
    edited = torch.ones(2, 7, dtype=torch.bool)
    for b in range(2):
        for n in range(7):
            start, stop = case.get("positions", (0, 7))
            row = n if "sharer_index" not in case else int(case["sharer_index"][b, n])
            real = case.get("attention_mask", torch.ones(2, 7))[b, n] != 0
            real &= row >= 0 and case.get("sharer_attention_mask", torch.ones(2, 10))[b, row] != 0
            edited[b, n] = real and start <= n < stop
    return edited


@pytest.mark.parametrize("name", FUSE_CASES)
def test_fuse_is_the_reference(name: str, device: torch.device) -> None:
    case: dict[str, Any] = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in FUSE_CASES[name].items()}
    sharer, receiver = make_caches(device, sharer_length=10 if "sharer_index" in case else 7)
    before = cloned(receiver)
    adapter = make_adapter(device=device)
    fused = adapter.fuse(sharer, receiver, **case)

    edited = edited_positions(FUSE_CASES[name]).to(device)
    expected = expected_of(adapter, receiver, sharer=sharer, sharer_index=case.get("sharer_index"), edit_mask=edited)
    assert_close(fused, expected)
    assert_equal(receiver, before)
    for pair, was in zip(fused, before):
        for tensor, old in zip(pair, was):
            assert torch.equal(tensor.transpose(1, 2)[~edited], old.transpose(1, 2)[~edited])
    changed = (fused[0][0] != before[0][0]).any(3).any(1)
    assert torch.equal(changed, edited)

    # In place: the same tensors, the same values, the same cache object.
    pointers = [tensor.data_ptr() for pair in receiver for tensor in pair]
    assert adapter.fuse_(sharer, receiver, **case) is receiver
    assert [tensor.data_ptr() for pair in receiver for tensor in pair] == pointers
    assert_close(receiver, to_double(fused), 1e-6)


def test_closed_gates_and_layers_not_kept_pass_through(device: torch.device) -> None:
    sharer, receiver = make_caches(device)
    fused = make_adapter(keep=[1, 2, 3], device=device).fuse(sharer, receiver)
    shared = [tuple(new is old for new, old in zip(pair, was)) for pair, was in zip(fused, receiver)]
    # 0 and 4 are not kept, 1 is dead, of 3 the key's gate is closed.
    assert shared == [(True, True), (True, True), (False, False), (True, False), (True, True)]


def test_gates_are_read_anew_when_they_change(device: torch.device) -> None:
    sharer, receiver = make_caches(device)
    adapter = make_adapter(device=device)
    assert adapter.fuse(sharer, receiver)[0][0] is not receiver[0][0]
    with torch.no_grad():
        adapter.gate_logit[0, 0] = -1.0
    assert adapter.fuse(sharer, receiver)[0][0] is receiver[0][0]
    adapter.load_state_dict(make_adapter().state_dict())
    assert adapter.fuse(sharer, receiver)[0][0] is not receiver[0][0]
    adapter.gate_logit = torch.nn.Parameter(torch.full_like(adapter.gate_logit, -1.0))
    assert adapter.fuse(sharer, receiver)[0][0] is receiver[0][0]


def test_gates_on_a_device_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from lcf_fast import adapter as module

    reads = 0
    read = module._open

    def counted(logit: Tensor) -> Any:
        nonlocal reads
        reads += 1
        return read(logit.as_subclass(Tensor))

    class OnDevice(torch.nn.Parameter):
        device = torch.device("cuda", 0)  # type: ignore[assignment]

    monkeypatch.setattr(module, "_open", counted)
    adapter = make_adapter()
    adapter._parameters["gate_logit"] = OnDevice(adapter.gate_logit.detach().clone(), requires_grad=False)
    for _ in range(3):
        assert adapter._live()[0] == (True, True)
    assert reads == 1
    adapter.gate_logit.neg_()
    for _ in range(3):
        assert adapter._live()[0] == (False, False)
    assert reads == 2
    adapter.gate_logit.data = -adapter.gate_logit.data  # as casting and moving do
    assert adapter._live()[0] == (True, True)


def test_gates_on_a_cpu_are_read_each_time() -> None:
    adapter = make_adapter()
    assert adapter._live()[0] == (True, True)
    adapter.gate_logit.data.neg_()  # which nothing counts
    assert adapter._live()[0] == (False, False)


@pytest.mark.parametrize("cross_context", [False, True])
def test_the_configured_epsilon_is_used(cross_context: bool) -> None:
    sharer, receiver = make_caches()
    adapter = make_adapter(cross_context, norm_eps=0.5)
    if cross_context:
        message = adapter.summarize(sharer)
        expected = expected_of(adapter, receiver, message=message.tensors["latent"].double())
        assert_close(adapter.inject(receiver, message), expected)
        assert_close(adapter.inject_(receiver, message), expected)
    else:
        expected = expected_of(adapter, receiver, sharer=sharer)
        assert_close(adapter.fuse(sharer, receiver), expected)
        assert_close(adapter.fuse_(sharer, receiver), expected)


@pytest.mark.parametrize(("batch", "length"), [(0, 7), (2, 0)])
@pytest.mark.parametrize("cross_context", [False, True])
def test_empty_inputs_give_empty_results(batch: int, length: int, cross_context: bool) -> None:
    sharer, receiver = make_caches(batch=batch, length=length, sharer_length=4 if cross_context else None)
    adapter = make_adapter(cross_context)
    if cross_context:
        message = adapter.summarize(sharer)
        assert message.tensors["latent"].shape == (5, batch, 64)
        out, same = adapter.inject(receiver, message), adapter.inject_(receiver, message)
    else:
        out, same = adapter.fuse(sharer, receiver), adapter.fuse_(sharer, receiver)
    assert same is receiver
    assert [tensor.shape for pair in out for tensor in pair] == [(batch, 3, length, 8)] * 10


def test_strided_caches_are_read_where_they_lie() -> None:
    sharer, receiver = make_caches()
    adapter = make_adapter()
    expected = adapter.fuse(sharer, receiver)
    for layout in ("token_major", "padded", "offset"):
        generator = torch.Generator().manual_seed(7)
        sharer = make_cache(SHARER, 2, 7, layout=layout, generator=generator)
        receiver = make_cache(RECEIVER, 2, 7, layout=layout, generator=generator)
        assert_close(adapter.fuse(sharer, receiver), to_double(expected), 1e-6)
        adapter.fuse_(sharer, receiver)
        assert_close(receiver, to_double(expected), 1e-6)


def test_gradients_reach_every_parameter() -> None:
    for cross_context in (False, True):
        adapter = make_adapter(cross_context).double().requires_grad_(True)
        sharer, receiver = (to_double(cache) for cache in make_caches())
        if cross_context:
            out = adapter.inject(receiver, adapter.summarize(sharer, [[0, 3, 7], [0, 1, 7]]))
        else:
            out = adapter.fuse(sharer, receiver)
        sum(tensor.square().sum() for pair in out for tensor in pair).backward()  # type: ignore[union-attr]
        for name, parameter in adapter.named_parameters():
            if name == "gate_logit":  # hard gates: the training gate comes with training
                continue
            assert parameter.grad is not None, name
            assert parameter.grad[0].abs().max() > 0, name
            assert parameter.grad[1].abs().max() == 0, name  # the dead layer


def test_compiles_without_a_graph_break() -> None:
    sharer, receiver = make_caches()
    adapter = make_adapter()
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1] * 7])
    expected = adapter.fuse(sharer, receiver, attention_mask=mask, positions=(0, 6))
    compiled = torch.compile(adapter.fuse, fullgraph=True, backend="aot_eager")
    assert_close(compiled(sharer, receiver, attention_mask=mask, positions=(0, 6)), to_double(expected), 1e-6)
    crossing = make_adapter(True)
    message = crossing.summarize(sharer)
    injected = torch.compile(crossing.inject, fullgraph=True, backend="aot_eager")(receiver, message)
    assert_close(injected, to_double(crossing.inject(receiver, message)), 1e-6)


def _forms() -> dict[str, Callable[[], Any]]:
    """Documented arguments that are looked at where values can be read."""
    crossing, (sharer, receiver) = make_adapter(True), make_caches()
    read = Message.from_bytes(crossing.summarize(sharer).to_bytes())
    given = windows([7, 7], 3, 1)
    return {
        "lists": lambda: crossing.summarize(sharer, [[0, 3, 7], [0, 7]]).latent,
        "spans": lambda: crossing.summarize(sharer, given).latent,
        "bytes": lambda: crossing.inject(receiver, read),
        "several": lambda: crossing.inject(receiver, [read, read], weights=[1.0, 0.5]),
        "both": lambda: crossing.inject(receiver, crossing.summarize(sharer, [[0, 3, 7], [0, 7, 7]])),
    }


@pytest.mark.parametrize("form", ["lists", "spans", "bytes", "several", "both"])
def test_other_forms_compile_without_a_graph_break(form: str) -> None:
    call = _forms()[form]
    with torch.no_grad():
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")()
        torch.testing.assert_close(compiled, call(), rtol=1e-5, atol=1e-5)


def test_a_compiled_graph_takes_no_message_of_another_adapter() -> None:
    """It is compiled anew for other digests, which then are refused."""
    crossing, (sharer, receiver) = make_adapter(True), make_caches()
    other = make_adapter(True)
    own = Message.from_bytes(crossing.summarize(sharer).to_bytes())
    with torch.no_grad():
        other.down_weight.add_(1.0)
        foreign = Message.from_bytes(other.summarize(sharer).to_bytes())
        torch.compiler.reset()
        compiled = torch.compile(crossing.inject, backend="aot_eager")
        compiled(receiver, own)
        for message in (foreign, other.summarize(sharer)):
            with pytest.raises(MessageError, match="this adapter"):
                compiled(receiver, message)


# --- LCF-X -------------------------------------------------------------------------------------------------------

SPANS: dict[str, Any] = {
    "none": None,
    "tensor": torch.tensor([[0, 3, 7], [1, 1, 6]]),
    "int32": torch.tensor([[0, 3, 7], [1, 1, 6]], dtype=torch.int32),
    "lists": [[0, 3, 7], [1, 1, 6]],
    "ragged lists": [[0, 2, 3, 7], [1, 6]],
}


@pytest.mark.parametrize("spans", SPANS)
@pytest.mark.parametrize("padded", [False, True])
def test_summarize_is_the_reference(spans: str, padded: bool, device: torch.device) -> None:
    sharer, _ = make_caches(device)
    adapter = make_adapter(True, device=device, keep=[0, 2, 3, 4])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7], device=device) if padded else None
    given = SPANS[spans]
    message = adapter.summarize(sharer, given.to(device) if isinstance(given, Tensor) else given, attention_mask=mask)
    offsets = {"none": [[0, 7]] * 2, "ragged lists": [[0, 2, 3, 7], [1, 6, 6, 6]]}.get(spans, SPANS["lists"])
    weights = {name: p.double() for name, p in adapter.named_parameters()}
    double = to_double(sharer)
    latent, summary = reference.summarize_layers(
        [double[s] for s in (0, 0, 1, 2)], weights, torch.tensor(offsets, device=device), attention_mask=mask
    )
    assert message.tensors["latent"].shape == (4, 2, 64)
    assert message.tensors["latent"].dtype == torch.float32
    assert message.summary is not None
    assert message.summary.shape == (4, 2, 2, 2, 16)
    assert message.receiver_layers == (0, 2, 3, 4)
    assert message.spans == len(offsets[0]) - 1
    torch.testing.assert_close(message.tensors["latent"].double(), latent, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(message.summary.double(), summary, rtol=1e-5, atol=1e-5)


def test_a_message_says_its_size_and_moves() -> None:
    pair = CacheGeometry(28, 8, 128)
    latent = torch.randn(28, 1, 128)
    message = Message(latent, tuple(range(28)), spans=5, summary=torch.randn(28, 2, 1, 8, 128))
    assert message.nbytes == 2 * 7168
    half = message.to(torch.bfloat16)
    assert (half.nbytes, half.spans, half.receiver_layers) == (7168, 5, tuple(range(28)))  # spec section 4
    assert half.summary is not None
    assert half.summary.nbytes == 2 * 28 * 2 * pair.channels == 114_688
    assert message.to(device="meta").tensors["latent"].is_meta
    assert message.to("meta", torch.float16).tensors["latent"].dtype == torch.float16
    with pytest.raises(AttributeError):
        message.spans = 3  # type: ignore[misc]


@pytest.mark.parametrize("positions", [None, (1, 6)])
@pytest.mark.parametrize("shared", [False, True])
def test_inject_is_the_reference(positions: tuple[int, int] | None, shared: bool, device: torch.device) -> None:
    """Also: injecting is fusing with K*, V* in the place of every sharer position (spec, section 4)."""
    sharer, receiver = make_caches(device)
    adapter = make_adapter(True, device=device)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7], device=device)
    if shared:
        sharer = [(key[:1], value[:1]) for key, value in sharer]
    message = adapter.summarize(sharer, [[0, 2, 7]] if shared else [[0, 2, 7], [0, 7]])
    injected = adapter.inject(receiver, message, positions=positions, attention_mask=mask)

    edited = mask != 0
    if positions is not None:
        edited = edited & torch.tensor([[positions[0] <= n < positions[1] for n in range(7)]], device=device)
    assert message.summary is not None
    pooled = [tuple(part.double()[:, :, None].expand(2, -1, 7, -1) for part in layer) for layer in message.summary]
    weights = {name: p.double() for name, p in adapter.named_parameters()}
    expected = reference.fuse_layers(pooled, to_double(receiver), weights, edit_mask=edited)  # type: ignore[arg-type]
    assert_close(injected, expected)
    expected = expected_of(
        adapter, receiver, message=message.tensors["latent"].double().expand(5, 2, 64), edit_mask=edited
    )
    assert_close(injected, expected)

    assert injected[3][0] is receiver[3][0]
    assert injected[1][1] is receiver[1][1]
    assert adapter.inject_(receiver, message, positions=positions, attention_mask=mask) is receiver
    assert_close(receiver, to_double(injected), 1e-6)


# --- pruning -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cross_context", [False, True])
def test_a_pruned_adapter_is_the_whole_one_with_gates_closed(cross_context: bool) -> None:
    sharer, receiver = make_caches()

    def apply(adapter: LatentCacheFlow) -> Any:
        if cross_context:
            return adapter.inject(receiver, adapter.summarize(sharer))
        return adapter.fuse(sharer, receiver)

    closed, pruned = make_adapter(cross_context), make_adapter(cross_context)
    pruned.gate_logit.requires_grad_(True)
    with torch.no_grad():
        closed.gate_logit[[1, 3]] = -1.0
    assert pruned.prune([4, 0, 2]) is pruned
    assert pruned.receiver_layers.tolist() == [0, 2, 4]
    assert pruned.sharer_layers.tolist() == [0, 0, 2]
    assert pruned.parameter_count() == pruned.config.parameter_count(3)
    assert all(isinstance(p, torch.nn.Parameter) and p.is_leaf for p in pruned.parameters())
    assert [name for name, p in pruned.named_parameters() if p.requires_grad] == ["gate_logit"]
    pruned.requires_grad_(False)
    assert_close(apply(pruned), to_double(apply(closed)), 1e-6)
    # Again, by the receiver's numbers, not by rows.
    with torch.no_grad():
        closed.gate_logit[0] = -1.0
    assert_close(apply(pruned.prune(torch.tensor([2, 4]))), to_double(apply(closed)), 1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layers", "error"),
    [
        ([0, 3], IndexRangeError),
        ([5], IndexRangeError),
        ([-1], IndexRangeError),
        ([0, 0], GeometryError),
        ([], GeometryError),
        ([0.0], DTypeError),
        ([True], DTypeError),
    ],
)
def test_prune_refuses_layers_it_does_not_hold(layers: list[Any], error: type[LCFError]) -> None:
    adapter = make_adapter(keep=[0, 2, 4])
    with pytest.raises(error) as caught:
        adapter.prune(layers)
    assert caught.value.argument == "keep_layers"
    assert adapter.receiver_layers.tolist() == [0, 2, 4]
    if layers != [0, 3]:
        with pytest.raises(error):
            LatentCacheFlow(adapter.config, keep_layers=layers)
