"""The loop around the plan: what it acts on, what it survives, what it tells people."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest

from cluster.controller import RETRY_S, Controller, Observation, running
from cluster.errors import Unavailable
from cluster.messages import ControllerInfo, RouterInfo
from cluster.orders import Orders, RestartOrder, ScaleOrder
from cluster.pools import Action, Drain, Member, Spec, Start, Stop
from tests.serving import wait_until

ROUTER = RouterInfo("r", "ns", 1, 0, 0, 0, 0, 0, 0, 0.0, 0.0)
SPEC = Spec("fixed", 2, 4, {"prefill": 1, "decode": 1, "both": 1}, 2000.0, 200.0, disaggregated=False)
SERVING = Member("both-0", "both", "serving", 1, since_s=-1000.0)
DRAINED = Member("worker-1", "both", "draining", 1)


@dataclass
class Pool:
    """A cluster that does what it is told within the call."""

    members: list[Member] = field(default_factory=lambda: [SERVING])
    routers: tuple[RouterInfo, ...] = (ROUTER,)
    failed: tuple[str, ...] = ()
    ended: tuple[tuple[str, float], ...] = ()
    blind: Exception | None = None
    refuses: Callable[[Action], bool] = lambda action: False
    hangs: bool = False
    asked: list[Action] = field(default_factory=list)
    reports: list[ControllerInfo] = field(default_factory=list)
    looked: int = 0
    closed: bool = False
    orders: Orders = field(default_factory=Orders)
    withdrawn: list[str] = field(default_factory=list)

    async def observe(self) -> Observation:
        self.looked += 1
        if self.blind is not None:
            raise self.blind
        failed, ended, self.failed, self.ended = self.failed, self.ended, (), ()
        return Observation(tuple(self.members), self.routers, failed, ended, self.orders)

    async def act(self, action: Action) -> str:
        self.asked.append(action)
        if self.hangs:
            await asyncio.sleep(3600)
        if self.refuses(action):
            raise Unavailable("not now")
        if isinstance(action, Start):
            self.members.append(Member(f"worker-{len(self.members)}", action.role, "starting", 1))
        elif isinstance(action, Stop):
            self.members = [member for member in self.members if member.id != action.id]
        return f"did {type(action).__name__}"

    async def withdraw(self, orders: Sequence[str]) -> None:
        self.withdrawn += orders
        self.orders = Orders()

    async def report(self, info: ControllerInfo) -> None:
        self.reports.append(info)

    async def close(self) -> None:
        self.closed = True


def steps(pool: Pool, seconds: int, controller: Controller | None = None, start_s: float = 0.0) -> Controller:
    """So many seconds of the controller's life, two rounds in each."""
    controller = controller or Controller(pool, SPEC, "ns")

    async def live() -> None:
        for tick in range(2 * seconds):
            await controller.step(start_s + tick / 2)

    asyncio.run(live())
    return controller


def test_it_starts_what_is_missing_and_says_so() -> None:
    pool = Pool()
    steps(pool, 60)
    assert pool.asked == [Start("both")]
    report = pool.reports[-1]
    assert (report.starts_total, report.starting, report.moves_total, report.stops_total) == (1, 1, 0, 0)
    assert report.events[-1].endswith("did Start")


def test_a_drained_worker_is_stopped_and_the_time_it_took_is_told() -> None:
    pool = Pool([SERVING, replace(SERVING, id="both-1"), DRAINED])
    controller = steps(pool, 5)
    assert Stop("worker-1") in pool.asked
    assert pool.reports[0].draining == 1
    assert pool.reports[-1].stops_total == 0  # its process is still there
    pool.ended = (("worker-1", 3.25),)
    steps(pool, 1, controller, 5.0)
    assert (pool.reports[-1].stops_total, pool.reports[-1].last_drain_s) == (1, 3.25)
    assert "worker-1 is stopped, 3.2 s after" in pool.reports[-1].events[-1]


def test_an_action_that_fails_holds_up_no_other_and_is_tried_again() -> None:
    pool = Pool([replace(SERVING), DRAINED], refuses=lambda action: isinstance(action, Stop))
    controller = steps(pool, 60)
    assert pool.asked.count(Stop("worker-1")) > 1
    assert Start("both") in pool.asked
    assert any("not now" in event for event in pool.reports[-1].events)
    pool.refuses = lambda action: False
    steps(pool, 5, controller, 60.0)
    assert [member.id for member in pool.members if member.state == "draining"] == []


def test_after_a_start_that_failed_it_waits_before_the_next() -> None:
    pool = Pool()
    controller = steps(pool, 30)
    assert len(pool.asked) == 1
    pool.members, pool.failed = [SERVING], ("worker-1: no room",)
    steps(pool, int(RETRY_S) - 1, controller, 30.0)
    assert len(pool.asked) == 1
    assert any("no room" in event for event in pool.reports[-1].events)
    steps(pool, 60, controller, 30.0 + RETRY_S)
    assert len(pool.asked) == 2


def test_an_order_is_carried_out_and_then_crossed_out() -> None:
    pool = Pool([SERVING, replace(SERVING, id="both-1")])
    controller = steps(pool, 1)
    pool.orders = Orders(drain=frozenset(["both-1"]))
    steps(pool, 1, controller, 1.0)
    assert pool.asked[0] == Drain("both-1")
    assert pool.withdrawn == []
    pool.members = [SERVING]
    steps(pool, 1, controller, 2.0)
    assert pool.withdrawn == ["drain/both-1"]


def test_orders_about_workers_of_an_earlier_deployment_are_dropped_and_the_others_hold() -> None:
    """Its ids are given again."""
    pool = Pool([SERVING, replace(SERVING, id="both-1")])
    left = Orders(frozenset(["both-1"]), restart=RestartOrder(("both-0",), 2), scale=ScaleOrder(3, 3))
    pool.orders = left
    controller = steps(pool, 1)
    assert pool.withdrawn == ["drain/both-1", "restart"]
    assert pool.asked == []
    pool.orders = left.lasting
    steps(pool, 5, controller, 1.0)
    assert pool.asked == [Start("both")]


def test_without_word_from_a_router_nothing_is_decided() -> None:
    pool = Pool(routers=())
    steps(pool, 60)
    assert pool.asked == []
    assert pool.reports


@pytest.mark.parametrize("blind", [Unavailable("Redis is gone"), TimeoutError(), ValueError("a policy's own mistake")])
def test_it_outlives_whatever_a_round_raises(blind: Exception) -> None:
    pool = Pool(blind=blind)
    with running(Controller(pool, SPEC, "ns")):
        wait_until(lambda: pool.looked > 1, 10)
        pool.blind = None
        wait_until(lambda: bool(pool.reports), 10)
    assert pool.closed


def test_it_ends_with_the_block_whatever_it_is_doing() -> None:
    pool = Pool([SERVING, DRAINED], hangs=True)
    with running(Controller(pool, SPEC, "ns")):
        wait_until(lambda: bool(pool.asked), 10)
    assert pool.closed
    assert "controller" not in {thread.name for thread in threading.enumerate()}
