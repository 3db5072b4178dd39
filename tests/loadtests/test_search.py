"""The search finds the smallest deployment that passes, and asks little. What passes is a closed form here."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cluster.errors import ConfigError
from cluster.perfmodel import decode_ms
from loadtests.simulator.generators import generate
from loadtests.simulator.hardware import Shape, Speed, speed
from loadtests.simulator.search import Found, Pools, cheapest, largest_batch, matched
from loadtests.simulator.traffic import Traffic, traffic

ONE, TWO = Shape(1), Shape(2)
H100 = speed("Llama-3-70B", "H100", Shape(4), "fp8")
LIGHT = Traffic(20_000, 1_000, new_tokens=4000, cached_tokens=1000, context=5000, longest=30_000)


def needs(prefill: int, decode: int, asked: list[Pools]) -> Callable[[Pools], float]:
    """Passes with at least so many; of double shards half as many."""

    def measure(pools: Pools) -> float:
        asked.append(pools)
        if not pools.prefill:
            return 1.0 if pools.gpus >= prefill + decode else 0.0
        enough = (
            pools.prefill * pools.prefill_shape.gpus >= prefill and pools.decode * pools.decode_shape.gpus >= decode
        )
        return 1.0 if enough else 0.5

    return measure


def disaggregated(prefill: Shape = ONE, decode: Shape = ONE) -> Pools:
    return Pools(1, 1, prefill, decode)


@pytest.mark.parametrize(("prefill", "decode"), [(1, 1), (3, 1), (7, 12), (20, 9), (31, 64)])
@pytest.mark.parametrize("error", [0.8, 1.0, 1.6, 3.0])
def test_the_smallest_that_passes_is_found_with_few_questions(prefill: int, decode: int, error: float) -> None:
    asked: list[Pools] = []
    shares = (prefill / error, decode / 1.3)  # what the model says is off, and not in proportion
    (found,) = cheapest([(disaggregated(), shares)], needs(prefill, decode, asked), 0.9, 1000)
    assert found == Found(Pools(prefill, decode, ONE, ONE), 1.0)
    assert len(asked) == len(set(asked)) <= 30


def test_aggregated_is_one_pool() -> None:
    (found,) = cheapest([(Pools(0, 1, ONE, ONE), (3.0, 2.0))], needs(4, 3, []), 0.9, 1000)
    assert found.pools == Pools(0, 7, ONE, ONE)


def test_cheaper_ones_come_first_and_hopeless_ones_are_not_measured() -> None:
    asked: list[Pools] = []
    candidates = [
        (disaggregated(TWO, TWO), (30.0, 30.0)),  # 120 GPUs: cannot win
        (disaggregated(), (8.0, 8.0)),
        (disaggregated(TWO, ONE), (4.0, 8.0)),
    ]
    found = cheapest(candidates, needs(9, 10, asked), 0.9, 1000)
    assert [f.pools.gpus for f in found] == sorted(f.pools.gpus for f in found)
    assert found[0].pools == Pools(9, 10, ONE, ONE)
    assert all(p.decode_shape == ONE for p in asked)


def test_nothing_is_found_where_nothing_passes_within_the_budget() -> None:
    assert cheapest([(disaggregated(), (8.0, 8.0))], needs(9, 10, []), 0.9, 18) == []
    assert cheapest([(disaggregated(), (8.0, 8.0))], lambda pools: 0.89, 0.9, 1000) == []
    assert cheapest([], lambda pools: 1.0, 0.9, 1000) == []


def test_matching_grows_with_what_is_asked_and_shrinks_with_what_is_cached() -> None:
    prefill, decode = matched(LIGHT, H100, H100, 50.0) or (0.0, 0.0)
    more = Traffic(40_000, 2_000, 4000, 1000, 5000, 30_000)
    assert matched(more, H100, H100, 50.0) == pytest.approx((2 * prefill, 2 * decode))
    # 70B fp8 on four H100: about 19 thousand tokens of prefill a second
    assert prefill == pytest.approx(20_000 / 19_000 / 0.9, rel=0.1)
    tighter = matched(LIGHT, H100, H100, 20.0)
    assert tighter is not None
    assert tighter[0] == prefill
    assert tighter[1] > decode


def test_what_cannot_be_is_not_matched() -> None:
    assert matched(LIGHT, H100, H100, 1.0) is None  # not even one sequence decodes that fast
    assert matched(Traffic(1, 1, 1, 1, 1, longest=10_000_000), H100, H100, 50.0) is None
    assert matched(LIGHT, H100, speed("Llama-3-70B", "H100", ONE, "fp8"), 50.0) is None  # the weights do not fit


def test_the_largest_batch_meets_the_slo_and_one_more_would_not() -> None:
    batch = largest_batch(H100, 5000, 30.0)
    assert decode_ms(H100.rates, batch, batch * 5000) <= 30.0 < decode_ms(H100.rates, batch + 1, (batch + 1) * 5000)
    small = Speed(H100.rates, kv_tokens=12_000, kv_bytes=H100.kv_bytes)
    assert largest_batch(small, 5000, 30.0) == 2


def test_traffic_is_what_the_trace_says() -> None:
    plain = traffic(generate("poisson:rate=10,seconds=500,input=1000,output=100"))
    assert plain.uncached_tokens_s == pytest.approx(10_000, rel=0.05)
    assert plain.output_tokens_s == pytest.approx(1000, rel=0.05)
    assert (plain.new_tokens, plain.cached_tokens, plain.context, plain.longest) == (1000, 0, 1050, 1100)
    behind = traffic(generate("shared:rate=10,seconds=500,prompts=1,system=640,input=1000"))
    assert behind.hit_ratio == pytest.approx(0.64, abs=0.01)


def test_names_that_are_not_known_are_errors_that_say_which_are() -> None:
    with pytest.raises(ConfigError, match="Llama-3-8B"):
        speed("nothing", "H100", ONE)
    with pytest.raises(ConfigError, match="H200"):
        speed("Llama-3-8B", "abacus", ONE)


def test_the_command_serves_what_was_found() -> None:
    assert Pools(3, 2, Shape(4), Shape(8)).command == "--prefill 3 --decode 2 --prefill-tp 4 --decode-tp 8"
    assert Pools(0, 2, ONE, Shape(2, 2)).command == "--prefill 0 --decode 2 --decode-tp 2 --decode-pp 2"
