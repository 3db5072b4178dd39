"""What an engine counts about where prompts' KV came from, what it decided, and how its thread spends its time."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from cluster.messages import DecodeJob, Load, Submit
from kvstore.redis_server import EmbeddedRedis
from tests.workers.engine_run import Run, engine, prompt, sequence
from tests.workers.site import PROMPT, Site, generation, run, until
from workers.counters import Counters, EngineCounters


def stocked(length: int) -> dict[bytes, bytes]:
    """A store that has the prompt."""
    store: dict[bytes, bytes] = {}
    writer = Run(engine(), store)
    for name in ("first", "second"):  # what comes twice is written
        writer.add(sequence(name, prompt(length)))
        writer.finish_all()
    return store


def test_every_counter_has_a_field_of_that_name_to_travel_in() -> None:
    names = {field.name for field in fields(Load)}
    assert {field.name for kind in (Counters, EngineCounters) for field in fields(kind)} <= names


def test_a_prompt_token_has_one_source() -> None:
    """A part from the device, a part fetched, the rest computed: they add up to the prompts."""
    done = Run(engine(), stocked(100))
    done.add(sequence("short", prompt(40), new=1))
    done.finish_all()
    short = done.engine.load("both")
    assert (short.device_tokens_total, short.prompt_tokens_total, short.fetches_total) == (0, 4, 1)
    done.add(sequence("long", prompt(100)))
    done.finish_all()
    load = done.engine.load("both")
    assert load.device_tokens_total == 40
    assert load.prompt_tokens_total == 4 + 4
    assert (load.fetches_total, load.recomputes_total) == (2, 0)


def test_passing_a_store_over_is_a_decision() -> None:
    slow = Run(engine(), stocked(40))
    for _ in range(100):
        slow.engine.model.observe_fetch(1, "memory", 10_000.0)
    slow.add(sequence("s", prompt(40)))
    slow.finish_all()
    load = slow.engine.load("both")
    assert (load.fetches_total, load.recomputes_total, load.recomputed_tokens_total) == (0, 1, 36)


@pytest.fixture(scope="module")
def redis() -> Any:
    server = EmbeddedRedis()
    yield server
    server.close()


def test_a_worker_says_how_its_engine_spends_its_time(redis: EmbeddedRedis) -> None:
    async def body(site: Site) -> None:
        d = await site.worker("d")
        await d.call("Submit", Submit("router", DecodeJob(generation("d1"))), 5)
        await until(lambda: len(site.tokens.get("d1", [])) == 10)
        await until(lambda: site.load("d").idle_seconds_total > 0)
        load = site.load("d")
        assert 0 < load.model_seconds_total <= load.busy_seconds_total
        assert load.prompt_tokens_total == len(PROMPT)

    run(body, redis)
