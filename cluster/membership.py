"""Who is there: workers and stores of one namespace, each registered for as long as it keeps saying so.

One hash per namespace, member -> expiry and message, on Redis's own clock. A hint for whoever wants to connect: whether
a member lives is for its stream to say, so a Redis that lost everything is whole again after the next heartbeats.
"""

from __future__ import annotations

from cluster.codec import decode, encode
from cluster.errors import ProtocolError
from cluster.messages import StoreInfo, WorkerInfo
from cluster.redis import Link

TIMEOUT_S = 1.0

# value = 16 digits of expiry in ms, then the encoded message
_NOW = "local t = redis.call('TIME'); local now = t[1] * 1000 + math.floor(t[2] / 1000)\n"
_REGISTER = _NOW + "return redis.call('HSET', KEYS[1], ARGV[1], string.format('%016.0f', now + ARGV[2]) .. ARGV[3])"
_MEMBERS = (
    _NOW
    + """
local entries, alive = redis.call('HGETALL', KEYS[1]), {}
for i = 1, #entries, 2 do
  if tonumber(string.sub(entries[i + 1], 1, 16)) > now then
    alive[#alive + 1] = string.sub(entries[i + 1], 17)
  else
    redis.call('HDEL', KEYS[1], entries[i])
  end
end
return alive
"""
)


class Membership:
    """Every method raises Unavailable when Redis does not answer within a second."""

    def __init__(self, redis_url: str) -> None:
        self._link = Link(redis_url, TIMEOUT_S)

    async def register(self, info: WorkerInfo | StoreInfo, ttl_s: float = 10.0) -> None:
        """Say that a member is there for another `ttl_s`; its owner repeats it every two seconds."""
        await self._link.script(_REGISTER, [_key(info.namespace)], [_field(info), int(ttl_s * 1000), encode(info)])

    async def unregister(self, info: WorkerInfo | StoreInfo) -> None:
        await self._link.command("HDEL", _key(info.namespace), _field(info))

    async def members(self, namespace: str) -> tuple[list[WorkerInfo], list[StoreInfo]]:
        """Those whose registration has not run out, by id. Raises ProtocolError for what another version wrote."""
        values = await self._link.script(_MEMBERS, [_key(namespace)], [])
        found = sorted(map(decode, values), key=_field)
        workers = [info for info in found if isinstance(info, WorkerInfo)]
        stores = [info for info in found if isinstance(info, StoreInfo)]
        if len(workers) + len(stores) != len(found):
            raise ProtocolError(f"{_key(namespace)} holds something that is no member; is the Redis shared?")
        return workers, stores

    async def close(self) -> None:
        await self._link.close()


def _key(namespace: str) -> str:
    return f"tandem:{{{namespace}}}:members"


def _field(info: WorkerInfo | StoreInfo) -> str:
    return f"{'store' if isinstance(info, StoreInfo) else 'worker'}/{info.id}"
