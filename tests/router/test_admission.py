"""Who may wait, who goes next, who is refused and when to come back: on values."""

from __future__ import annotations

import math
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import Overloaded
from cluster.messages import Rates, Role
from router.admission import (
    AHEAD_MS,
    Limits,
    Outlook,
    Throughput,
    admit,
    alone_ms,
    hopeless,
    may_go,
    outlook,
    refusal,
    retry_after_s,
)
from router.fair_queue import FairQueue, Waiting
from router.table import FleetTable, WorkerView

RATES = Rates((10.0, 1.0, 0.0), (10.0, 1.0, 0.0), (1.0, 0.0), (1.0, 0.0), (1.0, 0.0), step_tokens=100)
READY = Outlook(backlog_ms=0.0, token_ms=1.0, slots=8, compute_ms=1.0)
NOBODY = Outlook(math.inf, math.inf, 0, math.inf)
_numbers = count()


def waiting(tenant: str = "a", tokens: int = 10, priority: int = 0, deadline_s: float | None = None) -> Waiting:
    number = next(_numbers)
    return Waiting(f"r{number}", tenant, priority, tokens, 0.0, deadline_s)


def filled(*items: Waiting) -> FairQueue:
    queue = FairQueue()
    for item in items:
        queue.push(item)
    return queue


def ask(queue: FairQueue, item: Waiting, limits: Limits, view: Outlook = READY) -> tuple[Waiting, ...]:
    return admit(queue, item, limits, view, prefill_ms=10.0, now_s=0.0, jitter=0.5)


def fleet(*workers: tuple[Role, int, int]) -> FleetTable:
    """Workers as (role, sequences, waiting tokens)."""
    table = FleetTable(16, 1)
    for number, (role, running, tokens) in enumerate(workers):
        table.put(WorkerView(f"w{number}", role, "n", number, running, tokens, 0, 100, 100, RATES))
    return table


def test_whoever_finds_room_may_wait() -> None:
    assert ask(filled(*(waiting() for _ in range(7))), waiting(), Limits(8)) == ()


def test_refuses_when_so_many_wait_and_says_when_to_come_back() -> None:
    queue = filled(*(waiting(tokens=1_000) for _ in range(8)))
    with pytest.raises(Overloaded, match="8 requests of 8000 prompt tokens are waiting") as error:
        ask(queue, waiting(), Limits(8))
    assert error.value.retry_after_s == pytest.approx(4.0)  # half of 8,000 tokens at a token a millisecond


def test_refuses_more_tokens_than_are_computed_in_time() -> None:
    queue = filled(waiting(tokens=9_000))
    limits = Limits(100, wait_s=10.0)
    assert ask(queue, waiting(tokens=1_000), limits) == ()
    with pytest.raises(Overloaded):
        ask(queue, waiting(tokens=1_001), limits)


def test_a_request_that_is_larger_than_the_limit_waits_alone() -> None:
    assert ask(FairQueue(), waiting(tokens=10**9), Limits(100, wait_s=1.0)) == ()


def test_while_nobody_is_there_only_requests_are_counted() -> None:
    queue = filled(waiting(tokens=10**6))
    assert ask(queue, waiting(), Limits(2), NOBODY) == ()
    with pytest.raises(Overloaded):
        ask(queue, waiting(), Limits(1), NOBODY)


def test_a_higher_priority_takes_the_place_of_the_lowest() -> None:
    low, lower = waiting(priority=1), waiting(priority=2)
    queue = filled(low, waiting(priority=0), lower)
    assert ask(queue, waiting(priority=1, tenant="b"), Limits(3)) == (lower,)
    assert len(queue) == 3  # deciding changes nothing
    with pytest.raises(Overloaded):
        ask(queue, waiting(priority=2), Limits(3))


def test_as_many_go_as_it_takes_and_nobody_if_that_does_not_help() -> None:
    small = [waiting(priority=1, tokens=300) for _ in range(3)]
    queue = filled(waiting(tokens=100), *small)
    limits = Limits(100, wait_s=1.0)
    assert ask(queue, waiting(tokens=500), limits) == (small[2], small[1])
    with pytest.raises(Overloaded):
        ask(queue, waiting(tokens=950), limits)


def test_a_flood_does_not_keep_others_out() -> None:
    flood = [waiting("flood") for _ in range(8)]
    queue = filled(*flood)
    assert ask(queue, waiting("quiet"), Limits(8)) == (flood[-1],)
    with pytest.raises(Overloaded):
        ask(queue, waiting("flood"), Limits(8))


@given(
    st.lists(st.builds(waiting, st.sampled_from("abc"), st.integers(1, 500), st.integers(-1, 2)), max_size=20),
    st.builds(waiting, st.sampled_from("abcd"), st.integers(1, 500), st.integers(-1, 2)),
    st.integers(1, 10),
    st.floats(0.001, 2.0),
)
def test_limits_hold_and_nobody_goes_for_somebody_who_stands_later(
    items: list[Waiting], newcomer: Waiting, requests: int, wait_s: float
) -> None:
    queue, limits = FairQueue(), Limits(requests, wait_s)
    for item in (*items, newcomer):
        try:
            displaced = ask(queue, item, limits)
        except Overloaded:
            assert len(queue) >= requests or queue.tokens + item.tokens > 1000 * wait_s
            continue
        standings = {worst.id: standing for worst, standing in queue.worst_first()}
        assert all(standings[other.id] > queue.standing(item) for other in displaced)
        for other in displaced:
            queue.remove(other.id)
        queue.push(item)
        assert len(queue) <= requests
        assert queue.tokens <= 1000 * wait_s or len(queue) == 1


def test_a_deadline_that_will_be_missed_is_refused_with_the_estimate() -> None:
    queue = filled(*(waiting(tokens=100) for _ in range(5)))
    view = Outlook(backlog_ms=200.0, token_ms=1.0, slots=1, compute_ms=1.0)
    assert ask(queue, waiting(deadline_s=0.711), Limits(8), view) == ()
    with pytest.raises(Overloaded, match=r"within 700 ms and would be late \(predicted in 710 ms\)") as error:
        ask(queue, waiting(deadline_s=0.7), Limits(8), view)
    assert error.value.retry_after_s is not None


def test_a_deadline_counts_only_what_goes_before() -> None:
    queue = filled(*(waiting("flood", tokens=1_000) for _ in range(5)))
    assert ask(queue, waiting("quiet", deadline_s=0.1), Limits(8)) == ()
    assert ask(queue, waiting("flood", priority=-1, deadline_s=0.1), Limits(8)) == ()
    with pytest.raises(Overloaded):
        ask(queue, waiting("flood", deadline_s=0.1), Limits(8))


def test_a_deadline_while_nobody_is_there() -> None:
    with pytest.raises(Overloaded, match="no worker is there yet"):
        ask(FairQueue(), waiting(deadline_s=100.0), Limits(8), NOBODY)


def test_a_deadline_is_hopeless_once_even_the_next_place_is_too_late() -> None:
    view = Outlook(backlog_ms=300.0, token_ms=1.0, slots=1, compute_ms=1.0)
    item = waiting(deadline_s=1.0)
    assert not hopeless(item, view, prefill_ms=100.0, now_s=0.59)
    assert hopeless(item, view, prefill_ms=100.0, now_s=0.61)
    assert not hopeless(waiting(), view, prefill_ms=100.0, now_s=1e9)


def test_requests_go_while_workers_would_run_dry_and_have_room() -> None:
    assert may_go(READY, 0, 0)
    assert not may_go(Outlook(AHEAD_MS, 1.0, 8, 1.0), 0, 0)
    assert may_go(Outlook(AHEAD_MS - 100, 1.0, 8, 1.0), 1, 99)
    assert not may_go(Outlook(AHEAD_MS - 100, 1.0, 8, 1.0), 1, 100)
    assert not may_go(Outlook(0.0, 1.0, 2, 1.0), 2, 0)
    assert not may_go(NOBODY, 0, 0)


def test_the_outlook_of_a_fleet() -> None:
    """100 tokens take a worker 110 ms; it has four slots, and one request that waits for one."""
    view = outlook(fleet(("prefill", 0, 0), ("prefill", 3, 100), ("decode", 4, 0), ("decode", 7, 0)), 4, Throughput())
    assert (view.backlog_ms, view.slots) == (0.0, 1)
    assert view.token_ms == view.compute_ms == pytest.approx(110 / 100 / 2)
    assert outlook(fleet(("both", 1, 300)), 4, Throughput()).backlog_ms == pytest.approx(330.0)
    assert outlook(fleet(("prefill", 1, 0)), 4, Throughput()).slots == 4  # an engine takes any job
    assert outlook(fleet(), 4, Throughput()) == NOBODY


def test_a_worker_without_free_blocks_takes_nothing_in() -> None:
    table = fleet(("both", 2, 0), ("both", 0, 0))
    table.put(WorkerView("w0", "both", "n", 0, 2, 0, 0, 0, 100, RATES))
    table.put(WorkerView("w1", "both", "n", 1, 0, 0, 0, 0, 100, RATES))
    assert outlook(table, 4, Throughput()).slots == 5  # of w1, which has nothing that would end


def test_the_limit_of_tokens_is_of_the_model_and_not_of_a_bad_minute() -> None:
    slow = Outlook(backlog_ms=0.0, token_ms=1_000.0, slots=1, compute_ms=1.0)
    assert ask(filled(waiting(tokens=9_000)), waiting(tokens=500), Limits(100, wait_s=10.0), slow) == ()


def test_a_prompt_alone() -> None:
    assert alone_ms(fleet(("prefill", 9, 9_000), ("decode", 0, 0)), 250) == pytest.approx(3 * 10 + 250)
    assert alone_ms(fleet(), 250) == math.inf


def test_throughput_is_the_models_word_until_measured() -> None:
    throughput = Throughput()
    assert throughput.token_ms(0.5) == 0.5
    for _ in range(1_000):
        throughput.observe(100.0, 50)
    assert throughput.token_ms(0.5) == pytest.approx(1.86, abs=0.02)  # of 2, measured over the last ten seconds
    for _ in range(1_000):
        throughput.observe(100.0, 1_000)
    assert throughput.token_ms(0.5) == pytest.approx(0.136, abs=0.01)  # of 0.1


@pytest.mark.parametrize("waits", [0, 1, 256])
@pytest.mark.parametrize("view", [NOBODY, READY, Outlook(10**9, 1e9, 0, 1.0), Outlook(0.0, 0.0, 1, 0.0)])
@pytest.mark.parametrize("jitter", [0.0, 0.999])
def test_delay_stays_within_what_clients_obey(waits: int, view: Outlook, jitter: float) -> None:
    queue = filled(*(waiting() for _ in range(waits)))
    assert 1.0 <= retry_after_s(queue, view, jitter) <= 30.0
    assert refusal(queue, view, jitter).retry_after_s == retry_after_s(queue, view, jitter)


def test_jitter_spreads_retries() -> None:
    queue = filled(waiting(tokens=20_000))
    assert retry_after_s(queue, READY, 0.0) < retry_after_s(queue, READY, 0.5) < retry_after_s(queue, READY, 0.99)


def test_throughput_counts_time_only_while_something_waits() -> None:
    throughput = Throughput()
    throughput.served(1_000)  # while nothing waits: says nothing
    throughput.advance(10.0, waiting=True)
    throughput.advance(12.0, waiting=True)
    throughput.served(500)
    throughput.advance(14.0, waiting=False)
    throughput.advance(99.0, waiting=True)
    expected = Throughput()
    expected.observe(4_000.0, 500)
    assert throughput.token_ms(1.0) == expected.token_ms(1.0)
