"""Whether a process still lives, told by a file lock: the kernel drops it when its holder ends, however it ends.

A broken stream does not prove that a writer is dead (it may be stopped, or starved), and memory that it may still write
to must not be given to another. So each writer keeps a locked file beside the arena; when nobody has a lock on it,
nobody writes any more. The lock is a shared one: the other shards of a worker take it too, each for the time of a copy,
and refuse to begin one when the writer whom they copy for has no lock any more.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from cluster.errors import WorkerLost


def lock_if_free(descriptor: int) -> bool:
    """Take the file's lock for oneself alone and say whether nobody had it."""
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
            fcntl.flock(self._descriptor, fcntl.LOCK_SH)
            # between open and lock a store that starts may have taken it for a dead one's
            if os.fstat(self._descriptor).st_nlink == 1:
                return
            os.close(self._descriptor)

    def close(self) -> None:
        if lock_if_free(self._descriptor):  # else another shard has it; the store removes the file when that has gone
            self._path.unlink(missing_ok=True)
        os.close(self._descriptor)


@contextlib.contextmanager
def joined(arena: Path, client_id: str) -> Iterator[None]:
    """Copy for a writer that is another process: inside, what it had reserved gets no new owner, even if it dies.
    Raises WorkerLost, before anything is copied, when it may have died already."""
    lost = WorkerLost(f"{client_id} does not write to this store any more; nothing is copied for it")
    try:
        descriptor = os.open(presence_path(arena, client_id), os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise lost from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:  # the store has the lock, so nobody else had: it is about to give the memory away
            raise lost from None
        if os.fstat(descriptor).st_nlink == 0:  # it has done so
            raise lost
        yield
    finally:
        os.close(descriptor)


def presence_path(arena: Path, client_id: str) -> Path:
    return arena.with_name(f"{arena.name}.{client_id}")


def present(arena: Path, client_id: str) -> bool:
    """Whether anybody still holds the writer's presence; when not, what is left of it is removed."""
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
