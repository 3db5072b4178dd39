"""Control connections: who gets one, what passes, and that neither end waits for one that is gone or stalled."""

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from cluster.errors import StartupError, WorkerLost
from cluster.messages import Ack
from cluster.shard_messages import Begin, Joined
from workers import control as module
from workers.control import Control, ControlListener, connect, watch

HOST, SECRET = "127.0.0.1", "a cluster secret"
PATIENCE_S = 20.0


@pytest.fixture
def listener() -> Iterator[ControlListener]:
    made = ControlListener(HOST, SECRET)
    yield made
    made.close()


@pytest.fixture
def ends(listener: ControlListener) -> Iterator[tuple[Control, Control]]:
    with ThreadPoolExecutor(1) as executor:
        connecting = executor.submit(connect, listener.address, SECRET)
        accepted = listener.accept(time.monotonic() + PATIENCE_S)
        assert accepted is not None
        yield accepted, connecting.result(PATIENCE_S)
    accepted.close()
    connecting.result().close()


def test_messages_arrive_whole_and_in_order(ends: tuple[Control, Control]) -> None:
    here, there = ends
    long = Begin("x" * 1_000_000)
    messages = [Joined(3, 4), long, Ack()]
    with ThreadPoolExecutor(1) as executor:
        sending = executor.map(there.send, messages)
        assert [here.receive(PATIENCE_S) for _ in messages] == messages
        assert list(sending) == [None] * 3


def test_who_has_left_is_noticed_by_who_reads_who_writes_and_who_watches(ends: tuple[Control, Control]) -> None:
    here, there = ends
    lost = threading.Event()
    watch([here], lambda control: lost.set() if control is here else None)
    there.send(Ack())  # what nobody has read does not wake the watch
    here.receive(PATIENCE_S)
    assert not lost.is_set()
    there.close()
    assert lost.wait(PATIENCE_S)
    with pytest.raises(WorkerLost, match="has ended"):
        here.receive(PATIENCE_S)
    with pytest.raises(WorkerLost, match="has ended"):
        send_much(here)


def test_who_says_nothing_or_takes_nothing_counts_as_stalled(ends: tuple[Control, Control]) -> None:
    here, _ = ends
    with pytest.raises(WorkerLost, match=r"not answered for 0.1 s"):
        here.receive(0.1)
    here.limit_sends(0.1)
    with pytest.raises(WorkerLost, match=r"taken nothing for 0.1 s"):
        send_much(here)


def send_much(control: Control) -> None:
    for _ in range(100):
        control.send_bytes(b"x" * 1_000_000)


def test_a_stranger_is_refused_and_keeps_nobody_waiting(
    listener: ControlListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HANDSHAKE_S", 0.2)
    host, port = listener.address.rsplit(":", 1)
    silent, talks = socket.create_connection((host, int(port))), socket.create_connection((host, int(port)))
    talks.sendall(b"GET / HTTP/1.1\r\n\r\n")
    with ThreadPoolExecutor(1) as executor:
        connecting = executor.submit(connect, listener.address, SECRET)
        accepted = listener.accept(time.monotonic() + PATIENCE_S)
        connected = connecting.result(PATIENCE_S)
    assert accepted is not None
    assert listener.refused == 2
    for each in (silent, talks, accepted, connected):
        each.close()


def test_another_secret_is_refused_at_both_ends(listener: ControlListener) -> None:
    with ThreadPoolExecutor(1) as executor:
        connecting = executor.submit(connect, listener.address, "another secret")
        assert listener.accept(time.monotonic() + 0.5) is None
        with pytest.raises(StartupError, match="does not know this cluster's secret"):
            connecting.result(PATIENCE_S)
    assert listener.refused == 1


def test_nobody_listens(listener: ControlListener) -> None:
    listener.close()
    with pytest.raises(StartupError, match="does not listen at"):
        connect(listener.address, SECRET)
