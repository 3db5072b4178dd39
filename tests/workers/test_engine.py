"""The engine on the sim runner, whose tokens depend on every KV row read back: lost or mixed-up blocks change them."""

import math

import pytest

from cluster.messages import Generation, Handoff, Sampling
from tests.workers.engine_run import BLOCK, Run, alone, assert_no_leak, crowded, engine, prompt, sequence
from workers.sequence import Sequence


def test_the_sim_depends_on_every_token_and_its_place() -> None:
    base = prompt(9)
    swapped = [base[1], base[0], *base[2:]]
    assert len({tuple(alone(p, 3)) for p in (base, swapped, base[:-1], [*base[:-1], base[-1] + 1])}) == 4


@pytest.mark.parametrize("token_budget", [16, 17, 64])
def test_batching_and_chunking_change_no_token(token_budget: int) -> None:
    run = Run(engine(token_budget=token_budget, max_sequences=16))
    prompts = {f"s{n}": prompt(n, seed=n) for n in (1, 3, 4, 5, 8, 31, 100, 120)}
    for name, tokens in prompts.items():
        run.engine.add(sequence(name, tokens, new=20))
    run.finish_all()
    assert run.tokens == {name: alone(tokens, 20) for name, tokens in prompts.items()}
    assert set(run.finish.values()) == {"length"}
    assert_no_leak(run.engine)


def test_a_prefix_hit_computes_only_the_rest_and_changes_no_token() -> None:
    run = Run(engine())
    run.engine.add(sequence("first", prompt(40)))
    run.finish_all()
    computed = run.engine.counters.prompt_tokens_total
    run.engine.add(sequence("again", prompt(40)))
    run.engine.add(sequence("longer", [*prompt(40), 5, 6, 7]))
    run.finish_all()
    assert run.tokens["again"] == run.tokens["first"]
    assert run.tokens["longer"] == alone([*prompt(40), 5, 6, 7])
    assert (run.cached["first"], run.cached["again"], run.cached["longer"]) == (0, 36, 40)
    assert run.engine.counters.prompt_tokens_total - computed == 4 + 3


def test_another_root_shares_nothing() -> None:
    run = Run(engine())
    run.engine.add(sequence("a", prompt(40)))
    run.finish_all()
    other = sequence("b", prompt(40))
    other.root = b"another tenant"
    run.engine.add(other)
    run.finish_all()
    assert run.cached["b"] == 0
    assert run.tokens["b"] == run.tokens["a"]


def test_preemption_changes_no_token_and_leaks_nothing() -> None:
    crowded(Run(engine(num_blocks=40, token_budget=32)))


def test_a_long_prompt_does_not_stall_decodes() -> None:
    run = Run(engine(token_budget=16))
    run.engine.add(sequence("decode", prompt(4), new=100))
    run.step()
    run.engine.add(sequence("long", prompt(300), new=1))
    for _ in range(10):
        before = len(run.tokens["decode"])
        assert run.step().computed == 16
        assert len(run.tokens["decode"]) == before + 1


@pytest.mark.parametrize("steps", range(8))
def test_abort_at_any_step_frees_everything(steps: int) -> None:
    run = Run(engine(num_blocks=60, token_budget=16))
    for i in range(4):
        run.engine.add(sequence(f"s{i}", prompt(30, seed=i), new=50))
    for _ in range(steps):
        run.step()
    run.engine.abort([f"s{i}" for i in range(4)] + ["unknown"])
    assert_no_leak(run.engine)


def test_a_deadline_fails_the_sequence_with_a_type() -> None:
    run = Run(engine())
    run.engine.add(sequence("s", prompt(10), new=400))
    run.engine.sequences["s"].deadline = 5.0
    run.step()
    run.now = 6.0
    run.finish_all()
    assert run.failed == {"s": "deadline_exceeded"}
    assert_no_leak(run.engine)


def test_resuming_with_tokens_already_sent_continues_exactly() -> None:
    whole = alone(prompt(21), 12)
    run = Run(engine())
    resumed = Sequence(
        Generation("r", tuple(prompt(21)), tuple(whole[:5]), Sampling(max_tokens=12, temperature=0), b"", 1),
        router_id="router", root=b"root", deadline=math.inf,
    )  # fmt: skip
    run.tokens["r"] = whole[:5]
    run.engine.add(resumed)
    assert run.finish_all().tokens["r"] == whole


# ------------------------------------------------------------------------------------------------------- handoff
def prefilled(length: int, token_budget: int = 16) -> tuple[Run, dict[int, bytes], int]:
    """A prefill job run to its end: the run, its blocks' bytes by position, and the first token."""
    run = Run(engine(token_budget=token_budget))
    run.engine.add(sequence("p", prompt(length), transfer_id="p"))
    blocks: dict[int, bytes] = {}
    first_token = None
    while first_token is None:
        for send in run.step().sends:
            for position, block in send.blocks:
                assert position not in blocks
                blocks[position] = run.engine.runner.block(block).tobytes()
            first_token = send.first_token
            run.engine.sent([block for _, block in send.blocks])
    return run, blocks, first_token


@pytest.mark.parametrize("length", [1, 3, 4, 5, 33, 100])
def test_a_prefill_ends_at_its_first_token_with_every_block_announced_once(length: int) -> None:
    run, blocks, first_token = prefilled(length)
    assert run.tokens["p"] == [first_token] == alone(prompt(length), 1)
    assert sorted(blocks) == list(range(-(-length // BLOCK)))
    assert_no_leak(run.engine)


@pytest.mark.parametrize("arrived", ["all", "all but the token", "half", "nothing"])
@pytest.mark.parametrize("length", [3, 4, 33, 100])
def test_whatever_part_of_a_handoff_arrives_the_tokens_are_the_same(length: int, arrived: str) -> None:
    _, blocks, first_token = prefilled(length)
    run = Run(engine(token_budget=16))
    run.engine.add(sequence("d", prompt(length), new=9, handoff=Handoff("store", 1, "p")))
    run.step()
    (receiving,) = run.receives
    valid = {"all": len(blocks), "all but the token": len(blocks), "half": len(blocks) // 2, "nothing": 0}[arrived]
    for position in range(valid):
        run.engine.runner.block(receiving.block_table[position])[:] = list(blocks[position])
    run.engine.received(receiving, valid, first_token if arrived == "all" else None)
    assert run.finish_all().tokens["d"] == alone(prompt(length), 9)
    if arrived == "all":
        assert run.engine.counters.prompt_tokens_total == 0
    assert_no_leak(run.engine)


def test_blocks_being_sent_are_not_reused_before_the_transfer_lets_go() -> None:
    run = Run(engine(num_blocks=30, token_budget=32))
    run.engine.add(sequence("p", prompt(60), transfer_id="p"))
    step = run.step()
    sent = [block for send in step.sends for _, block in send.blocks]
    run.engine.abort(["p"])
    assert run.engine.pool.used_count == len(sent) > 0
    assert run.step().revoked == ["p"]
    run.engine.sent(sent)
    assert_no_leak(run.engine)


def test_blocks_being_received_are_not_reused_before_the_transfer_lets_go() -> None:
    run = Run(engine(num_blocks=30))
    run.engine.add(sequence("d", prompt(60), handoff=Handoff("store", 1, "p")))
    (receiving,) = run.step().receives
    run.engine.abort(["d"])
    assert run.engine.pool.used_count == 15
    assert run.step().dropped == ["d"]
    run.engine.received(receiving, 15, 7)
    assert_no_leak(run.engine)
    assert run.finish_all().tokens == {}


def test_a_handoff_that_is_never_fetched_is_given_back() -> None:
    run = Run(engine(num_blocks=130, max_sequences=1))
    handoff = Handoff("store", 1, "p")
    run.engine.add(sequence("busy", prompt(40), new=20))
    run.step()
    run.engine.add(sequence("d", prompt(60, seed=2), handoff=handoff))
    run.step()
    run.engine.abort(["d"])
    assert run.step().unclaimed == [handoff]


def test_a_handoff_waits_until_there_is_room_for_all_of_it() -> None:
    run = Run(engine(num_blocks=20))
    run.engine.add(sequence("busy", prompt(40), new=20))
    run.step()
    run.engine.add(sequence("d", prompt(60, seed=2), handoff=Handoff("store", 1, "p")))
    while "busy" in run.engine.sequences:
        run.step()
        assert run.receives == [] or "busy" not in run.engine.sequences
    run.step()
    assert [s.id for s in run.receives] == ["d"]
