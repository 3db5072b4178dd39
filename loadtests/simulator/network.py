"""Links between nodes: every NIC's bandwidth is shared equally by the transfers that go through it in one direction.

A transfer runs at the lesser of its shares at both ends, as fluid (processor sharing; where one end leaves some of a
share unused, nobody else gets it). Within a node bytes move at the speed of one copy and nobody waits for another.
"""

from __future__ import annotations

from collections.abc import Callable

from loadtests.simulator.events import Events


class _Flow:
    __slots__ = ("done", "rate", "remaining", "source", "target", "updated_s", "version")

    def __init__(self, source: int, target: int, size: float, now: float, done: Callable[[], None]) -> None:
        self.source = source
        self.target = target
        self.remaining = size
        self.updated_s = now
        self.done = done
        self.rate = 0.0  # bytes per second
        self.version = 0  # of the predicted end


class Network:
    """`memory` and `remote` are (ms per transfer, ms per byte): within a node, and between nodes when nobody else is
    there; `nic_bytes_s` is what a node's NIC carries in each direction."""

    def __init__(
        self, events: Events, memory: tuple[float, float], remote: tuple[float, float], nic_bytes_s: float | None
    ) -> None:
        self.bytes = 0.0  # carried between nodes
        self._events = events
        self._memory = memory
        self._setup_s = remote[0] / 1000
        self._most = 1000 / remote[1]
        self._nic = nic_bytes_s or self._most
        self._out: dict[int, dict[_Flow, None]] = {}  # node -> what leaves it
        self._in: dict[int, dict[_Flow, None]] = {}  # node -> what comes

    def send(self, source: int, target: int, size: float, done: Callable[[], None]) -> None:
        """Call `done` when that many bytes have gone from node to node."""
        if source == target:
            call, byte = self._memory
            self._events.after((call + byte * size) / 1000, done)
            return
        self.bytes += size
        self._events.after(self._setup_s, self._begin, _Flow(source, target, size, 0.0, done))

    def _begin(self, flow: _Flow) -> None:
        flow.updated_s = self._events.now
        self._out.setdefault(flow.source, {})[flow] = None
        self._in.setdefault(flow.target, {})[flow] = None
        self._share(flow)

    def _end(self, flow: _Flow, version: int) -> None:
        if version != flow.version:
            return
        flow.version += 1
        del self._out[flow.source][flow]
        del self._in[flow.target][flow]
        self._share(flow)
        flow.done()

    def _share(self, changed: _Flow) -> None:
        """A flow has come or gone: new rates for all that share a NIC's direction with it."""
        now = self._events.now
        for flow in self._out[changed.source] | self._in[changed.target]:
            users = max(len(self._out[flow.source]), len(self._in[flow.target]))
            rate = min(self._most, self._nic / users)
            if rate == flow.rate:
                continue
            flow.remaining -= flow.rate * (now - flow.updated_s)
            flow.updated_s = now
            flow.rate = rate
            flow.version += 1
            self._events.after(max(0.0, flow.remaining) / rate, self._end, flow, flow.version)
