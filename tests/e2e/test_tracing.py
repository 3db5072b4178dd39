"""Traces of a real deployment, as a collector gets them: one whole tree per request, over all of its processes."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.collector import Collector, Seen, collecting, edges
from tests.serving import Served, serving, wait_until

COME_S = 30.0  # until all of a tree has been exported
KEY = "key-of-a-tenant"
WORD = "marmalade"
SETTINGS = {"TANDEM_SIM_MS": "20,0.03,0", "TANDEM_THREADS": "1", "TANDEM_API_KEYS": KEY}
DISAGGREGATED = sorted(
    [
        ("request", ""),
        ("queue", "request"),
        ("generation", "request"),
        ("placement", "generation"),
        ("prefill leg", "generation"),
        ("prefill", "prefill leg"),
        ("store find", "prefill"),
        ("handoff reserve", "prefill"),
        ("store reserve", "handoff reserve"),
        ("queue", "prefill"),
        ("compute", "prefill"),
        ("handoff write", "prefill"),
        ("decode leg", "generation"),
        ("decode", "decode leg"),
        ("queue", "decode"),
        ("handoff follow", "decode"),
        ("store follow", "handoff follow"),
        ("generate", "decode"),
    ]
)


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as made:
        yield made


@pytest.fixture(scope="module")
def served(tiny: Path, collector: Collector) -> Iterator[Served]:
    arguments = ("--runner", "sim", "--placement", "least_loaded")  # so that every prompt is handed over
    with serving(str(tiny), *arguments, **SETTINGS, **collector.environment()) as deployment:
        yield deployment


def ask(served: Served, new: int, *, sampled: bool = True) -> tuple[str, str]:
    """Generate that many tokens. Returns the ids of the client's trace and of its span."""
    trace, span = secrets.token_hex(16), secrets.token_hex(8)
    answer = served.post(
        "/v1/completions",
        {"prompt": trace + f" {WORD}" * 20, "max_tokens": new, "ignore_eos": True},
        headers={"authorization": f"Bearer {KEY}", "traceparent": f"00-{trace}-{span}-{int(sampled):02}"},
    )
    assert answer.status_code == 200, answer.text
    return trace, span


def one(tree: list[Seen], name: str, process: str = "") -> Seen:
    (found,) = [span for span in tree if span.name == name and span.process.startswith(process)]
    return found


def test_a_request_is_one_tree_over_router_store_prefill_and_decode(served: Served, collector: Collector) -> None:
    unsampled, _ = ask(served, 2, sampled=False)
    trace, span = ask(served, 20)
    wait_until(lambda: edges(collector.tree(trace)) == DISAGGREGATED, COME_S, lambda: str(edges(collector.tree(trace))))
    tree = collector.tree(trace)
    assert one(tree, "request").parent == span
    processes = {span.name: span.process for span in tree if span.name != "queue"}
    router = processes["request"]
    assert router.startswith("router")
    for name in ("generation", "placement", "prefill leg", "decode leg"):
        assert processes[name] == router
    for name in ("prefill", "compute", "handoff reserve", "handoff write"):
        assert processes[name] == "prefill-0"
    for name in ("decode", "handoff follow", "generate"):
        assert processes[name] == "decode-0"
    assert len({processes[name] for name in ("store find", "store reserve", "store follow")} | {router}) == 2
    placement, generation = one(tree, "placement").attributes, one(tree, "generation").attributes
    assert (placement["tandem.kind"], placement["tandem.prefill"]) == ("disaggregated", "prefill-0")
    assert placement["tandem.decode"] == one(tree, "decode").attributes["tandem.worker"] == "decode-0"
    assert (generation["gen_ai.usage.output_tokens"], generation["tandem.outcome"]) == (20, "length")
    assert one(tree, "request").attributes["http.response.status_code"] == 200
    assert one(tree, "decode").attributes["tandem.preemptions"] == 0
    blocks = one(tree, "handoff write").attributes["tandem.blocks"]
    assert 0 < blocks == one(tree, "handoff follow").attributes["tandem.blocks"]
    assert blocks == one(tree, "store follow").attributes["tandem.blocks"]
    assert not any(span.failed for span in tree)
    assert all(span.began_ns <= span.ended_ns for span in tree)
    assert unsampled not in collector.traces()


def test_a_request_whose_worker_is_killed_shows_the_second_leg(served: Served, collector: Collector) -> None:
    wait_until(lambda: served.connected("prefill-0", "decode-0"), COME_S)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, served, 100)
        wait_until(lambda: (served.workers()["decode-0"]["running"] or 0) > 0, COME_S)
        os.kill(served.pid("decode-0"), signal.SIGKILL)
        trace, _ = asked.result(60)
    wait_until(lambda: "request" in {span.name for span in collector.tree(trace)}, COME_S)
    wait_until(lambda: ("decode", "decode leg") in edges(collector.tree(trace)), COME_S)
    tree = collector.tree(trace)
    first, second = sorted((span for span in tree if span.name == "decode leg"), key=lambda span: span.began_ns)
    assert first.parent == second.parent == one(tree, "generation").id
    assert (first.failed, first.attributes["error.type"]) == (True, "worker_lost")
    assert (second.failed, second.attributes["tandem.worker"]) == (False, "prefill-0")
    assert [leg.attributes["tandem.attempt"] for leg in (first, second)] == [0, 1]
    (decode,) = [span for span in tree if span.name == "decode" and span.process == "prefill-0"]
    assert decode.parent == second.id
    assert 0 < decode.attributes["tandem.earlier_tokens"] < 100
    assert one(tree, "generation").attributes["tandem.placements"] == 2
    assert not one(tree, "generation").failed


def test_what_a_client_does_wrong_is_traced_and_what_it_may_not_do_is_not(served: Served, collector: Collector) -> None:
    trace = secrets.token_hex(16)
    parent = {"traceparent": f"00-{trace}-{secrets.token_hex(8)}-01"}
    body = {"prompt": WORD, "max_tokens": 2}
    assert httpx.post(f"{served.url}/v1/completions", json=body, headers=parent).status_code == 401
    allowed = parent | {"authorization": f"Bearer {KEY}"}
    assert served.post("/v1/completions", body | {"model": "another"}, headers=allowed).status_code == 404
    wait_until(lambda: bool(collector.tree(trace)), COME_S)
    (span,) = collector.tree(trace)
    assert (span.name, span.attributes["http.response.status_code"], span.failed) == ("request", 404, False)


def test_no_prompt_and_no_key_is_sent(collector: Collector, served: Served) -> None:
    trace, _ = ask(served, 2)
    wait_until(lambda: "request" in {span.name for span in collector.tree(trace)}, COME_S)
    for secret in (WORD, KEY):
        assert secret.encode() not in collector.received
