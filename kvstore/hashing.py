"""Names of KV blocks: a block's hash says which tokens, after which tokens, under which model and for which tenant.

    root = sha256(tag, model, tokenizer, dtype, block size, LoRA, salt)      block = sha256(tag, parent, tokens, extras)

Fixed binary with length prefixes: no process seed, no serialiser whose encoding could drift, so any two processes that
agree on the inputs agree on the hash. A partial block has no name. Changing anything here changes `vectors_digest`, and
two parties whose digests differ refuse each other instead of missing for ever.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.store_messages import BlockKey

HASH_BYTES = 32
_ROOT_TAG = b"tandem/root/1"
_BLOCK_TAG = b"tandem/block/1"
_COUNT = struct.Struct("<I")


def _fields(*values: bytes) -> bytes:
    """The values with their lengths, so that no two lists of fields read the same."""
    return b"".join(_COUNT.pack(len(value)) + value for value in values)


def tenant_tag(secret: str, tenant: str) -> str:
    """16 hex digits that tell tenants apart without saying who they are."""
    return hmac.new(secret.encode(), _fields(b"tenant", tenant.encode()), hashlib.sha256).hexdigest()[:16]


def salt(secret: str, tenant: str, cache_salt: str) -> bytes:
    """What keeps one tenant's blocks from another's: without the secret nobody can choose somebody else's."""
    return hmac.new(secret.encode(), _fields(tenant.encode(), cache_salt.encode()), hashlib.sha256).digest()


@dataclass(frozen=True, slots=True)
class ModelKey:
    """Everything that makes KV of equal tokens differ, tenant aside."""

    model: bytes  # digest of the weights
    tokenizer: bytes  # digest of the tokenizer
    dtype: str  # what KV is computed in, as torch names it; and behind a slash what it is kept in, if in 8 bits
    block_size: int  # tokens per block
    lora: bytes = b""  # digest of the LoRA weights (never their name)

    def root(self, salt: bytes) -> bytes:
        """The parent of every first block [32 bytes]."""
        size = _COUNT.pack(self.block_size)
        fields = _fields(self.model, self.tokenizer, self.dtype.encode(), size, self.lora, salt)
        return hashlib.sha256(_ROOT_TAG + fields).digest()

    @property
    def approximate(self) -> ModelKey:
        """Of KV that was in int8 once, or was computed on top of such: no block of it has the name of an exact one."""
        return replace(self, dtype=f"{self.dtype}+int8")

    @property
    def namespace(self) -> str:
        """16 hex digits that everybody who serves this model shares: the prefix of its keys in Redis."""
        return self.root(b"").hex()[:16]


def block_hash(parent: bytes, tokens: Sequence[int], extras: Sequence[tuple[int, bytes]] = ()) -> bytes:
    """Hash of a full block [32 bytes]. `extras` are (tag, value) of what tokens do not tell: an image's digest."""
    packed = struct.pack(f"<{len(tokens)}I", *tokens)
    tail = b"".join(_COUNT.pack(tag) + _fields(value) for tag, value in sorted(extras))
    return hashlib.sha256(_BLOCK_TAG + parent + _COUNT.pack(len(tokens)) + packed + tail).digest()


def extend(hashes: list[bytes], root: bytes, tokens: Sequence[int], block_size: int) -> None:
    """Append the hashes of the full blocks of `tokens` that `hashes` does not have yet (0.5 us a block)."""
    known, full = len(hashes), len(tokens) // block_size
    if known >= full:
        return
    first, last = known * block_size, full * block_size
    packed = struct.pack(f"<{last - first}I", *tokens[first:last])
    count, size = _COUNT.pack(block_size), block_size * _COUNT.size
    parent = hashes[-1] if hashes else root
    for offset in range(0, len(packed), size):
        parent = hashlib.sha256(_BLOCK_TAG + parent + count + packed[offset : offset + size]).digest()
        hashes.append(parent)


def block_keys(
    hashes: Sequence[bytes], root: bytes, tokens: Sequence[int], block_size: int, start: int, stop: int
) -> list[BlockKey]:
    """The full blocks `start`..`stop` of a chain, with what their names were made of."""
    keys = []
    for index in range(start, stop):
        ids = tokens[index * block_size : (index + 1) * block_size]
        parent = hashes[index - 1] if index else root
        keys.append(BlockKey(hashes[index], block_size, parent, struct.pack(f"<{block_size}I", *ids)))
    return keys


def named_rightly(key: BlockKey) -> bool:
    """Whether a block's hash is that of its parent and tokens. Extras are not kept, so blocks with some never are."""
    if len(key.ids) != key.tokens * _COUNT.size:
        return False
    return hashlib.sha256(_BLOCK_TAG + key.parent + _COUNT.pack(key.tokens) + key.ids).digest() == key.hash


def vectors_digest() -> bytes:
    """Digest [8 bytes] of what this build computes for fixed inputs: peers compare it before they share blocks."""
    key = ModelKey(b"model", b"tokenizer", "float32", 4, b"lora")
    root = key.root(salt("secret", "tenant", "cache-salt"))
    chain: list[bytes] = []
    extend(chain, root, range(2**32 - 12, 2**32), 4)
    outputs = [root, key.root(b""), *chain, block_hash(root, [1, 2, 3, 4], [(2, b"b"), (1, b"a")])]
    return hashlib.sha256(b"".join(outputs)).digest()[:8]
