"""Latent Cache Flow in fused kernels: one language model informs another through their KV caches.

Start at `LatentCacheFlow`; `lcf_fast.ops` has the checked functions, `lcf_fast.reference` the readable eager
ones. Names are imported when first used, so that `import lcf_fast` costs nothing: torch, the Triton kernels
and transformers come in with what needs them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import ops as ops
    from . import parallel as parallel
    from . import reference as reference
    from . import spans as spans
    from . import transport as transport
    from .adapter import LatentCacheFlow as LatentCacheFlow
    from .backends import use_backend as use_backend
    from .config import CacheGeometry as CacheGeometry
    from .config import LCFConfig as LCFConfig
    from .config import layer_map as layer_map
    from .errors import BackendError as BackendError
    from .errors import CheckpointError as CheckpointError
    from .errors import DeviceError as DeviceError
    from .errors import DTypeError as DTypeError
    from .errors import GeometryError as GeometryError
    from .errors import IndexRangeError as IndexRangeError
    from .errors import LCFError as LCFError
    from .errors import MessageError as MessageError
    from .errors import ShapeError as ShapeError
    from .errors import SpanError as SpanError
    from .growing import GrowingMessage as GrowingMessage
    from .growing import GrowingSlots as GrowingSlots
    from .growing import PartialPool as PartialPool
    from .message import Message as Message
    from .sharer import SharerSide as SharerSide
    from .slots import LatentSlots as LatentSlots
    from .slots_sharer import SlotsSharerSide as SlotsSharerSide
    from .spans import Spans as Spans

_MODULES = ("ops", "parallel", "reference", "spans", "transport")
_NAMES = {
    "LatentCacheFlow": "adapter",
    "use_backend": "backends",
    "CacheGeometry": "config",
    "LCFConfig": "config",
    "layer_map": "config",
    "BackendError": "errors",
    "CheckpointError": "errors",
    "DeviceError": "errors",
    "DTypeError": "errors",
    "GeometryError": "errors",
    "IndexRangeError": "errors",
    "LCFError": "errors",
    "MessageError": "errors",
    "ShapeError": "errors",
    "SpanError": "errors",
    "GrowingMessage": "growing",
    "GrowingSlots": "growing",
    "PartialPool": "growing",
    "Message": "message",
    "SharerSide": "sharer",
    "LatentSlots": "slots",
    "SlotsSharerSide": "slots_sharer",
    "Spans": "spans",
}

__all__ = ["__version__", *_MODULES, *_NAMES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")  # importing a submodule binds it here
    if name in _NAMES:
        value = getattr(import_module(f"{__name__}.{_NAMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
