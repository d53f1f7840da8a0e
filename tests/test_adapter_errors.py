"""Bad input to `LatentCacheFlow`: a typed error that names the argument, and nothing is written."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adapters import RECEIVER, SHARER, assert_equal, cloned, make_adapter, make_caches
from torch import Tensor
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from helpers import Geometry, make_cache
from lcf_fast import (
    DeviceError,
    DTypeError,
    GeometryError,
    IndexRangeError,
    LatentCacheFlow,
    LatentSlots,
    LCFConfig,
    LCFError,
    Message,
    ShapeError,
    SpanError,
)


def masks(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.long)


FUSE_ERRORS: dict[str, tuple[dict[str, Any], type[LCFError], str]] = {
    "sharer layers": ({"sharer_cache": make_cache(Geometry(2, 2, 16), 2, 7)}, GeometryError, "sharer_cache"),
    "receiver is the sharer's": ({"receiver_cache": make_caches()[0]}, GeometryError, "receiver_cache"),
    "receiver heads": ({"receiver_cache": make_cache(Geometry(5, 2, 8), 2, 7)}, GeometryError, "receiver_cache"),
    "no cache": ({"sharer_cache": None}, DTypeError, "sharer_cache"),
    "lengths": ({"sharer_cache": make_caches(length=6)[0]}, ShapeError, "sharer_cache"),
    "batches": ({"sharer_cache": make_caches(batch=1)[0]}, ShapeError, "sharer_cache"),
    "device": ({"sharer_cache": make_caches("meta")[0]}, DeviceError, "sharer_cache"),
    "range": ({"positions": (3, 8)}, IndexRangeError, "positions"),
    "negative range": ({"positions": (-2, 4)}, IndexRangeError, "positions"),
    "reversed range": ({"positions": (4, 2)}, IndexRangeError, "positions"),
    "no range": ({"positions": 4}, DTypeError, "positions"),
    "bool range": ({"positions": (False, True)}, DTypeError, "positions"),
    "float range": ({"positions": (0.0, 4.0)}, DTypeError, "positions"),
    "mask length": ({"attention_mask": masks(2, 8)}, ShapeError, "attention_mask"),
    "mask batch": ({"attention_mask": masks(1, 7)}, ShapeError, "attention_mask"),
    "4-d mask": ({"attention_mask": masks(2, 1, 7, 7)}, ShapeError, "attention_mask"),
    "mask list": ({"attention_mask": [[1] * 7] * 2}, DTypeError, "attention_mask"),
    "mask device": ({"attention_mask": masks(2, 7).to("meta")}, DeviceError, "attention_mask"),
    "sharer mask": ({"sharer_attention_mask": masks(2, 6)}, ShapeError, "sharer_attention_mask"),
    "index high": ({"sharer_index": masks(2, 7) * 7}, IndexRangeError, "sharer_index"),
    "index low": ({"sharer_index": masks(2, 7) * -2}, IndexRangeError, "sharer_index"),
    "index shape": ({"sharer_index": masks(2, 6)}, ShapeError, "sharer_index"),
    "index dtype": ({"sharer_index": masks(2, 7).float()}, DTypeError, "sharer_index"),
    "masked index high": (
        {"sharer_index": masks(2, 7) * 7, "sharer_attention_mask": masks(2, 7)},
        IndexRangeError,
        "sharer_index",
    ),
    "masked index shape": (
        {"sharer_index": masks(2, 6), "sharer_attention_mask": masks(2, 7)},
        ShapeError,
        "sharer_index",
    ),
}


@pytest.mark.parametrize("case", FUSE_ERRORS)
def test_fuse_names_what_is_wrong_and_writes_nothing(case: str) -> None:
    change, error, argument = FUSE_ERRORS[case]
    sharer, receiver = make_caches()
    arguments = {"sharer_cache": sharer, "receiver_cache": receiver, **change}
    adapter = make_adapter()
    before = cloned(arguments["receiver_cache"])
    for method in (adapter.fuse, adapter.fuse_):
        with pytest.raises(error) as caught:
            method(**arguments)
        assert caught.value.argument.partition(" ")[0] == argument
        assert caught.value.expected
        assert caught.value.got
    assert_equal(arguments["receiver_cache"], before)


LAYER_ERRORS: dict[str, tuple[Any, type[LCFError]]] = {
    "length": (torch.zeros(2, 3, 6, 8), ShapeError),
    "heads": (torch.zeros(2, 2, 7, 8), GeometryError),
    "dims": (torch.zeros(2, 7, 24), ShapeError),
    "dtype": (torch.zeros(2, 3, 7, 8).half(), DTypeError),
    "ints": (torch.zeros(2, 3, 7, 8).long(), DTypeError),
    "device": (torch.zeros(2, 3, 7, 8, device="meta"), DeviceError),
    "nothing": (None, DTypeError),
}


@pytest.mark.parametrize("case", LAYER_ERRORS)
@pytest.mark.parametrize("part", [0, 1])
def test_a_layer_that_differs_is_named(case: str, part: int) -> None:
    bad, error = LAYER_ERRORS[case]
    sharer, receiver = make_caches()
    pair: list[Any] = list(receiver[3])
    pair[part] = bad
    broken: list[Any] = [*receiver[:3], tuple(pair), receiver[4]]
    before = cloned(receiver)
    adapter, crossing = make_adapter(), make_adapter(True)
    message = crossing.summarize(sharer)
    for call in (
        lambda: adapter.fuse(sharer, broken),
        lambda: adapter.fuse_(sharer, broken),
        lambda: crossing.inject(broken, message),
        lambda: crossing.inject_(broken, message),
    ):
        with pytest.raises(error) as caught:
            call()
        assert caught.value.argument == f"receiver_cache layer 3 {('key', 'value')[part]}"
    assert_equal(receiver, before)
    # The sharer's, for the methods that read it.
    bad_sharer: list[Any] = [*sharer[:2], (sharer[2][0], sharer[2][1][:, :1])]
    for call in (lambda: adapter.fuse_(bad_sharer, receiver), lambda: crossing.summarize(bad_sharer)):
        with pytest.raises(GeometryError, match="sharer_cache layer 2 value: expected 2 KV heads of 16, got 1 of 16"):
            call()
    assert_equal(receiver, before)


def test_an_adapter_elsewhere_is_told_from_its_caches() -> None:
    sharer, receiver = make_caches()
    adapter = make_adapter().to("meta")
    with pytest.raises(DeviceError, match="receiver_cache: expected meta as the adapter, got cpu"):
        adapter.fuse(sharer, receiver)


def test_an_adapter_and_caches_without_memory() -> None:
    sharer, receiver = make_caches("meta")
    adapter, crossing = make_adapter().to("meta"), make_adapter(True).to("meta")
    for call in (lambda: adapter.fuse(sharer, receiver), lambda: crossing.summarize(sharer), lambda: crossing.origin):
        with pytest.raises(DeviceError, match="expected a device with memory, got meta"):
            call()


@pytest.mark.parametrize("kind", ["lcf", "lcf_x", "side", "slots", "slots_side"])
def test_a_parametrized_weight_is_refused(kind: str) -> None:
    """It is made anew at each call: no message could be known by it, and no folder would hold it."""
    sharer, receiver = make_caches()
    module: Any = make_adapter(kind != "lcf")
    if "slots" in kind:
        module = LatentSlots(LCFConfig(SHARER, RECEIVER, bottleneck=64, slots=3))
    module = module.sharer_side() if "side" in kind else module
    register_parametrization(module, "down_weight", torch.nn.Identity())
    call = (lambda: module.fuse(sharer, receiver)) if kind == "lcf" else (lambda: module.summarize(sharer))
    for refused in (call, lambda: module.origin):
        with pytest.raises(GeometryError, match=r"^adapter: expected .*, got "):
            refused()
    remove_parametrizations(module, "down_weight")
    call()


def test_in_place_needs_memory_of_its_own() -> None:
    sharer, receiver = make_caches()
    shared = [(key[:1].expand(2, -1, -1, -1), value) for key, value in receiver]
    before = cloned(shared)
    with pytest.raises(ShapeError, match="memory of its own"):
        make_adapter().fuse_(sharer, shared)
    assert_equal(shared, before)


def test_in_place_names_the_layers_of_the_whole_model() -> None:
    """Of a pruned adapter, too, whose rows are numbered otherwise; and the caches as the caller calls them."""
    sharer, receiver = make_caches()
    key, value = receiver[4]
    adapter, crossing = make_adapter(keep=[2, 4]), make_adapter(True, keep=[2, 4])
    message = crossing.summarize(sharer)
    twice = [*receiver[:4], (key, receiver[2][1])]
    for bad, argument, got in (
        ([*receiver[:4], (key[:1].expand(2, -1, -1, -1), value)], "receiver_cache layer 4 key", "strides"),
        ([*receiver[:4], (key, value.mT.contiguous().mT)], "receiver_cache layer 4 value", "strides"),
        (twice, "receiver_cache layer 4 value", "that of receiver_cache layer 2 value"),
    ):
        with pytest.raises(ShapeError) as fused:
            adapter.fuse_(sharer, bad)
        with pytest.raises(ShapeError) as injected:
            crossing.inject_(bad, message)
        for caught in (fused.value, injected.value):
            assert (caught.argument, caught.got[: len(got)]) == (argument, got)
    crossed = LCFConfig(RECEIVER, RECEIVER, bottleneck=64, layer_map=[4, 3, 2, 1, 0])  # so the first row reads layer 3
    own = LatentCacheFlow(crossed, keep_layers=[1, 3])
    with pytest.raises(GeometryError) as refused:
        own.fuse_(receiver, receiver)
    assert refused.value.argument == "sharer_cache layer 3 key"
    assert refused.value.got == "that of receiver_cache layer 3 key"


def _message(adapter: LatentCacheFlow, **changes: Any) -> Message:
    message = adapter.summarize(make_caches()[0])
    fields = {name: getattr(message, name) for name in ("latent", "receiver_layers", "spans", "summary")}
    return Message(**{**fields, **changes})


MESSAGE_ERRORS: dict[str, tuple[dict[str, Any], type[LCFError], str]] = {
    "fewer layers": ({"latent": torch.zeros(4, 2, 64)}, ShapeError, "message.latent"),
    "width": ({"latent": torch.zeros(5, 2, 128)}, ShapeError, "message.latent"),
    "batch": ({"latent": torch.zeros(5, 3, 64)}, ShapeError, "message.latent"),
    "dims": ({"latent": torch.zeros(5, 64)}, ShapeError, "message.latent"),
    "dtype": ({"latent": torch.zeros(5, 2, 64, dtype=torch.int32)}, DTypeError, "message.latent"),
    "device": ({"latent": torch.zeros(5, 2, 64, device="meta")}, DeviceError, "message.latent"),
    "other layers": ({"receiver_layers": (0, 1, 2, 3, 5)}, GeometryError, "message.receiver_layers"),
}


@pytest.mark.parametrize("case", MESSAGE_ERRORS)
def test_inject_names_what_is_wrong_and_writes_nothing(case: str) -> None:
    change, error, argument = MESSAGE_ERRORS[case]
    adapter = make_adapter(True)
    _, receiver = make_caches()
    before = cloned(receiver)
    for method in (adapter.inject, adapter.inject_):
        with pytest.raises(error) as caught:
            method(receiver, _message(adapter, **change))
        assert caught.value.argument == argument
    assert_equal(receiver, before)


@pytest.mark.parametrize("case", ["positions", "attention_mask", "receiver_cache", "message"])
def test_inject_checks_the_rest_too(case: str) -> None:
    adapter = make_adapter(True)
    sharer, receiver = make_caches()
    arguments = {"receiver_cache": receiver, "message": adapter.summarize(sharer)}
    bad = {"positions": (0, 9), "attention_mask": masks(2, 9), "receiver_cache": sharer, "message": sharer}
    before = cloned(receiver)
    with pytest.raises(LCFError) as caught:
        adapter.inject_(**{**arguments, case: bad[case]})  # type: ignore[arg-type]
    assert caught.value.argument.partition(" ")[0] == case
    assert_equal(receiver, before)


SPAN_ERRORS: dict[str, tuple[Any, type[LCFError]]] = {
    "decreasing": (torch.tensor([[0, 4, 3], [0, 1, 7]]), SpanError),
    "too far": (torch.tensor([[0, 8], [0, 7]]), SpanError),
    "negative": ([[-1, 7], [0, 7]], SpanError),
    "all empty": ([[0, 7], [3, 3]], SpanError),
    "one offset": ([[0], [0, 7]], SpanError),
    "rows": ([[0, 7]], ShapeError),
    "one-dimensional": (torch.tensor([0, 7]), ShapeError),
    "floats": (torch.tensor([[0.0, 7.0]] * 2), DTypeError),
    "list of floats": ([[0, 3.5, 7], [0, 7]], DTypeError),
    "flat list": ([0, 7], DTypeError),
    "text": ("0:7", DTypeError),
}


@pytest.mark.parametrize("case", SPAN_ERRORS)
def test_summarize_names_bad_spans(case: str) -> None:
    spans, error = SPAN_ERRORS[case]
    with pytest.raises(error) as caught:
        make_adapter(True).summarize(make_caches()[0], spans)
    assert caught.value.argument == "spans"


def test_summarize_refuses_rows_that_are_all_padding() -> None:
    sharer, _ = make_caches()
    mask = torch.tensor([[0] * 7, [1] * 7])
    with pytest.raises(SpanError, match="spans: expected a token to pool in every row"):
        make_adapter(True).summarize(sharer, attention_mask=mask)
    with pytest.raises(ShapeError, match="attention_mask"):
        make_adapter(True).summarize(sharer, attention_mask=mask[:, 1:])


def test_methods_of_the_other_kind_say_so() -> None:
    sharer, receiver = make_caches()
    lcf, lcf_x = make_adapter(), make_adapter(True)
    message = lcf_x.summarize(sharer)
    for method in (lcf_x.fuse, lcf_x.fuse_):
        with pytest.raises(GeometryError, match="LCF-X: use summarize and inject"):
            method(sharer, receiver)
    with pytest.raises(GeometryError, match="to summarize with, got LCF: use fuse"):
        lcf.summarize(sharer)
    with pytest.raises(GeometryError, match="to tell the origin of messages with, got LCF: use fuse"):
        _ = lcf.origin
    for inject in (lcf.inject, lcf.inject_):
        with pytest.raises(GeometryError, match="to inject with, got LCF: use fuse"):
            inject(receiver, message)


@pytest.mark.parametrize(
    ("spans", "error"),
    [([[0, 2**70]] * 2, SpanError), ([[-(2**64), 3]] * 2, SpanError), ([[False, True]] * 2, DTypeError)],
)
def test_offsets_that_are_none(spans: Any, error: type[LCFError]) -> None:
    with pytest.raises(error, match=r"^spans: "):
        make_adapter(True).summarize(make_caches()[0], spans)


def test_caches_and_weights_that_are_none_of_these() -> None:
    adapter, (sharer, receiver) = make_adapter(True), make_caches()
    message = adapter.summarize(sharer)
    with pytest.raises(GeometryError, match=r"^receiver_cache.layers: expected a list of layers, got NoneType"):
        adapter.inject(SimpleNamespace(layers=None), message)
    sparse = [(key.to_sparse(), value) for key, value in receiver]
    with pytest.raises(DTypeError, match=r"^receiver_cache layer 0 key: expected a dense tensor"):
        adapter.inject(sparse, message)
    with pytest.raises(LCFError, match=r"^weights: "):
        adapter.combine([message, message], weights=2**70)
    for latent in (message.tensors["latent"].to(torch.float8_e4m3fn), message.tensors["latent"].to_sparse()):
        with pytest.raises(DTypeError, match=r"^message\[0\].latent: "):
            adapter.inject(receiver, [replace(message, latent=latent)])


def test_layers_to_keep_that_are_no_list() -> None:
    with pytest.raises(DTypeError, match=r"^keep_layers: "):
        make_adapter().prune(3)  # type: ignore[arg-type]


def test_errors_of_a_piece_name_its_arguments() -> None:
    adapter, cache = make_adapter(True), make_cache(SHARER, 1, 10)
    for call in (adapter.pool, adapter.begin().extend):
        with pytest.raises(GeometryError, match=r"^cache_piece: expected"):
            call(cache[:2])
        with pytest.raises(DeviceError, match=r"^spans: expected a device with memory"):
            call(cache, torch.tensor([[0, 4]], device="meta"))
        for spans in ([[5, 4]], [[0, 4], [1]], [[0.5, 2]], torch.zeros(2), 3):
            with pytest.raises(LCFError, match=r"^spans"):
                call(cache, spans)  # type: ignore[arg-type]
