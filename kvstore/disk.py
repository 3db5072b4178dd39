"""The disk tier of one store: a bounded folder of block files that outlives the process.

    <folder>/<namespace>-<layout fingerprint>/lock             says that a store uses it
                                             /writing/<hash>   not whole yet; emptied at start
                                             /ab/<hash>        a block (`kvstore/block_file.py`), by its first byte

Which blocks there are is known from their names; whether a file is what its name says is checked when it is read.
Files are read and written in threads, everything else happens on the event loop. A disk that fails costs blocks and
never the store: what cannot be read is a miss and removed, and after a failed write none is tried for a while.

Removing a file needs no care for its readers: whoever has it open keeps its bytes, and who comes too late misses it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from cluster.errors import Corrupt, StartupError
from kvstore.block_file import Header, file_bytes, named, read, read_header, write
from kvstore.copying import Block, in_thread
from kvstore.eviction import EvictionOrder
from kvstore.hashing import HASH_BYTES
from kvstore.layout import Layout
from kvstore.presence import lock_if_free

THREADS = 4  # of its own: a disk that hangs must not take the threads that handoffs need
PAUSE_S = 10.0  # without writing after a write failed
_NAME = re.compile(f"[0-9a-f]{{{2 * HASH_BYTES}}}")
log = logging.getLogger(__name__)


class DiskTier:
    """Make one, then `open` before anything else. At most `memory` bytes of files."""

    def __init__(self, folder: Path, namespace: str, layout: Layout, memory: int) -> None:
        self.path = folder / f"{namespace}-{layout.fingerprint.hex()}"
        self.block_bytes = file_bytes(layout)
        self.capacity = memory // self.block_bytes  # blocks
        self.limit_bytes = memory
        self.writes = self.reads = 0
        self.errors = 0  # failed or skipped writes, unreadable or corrupt files
        self.corrupt = 0  # of these, files whose content was wrong
        self._layout = layout
        self._order = EvictionOrder()  # hashes of the blocks that have a file
        self._pool = ThreadPoolExecutor(THREADS, "disk")
        self._lock: int | None = None
        self._paused_until = 0.0  # on the monotonic clock
        self._failing = False  # the last write failed
        self._changed: list[bytes] = []  # hashes that came or went

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, name: bytes) -> bool:
        return name in self._order

    def names(self) -> list[bytes]:
        return list(self._order)

    @property
    def writable(self) -> bool:
        return time.monotonic() >= self._paused_until

    async def open(self) -> None:
        """Take the folder, and find what an earlier start left in it. Raises StartupError."""
        if not self.capacity:
            raise StartupError(f"disk_memory {self.limit_bytes} holds no block of {self.block_bytes} bytes; raise it")
        files = await in_thread(self._take_folder, self._pool)
        for _, name in sorted(files):
            self._order.add(name, pinned=False)
        await self.remove(self._excess(self.capacity))
        self._changed.clear()  # nobody has heard of them

    def close(self) -> None:
        """Let another store have the folder."""
        self._pool.shutdown(wait=False)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def touch(self, names: Sequence[bytes]) -> None:
        """These were used just now, the last one last."""
        for name in names:
            if name in self._order:
                self._order.touch(name)

    def pin(self, name: bytes, pinned: bool) -> None:
        if name in self._order:
            self._order.add(name, pinned)

    def take_changed(self) -> list[bytes]:
        """Blocks that came or went since the last time."""
        changed, self._changed = self._changed, []
        return changed

    async def write(self, header: Header, block: Block, pinned: bool) -> bool:
        """Make room and write one block, whose bytes nobody changes meanwhile. False: it is not on the disk."""
        name = header.key.hash
        if not self.writable:
            self.errors += 1
            return False
        excess = self._excess(self.capacity - 1)

        def work() -> None:
            self._unlink(excess)
            path = self._file(name)
            path.parent.mkdir(exist_ok=True)
            write(path, self.path / "writing" / name.hex(), header, block, self._layout)

        try:
            await in_thread(work, self._pool)
        except OSError as error:
            self._failed(error)
            return False
        if self._failing:
            log.info("the disk tier at %s can be written again", self.path)
        self._failing = False
        self.writes += 1
        self._order.add(name, pinned)
        self._changed.append(name)
        return True

    async def read(self, blocks: Sequence[tuple[bytes, Block]], used_ns: int) -> list[Header | None]:
        """Read each named block into the memory that comes with it. None: it was not there, or not right, and is gone.

        `used_ns`: when it was used, for the order after a restart; each block counts as older than the one before it,
        so that a chain goes tail first."""

        def one(position: int) -> Header:
            name, block = blocks[position]
            header = read(self._file(name), name, block, self._layout)
            with contextlib.suppress(OSError):  # only an order depends on it
                os.utime(self._file(name), ns=(used_ns - position, used_ns - position))
            return header

        found = [_header(result) for result in await self._judge([name for name, _ in blocks], one)]
        self.reads += sum(header is not None for header in found)
        return found

    async def headers(self, names: Sequence[bytes]) -> list[Header | None]:
        """What the blocks say about themselves. None: it was not there, or not right, and is gone."""
        found = await self._judge(names, lambda i: read_header(self._file(names[i]), names[i], self._layout))
        return [_header(result) for result in found]

    async def check(self, names: Sequence[bytes]) -> set[bytes]:
        """Read these blocks, as far as they are here, and return those that were not right; they are gone."""
        names = [name for name in names if name in self]
        scratch = np.empty(self._layout.block_bytes, np.uint8)

        def one(position: int) -> Header:
            name = names[position]
            header = read(self._file(name), name, scratch, self._layout)
            if not named(header.key):
                raise Corrupt(
                    f"the file of block {name.hex()[:16]} holds other tokens than its name says; it is removed"
                )
            return header

        found = await self._judge(names, one)
        return {name for name, result in zip(names, found, strict=True) if _bad(result)}

    async def remove(self, names: Sequence[bytes]) -> None:
        """Forget these blocks and delete their files."""
        self._forget(names)
        if names:
            await in_thread(lambda: self._unlink(names), self._pool)

    async def _judge(self, names: Sequence[bytes], read_one: Callable[[int], Header]) -> list[Header | Exception]:
        """Read each block by its position in `names`; count and remove what is not right."""

        def work() -> list[Header | Exception]:
            found: list[Header | Exception] = []
            for position in range(len(names)):
                try:
                    found.append(read_one(position))
                except (OSError, Corrupt) as error:
                    found.append(error)
            return found

        found = await in_thread(work, self._pool)
        for error in filter(_bad, found):
            log.warning("%s", error)
            self.errors += 1
            self.corrupt += isinstance(error, Corrupt)
        await self.remove([name for name, result in zip(names, found, strict=True) if isinstance(result, Exception)])
        return found

    def _failed(self, error: OSError) -> None:
        self.errors += 1
        self._paused_until = time.monotonic() + PAUSE_S
        if not self._failing:
            log.warning("the disk tier at %s cannot be written (%s); make room there", self.path, error.strerror)
        self._failing = True

    def _excess(self, capacity: int) -> list[bytes]:
        """What has to go so that so many blocks are left; forgotten already."""
        excess = []
        while len(self._order) > capacity:
            excess.append(self._order.first())
            self._forget(excess[-1:])
        return excess

    def _forget(self, names: Sequence[bytes]) -> None:
        for name in names:
            if name in self._order:
                self._order.discard(name)
                self._changed.append(name)

    def _file(self, name: bytes) -> Path:
        return self.path / f"{name[0]:02x}" / name.hex()

    def _unlink(self, names: Sequence[bytes]) -> None:
        for name in names:
            try:
                self._file(name).unlink(missing_ok=True)
            except OSError as error:  # it is found again after a restart, and checked like all others
                log.warning("%s cannot be removed: %s", self._file(name), error.strerror)

    def _take_folder(self) -> list[tuple[int, bytes]]:
        """Lock the folder, clear up, and list (time of last use, hash) of its blocks."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)  # what users wrote is nobody else's to read
            (self.path / "writing").mkdir(exist_ok=True)
            self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            if not lock_if_free(self._lock):
                raise StartupError(f"another block store uses {self.path}; give each a disk folder of its own")
            for left in (self.path / "writing").iterdir():
                left.unlink()
            return [found for folder in self.path.glob("[0-9a-f][0-9a-f]") for found in self._scan(folder)]
        except OSError as error:
            raise StartupError(
                f"the disk tier cannot use {self.path} ({error.strerror}); choose another disk"
            ) from None

    def _scan(self, folder: Path) -> Iterator[tuple[int, bytes]]:
        with os.scandir(folder) as files:
            for file in files:
                if not _NAME.fullmatch(file.name) or not file.name.startswith(folder.name):
                    continue  # not ours: left alone
                status = file.stat()
                if status.st_size == self.block_bytes:
                    yield status.st_mtime_ns, bytes.fromhex(file.name)
                else:
                    self.errors += 1
                    self.corrupt += 1
                    log.warning("%s has %d bytes instead of %d; removed", file.path, status.st_size, self.block_bytes)
                    Path(file.path).unlink(missing_ok=True)


def _header(result: Header | Exception) -> Header | None:
    return result if isinstance(result, Header) else None


def _bad(result: Header | Exception) -> bool:
    """A file that is not there has been evicted, which is no error."""
    return isinstance(result, Exception) and not isinstance(result, FileNotFoundError)
