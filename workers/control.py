"""The control connection between rank 0 and another shard of its worker: whole messages, in order, over TCP.

Both sides prove that they know the cluster's secret before anything else is read (`multiprocessing.connection`'s
challenge); only messages of `cluster.codec` travel, never pickles. A connection is also how each side knows that the
other lives: a process that ends, or a machine that is gone, ends it. What cannot be sent because nobody reads fails
after a while; it never blocks for good.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any

from cluster.codec import decode, encode
from cluster.errors import StartupError, WorkerLost

HANDSHAKE_S = 5.0  # of somebody who connects
QUEUE_S = 60.0  # of who is connected to: strangers may be ahead in the queue
SEND_S = 60.0  # until `limit_sends` says otherwise
SILENT_S = 20  # a machine that does not even acknowledge for so long is gone
log = logging.getLogger(__name__)


class Control:
    """One end of a connection. One thread at a time sends, one receives."""

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(True)
        # a plan that waits for the last one's acknowledgement would wait as long as a delayed one takes: 40 ms
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, SILENT_S // 4)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, SILENT_S // 4)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        self._socket = connected
        self.limit_sends(SEND_S)
        self._connection: Connection[Any, Any] = Connection(os.dup(connected.fileno()))
        self.name = "rank 0"  # of the other end, in errors

    def limit_sends(self, seconds: float) -> None:
        """How long the other end may take nothing of what is sent before it counts as stalled."""
        self._send_s = seconds
        self._limit(socket.SO_SNDTIMEO, seconds)

    def fileno(self) -> int:
        return self._connection.fileno()

    def handshake(self, secret: str, *, listening: bool) -> None:
        """Raises AuthenticationError, or others when what answers is not a shard of this version."""
        self._limit(socket.SO_RCVTIMEO, HANDSHAKE_S if listening else QUEUE_S)
        first, second = deliver_challenge, answer_challenge
        for step in (first, second) if listening else (second, first):
            step(self._connection, secret.encode())
        self._limit(socket.SO_RCVTIMEO, 0.0)

    def send(self, message: Any) -> None:
        self.send_bytes(encode(message))

    def send_bytes(self, message: bytes) -> None:
        """A message that is encoded already. Raises WorkerLost when the other end is gone or stalled."""
        try:
            self._connection.send_bytes(message)
        except BlockingIOError:
            raise WorkerLost(f"{self.name} has taken nothing for {self._send_s:g} s; it counts as stalled") from None
        except OSError as error:
            raise WorkerLost(f"{self.name} has ended ({error}); its log says why") from None

    def receive(self, timeout_s: float | None) -> Any:
        """The next message; None waits for as long as the other end lives. Raises WorkerLost."""
        try:
            if timeout_s is not None and not self._connection.poll(timeout_s):
                raise WorkerLost(f"{self.name} has not answered for {timeout_s:g} s; it counts as stalled")
            return decode(self._connection.recv_bytes())
        except (EOFError, OSError) as error:
            reason = f" ({error})" if str(error) else ""
            raise WorkerLost(f"{self.name} has ended{reason}; its log says why") from None

    def close(self) -> None:
        """Whoever waits at either end is woken."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            log.debug("%s had left already", self.name)
        self._socket.close()
        self._connection.close()

    def _limit(self, option: int, seconds: float) -> None:
        """0 is none. Not a socket timeout of Python's: those make the descriptor non-blocking for everybody."""
        limit = struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))
        self._socket.setsockopt(socket.SOL_SOCKET, option, limit)


class ControlListener:
    """Where the other shards of a worker connect to."""

    def __init__(self, host: str, secret: str) -> None:
        self._socket = socket.create_server((host, 0))
        self._secret = secret
        self.address = f"{host}:{self._socket.getsockname()[1]}"
        self.refused = 0  # connections that were not of this cluster

    def accept(self, deadline: float) -> Control | None:
        """The next connection from somebody who knows the secret; None when there is none until `deadline`, on the
        monotonic clock. Others are refused."""
        while (left := deadline - time.monotonic()) > 0:
            self._socket.settimeout(left)
            try:
                connected, peer = self._socket.accept()
            except TimeoutError:
                break
            control = Control(connected)
            try:
                control.handshake(self._secret, listening=True)
            except (AuthenticationError, AssertionError, EOFError, OSError, ValueError) as error:
                log.warning("refused %s:%d, which is not a shard of this worker: %r", *peer[:2], error)
                self.refused += 1
                control.close()
            else:
                return control
        return None

    def close(self) -> None:
        self._socket.close()


def connect(address: str, secret: str) -> Control:
    """A shard's end. Raises StartupError when rank 0 is not there or has another secret."""
    host, _, port = address.rpartition(":")
    try:
        control = Control(socket.create_connection((host, int(port)), HANDSHAKE_S))
    except OSError as error:
        raise StartupError(f"rank 0 of this worker does not listen at {address} ({error}); was it stopped?") from None
    try:
        control.handshake(secret, listening=False)
    except (AuthenticationError, AssertionError, EOFError, OSError, ValueError) as error:
        control.close()
        raise StartupError(f"{address} does not know this cluster's secret, or is no worker: {error!r}") from None
    return control


def watch(controls: Iterable[Control], lost: Callable[[Control], None]) -> None:
    """From a thread of its own: call `lost` as soon as one of the other ends is gone, even while nobody reads."""
    by_descriptor = {control.fileno(): control for control in controls}
    poller = select.poll()
    for descriptor in by_descriptor:
        poller.register(descriptor, select.POLLRDHUP)

    def wait() -> None:
        descriptor, _ = poller.poll()[0]
        lost(by_descriptor[descriptor])

    threading.Thread(target=wait, name="watch", daemon=True).start()
