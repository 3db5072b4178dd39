"""Messages on the wire: msgpack extension values, so that messages nest and tuples stay tuples.

The code of a value is its class's place in `MESSAGES`, its data the fields in order. Only these classes can come out:
nothing that arrives over the network is ever unpickled or looked up by name.

The bytes of KV blocks are not copied through msgpack. A message that has some is a frame:

    0xc1 (which msgpack never writes) │ u32le header length │ header: the message, with lengths for bytes │ the bytes

They are joined once when it is written, and come out as views of what arrived.
"""

from __future__ import annotations

import dataclasses
import struct
from functools import partial
from typing import Any

import msgpack

from cluster import messages as m
from cluster import orders as o
from cluster import shard_messages as w
from cluster import store_messages as s
from cluster.errors import ProtocolError

MESSAGES: tuple[type, ...] = (
    m.Sampling, m.Generation, m.Handoff, m.PrefillJob, m.DecodeJob, m.Accepted, m.Refused, m.Abort, m.Outputs,
    m.Submit, m.SetRole, m.Ack, m.TokenOutput, m.JobFailed, m.Load, m.StepOutput, m.WorkerInfo, m.StoreInfo,
    s.Hello, s.Welcome, s.BlockKey, s.Reserve, s.Slab, s.Reserved, s.Sealed, s.Seal, s.Finish, s.Revoke, s.Hold,
    s.Held, s.Release, s.Session, s.Follow, s.Fragment, s.FollowEnd, s.StatRequest, s.StoreStat,
    s.Find, s.Found, s.Fetch, s.List, s.BlockInfo, s.Listing, s.Pin, s.Drop, s.Verify, s.Count, s.Fragments, s.Put,
    w.Joined, w.Begin, w.Loaded, w.Failed, w.Admitted, w.StepPlan, w.StepResult, w.WriteBlocks, w.Written,
    w.FollowBlocks, w.Followed, w.StoredRun, w.FetchBlocks, w.FetchedRun, w.FetchedBlocks, w.CancelBlocks,
    m.Drain, m.Migrate, m.Rates, m.CacheChange, m.RouterInfo, m.ControllerInfo, m.Gpu,
    o.DrainOrder, o.RoleOrder, o.SplitOrder, o.ScaleOrder, o.RestartOrder, o.LogOrder,
)  # fmt: skip
_CODES: dict[type, int] = {cls: code for code, cls in enumerate(MESSAGES)}
_FIELDS: dict[type, tuple[str, ...]] = {cls: tuple(f.name for f in dataclasses.fields(cls)) for cls in MESSAGES}
_FRAME = struct.Struct("<BI")
_FRAME_MARK = 0xC1
_DATA = _FIELDS[s.Fragment].index("data")
Data = bytes | memoryview


def _pack(payload: list[Data], message: Any) -> msgpack.ExtType:
    code = _CODES.get(type(message))
    if code is None:
        raise TypeError(f"{type(message).__name__} is not a message")
    values = [getattr(message, name) for name in _FIELDS[type(message)]]
    if type(message) is s.Fragment:
        payload.append(message.data)
        values[_DATA] = len(message.data)
    return msgpack.ExtType(code, msgpack.packb(values, default=partial(_pack, payload)))


class _Payload:
    """The bytes behind a frame's header, handed out in order."""

    def __init__(self, data: Data) -> None:
        self.left = memoryview(data)

    def take(self, size: int) -> memoryview:
        if not 0 <= size <= len(self.left):
            raise ValueError(f"{size} bytes are announced and {len(self.left)} are left")
        taken, self.left = self.left[:size], self.left[size:]
        return taken

    def unpack(self, code: int, data: bytes) -> Any:
        cls = MESSAGES[code]
        values = msgpack.unpackb(data, ext_hook=self.unpack, use_list=False, strict_map_key=False)
        if cls is s.Fragment:
            values = (*values[:_DATA], self.take(values[_DATA]), *values[_DATA + 1 :])
        return cls(*values)


def encode(message: Any) -> bytes:
    payload: list[Data] = []  # in the order of the fragments
    header = bytes(msgpack.packb(message, default=partial(_pack, payload)))
    if not any(payload):
        return header
    return b"".join((_FRAME.pack(_FRAME_MARK, len(header)), header, *payload))


def decode(data: bytes) -> Any:
    """The message in `data`. Raises ProtocolError for anything `encode` of this version cannot have written."""
    try:
        payload = _Payload(b"")
        if data[:1] == bytes([_FRAME_MARK]):
            payload = _Payload(data)
            _, size = _FRAME.unpack(payload.take(_FRAME.size))
            data = bytes(payload.take(size))
        message = msgpack.unpackb(data, ext_hook=payload.unpack, use_list=False, strict_map_key=False)
        if payload.left:
            raise ValueError(f"{len(payload.left)} bytes too many")
    except (ValueError, TypeError, IndexError, struct.error, msgpack.exceptions.UnpackException) as error:
        raise ProtocolError(f"not a message of this version ({error}); are all nodes on the same Tandem?") from None
    if type(message) not in _CODES:
        raise ProtocolError(f"a bare {type(message).__name__} is not a message")
    return message
