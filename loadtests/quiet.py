"""What a Tandem server must look like when nobody asks anything: no request, no block in use, no slab held.

A server leaks when it does not return to that within a while. Any other server is left alone: only Tandem's /metrics
say it. A page that says nothing of blocks is a failure too, or a renamed metric would hide every leak.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import urllib3
from prometheus_client.parser import text_string_to_metric_families

from cluster.errors import ConfigError
from loadtests.client import base

ASK_S = 10.0
AGAIN_S = 0.5
# sample -> the labels that a sample has to have to count, and what it counts
BUSY: dict[str, tuple[dict[str, tuple[str, ...]], str]] = {
    "tandem_worker_running": ({}, "sequences run"),
    "tandem_worker_waiting": ({}, "sequences wait"),
    "tandem_queue_requests": ({}, "requests wait in the router"),
    "tandem_worker_kv_blocks_used": ({}, "KV blocks are in use"),
    "tandem_store_slabs": ({"state": ("reserved", "held")}, "slabs are held in stores"),
}


def busy(page: str) -> list[str]:
    """What the text of /metrics says is in use; empty when nothing is. Raises ConfigError when it does not say."""
    found = dict.fromkeys(BUSY, 0.0)
    seen = set()
    for name, labels, value in _samples(page):
        wanted = BUSY[name][0]
        seen.add(name)
        if all(labels.get(label) in values for label, values in wanted.items()):
            found[name] += value
    if missing := BUSY.keys() - seen:
        raise ConfigError(f"/metrics does not have {', '.join(sorted(missing))}: nobody can tell whether blocks leak")
    return [f"{value:g} {BUSY[name][1]}" for name, value in found.items() if value]


def _samples(page: str) -> Iterator[tuple[str, dict[str, str], float]]:
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.name in BUSY:
                yield sample.name, sample.labels, sample.value


def leaks(url: str, within_s: float) -> list[str]:
    """What is still in use after so long; empty as soon as nothing is, and for a server that is not Tandem.

    Raises ConfigError as `busy` does, and when a Tandem server no longer answers.
    """
    if (page := _metrics(url)) is None or "tandem_" not in page:
        return []
    deadline = time.monotonic() + within_s
    while left := busy(page):
        if time.monotonic() > deadline:
            return left
        time.sleep(AGAIN_S)
        page = _metrics(url) or ""
    return []


def _metrics(url: str) -> str | None:
    """None when there is no such page."""
    try:
        answer = urllib3.request("GET", base(url) + "/metrics", timeout=ASK_S, retries=False)
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise ConfigError(f"{base(url)}/metrics does not answer after the test ({type(error).__name__})") from error
    return answer.data.decode(errors="replace") if answer.status == 200 else None
