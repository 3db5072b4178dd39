"""How Tandem talks to Redis: short timeouts, no hidden retries, and its errors as ours.

Redis introduces processes to each other and says where blocks are; nothing waits long for it, and nothing is lost with
it. What to do when it does not answer is the caller's to decide. TLS and an ACL user come with the URL:
rediss://user:password@host:port?ssl_ca_certs=FILE. Nothing of the URL's secrets gets into an error.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from cluster.errors import ConfigError, Unavailable

NO_URL = (
    "correct redis_url: it is no redis://, rediss:// or unix:// URL (special characters in a password are written as"
    " %XX)"
)


def redacted(url: str) -> str:
    """The URL without user, password and options, for logs; only the scheme when it is unclear where they end."""
    scheme, _, rest = url.partition("://")
    before, _, options = rest.partition("?")
    return f"{scheme}://" + ("..." if "@" in options else before.rpartition("@")[2])


class Link:
    """One Redis, reached with a deadline per command. Raises Unavailable for whatever goes wrong on the way."""

    def __init__(self, url: str, timeout_s: float) -> None:
        """Connects at the first command. Raises ConfigError when `url` is none."""
        self._name = redacted(url)
        self._timeout_s = timeout_s
        try:
            self._client: Any = redis.asyncio.Redis.from_url(
                url,
                socket_timeout=None,  # ours covers a whole exchange; theirs can swallow a cancellation
                socket_connect_timeout=timeout_s,
                retry=Retry(NoBackoff(), 0),
                protocol=2,  # what RESP3 adds (push messages, maps) is not used, and its HELLO costs a round trip
                driver_info=None,  # nor is CLIENT SETINFO, which an ACL need not allow then
            )
        except ValueError:  # its text would quote parts of the URL
            raise ConfigError(NO_URL) from None
        self._scripts: dict[str, Any] = {}  # source -> its registered script, sent by digest

    async def command(self, *arguments: bytes | str | int) -> Any:
        """The reply of one command."""
        return await self._within(self._client.execute_command(*arguments), self._timeout_s)

    async def transaction(self, *commands: tuple[bytes | str, ...]) -> list[Any]:
        """The replies of commands that take effect together (MULTI)."""
        pipeline = self._client.pipeline(transaction=True)
        for command in commands:
            pipeline.execute_command(*command)
        replies: list[Any] = await self._within(pipeline.execute(), self._timeout_s)
        return replies

    async def script(
        self,
        source: str,
        keys: list[bytes | str],
        arguments: list[bytes | str | int],
        timeout_s: float | None = None,
    ) -> Any:
        """The reply of a Lua script, within the link's time-out or a shorter one."""
        script = self._scripts.get(source) or self._scripts.setdefault(source, self._client.register_script(source))
        return await self._within(script(keys=keys, args=arguments), timeout_s or self._timeout_s)

    async def close(self) -> None:
        await self._client.aclose()

    async def _within(self, work: Awaitable[Any], timeout_s: float) -> Any:
        try:
            async with asyncio.timeout(timeout_s):
                return await work
        except (RedisError, OSError) as error:  # TimeoutError is an OSError
            raise Unavailable(f"Redis at {self._name} does not answer ({str(error) or type(error).__name__})") from None
