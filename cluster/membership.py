"""Who is there: workers, stores, routers and the controller of one namespace, each registered for as long as it keeps
saying so.

One hash per namespace, member -> expiry and message, on Redis's own clock. A hint for whoever wants to connect: whether
a member lives is for its stream to say, so a Redis that lost everything is whole again after the next heartbeats.
"""

from __future__ import annotations

from cluster.codec import decode, encode
from cluster.errors import ProtocolError
from cluster.messages import ControllerInfo, RouterInfo, StoreInfo, WorkerInfo
from cluster.redis import Link

TIMEOUT_S = 1.0
Info = WorkerInfo | StoreInfo | RouterInfo | ControllerInfo

_KINDS = {WorkerInfo: "worker", StoreInfo: "store", RouterInfo: "router", ControllerInfo: "controller"}
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

    async def register(self, info: Info, ttl_s: float = 10.0) -> None:
        """Say that a member is there for another `ttl_s`; its owner repeats it every two seconds."""
        await self._link.script(_REGISTER, [_key(info.namespace)], [_field(info), int(ttl_s * 1000), encode(info)])

    async def unregister(self, info: Info) -> None:
        await self._link.command("HDEL", _key(info.namespace), _field(info))

    async def members(self, namespace: str) -> tuple[list[WorkerInfo], list[StoreInfo]]:
        """Those whose registration has not run out, by id. Raises ProtocolError for what another version wrote."""
        found = await self._registered(namespace)
        workers = [info for info in found if isinstance(info, WorkerInfo)]
        return workers, [info for info in found if isinstance(info, StoreInfo)]

    async def reports(self, namespace: str) -> tuple[list[RouterInfo], list[ControllerInfo]]:
        """What routers and the controller said last, of those whose registration has not run out; as `members`."""
        found = await self._registered(namespace)
        routers = [info for info in found if isinstance(info, RouterInfo)]
        return routers, [info for info in found if isinstance(info, ControllerInfo)]

    async def _registered(self, namespace: str) -> list[Info]:
        found = [decode(value) for value in await self._link.script(_MEMBERS, [_key(namespace)], [])]
        if not all(isinstance(info, Info) for info in found):
            raise ProtocolError(f"{_key(namespace)} holds something that is no member; is the Redis shared?")
        return sorted(found, key=_field)

    async def close(self) -> None:
        await self._link.close()


def _key(namespace: str) -> str:
    return f"tandem:{{{namespace}}}:members"


def _field(info: Info) -> str:
    return f"{_KINDS[type(info)]}/{info.id}"
