"""A block as a file: a header that says everything about it, then its bytes as they lie in an arena.

    magic │ CRC of the rest of the header │ layout │ hash │ parent │ tokens │ ids │ tenant │ checksums │ 0... │ bytes

The header has one length per layout, a multiple of 4 KiB, so one system call reads both parts, the bytes straight into
a slab. A file gets its name only when it is whole and on the disk; what is read is believed only when the header names
the block that was asked for and every checksum matches. Which files there are is for `kvstore/disk.py` to know.
"""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import Corrupt
from cluster.store_messages import BlockKey
from kvstore.copying import Block, checksums
from kvstore.hashing import HASH_BYTES, named_rightly
from kvstore.layout import Layout

MAGIC = b"tandemb1"
TENANT_BYTES = 64  # longest tenant, in UTF-8
_ALIGN = 4096  # a file system's block
_START = struct.Struct("<8sI")  # magic, CRC-32 of what follows in the header
_FIXED = struct.Struct(f"<8s{HASH_BYTES}sB{HASH_BYTES}sIIB{TENANT_BYTES}s")


@dataclass(frozen=True, slots=True)
class Header:
    key: BlockKey
    tenant: str
    checksums: bytes  # u32le CRC-32 per (head, layer) cell, head-major


def header_bytes(layout: Layout) -> int:
    needed = _START.size + _FIXED.size + 4 * layout.tokens + 4 * layout.cells
    return -(-needed // _ALIGN) * _ALIGN


def file_bytes(layout: Layout) -> int:
    return header_bytes(layout) + layout.block_bytes


def pack(header: Header, layout: Layout) -> bytes:
    """[header_bytes(layout)]. The tenant has at most TENANT_BYTES."""
    key, tenant = header.key, header.tenant.encode()
    fixed = _FIXED.pack(
        layout.fingerprint, key.hash, len(key.parent), key.parent, key.tokens, len(key.ids), len(tenant), tenant
    )
    body = fixed + key.ids.ljust(4 * layout.tokens, b"\0") + header.checksums
    body = body.ljust(header_bytes(layout) - _START.size, b"\0")
    return _START.pack(MAGIC, zlib.crc32(body)) + body


def unpack(data: bytes, name: bytes, layout: Layout) -> Header:
    """The header of the file that should hold the block `name`. Raises Corrupt."""
    magic, crc = _START.unpack_from(data)
    body = memoryview(data)[_START.size :]
    if magic != MAGIC or zlib.crc32(body) != crc:
        raise Corrupt(f"the file of block {name.hex()[:16]} has no header of this version; it is removed")
    fingerprint, found, parent_size, parent, tokens, ids_size, tenant_size, tenant = _FIXED.unpack_from(body)
    if found != name or fingerprint != layout.fingerprint:
        raise Corrupt(f"the file of block {name.hex()[:16]} holds another block or layout; it is removed")
    start = _FIXED.size
    ids = bytes(body[start : start + ids_size])
    cells = bytes(body[start + 4 * layout.tokens :][: 4 * layout.cells])
    return Header(BlockKey(found, tokens, parent[:parent_size], ids), tenant[:tenant_size].decode(), cells)


def write(path: Path, temporary: Path, header: Header, block: Block, layout: Layout) -> None:
    """Put the block on the disk, whole or not at all. Raises OSError."""
    try:
        with temporary.open("wb") as file:
            file.write(pack(header, layout))
            file.write(block.data)
            file.flush()
            os.fdatasync(file.fileno())  # a full disk may say so only now
        temporary.rename(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def read(path: Path, name: bytes, block: Block, layout: Layout) -> Header:
    """Read the bytes into `block` [layout.block_bytes], which holds anything when this raises. Corrupt, OSError."""
    head = bytearray(header_bytes(layout))
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.preadv(descriptor, [head, block.data], 0)
    finally:
        os.close(descriptor)
    if size != file_bytes(layout):
        raise Corrupt(f"the file of block {name.hex()[:16]} is cut short; it is removed")
    header = unpack(bytes(head), name, layout)
    if checksums(block, layout) != header.checksums:
        raise Corrupt(f"the file of block {name.hex()[:16]} does not match its checksums; it is removed")
    return header


def read_header(path: Path, name: bytes, layout: Layout) -> Header:
    """Raises Corrupt, OSError."""
    with path.open("rb") as file:
        head = file.read(header_bytes(layout))
    if len(head) != header_bytes(layout):
        raise Corrupt(f"the file of block {name.hex()[:16]} is cut short; it is removed")
    return unpack(head, name, layout)


def named(key: BlockKey) -> bool:
    """Whether a block's name is that of its tokens; a writer that gave no ids left nothing to check it by."""
    return not key.ids or named_rightly(key)
