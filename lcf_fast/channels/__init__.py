"""Ways in which one model can help another to answer, behind one interface: nothing, text, whole contexts, caches."""

from .agent import Agent
from .base import Channel
from .lcf import LCFChannel, LCFXChannel, Sharer
from .plain import FullContextChannel, NoneChannel
from .request import Answer, Request, Timings
from .text import TextChannel

__all__ = [
    "Agent",
    "Answer",
    "Channel",
    "FullContextChannel",
    "LCFChannel",
    "LCFXChannel",
    "NoneChannel",
    "Request",
    "Sharer",
    "TextChannel",
    "Timings",
]
