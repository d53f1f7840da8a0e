"""The random numbers of training: dropout and the Gumbel-sigmoid gates, the same on every back end (spec, section 2).

Each number is a function of a seed and of where it is used (layer, item, position, channel), by the counter-based
generator Philox 4x32-10 (Salmon et al. 2011). So the backward pass draws again what the forward pass drew, and nothing
of it is stored; a padded or pruned batch changes no row's numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import DTypeError, GeometryError

__all__ = ["BLOCK_STREAM", "TrainingNoise", "draw_seed", "random_bits"]

#: Streams of one layer and position: the key's gate, the value's, and from here on a block's dropout.
BLOCK_STREAM = 2
_MASK = 0xFFFFFFFF


def draw_seed() -> int:
    """A seed from torch's default CPU generator.

    A compiled graph draws one each time it runs; Inductor draws in its own way, so that the numbers are others.
    """
    seed = int(torch.randint(1 << 31, (), dtype=torch.int64, device="cpu"))
    if torch.compiler.is_compiling():  # a number that the host does not have, within the bounds of `TrainingNoise`
        torch._check(seed >= 0)
        torch._check(seed < 1 << 31)
    return seed


@dataclass(frozen=True)
class TrainingNoise:
    """What makes a pass a training pass: soft, noisy gates, and dropout on what each block adds.

    Training gate (as C2C): ``sigmoid((logit + G) / temperature)``, ``G`` standard Gumbel, by item, head and token.

    Args:
        seed: in ``[0, 2**31)``.
        temperature: of the gates, above 0.
        dropout: probability that a channel of a block's output is dropped, in ``[0, 1)``; the others are scaled up.

    Raises:
        DTypeError, GeometryError: naming the field.
    """

    seed: int
    temperature: float = 1.0
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise DTypeError("seed", expected="an int", got=type(self.seed).__name__)
        if not 0 <= self.seed < 1 << 31:
            raise GeometryError("seed", expected="an int in [0, 2**31)", got=str(self.seed))
        for name in ("temperature", "dropout"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (float, int)):
                raise DTypeError(name, expected="a number", got=type(value).__name__)
        if not 0 < self.temperature < math.inf:  # of a compiled graph it may be symbolic
            raise GeometryError("temperature", expected="a finite number above 0", got=str(self.temperature))
        if not 0 <= self.dropout < 1:
            raise GeometryError("dropout", expected="a probability in [0, 1)", got=str(self.dropout))

    @property
    def threshold(self) -> int:
        """A channel is kept where its 31 bits are at least this."""
        return min(round(self.dropout * (1 << 31)), (1 << 31) - 1)  # of a probability below 1 some are kept

    @property
    def keep_scale(self) -> float:
        """What makes up for what was dropped."""
        return 1.0 / (1.0 - self.threshold / (1 << 31))

    @property
    def arguments(self) -> tuple[int, int, float, float]:
        """What a kernel is given: seed, threshold, keep scale, 1 / temperature."""
        return self.seed, self.threshold, self.keep_scale, 1.0 / self.temperature

    def keep(self, layer: int, block: int, shape: tuple[int, int, int], device: torch.device) -> Tensor:
        """Which channels of a block's output are kept: ``(B, N, d)`` bool."""
        return random_bits(self.seed, layer, BLOCK_STREAM + block, shape, device) >> 1 >= self.threshold

    def gate(self, layer: int, side: int, logit: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """The soft gate of a layer's key (side 0) or value (1): ``(B, N, H)`` in the logit's dtype."""
        bits = random_bits(self.seed, layer, side, shape, logit.device)
        uniform = ((bits >> 9).to(logit.dtype) + 0.5) * 2.0**-23
        return ((logit - (-uniform.log()).log()) / self.temperature).sigmoid()


def random_bits(seed: int, layer: int, stream: int, shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """32 random bits for each of ``(items, tokens, channels)``, as int64."""
    items, tokens, channels = (torch.arange(size, device=device, dtype=torch.int64) for size in shape)
    c0 = channels.expand(shape)
    c1 = tokens[:, None].expand(shape)
    c2 = items[:, None, None].expand(shape)
    c3 = torch.full_like(c0, layer | stream << 16)
    k0, k1 = seed & _MASK, 0
    for _ in range(10):
        high_a, low_a = _multiply(0xD2511F53, c0)
        high_b, low_b = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the product of two 32-bit numbers, without a 64-bit overflow."""
    high, low = a * (b >> 16), a * (b & 0xFFFF)
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)
