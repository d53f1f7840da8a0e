"""Ways in which one model can help another to answer, behind one interface: nothing, text, whole contexts, caches."""

from .agent import Agent
from .base import Channel
from .kvcomm import KVCommChannel
from .kvcomm_selection import LayerSelection
from .lcf import LCFChannel, LCFXChannel, Sharer
from .plain import FullContextChannel, NoneChannel
from .request import Answer, Request, Timings
from .slots import SlotsChannel
from .text import TextChannel

__all__ = [
    "Agent",
    "Answer",
    "Channel",
    "FullContextChannel",
    "KVCommChannel",
    "LCFChannel",
    "LCFXChannel",
    "LayerSelection",
    "NoneChannel",
    "Request",
    "Sharer",
    "SlotsChannel",
    "TextChannel",
    "Timings",
]
