"""Fetch or recompute, as the pure function it is."""

import itertools

import pytest

from cluster.perfmodel import PerfModel
from kvstore.fetcher import Path, Source
from kvstore.layout import Layout
from workers.fetching import MAX_TIMEOUT_S, MIN_TIMEOUT_S, NOTHING, choose

LAYOUT = Layout(heads=8, layers=32, tokens=16, dim=128, dtype="bfloat16", itemsize=2)  # 2 MiB a block
TOKENS = 40 * 16 + 5


def model(
    memory_gbps: float = 4.0, disk_gbps: float = 1.0, remote_gbps: float = 1.0, token_ms: float = 1.0
) -> PerfModel:
    """One that has seen these speeds often."""
    made = PerfModel(512)
    speeds: dict[Path, float] = {"memory": memory_gbps, "disk": disk_gbps, "remote": remote_gbps}
    for (path, speed), blocks in itertools.product(speeds.items(), [1, 10, 40] * 40):
        made.observe_fetch(blocks * LAYOUT.block_bytes, path, 0.5 + blocks * LAYOUT.block_bytes / speed / 1e6)
    for tokens in [16, 128, 512] * 60:
        made.observe_step([(tokens, 0)], 1 + tokens * token_ms)
    return made


def runs(*ends: int, path: Path = "memory") -> list[Source]:
    spans = zip((0, *ends), ends, strict=False)
    return [Source(f"store{i}", 1, start, stop, path) for i, (start, stop) in enumerate(spans)]


def test_what_is_cheaper_is_fetched_whole() -> None:
    choice = choose(runs(10, 40), 0, TOKENS, model(), LAYOUT)
    assert choice.sources == tuple(runs(10, 40))
    assert choice.passed_over == ()


def test_what_is_dearer_is_computed() -> None:
    choice = choose(runs(10, 40), 0, TOKENS, model(memory_gbps=0.01), LAYOUT)
    assert choice.sources == ()
    assert choice.passed_over == tuple(runs(10, 40))


def test_a_fast_run_is_taken_and_the_slow_one_behind_it_is_not() -> None:
    sources = [Source("near", 1, 0, 20, "memory"), Source("far", 1, 20, 40, "remote")]
    choice = choose(sources, 0, TOKENS, model(remote_gbps=0.02), LAYOUT)
    assert (choice.sources, choice.passed_over) == ((sources[0],), (sources[1],))


def test_a_slow_run_is_worth_it_when_what_lies_behind_it_is_fast() -> None:
    """20 ms a block from the disk against 16 ms of computing, but 0.5 ms for the many behind it."""
    sources = [Source("near", 1, 0, 5, "disk"), Source("other", 1, 5, 40, "memory")]
    slow = model(disk_gbps=2.1 / 20)
    assert choose(sources[:1], 0, TOKENS, slow, LAYOUT).sources == ()
    assert choose(sources, 0, TOKENS, slow, LAYOUT).sources == tuple(sources)


@pytest.mark.parametrize(("hits", "first"), [(0, 0), (7, 7), (10, 10), (25, 25)])
def test_hits_on_the_device_are_not_fetched(hits: int, first: int) -> None:
    choice = choose(runs(10, 40), hits, TOKENS, model(), LAYOUT)
    assert (choice.sources[0].start, choice.sources[-1].stop) == (first, 40)


@pytest.mark.parametrize(("tokens", "blocks"), [(640, 39), (641, 40), (17, 1)])
def test_a_token_is_left_to_compute(tokens: int, blocks: int) -> None:
    assert choose(runs(40), 0, tokens, model(), LAYOUT).sources == tuple(runs(blocks))


@pytest.mark.parametrize("hits", [40, 45])
def test_nothing_to_fetch(hits: int) -> None:
    assert choose(runs(40), hits, 10_000, model(), LAYOUT) == NOTHING
    assert choose([], 0, TOKENS, model(), LAYOUT) == NOTHING
    assert choose(runs(40), 0, 16, model(), LAYOUT) == NOTHING


def test_nothing_behind_a_gap() -> None:
    sources = [Source("a", 1, 0, 5, "memory"), Source("b", 1, 6, 40, "memory")]
    assert choose(sources, 0, TOKENS, model(), LAYOUT).sources == (sources[0],)
    assert choose(sources[1:], 0, TOKENS, model(), LAYOUT) == NOTHING


def test_the_deadline_is_what_computing_would_take_within_bounds() -> None:
    assert choose(runs(40), 0, TOKENS, model(token_ms=2.0), LAYOUT).timeout_s == pytest.approx(1.28, rel=0.2)
    assert choose(runs(1), 0, TOKENS, model(), LAYOUT).timeout_s == MIN_TIMEOUT_S
    assert choose(runs(4000), 0, 64_001, model(), LAYOUT).timeout_s == MAX_TIMEOUT_S
