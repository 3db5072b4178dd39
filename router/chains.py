"""Names of the blocks of what is to be computed, as the workers will name them: what placement looks prefixes up by.

Short prompts are hashed where they are; long ones in a thread, because the event loop has other requests to serve.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from kvstore.hashing import ModelKey, extend

LONG = 8_192  # tokens: a quarter of a millisecond of hashing in blocks of 16


async def hashes(key: ModelKey, tokens: Sequence[int], salt: bytes, exact: bool) -> tuple[bytes, ...]:
    """Of the full blocks of `tokens`. `exact` as in cluster.messages.Generation."""
    root = (key if exact else key.approximate).root(salt)
    chain: list[bytes] = []
    if len(tokens) < LONG:
        extend(chain, root, tokens, key.block_size)
    else:
        await asyncio.to_thread(extend, chain, root, tokens, key.block_size)
    return tuple(chain)
