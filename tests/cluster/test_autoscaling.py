from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest

from cluster.errors import ConfigError
from cluster.messages import Role
from cluster.plan import Action, ChangeRole, Demand, Drain, Member, Memory, Migrate, Spec, Start, Stop, explain, plan
from cluster.pools import Now, State
from cluster.scaling_policies import policy
from tests.cluster.fluid import RATES, SPEC

SLO = replace(SPEC, policy="slo", least=2, most=16)


def member(name: str, role: Role, state: State = "serving", since_s: float = -100.0, **facts: int) -> Member:
    return Member(name, role, state, 1, RATES if state == "serving" else None, since_s=since_s, **facts)


def pair(prefill: int = 1, decode: int = 1) -> list[Member]:
    return [member(f"p{i}", "prefill") for i in range(prefill)] + [member(f"d{i}", "decode") for i in range(decode)]


def asked(prefill: float, decode: float) -> Demand:
    """So much that it keeps that many workers of each role busy."""
    tokens = prefill * 1000 * 200 / 42
    return Demand(tokens / 200, tokens, decode * 2000, requests=100_000.0, ttft_ms=100.0, itl_ms=10.0)


def wanted(name: str, members: Sequence[Member], demand: Demand, utc_s: float = 0.0, spec: Spec = SLO) -> object:
    return policy(name)(spec, members, demand, Now(0.0, utc_s))


def decide(
    spec: Spec, members: Sequence[Member], demand: Demand, seconds: float = 60.0, memory: Memory | None = None,
    utc_s: float = 0.0,
) -> tuple[float, tuple[Action, ...], Memory]:  # fmt: skip
    """(when, what, memory) of the first that is done while everything stays the same."""
    memory = memory or Memory()
    for half in range(int(2 * seconds)):
        actions, memory = plan(spec, members, demand, memory, half / 2, utc_s)
        if actions:
            return half / 2, actions, memory
    return seconds, (), memory


# --------------------------------------------------------------------------------------------------------- the policies
def test_slo_wants_as_few_as_keep_the_slos() -> None:
    assert wanted("slo", pair(), asked(0.1, 0.1)) == {"prefill": 1, "decode": 1}
    assert wanted("slo", pair(4, 2), asked(3.3, 1.6)) == {"prefill": 4, "decode": 2}
    tight = replace(SLO, ttft_slo_ms=60.0)  # a prompt takes 42 ms: next to nobody may wait
    assert wanted("slo", pair(4, 2), asked(3.3, 1.6), spec=tight) == {"prefill": 6, "decode": 2}
    slow = replace(SLO, itl_slo_ms=12.5)  # batches of 10 instead of 40: 800 tokens a second instead of 2,000
    assert wanted("slo", pair(1, 6), asked(0.1, 1.6), spec=slow) == {"prefill": 1, "decode": 5}


def test_slo_wants_one_more_where_the_slo_is_missed_after_all() -> None:
    missed = replace(asked(0.6, 0.3), ttft_ms=3000.0)
    assert wanted("slo", pair(), missed) == {"prefill": 2, "decode": 1}
    starting = [*pair(), member("p1", "prefill", "starting")]
    assert wanted("slo", starting, missed) == {"prefill": 1, "decode": 1}  # one more is on its way: that counts later
    assert wanted("slo", pair(), replace(asked(0.1, 0.1), ttft_ms=3000.0)) == {"prefill": 1, "decode": 1}


def test_slo_knows_that_what_prefill_holds_back_will_need_decoding() -> None:
    assert wanted("slo", pair(), asked(4, 0.5)) == {"prefill": 5, "decode": 2}


def test_without_disaggregation_both_kinds_of_work_add_up() -> None:
    spec = replace(SLO, disaggregated=False, least=1)
    members = [member("w", "both")]
    assert wanted("slo", members, asked(0.4, 0.3), spec=spec) == {"both": 1}
    assert wanted("slo", members, asked(0.5, 0.4), spec=spec) == {"both": 2}
    assert wanted("utilization:0.5", members, asked(0.4, 0.4), spec=spec) == {"both": 2}


def test_utilization_wants_pools_that_are_busy_for_that_part() -> None:
    assert wanted("utilization", pair(2, 2), asked(2.1, 1.3)) == {"prefill": 3, "decode": 2}
    assert wanted("utilization:0.35", pair(2, 2), asked(2.1, 1.3)) == {"prefill": 6, "decode": 4}


def test_workers_have_shards() -> None:
    spec = replace(SLO, shards={"prefill": 4, "decode": 2})
    assert wanted("utilization:0.5", pair(8, 8), asked(4, 4), spec=spec) == {"prefill": 2, "decode": 4}


@pytest.mark.parametrize(("hour", "count"), [(0, 2), (6.99, 2), (7, 8), (12, 8), (19.5, 2), (23.9, 2)])
def test_a_schedule_is_by_the_time_of_day(hour: float, count: int) -> None:
    assert wanted("schedule:19:30=2,07:00=8", pair(), Demand(), utc_s=3600 * hour) == count


def test_fixed_wants_what_there_is() -> None:
    assert wanted("fixed", [*pair(3, 2), member("x", "decode", "draining")], asked(9, 9)) == 5


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("sloo", "use slo"),
        ("", "use slo"),
        ("utilization:70", "utilization:0.7"),
        ("utilization:most", "utilization:0.7"),
        ("schedule:", "schedule:07:00=8"),
        ("schedule:25:00=8", "schedule:07:00=8"),
        ("schedule:07:00=8;19:00=2", "schedule:07:00=8"),
        ("no.such.module:function", "cannot import"),
        ("cluster.pools:nothing", "cannot import"),
        ("cluster.plan:TREND_S", "not a function"),
    ],
)
def test_what_is_no_policy_is_refused_with_what_to_write(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match="autoscaling") as caught:
        policy(name)
    assert hint in caught.value.message


# ------------------------------------------------------------------------------------------------ a policy of one's own
def five(spec: Spec, members: Sequence[Member], demand: Demand, now: Now) -> int:
    return 5


def by_role(spec: Spec, members: Sequence[Member], demand: Demand, now: Now) -> Mapping[Role, int]:
    return {"prefill": 2, "decode": 3}


def broken(spec: Spec, members: Sequence[Member], demand: Demand, now: Now) -> int:
    raise KeyError("no such metric")


def nonsense(spec: Spec, members: Sequence[Member], demand: Demand, now: Now) -> Mapping[str, int]:
    return {"speculative": 3}


def own(name: str) -> Spec:
    return replace(SLO, policy=f"{__name__}:{name}")


def test_a_number_is_divided_by_what_is_needed() -> None:
    _, actions, _ = decide(own("five"), pair(), asked(0.1, 0.5))
    assert sorted(action.role for action in actions if isinstance(action, Start)) == ["decode"] * 3
    _, actions, _ = decide(own("by_role"), pair(), asked(0.1, 0.5))
    assert sorted(action.role for action in actions if isinstance(action, Start)) == ["decode", "decode", "prefill"]


@pytest.mark.parametrize(("name", "words"), [("broken", "no such metric"), ("nonsense", "speculative")])
def test_a_policy_that_fails_keeps_the_size_and_is_reported_once(name: str, words: str) -> None:
    memory = Memory()
    said = []
    for half in range(200):
        actions, memory = plan(own(name), pair(2, 2), asked(0.1, 0.1), memory, half / 2)
        assert actions == ()
        said += [explain(memory)] if explain(memory) else []
    assert len(said) == 1
    assert words in said[0]


# --------------------------------------------------------------------------------------------------------- more of them
def test_several_start_at_once_after_three_seconds() -> None:
    when, actions, memory = decide(SLO, pair(2, 2), asked(3.9, 0.9))
    assert when == 3.0
    assert [action.role for action in actions if isinstance(action, Start)] == ["prefill"] * 3
    assert "3 prefill started" in explain(memory)


def test_what_starts_counts_as_there() -> None:
    starting = [member(f"s{i}", "prefill", "starting") for i in range(3)]
    memory = Memory()
    for half in range(100):
        demand = replace(asked(3.9, 0.9), waiting=50, waiting_tokens=9000)
        actions, memory = plan(SLO, pair(2, 2) + starting, demand, memory, half / 2)
        assert not any(isinstance(action, Start) for action in actions)


def test_the_budget_is_never_exceeded() -> None:
    spec = replace(SLO, most=5, shards={"prefill": 1, "decode": 2})
    members = [*pair(), member("gone", "decode", "draining", since_s=0.0, running=1)]
    _, actions, _ = decide(spec, members, asked(3.3, 0.5), seconds=20.0)
    assert actions == (Start("prefill"), Start("prefill"))
    full = [*members, member("p1", "prefill", "starting"), member("p2", "prefill", "starting")]
    assert decide(spec, full, asked(3.3, 0.5), seconds=20.0)[1] == ()


def test_a_few_requests_start_nobody_unless_they_wait() -> None:
    few = replace(asked(1.1, 0.5), requests=20.0)
    assert decide(SLO, pair(), few, seconds=9)[1] == ()
    assert decide(SLO, pair(), replace(few, waiting=30, waiting_tokens=200_000), seconds=9)[1] != ()


def test_a_pool_below_the_least_is_filled_up_whatever_the_policy_says() -> None:
    spec = replace(SLO, least=4)
    _, actions, _ = decide(spec, pair(), Demand())
    assert len(actions) == 2


# -------------------------------------------------------------------------------------------------------- fewer of them
def test_half_of_what_is_too_many_drains_after_half_a_minute() -> None:
    members = [replace(worker, running=1, context_tokens=100 + i) for i, worker in enumerate(pair(4, 4))]
    when, actions, memory = decide(SLO, members, asked(0.5, 0.5))
    assert when == 30.0
    assert set(actions) == {Drain("p0"), Drain("p1"), Drain("d0")} or set(actions) == {
        Drain("p0"),
        Drain("d0"),
        Drain("d1"),
    }
    assert "drained" in explain(memory)


def test_the_survivors_must_do_with_a_quarter_more() -> None:
    assert decide(SLO, pair(2, 1), asked(0.6, 0.3))[1] == (Drain("p0"),)
    assert decide(SLO, pair(2, 1), asked(0.75, 0.3))[1] == ()  # one would do, but with nothing to spare


def test_one_busy_moment_begins_the_half_minute_anew() -> None:
    _, _, memory = decide(SLO, pair(3, 1), asked(0.5, 0.5), seconds=25)
    _, memory = plan(SLO, pair(3, 1), asked(2.0, 0.5), memory, 25.0)
    for half in range(52, 110):
        actions, memory = plan(SLO, pair(3, 1), asked(0.5, 0.5), memory, half / 2)
        assert actions == ()


def test_nobody_else_goes_while_somebody_drains_or_starts() -> None:
    for state in ("draining", "starting"):
        other = member("x", "prefill", "draining" if state == "draining" else "starting", since_s=0.0, running=1)
        actions = decide(SLO, [*pair(4, 1), other], asked(0.5, 0.5), seconds=29 + 25)[1]
        assert not any(isinstance(action, Drain) for action in actions)


def test_it_never_goes_below_the_least_nor_below_one_of_each() -> None:
    assert decide(replace(SLO, least=3), pair(2, 1), asked(0.01, 0.01))[1] == ()
    assert decide(replace(SLO, least=1), pair(1, 1), asked(0.01, 0.01))[1] == ()
    many = [member("p0", "prefill"), *(member(f"d{i}", "decode") for i in range(6))]
    _, actions, _ = decide(SLO, many, asked(0.1, 0.1))
    assert all(isinstance(action, Drain) and action.id.startswith("d") for action in actions)


def test_a_schedule_may_leave_one_alone_which_then_has_both_roles() -> None:
    spec = replace(SLO, policy="schedule:00:00=1", least=1)
    _, actions, _ = decide(spec, pair(), asked(0.1, 0.1))
    assert len(actions) == 1
    assert decide(spec, pair()[1:], asked(0.1, 0.1))[1] == (ChangeRole("d0", "both"),)
    assert decide(spec, [member("d0", "both")], asked(0.1, 0.1))[1] == ()


# ----------------------------------------------------------------------------------------------------------- to nothing
ZERO = replace(SLO, least=0)


def test_nobody_stays_when_nobody_asks_and_the_first_request_brings_them_back() -> None:
    when, actions, memory = decide(ZERO, pair(), Demand(), seconds=400)
    assert when == 300.0
    assert set(actions) == {Drain("p0"), Drain("d0")}
    going = [replace(worker, state="draining", since_s=300.0) for worker in pair()]
    actions, memory = plan(ZERO, going, Demand(), memory, 302.0)
    assert set(actions) == {Stop("p0"), Stop("d0")}
    for second in range(303, 1000):
        actions, memory = plan(ZERO, [], Demand(), memory, float(second))
        assert actions == ()
    actions, memory = plan(ZERO, [], Demand(waiting=1, waiting_tokens=10), memory, 1000.0)
    assert actions == (Start("prefill"), Start("decode"))
    assert "requests wait" in explain(memory)
    starting = [member("a", "prefill", "starting", 1000.0), member("b", "decode", "starting", 1000.0)]
    for second in range(1001, 1100):
        actions, memory = plan(ZERO, starting, Demand(waiting=9, waiting_tokens=90), memory, float(second))
        assert actions == ()


def test_one_request_in_five_minutes_is_enough_to_stay() -> None:
    memory = Memory()
    for second in range(1000):
        demand = Demand(waiting=1) if second % 250 == 0 else Demand()
        actions, memory = plan(ZERO, pair(), demand, memory, float(second))
        assert actions == ()


def test_with_room_for_one_it_has_both_roles() -> None:
    spec = replace(ZERO, most=1)
    actions, _ = plan(spec, [], Demand(waiting=1), Memory(), 0.0)
    assert actions == (Start("both"),)
    assert decide(spec, [member("b", "both")], asked(2, 2), seconds=20)[1] == ()


def test_those_that_drain_hold_the_budget_until_they_have_stopped() -> None:
    spec = replace(ZERO, most=2)
    going = [replace(worker, state="draining", since_s=0.0, running=1) for worker in pair()]
    actions, memory = plan(spec, going, Demand(waiting=1), Memory(), 1.0)
    assert actions == ()
    actions, _ = plan(spec, [], Demand(waiting=1), memory, 2.0)
    assert len(actions) == 2


def test_a_pool_that_was_lost_is_started_again() -> None:
    assert plan(SLO, [], Demand(), Memory(), 0.0)[0] == (Start("prefill"), Start("decode"))


# ----------------------------------------------------------------------------------------------------------- on the way
def test_a_drain_waits_for_what_is_there_then_moves_it_then_stops() -> None:
    memory = Memory()
    done: list[tuple[float, Action]] = []
    for half in range(100):
        worker = member("x", "decode", "draining", since_s=0.0, running=1 if half < 90 else 0)
        actions, memory = plan(replace(SPEC, most=3), [*pair(), worker], asked(0.1, 0.1), memory, half / 2)
        done += [(half / 2, action) for action in actions]
    assert done[:3] == [(30.0, Migrate("x")), (40.0, Migrate("x")), (45.0, Stop("x"))]


def test_nothing_stops_that_has_prompts_or_has_only_just_been_told() -> None:
    worker = member("x", "prefill", "draining", since_s=0.0, waiting_tokens=5)
    assert plan(SPEC, [*pair(), worker], Demand(), Memory(), 20.0)[0] == ()
    assert plan(SPEC, [*pair(), replace(worker, waiting_tokens=0)], Demand(), Memory(), 1.0)[0] == ()
