"""The fits: they learn what they are shown, soon, and one bad measurement does not make them forget it."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.perfmodel import PATHS, PRIOR, PerfModel, decode_ms, fetch_ms, prefill_ms

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
    for _ in range(700):
        model.passed_over("memory")
    prior = PRIOR.memory
    assert before > 500
    assert model.fetch_ms(1_000_000, "memory") == pytest.approx(prior[0] + prior[1] * 1_000_000, rel=0.1)


def test_decodes_that_run_along_are_not_taken_for_the_prefill() -> None:
    model = PerfModel(STEP)
    for _ in range(100):
        model.observe_step([(256, 0)], 100.0)
        model.observe_step([(256, 0), *[(1, 500)] * 32], 112.5)
    assert model.prefill_ms(256, 0) == pytest.approx(100.0, rel=0.1)


def decode(batch: int, kv_tokens: int) -> float:
    """The same machine: ms of a step of decodes."""
    return 30 + 0.5 * batch + 4e-4 * kv_tokens


def served(noise: float, stall_every: int = 0, steps: int = 2000) -> PerfModel:
    """A worker whose every fifth step has a chunk of a prompt beside its decodes."""
    rng = random.Random(1)
    model = PerfModel(STEP)
    for number in range(steps):
        decodes = [(1, rng.randrange(100, 4000)) for _ in range(rng.randrange(1, 48))]
        kv_tokens = sum(context for _, context in decodes)
        factor = 50.0 if stall_every and number % stall_every == 0 else rng.gauss(1, noise)
        if number % 5:
            model.observe_step(decodes, decode(len(decodes), kv_tokens) * factor)
        else:
            take, context = rng.choice([40, 200, STEP - len(decodes)]), rng.choice([0, STEP, 2000])
            along = decode(len(decodes), kv_tokens) - decode(0, 0)
            model.observe_step([*decodes, (take, context)], (prefill(take, context) + along) * factor)
    return model


@pytest.mark.parametrize("stall_every", [0, 25])
def test_prefill_and_decode_are_told_apart_in_steps_of_both(stall_every: int) -> None:
    rates = served(0.05, stall_every).rates()
    for tokens, context in [(40, 0), (200, 1000), (STEP, 0), (STEP, 2000)]:
        assert prefill_ms(rates, tokens, context) == pytest.approx(prefill(tokens, context), rel=0.08)
    for batch, context in [(1, 500), (8, 2000), (40, 2000)]:
        assert decode_ms(rates, batch, batch * context) == pytest.approx(decode(batch, batch * context), rel=0.08)


def test_the_errors_it_states_are_those_of_its_predictions() -> None:
    """The mean of a normal variable's absolute value is 0.8 times its deviation."""
    rates = served(0.05).rates()
    assert rates.decode_error == pytest.approx(0.04, rel=0.4)
    assert 0.04 < rates.prefill_error < 0.08
    assert rates.fetch_error == 0.0


def test_what_only_one_kind_of_step_says_stays_in_the_proportions_of_the_prior() -> None:
    """One conversation for an hour: its steps are predicted, and no coefficient wanders off."""
    rng = random.Random(0)
    model = PerfModel(STEP)
    for _ in range(20_000):
        model.observe_step([(1, 500)], 3 * decode_ms(PRIOR, 1, 500) * rng.gauss(1, 0.05))
    rates = model.rates()
    assert rates.decode == pytest.approx([3 * value for value in PRIOR.decode], rel=0.05)
    assert rates.prefill == PRIOR.prefill


def test_a_machine_that_has_become_slower_is_believed_soon() -> None:
    model = trained()
    for _ in range(100):
        model.observe_step([(STEP, 0)], 4 * prefill(STEP, 0))
    assert model.prefill_ms(STEP, 0) == pytest.approx(4 * prefill(STEP, 0), rel=0.3)


def test_the_functions_say_what_the_model_says() -> None:
    model = trained()
    model.observe_fetch(10_000_000, "disk", 80.0)
    rates = model.rates()
    assert prefill_ms(rates, 3 * STEP + 7, 90) == pytest.approx(model.prefill_ms(3 * STEP + 7, 90))
    for path in PATHS:
        assert fetch_ms(rates, 5_000_000, path) == pytest.approx(model.fetch_ms(5_000_000, path))
    assert rates.fetch_error > 0.5
    assert decode_ms(rates, 0, 0) == fetch_ms(rates, 0, "disk") == prefill_ms(rates, 0, 10) == 0.0


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
