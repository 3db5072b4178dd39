"""Which stores to leave alone for a while, from what was seen of them. Knows no sockets and no clock.

A store that cannot be reached costs every reader its deadline, so the next ones are spared for a second. One whose
bytes were wrong several times within a minute probably has bad memory or a bad link: a minute without it.
"""

from __future__ import annotations

UNREACHABLE_S = 1.0
CORRUPT_LIMIT = 3  # blocks, within ...
CORRUPT_S = 60.0


class Reputation:
    """Callers pass `now`, seconds of one monotonic clock."""

    def __init__(self) -> None:
        self.corrupt_blocks = 0  # seen in this process's life
        self._until: dict[str, float] = {}  # store address -> when it may be used again
        self._corrupt: dict[str, list[float]] = {}  # store address -> when it sent bad blocks, the last minute's

    def avoided(self, store: str, now: float) -> bool:
        return now < self._until.get(store, now)

    def failed(self, store: str, now: float) -> None:
        """It could not be reached, or did not send a block in time."""
        self._avoid(store, now, UNREACHABLE_S)

    def corrupt(self, store: str, now: float) -> None:
        """It sent a block whose bytes do not match its checksums."""
        self.corrupt_blocks += 1
        recent = [then for then in self._corrupt.pop(store, ()) if now - then < CORRUPT_S] + [now]
        if len(recent) < CORRUPT_LIMIT:
            self._corrupt[store] = recent
        else:
            self._avoid(store, now, CORRUPT_S)

    def _avoid(self, store: str, now: float, seconds: float) -> None:
        # what is over is dropped here: an index that lies may name any number of addresses
        self._until = {name: until for name, until in self._until.items() if until > now}
        self._until[store] = max(now + seconds, self._until.get(store, 0.0))
