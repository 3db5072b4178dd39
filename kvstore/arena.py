"""The memory of a block store: one file that its owner and the processes of the same machine map.

    header │ magic, epoch, layout fingerprint, slabs, bytes per slab │ one u64 generation per slab │ padding │ slabs ...

It hands out views and keeps generations; who may use which slab is for `kvstore/slabs.py` to say. A generation changes
before a slab's bytes do, so a reader that saw the same one before and after its copy has what it asked for.

Space is committed slab by slab, at a slab's first use: shared memory is zeroed when it is committed (measured: 0.23 s a
GiB), and memory that is mapped but cannot be committed would kill the process with SIGBUS instead of raising.
"""

from __future__ import annotations

import mmap
import os
import secrets
import struct
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cluster.errors import EpochMismatch, LayoutMismatch, NoSpace, StartupError, StoreError
from kvstore.layout import Layout
from kvstore.presence import lock_if_free

MAGIC = b"tandem/1"
SHARED_MEMORY = Path("/dev/shm")
SUFFIX = ".arena"
_HEADER = struct.Struct("<8sQ8sQQ")
_ALIGN = 64  # a cache line: no slab shares one with its neighbour
_RESERVE = 16 * 2**20  # shared memory left to others; Python's own and torch's need a little


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def machine_id() -> str:
    """Equal on two processes exactly when they run under the same kernel since the same boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class Arena:
    """A mapped arena file. Use `create` in the store that owns it and `attach` everywhere else."""

    def __init__(self, path: Path, descriptor: int, *, owner: bool, writable: bool) -> None:
        self.path = path
        self._descriptor = descriptor
        self._owner = owner
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        mapped = mmap.mmap(descriptor, 0, access=access)
        magic, self.epoch, self.fingerprint, self.slabs, self.slab_bytes = _HEADER.unpack_from(mapped)
        if magic != MAGIC:
            raise StoreError(f"{path} is not an arena of this version; are all processes on the same Tandem?")
        self._stride = _aligned(self.slab_bytes, _ALIGN)
        self._first = _first_slab(self.slabs)
        self._bytes = np.frombuffer(mapped, np.uint8)
        self._generations = self._bytes[_HEADER.size : _HEADER.size + 8 * self.slabs].view(np.uint64)
        self._committed: set[int] = set()

    @classmethod
    def create(cls, store_id: str, layout: Layout, memory: int, epoch: int, folders: Iterable[Path] = ()) -> Arena:
        """A new arena of at most `memory` bytes, in the first of `folders` with that much room (default: shared memory,
        then the temp folder). Arenas whose owner is dead are removed first. Raises StartupError when it cannot be."""
        folders = tuple(folders) or (SHARED_MEMORY, Path(tempfile.gettempdir()))
        slabs = _slabs_in(memory, layout)
        size = _first_slab(slabs) + slabs * _aligned(layout.block_bytes, _ALIGN)
        for folder in folders:
            remove_stale(folder)
        folder = _roomiest(folders, size)
        path, descriptor = _open_locked(folder, store_id)
        try:
            os.ftruncate(descriptor, size)
            os.posix_fallocate(descriptor, 0, _first_slab(slabs))
            header = _HEADER.pack(MAGIC, epoch, layout.fingerprint, slabs, layout.block_bytes)
            os.pwrite(descriptor, header, 0)
        except OSError as error:
            path.unlink()
            os.close(descriptor)
            raise StartupError(f"cannot create the arena {path} ({error.strerror}); lower store_memory") from None
        return cls(path, descriptor, owner=True, writable=True)

    @classmethod
    def attach(cls, path: Path, layout: Layout, epoch: int, *, writable: bool = False) -> Arena:
        """Map another process's arena. Raises OSError, or a StoreError when the file is not the one that was meant."""
        descriptor = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        try:
            arena = cls(path, descriptor, owner=False, writable=writable)
            if arena.epoch != epoch:
                raise EpochMismatch(f"{path} belongs to another start of the store; ask for its address again")
            if arena.fingerprint != layout.fingerprint:
                raise LayoutMismatch(f"{path} holds blocks of another layout; serve one model per namespace")
        except BaseException:
            os.close(descriptor)
            raise
        return arena

    def slab(self, index: int) -> npt.NDArray[np.uint8]:
        """The bytes of one slab [layout.block_bytes]; read-only when attached so."""
        offset = self._first + index * self._stride
        return self._bytes[offset : offset + self.slab_bytes]

    def commit(self, indexes: Iterable[int]) -> None:
        """Make sure the slabs are backed by memory. Raises NoSpace when the machine has none left."""
        for index in set(indexes) - self._committed:
            try:
                os.posix_fallocate(self._descriptor, self._first + index * self._stride, self._stride)
            except OSError as error:
                raise NoSpace(f"{self.path.parent} is full ({error.strerror}); lower store_memory") from None
            self._committed.add(index)

    def generation(self, index: int) -> int:
        return int(self._generations[index])

    def set_generation(self, index: int, generation: int) -> None:
        self._generations[index] = generation

    @property
    def removed(self) -> bool:
        """Whether the file is gone, because its owner stopped or was replaced. While mapped it still takes memory."""
        return os.fstat(self._descriptor).st_nlink == 0

    def close(self) -> None:
        """Let go of the file; the owner's is removed. Views handed out stay valid until they are dropped."""
        if self._owner:
            self.path.unlink(missing_ok=True)
        os.close(self._descriptor)


def _first_slab(slabs: int) -> int:
    return _aligned(_HEADER.size + 8 * slabs, mmap.PAGESIZE)


def _slabs_in(memory: int, layout: Layout) -> int:
    stride = _aligned(layout.block_bytes, _ALIGN)
    slabs = (memory - 2 * mmap.PAGESIZE) // (stride + 8)
    if slabs < 1:
        raise StartupError(
            f"store_memory {memory} holds no block of {layout.block_bytes} bytes; raise it, best to room for the KV of "
            "several requests"
        )
    return slabs


def _roomiest(folders: tuple[Path, ...], size: int) -> Path:
    """The first folder with room. Raises StartupError with what each has."""
    free = {}
    for folder in folders:
        if folder.is_dir():
            stat = os.statvfs(folder)
            free[folder] = stat.f_bavail * stat.f_frsize
            if free[folder] >= size + _RESERVE:
                return folder
    found = ", ".join(f"{room >> 20} MiB in {folder}" for folder, room in free.items())
    raise StartupError(f"the block store needs {size >> 20} MiB and finds {found}; lower store_memory")


def _open_locked(folder: Path, store_id: str) -> tuple[Path, int]:
    """A new file that only this process has; its lock says that its owner lives."""
    while True:
        path = folder / f"tandem-{store_id}-{secrets.token_hex(8)}{SUFFIX}"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        # between open and lock another store that starts may have taken it for a dead one's
        if lock_if_free(descriptor) and os.fstat(descriptor).st_nlink == 1:
            return path, descriptor
        os.close(descriptor)


def remove_stale(folder: Path) -> None:
    """Delete what dead stores and their writers left in the folder: the files whose lock can be taken."""
    for path in folder.glob(f"tandem-*{SUFFIX}*"):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except (FileNotFoundError, PermissionError):
            continue  # gone meanwhile, or another user's
        try:
            if lock_if_free(descriptor):
                path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)
