"""Giving up what decodes: its blocks go to the store first, and another engine ends with the same tokens."""

import pytest

from tests.workers.engine_run import BLOCK, Run, alone, assert_no_leak, engine, prompt, sequence
from tests.workers.sim_pipelines import Late
from workers.offering import Offering
from workers.step import Offload


def begun(run: Run, count: int = 3, new: int = 40) -> dict[str, list[int]]:
    """That many sequences of different length that have begun to decode; their prompts."""
    prompts = {f"s{index}": prompt(20 + 7 * index, seed=index) for index in range(count)}
    for name, tokens in prompts.items():
        run.add(sequence(name, tokens, new))
    while len(run.tokens) < count:
        run.step()
    return prompts


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_what_is_given_up_goes_on_elsewhere_from_the_store(depth: int) -> None:
    run = Run(engine(runner=Late(256, depth)))
    prompts = begun(run)
    run.engine.migrate(until=1.0)
    while run.engine.sequences:
        run.step()
    run.finish_all()
    assert run.failed == dict.fromkeys(prompts, "moved")
    assert_no_leak(run.engine)
    other = Run(engine(), run.store)
    for name, tokens in prompts.items():
        known = len(tokens) + len(run.tokens[name])
        other.add(sequence(name, [*tokens, *run.tokens[name]], 40 - len(run.tokens[name])))
        other.finish_all()
        assert run.tokens[name] + other.tokens[name] == alone(tokens, 40)
        assert other.cached[name] == (known - 1) // BLOCK * BLOCK
    assert_no_leak(other.engine)


def test_they_go_on_until_the_store_has_their_blocks() -> None:
    run = Run(engine())
    begun(run, count=1)
    run.engine.migrate(until=1.0)
    writing: list[Offload] = []
    for _ in range(10):
        step = run.engine.step(0.9)
        writing += step.offloads
        assert len(step.outputs) == 1
    first, rest = writing[:5], writing[5:]
    assert len(rest) == 2, "what it has computed meanwhile"
    run.engine.offloaded(first)
    step = run.step()
    assert run.failed == {"s0": "moved"}
    run.engine.offloaded(rest)
    run.finish_all()
    assert_no_leak(run.engine)


def test_a_store_that_does_not_answer_is_not_waited_for_for_long() -> None:
    run = Run(engine())
    begun(run, count=1)
    run.engine.migrate(until=1.0)
    writing = run.engine.step(0.9).offloads
    assert run.engine.sequences
    run.now = 1.0
    run.step()
    assert run.failed == {"s0": "moved"}
    assert run.engine.pool.used_count == len(writing), "they are still being written"
    run.engine.offloaded(writing)
    assert_no_leak(run.engine)


def test_only_what_decodes_is_given_up() -> None:
    run = Run(engine(max_sequences=1))
    begun(run, count=1)
    run.add(sequence("waits", prompt(9)))
    run.add(sequence("prefill", prompt(9, seed=5), transfer_id="prefill"))
    run.engine.migrate(until=0.0)
    run.finish_all()
    assert run.failed == {"s0": "moved"}
    assert run.tokens["waits"] == alone(prompt(9))
    assert len(run.tokens["prefill"]) == 1
    assert run.revoked == []
    assert_no_leak(run.engine)


def test_a_block_is_offered_once() -> None:
    run = Run(engine())
    offering = Offering(run.engine.pool, BLOCK)
    begun(run, count=1)
    (decoding,) = run.engine.sequences.values()
    assert len(offering.all_of(decoding)) == 5
    assert len(offering.under_way) == 5
    assert offering.all_of(decoding) == []
