"""Rank 0's Runner: one step plan per step to every other shard of the worker, and its own part computed here.

    listener = ControlListener(host, secret)            its `address` goes to the followers (`workers.follower`), which
    controls = join(listener, followers, timeout_s)     are started in between (`workers.assembly`)
    rendezvous = Rendezvous(host)                       of the links; kept for as long as the worker is
    stage, peers = load(controls, rendezvous.address, build, timeout_s)
    lead = Lead(stage, controls, peers, step_timeout)   from now on what the engine drives

The worker fails as one: a step that outlasts `step_timeout` raises, and a follower that ends, at any time, ends this
process. Sums and activations travel between the stages themselves; of the others' results only tokens come back here.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from cluster.codec import encode
from cluster.errors import ProtocolError
from cluster.shard_messages import Failed, StepResult
from workers.assembly import close, error_of
from workers.control import Control, watch
from workers.runner import Chunk, Stage
from workers.step_plan import PlanEncoder, unpack_tokens

log = logging.getLogger(__name__)


def _end() -> None:
    os._exit(70)


class Lead:
    """Implements `workers.runner.Runner`; the engine's thread submits and collects."""

    def __init__(
        self,
        stage: Stage,
        controls: list[Control],  # rank - 1 -> connection; all have loaded
        peers: tuple[str, ...],
        step_timeout: float,  # seconds
        ended: Callable[[], None] = _end,  # called by a thread of its own when a follower is gone
    ) -> None:
        shard = stage.shard
        self.layout = stage.layout
        self.shard = shard
        self.peers = peers
        self.num_blocks = stage.num_blocks
        self.device_cache = stage.device_cache
        self.vocab_size = stage.vocab_size
        self.depth, self.ahead = shard.pp, False
        self._stage = stage
        self._controls = controls
        self._results = None if shard.pp == 1 else controls[shard.tp * (shard.pp - 1) - 1]  # who tells tokens
        self._step_timeout = step_timeout
        self._ended = ended
        self._closing = False
        self._encoder = PlanEncoder()
        self._flight: deque[tuple[int, list[int | None]]] = deque()  # (number, this shard's result) per step, in order
        for control in controls:
            control.limit_sends(step_timeout)
        watch(controls, self._lost)

    def submit(self, chunks: list[Chunk]) -> None:
        """Raises WorkerLost when a follower does not take the plan, or the links of this stage broke."""
        plan = self._encoder.plan(chunks)
        self.send(encode(plan))
        self._flight.append((plan.number, self._stage.run(chunks)))

    def send(self, plan: bytes) -> None:
        """The same bytes to every follower."""
        for control in self._controls:
            control.send_bytes(plan)

    def collect(self) -> list[int | None]:
        """Raises WorkerLost after `step_timeout`, or what the last stage's first rank failed with."""
        number, own = self._flight.popleft()
        if self._results is None:
            return own
        message = self._results.receive(self._step_timeout)
        if isinstance(message, Failed):
            raise error_of(message)
        if not isinstance(message, StepResult) or message.number != number:
            raise ProtocolError(f"{self._results.name} said {message} when step {number} ended")
        return unpack_tokens(message.tokens)

    def block(self, index: int) -> npt.NDArray[np.uint8]:
        return self._stage.block(index)

    def close(self) -> None:
        """The followers end."""
        self._closing = True
        close(self._controls)

    def _lost(self, control: Control) -> None:
        if not self._closing:
            log.error("%s is gone (its log says why); this worker ends, its requests go elsewhere", control.name)
            self._ended()
