"""Messages on the wire: msgpack extension values, so that messages nest and tuples stay tuples.

The code of a value is its class's place in `MESSAGES`, its data the fields in order. Only these classes can come out:
nothing that arrives over the network is ever unpickled or looked up by name.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import msgpack

from cluster import messages as m
from cluster import store_messages as s
from cluster.errors import ProtocolError

MESSAGES: tuple[type, ...] = (
    m.Sampling, m.Generation, m.Handoff, m.PrefillJob, m.DecodeJob, m.Accepted, m.Refused, m.Abort, m.Outputs,
    m.Submit, m.SetRole, m.Ack, m.TokenOutput, m.JobFailed, m.Load, m.StepOutput, m.WorkerInfo, m.StoreInfo,
    s.Hello, s.Welcome, s.BlockKey, s.Reserve, s.Slab, s.Reserved, s.Sealed, s.Seal, s.Finish, s.Revoke, s.Hold,
    s.Held, s.Release, s.Session, s.Follow, s.Fragment, s.FollowEnd, s.StatRequest, s.StoreStat,
    s.Find, s.Found, s.Fetch, s.List, s.BlockInfo, s.Listing, s.Pin, s.Drop, s.Verify, s.Count,
)  # fmt: skip
_CODES: dict[type, int] = {cls: code for code, cls in enumerate(MESSAGES)}
_FIELDS: dict[type, tuple[str, ...]] = {cls: tuple(f.name for f in dataclasses.fields(cls)) for cls in MESSAGES}


def _pack(message: Any) -> msgpack.ExtType:
    code = _CODES.get(type(message))
    if code is None:
        raise TypeError(f"{type(message).__name__} is not a message")
    values = tuple(getattr(message, name) for name in _FIELDS[type(message)])
    return msgpack.ExtType(code, msgpack.packb(values, default=_pack))


def _unpack(code: int, data: bytes) -> Any:
    cls = MESSAGES[code]
    return cls(*msgpack.unpackb(data, ext_hook=_unpack, use_list=False, strict_map_key=False))


def encode(message: Any) -> bytes:
    return bytes(msgpack.packb(message, default=_pack))


def decode(data: bytes) -> Any:
    """The message in `data`. Raises ProtocolError for anything `encode` of this version cannot have written."""
    try:
        message = msgpack.unpackb(data, ext_hook=_unpack, use_list=False, strict_map_key=False)
    except (ValueError, TypeError, IndexError, msgpack.exceptions.UnpackException) as error:
        raise ProtocolError(f"not a message of this version ({error}); are all nodes on the same Tandem?") from None
    if type(message) not in _CODES:
        raise ProtocolError(f"a bare {type(message).__name__} is not a message")
    return message
