"""The two models of a run, by folder or hub id, through transformers."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from ..config import CacheGeometry
from ..errors import BackendError, LCFError
from ..reading.prefill import DTYPES
from .failures import RunError

__all__ = [
    "check_transformers",
    "geometry_of",
    "hide_loading",
    "load_config",
    "load_model",
    "load_tokenizer",
    "longest_sequence",
]

_WANTED = "the folder or hub id of a causal language model with its tokenizer"
#: How classes of causal language models are called, of text alone and of text beside other things.
_CAUSAL = ("forcausallm", "lmheadmodel", "forconditionalgeneration")


def load_model(role: str, name: str, precision: str, *, downloads: bool = True) -> Any:
    """A causal LM in eval mode, on the CPU, in "bf16" or "fp32".

    Args:
        role: "sharer" or "receiver", for errors.
        name: a folder, or a hub's id.
        downloads: whether what is not on this machine may be fetched from the hub.

    Raises:
        RunError: it cannot be loaded, is no causal LM, or lacks weights. BackendError: transformers is not installed.
    """
    config = load_config(role, name, downloads=downloads)
    options = {"config": config, "dtype": DTYPES[precision], "local_files_only": not downloads}
    model, found = _loaded(role, name, "AutoModelForCausalLM", output_loading_info=True, **options)
    if missing := sorted(found["missing_keys"]):  # transformers draws these at random, and warns
        got = f"none of {', '.join(missing[:3])}" + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise RunError(f"{role} {name}", expected="weights of all that its config.json describes", got=got)
    return model.eval()


def load_tokenizer(role: str, name: str) -> Any:
    """A model's tokenizer. Arguments and errors: as `load_model`."""
    return _loaded(role, name, "AutoTokenizer")


def load_config(role: str, name: str, *, downloads: bool = True) -> Any:
    """A causal LM's configuration alone. Arguments and errors: as `load_model`."""
    config = _loaded(role, name, "AutoConfig", local_files_only=not downloads)
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    # Transformers loads BERT's weights and the half of an encoder-decoder model as causal LMs, too.
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    named = getattr(config, "architectures", None) or ([] if kind is None else [kind.__name__])
    fits = any(each == getattr(kind, "__name__", None) or each.lower().endswith(_CAUSAL) for each in named)
    if kind is None or not fits or getattr(config, "is_encoder_decoder", False):
        got = ", ".join(named) or f"a configuration of {config.model_type!r}"
        raise RunError(f"{role} {name}", expected=_WANTED, got=f"{got}, which is none")
    return config


def geometry_of(role: str, config: Any) -> CacheGeometry:
    """A model's geometry, off the configuration that `load_config` read.

    Raises:
        GeometryError: one without a uniform key-value cache, as `CacheGeometry.of` says.
    """
    try:
        return CacheGeometry.of(config)
    except LCFError as error:
        where = f"{role} {config.name_or_path}: {error.argument}"
        raise type(error)(where, expected=error.expected, got=error.got) from error


def longest_sequence(configs: Mapping[str, Any], default: int, given: int | None) -> int:
    """``--max-tokens``: what is given, else the default, or what the models have positions for, if that is less.

    Args:
        configs: of the models by role, as `load_config` read them.

    Raises:
        RunError: more was given than a model has positions for.
    """
    for role, config in configs.items():
        limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
        if not isinstance(limit, int) or limit < 1:
            continue
        if given is not None and given > limit:
            expected = f"{limit} at most, the max_position_embeddings of the {role} {config.name_or_path}"
            raise RunError("--max-tokens", expected=expected, got=str(given))
        default = min(default, limit)
    return default if given is None else given


def check_transformers(argument: str) -> None:
    """Before the first model is made, where all of them are.

    Raises:
        BackendError: transformers is not installed.
    """
    if find_spec("transformers") is None:
        expected = "transformers, which pip install 'lcf-fast[hf]' brings"
        raise BackendError(argument, expected=expected, got="an environment without it")


def hide_loading() -> None:
    """No progress bars of transformers in this process."""
    with contextlib.suppress(ImportError):
        from transformers.utils import logging

        logging.disable_progress_bar()


def _loaded(role: str, name: str, kind: str, **options: Any) -> Any:
    try:
        import transformers
    except ImportError:
        expected = "the transformers library, which pip install 'lcf-fast[train]' brings"
        raise BackendError(role, expected=expected, got="an environment without it") from None
    try:
        return getattr(transformers, kind).from_pretrained(name, **options)
    except Exception as error:  # of any kind: damaged weights, a field of another type, a library that is not there
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunError(f"{role} {name}", expected=_WANTED, got=first[:300]) from error
