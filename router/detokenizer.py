"""Tokens to text, as they come: never half a character, never text that may turn out to be a stop string.

    tokens   ... [prefix ...... read) [read ....... end)     the text of prefix..read is out; it is decoded again as
                  context              waiting for a whole   context, because a token's text depends on its neighbours
                                       character
    text     ... emitted | held: may be the beginning of a stop string

Joined, the pieces equal one decode of all tokens, cut at the first stop string. Nothing is looked up or sent here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

INCOMPLETE = "\ufffd"  # what decoders write for bytes that are not (yet) a character
MAX_PENDING = 64  # tokens; no character is that long, so such bytes will never become one


class Detokenizer:
    """The text of one choice."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str], min_tokens: int) -> None:
        self._decode = decode
        self._stops = tuple(stops)
        self._min_tokens = min_tokens  # stop strings are not looked for in the text of the first so many tokens
        self._window: list[int] = []  # tokens [prefix, end)
        self._read = 0  # position within the window of the first token whose text is not out
        self._prefix_text = ""  # decode(window[:read])
        self._held = ""
        self.tokens = 0  # consumed, those after a stop string not included
        self.stopped = False  # a stop string was found; there is no more text

    def feed(self, tokens: Sequence[int]) -> str:
        """Consume new tokens and return the text that is certain now."""
        emitted = ""
        for token in tokens:
            if self.stopped:
                break
            self.tokens += 1
            self._window.append(token)
            emitted += self._search(self._complete())
        return emitted

    def flush(self) -> str:
        """The text still waiting; no more tokens will come."""
        if self.stopped:
            return ""
        rest = self._decode(self._window)[len(self._prefix_text) :]
        self._window, self._read, self._prefix_text = [], 0, ""
        emitted = self._search(rest)
        if not self.stopped:
            emitted, self._held = emitted + self._held, ""
        return emitted

    def _complete(self) -> str:
        """New text if it ends with a whole character, else nothing yet."""
        new = self._decode(self._window)[len(self._prefix_text) :]
        if len(self._window) - self._read < MAX_PENDING and (not new or new.endswith(INCOMPLETE)):
            return ""
        if not new:  # a long run of special tokens: forget those, keep the context before them
            del self._window[self._read :]
            return ""
        del self._window[: self._read]
        self._read = len(self._window)
        self._prefix_text = self._decode(self._window)
        return new

    def _search(self, new: str) -> str:
        """Append to the held text, cut at a stop string, and release what cannot belong to one."""
        if not new:
            return ""
        if not self._stops or self.tokens <= self._min_tokens:
            released, self._held = self._held + new, ""
            return released
        text = self._held + new
        found = min((at for stop in self._stops if (at := text.find(stop)) >= 0), default=-1)
        if found >= 0:
            self.stopped, self._held = True, ""
            return text[:found]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of `stop` that `text` ends with."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
