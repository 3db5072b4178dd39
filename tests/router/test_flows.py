"""Rates from counters: over seconds, from the second report on, and not across a restart."""

from __future__ import annotations

import dataclasses

from cluster.messages import Load
from router.flows import SPAN_S, Flow, Flows
from tests.router.dashboards import load


def counted(prompt: int, output: int, handed: int) -> Load:
    return dataclasses.replace(
        load("decode", 1, 0, 0),
        prompt_tokens_total=prompt,
        output_tokens_total=output,
        handoff_bytes_total=handed,
        fetched_memory_tokens_total=prompt,
        fetched_remote_tokens_total=prompt,
    )


def test_a_worker_counts_from_its_second_report() -> None:
    flows = Flows()
    flows.observe([("a", 1, counted(100, 1_000, 0))], 10.0)
    assert flows.of("a") == flows.of("nobody") == flows.total() == Flow()
    flows.observe([("a", 1, counted(140, 1_010, 60))], 12.0)
    assert flows.of("a") == Flow(20.0, 5.0, 30.0, 40.0)


def test_the_total_is_of_all_that_are_connected() -> None:
    flows = Flows()
    assert flows.total() == Flow()
    for now_s in (1.0, 2.0):
        ten = int(10 * now_s)
        flows.observe([("a", 1, counted(ten, 0, 0)), ("b", 1, counted(0, ten, ten))], now_s)
    assert flows.total() == Flow(10.0, 10.0, 10.0, 20.0)
    flows.observe([("a", 1, counted(30, 0, 0))], 3.0)
    assert flows.total().output_tokens == 0.0


def test_rates_are_of_the_last_seconds() -> None:
    flows = Flows()
    for second in range(100):
        flows.observe([("a", 1, counted(1_000 * min(second, 50), second, 0))], float(second))
    assert flows.of("a") == Flow(0.0, 1.0, 0.0, 0.0)
    assert len(flows._seen["a"][1]) <= SPAN_S + 2


def test_a_worker_that_began_anew_is_new() -> None:
    flows = Flows()
    flows.observe([("a", 1, counted(1_000, 0, 0))], 1.0)
    flows.observe([("a", 2, counted(10, 0, 0))], 2.0)
    assert flows.of("a") == Flow()
    flows.observe([("a", 2, counted(25, 0, 0))], 3.0)
    assert flows.of("a").prompt_tokens == 15.0
