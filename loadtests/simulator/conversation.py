"""The block ids of one conversation: each turn's prompt begins with what was said before, so its ids do too.

The only place that knows which blocks a growing prompt shares with the turn before. Ids are whole numbers that somebody
else counts; nothing is hashed here.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

Ids = tuple[int, ...]


class Conversation:
    def __init__(self, fresh: Iterator[int], block_size: int, begins: Ids = ()) -> None:
        """`begins` are full blocks that it has in common with others: a system prompt's."""
        self._fresh = fresh
        self._block_size = block_size
        self._chain = begins  # full blocks of all that has been said

    def turn(self, prompt: int, output: int, shared: int | None = None) -> tuple[Ids, Ids]:
        """(blocks of the prompt, blocks that the output fills besides) of the next turn, lengths in tokens.

        `shared` tokens of the prompt are as they were said before; None: all of them that can be.
        """
        said = len(self._chain) * self._block_size
        known = self._chain[: min(prompt, said if shared is None else shared) // self._block_size]
        full, filled = prompt // self._block_size, (prompt + output) // self._block_size
        self._chain = known + tuple(islice(self._fresh, filled - len(known)))
        # the prompt's last block, while it is partial, is another than the one it becomes part of
        partial = tuple(islice(self._fresh, 1)) if prompt % self._block_size else ()
        return self._chain[:full] + partial, self._chain[full:]
