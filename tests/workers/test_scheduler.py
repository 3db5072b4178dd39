"""Who computes what in a step, and who gives blocks to whom, with steps in flight; the engine's tests see the rest."""

import pytest

from kvstore.blocks import BlockPool
from tests.workers.engine_run import BLOCK, prompt, sequence
from workers.fetching import NOTHING
from workers.runner import Chunk
from workers.scheduler import Schedule, Scheduler
from workers.sequence import Sequence, State


def scheduler(blocks: int, depth: int = 2, token_budget: int = 64) -> Scheduler:
    return Scheduler(BlockPool(blocks), BLOCK, token_budget, 16, depth, lambda sequence, hits: NOTHING)


def running(target: Scheduler, name: str, tokens: int, computed: int) -> Sequence:
    """A sequence with exactly the blocks of what it has computed."""
    made = sequence(name, prompt(tokens, seed=len(target.running)))
    blocks = target.pool.allocate(-(-computed // BLOCK))
    assert blocks is not None
    made.block_table, made.computed, made.state = blocks, computed, State.RUNNING
    target.running.append(made)
    return made


def collect(target: Scheduler, step: Schedule) -> None:
    """The step ends; what sampled has a new token."""
    for chunk in step.chunks:
        samples = chunk.samples
        if target.collected(chunk) and samples:
            chunk.sequence.tokens.append(7)


def parts(step: Schedule) -> list[tuple[str, int, int]]:
    return [(chunk.sequence.id, chunk.first, chunk.take) for chunk in step.chunks]


def test_what_has_its_token_in_flight_is_left_out_until_it_was_collected() -> None:
    target = scheduler(16)
    made = running(target, "s", 6, 5)
    first = target.schedule(0)
    assert parts(first) == [("s", 5, 1)]
    assert parts(target.schedule(1)) == []
    collect(target, first)
    assert parts(target.schedule(0)) == [("s", 6, 1)]
    assert (made.computed, made.in_flight) == (6, 1)


def test_the_next_chunk_of_a_prompt_follows_the_one_in_flight_and_has_blocks_of_its_own() -> None:
    target = scheduler(16, depth=3, token_budget=8)
    made = running(target, "s", 20, 0)
    steps = [target.schedule(0), target.schedule(1), target.schedule(2)]
    assert [parts(step) for step in steps] == [[("s", 0, 8)], [("s", 8, 8)], [("s", 16, 4)]]
    assert (made.computed, made.in_flight, made.gap, len(made.block_table)) == (0, 20, 0, 5)
    for step in steps:
        collect(target, step)
    assert (made.computed, made.in_flight, made.gap) == (20, 0, 1)


def test_with_one_step_at_a_time_it_takes_every_decode() -> None:
    target = scheduler(32, depth=1)
    for index in range(7):
        running(target, f"s{index}", 5, 4)
    assert len(target.schedule(0).chunks) == 7


@pytest.mark.parametrize(("depth", "decodes", "sizes"), [
    (2, 1, [1, 0]), (2, 2, [1, 1]), (2, 7, [4, 3]), (3, 2, [1, 1, 0]), (3, 4, [2, 1, 1]), (4, 10, [3, 3, 2, 2]),
])  # fmt: skip
def test_decodes_are_divided_among_the_steps(depth: int, decodes: int, sizes: list[int]) -> None:
    target = scheduler(64, depth)
    for index in range(decodes):
        running(target, f"s{index}", 5, 4)
    assert [len(target.schedule(step).chunks) for step in range(depth)] == sizes


def test_a_prompt_fills_the_room_that_decodes_leave_in_every_step() -> None:
    target = scheduler(64, token_budget=16)
    for index in range(4):
        running(target, f"s{index}", 5, 4)
    running(target, "long", 60, 0)
    assert parts(target.schedule(0)) == [("s0", 4, 1), ("s1", 4, 1), ("long", 0, 14)]
    assert parts(target.schedule(1)) == [("s2", 4, 1), ("s3", 4, 1), ("long", 14, 14)]


# ------------------------------------------------------------------------------------------------- blocks run out
def test_the_needy_waits_while_those_who_could_give_are_in_flight() -> None:
    target = scheduler(4)
    old, young = running(target, "old", 9, 8), running(target, "young", 8, 7)
    young.in_flight = 1
    assert target.schedule(1) == Schedule([])
    assert old.state is young.state is State.RUNNING
    target.collected(Chunk(young, 7, 1))
    young.tokens.append(7)
    step = target.schedule(0)
    assert step.preempted == [young]
    assert parts(step) == [("old", 8, 1)]


def test_the_youngest_that_is_not_in_flight_is_preempted() -> None:
    target = scheduler(6)
    running(target, "old", 9, 8)
    idle, flying = running(target, "idle", 9, 8), running(target, "flying", 8, 7)
    flying.in_flight = 1
    step = target.schedule(1)
    assert step.preempted == [idle]
    assert parts(step) == [("old", 8, 1)]
    assert flying.state is State.RUNNING


def test_nobody_takes_blocks_from_who_is_older() -> None:
    target = scheduler(4)
    old, young = running(target, "old", 8, 7), running(target, "young", 9, 8)
    old.in_flight = 1
    assert target.schedule(1).preempted == [young]
    assert old.state is State.RUNNING


def test_a_prompt_with_a_chunk_in_flight_is_not_preempted_for_its_next_one() -> None:
    target = scheduler(4, token_budget=8)
    made = running(target, "s", 24, 8)
    chunk = target.schedule(0)
    assert parts(chunk) == [("s", 8, 8)]
    assert target.schedule(1) == Schedule([])
    assert (made.state, len(made.block_table)) == (State.RUNNING, 4)


def test_nobody_is_admitted_while_somebody_waits_for_blocks() -> None:
    target = scheduler(8, token_budget=12)
    running(target, "s", 36, 12)
    assert parts(target.schedule(0)) == [("s", 12, 12)]
    target.waiting.append(sequence("small", prompt(2)))
    assert target.pool.free_count == 2  # enough for it, but not for the next chunk of the other
    assert parts(target.schedule(1)) == []


def test_who_ends_in_flight_keeps_its_blocks_until_its_last_step_was_collected() -> None:
    target = scheduler(8, token_budget=8)
    made = running(target, "s", 24, 0)
    steps = [target.schedule(0), target.schedule(1)]
    target.remove(made)
    assert target.pool.used_count == 4
    collect(target, steps[0])
    assert target.pool.used_count == 4
    collect(target, steps[1])
    assert target.pool.used_count == 0
    assert len(made.tokens) == 24
