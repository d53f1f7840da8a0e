"""Which frozen model it is: a digest of what decides its caches."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..fingerprint import digest_of
from .prefill import DTYPES

__all__ = ["model_fingerprint", "model_sample", "weights_sample"]

_SAMPLE = 64  # weights of each parameter


def model_fingerprint(model: Any, precision: str) -> str:
    """32 hex digits of a transformers model's configuration and of all its weights in ``precision``.

    Takes a second a gigabyte, or two.
    """
    return _digest(model, {name: parameter.detach() for name, parameter in model.named_parameters()}, precision)


def model_sample(model: Any, precision: str) -> str:
    """As `model_fingerprint`, of a sample of each parameter: at once, and enough to tell one training from another."""
    return _digest(model, _sample(model), precision)


def weights_sample(model: Any) -> str | None:
    """Of the body's weights alone, as bfloat16 holds them: the same whatever dtype the model was loaded in, with a head
    or without, and in every version of transformers. None of a model whose weights are nowhere (meta)."""
    sample = _sample(getattr(model, "base_model", model))
    if any(weight.is_meta for weight in sample.values()):
        return None
    return digest_of({}, {name: weight.to(DTYPES["bf16"]) for name, weight in sample.items()})


def _sample(model: Any) -> dict[str, Tensor]:
    sample = {}
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        sample[name] = flat[:: max(1, flat.numel() // _SAMPLE)][:_SAMPLE]
    return sample


def _digest(model: Any, weights: dict[str, Tensor], precision: str) -> str:
    passed_over = ("transformers_version", "dtype", "torch_dtype", "architectures", "use_cache")
    config = {
        name: repr(value)
        for name, value in model.config.to_dict().items()
        if not name.startswith("_") and name not in passed_over
    }
    described = {"class": type(model).__name__, "config": config}
    return digest_of(described, {name: weight.to(DTYPES[precision]) for name, weight in weights.items()})
