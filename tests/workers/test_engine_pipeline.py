"""The engine with several steps in flight: which ones, and that nothing is lost, mixed up or kept on the way."""

import pytest

from tests.workers.engine_run import Run, alone, assert_no_leak, crowded, engine, handed_over, prompt, sequence
from tests.workers.sim_pipelines import Early, Late

Kind = type[Late]


def pipeline(kind: Kind, depth: int, num_blocks: int = 256, token_budget: int = 64) -> tuple[Run, Late]:
    runner = kind(num_blocks, depth)
    return Run(engine(num_blocks, token_budget, runner=runner)), runner


def decoding(run: Run, count: int, new: int = 100) -> None:
    """That many sequences, of which all have their first token."""
    for index in range(count):
        run.engine.add(sequence(f"s{index}", prompt(5, seed=index), new))
    while len(run.tokens) < count:
        run.step()


@pytest.mark.parametrize("kind", [Early, Late])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("token_budget", [16, 64])
def test_steps_in_flight_change_no_token(kind: Kind, depth: int, token_budget: int) -> None:
    run, runner = pipeline(kind, depth, token_budget=token_budget)
    prompts = {f"s{n}": prompt(n, seed=n) for n in (1, 3, 4, 5, 8, 31, 100, 120)}
    for name, tokens in prompts.items():
        run.engine.add(sequence(name, tokens, new=20))
    run.finish_all()
    assert run.tokens == {name: alone(tokens, 20) for name, tokens in prompts.items()}
    assert runner.most == depth
    assert_no_leak(run.engine)


@pytest.mark.parametrize("depth", [2, 3])
def test_the_chunks_of_a_long_prompt_follow_each_other_through_the_stages(depth: int) -> None:
    run, runner = pipeline(Late, depth, token_budget=16)
    run.engine.add(sequence("long", prompt(100), new=1))
    for steps in range(1, depth):
        assert run.step().computed == 16
        assert len(runner.flying) == steps
        assert run.engine.counters.prompt_tokens_total == 0  # nothing was collected
    run.finish_all()
    assert [part for (part,) in runner.log] == [("long", first, min(16, 100 - first)) for first in range(0, 100, 16)]
    assert run.engine.counters.prompt_tokens_total == 100


@pytest.mark.parametrize("depth", [2, 3, 4])
@pytest.mark.parametrize("count", range(1, 10))
def test_groups_of_about_equal_size_circulate(depth: int, count: int) -> None:
    run, runner = pipeline(Late, depth)
    decoding(run, count)
    for _ in range(4 * depth):
        run.step()
    groups = min(depth, count)
    round_, again = runner.log[-2 * groups : -groups], runner.log[-groups:]
    names = [[name for name, _, _ in step] for step in again]
    assert names == [[name for name, _, _ in step] for step in round_]
    assert sorted(name for group in names for name in group) == [f"s{index}" for index in range(count)]
    sizes = [len(group) for group in names]
    assert max(sizes) - min(sizes) <= 1
    assert runner.most == groups


def test_groups_become_equal_again_when_members_of_one_have_left() -> None:
    run, runner = pipeline(Late, 2)
    decoding(run, 12)
    for _ in range(4):
        run.step()
    run.engine.abort([name for name, _, _ in runner.log[-1][:4]])
    for _ in range(8):
        run.step()
    assert [len(step) for step in runner.log[-4:]] == [4, 4, 4, 4]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_nobody_waits_for_long_while_others_come_and_go(depth: int) -> None:
    run, _ = pipeline(Late, depth)
    decoding(run, 5, new=60)
    quiet = dict.fromkeys(run.tokens, 0)  # steps since its last token
    seen = {name: len(tokens) for name, tokens in run.tokens.items()}
    for turn in range(150):
        run.engine.add(sequence(f"t{turn}", prompt(6, seed=turn), new=1 + turn % 9))
        run.step()
        for name in run.engine.sequences:
            if name in run.tokens:
                quiet[name] = 0 if len(run.tokens[name]) > seen.get(name, 0) else quiet.get(name, 0) + 1
                seen[name] = len(run.tokens[name])
                assert quiet[name] < 2 * depth
    run.finish_all()
    assert run.tokens["s0"] == alone(prompt(5, seed=0), 60)


@pytest.mark.parametrize("kind", [Early, Late])
@pytest.mark.parametrize("depth", [2, 3])
def test_preemption_spares_what_is_in_flight_and_changes_no_token(kind: Kind, depth: int) -> None:
    run, _ = pipeline(kind, depth, num_blocks=40, token_budget=32)
    crowded(run)


@pytest.mark.parametrize("how", ["aborted", "expired"])
def test_blocks_that_a_step_in_flight_writes_are_given_to_nobody(how: str) -> None:
    """With an older step before it, so that it is collected a step later than it was given up."""
    run, runner = pipeline(Late, 3, num_blocks=24, token_budget=32)
    gone = sequence("gone", prompt(60), new=4)
    run.engine.add(gone)
    run.step()
    run.step()
    table = list(gone.block_table)
    assert [len(step) for step in runner.flying] == [1, 1]
    if how == "aborted":
        run.engine.abort(["gone"])
    else:
        gone.deadline = -1.0
        run.step()
        assert run.failed == {"gone": "deadline_exceeded"}
    run.engine.add(sequence("next", prompt(70, seed=2), new=4))
    while "gone" in (chunk.sequence.id for chunk in runner.chunks()):
        assert run.engine.pool.used_count >= len(table)
        assert not any(set(table) & set(s.block_table) for s in run.engine.sequences.values())
        assert run.step().computed
    run.finish_all()
    assert run.tokens == {"next": alone(prompt(70, seed=2), 4)}
    assert_no_leak(run.engine)


def test_there_is_something_to_do_until_the_last_step_was_collected() -> None:
    run, runner = pipeline(Late, 3, token_budget=16)
    run.engine.add(sequence("s", prompt(32), new=4))
    run.step()
    run.step()
    run.engine.abort(["s"])
    assert [run.step().computed, len(runner.flying)] == [16, 1]
    assert [run.step().computed, len(runner.flying)] == [16, 0]
    assert run.step().computed == 0
    assert_no_leak(run.engine)


def test_nothing_that_is_in_flight_is_hit_or_sent() -> None:
    run, runner = pipeline(Late, 2, token_budget=16)
    run.engine.add(sequence("p", prompt(48), new=1, transfer_id="p"))
    assert run.step().sends == []
    step = run.step()  # the second chunk is in flight, the first was collected
    assert [position for send in step.sends for position, _ in send.blocks] == [0, 1, 2, 3]
    run.engine.add(sequence("same", prompt(48), new=1))
    run.step()
    run.step()
    hit = next(first for step in runner.log for name, first, _ in step if name == "same")
    assert hit == 32
    for send in [*step.sends, *run.sends[1:]]:
        run.engine.sent([block for _, block in send.blocks])
    run.sends.clear()
    run.finish_all()
    assert run.tokens["same"] == run.tokens["p"] == alone(prompt(48), 1)
    assert_no_leak(run.engine)


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("steps", range(8))
def test_abort_at_any_step_frees_everything(steps: int, depth: int) -> None:
    run, _ = pipeline(Late, depth, num_blocks=60, token_budget=16)
    for i in range(4):
        run.engine.add(sequence(f"s{i}", prompt(30, seed=i), new=50))
    for _ in range(steps):
        run.step()
    run.engine.abort([f"s{i}" for i in range(4)])
    run.finish_all()
    assert_no_leak(run.engine)


def test_a_handoff_joins_while_steps_are_in_flight() -> None:
    run, _ = pipeline(Late, 2)
    decoding(run, 4, new=30)
    handed_over(run, Late(32, 1))
