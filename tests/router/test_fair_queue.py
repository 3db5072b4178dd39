"""The order of the queue: priorities, equal shares, first come first served, and what is given up first."""

from __future__ import annotations

from collections import Counter
from itertools import count

from hypothesis import given
from hypothesis import strategies as st

from router.fair_queue import OUTPUT_WEIGHT, FairQueue, Waiting

_numbers = count()


def waiting(tenant: str = "a", tokens: int = 10, priority: int = 0, deadline_s: float | None = None) -> Waiting:
    number = next(_numbers)
    return Waiting(f"r{number}", tenant, priority, tokens, float(number), deadline_s)


def filled(*items: Waiting) -> FairQueue:
    queue = FairQueue()
    for item in items:
        queue.push(item)
    return queue


def drained(queue: FairQueue) -> list[Waiting]:
    out = []
    while (item := queue.pop()) is not None:
        out.append(item)
    return out


SIZES = st.lists(st.integers(1, 1_000), min_size=1, max_size=30)
ITEMS = st.lists(st.builds(waiting, st.sampled_from("abc"), st.integers(1, 1_000), st.integers(-1, 2)), max_size=40)


def test_an_empty_queue() -> None:
    queue = FairQueue()
    assert queue.pop() is None
    assert queue.peek() is None
    assert queue.remove("nobody") is None
    assert (len(queue), queue.tokens) == (0, 0)
    assert list(queue.worst_first()) == []


def test_first_come_first_served_within_a_tenant() -> None:
    items = [waiting(tokens=tokens) for tokens in (500, 1, 30)]
    assert drained(filled(*items)) == items


def test_a_tenant_that_sends_much_only_waits_longer_itself() -> None:
    flood = [waiting("flood") for _ in range(50)]
    late = waiting("quiet")
    queue = filled(*flood, late)
    assert queue.pop() == flood[0]  # it was there first, and both had nothing
    assert queue.pop() == late


def test_lower_numbers_go_first() -> None:
    low, normal, high = waiting(priority=5), waiting(priority=0), waiting(priority=-3)
    assert drained(filled(low, normal, high)) == [high, normal, low]


def test_output_counts_twice() -> None:
    queue = FairQueue()
    for tenant in "ab":
        queue.push(waiting(tenant, tokens=10))
    assert [queue.pop(), queue.pop()] != [None, None]
    for _ in range(10):
        queue.push(waiting("a", tokens=10))
        queue.push(waiting("b", tokens=10))
    queue.charge("a", OUTPUT_WEIGHT * 25)
    served = [item.tenant for item in drained(queue)]
    assert served[:5] == ["b"] * 5  # 25 output tokens of `a` weigh as much as five prompts of 10
    assert Counter(served[5:15]) == {"a": 5, "b": 5}


def test_a_prompt_that_was_cached_is_given_back() -> None:
    queue = filled(*(waiting("a") for _ in range(3)), *(waiting("b") for _ in range(3)))
    first = queue.pop()
    assert first is not None
    assert first.tenant == "a"
    queue.charge("a", -first.tokens)
    again = queue.pop()
    assert again is not None
    assert again.tenant == "a"


def test_idleness_saves_nothing_up() -> None:
    """A tenant that comes after the other was served for long gets its half from then on, not all."""
    queue = filled(*(waiting("busy") for _ in range(200)))
    for _ in range(100):
        queue.pop()
    for _ in range(100):
        queue.push(waiting("late"))
    assert Counter(item.tenant for item in drained(queue)[:100]) == {"busy": 50, "late": 50}


def test_a_tenant_that_had_left_is_not_made_to_pay_for_the_past() -> None:
    """Nor does it return with what it had left unused: whoever left last sets the level."""
    queue = filled(*(waiting("a", tokens=1_000) for _ in range(10)))
    drained(queue)
    for _ in range(20):
        queue.push(waiting("b"))
        queue.push(waiting("a"))
    assert Counter(item.tenant for item in drained(queue)[:20]) == {"a": 10, "b": 10}


def test_priorities_do_not_share_counters() -> None:
    """What a tenant was given before others of its priority came does not push it back in another."""
    queue = filled(*(waiting("a", 1_000, priority=1) for _ in range(5)))
    drained(queue)
    queue.push(waiting("b", priority=0))
    queue.push(waiting("a", priority=0))
    assert [item.tenant for item in drained(queue)] == ["b", "a"]


@given(SIZES, SIZES, st.data())
def test_two_backlogged_tenants_get_the_same(a: list[int], b: list[int], data: st.DataObject) -> None:
    """The paper's bound in tokens charged: while both wait, they differ by at most the largest charge."""
    queue = filled(*(waiting("a", tokens) for tokens in a), *(waiting("b", tokens) for tokens in b))
    served = {"a": 0, "b": 0}
    largest = max(a + b)
    while {item.tenant for item in queue} == {"a", "b"}:
        item = queue.pop()
        assert item is not None
        output = data.draw(st.integers(0, 20))
        queue.charge(item.tenant, OUTPUT_WEIGHT * output)
        served[item.tenant] += item.tokens + OUTPUT_WEIGHT * output
        assert abs(served["a"] - served["b"]) <= largest + OUTPUT_WEIGHT * 20


@given(SIZES, SIZES, st.data())
def test_leaving_unserved_neither_costs_nor_brings_anything(a: list[int], b: list[int], data: st.DataObject) -> None:
    """One tenant's clients leave all the time, and new ones come: the other's share stays what it is."""
    queue = filled(*(waiting("a", tokens) for tokens in a), *(waiting("b", tokens) for tokens in b))
    served = {"a": 0, "b": 0}
    largest = max(a + b)
    while {item.tenant for item in queue} == {"a", "b"}:
        item = queue.pop()
        assert item is not None
        served[item.tenant] += item.tokens
        impatient = [other for other in queue if other.tenant == "a"]
        leaves = data.draw(st.booleans())
        if impatient and leaves:
            queue.push(waiting("a", data.draw(st.integers(1, largest))))  # so that it always has something waiting
            queue.remove(data.draw(st.sampled_from(sorted(impatient, key=lambda one: one.arrival_s))).id)
        assert abs(served["a"] - served["b"]) <= largest


@given(ITEMS, st.integers(1, 1_000))
def test_nobody_starves(items: list[Waiting], tokens: int) -> None:
    """However others go on sending, a tenant's request is next once they were given as much as it stands at."""
    queue = filled(*(item for item in items if item.tenant != "c"))
    patient = waiting("c", tokens, priority=2)
    queue.push(patient)
    for item in list(queue):
        if item.priority < 2:
            queue.remove(item.id)  # a lower number goes before, for as long as there is one
    rounds = 0
    while queue.pop() != patient:
        queue.push(waiting("a", 100, priority=2))
        queue.push(waiting("b", 100, priority=2))
        rounds += 1
        assert rounds <= 2 * len(items) + 2


@given(ITEMS, st.data())
def test_sums_add_up_and_everybody_leaves_once(items: list[Waiting], data: st.DataObject) -> None:
    queue = filled(*items)
    inside = {item.id: item for item in items}
    assert queue.tokens == sum(item.tokens for item in items)
    while inside:
        served = data.draw(st.booleans())
        item = queue.pop() if served else queue.remove(data.draw(st.sampled_from(sorted(inside))))
        assert item is not None
        assert inside.pop(item.id) == item
        assert len(queue) == len(inside)
        assert queue.tokens == sum(other.tokens for other in inside.values())
        assert {other.id for other in queue} == set(inside)
    assert queue.pop() is None


@given(ITEMS)
def test_priorities_come_out_in_order(items: list[Waiting]) -> None:
    out = drained(filled(*items))
    assert [item.priority for item in out] == sorted(item.priority for item in items)
    for tenant in "abc":
        for priority in range(-1, 3):
            arrivals = [item.arrival_s for item in out if (item.tenant, item.priority) == (tenant, priority)]
            assert arrivals == sorted(arrivals)


@given(ITEMS)
def test_what_is_given_up_first(items: list[Waiting]) -> None:
    queue = filled(*items)
    order = list(queue.worst_first())
    assert {item.id for item, _ in order} == {item.id for item in items}
    standings = [standing for _, standing in order]
    assert standings == sorted(standings, reverse=True)
    assert len(queue) == len(items)  # looking changes nothing
    for tenant in "abc":
        for priority in range(-1, 3):
            arrivals = [item.arrival_s for item, _ in order if (item.tenant, item.priority) == (tenant, priority)]
            assert arrivals == sorted(arrivals, reverse=True)


def test_the_largest_queue_gives_up_first() -> None:
    flood = [waiting("flood", tokens=100) for _ in range(5)]
    queue = filled(*flood, waiting("quiet", tokens=100))
    assert [item for item, _ in queue.worst_first()][:4] == flood[:0:-1]
    assert queue.standing(waiting("quiet", tokens=100)) < (0, 500.0)
    assert queue.standing(waiting("flood", tokens=1)) > (0, 500.0)


def test_what_is_ahead() -> None:
    mine = [waiting("me", tokens=10), waiting("me", tokens=10)]
    queue = filled(*mine, *(waiting("flood", tokens=10) for _ in range(100)), waiting("vip", 70, priority=-1))
    assert queue.ahead(mine[0]) == 70  # equals, but it came first
    assert queue.ahead(mine[1]) == 70 + 10 + 10  # its own first one, and one of the flood's
    assert queue.ahead(waiting("me")) == 70 + 20 + 20
    assert queue.ahead(waiting("new", priority=1)) == queue.tokens
    assert queue.ahead(waiting("new", priority=-2)) == 0


@given(ITEMS)
def test_what_is_ahead_is_what_goes_before_within_a_request_per_tenant(items: list[Waiting]) -> None:
    queue = filled(*items)
    predicted = {item.id: queue.ahead(item) for item in items}
    largest = max((item.tokens for item in items), default=0)
    gone = 0
    for item in drained(queue):
        assert abs(predicted[item.id] - gone) <= 2 * largest
        gone += item.tokens


def test_deadlines_are_found() -> None:
    urgent = waiting(deadline_s=3.0)
    queue = filled(waiting(), urgent)
    assert queue.with_deadline() == [urgent]
    queue.remove(urgent.id)
    assert queue.with_deadline() == []
