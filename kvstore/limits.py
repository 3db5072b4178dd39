"""What a request to a store may contain. Whatever is beyond it is a ProtocolError, before anything is done."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.errors import ProtocolError
from cluster.store_messages import Put, Reserve, Seal
from kvstore.block_file import TENANT_BYTES
from kvstore.hashing import HASH_BYTES
from kvstore.layout import Layout, Rectangle
from kvstore.part import Part

MAX_HASHES = 4096  # per request


def check_hashes(hashes: Sequence[bytes]) -> None:
    if len(hashes) > MAX_HASHES:
        raise ProtocolError(f"{len(hashes)} blocks in one request; ask for at most {MAX_HASHES}")
    if any(len(name) != HASH_BYTES for name in hashes):
        raise ProtocolError(f"a block's hash has {HASH_BYTES} bytes")


def check_reserve(message: Reserve, layout: Layout) -> None:
    """Whatever is accepted fits into the header of a block file."""
    if len(message.tenant.encode()) > TENANT_BYTES:
        raise ProtocolError(f"a tenant's name has at most {TENANT_BYTES} bytes")
    for key in message.blocks:
        if len(key.hash) not in (0, HASH_BYTES) or len(key.parent) not in (0, HASH_BYTES):
            raise ProtocolError(f"a block's hash has {HASH_BYTES} bytes, as has its parent's")
        if not 0 < key.tokens <= layout.tokens or len(key.ids) not in (0, 4 * key.tokens):
            raise ProtocolError(f"a block has 1 to {layout.tokens} tokens, and as many ids or none")
        if key.hash and key.tokens != layout.tokens:
            raise ProtocolError("only a full block has a hash")


def asked_part(rectangle: Sequence[int], layout: Layout) -> Part:
    """What a reader asks for of every block; `rectangle` is as in Follow."""
    if not rectangle:
        return Part(layout)
    if len(rectangle) != 4:
        raise ProtocolError("a rectangle is head0, head1, layer0, layer1")
    head0, head1, layer0, layer1 = rectangle
    if not (0 <= head0 < head1 <= layout.heads and 0 <= layer0 < layer1 <= layout.layers):
        raise ProtocolError(f"no rectangle of {layout.heads} heads and {layout.layers} layers: {tuple(rectangle)}")
    return Part(layout, Rectangle(head0, head1, layer0, layer1))


def check_put(message: Put, layout: Layout) -> None:
    for part in message.fragments:
        if part.offset % layout.cell_bytes or len(part.data) % layout.cell_bytes:
            raise ProtocolError("the bytes of a block come in whole cells")
        if not 0 <= part.offset <= part.offset + len(part.data) <= layout.block_bytes:
            raise ProtocolError(f"a block has {layout.block_bytes} bytes and some were put elsewhere")


def check_seal(message: Seal, layout: Layout) -> None:
    if any(len(block.checksums) != 4 * layout.cells for block in message.blocks):
        raise ProtocolError(f"a seal needs {layout.cells} checksums a block")
