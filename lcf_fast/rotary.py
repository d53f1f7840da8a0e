"""Keys of a model to and from their positions, by the model's own rotary embedding.

Nothing is computed here that the model computes itself: angles come from ``base_model.rotary_emb`` (so every rope type
of transformers is served), and are applied by the ``apply_rotary_pos_emb`` of the model's own module. Which of its
layers rotate, and with which of its angles (Gemma 3 has local and global ones, others have layers without any), is not
read off names: one token, read at two positions, shows it, since what a lone token gives a layer does not depend on its
position but for the rotation.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .caches import cache_argument, cache_layers
from .checks import INTEGERS, check_has_memory, reads_values
from .errors import DTypeError, GeometryError, IndexRangeError, LCFError, ShapeError

__all__ = ["Rotary"]

#: A layer whose keys are not rotated, and one whose model has a single kind of angles.
_NONE, _ONLY = "none", ""
#: Where the token is read the second time: far enough that angles of different bases part.
_PROBE = 37
#: Relative error within which a kind of rotation counts as the layer's. A wrong one is off by some 0.5 or more.
_TOLERANCE = 0.05

_known: weakref.WeakKeyDictionary[Any, Rotary] = weakref.WeakKeyDictionary()


class Rotary:
    """How each layer of a model rotates its keys. Make one with `Rotary.of`.

    Attributes:
        kinds: a name a layer.
        heads: ``(KV heads, head dim)`` a layer, of the keys that it rotates.
    """

    def __init__(
        self, embedding: Any, apply: Callable[..., Any], kinds: Sequence[str], heads: Sequence[tuple[int, int]]
    ) -> None:
        self._embedding, self._apply, self.kinds, self.heads = embedding, apply, tuple(kinds), tuple(heads)
        # Only the first channels of a key turn, and the model cuts them out itself (Phi, StableLM): found by `_turned`.
        self._in_part = False

    @classmethod
    def of(cls, model: Any) -> Rotary:
        """Of a causal LM of transformers; found once for each model, which then reads one token.

        Raises:
            GeometryError: a model without rotary positions of this form (learned positions, ALiBi, several axes), or
                one whose keys do not turn as its rotary embedding says.
        """
        if isinstance(model, cls):
            return model
        try:
            found = _known.get(model)
        except TypeError:
            found = None
        if found is None:
            found = cls._probed(model)
            _known[model] = found
        return found

    @classmethod
    def _probed(cls, model: Any) -> Rotary:
        base = getattr(model, "base_model", None)
        embedding = getattr(base, "rotary_emb", None)
        apply = getattr(sys.modules.get(type(base).__module__), "apply_rotary_pos_emb", None)
        if embedding is None or apply is None or list(inspect.signature(apply).parameters)[:4] != [*"qk", "cos", "sin"]:
            raise _unserved(model, "neither a rotary_emb nor an apply_rotary_pos_emb of that form")
        names = [_ONLY]
        if "layer_type" in inspect.signature(embedding.forward).parameters:
            names = sorted(set(model.config.layer_types))
        try:
            keys, positions = _keys_of_one_token(model)
        except LCFError:
            raise
        except (IndexError, TypeError, ValueError) as error:  # as models of other caches complain of this one
            raise _unserved(model, f"one that does not read into a DynamicCache: {error}") from error
        heads = [(key.shape[1], key.shape[3]) for key in keys]
        rotary = cls(embedding, apply, [_NONE] * len(keys), heads)
        kinds = []
        for layer, key in enumerate(keys):
            here, there = key.split(1)
            errors = {}
            for kind in (_NONE, *names):
                try:
                    turned = here if kind == _NONE else rotary._turned(here, positions[:1], positions[1:], kind)
                except KeyError:  # a type of layers that do not rotate, of which the embedding knows nothing
                    continue
                except RuntimeError as error:
                    raise _unserved(model, f"keys that its rotary embedding does not fit: {error}") from error
                errors[kind] = float((turned.float() - there.float()).norm() / there.float().norm())
            kind = min(errors, key=lambda name: errors[name])
            if not errors[kind] <= _TOLERANCE:
                raise _unserved(model, f"keys of layer {layer} that turn otherwise (off by {errors[kind]:.2g})")
            kinds.append(kind)
        rotary.kinds = tuple(kinds)
        return rotary

    def rotate(self, keys: Sequence[Tensor], positions: Tensor, *, length: int | None = None) -> list[Tensor]:
        """Keys that are at no position, ``(B, H, n, D)`` a layer of the model, to ``positions (B, n)``; new tensors.

        ``length``: of the whole that these are a part of, where it goes on behind them: "longrope" and "dynamic" take
        their frequencies from the last position of a call. None: it ends with them.

        Raises:
            DTypeError: no tensors. GeometryError: other layers, KV heads or head dim than the model's.
            ShapeError, DTypeError, DeviceError, IndexRangeError: ``length`` or ``positions`` that do not fit, are no
                ints, have no memory, or are negative (looked at where they lie on the CPU).
        """
        return self._all(keys, positions, length, inverse=False)

    def unrotate(self, keys: Sequence[Tensor], positions: Tensor) -> list[Tensor]:
        """The inverse of `rotate`: keys as a cache has them, without their positions. Arguments and errors as there."""
        return self._all(keys, positions, None, inverse=True)

    def check(self, layers: int, shape: Sequence[int], positions: Any, length: Any = None) -> None:
        """Raises what `rotate` raises for keys ``(B, H, n, D)`` of so many layers at ``positions``."""
        if length is not None and (not isinstance(length, int) or isinstance(length, bool)):
            raise DTypeError("length", expected="an int, or None", got=type(length).__name__)
        if length is not None and length < shape[2]:
            raise ShapeError("length", expected=f"{shape[2]} or more, as many as there are keys", got=str(length))
        if layers != len(self.kinds):
            raise GeometryError("keys", expected=f"{len(self.kinds)} layers, as the model's", got=str(layers))
        for own in {*self.heads} - {(shape[1], shape[3])}:
            expected = f"{own[0]} KV heads of dim {own[1]}, as the model's"
            raise GeometryError("keys", expected=expected, got=f"{shape[1]} of dim {shape[3]}")
        if not isinstance(positions, Tensor) or positions.dtype not in INTEGERS or positions.layout != torch.strided:
            got = str(getattr(positions, "dtype", type(positions).__name__))
            raise DTypeError("positions", expected="a tensor of ints", got=got)
        if positions.dim() != 2 or positions.shape[1] != shape[2] or positions.shape[0] not in (1, shape[0]):
            expected = f"({shape[0]}, {shape[2]}), or one row for all"
            raise ShapeError("positions", expected=expected, got=str(tuple(positions.shape)))
        check_has_memory("positions", positions)
        if reads_values(positions) and positions.numel() and int(positions.min()) < 0:
            raise IndexRangeError("positions", expected="0 or more", got=f"values down to {int(positions.min())}")

    def _all(self, keys: Sequence[Tensor], positions: Tensor, length: int | None, *, inverse: bool) -> list[Tensor]:
        if not isinstance(keys, Sequence) or not all(isinstance(key, Tensor) and key.dim() == 4 for key in keys):
            raise DTypeError("keys", expected="a tensor (B, H, n, D) a layer", got=type(keys).__name__)
        self.check(len(keys), keys[0].shape if keys else (0, 0, 0, 0), positions, length)
        key = keys[0]
        positions = positions.to(key.device, torch.int64)
        turned: dict[int, Tensor] = {}
        for kind in dict.fromkeys(self.kinds):
            rows = [row for row, other in enumerate(self.kinds) if other == kind]
            # Side by side, as so many heads: every head turns alike, so that one product turns all layers.
            beside = torch.cat([keys[row] for row in rows], 1)
            whole = self._applied(beside, *self._angles(key, positions, kind, inverse, length))
            turned |= zip(rows, whole.split([keys[row].shape[1] for row in rows], 1))
        return [turned[row] for row in range(len(keys))]

    def _turned(self, key: Tensor, before: Tensor, after: Tensor, kind: str) -> Tensor:
        """A rotated key from one position to another; for `_probed`."""
        try:
            bare = self._applied(key, *self._angles(key, before, kind, True))
        except RuntimeError:  # sizes
            if self._in_part:
                raise
            self._in_part = True
            return self._turned(key, before, after, kind)
        return self._applied(bare, *self._angles(key, after, kind, False))

    def _angles(
        self, key: Tensor, positions: Tensor, kind: str, inverse: bool, length: int | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        if kind == _NONE:
            return None, None
        if length is not None:  # shown to the embedding as a position more
            positions = torch.nn.functional.pad(positions, (0, 1), value=length - 1)
        with torch.no_grad():
            options = () if kind == _ONLY else (kind,)
            cos, sin = self._embedding(key, positions, *options)
        if length is not None:
            cos, sin = cos[:, :-1], sin[:, :-1]
        if not inverse:
            return cos, sin
        # Some rope types scale cosine and sine, and so the key; its length is set back as well.
        square = cos.float().square() + sin.float().square()
        return (cos / square).to(cos.dtype), (-sin / square).to(sin.dtype)

    def _applied(self, key: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        if cos is None:
            return key
        width = cos.shape[-1] if self._in_part else key.shape[-1]
        turned: Tensor = self._apply(key[:, :1, :, :width], key[..., :width], cos, sin)[1]
        return torch.cat([turned, key[..., width:]], -1) if self._in_part else turned


def _unserved(model: Any, got: str) -> GeometryError:
    expected = "a causal LM of transformers whose keys are rotated by its base model's rotary_emb"
    return GeometryError("receiver", expected=expected, got=f"{type(model).__name__}: {got}")


@torch.no_grad()
def _keys_of_one_token(model: Any) -> tuple[list[Tensor], Tensor]:
    """Each layer's keys ``(2, H, 1, D)`` of one token, read alone at two positions ``(2, 1)``."""
    from transformers import DynamicCache

    limit = getattr(model.config, "max_position_embeddings", None) or _PROBE + 1
    positions = torch.tensor([[0], [max(1, min(_PROBE, limit - 1))]], device=model.device)
    # Not the padding: its embedding may be zero, and zeros show no rotation.
    token = next(i for i in (1, 2) if i != getattr(model.config, "pad_token_id", None))
    cache, modes = DynamicCache(), [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        model.base_model(
            input_ids=torch.full_like(positions, token),
            attention_mask=torch.ones_like(positions),
            position_ids=positions,
            use_cache=True,
            **cache_argument(model.base_model, cache),
        )
    finally:
        for module, training in modes:  # a part may have another mode than the whole
            module.training = training
    return [key for key, _ in cache_layers(cache, name="receiver")], positions
