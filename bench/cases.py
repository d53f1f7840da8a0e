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
    """

    name: str
    group: str
    scope: str
    work: Callable[[Shape], Work]
    checked: bool = False


@dataclass(frozen=True)
class Group:
    """What several implementations compute alike.

    Attributes:
        title: heading in the tables.
        crossing: LCF-X (Qwen3 -> Qwen3, spans) instead of LCF (Qwen2.5 -> Qwen3).
        pruned: only the best nine layers are kept.
        prompt: the receiver's prompt takes part; without it N is the number of tokens pooled.
        target: what the CPU path must reach over the naive reference at 512 tokens, float32, two cores.
    """

    name: str
    title: str
    crossing: bool = False
    pruned: bool = False
    prompt: bool = True
    target: float | None = None


GROUPS = (
    Group("lcf", "LCF: projection to injection, all layers", target=1.2),
    Group("inject", "LCF-X: inject a message, all layers", crossing=True, target=1.6),
    Group("lcf_pruned", "LCF, pruned", pruned=True),
    Group("lcfx", "LCF-X: summarize and inject", crossing=True),
    Group("summarize", "LCF-X: summarize, all layers", crossing=True, prompt=False),
    Group("projection", "joint K/V projection, one layer"),
    Group("pool", "attention pooling, one layer", crossing=True, prompt=False),
    Group("injection", "gated injection, one layer"),
)
#: What the headlines are about: compiled at every size, and run at every size even by --quick.
WHOLE = ("lcf", "inject")
CASES = (
    Case("adapter.fuse", "lcf", "all layers", fuse_layers, checked=True),
    Case("fuse_layers", "lcf", "all layers", fuse_layers),
    Case("adapter.inject", "inject", "all layers", inject),
    Case("fuse_layers(message)", "inject", "all layers", inject),
    Case("adapter.fuse (pruned)", "lcf_pruned", "kept layers", fuse_layers),
    Case("adapter.summarize+inject", "lcfx", "all layers", summarize_and_inject, checked=True),
    Case("summarize_layers", "summarize", "all layers", summarize_layers),
    Case("joint_projection", "projection", "one layer", joint_projection, checked=True),
    Case("attention_pool", "pool", "one layer", attention_pool, checked=True),
    Case("gated_injection", "injection", "one layer", gated_injection, checked=True),
)
CASE_NAMES = tuple(case.name for case in CASES)


def cases_of(group: Group, only: tuple[str, ...] = ()) -> list[Case]:
    """The cases of a group; with ``only``, those whose name (or whose group's name) is in it."""
    chosen = [case for case in CASES if case.group == group.name]
    return [case for case in chosen if not only or case.name in only or group.name in only]


def kept_layers(group: Group, receiver: CacheGeometry) -> tuple[int, ...]:
    """Receiver layers that keep a projector: all; pruned, the paper's nine of 28, of another model every third."""
    if not group.pruned:
        return tuple(range(receiver.layers))
    return BEST_NINE if receiver.layers == QWEN3.layers else tuple(range(0, receiver.layers, 3))
