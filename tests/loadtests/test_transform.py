"""A changed trace keeps what made it worth replaying."""

from __future__ import annotations

import pytest

from cluster.errors import ConfigError
from loadtests.simulator.generators import generate
from loadtests.simulator.trace import Trace, TraceRequest
from loadtests.simulator.transform import at_rate, faster, head, limit, resized, superpose

SESSIONS = generate("sessions:rate=1,seconds=50,spread=0.5")
SHARED = generate("shared:rate=5,seconds=60,prompts=3")


def reuse(trace: Trace) -> float:
    """Share of the prompt blocks that some request before had, with an unlimited cache."""
    seen: set[int] = set()
    hits = total = 0
    for r in trace.requests:
        hits += sum(block in seen for block in r.blocks)
        total += len(r.blocks)
        seen.update(r.blocks)
    return hits / total


def test_limit_and_head_keep_the_beginning() -> None:
    assert limit(SHARED, 7).requests == SHARED.requests[:7]
    assert {r.arrival_s < 10 for r in head(SHARED, 10).requests} == {True}
    assert len(head(SHARED, 10).requests) < len(SHARED.requests)


def test_faster_multiplies_the_rate_and_leaves_thinking_alone() -> None:
    assert faster(SESSIONS, 2).rate == pytest.approx(2 * SESSIONS.rate)
    assert [r.think_s for r in faster(SESSIONS, 2).requests] == [r.think_s for r in SESSIONS.requests]
    with pytest.raises(ConfigError, match="above 0"):
        faster(SESSIONS, 0)


def test_resized_prompts_share_as_many_blocks_as_before() -> None:
    small = resized(SHARED, 4, 0.5)
    assert [r.blocks for r in small.requests] == [r.blocks for r in SHARED.requests]
    for r, was in zip(small.requests, SHARED.requests, strict=True):
        assert len(r.blocks) == -(-r.prompt_tokens // 4)
        assert r.prompt_tokens == pytest.approx(was.prompt_tokens / 16, abs=1)
        assert r.output_tokens == 100


def test_superposed_copies_have_the_rate_of_many_and_nothing_in_common() -> None:
    many = superpose(SHARED, 4, seed=1)
    assert many == superpose(SHARED, 4, seed=1)
    assert many != superpose(SHARED, 4, seed=2)
    assert len(many.requests) == 4 * len(SHARED.requests)
    assert many.rate == pytest.approx(4 * SHARED.rate, rel=0.05)
    assert reuse(many) == pytest.approx(reuse(SHARED), abs=0.01)
    copies: dict[str, set[int]] = {}
    for r in many.requests:
        copies.setdefault(r.tenant, set()).update(r.blocks + r.output_blocks)
    assert len(copies) == 4
    assert sum(map(len, copies.values())) == len(set().union(*copies.values()))


def test_the_first_copy_is_the_trace_itself() -> None:
    (alone,) = (superpose(SHARED, 1).requests,)
    assert [(r.arrival_s, r.blocks) for r in alone] == [(r.arrival_s, r.blocks) for r in SHARED.requests]


def test_superposed_sessions_stay_whole() -> None:
    turns: dict[int, list[TraceRequest]] = {}
    for r in superpose(SESSIONS, 3).requests:
        turns.setdefault(r.session, []).append(r)
    assert len(turns) == 3 * len({r.session for r in SESSIONS.requests})
    assert all([r.turn for r in session] == list(range(len(session))) for session in turns.values())


def test_only_the_beginning_of_superposed_copies_is_made_where_that_is_asked_for() -> None:
    assert superpose(SHARED, 3, 1, seconds=20) == head(superpose(SHARED, 3, 1), 20)


@pytest.mark.parametrize("rate", [1.0, 5.0, 12.0])
def test_any_rate_can_be_had_for_any_part_of_the_trace(rate: float) -> None:
    trace = at_rate(SHARED, rate, 20)
    assert len(trace.requests) == pytest.approx(20 * rate, rel=0.3)
    assert all(r.arrival_s < 20 for r in trace.requests)
