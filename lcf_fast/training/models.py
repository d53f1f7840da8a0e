"""The two models of a run, by folder or hub id, through transformers."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from ..config import CacheGeometry
from ..errors import BackendError, LCFError
from ..reading.prefill import DTYPES
from .failures import RunError

__all__ = ["hide_loading", "load_config", "load_geometry", "load_model", "load_tokenizer", "longest_sequence"]


def load_model(role: str, name: str, precision: str, *, downloads: bool = True) -> Any:
    """A causal LM in eval mode, on the CPU, in "bf16" or "fp32".

    Args:
        role: "sharer" or "receiver", for errors.
        name: a folder, or a hub's id.
        downloads: whether what is not on this machine may be fetched from the hub.

    Raises:
        RunError: it cannot be loaded. BackendError: transformers is not installed.
    """
    options = {"dtype": DTYPES[precision], "local_files_only": not downloads}
    return _loaded(role, name, "AutoModelForCausalLM", **options).eval()


def load_tokenizer(role: str, name: str) -> Any:
    """A model's tokenizer. Arguments and errors: as `load_model`."""
    return _loaded(role, name, "AutoTokenizer")


def load_config(role: str, name: str) -> Any:
    """A model's configuration alone. Arguments and errors: as `load_model`."""
    return _loaded(role, name, "AutoConfig")


def load_geometry(role: str, name: str) -> CacheGeometry:
    """A model's geometry, without its weights. Arguments and errors: as `load_model`."""
    config = load_config(role, name)
    try:
        return CacheGeometry.of(config)
    except LCFError as error:
        raise type(error)(f"{role} {name}: {error.argument}", expected=error.expected, got=error.got) from error


def longest_sequence(models: Mapping[str, str], default: int, given: int | None) -> int:
    """``--max-tokens``: what is given, else the default, or what the models have positions for, if that is less.

    Args:
        models: names by role.

    Raises:
        RunError: more was given than a model has positions for. Else as `load_config`.
    """
    for role, name in models.items():
        limit = getattr(load_config(role, name).get_text_config(), "max_position_embeddings", None)
        if not isinstance(limit, int) or limit < 1:
            continue
        if given is not None and given > limit:
            expected = f"{limit} at most, the max_position_embeddings of the {role} {name}"
            raise RunError("--max-tokens", expected=expected, got=str(given))
        default = min(default, limit)
    return default if given is None else given


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
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        expected = "the folder or hub id of a causal language model with its tokenizer"
        raise RunError(f"{role} {name}", expected=expected, got=first[:300]) from error
