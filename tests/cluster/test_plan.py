"""The plan as a whole, in charge of a deployment of fluids in virtual time."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from cluster.plan import Drain, Memory, Migrate, Start, Stop, explain
from tests.cluster.fluid import RATES, SPEC, Fluid, Mix, mix, roles

SLO = replace(SPEC, policy="slo", least=2, most=12)
LOW, HIGH = mix(0.5, 0.5), mix(4, 4)


def run(traffic: Sequence[tuple[float, Mix]], *, most: int = 12, least: int = 2, seed: int = 0) -> Fluid:
    """Under a mix until a time, then another one."""

    def at(now: float) -> Mix:
        return next((each for until, each in traffic if now < until), traffic[-1][1])

    return Fluid(replace(SLO, most=most, least=least), roles(1, 1), at, seed)


def kinds(fluid: Fluid, kind: type) -> list[float]:
    return [at for at, action in fluid.actions if isinstance(action, kind)]


@pytest.mark.parametrize("seed", [0, 1])
def test_it_grows_with_the_load_and_shrinks_after_it_and_loses_nothing(seed: int) -> None:
    fluid = run([(30, LOW), (200, HIGH), (520, LOW), (600, Mix(0, 1, 1))], seed=seed)
    fluid.run(30)
    assert len(fluid.workers) == 2
    fluid.run(200)
    assert 10 <= len(fluid.workers) <= 12
    assert min(fluid.count("prefill"), fluid.count("decode")) >= 4
    assert fluid.mean_ttft(170, 200) < 2.0
    fluid.run(520)
    assert len(fluid.workers) <= 4
    assert fluid.mean_ttft(260, 520) < 2.0
    assert len(kinds(fluid, Stop)) == len(kinds(fluid, Drain))
    fluid.run(600)
    assert fluid.finished == fluid.arrived


def test_the_first_reaction_takes_seconds_and_it_does_not_pump() -> None:
    fluid = run([(30, LOW), (150, HIGH)])
    fluid.run(150)
    starts = kinds(fluid, Start)
    assert 30 < starts[0] < 38
    assert kinds(fluid, Drain) == []
    assert len(starts) <= 10


@pytest.mark.parametrize("seed", [0, 1])
def test_a_constant_load_neither_starts_nor_drains_nor_moves(seed: int) -> None:
    fluid = Fluid(SLO, roles(4, 4), lambda now: mix(2.7, 2.7), seed)
    fluid.run(600)
    assert fluid.actions == []


def test_the_budget_holds_and_everything_ends_all_the_same() -> None:
    fluid = run([(60, HIGH), (400, Mix(0, 1, 1))], most=3)
    fluid.run(400)
    assert len(fluid.workers) <= 3
    assert fluid.finished == fluid.arrived


def test_it_goes_to_nothing_and_comes_back_with_the_first_request_held() -> None:
    fluid = run([(20, LOW), (500, Mix(0, 1, 1)), (560, LOW)], least=0)
    fluid.run(500)
    assert fluid.workers == []
    fluid.run(560)
    assert len(fluid.workers) >= 2
    assert fluid.mean_ttft(500, 560) >= 1.0
    assert max(ttft for at, ttft in fluid.ttfts if at > 500) < RATES.start_s + 10


def test_a_worker_that_dies_for_good_is_made_up_for() -> None:
    fluid = Fluid(SLO, roles(3, 3), lambda now: mix(2, 2))
    fluid.run(40)
    fluid.kill("w0000")
    fluid.run(100)
    assert fluid.count("prefill") >= 2
    assert len(fluid.workers) >= 6


def test_a_controller_that_begins_anew_forgets_nothing_that_matters() -> None:
    fluid = run([(30, LOW), (150, HIGH), (600, LOW)])
    for second in range(0, 400, 25):
        fluid.run(second)
        fluid.memory = Memory()
    assert fluid.count("prefill") + fluid.count("decode") >= 2
    assert fluid.arrived - fluid.finished < 100
    assert [action for _, action in fluid.actions if isinstance(action, Migrate)] == []


def test_words_come_with_actions_only() -> None:
    assert explain(Memory()) == ""
    assert explain(Memory(notes=("a", "b"))) == "a; b"
