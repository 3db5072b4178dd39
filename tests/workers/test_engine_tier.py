"""The engine and the offload tier: what it fetches, what it offers; neither changes a token or keeps a block."""

import pytest

from cluster.messages import Handoff
from tests.workers.engine_run import BLOCK, Run, alone, assert_no_leak, engine, prompt, sequence
from workers.offering import LOW


def stocked(length: int, seed: int = 1) -> dict[bytes, bytes]:
    """A store that has every full block of a prompt, by hash."""
    run = Run(engine())
    for name in ("first", "again"):  # a prompt that is repeated goes there
        run.add(sequence(name, prompt(length, seed), new=1))
        run.finish_all()
    return run.store


# ------------------------------------------------------------------------------------------------------ fetching
@pytest.mark.parametrize("arrives", [None, 5, 1, 0])
@pytest.mark.parametrize("length", [33, 36, 100])
def test_whatever_part_of_a_fetch_arrives_the_tokens_are_the_same(length: int, arrives: int | None) -> None:
    run = Run(engine(token_budget=16), stocked(length))
    run.add(sequence("s", prompt(length)))
    (order,) = run.step().fetches
    run.deliver(order, arrives)
    run.finish_all()
    fetchable = (length - 1) // BLOCK  # the last token is always computed
    came = fetchable if arrives is None else arrives
    assert run.tokens["s"] == alone(prompt(length))
    assert run.cached["s"] == came * BLOCK
    assert run.engine.counters.prompt_tokens_total == length - came * BLOCK
    assert_no_leak(run.engine)


def test_what_the_device_has_is_not_fetched() -> None:
    run = Run(engine(), stocked(100))
    run.add(sequence("short", prompt(40), new=1))
    run.finish_all()
    run.fetches.clear()
    run.add(sequence("long", prompt(100)))
    run.finish_all()
    (order,) = run.fetches
    assert (order.sources[0].start, order.sources[-1].stop) == (10, 24)
    assert run.cached["long"] == 96
    assert run.tokens["long"] == alone(prompt(100))


def test_what_is_faster_to_compute_is_not_fetched_and_counted() -> None:
    run = Run(engine(), stocked(40))
    for _ in range(100):
        run.engine.model.observe_fetch(1, "memory", 10_000.0)
    run.add(sequence("s", prompt(40)))
    run.finish_all()
    assert run.fetches == []
    assert run.tokens["s"] == alone(prompt(40))
    assert (run.cached["s"], run.engine.counters.recomputed_tokens_total) == (0, 36)


def test_a_prefill_job_fetches_too_and_announces_every_block_of_its_handoff() -> None:
    run = Run(engine(token_budget=16), stocked(50))
    run.add(sequence("p", prompt(50), transfer_id="p"))
    run.finish_all()
    assert [position for send in run.sends for position, _ in send.blocks] == list(range(13))
    assert run.sends[-1].first_token == alone(prompt(50), 1)[0]
    assert run.engine.counters.prompt_tokens_total == 2
    assert_no_leak(run.engine)


def test_a_sequence_with_a_handoff_fetches_nothing_else() -> None:
    run = Run(engine(), stocked(40))
    waiting = sequence("d", prompt(40), handoff=Handoff("store", 1, "p"))
    run.add(waiting)
    assert run.step().receives == [waiting]
    run.engine.received(waiting, 0, None)
    run.finish_all()
    assert run.fetches == []
    assert run.tokens["d"] == alone(prompt(40))


def test_a_sequence_is_not_admitted_before_the_stores_have_answered_and_holds_nobody_up() -> None:
    run = Run(engine())
    asked = sequence("asked", prompt(20), locating=True)
    run.engine.add(asked)
    run.add(sequence("other", prompt(20, seed=2)))
    run.finish_all()
    assert list(run.tokens) == ["other"]
    run.engine.located(asked, [])
    run.finish_all()
    assert run.tokens["asked"] == alone(prompt(20))


@pytest.mark.parametrize("arrives", [None, 0])
def test_blocks_being_fetched_are_not_reused_before_the_fetch_has_ended(arrives: int | None) -> None:
    run = Run(engine(num_blocks=30), stocked(60))
    run.add(sequence("s", prompt(60)))
    (order,) = run.step().fetches
    run.engine.abort(["s"])
    assert run.engine.pool.used_count == 14
    assert run.step().dropped == ["s"]
    run.deliver(order, arrives)
    assert_no_leak(run.engine)
    assert run.finish_all().tokens == {}


def test_an_aborted_prefill_that_fetches_is_revoked_and_dropped() -> None:
    run = Run(engine(), stocked(60))
    run.add(sequence("p", prompt(60), transfer_id="p"))
    (order,) = run.step().fetches
    run.engine.abort(["p"])
    step = run.step()
    assert (step.revoked, step.dropped) == (["p"], ["p"])
    run.deliver(order)
    assert_no_leak(run.engine)


def test_a_preempted_sequence_fetches_what_the_store_has_by_then() -> None:
    store: dict[bytes, bytes] = {}
    run = Run(engine(num_blocks=40, token_budget=32), store)
    prompts = {f"s{i}": prompt(20 + i, seed=i) for i in range(8)}
    for name, tokens in prompts.items():
        run.add(sequence(name, tokens, new=40))
    run.finish_all()
    assert run.engine.scheduler.preemptions > 0
    assert run.fetches
    assert run.tokens == {name: alone(tokens, 40) for name, tokens in prompts.items()}
    assert_no_leak(run.engine)


def test_usage_counts_what_was_cached_at_the_first_admission_only() -> None:
    run = Run(engine(num_blocks=30, token_budget=32), stocked(40))
    run.add(sequence("old", prompt(20, seed=5), new=60))
    run.add(sequence("s", prompt(40), new=60))
    run.finish_all()
    assert run.engine.scheduler.preemptions > 0
    assert run.cached["s"] == 36


# ------------------------------------------------------------------------------------------------------ offering
def test_every_full_block_of_a_conversation_is_offered_once_and_hits_elsewhere() -> None:
    run = Run(engine())
    run.add(sequence("turn1", prompt(10), new=31))
    run.finish_all()
    assert len(run.offloads) == len(run.store) == 40 // BLOCK  # the last token's KV is never computed
    conversation = [*prompt(10), *run.tokens["turn1"], 1, 2, 3]
    elsewhere = Run(engine(), run.store)
    elsewhere.add(sequence("turn2", conversation))
    elsewhere.finish_all()
    assert elsewhere.tokens["turn2"] == alone(conversation)
    assert elsewhere.cached["turn2"] == 40


def test_a_prompt_is_offered_when_it_is_seen_again_and_only_then() -> None:
    run = Run(engine())
    run.add(sequence("a", prompt(40), new=1))
    run.finish_all()
    assert run.offloads == []
    run.add(sequence("b", [*prompt(24), *prompt(16, seed=2)], new=1))  # shares six blocks
    run.finish_all()
    assert len(run.offloads) == 6
    run.add(sequence("c", prompt(40), new=1))
    run.finish_all()
    assert len(run.offloads) == 10
    run.add(sequence("d", prompt(40), new=1))
    run.finish_all()
    assert len(run.offloads) == 10


def test_what_came_from_a_store_is_not_offered_to_it() -> None:
    run = Run(engine(), stocked(40))
    for name in ("a", "b", "c"):
        run.add(sequence(name, prompt(40), new=1))
        run.finish_all()
    assert len(run.fetches) == 1
    (offload,) = run.offloads
    assert offload.name.key.hash not in stocked(36)  # the tenth block, whose last token must be computed


def test_the_oldest_blocks_are_offered_before_they_are_evicted() -> None:
    run = Run(engine(num_blocks=128))
    for seed in range(30):
        run.add(sequence(f"s{seed}", prompt(40, seed), new=1))
        run.finish_all()
        for _ in range(30):  # what an engine that idles does
            run.step()
        assert run.engine.pool.expendable_count >= run.engine.pool.total // LOW
    assert all(offload.cold for offload in run.offloads)
    run.fetches.clear()
    run.add(sequence("again", prompt(40, seed=0)))
    run.finish_all()
    assert run.cached["again"] == 36
    assert run.tokens["again"] == alone(prompt(40, seed=0))
    assert_no_leak(run.engine)


def test_a_store_that_is_new_is_offered_everything_again() -> None:
    run = Run(engine())
    for name in ("a", "b"):
        run.add(sequence(name, prompt(40), new=1))
        run.finish_all()
    run.engine.store_is_new()
    run.add(sequence("c", prompt(40), new=1))
    run.finish_all()
    assert len(run.offloads) == 20


@pytest.mark.parametrize("when", ["aborted", "finished"])
def test_blocks_being_written_are_not_reused_before_the_write_has_ended(when: str) -> None:
    target = engine(num_blocks=30)
    target.add(sequence("s", prompt(4), new=20))
    offloads = []
    while "s" in target.sequences:
        offloads += target.step(0.0).offloads
        if when == "aborted" and len(offloads) == 2:
            target.abort(["s"])
    assert target.pool.used_count == len(offloads) > 1
    target.offloaded(offloads)
    assert_no_leak(target)


@pytest.mark.parametrize("steps", range(12))
def test_abort_at_any_step_leaves_no_block(steps: int) -> None:
    """With fetches that end after the abort."""
    run = Run(engine(num_blocks=60, token_budget=16), stocked(30, seed=0) | stocked(30, seed=1))
    orders = []
    for i in range(4):
        run.add(sequence(f"s{i}", prompt(30, seed=i), new=50))
    for step in range(steps):
        orders += run.step().fetches
        if step % 3 == 2 and orders:
            run.deliver(orders.pop(0), step % 5)
    run.engine.abort([f"s{i}" for i in range(4)])
    run.step()
    for order in orders:
        run.deliver(order)
    assert_no_leak(run.engine)


def test_a_preempted_sequence_waits_for_the_answer_and_holds_nobody_up() -> None:
    target = engine(num_blocks=24, token_budget=32)
    for name in ("old", "young"):
        target.add(sequence(name, prompt(20, seed=len(name)), new=60))
    lookups = []
    while not lookups:
        step = target.step(0.0)
        target.offloaded(step.offloads)
        lookups = step.lookups
    assert [s.id for s in lookups] == ["young"]
    while "old" in target.sequences:
        target.offloaded(target.step(0.0).offloads)
    step = target.step(0.0)
    assert (step.computed, step.fetches) == (0, [])
    target.located(lookups[0], [])
    assert target.step(0.0).computed > 0
