import collections
from collections.abc import Callable
from dataclasses import replace

import pytest

from cluster.messages import Role
from cluster.plan import ChangeRole, Demand, Member, Memory, Migrate, explain, plan
from cluster.pools import State
from tests.cluster.fluid import RATES, SPEC, Fluid, Mix, mix, roles

PROMPTS, OUTPUTS = mix(5.5, 1, prompt=1000), mix(1, 5.5, prompt=100)  # two mixes for eight workers


def fluid(prefill: int, decode: int, traffic: Callable[[float], Mix], seed: int = 0) -> Fluid:
    return Fluid(SPEC, roles(prefill, decode), traffic, seed)


def member(name: str, role: Role, *, state: State = "serving", shards: int = 1, **facts: int) -> Member:
    return Member(name, role, state, shards, RATES, since_s=-100.0, **facts)


def asked(prefill: float, decode: float) -> Demand:
    """So much that it keeps that many workers of each role busy, and no doubt about it."""
    tokens = prefill * 1000 * 200 / 42  # 200 a request: 2 ms for the step and 0.2 ms for each
    return Demand(tokens / 200, tokens, decode * 2000, requests=100_000.0, ttft_ms=100.0, itl_ms=10.0)


def decide(members: list[Member], demand: Demand, memory: Memory | None = None) -> tuple[list[object], Memory]:
    """What is done within twelve seconds of the same, which is as long as anything has to be confirmed."""
    memory = memory or Memory()
    for half in range(25):
        actions, memory = plan(SPEC, members, demand, memory, half / 2)
        if actions:
            return list(actions), memory
    return [], memory


# ------------------------------------------------------------------------------------------------- the ratio in motion
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("prefill", [1, 7])
def test_it_converges_from_both_bad_ends_in_one_or_two_moves(prefill: int, seed: int) -> None:
    run = fluid(prefill, 8 - prefill, lambda now: mix(2.8, 2.8), seed)
    run.run(60)
    assert 3 <= run.count("prefill") <= 5
    assert 1 <= len(run.moves) <= 2


@pytest.mark.parametrize(("prefill", "decode", "seed"), [(4, 4, 0), (6, 2, 0), (2, 6, 4)])
def test_it_never_moves_under_a_constant_load(prefill: int, decode: int, seed: int) -> None:
    run = fluid(prefill, decode, lambda now: mix(0.7 * prefill, 0.7 * decode), seed)
    run.run(600)
    assert run.moves == []


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("prefill", "before", "after"), [(6, PROMPTS, OUTPUTS), (2, OUTPUTS, PROMPTS)])
def test_it_follows_a_new_mix_within_five_seconds(prefill: int, before: Mix, after: Mix, seed: int) -> None:
    run = fluid(prefill, 8 - prefill, lambda now: before if now < 30 else after, seed)
    run.run(30)
    assert run.moves == []
    run.run(35)
    assert [role for _, role, _ in run.moves] == ["decode" if after is OUTPUTS else "prefill"]
    assert run.moves[0][2] >= 2
    run.run(60)
    assert run.count("decode" if after is OUTPUTS else "prefill") >= 5


def square(now: float) -> Mix:
    return OUTPUTS if now % 20 < 10 else PROMPTS


@pytest.mark.parametrize("seed", [0, 1])
def test_a_square_wave_moves_it_once_per_half_period_at_most(seed: int) -> None:
    run = fluid(2, 6, square, seed)
    run.run(200)
    halves = collections.Counter(int(at // 10) for at, _, _ in run.moves)
    assert len(halves) >= 10
    assert max(halves.values()) == 1


def test_following_a_square_wave_is_better_than_not_to() -> None:
    followed = kept = 0.0
    for seed in range(3):
        run = fluid(2, 6, square, seed)
        run.run(200)
        followed += run.mean_ttft(20, 200)
        still = fluid(4, 4, square, seed)
        still.spec = replace(SPEC, disaggregated=False)  # nobody moves roles
        still.run(200)
        kept += still.mean_ttft(20, 200)
    assert followed < kept


# ----------------------------------------------------------------------------------------------- the ratio at a moment
@pytest.mark.parametrize("count", [3, 8, 64, 1000])
def test_of_any_number_of_workers_about_the_right_part_changes(count: int) -> None:
    """The demand keeps 0.6 of all busy with prompts and 0.2 with outputs, and half are decode workers."""
    each = count // 2
    prefill = [member(f"p{i}", "prefill") for i in range(count - each if count > 3 else 1)]
    decode = [member(f"d{i}", "decode", running=1, context_tokens=100) for i in range(count - len(prefill))]
    actions, _ = decide(prefill + decode, asked(0.6 * count, 0.2 * count))
    right = round(count * 0.75) - len(prefill)
    assert len(actions) == pytest.approx(right, abs=max(1, 0.02 * count))
    assert all(isinstance(action, ChangeRole) and action.role == "prefill" for action in actions)


def test_two_workers_stay_what_they_are() -> None:
    assert decide([member("p", "prefill"), member("d", "decode")], asked(5, 0.1))[0] == []


def test_those_with_the_least_to_finish_change() -> None:
    decode = [member(f"d{i}", "decode", running=9 - i, context_tokens=1000 * (9 - i)) for i in range(4)]
    actions, memory = decide([member("p", "prefill"), *decode], asked(1.5, 0.5))
    assert actions[0] == ChangeRole("d3", "prefill")
    assert "to prefill" in explain(memory)
    prefill = [member(f"p{i}", "prefill", waiting_tokens=1000 * (9 - i)) for i in range(4)]
    actions, _ = decide([*prefill, member("d", "decode")], asked(0.5, 1.5))
    assert actions[0] == ChangeRole("p3", "decode")


def test_a_split_that_is_not_really_bad_is_left_alone() -> None:
    members = [member("p", "prefill"), *(member(f"d{i}", "decode") for i in range(7))]
    assert decide(members, asked(0.65, 0.1))[0] == []
    assert decide(members, asked(0.9, 0.1))[0] != []


def test_few_requests_prove_nothing_but_a_queue_does() -> None:
    members = [member("p", "prefill"), *(member(f"d{i}", "decode") for i in range(7))]
    few = replace(asked(1.5, 0.1), requests=5.0)
    assert decide(members, few)[0] == []
    assert decide(members, replace(few, waiting=50, waiting_tokens=100_000))[0] != []


def test_a_decode_pool_that_is_over_its_batch_needs_more_whatever_comes_out_of_it() -> None:
    full = member("d", "decode", running=150, context_tokens=15_000)
    actions, _ = decide([full, *(member(f"p{i}", "prefill") for i in range(7))], asked(0.5, 0.9))
    assert actions
    assert all(isinstance(action, ChangeRole) and action.role == "decode" for action in actions)


@pytest.mark.parametrize(("looks", "moves"), [("+-+", True), ("+--+", False)])
def test_a_moment_in_which_it_seems_otherwise_does_not_begin_the_confirmation_anew(looks: str, moves: bool) -> None:
    """Two looks a second; sequences that began together end together."""
    memory = Memory(began_s=0.0)
    prefill = [member(f"p{i}", "prefill") for i in range(7)]
    for half, look in enumerate(looks):
        decode = member("d", "decode", running=150 if look == "+" else 0)
        demand = asked(0.5, 2.0) if look == "+" else asked(0.5, 0.1)
        actions, memory = plan(SPEC, [decode, *prefill], demand, memory, 10 + half / 2)
    assert bool(actions) == moves


def test_a_kv_cache_that_is_too_small_for_the_batch_counts() -> None:
    decode = [member(f"d{i}", "decode", running=4, context_tokens=40_000, kv_tokens=50_000) for i in range(2)]
    prefill = [member(f"p{i}", "prefill") for i in range(6)]
    assert decide([*prefill, *decode], asked(0.5, 0.45))[0] != []  # five sequences of 10,000 tokens fit, not forty
    roomy = [replace(worker, kv_tokens=0) for worker in decode]
    assert decide([*prefill, *roomy], asked(0.5, 0.45))[0] == []


def test_shards_count_not_workers() -> None:
    decode = [member(f"d{i}", "decode", shards=4) for i in range(2)]
    prefill = [member(f"p{i}", "prefill") for i in range(2)]
    slow = [replace(worker, rates=replace(RATES, prefill=(8.0, 0.8, 0.0))) for worker in prefill]
    assert decide([*slow, *decode], asked(0.4, 0.1))[0] == [ChangeRole("d0", "prefill")]


def test_members_that_have_not_said_how_fast_they_are_are_taken_to_be_like_the_others() -> None:
    members = [member("p", "prefill"), *(replace(member(f"d{i}", "decode"), rates=None) for i in range(7))]
    assert decide(members, asked(2.0, 0.5))[0] != []
    silent = [replace(worker, rates=None) for worker in members]
    assert decide(silent, asked(2.0, 0.5))[0] == []


# ------------------------------------------------------------------------------------------------ every role is there
def test_one_worker_alone_has_both_roles_until_there_are_two() -> None:
    assert decide([member("p", "prefill")], Demand())[0] == [ChangeRole("p", "both")]
    assert decide([member("p", "both")], Demand())[0] == []
    actions, _ = decide([member("p", "both", running=3, context_tokens=10), member("d", "decode")], Demand())
    assert actions == [ChangeRole("p", "prefill")]


def test_a_role_whose_last_worker_died_gets_another_one() -> None:
    busy = [member(f"d{i}", "decode", running=5 - i, context_tokens=100 * (5 - i)) for i in range(3)]
    gone = member("p", "prefill", state="starting")
    actions, memory = decide([gone, *busy], Demand())
    assert actions == [ChangeRole("d2", "prefill")]
    assert "each role" in explain(memory)


def test_without_disaggregation_nobody_changes() -> None:
    spec = replace(SPEC, disaggregated=False)
    memory = Memory()
    for second in range(20):
        actions, memory = plan(spec, [member("a", "both"), member("b", "both")], asked(5, 0.1), memory, float(second))
        assert actions == ()


# --------------------------------------------------------------------------------------- what was being decoded there
def after_a_flip(output_tokens: float, *, queued: int = 0) -> list[tuple[float, object]]:
    """What is done about a worker that began to prefill at second 0 with eight sequences to finish."""
    flipped = replace(member("w", "prefill", running=8, context_tokens=800), waiting_tokens=queued)
    members = [flipped, member("p", "prefill"), member("d", "decode")]
    demand = Demand(1.0, 200.0, output_tokens, requests=100.0, itl_ms=20.0)
    memory = replace(Memory(), left_decoding={"w": 0.0})
    done: list[tuple[float, object]] = []
    for half in range(60):
        actions, memory = plan(SPEC, members, demand, memory, half / 2)
        done += [(half / 2, action) for action in actions]
    return done


def test_short_outputs_end_by_themselves_and_what_is_left_after_ten_seconds_moves_on() -> None:
    assert after_a_flip(100.0) == [(10.0, Migrate("w"))]


def test_long_outputs_move_on_at_once() -> None:
    assert after_a_flip(1000.0) == [(1.0, Migrate("w"))]


def test_outputs_that_are_in_the_way_of_prompts_move_on_at_once() -> None:
    assert after_a_flip(100.0, queued=100_000)[0] == (1.0, Migrate("w"))


# ---------------------------------------------------------------------------------------------------- what is growing
def growing(names: list[str], per_s: int) -> list[object]:
    """What is done while the named decode workers get so many sequences more every second, beside idle prompts."""
    memory = replace(Memory(), began_s=0.0)
    for half in range(60, 67):
        prefill = [member(f"p{i}", "prefill") for i in range(4)]
        name = names[half % len(names)]
        decode = [member(name, "decode", running=10 + (half - 60) * per_s // 2, context_tokens=1000)]
        actions, memory = plan(SPEC, prefill + decode, asked(0.1, 0.3), memory, half / 2)
        if actions:
            return list(actions)
    return []


def test_sequences_that_become_more_are_counted_ahead() -> None:
    assert growing(["d"], 2) == []
    assert growing(["d"], 6) != []


def test_sequences_on_another_worker_are_no_growth() -> None:
    assert growing(["d", "e"], 6) == []


def test_the_only_other_worker_keeps_its_role_while_one_starts_again() -> None:
    back = [member("p", "prefill"), member("d", "decode", state="starting")]
    assert decide(back, Demand())[0] == []
    assert decide(back[:1], Demand())[0] == [ChangeRole("p", "both")]
