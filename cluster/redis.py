"""How Tandem talks to Redis: short timeouts, no hidden retries, and its errors as ours.

Redis introduces processes to each other and says where blocks are; nothing waits long for it, and nothing is lost with
it. What to do when it does not answer is the caller's to decide.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any
from urllib.parse import urlsplit

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from cluster.errors import Unavailable


def redacted(url: str) -> str:
    """The URL without its password, for logs."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


class Link:
    """One Redis, reached with a deadline per command. Raises Unavailable for whatever goes wrong on the way."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self._name = redacted(url)
        self._timeout_s = timeout_s
        self._client: Any = redis.asyncio.Redis.from_url(
            url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=Retry(NoBackoff(), 0)
        )
        self._scripts: dict[str, Any] = {}  # source -> its registered script, sent by digest

    async def command(self, *arguments: bytes | str | int) -> Any:
        """The raw reply of one command."""
        return await self._within(self._client.execute_command(*arguments))

    async def script(self, source: str, keys: list[bytes | str], arguments: list[bytes | str | int]) -> Any:
        """The raw reply of a Lua script."""
        script = self._scripts.setdefault(source, self._client.register_script(source))
        return await self._within(script(keys=keys, args=arguments))

    async def close(self) -> None:
        await self._client.aclose()

    async def _within(self, work: Awaitable[Any]) -> Any:
        try:
            async with asyncio.timeout(self._timeout_s):  # the socket's own timeouts do not cover a whole exchange
                return await work
        except (RedisError, OSError) as error:  # TimeoutError is an OSError
            raise Unavailable(f"Redis at {self._name} does not answer ({error or type(error).__name__})") from None
