"""What is timed, as data: the cases, and the bytes and FLOPs that each must at least move and do.

The figures are those of the computation, not of an implementation: every cache element read once and written once,
weights read once, and the multiplications of the matrix products (spec section 2; design section 3). Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lcf_fast import CacheGeometry, LCFConfig

#: The published pair, and the paper's best nine layers for it (arXiv 2605.22863, section on pruning).
QWEN25 = CacheGeometry(layers=24, kv_heads=2, head_dim=64)
QWEN3 = CacheGeometry(layers=28, kv_heads=8, head_dim=128)
BEST_NINE = (6, 8, 9, 10, 15, 16, 17, 19, 21)
#: Latents and messages are float32 whatever the cache is.
LATENT_BYTES = 4
#: Pieces that a context comes in, where it comes in pieces: for a message that grows, and for pools that are merged.
PIECES = 4
#: Messages that are injected as one, where several are.
MESSAGES = 4
#: Slots a layer of a message of slots.
SLOTS = 8
#: In the name of C2C's fuser where it is run as its released code runs it.
AS_RELEASED = ", as released"


@dataclass(frozen=True)
class Work:
    """Bytes moved and floating-point operations done, at the least, by one call."""

    bytes: int
    flops: int

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)

    def __mul__(self, times: int) -> Work:
        return Work(self.bytes * times, self.flops * times)


@dataclass(frozen=True)
class Shape:
    """Sizes of one call.

    Attributes:
        config: geometries and width.
        tokens: receiver positions N.
        context: sharer positions that LCF-X pools.
        layers: kept receiver layers.
        itemsize: bytes an element of caches and weights.
        batch: B.
    """

    config: LCFConfig
    tokens: int
    context: int
    layers: int
    itemsize: int
    batch: int = 1


def _blocks(config: LCFConfig) -> tuple[int, int]:
    """Parameters and multiplications a token of the FFN blocks."""
    products = config.ffn_blocks * 2 * config.ffn_expansion * config.bottleneck**2
    return products + config.ffn_blocks * config.bottleneck, products


def _rows(shape: Shape) -> int:
    return shape.batch * shape.tokens


def joint_projection(shape: Shape) -> Work:
    """One layer: S_K, S_V, R_K, R_V in, the latent out."""
    config, item = shape.config, shape.itemsize
    parameters, products = _blocks(config)
    down = config.in_channels * config.bottleneck
    moved = config.in_channels * item + config.bottleneck * LATENT_BYTES
    return Work(
        _rows(shape) * moved + (down + config.bottleneck + parameters) * item,
        _rows(shape) * 2 * (down + products),
    )


def gated_injection(shape: Shape) -> Work:
    """One layer: R_K, R_V and the latent in, R_K', R_V' out."""
    config, item = shape.config, shape.itemsize
    d, channels, heads = config.bottleneck, config.receiver.channels, config.receiver.kv_heads
    moved = 4 * channels * item + d * LATENT_BYTES
    parameters = channels * d + 2 * channels + 2 * (d * heads + heads) + 2
    return Work(_rows(shape) * moved + parameters * item, _rows(shape) * 2 * (channels * d + 2 * heads * d))


def fuse_layers(shape: Shape) -> Work:
    """LCF, all kept layers: both caches in, the receiver's out; the latent is never stored."""
    config, item = shape.config, shape.itemsize
    latents = 2 * _rows(shape) * config.bottleneck * LATENT_BYTES  # the two halves count it out and in again
    both = joint_projection(shape) + gated_injection(shape)
    reread = _rows(shape) * 2 * config.receiver.channels * item  # both halves read the receiver's rows
    return Work(both.bytes - latents - reread, both.flops) * shape.layers


def train(shape: Shape) -> Work:
    """LCF, all kept layers, forward and backward with frozen caches.

    Both caches and the result's gradient in once more, each weight read and its gradient written. Weights' gradients
    are as many products as the forward pass, latents' the same but for the down projection.
    """
    config, forward = shape.config, fuse_layers(shape)
    rows, own = _rows(shape), 2 * config.receiver.channels
    down = rows * 2 * config.in_channels * config.bottleneck * shape.layers
    caches = rows * (config.in_channels + own) * shape.itemsize * shape.layers
    weights = forward.bytes - rows * (config.in_channels + own) * shape.itemsize * shape.layers
    return Work(forward.bytes + caches + 2 * weights, 3 * forward.flops - down)


def attention_pool(shape: Shape) -> Work:
    """One layer: the sharer's cache in, K* and V* out: a score and two weighted sums a token."""
    channels, item = shape.config.sharer.channels, shape.itemsize
    rows = shape.batch * shape.context
    vectors = (2 * shape.batch + 2) * channels * item  # K*, V*, two queries
    return Work(rows * 2 * channels * item + vectors, rows * 6 * channels)


def summarize_layers(shape: Shape) -> Work:
    """LCF-X, the sharer's side, all kept layers: pooling and the fold through W_down."""
    config = shape.config
    fold = 2 * config.sharer.channels * config.bottleneck
    fold_bytes = (fold + config.bottleneck) * shape.itemsize + shape.batch * config.bottleneck * LATENT_BYTES
    return (attention_pool(shape) + Work(fold_bytes, shape.batch * 2 * fold)) * shape.layers


def inject(shape: Shape) -> Work:
    """LCF-X, the receiver's side, all kept layers: the message and the receiver's cache in, the edited cache out."""
    config, item = shape.config, shape.itemsize
    sharer = 2 * config.sharer.channels
    columns = sharer * config.bottleneck
    # As LCF, without the sharer's rows and columns of W_down and its bias, and with the message.
    layer = fuse_layers(Shape(config, shape.tokens, 0, 1, item, shape.batch))
    saved = Work((_rows(shape) * sharer + columns + config.bottleneck) * item, _rows(shape) * 2 * columns)
    message = shape.batch * config.bottleneck * LATENT_BYTES
    return Work(layer.bytes - saved.bytes + message, layer.flops - saved.flops) * shape.layers


def _states(shape: Shape) -> int:
    """Bytes of one piece's partial pool, all kept layers, spans on one track.

    A key and a value each of the span that began before the piece, of the one that goes on after it and of those
    within; and eight statistics.
    """
    sharer = shape.config.sharer
    floats = 3 * 2 * sharer.head_dim + 8
    return shape.layers * shape.batch * sharer.kv_heads * floats * LATENT_BYTES


def extend(shape: Shape) -> Work:
    """`summarize_layers`, the cache in pieces: each piece's state is written, and read when the next one comes."""
    return summarize_layers(shape) + Work(PIECES * 2 * _states(shape), 0)


def merge(shape: Shape) -> Work:
    """The pieces' states in, summary and latent out, all kept layers; the cache is not there. Two FLOPs a number."""
    read = PIECES * _states(shape)
    message = summarize_layers(Shape(shape.config, 0, 0, shape.layers, shape.itemsize, shape.batch))
    return message + Work(read, read // LATENT_BYTES * 2)


def inject_several(shape: Shape) -> Work:
    """`inject`, of several messages: only they are more."""
    more = (MESSAGES - 1) * shape.layers * shape.batch * shape.config.bottleneck
    return inject(shape) + Work(more * LATENT_BYTES, more)


def slots_summarize(shape: Shape) -> Work:
    """Slots, the sharer's side, all layers: a score and two weighted sums a token and slot, then the fold.

    The pooled slots themselves are not stored.
    """
    config, item = shape.config, shape.itemsize
    d, channels, slots = config.bottleneck, config.sharer.channels, config.slots
    rows, made = shape.batch * shape.context, shape.batch * slots
    fold = 2 * channels * d
    weights = slots * channels + fold + d + slots * d  # queries, W_down and its bias, embeddings
    layer = Work(
        (rows * 2 * channels + weights) * item + made * d * LATENT_BYTES,
        rows * slots * 6 * channels + made * 2 * fold,
    )
    return layer * shape.layers


def slots_deliver(shape: Shape) -> Work:
    """Slots, the receiver's side, all layers: the message in, k positions in the cache's dtype out.

    The receiver's own cache takes no part, and neither does its length.
    """
    config, item = shape.config, shape.itemsize
    d, channels = config.bottleneck, config.receiver.channels
    made = shape.batch * config.slots
    parameters, products = _blocks(config)
    up = 2 * channels * d
    layer = Work(
        (parameters + up + 2 * channels) * item + made * (d * LATENT_BYTES + 2 * channels * item),
        made * 2 * (products + up),
    )
    return layer * shape.layers


def slots_append(shape: Shape) -> Work:
    """`slots_deliver` into a new cache: the receiver's own is read and written once."""
    own = 2 * _rows(shape) * 2 * shape.config.receiver.channels * shape.itemsize
    return slots_deliver(shape) + Work(own * shape.layers, 0)


def slots_summarize_and_deliver(shape: Shape) -> Work:
    return slots_summarize(shape) + slots_deliver(shape)


def _stored(shape: Shape) -> int:
    """Bytes of a latent as it is stored, ``itemsize`` a number; of a quantised one with a scale a layer and item."""
    rows = shape.layers * shape.batch
    return rows * (shape.config.bottleneck * shape.itemsize + (LATENT_BYTES if shape.itemsize == 1 else 0))


def _latent(shape: Shape) -> int:
    return shape.layers * shape.batch * shape.config.bottleneck * LATENT_BYTES


def encode(shape: Shape) -> Work:
    """A float32 latent in, the stored one out; the header is not counted."""
    return Work(_latent(shape) + _stored(shape), 0)


def decode(shape: Shape) -> Work:
    """The stored latent in, and out as it is; a quantised one as float32."""
    return Work(_stored(shape) + (_latent(shape) if shape.itemsize == 1 else _stored(shape)), 0)


def summarize_and_inject(shape: Shape) -> Work:
    return summarize_layers(shape) + inject(shape)


def c2c_fuser(shape: Shape) -> Work:
    """C2C's fuser at the same shapes, all its layers (another method: more arithmetic for the same edit)."""
    from lcf_fast.config import c2c_parameters_per_layer

    config, item = shape.config, shape.itemsize
    parameters = c2c_parameters_per_layer(config.sharer, config.receiver)
    moved = (2 * config.sharer.channels + 4 * config.receiver.channels) * item
    return Work(_rows(shape) * moved + parameters * item, _rows(shape) * 2 * parameters) * shape.layers


@dataclass(frozen=True)
class Case:
    """One row of ours: an op, or the whole of a method through the adapter.

    Attributes:
        name: as a user calls it.
        group: cases of one group compute the same thing, so they share reference, truth, baselines and rounds.
        scope: what the call covers.
        work: its bytes and FLOPs.
        checked: also run by the quick check in Triton's interpreter, which is slow.
        interpreted: False: not even by the full check, since others run the same kernels.
        note: what a reader must know of the figure.
        no_graph: why it cannot be a CUDA graph; empty: it is tried.
    """

    name: str
    group: str
    scope: str
    work: Callable[[Shape], Work]
    checked: bool = False
    interpreted: bool = True
    note: str = ""
    no_graph: str = ""


@dataclass(frozen=True)
class Group:
    """What several implementations compute alike.

    Attributes:
        title: heading in the tables.
        crossing: LCF-X (Qwen3 -> Qwen3, spans) instead of LCF (Qwen2.5 -> Qwen3).
        pruned: only the best nine layers are kept.
        prompt: the receiver's prompt takes part; without it N is the number of tokens pooled.
        target: what the CPU path must reach over the naive reference at 512 tokens, float32, two cores.
        others: what all but ours must at least move and do, where they read the caches and ours does not.
        compiled_in: the group in which ``torch.compile`` of the same reference is timed, where that is another.
        slots: an adapter of slots, which is LCF-X's beside: `SLOTS` of them pool the context, without spans.
        reads_caches: whether ours reads the sharer's or the receiver's cache at all.
        kernels: modules of ``lcf_fast.kernels`` without which its Triton kernels cannot be checked.
    """

    name: str
    title: str
    crossing: bool = False
    pruned: bool = False
    prompt: bool = True
    target: float | None = None
    others: Callable[[Shape], Work] | None = None
    compiled_in: str = ""
    slots: bool = False
    reads_caches: bool = True
    kernels: tuple[str, ...] = ()


def _slots_group(name: str, title: str, *, prompt: bool = False, reads_caches: bool = True) -> Group:
    return Group(
        name,
        title,
        crossing=True,
        prompt=prompt,
        slots=True,
        reads_caches=reads_caches,
        kernels=("slot_pooling", "slot_projection"),
    )


GROUPS = (
    Group("lcf", "LCF: projection to injection, all layers", target=1.2),
    Group("inject", "LCF-X: inject a message, all layers", crossing=True, target=1.6),
    Group("train", "LCF: forward and backward, all layers"),
    Group("lcf_pruned", "LCF, pruned", pruned=True),
    Group("lcfx", "LCF-X: summarize and inject", crossing=True),
    Group("summarize", "LCF-X: summarize, all layers", crossing=True, prompt=False),
    Group(
        "windows",
        "LCF-X: summarize half-overlapping windows, all layers",
        crossing=True,
        prompt=False,
        compiled_in="summarize",
    ),
    Group(
        "merge",
        f"LCF-X: merge {PIECES} partial pools, all layers",
        crossing=True,
        prompt=False,
        others=summarize_layers,
        compiled_in="summarize",
        reads_caches=False,
    ),
    Group("projection", "joint K/V projection, one layer"),
    Group("pool", "attention pooling, one layer", crossing=True, prompt=False),
    Group("injection", "gated injection, one layer"),
    _slots_group("slots_summarize", f"slots: a message of {SLOTS}, all layers"),
    _slots_group("slots_deliver", f"slots: a message to {SLOTS} positions, all layers", reads_caches=False),
    _slots_group("slots_append", f"slots: {SLOTS} positions behind a copy of the receiver's cache", prompt=True),
    _slots_group("slots", "slots: a context to positions, all layers"),
)
#: Work of the host, on the CPU wherever the rest runs (`bench.wire`). The message is that of the pooled tokens.
HOST_GROUPS = (
    Group("encode", "message to bytes, on the CPU, all layers", crossing=True, prompt=False),
    Group("decode", "message from bytes, on the CPU, all layers", crossing=True, prompt=False),
    Group("encode_int8", "message to bytes, quantised, on the CPU, all layers", crossing=True, prompt=False),
    Group("decode_int8", "message from bytes, quantised, on the CPU, all layers", crossing=True, prompt=False),
)
ALL_GROUPS = GROUPS + HOST_GROUPS
#: What the headlines are about: compiled at every size, and run at every size even by --quick.
WHOLE = ("lcf", "inject")
CASES = (
    Case("adapter.fuse", "lcf", "all layers", fuse_layers, checked=True),
    Case("fuse_layers", "lcf", "all layers", fuse_layers),
    Case("adapter.inject", "inject", "all layers", inject),
    Case("fuse_layers(message)", "inject", "all layers", inject),
    Case("adapter.inject (4 messages)", "inject", "all layers", inject_several, interpreted=False),
    Case(
        "fuse_layers (train)",
        "train",
        "all layers",
        train,
        interpreted=False,
        note="gradients of all parameters, caches frozen, no noise; on a CPU ours is the reference under autograd",
    ),
    Case("adapter.fuse (pruned)", "lcf_pruned", "kept layers", fuse_layers),
    Case("adapter.summarize+inject", "lcfx", "all layers", summarize_and_inject, checked=True),
    Case("summarize_layers", "summarize", "all layers", summarize_layers),
    Case(
        "adapter.extend",
        "summarize",
        "all layers",
        extend,
        interpreted=False,
        note=f"begin, {PIECES} pieces that end within spans, finish; all others pool the whole context at once",
        no_graph="its pieces' spans come from the host in every call",
    ),
    Case("summarize_layers (windows)", "windows", "all layers", summarize_layers),
    Case(
        "adapter.merge",
        "merge",
        "all layers",
        merge,
        checked=True,
        note=f"merge and finish {PIECES} partial pools made beforehand; who has none must bring the caches together,"
        " which is not counted, and pool them all, which is what the others do here",
    ),
    Case("joint_projection", "projection", "one layer", joint_projection, checked=True),
    Case("attention_pool", "pool", "one layer", attention_pool, checked=True),
    Case("gated_injection", "injection", "one layer", gated_injection, checked=True),
    Case(f"slots.summarize (k = {SLOTS})", "slots_summarize", "all layers", slots_summarize),
    Case(
        f"slots.place (k = {SLOTS})",
        "slots_deliver",
        "all layers",
        slots_deliver,
        note="new positions, their keys rotated, whatever the receiver's length: its cache takes no part, and N is what"
        " was pooled",
    ),
    Case(
        f"slots.append (k = {SLOTS})",
        "slots_append",
        "all layers",
        slots_append,
        note="also copies the receiver's whole cache into the new one that ends with the slots, which is counted",
    ),
    Case(
        f"slots.summarize+place (k = {SLOTS})",
        "slots",
        "all layers",
        slots_summarize_and_deliver,
        checked=True,
        note="both sides, whatever the receiver's length; N is what is pooled",
    ),
)
_HOST = "on the CPU, and % of its copy bandwidth; also"
_WRITES = f"{_HOST} checks, describes and hashes the message, which the others do not"
_READS = f"{_HOST} finds damage and numbers that are not finite, which the others do not"
HOST_CASES = (
    Case("Message.to_bytes", "encode", "all layers", encode, note=_WRITES),
    Case("Message.from_bytes", "decode", "all layers", decode, note=_READS),
    Case("Message.to_bytes (int8)", "encode_int8", "all layers", encode, note=_WRITES),
    Case("Message.from_bytes (int8)", "decode_int8", "all layers", decode, note=_READS),
)
CASE_NAMES = tuple(case.name for case in CASES + HOST_CASES)


def cases_of(group: Group, only: tuple[str, ...] = ()) -> list[Case]:
    """The cases of a group; with ``only``, those whose name (or whose group's name) is in it."""
    chosen = [case for case in CASES + HOST_CASES if case.group == group.name]
    return [case for case in chosen if not only or case.name in only or group.name in only]


def kept_layers(group: Group, receiver: CacheGeometry) -> tuple[int, ...]:
    """Receiver layers that keep a projector: all; pruned, the paper's nine of 28, of another model every third."""
    if not group.pruned:
        return tuple(range(receiver.layers))
    return BEST_NINE if receiver.layers == QWEN3.layers else tuple(range(0, receiver.layers, 3))
