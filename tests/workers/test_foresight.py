"""The engine one step ahead of its runner: the same tokens, nobody left out, nothing kept of rows computed in vain."""

import dataclasses

import pytest

from tests.workers.engine_run import Run, alone, assert_no_leak, crowded, engine, handed_over, prompt, sequence
from tests.workers.sim_pipelines import Late, written
from workers.runner import Chunk
from workers.sequence import Sequence, State


class Ahead(Late):
    """Computes steps one by one, the second in flight from what the first has chosen. What became of a sequence that
    ended meanwhile is garbage, as on a device."""

    ahead = True

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks, 2)
        self.rows_ahead = 0

    def _check(self, chunk: Chunk) -> None:
        s = chunk.sequence
        assert s.state is State.RUNNING
        own = [c for step in self.flying for c in step if c.sequence is s]
        assert chunk.ahead == sum(c.samples for c in own)
        assert chunk.first == (own[-1].first + own[-1].take if own else s.computed)
        assert chunk.first + chunk.take <= len(s.tokens) + chunk.ahead
        assert not set(written([chunk])) & set(written(c for c in self.chunks() if c.sequence is not s))
        self.rows_ahead += chunk.ahead

    def collect(self) -> list[int | None]:
        chunks = self.flying.popleft()
        known = [chunk for chunk in chunks if chunk.first + chunk.take <= len(chunk.sequence.tokens)]
        tokens = dict(zip(map(id, known), self.run(known), strict=True))
        return [tokens.get(id(chunk), 1 if chunk.samples else None) for chunk in chunks]


def ahead(num_blocks: int = 256, token_budget: int = 64) -> tuple[Run, Ahead]:
    runner = Ahead(num_blocks)
    return Run(engine(num_blocks, token_budget, runner=runner)), runner


def sampling(made: Sequence, **changes: object) -> Sequence:
    changed = dataclasses.replace(made.generation.sampling, **changes)  # type: ignore[arg-type]
    made.generation = dataclasses.replace(made.generation, sampling=changed)
    return made


def rows(runner: Ahead, name: str) -> int:
    return sum(take for step in runner.log for who, _, take in step if who == name)


@pytest.mark.parametrize("token_budget", [16, 64])
def test_going_on_from_tokens_in_flight_changes_none(token_budget: int) -> None:
    run, runner = ahead(token_budget=token_budget)
    prompts = {f"s{n}": prompt(n, seed=n) for n in (1, 3, 4, 5, 8, 31, 100, 120)}
    for name, tokens in prompts.items():
        run.engine.add(sequence(name, tokens, new=20))
    run.finish_all()
    assert run.tokens == {name: alone(tokens, 20) for name, tokens in prompts.items()}
    assert runner.rows_ahead == len(prompts) * 19  # all but each one's first
    assert runner.most == 2
    assert all(rows(runner, name) == len(tokens) + 19 for name, tokens in prompts.items()), "rows past the last token"
    assert_no_leak(run.engine)


def test_every_step_has_everybody() -> None:
    run, runner = ahead()
    for index in range(7):
        run.engine.add(sequence(f"s{index}", prompt(5, seed=index), 40))
    while len(run.tokens) < 7:
        run.step()
    for _ in range(10):
        run.step()
    assert [len(step) for step in runner.log[-8:]] == [7] * 8


def test_a_stop_token_ends_a_sequence_whose_next_row_is_in_flight() -> None:
    whole = alone(prompt(9), 20)
    end = next(index for index in range(3, 20) if whole[index] not in whole[:index])
    run, runner = ahead()
    run.engine.add(sampling(sequence("s", prompt(9), 20), stop_token_ids=(whole[end],)))
    run.engine.add(sequence("other", prompt(11, seed=2), 20))
    run.finish_all()
    assert run.tokens == {"s": whole[: end + 1], "other": alone(prompt(11, seed=2), 20)}
    assert run.finish["s"] == "stop"
    assert rows(runner, "s") == 9 + end + 1, "one row in vain"
    assert_no_leak(run.engine)


def test_preemption_changes_no_token() -> None:
    run, _ = ahead(num_blocks=40, token_budget=32)
    crowded(run)


@pytest.mark.parametrize("steps", range(9))
def test_abort_at_any_step_frees_everything_and_spares_the_others(steps: int) -> None:
    run, _ = ahead(num_blocks=80, token_budget=16)
    for i in range(5):
        run.engine.add(sequence(f"s{i}", prompt(9 + i, seed=i), new=20))
    for _ in range(steps):
        run.step()
    run.engine.abort([f"s{i}" for i in range(4)])
    run.finish_all()
    assert run.tokens["s4"] == alone(prompt(13, seed=4), 20)
    assert_no_leak(run.engine)


def test_a_deadline_passes_while_a_token_is_in_flight() -> None:
    run, _ = ahead()
    run.engine.add(sequence("s", prompt(10), new=400))
    run.engine.sequences["s"].deadline = 5.0
    for _ in range(5):
        run.step()
    run.now = 6.0
    run.finish_all()
    assert run.failed == {"s": "deadline_exceeded"}
    assert run.tokens["s"] == alone(prompt(10), 400)[: len(run.tokens["s"])]
    assert_no_leak(run.engine)


@pytest.mark.parametrize("changes", [{"repetition_penalty": 1.1}, {"logit_bias": ((4, 1.0),)}, {"min_tokens": 6}])
def test_a_token_that_the_host_chooses_is_waited_for(changes: dict[str, object]) -> None:
    run, runner = ahead()
    run.engine.add(sampling(sequence("s", prompt(9), 6), **changes))
    run.finish_all()
    assert run.tokens["s"] == alone(prompt(9), 6)  # the sim has no logits to adjust
    assert runner.rows_ahead == 0


def test_the_context_is_never_exceeded() -> None:
    run, runner = ahead(num_blocks=32)
    run.engine.add(sequence("s", prompt(100), new=1000))
    run.finish_all()
    assert len(run.tokens["s"]) == run.engine.max_context - 100
    assert max(first + take for step in runner.log for _, first, take in step) == run.engine.max_context - 1


def test_a_prefill_for_somebody_else_ends_with_its_token() -> None:
    run, runner = ahead(token_budget=16)
    run.engine.add(sequence("p", prompt(40), transfer_id="p"))
    run.finish_all()
    assert run.tokens["p"] == alone(prompt(40), 1)
    assert rows(runner, "p") == 40
    assert_no_leak(run.engine)


def test_a_handoff_joins_while_steps_are_in_flight() -> None:
    run, _ = ahead()
    for index in range(3):
        run.engine.add(sequence(f"s{index}", prompt(5, seed=index), 30))
    run.step()
    handed_over(run, Late(32, 1))


def test_what_stores_are_given_is_complete() -> None:
    """Blocks that are offered were collected: their bytes are those of an engine that is not ahead."""
    stores: list[dict[bytes, bytes]] = [{}, {}]
    for store, target in zip(stores, (ahead()[0], Run(engine())), strict=True):
        target.store = store
        for index in range(4):
            target.add(sequence(f"s{index}", prompt(17, seed=index), 30))
        target.finish_all()
    assert stores[0] == stores[1] != {}
