import msgpack
import pytest

from cluster import messages as m
from cluster import store_messages as s
from cluster.codec import MESSAGES, decode, encode
from cluster.errors import ProtocolError

GENERATION = m.Generation(
    "r-0-0d", (1, 2, 3), (), m.Sampling(logit_bias=((5, -1.5),), stop_token_ids=(2,)), b"salt", 600_000
)
LOAD = m.Load("decode", *range(14))


@pytest.mark.parametrize(
    "message",
    [
        m.Submit("router", m.DecodeJob(GENERATION, m.Handoff("127.0.0.1:1", 2**51, "t"))),
        m.Submit("router", m.PrefillJob(GENERATION)),
        m.StepOutput((m.TokenOutput("a", 0, (7, 8), "stop", 16), m.JobFailed("b", "code", "why")), LOAD),
        s.Fragment(3, 16, s.Slab(1, 2, True), b"crc", 0, bytes(range(256)), True),
        s.FollowEnd(None, "", ""),
        m.Ack(),
    ],
)
def test_a_message_survives_the_wire(message: object) -> None:
    assert decode(encode(message)) == message


@pytest.mark.parametrize(
    "data",
    [b"", b"\xc1", msgpack.packb({"a": 1}), msgpack.packb([1, 2]), msgpack.packb(msgpack.ExtType(120, b"")),
     msgpack.packb(msgpack.ExtType(0, msgpack.packb([1] * 99))), encode(m.Ack())[:-1], encode(m.Ack()) + b"x"],
)  # fmt: skip
def test_anything_else_is_a_protocol_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(data)


def test_what_is_not_a_message_cannot_be_sent() -> None:
    with pytest.raises(TypeError, match="object is not a message"):
        encode(object())


def test_every_message_class_has_a_code() -> None:
    classes = {c for words in (m, s) for c in vars(words).values() if getattr(c, "__module__", "") == words.__name__}
    assert {c for c in classes if isinstance(c, type)} == set(MESSAGES)
