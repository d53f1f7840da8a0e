"""What a fuser computes: against loops written from the description, and against the released code's operations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tiny_training import tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import (
    ADVERSARIES,
    CACHE_LAYOUTS,
    Adversary,
    CacheLayout,
    Pair,
    assert_within_budget,
    make_cache,
    to_double,
)
from lcf_fast import CacheGeometry
from lcf_fast.c2c import C2CConfig, C2CFuser, C2CProjector, FaithfulFuser, faithful_fuse
from lcf_fast.c2c.faithful import Captured
from lcf_fast.config import c2c_parameters_per_layer
from lcf_fast.errors import (
    DeviceError,
    DTypeError,
    GeometryError,
    IndexRangeError,
    LCFError,
    ShapeError,
)

MakeFuser = Callable[..., C2CFuser]
QWEN25, QWEN3 = CacheGeometry(24, 2, 64), CacheGeometry(28, 8, 128)
SHARER, RECEIVER = CacheGeometry(3, 2, 4), CacheGeometry(5, 3, 6)
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def caches(
    batch: int = 2, length: int = 5, other: int | None = None, fuser: C2CFuser | None = None, **options: Any
) -> tuple[list[Pair], list[Pair]]:
    generator = torch.Generator().manual_seed(7)
    pair = (SHARER, RECEIVER) if fuser is None else (fuser.config.sharer, fuser.config.receiver)
    sharer = make_cache(pair[0], batch, length if other is None else other, generator=generator, **options)
    return sharer, make_cache(pair[1], batch, length, generator=generator, **options)


# --- an independent implementation: loops over items, positions and heads, one vector at a time
# ---------------------------------------------------------------------------------------------------


def times(matrix: Tensor, vector: Tensor) -> Tensor:
    return torch.stack([(row * vector).sum() for row in matrix])


def block(weights: dict[str, Tensor], name: str, h: Tensor) -> Tensor:
    normed = h / (h.square().mean() + 1e-6).sqrt() * weights[f"{name}.norm.weight"]
    inner = times(weights[f"{name}.w1.weight"], normed)
    inner = torch.stack([x * 0.5 * (1 + torch.erf(x / math.sqrt(2))) for x in inner])
    return h + times(weights[f"{name}.w2.weight"], inner)


def affine(weights: dict[str, Tensor], name: str, h: Tensor) -> Tensor:
    return times(weights[f"{name}.weight"], h) + weights[f"{name}.bias"]


def by_loops(
    fuser: C2CFuser,
    sharer: Sequence[Pair],
    receiver: Sequence[Pair],
    dtype: torch.dtype,
    row_of: Callable[[int, int], int] = lambda item, n: n,
) -> list[Pair]:
    """The edited cache, in ``dtype``; ``row_of`` gives the sharer's row of a receiver position, -1 for none."""
    result = [(key.to(dtype).clone(), value.to(dtype).clone()) for key, value in receiver]
    updates = fuser.config.num_layers - 2
    for t, s, projector in zip(fuser.kept, fuser.reads, fuser.projectors):
        weights = {name: tensor.detach().to(dtype) for name, tensor in projector.state_dict().items()}
        for i, x in enumerate(("key", "value")):
            if weights[f"{x}_gate_logit"] <= 0:
                continue
            out, own, heard = result[t][i], receiver[t][i].to(dtype), sharer[s][i].to(dtype)
            batch, heads, length, dim = own.shape
            for item in range(batch):
                for n in range(length):
                    row = row_of(item, n)
                    if row < 0:
                        continue
                    theirs = [heard[item, head, row] for head in range(heard.shape[1])]
                    ours = [own[item, head, n] for head in range(heads)]
                    h = block(weights, f"{x}_mlp1.blocks.0", affine(weights, f"{x}_in", torch.cat([*theirs, *ours])))
                    scores = affine(weights, f"{x}_scalar_head", block(weights, f"{x}_scalar_mlp2.blocks.0", h))
                    for k in range(updates):
                        h = block(weights, f"{x}_proj_mlp2.blocks.{k}", h)
                    update = affine(weights, f"{x}_proj_out", h)
                    for head in range(heads):
                        part = update[head * dim : (head + 1) * dim]
                        out[item, head, n] += part / (1 + torch.exp(-scores[head]))
    return result


def assert_as_loops(
    got: Sequence[Pair],
    fuser: C2CFuser,
    sharer: Sequence[Pair],
    receiver: Sequence[Pair],
    row_of: Callable[[int, int], int] = lambda item, n: n,
) -> None:
    truth = by_loops(fuser, sharer, receiver, torch.float64, row_of)
    same = by_loops(fuser, sharer, receiver, torch.float32, row_of)
    for t, (pair, wanted, plain) in enumerate(zip(got, truth, same, strict=True)):
        for i in range(2):
            assert_within_budget(pair[i], wanted[i], plain[i])
            untouched = [(b, n) for b in range(pair[i].shape[0]) for n in range(pair[i].shape[2]) if row_of(b, n) < 0]
            for b, n in untouched:
                assert torch.equal(pair[i][b, :, n], receiver[t][i][b, :, n])


def test_it_is_what_the_description_says(make_fuser: MakeFuser) -> None:
    fuser = make_fuser()
    sharer, receiver = caches()
    got = fuser.fuse(sharer, receiver)
    assert_as_loops(got, fuser, sharer, receiver)
    moved = [[not torch.equal(new, old) for new, old in zip(*pairs)] for pairs in zip(got, receiver)]
    assert moved == [[True, True], [False, False], [True, True], [False, True], [True, False]]


@pytest.mark.parametrize(
    "fields",
    [
        {"num_layers": 5},
        {"layer_map": (2, 0, 1, 1, 0)},
        {"layer_map": "relative_depth"},
        {"sharer": CacheGeometry(3, 1, 8), "receiver": CacheGeometry(5, 1, 2)},
        {"sharer": CacheGeometry(5, 7, 2), "receiver": CacheGeometry(5, 5, 2), "intermediate": 24},
    ],
    ids=["three update blocks", "map", "by depth", "one head", "odd heads"],
)
def test_other_shapes(make_fuser: MakeFuser, fields: dict[str, Any]) -> None:
    fuser = make_fuser(**fields)
    sharer, receiver = caches(1, 3, fuser=fuser)
    assert_as_loops(fuser.fuse(sharer, receiver), fuser, sharer, receiver)


def test_layers_that_are_not_kept(make_fuser: MakeFuser) -> None:
    fuser = make_fuser(keep=(4, 0), layer_map=(2, 0, 1, 1, 0))
    assert (fuser.kept, fuser.reads) == ((0, 4), (2, 0))
    sharer, receiver = caches()
    got = fuser.fuse(sharer, receiver)
    assert_as_loops(got, fuser, sharer, receiver)
    assert got[2][0] is receiver[2][0]


@pytest.mark.parametrize("positions", [None, (1, 4), (2, 2), (0, 3)])
@pytest.mark.parametrize("indexed", [False, True])
def test_masks_positions_and_index(make_fuser: MakeFuser, indexed: bool, positions: tuple[int, int] | None) -> None:
    fuser = make_fuser()
    sharer, receiver = caches(2, 5, 7 if indexed else 5)
    ours = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    theirs = torch.ones(2, 7 if indexed else 5)
    theirs[1, 1] = 0.0
    index = torch.tensor([[3, 3, -1, 6, 0], [1, 5, 2, -1, 4]], dtype=torch.int32) if indexed else None
    # What is hidden may hold anything.
    for pair in sharer:
        for tensor in pair:
            tensor[1, :, 1] = torch.nan
    start, stop = positions or (0, 5)

    def row_of(item: int, n: int) -> int:
        row = n if index is None else int(index[item, n])
        hidden = not ours[item, n] or row < 0 or not theirs[item, row]
        return -1 if hidden or not start <= n < stop else row

    got = fuser.fuse(
        sharer,
        receiver,
        sharer_index=index,
        positions=positions,
        attention_mask=ours,
        sharer_attention_mask=theirs,
    )
    assert_as_loops(got, fuser, sharer, receiver, row_of)
    original = FaithfulFuser(fuser).fuse(
        sharer,
        receiver,
        sharer_index=index,
        positions=positions,
        attention_mask=ours,
        sharer_attention_mask=theirs,
    )
    assert_as_loops(original, fuser, sharer, receiver, row_of)


def test_a_row_beyond_the_sharers_that_nobody_looked_at_is_none(
    make_fuser: MakeFuser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where looking would wait."""
    fuser, (sharer, receiver) = make_fuser(), caches(2, 5, 7)
    index = torch.tensor([[3, 3, -1, 6, 0], [1, 5, 2, -1, 4]])
    expected = fuser.fuse(sharer, receiver, sharer_index=index)
    monkeypatch.setattr("lcf_fast.checks.reads_values", lambda tensor: False)
    got = fuser.fuse(sharer, receiver, sharer_index=index.masked_fill(index < 0, 7))
    assert all(torch.equal(a, b) for x, y in zip(got, expected) for a, b in zip(x, y))


def test_rows_do_not_depend_on_each_other(make_fuser: MakeFuser) -> None:
    """A permuted batch is a permuted result, one row alone is that row, padding changes nothing, to rounding."""
    fuser = make_fuser(dtype=torch.float64)
    sharer, receiver = (to_double(cache) for cache in caches(3, 4))
    whole = fuser.fuse(sharer, receiver)
    order = torch.tensor([2, 0, 1])
    shuffled = fuser.fuse(*([(k[order], v[order]) for k, v in cache] for cache in (sharer, receiver)))
    alone = fuser.fuse(*([(k[1:2], v[1:2]) for k, v in cache] for cache in (sharer, receiver)))
    pad = torch.zeros(3, 1, 2, 1, dtype=torch.float64) + 50.0
    padded = [
        [tuple(torch.cat([pad.expand(3, x.shape[1], 2, x.shape[3]), x], 2) for x in pair) for pair in cache]
        for cache in (sharer, receiver)
    ]
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]] * 3)
    longer = fuser.fuse(*padded, attention_mask=mask)
    for a, b, c, d in zip(whole, shuffled, alone, longer, strict=True):
        for i in range(2):
            torch.testing.assert_close(a[i][order], b[i], rtol=0, atol=1e-13)
            torch.testing.assert_close(a[i][1:2], c[i], rtol=0, atol=1e-13)
            torch.testing.assert_close(a[i], d[i][:, :, 2:], rtol=0, atol=1e-13)
            assert torch.equal(d[i][:, :, :2], torch.full_like(d[i][:, :, :2], 50.0))


@pytest.mark.parametrize("length", [0, 1, 17])
def test_lengths(make_fuser: MakeFuser, length: int) -> None:
    fuser = make_fuser()
    sharer, receiver = caches(1, length)
    got = fuser.fuse(sharer, receiver)
    assert got[0][0].shape == receiver[0][0].shape
    if length == 1:
        assert_as_loops(got, fuser, sharer, receiver)
    nobody, _ = caches(1, 0)
    index = torch.full((1, length), -1)
    for pair, old in zip(fuser.fuse(nobody, receiver, sharer_index=index), receiver):
        assert all(torch.equal(x, y) for x, y in zip(pair, old))


# --- precision, beside the released code's own operations
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("adversary", [None, *ADVERSARIES])
def test_within_the_error_of_the_released_operations(
    make_fuser: MakeFuser, dtype: torch.dtype, adversary: Adversary | None
) -> None:
    fuser = make_fuser(hidden=64, intermediate=48, dtype=dtype)
    sharer, receiver = caches(2, 33, dtype=dtype, adversary=adversary)
    got, plain = fuser.fuse(sharer, receiver), faithful_fuse(fuser, sharer, receiver)
    truth = faithful_fuse(fuser.to(torch.float64), to_double(sharer), to_double(receiver))
    for pair, same, wanted in zip(got, plain, truth, strict=True):
        for i in range(2):
            assert_within_budget(pair[i], wanted[i], same[i])


@pytest.mark.parametrize("layout", CACHE_LAYOUTS)
def test_any_layout(make_fuser: MakeFuser, layout: CacheLayout) -> None:
    fuser = make_fuser()
    sharer, receiver = caches(layout=layout)
    plain = [[(k.contiguous(), v.contiguous()) for k, v in cache] for cache in (sharer, receiver)]
    for pair, wanted in zip(fuser.fuse(sharer, receiver), fuser.fuse(*plain), strict=True):
        assert torch.equal(pair[0], wanted[0]) and torch.equal(pair[1], wanted[1])


def test_the_released_operations_are_what_the_description_says(make_fuser: MakeFuser) -> None:
    fuser = make_fuser()
    sharer, receiver = caches()
    before = [(k.clone(), v.clone()) for k, v in receiver]
    captured: list[Captured] = []
    got = faithful_fuse(fuser, sharer, receiver, captured)
    assert_as_loops(got, fuser, sharer, receiver)
    assert all(torch.equal(x, y) for a, b in zip(receiver, before) for x, y in zip(a, b))
    logits = [tuple(float(p.get_parameter(f"{x}_gate_logit")) for x in ("key", "value")) for p in fuser.projectors]
    assert [entry[2:] for entry in captured] == logits and len(set(logits)) == 5
    assert len(captured) == 5 and captured[0][0].shape == (2, 3, 5, 1)


def test_parameters_of_another_dtype_are_cast(make_fuser: MakeFuser) -> None:
    fuser = make_fuser()
    sharer, receiver = caches(dtype=torch.bfloat16)
    got = fuser.fuse(sharer, receiver)
    cast = fuser.to(torch.bfloat16).fuse(sharer, receiver)
    assert got[0][0].dtype == torch.bfloat16
    assert all(torch.equal(x, y) for a, b in zip(got, cast) for x, y in zip(a, b))


# --- cost
# ---------------------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Counts what is run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


VIEWS = {
    "transpose",
    "slice",
    "view",
    "_unsafe_view",
    "unsqueeze",
    "t",
    "select",
    "expand",
    "alias",
    "detach",
    "permute",
}
SYNCS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "_to_copy"}


def run(call: Callable[[], Any]) -> list[str]:
    with Operations() as seen, torch.no_grad():
        call()
    return [name for name in seen.names if name not in VIEWS]


def test_closed_gates_cost_nothing(make_fuser: MakeFuser) -> None:
    sharer, receiver = caches()
    counts = {}
    for name, logits in {"open": (1.0, 1.0), "half": (1.0, -1.0), "closed": (0.0, -1.0)}.items():
        fuser = make_fuser(logits=[logits] * 5)
        fuser.fuse(sharer, receiver)  # reads the gates
        counts[name] = len(run(lambda fuser=fuser: fuser.fuse(sharer, receiver)))  # type: ignore[misc]
    assert counts["closed"] == 0 and counts["half"] * 2 == counts["open"]
    got = make_fuser(logits=[(1.0, -1.0)] * 5).fuse(sharer, receiver)
    assert all(pair[1] is old[1] for pair, old in zip(got, receiver))


def test_nothing_waits_for_the_device_or_is_cloned(make_fuser: MakeFuser) -> None:
    fuser = make_fuser(logits=[(1.0, 1.0)] * 5)
    sharer, receiver = caches()
    mask, index = torch.ones(2, 5, dtype=torch.bool), torch.zeros(2, 5, dtype=torch.int64)
    fuser.fuse(sharer, receiver)
    names = run(lambda: fuser.fuse(sharer, receiver, attention_mask=mask))
    assert not SYNCS & set(names) and "clone" not in names and "cat" not in names
    # Checks of an index's values are for the CPU alone.
    names = run(lambda: fuser.fuse(sharer, receiver, sharer_index=index))
    assert names.count("_local_scalar_dense") <= 2 and "clone" not in names
    ours, theirs = (run(lambda call=call: call(sharer, receiver)) for call in (fuser.fuse, faithful(fuser)))  # type: ignore[misc]
    # On a CPU torch runs each of the 30 norms as six operations, which both do.
    assert len(ours) - 5 * 30 < 0.65 * (len(theirs) - 5 * 30)
    assert theirs.count("clone") >= 2 * (2 * 5 + 3)  # the caches, and a flattened copy of each tensor


def faithful(fuser: C2CFuser) -> Callable[..., Any]:
    return lambda sharer, receiver: faithful_fuse(fuser, sharer, receiver)


def test_no_sync_on_a_gpu(make_fuser: MakeFuser, device: torch.device) -> None:
    """On a CPU: that the same call works; on a GPU it may not wait."""
    fuser = make_fuser(device=device, logits=[(1.0, 1.0)] * 5)
    sharer, receiver = caches(device=device)
    options: Any = {
        "attention_mask": torch.ones(2, 5, device=device),
        "sharer_index": torch.zeros(2, 5, device=device).long(),
    }
    first = fuser.fuse(sharer, receiver, **options)
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        again = fuser.fuse(sharer, receiver, **options)
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(x, y) for a, b in zip(first, again) for x, y in zip(a, b))


def test_gates_are_read_again_when_they_change(make_fuser: MakeFuser) -> None:
    fuser = make_fuser()
    sharer, receiver = caches()
    logit = fuser.projectors[0].get_parameter("key_gate_logit")
    assert fuser.fuse(sharer, receiver)[0][0] is not receiver[0][0]
    logit.fill_(-1.0)
    assert fuser.fuse(sharer, receiver)[0][0] is receiver[0][0]
    fuser.load_state_dict({**fuser.state_dict(), "projectors.0.key_gate_logit": torch.tensor(2.0)})
    assert fuser.fuse(sharer, receiver)[0][0] is not receiver[0][0]
    for _ in range(20):  # a new parameter may lie where the old one was
        for value in (-1.0, 1.0):
            fuser.projectors[0].key_gate_logit = torch.nn.Parameter(torch.tensor(value), requires_grad=False)
            assert (fuser.fuse(sharer, receiver)[0][0] is receiver[0][0]) == (value < 0)
    with torch.inference_mode():
        inside = C2CFuser(fuser.config).eval()
        assert inside.fuse(sharer, receiver)[0][0] is receiver[0][0]
        inside.projectors[0].get_parameter("key_gate_logit").fill_(1.0)
        assert inside.fuse(sharer, receiver)[0][0] is not receiver[0][0]


def test_the_inputs_stay(make_fuser: MakeFuser) -> None:
    fuser = make_fuser()
    sharer, receiver = caches()
    before = [(k.clone(), v.clone()) for cache in (sharer, receiver) for k, v in cache]
    fuser.fuse(sharer, receiver)
    fuser.fuse(sharer, receiver, positions=(1, 3))
    itself = make_fuser(sharer=RECEIVER)  # the control: the receiver as its own sharer
    itself.fuse(receiver, receiver)
    assert all(torch.equal(x, y) for a, b in zip([*sharer, *receiver], before) for x, y in zip(a, b))


# --- caches of transformers, sizes, names
# ---------------------------------------------------------------------------------------------------


def test_a_dynamic_cache_goes_on(make_fuser: MakeFuser) -> None:
    transformers = pytest.importorskip("transformers")
    fuser = make_fuser()
    sharer, receiver = caches()
    cache = transformers.DynamicCache()
    for t, (key, value) in enumerate(receiver):
        cache.update(key, value, t)
    got = fuser.fuse(sharer, cache)
    assert type(got) is type(cache) and got.get_seq_length() == 5
    for layer, (key, value) in zip(got.layers, fuser.fuse(sharer, receiver)):
        assert torch.equal(layer.keys, key) and torch.equal(layer.values, value)


def test_generation_goes_on_from_either_cache_of_transformers() -> None:
    """A static cache and a dynamic one, with left padding, fused alike; and the edit is what generation reads."""
    transformers = pytest.importorskip("transformers")
    sharer, receiver = tiny_model("qwen2", 1), tiny_model("qwen3", 2)
    torch.manual_seed(4)
    fuser = C2CFuser(C2CConfig(CacheGeometry.of(sharer), CacheGeometry.of(receiver), hidden=32, intermediate=32)).eval()
    with torch.no_grad():
        for name, parameter in fuser.named_parameters():
            parameter.fill_(1.0) if "gate_logit" in name else parameter.mul_(3.0)
    ids = torch.randint(1, 61, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0

    @torch.no_grad()
    def answer(kind: str, edited: bool) -> Tensor:
        made = []
        for model in (sharer, receiver):
            cache = None if kind == "dynamic" else transformers.StaticCache(config=model.config, max_cache_len=32)
            seen: Any = model(ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache, use_cache=True)
            made.append(seen.past_key_values)
        cut: Any = {"attention_mask": mask[:, :-1], "sharer_attention_mask": mask[:, :-1]}
        cache = fuser.fuse(*made, **cut) if edited else made[1]
        out = receiver.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=8, do_sample=False)
        result: Tensor = out[:, ids.shape[1] :]
        return result

    assert torch.equal(answer("static", True), answer("dynamic", True))
    assert not torch.equal(answer("dynamic", True), answer("dynamic", False))


def test_parameters_are_counted_and_named_as_published() -> None:
    config = C2CConfig(QWEN25, QWEN3)
    with torch.device("meta"):
        fuser = C2CFuser(config, keep_layers=[0, 27])
    assert fuser.parameter_count() == 2 * 17_066_002 == 2 * c2c_parameters_per_layer(QWEN25, QWEN3)
    shapes = {name: tuple(tensor.shape) for name, tensor in fuser.projectors[0].state_dict().items()}
    wanted: dict[str, tuple[int, ...]] = {"gate_temperature": ()}
    for x in ("key", "value"):
        wanted |= {f"{x}_gate_logit": (), f"{x}_in.weight": (1024, 1152), f"{x}_in.bias": (1024,)}
        wanted |= {f"{x}_scalar_head.weight": (8, 1024), f"{x}_scalar_head.bias": (8,)}
        wanted |= {f"{x}_proj_out.weight": (1024, 1024), f"{x}_proj_out.bias": (1024,)}
        for mlp in ("mlp1", "scalar_mlp2", "proj_mlp2"):
            wanted |= {f"{x}_{mlp}.blocks.0.{part}.weight": (1024, 1024) for part in ("w1", "w2")}
            wanted[f"{x}_{mlp}.blocks.0.norm.weight"] = (1024,)
    assert shapes == wanted
    assert set(fuser.projectors[0].state_dict()) == set(dict(C2CProjector(small()).state_dict()))


def small(**fields: Any) -> C2CConfig:
    return C2CConfig(**{"sharer": SHARER, "receiver": RECEIVER, "hidden": 16, "intermediate": 10, **fields})


def test_widths_are_where_they_belong() -> None:
    fuser = C2CFuser(small(num_layers=4))
    assert fuser.parameter_count() == 5 * (
        c2c_parameters_per_layer(SHARER, RECEIVER, hidden=16, intermediate=10) + 2 * (16 + 2 * 16 * 10)
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in fuser.projectors[0].state_dict().items()}
    assert shapes["key_scalar_mlp2.blocks.0.w1.weight"] == (16, 16)
    assert shapes["key_proj_mlp2.blocks.1.w1.weight"] == shapes["value_mlp1.blocks.0.w1.weight"] == (10, 16)


# --- bad input
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "error", "argument"),
    [
        ({"sharer": (3, 2, 4)}, DTypeError, "sharer"),
        ({"hidden": 0}, GeometryError, "hidden"),
        ({"hidden": 1.0}, DTypeError, "hidden"),
        ({"num_layers": 2}, GeometryError, "num_layers"),
        ({"dropout": 1.0}, GeometryError, "dropout"),
        ({"initial_temperature": 0.0}, GeometryError, "initial_temperature"),
        ({"layer_map": (0, 0, 0, 0, 3)}, IndexRangeError, "layer_map[4]"),
        ({"layer_map": "no such map"}, GeometryError, "layer_map"),
    ],
)
def test_bad_configurations(fields: dict[str, Any], error: type[LCFError], argument: str) -> None:
    with pytest.raises(error) as raised:
        small(**fields)
    assert raised.value.argument == argument


@pytest.mark.parametrize(
    ("keep", "error"),
    [
        ((), GeometryError),
        ((1, 1), GeometryError),
        ((5,), IndexRangeError),
        ((-1,), IndexRangeError),
        ((0, 1.5), DTypeError),
        ((True,), DTypeError),
        (1, DTypeError),
    ],
)
def test_bad_layers(keep: Any, error: type[LCFError]) -> None:
    with pytest.raises(error) as raised:
        C2CFuser(small(), keep_layers=keep)
    assert raised.value.argument == "keep_layers"


def test_bad_calls(make_fuser: MakeFuser) -> None:
    fuser = make_fuser()
    sharer, receiver = caches()
    longer, _ = caches(2, 6)
    more, _ = caches(3, 5)
    cases: list[tuple[type[LCFError], str, tuple[Any, ...], dict[str, Any]]] = [
        (GeometryError, "sharer_cache", (receiver, receiver), {}),
        (GeometryError, "receiver_cache", (sharer, sharer), {}),
        (DTypeError, "receiver_cache", (sharer, "text"), {}),
        (ShapeError, "sharer_cache", (longer, receiver), {}),
        (ShapeError, "sharer_cache", (more, receiver), {}),
        (IndexRangeError, "positions", (sharer, receiver), {"positions": (2, 6)}),
        (ShapeError, "attention_mask", (sharer, receiver), {"attention_mask": torch.ones(2, 4)}),
        (ShapeError, "sharer_attention_mask", (sharer, receiver), {"sharer_attention_mask": torch.ones(1, 5)}),
        (IndexRangeError, "sharer_index", (sharer, receiver), {"sharer_index": torch.full((2, 5), 5)}),
        (DTypeError, "sharer_index", (sharer, receiver), {"sharer_index": torch.zeros(2, 5)}),
        (DeviceError, "receiver_cache", (sharer, [tuple(x.to("meta") for x in p) for p in receiver]), {}),
    ]
    for error, argument, arguments, keywords in cases:
        with pytest.raises(error) as raised:
            fuser.fuse(*arguments, **keywords)
        assert raised.value.argument == argument
    broken = [*receiver[:3], (receiver[3][0], receiver[3][1][:, :2]), receiver[4]]
    with pytest.raises(GeometryError, match="layer 3 value"):
        fuser.fuse(sharer, broken)


def test_the_faithful_one_refuses_what_the_original_cannot_do(make_fuser: MakeFuser) -> None:
    fuser = make_fuser()
    sharer, receiver = caches()
    with pytest.raises(ShapeError):
        faithful_fuse(fuser, caches(2, 6)[0], receiver)
    with pytest.raises(DTypeError):
        faithful_fuse(fuser, sharer, caches(dtype=torch.bfloat16)[1])
    with pytest.raises(LCFError, match="eval"):
        faithful_fuse(fuser.train(), sharer, receiver)
