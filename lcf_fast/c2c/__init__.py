"""Cache-to-Cache (Fu et al., arXiv 2510.03215): the baseline, in the released checkpoints' layout."""

from .config import C2CConfig
from .faithful import FaithfulFuser, faithful_fuse
from .fuser import C2CFuser
from .projector import C2CProjector

__all__ = ["C2CConfig", "C2CFuser", "C2CProjector", "FaithfulFuser", "faithful_fuse"]
