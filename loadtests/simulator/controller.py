"""The plan's eyes and hands in virtual time: members and counters in, roles, starts, drains and stops out.

What `cluster/controller.py` is to the real cluster, around the same `plan` and the same `DemandMeter`.
"""

from __future__ import annotations

from cluster.demand import DemandMeter
from cluster.messages import Role, RouterInfo
from cluster.plan import Action, ChangeRole, Drain, Member, Memory, Migrate, Spec, Start, Stop, explain, plan
from loadtests.simulator.events import Events
from loadtests.simulator.fleet import Fleet
from loadtests.simulator.results import Recorder
from loadtests.simulator.router import Router
from loadtests.simulator.settings import SimSettings

DAY_S = 86_400.0


class Controller:
    """`step` is to be called every `plan_s`. The run's first second is midnight UTC to schedules."""

    def __init__(self, settings: SimSettings, events: Events, router: Router, recorder: Recorder) -> None:
        self.moves = self.flips = self.starts = self.stops = self.migrations = 0
        self.words: list[str] = []
        self._settings = settings
        self._events = events
        self._router = router
        self._fleet: Fleet = router.fleet
        self._recorder = recorder
        self._meter = DemandMeter()
        self._memory = Memory()
        least, most = settings.scale or (settings.gpus, settings.gpus)
        roles: tuple[Role, ...] = ("prefill", "decode", "both")
        self._shards = dict(zip(roles, (*settings.shards, settings.shards[1]), strict=True))
        disaggregated = bool(settings.prefillers)
        slo = (settings.ttft_slo_ms, settings.itl_slo_ms)
        self._spec = Spec(settings.autoscaling, least, most, self._shards, *slo, disaggregated, settings.max_sequences)

    def step(self) -> None:
        now = self._events.now
        self._meter.observe((self._report(),), now)
        demand = self._meter.demand()
        actions, self._memory = plan(self._spec, self._members(), demand, self._memory, now, utc_s=now % DAY_S)
        if actions and (reason := explain(self._memory)):
            self.words.append(f"{now:.1f} s: {reason}")
        self.moves += any(isinstance(action, ChangeRole) for action in actions)
        for action in actions:
            self.act(action)

    def _report(self) -> RouterInfo:
        recorder, queue = self._recorder, self._router.queue
        ttft, recorder.recent_ttft_ms = recorder.recent_ttft_ms, []
        return RouterInfo(
            id="router",
            namespace="",
            pid=1,
            requests_total=recorder.requests_total,
            prompt_tokens_total=recorder.prompt_tokens_total,
            uncached_tokens_total=recorder.uncached_tokens_total,
            output_tokens_total=recorder.gaps.count + recorder.began_total,
            waiting=len(queue),
            waiting_tokens=queue.tokens,
            ttft_ms=sum(ttft) / len(ttft) if ttft else 0.0,
            itl_ms=recorder.gap_lately_ms(),
        )

    def _members(self) -> list[Member]:
        fleet, settings = self._fleet, self._settings
        members = [
            Member(
                worker.id,
                worker.role,
                "draining" if worker.id in fleet.draining else "serving",
                self._shards[worker.role],
                worker.rates,
                worker.sequence_count,
                *worker.load[1:3],  # tokens to compute, tokens of context
                fleet.since_s[worker.id],
                settings.kv_tokens,
            )
            for worker in fleet.workers.values()
        ]
        for number, (role, since_s) in fleet.starting.items():
            members.append(Member(f"w{number:04d}", role, "starting", self._shards[role], since_s=since_s))
        return members

    def act(self, action: Action) -> None:
        """Do it, unless its worker is gone."""
        fleet = self._fleet
        if isinstance(action, Start):
            self.starts += 1
            fleet.start(action.role, self._router.look)
            return
        worker = fleet.workers.get(action.id)
        if worker is None:
            return  # it has died since, or is still starting
        match action:
            case ChangeRole(role=role):
                self.flips += 1
                fleet.change_role(worker, role)
            case Drain():
                fleet.drain(worker)
            case Migrate():
                self.migrations += self._router.move(worker)
            case Stop():
                self.stops += 1
                self._router.lost(fleet.leave(worker), worker)
