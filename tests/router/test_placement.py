"""Where requests go: properties that hold for every fleet, and the reasons one by one."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cluster.config import Placement
from cluster.errors import Unavailable
from cluster.perfmodel import decode_ms, fetch_ms, prefill_ms
from router.placement import Ask, Decision, Route, place
from router.policies import POLICIES
from router.table import WorkerView
from tests.router.workers import BLOCK, BLOCK_BYTES, RATES, Known, chain, table_of, view

NOTHING = np.zeros(0, dtype=np.int32)
SLOW_PROMPTS = dataclasses.replace(RATES, prefill=(10.0, 1.0, 0.0))


def route(known: Known, hashes: list[bytes], tokens: int, new_tokens: int = 50, **more: frozenset[str]) -> Decision:
    return place(known.table, Ask(tokens, new_tokens, **more), known.map.lookup(hashes))


# ---------------------------------------------------------------------------------------------------- any fleet at all
IDS = [f"{kind}{at}" for kind in "pdb" for at in range(3)]
FIELDS = {
    "node": st.sampled_from(["n1", "n2"]),
    "running": st.integers(0, 40),
    "waiting_tokens": st.integers(0, 5_000),
    "context_tokens": st.integers(0, 50_000),
    "blocks_free": st.integers(0, 300),
    "sent_tokens": st.integers(0, 2_000),
    "sent_sequences": st.integers(0, 3),
    "sent_context": st.integers(0, 2_000),
}
VIEWS = st.dictionaries(st.sampled_from(IDS), st.fixed_dictionaries(FIELDS)).map(
    lambda fleet: [view(worker_id, IDS.index(worker_id), **fields) for worker_id, fields in fleet.items()]
)
DEPTHS = st.lists(st.integers(0, 40), min_size=11, max_size=11).map(lambda values: np.array(values, dtype=np.int32))
STORES = ((9, "n1"), (10, "n2"))
ASKS = st.builds(Ask, st.integers(1, 1_000), st.integers(1, 300), st.frozensets(st.sampled_from(IDS)), st.just(True))


def decide(views: list[WorkerView], ask: Ask, depths: np.ndarray, policy: str = "least_time") -> Decision:
    table = table_of(*views)
    for owner, node in STORES:
        table.set_store(owner, node)
    return place(table, ask, depths, policy)


@settings(deadline=None)
@given(VIEWS, ASKS, DEPTHS, st.sampled_from(sorted(POLICIES)))
def test_routes_are_sound(views: list[WorkerView], ask: Ask, depths: np.ndarray, policy: str) -> None:
    usable = {one.id: one for one in views if one.id not in ask.excluded}
    if not usable:
        with pytest.raises(Unavailable) as error:
            decide(views, ask, depths, policy)
        assert error.value.retry_after_s is not None
        return
    decision = decide(views, ask, depths, policy)
    prefill, decode = decision.route.prefill, decision.route.decode
    assert decode in usable
    assert prefill is None or usable[prefill].role == "prefill" != usable[decode].role
    if usable[decode].role == "prefill":
        assert all(one.role == "prefill" for one in usable.values()), "only when there is nobody else"
    assert decision.candidates == len(usable)
    assert 1 <= decision.uncached_tokens <= ask.tokens
    assert np.isfinite(decision.chosen.total_ms)
    other = decision.runner_up
    assert other is None or (other.prefill, other.decode) != (prefill, decode)
    assert other is None or {other.prefill, other.decode} - {None} <= usable.keys()


@settings(deadline=None)
@given(VIEWS, ASKS, DEPTHS)
def test_equal_fleets_give_equal_routes(views: list[WorkerView], ask: Ask, depths: np.ndarray) -> None:
    assume(any(one.id not in ask.excluded for one in views))
    assert decide(views, ask, depths) == decide(list(reversed(views)), ask, depths)


@settings(deadline=None)
@given(VIEWS, ASKS, DEPTHS)
def test_nothing_that_was_looked_at_costs_much_less(views: list[WorkerView], ask: Ask, depths: np.ndarray) -> None:
    assume(any(one.id not in ask.excluded for one in views))
    decision = decide(views, ask, depths)
    if decision.runner_up is not None:
        like = max(
            1.0, 0.05 * (decision.runner_up.queue_ms + decision.runner_up.prefill_ms + decision.runner_up.fetch_ms)
        )
        assert decision.chosen.total_ms <= decision.runner_up.total_ms + like + 1e-6


@settings(deadline=None)
@given(VIEWS, ASKS, DEPTHS, st.sampled_from(IDS), st.integers(1, 5_000))
def test_more_queue_never_attracts(views: list[WorkerView], ask: Ask, depths: np.ndarray, whom: str, more: int) -> None:
    assume(any(one.id not in ask.excluded for one in views))
    if whom in workers_of(decide(views, ask, depths)):
        return
    busier = [
        dataclasses.replace(one, waiting_tokens=one.waiting_tokens + more) if one.id == whom else one for one in views
    ]
    decision = decide(busier, ask, depths)
    assert whom != decision.route.prefill
    assert (None, whom) != (decision.route.prefill, decision.route.decode)


@settings(deadline=None)
@given(VIEWS, ASKS, DEPTHS, st.sampled_from(IDS), st.integers(1, 40))
def test_a_longer_prefix_never_repels(
    views: list[WorkerView], ask: Ask, depths: np.ndarray, whom: str, more: int
) -> None:
    assume(any(one.id not in ask.excluded for one in views))
    if whom not in workers_of(decide(views, ask, depths)):
        return
    longer = depths.copy()
    longer[IDS.index(whom)] += more
    assert whom in workers_of(decide(views, ask, longer))


def workers_of(decision: Decision) -> set[str]:
    return {decision.route.decode} | ({decision.route.prefill} if decision.route.prefill else set())


# ----------------------------------------------------------------------------------------------------- one by one
def test_the_terms_are_the_performance_models() -> None:
    """Both halves, with part of the prompt on the device and part in the store of the node."""
    known = Known(view("p1", waiting_tokens=600), view("d1", running=4, context_tokens=3_000, rates=SLOW_PROMPTS))
    hashes = chain(1, 60)
    known.cache("p1", hashes[:20])
    known.store("n1", hashes[:50])
    decision = route(known, hashes, 1_000, 50)
    terms = decision.chosen
    assert decision.route == Route("p1", "d1")
    assert terms.queue_ms == pytest.approx(prefill_ms(RATES, 600, 0))
    assert (terms.device_tokens, terms.fetched_tokens) == (320, 480)
    assert terms.prefill_ms == pytest.approx(prefill_ms(RATES, 200, 800))
    assert terms.fetch_ms == pytest.approx(fetch_ms(RATES, 30 * BLOCK_BYTES, "memory"))
    after = decode_ms(RATES, 5, 3_000 + 1_000 + 25)
    assert terms.decode_ms == pytest.approx(50 * after)
    assert terms.others_ms == pytest.approx(50 * 4 * (after - decode_ms(RATES, 4, 3_000)))
    last = fetch_ms(RATES, 32 * BLOCK_BYTES, "memory")  # the blocks of one step
    whole = fetch_ms(RATES, 63 * BLOCK_BYTES, "memory") - terms.prefill_ms
    assert terms.handoff_ms == pytest.approx(max(last, whole))
    assert decision.uncached_tokens == 200
    assert decision.runner_up is not None
    assert (decision.runner_up.prefill, decision.runner_up.decode) == (None, "d1")


def test_a_prompt_goes_where_its_prefix_is() -> None:
    known = Known(view("p1"), view("p2"), view("p3"), view("d1", rates=SLOW_PROMPTS))
    hashes = chain(1, 40)
    known.cache("p2", hashes[:30])
    assert route(known, hashes, 645).route.prefill == "p2"


def test_a_hot_prefix_is_replicated_when_its_owner_is_busy() -> None:
    known = Known(view("p1"), view("p2"), view("d1", rates=SLOW_PROMPTS))
    hashes = chain(1, 40)
    known.cache("p1", hashes[:30])
    known.change("p1", waiting_tokens=200)
    assert route(known, hashes, 645).route.prefill == "p1"
    known.change("p1", waiting_tokens=1_000)
    assert route(known, hashes, 645).route.prefill == "p2"


def test_a_prefix_in_the_nodes_own_store_is_nearer_than_one_elsewhere() -> None:
    known = Known(view("p1", node="n1"), view("p2", node="n2"), view("d1", rates=SLOW_PROMPTS, node="n3"))
    hashes = chain(1, 40)
    known.store("n2", hashes)
    decision = route(known, hashes, 645)
    assert decision.route.prefill == "p2"
    assert decision.chosen.fetched_tokens == 640
    known.change("p2", waiting_tokens=900)
    decision = route(known, hashes, 645)
    assert decision.route.prefill == "p1"
    assert decision.chosen.fetch_ms == pytest.approx(fetch_ms(RATES, 40 * BLOCK_BYTES, "remote"))


def test_what_is_faster_computed_is_not_fetched() -> None:
    slow_network = dataclasses.replace(RATES, remote=(3.0, 1e-3))
    known = Known(view("b1", rates=slow_network))
    hashes = chain(1, 40)
    known.store("n2", hashes)
    assert route(known, hashes, 645).chosen.fetched_tokens == 0


def test_cold_prompts_are_spread_evenly() -> None:
    known = Known(*(view(f"p{i}") for i in range(5)), view("d1", rates=SLOW_PROMPTS))
    used: list[str | None] = []
    for number in range(20):
        decision = route(known, chain(number, 10), 170)
        known.table.placed(decision)
        used.append(decision.route.prefill)
    assert [used.count(f"p{i}") for i in range(5)] == [4] * 5


@pytest.mark.parametrize(("cached", "expected"), [(0, "p1"), (120, None)])
def test_the_end_of_a_conversation_is_computed_where_it_is_decoded(cached: int, expected: str | None) -> None:
    """Append-prefill (PPD): the few new tokens cost the decode worker less than the handoff of all others."""
    rates = dataclasses.replace(RATES, remote=(3.0, 1e-5))
    known = Known(view("p1", node="n1"), view("d1", node="n2", running=4, rates=rates))
    hashes = chain(1, 125)
    known.cache("d1", hashes[:cached])
    decision = route(known, hashes, 2_000)
    assert decision.route == Route(expected, "d1")
    assert decision.runner_up is not None
    assert decision.chosen.total_ms < decision.runner_up.total_ms


def test_sequences_that_run_make_the_prompt_dearer_where_they_are_decoded() -> None:
    known = Known(view("p1"), view("d1"))
    hashes = chain(1, 125)
    known.cache("d1", hashes[:120])
    routes = []
    for running in (1, 60):
        known.change("d1", running=running)
        routes.append(route(known, hashes, 2_000).route)
    assert routes == [Route(None, "d1"), Route("p1", "d1")]


def test_a_prefill_queue_sends_short_prompts_to_decode() -> None:
    known = Known(view("p1", waiting_tokens=20_000), view("d1", running=2))
    assert route(known, [], 200).route == Route(None, "d1")
    known.change("p1", waiting_tokens=0)
    assert route(known, [], 200).route == Route("p1", "d1")


def test_decode_goes_where_the_batch_is_small_and_the_kv_fits() -> None:
    known = Known(view("p1"), view("d1", running=8), view("d2", running=3), view("d3", running=1, blocks_free=10))
    assert route(known, [], 600).route == Route("p1", "d2")
    known.change("d2", running=40)
    assert route(known, [], 600).route == Route("p1", "d1")
    assert route(known, [], 60, 20).route.decode == "d3"


def test_a_handoff_within_a_node_is_nearer() -> None:
    known = Known(view("p1", node="n2"), view("d1", node="n1"), view("d2", node="n2"))
    assert route(known, [], 3_000).route == Route("p1", "d2")
    known.change("p1", node="n1")
    assert route(known, [], 3_000).route == Route("p1", "d1")


def test_workers_that_do_both_need_no_handoff() -> None:
    known = Known(view("b1", running=4), view("b2", running=1))
    decision = route(known, [], 600)
    assert decision.route == Route(None, "b2")
    assert decision.runner_up is not None
    assert decision.runner_up.decode == "b1"


def test_a_prefill_worker_serves_as_last_resort() -> None:
    known = Known(view("p1", waiting_tokens=5_000), view("p2"), view("d1"))
    assert route(known, [], 600, excluded=frozenset({"d1"})).route == Route(None, "p2")
    assert route(known, [], 600, excluded=frozenset({"p1", "p2"})).route == Route(None, "d1")


def test_nobody_left() -> None:
    with pytest.raises(Unavailable):
        place(table_of(), Ask(10, 10), NOTHING)


# ------------------------------------------------------------------------------------------------------------ the trap
def load_max_over_mean(policy: Placement, shared: int, requests: int = 400, workers: int = 8) -> float:
    """Of the tokens that prefill workers compute when every prompt begins with the same `shared` blocks. Prompts come
    at random and keep the workers 70 % busy, if none of them were cached; what is computed stays cached."""
    rng = random.Random(0)
    known = Known(*(view(f"p{i}") for i in range(workers)), view("d1", rates=SLOW_PROMPTS))
    computed = dict.fromkeys(known.views, 0)
    tokens = 40 * BLOCK
    mean_gap_ms = prefill_ms(RATES, tokens, 0) / workers / 0.7
    for number in range(requests):
        hashes = chain(0, shared) + chain(number + 1, 40 - shared)
        decision = place(known.table, Ask(tokens, 50), known.map.lookup(hashes), policy)
        known.table.placed(decision)
        worker = decision.route.prefill
        assert worker is not None
        computed[worker] += decision.uncached_tokens
        known.cache(worker, hashes)
        known.change(worker, waiting_tokens=known.views[worker].waiting_tokens + decision.uncached_tokens)
        passed = int(rng.expovariate(1 / mean_gap_ms) / RATES.prefill[1])  # tokens that each has computed meanwhile
        for worker_id, one in list(known.views.items()):
            if one.waiting_tokens:
                known.change(worker_id, waiting_tokens=max(0, one.waiting_tokens - passed))
    loads = [computed[f"p{i}"] for i in range(workers)]
    return max(loads) / (sum(loads) / workers)


@pytest.mark.parametrize("shared", [1, 10])
def test_a_block_that_all_prompts_share_is_no_trap(shared: int) -> None:
    assert load_max_over_mean("least_time", shared) < 1.3


def test_the_longest_prefix_first_falls_into_it() -> None:
    assert load_max_over_mean("prefix_affinity", 1) > 2.0
