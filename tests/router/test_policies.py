"""The policies there are to compare with, each by its rule."""

from __future__ import annotations

import random
from typing import get_args

import pytest

from cluster.config import Placement
from router.placement import Ask, Route, place
from router.policies import POLICIES
from tests.router.workers import Known, chain, view


def routes(known: Known, policy: str, count: int, seed: int = 0) -> list[Route]:
    """Of that many prompts with a chain of their own, nothing else happening."""
    rng, found = random.Random(seed), []
    for number in range(count):
        decision = place(known.table, Ask(600, 50), known.map.lookup(chain(number, 30)), policy, rng)
        known.table.placed(decision)
        assert decision.policy == policy
        found.append(decision.route)
    return found


def fleet(*ids: str) -> Known:
    return Known(*(view(worker_id) for worker_id in ids))


def test_every_policy_of_the_configuration_is_there() -> None:
    assert set(get_args(Placement)) == POLICIES.keys()


@pytest.mark.parametrize("policy", sorted(POLICIES.keys() - {"least_time"}))
def test_with_prefill_and_decode_workers_every_other_policy_hands_over(policy: str) -> None:
    assert all(route.prefill is not None for route in routes(fleet("p1", "p2", "d1", "d2"), policy, 8))
    assert all(route.prefill is None for route in routes(fleet("b1", "b2"), policy, 8))


def test_round_robin_takes_turns() -> None:
    found = routes(fleet("p1", "p2", "p3", "d1", "d2"), "round_robin", 12)
    assert [route.prefill for route in found] == ["p1", "p2", "p3"] * 4
    assert [route.decode for route in found] == ["d1", "d2"] * 6


def test_random_is_that_of_the_seed() -> None:
    known = fleet("p1", "p2", "p3", "d1", "d2")
    first = routes(known, "random", 60, seed=1)
    assert first == routes(known, "random", 60, seed=1) != routes(known, "random", 60, seed=2)
    assert {route.prefill for route in first} == {"p1", "p2", "p3"}
    assert {route.decode for route in first} == {"d1", "d2"}


def test_least_loaded_counts_the_queue_and_then_the_batch() -> None:
    known = fleet("p1", "p2", "d1", "d2")
    known.change("p1", waiting_tokens=100)
    known.change("d1", running=2)
    assert routes(known, "least_loaded", 1) == [Route("p2", "d2")]


def test_prefix_affinity_does_not_look_at_the_queue() -> None:
    known = fleet("p1", "p2", "d1", "d2")
    known.cache("p1", chain(0, 1))
    known.change("p1", waiting_tokens=1_000_000)
    known.change("d1", running=2)
    assert routes(known, "prefix_affinity", 1) == [Route("p1", "d2")]


def test_power_of_two_never_takes_the_worst_and_not_always_the_best() -> None:
    known = fleet("p1", "p2", "p3", "d1")
    known.change("p2", waiting_tokens=500)
    known.change("p3", waiting_tokens=5_000)
    assert {route.prefill for route in routes(known, "power_of_two", 60)} == {"p1", "p2"}
    assert routes(fleet("b1"), "power_of_two", 1) == [Route(None, "b1")]
