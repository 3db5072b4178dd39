import contextlib
from typing import get_args

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import messages as m
from cluster import shard_messages as w
from cluster import store_messages as s
from cluster.codec import MESSAGES, decode, encode
from cluster.errors import ProtocolError
from cluster.orders import Order

GENERATION = m.Generation(
    "r-0-0d", (1, 2, 3), (), m.Sampling(logit_bias=((5, -1.5),), stop_token_ids=(2,)), b"salt", 600_000
)
FRAGMENT = s.Fragment(3, 16, s.Slab(1, 2, True), b"crc", 0, bytes(range(256)), True)
FRAME = encode(s.Fragments((FRAGMENT, FRAGMENT)))
HEADER = 5 + int.from_bytes(FRAME[1:5], "little")
LOAD = m.Load("decode", *range(14))


@pytest.mark.parametrize(
    "message",
    [
        m.Submit("router", m.DecodeJob(GENERATION, m.Handoff("127.0.0.1:1", 2**51, "t"))),
        m.Submit("router", m.PrefillJob(GENERATION)),
        m.StepOutput((m.TokenOutput("a", 0, (7, 8), "stop", 16), m.JobFailed("b", "code", "why")), LOAD),
        s.Fragment(3, 16, s.Slab(1, 2, True), b"crc", 0, bytes(range(256)), True),
        s.Fragments((FRAGMENT, s.Fragment(4, 16, s.Slab(2, 2, True), b"", 0, b"", True), FRAGMENT)),
        s.Fragments(()),
        s.FollowEnd(None, "", ""),
        m.Ack(),
    ],
)
def test_a_message_survives_the_wire(message: object) -> None:
    assert decode(encode(message)) == message


@pytest.mark.parametrize(
    "data",
    [b"", b"\xc1", msgpack.packb({"a": 1}), msgpack.packb([1, 2]), msgpack.packb(msgpack.ExtType(120, b"")),
     msgpack.packb(msgpack.ExtType(0, msgpack.packb([1] * 99))), encode(m.Ack())[:-1], encode(m.Ack()) + b"x",
     FRAME[:-1], FRAME + b"x", FRAME[:HEADER], FRAME[:HEADER - 1], FRAME[5:HEADER], FRAME[:3],
     b"\xc1\xff\xff\xff\xff" + FRAME[5:], b"\xc1" + bytes(4) + FRAME[HEADER:],
     FRAME.replace(msgpack.packb(256), msgpack.packb(-99 * 256)),
     FRAME.replace(msgpack.packb(256), msgpack.packb("abc"[:2]))],
)  # fmt: skip
def test_anything_else_is_a_protocol_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(data)


def test_the_bytes_of_a_block_are_views_of_what_arrived() -> None:
    view = memoryview(bytes(range(256)))
    frame = encode(s.Fragments((s.Fragment(0, 16, s.Slab(0, 1, True), b"", 0, view, True),)))
    data = decode(frame).fragments[0].data
    assert isinstance(data, memoryview)
    assert data.obj is frame
    assert frame.endswith(bytes(view))


@given(st.data())
def test_no_bytes_at_all_make_anything_but_a_message_or_a_protocol_error(data: st.DataObject) -> None:
    frame = bytearray(FRAME)
    for _ in range(data.draw(st.integers(1, 3))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ProtocolError):
        assert type(decode(bytes(frame))) in MESSAGES


def test_what_is_not_a_message_cannot_be_sent() -> None:
    with pytest.raises(TypeError, match="object is not a message"):
        encode(object())


def test_every_message_class_has_a_code() -> None:
    classes = {c for words in (m, s, w) for c in vars(words).values() if getattr(c, "__module__", "") == words.__name__}
    assert {c for c in classes if isinstance(c, type)} | set(get_args(Order)) == set(MESSAGES)
