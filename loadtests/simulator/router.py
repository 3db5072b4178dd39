"""The router in virtual time: gate, placement and the legs of every request, around the real policies.

    arrive -> FairQueue / admission -> PrefixMap.lookup -> place -> prefill leg ~ handoff ~> decode leg -> finished
                   ▲                                                       │ worker died, moved
                   └───────────────────────────────────────────────────────┘

Tokenizing, HTTP and messages take no time here.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import cast

from cluster.errors import Overloaded, Unavailable
from cluster.perfmodel import fetch_ms, prefill_ms
from loadtests.simulator.events import Events
from loadtests.simulator.fleet import Fleet
from loadtests.simulator.job import Job, Sequence, State
from loadtests.simulator.network import Network
from loadtests.simulator.results import Recorder
from loadtests.simulator.settings import SimSettings
from loadtests.simulator.trace import TraceRequest
from loadtests.simulator.worker import Worker
from router.admission import Limits, Outlook, Throughput, admit, may_go, outlook
from router.expectations import ComputedShare, OutputLength
from router.fair_queue import OUTPUT_WEIGHT, FairQueue, Waiting
from router.placement import Ask, place


class Router:
    def __init__(self, settings: SimSettings, events: Events, recorder: Recorder) -> None:
        self.fleet = Fleet(settings, events, recorder.gaps, self)
        self.queue = FairQueue()
        self.network = Network(events, settings.rates.memory, settings.rates.remote, settings.nic_bytes_s)
        self.live: dict[str, Job] = {}  # id -> arrived and not ended
        self._settings = settings
        self._events = events
        self._recorder = recorder
        self._rng = random.Random(settings.seed)
        self._throughput = Throughput()
        self._limits = Limits(settings.max_queue)
        self._outputs = OutputLength()
        self._computed = ComputedShare()
        self._view: Outlook | None = None  # None: workers have reported since it was last needed
        self._gone_requests = self._gone_tokens = 0  # that it does not show
        self._fetches: dict[Sequence, int] = {}  # sequence that is to fetch -> node it fetches from
        self.ended: Callable[[TraceRequest], None] = lambda request: None  # told when a request has ended

    # -------------------------------------------------------------------------------------------------------- gate
    def arrive(self, request: TraceRequest, number: int) -> None:
        size = self._settings.block_size
        chain = request.blocks[: request.prompt_tokens // size] + request.output_blocks
        names = cast("list[bytes]", list(chain))  # numbers do for hashes: nobody looks into either
        job = Job(number, request, self._events.now, names)
        self._recorder.arrived(job)
        if job.last > self._settings.blocks * size:
            self._refuse(job)  # no worker could ever hold it: a client gets 400
            return
        tokens = self._computed.of(request.prompt_tokens)
        item = Waiting(job.id, request.tenant, request.priority, tokens, self._events.now)
        view = self._outlook()
        try:
            # nobody asks for deadlines here, for which its own prefill would count
            displaced = admit(self.queue, item, self._limits, view, 0.0, self._events.now, self._rng.random())
        except Overloaded:
            self._refuse(job)
            return
        self.live[job.id] = job  # before others end, or it looks as if all had
        for other in displaced:
            self.queue.remove(other.id)
            self._refuse(self.live.pop(other.id))
        self.queue.push(item)
        self._release()

    def _refuse(self, job: Job) -> None:
        self._recorder.refused(job)
        self.ended(job.request)

    def look(self) -> None:
        """Workers have reported: perhaps somebody may go."""
        self._view = None
        if self.queue:
            self._release()

    def _outlook(self) -> Outlook:
        """As of the latest reports; what has gone since is counted beside it."""
        if self._view is None:
            self._view = outlook(self.fleet.table, self._settings.max_sequences, self._throughput)
            self._gone_requests = self._gone_tokens = 0
        return self._view

    def _release(self) -> None:
        while self.queue and may_go(self._outlook(), self._gone_requests, self._gone_tokens):
            item = self.queue.pop()
            assert item is not None
            job = self.live[item.id]
            if not self._place(job):
                self.queue.push(item)
                break
            self._computed.observe(job.tokens, job.uncached)
            self._gone_requests += 1
            self._gone_tokens += job.uncached
            self.queue.charge(item.tenant, job.uncached - item.tokens, item.priority)
        self._throughput.advance(self._events.now, bool(self.queue))

    # --------------------------------------------------------------------------------------------------------- legs
    def _place(self, job: Job) -> bool:
        """Choose its workers and send them its legs. False: nobody is there."""
        fleet, tokens = self.fleet, job.tokens
        depths = fleet.map.lookup(job.names[: (tokens - 1) // self._settings.block_size])
        new_tokens = self._outputs.remaining(job.produced)
        try:
            ask = Ask(tokens, new_tokens, job.excluded, explain=False)
            decision = place(fleet.table, ask, depths, self._settings.placement, self._rng)
        except Unavailable:
            if not job.excluded:
                return False
            job.excluded = frozenset()  # rather one that has failed it than nobody
            return self._place(job)
        fleet.table.placed(decision)
        self._recorder.placed(job, decision)
        job.uncached = decision.uncached_tokens
        job.placements += 1
        job.available = job.handed = 0
        job.handing = False
        decoder = fleet.workers[decision.route.decode]
        if decision.route.prefill is None:
            job.prefill, job.decode = None, Sequence(job, decoder, tokens, job.last, handoff=False)
            fleet.sent(decoder.id, job.uncached, tokens)
            decoder.submit(job.decode)
            return True
        prefiller = fleet.workers[decision.route.prefill]
        job.prefill = Sequence(job, prefiller, tokens, tokens + 1, handoff=False)
        job.decode = Sequence(job, decoder, tokens, job.last, handoff=True)
        fleet.sent(prefiller.id, job.uncached, 0)
        fleet.sent(decoder.id, 0, tokens)
        prefiller.submit(job.prefill)
        decoder.submit(job.decode)
        return True

    def lost(self, sequences: list[Sequence], worker: Worker) -> None:
        """That worker has died with these."""
        for job in {sequence.job: None for sequence in sequences}:
            job.excluded = frozenset((worker.id,))
            self._again(job)

    def move(self, worker: Worker) -> int:
        """The worker gives up what it decodes, for others to go on with; how many those were."""
        moved = [s for s in worker.sequences() if s.job.decode is s]
        for sequence in moved:
            self._again(sequence.job)
        return len(moved)

    def _again(self, job: Job) -> None:
        """Take its legs back and place it again, on what has been delivered."""
        for leg in (job.prefill, job.decode):
            if leg is None:
                continue
            if leg.worker.alive:
                leg.worker.remove(leg)
            job.produced = max(job.produced, leg.tokens - job.request.prompt_tokens)
            leg.state = State.ENDED
            self._fetches.pop(leg, None)
        job.prefill = job.decode = None
        request = job.request
        self.queue.push(Waiting(job.id, request.tenant, request.priority, job.tokens, job.arrival_s))
        self._events.after(0.0, self.look)

    # ------------------------------------------------------------------------------------- what workers say (Hands)
    def fetchable(self, sequence: Sequence, blocks: int) -> int:
        """The run of blocks whose fetch saves most of the predicted time; its own node's store, or the best of all."""
        stores, size, rates = self.fleet.stores, self._settings.block_size, sequence.worker.rates
        names = sequence.job.names[: (sequence.tokens - 1) // size]
        if not stores.capacity or blocks >= len(names):
            return 0
        node = sequence.worker.node
        near, (far, owner) = stores.local(node, names, blocks), stores.remote(names, blocks)
        best, saved = 0, 0.0
        for upto, source in ((near, node), (far, owner)):
            if upto > blocks:
                bytes_ = (upto - blocks) * size * self._settings.kv_bytes
                fetch = fetch_ms(rates, bytes_, "memory" if source == node else "remote")
                gain = prefill_ms(rates, (upto - blocks) * size, blocks * size) - fetch
                if gain > saved:
                    best, saved = upto, gain
                    self._fetches[sequence] = source
        return best

    def admitted(self, sequence: Sequence) -> None:
        if sequence.handoff:
            sequence.job.handed = sequence.computed
            self._hand(sequence.job)
            return
        tokens = len(sequence.table) * self._settings.block_size
        size = (tokens - sequence.computed) * self._settings.kv_bytes
        source, worker = self._fetches.pop(sequence), sequence.worker
        self._recorder.fetched(tokens - sequence.computed, source == worker.node)
        self.network.send(source, worker.node, size, partial(worker.arrived, sequence, tokens, False))

    def progressed(self, sequence: Sequence) -> None:
        if sequence is sequence.job.prefill:
            sequence.job.available = sequence.computed
            self._hand(sequence.job)

    def token(self, sequence: Sequence) -> None:
        job = sequence.job
        if job.first_token_s < 0:
            job.first_token_s = self._events.now
            job.cached = sequence.hit
            self._recorder.began(job)
            self._throughput.served(job.uncached)
        if sequence is job.prefill:
            job.produced = sequence.tokens - job.request.prompt_tokens

    def done(self, sequence: Sequence) -> None:
        job, size = sequence.job, self._settings.block_size
        if self.fleet.stores.capacity:
            self.fleet.stores.write(sequence.worker.node, job.names[: sequence.computed // size])
        if sequence is job.decode:
            self._finished(job)
            return
        job.available = sequence.computed
        if sequence.tokens >= job.last:
            assert job.decode is not None
            job.decode.worker.remove(job.decode)
            self._finished(job)
        else:
            self._hand(job)

    def _finished(self, job: Job) -> None:
        job.produced = job.request.output_tokens
        job.finish_s = self._events.now
        job.prefill = job.decode = None
        self._outputs.observe(job.produced)
        self.queue.charge(job.request.tenant, OUTPUT_WEIGHT * job.produced, job.request.priority)
        del self.live[job.id]
        self._recorder.finished(job)
        self.ended(job.request)

    # ------------------------------------------------------------------------------------------------------ handoff
    def _hand(self, job: Job) -> None:
        """Send what the prefill leg has and the decode leg lacks, one transfer at a time; end when that was all."""
        prefill, decode = job.prefill, job.decode
        if job.handing or prefill is None or decode is None or decode.state is not State.RECEIVING:
            return
        if job.available > job.handed:
            job.handing = True
            size = (job.available - job.handed) * self._settings.kv_bytes
            done = partial(self._handed, job, decode, job.available)
            self.network.send(prefill.worker.node, decode.worker.node, size, done)
        elif prefill.state is State.ENDED or prefill.tokens > decode.tokens:
            decode.worker.arrived(decode, decode.tokens, True)

    def _handed(self, job: Job, decode: Sequence, tokens: int) -> None:
        if job.decode is not decode:
            return  # the job went on elsewhere
        job.handing = False
        job.handed = tokens
        self._hand(job)
