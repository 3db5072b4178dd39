"""Both ends of a handoff, under one name for those who use them; each lives in a file of its own."""

from kvstore.reader import HandoffReader, Received
from kvstore.writer import HandoffWriter

__all__ = ["HandoffReader", "HandoffWriter", "Received"]
