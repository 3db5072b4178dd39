"""Whether a process still lives, told by a file lock: the kernel drops it when its holder ends, however it ends.

A broken stream does not prove that a writer is dead (it may be stopped, or starved), and memory that it may still write
to must not be given to another. So each writer keeps a locked file beside the arena; when its lock can be taken, nobody
writes any more.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


def lock_if_free(descriptor: int) -> bool:
    """Take the file's lock and say whether nobody had it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class Presence:
    """One writer's locked file. Close it only when the last copy has ended."""

    def __init__(self, arena: Path, client_id: str) -> None:
        self._path = presence_path(arena, client_id)
        while True:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            # between open and lock a store that starts may have taken it for a dead one's
            if os.fstat(self._descriptor).st_nlink == 1:
                return
            os.close(self._descriptor)

    def close(self) -> None:
        self._path.unlink(missing_ok=True)
        os.close(self._descriptor)


def presence_path(arena: Path, client_id: str) -> Path:
    return arena.with_name(f"{arena.name}.{client_id}")


def present(arena: Path, client_id: str) -> bool:
    """Whether the writer still holds its presence; when not, what it left of it is removed."""
    path = presence_path(arena, client_id)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        if not lock_if_free(descriptor):
            return True
        path.unlink(missing_ok=True)
        return False
    finally:
        os.close(descriptor)
