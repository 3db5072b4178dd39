"""The fits: they learn what they are shown, soon, and one bad measurement does not make them forget it."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.perfmodel import FETCH_PRIOR, PerfModel

STEP = 512


def prefill(tokens: int, context: int) -> float:
    """A machine: ms of one step."""
    return 8 + 1.5 * tokens + 2e-4 * tokens * (context + tokens / 2)


def trained(steps: int = 300, outlier_every: int = 0, noise: float = 0.1) -> PerfModel:
    rng = random.Random(0)
    model = PerfModel(STEP)
    for number in range(steps):
        tokens, context = rng.choice([16, 100, 300, STEP]), rng.choice([0, STEP, 2 * STEP, 4 * STEP])
        ms = prefill(tokens, context) * rng.uniform(1 - noise, 1 + noise)
        slow = outlier_every and number % outlier_every == outlier_every - 1
        model.observe_step([(tokens, context)], 10_000 if slow else ms)
    return model


@pytest.mark.parametrize(("tokens", "context"), [(16, 0), (100, 1000), (STEP, 0), (STEP, 2000)])
def test_it_learns_a_machine_that_is_ten_times_slower_than_the_prior(tokens: int, context: int) -> None:
    assert trained().prefill_ms(tokens, context) == pytest.approx(prefill(tokens, context), rel=0.25)


def test_it_has_an_idea_after_a_dozen_steps() -> None:
    assert trained(steps=12).prefill_ms(STEP, 0) == pytest.approx(prefill(STEP, 0), rel=0.5)


def test_a_prompt_longer_than_a_step_takes_several() -> None:
    whole = sum(prefill(STEP, context) for context in range(0, 4 * STEP, STEP))
    assert trained().prefill_ms(4 * STEP, 0) == pytest.approx(whole, rel=0.25)


@pytest.mark.parametrize("outlier_every", [20, 50])
def test_steps_of_ten_seconds_now_and_then_do_not_poison_it(outlier_every: int) -> None:
    model = trained(outlier_every=outlier_every)
    assert model.prefill_ms(STEP, 0) == pytest.approx(prefill(STEP, 0), rel=0.35)


def test_one_very_slow_fetch_changes_little_and_many_change_it() -> None:
    model = PerfModel(STEP)
    for _ in range(50):
        model.observe_fetch(10_000_000, "memory", 6.0)
    model.observe_fetch(10_000_000, "memory", 10_000.0)
    assert 6.0 <= model.fetch_ms(10_000_000, "memory") < 8.0
    for _ in range(50):
        model.observe_fetch(10_000_000, "memory", 60.0)
    assert model.fetch_ms(10_000_000, "memory") == pytest.approx(60.0, rel=0.3)


def test_paths_are_told_apart() -> None:
    model = PerfModel(STEP)
    before = model.fetch_ms(1_000_000, "disk")
    for _ in range(50):
        model.observe_fetch(1_000_000, "remote", 500.0)
    assert model.fetch_ms(1_000_000, "remote") == pytest.approx(500.0, rel=0.2)
    assert model.fetch_ms(1_000_000, "disk") == before


def test_before_any_measurement_fetching_looks_better_than_computing() -> None:
    """For a model of 8B parameters: 128 KiB of KV per token."""
    model = PerfModel(STEP)
    for tokens in (64, 512, 8192):
        assert model.fetch_ms(tokens * 2**17, "memory") < model.prefill_ms(tokens, 0)


def test_a_path_that_is_never_taken_is_given_another_chance() -> None:
    model = PerfModel(STEP)
    for _ in range(50):
        model.observe_fetch(1_000_000, "memory", 1000.0)
    before = model.fetch_ms(1_000_000, "memory")
    for _ in range(500):
        model.passed_over("memory")
    prior = FETCH_PRIOR["memory"]
    assert before > 500
    assert model.fetch_ms(1_000_000, "memory") == pytest.approx(prior[0] + prior[1] * 1_000_000, rel=0.1)


def test_decodes_that_run_along_are_not_taken_for_the_prefill() -> None:
    model = PerfModel(STEP)
    for _ in range(100):
        model.observe_step([(256, 0)], 100.0)
        model.observe_step([(256, 0), *[(1, 500)] * 32], 112.5)
    assert model.prefill_ms(256, 0) == pytest.approx(100.0, rel=0.1)


def test_nothing_takes_no_time() -> None:
    model = PerfModel(STEP)
    assert model.prefill_ms(0, 1000) == model.fetch_ms(0, "disk") == 0.0


measurements = st.lists(
    st.tuples(st.integers(1, 2048), st.integers(0, 8192), st.floats(0, 1e6, allow_nan=False)), max_size=30
)


@settings(max_examples=60, deadline=None)
@given(measurements, st.integers(0, 4096), st.integers(0, 4096), st.integers(0, 8192))
def test_whatever_it_is_told_it_is_never_negative_and_grows_with_its_arguments(
    told: list[tuple[int, int, float]], tokens: int, more: int, context: int
) -> None:
    model = PerfModel(STEP)
    for take, before, ms in told:
        model.observe_step([(take, before)], ms)
        model.observe_fetch(take * 1000, "memory", ms)
    little, much = model.prefill_ms(tokens, context), model.prefill_ms(tokens + more, context)
    assert 0 <= little <= much < float("inf")
    assert little <= model.prefill_ms(tokens, context + more)
    assert 0 <= model.fetch_ms(tokens, "memory") <= model.fetch_ms(tokens + more, "memory")
