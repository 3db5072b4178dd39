"""Reads /metrics over and over while a scenario runs, and says which metrics moved."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client.parser import text_string_to_metric_families

from router.families import Family, Scenario
from router.metrics import FAMILIES
from tests.serving import Served, wait_until

EVERY_S = 0.15
SETTLE_S = 90.0  # processes start within it, on a busy machine too
Page = dict[tuple[str, tuple[tuple[str, str], ...]], float]  # (sample, its labels) -> value


def page(served: Served) -> Page:
    """Fails on one that Prometheus would not read."""
    with urllib.request.urlopen(f"{served.url}/metrics", timeout=10) as response:
        families = text_string_to_metric_families(response.read().decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def sample(family: Family) -> str:
    """The name of what moves when it does."""
    return family.name + ("_count" if family.kind == "histogram" else "")


class Watch:
    """What each scenario moved. Nothing is read between scenarios."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._moved: dict[Scenario, set[str]] = {}  # names of samples

    def moved(self, family: Family) -> bool:
        """Whether its own scenario did, or whether it is there and above zero, if that is its scenario."""
        if family.moved_by == "steady":
            return any(value > 0 for (name, _), value in page(self._served).items() if name == family.name)
        return sample(family) in self._moved.get(family.moved_by, set())

    def text(self) -> str:
        with urllib.request.urlopen(f"{self._served.url}/metrics", timeout=10) as response:
            return str(response.read().decode())

    @contextmanager
    def scenario(self, *names: Scenario) -> Iterator[Callable[[], None]]:
        """Something has moved when two pages, from just before the block to just after it, differ in it. Yields what
        waits until everything that these scenarios should move has, while they go on: on a slow machine pages are few,
        and what is above zero for a moment only could be on none of them."""
        before = page(self._served)
        moved: set[str] = set()
        over = threading.Event()

        def compare() -> None:
            try:
                now = page(self._served)
            except (urllib.error.URLError, TimeoutError, ConnectionError):
                return  # a fault may be in the way of one page
            moved.update(name for name, _ in before.keys() ^ now.keys())
            moved.update(key[0] for key in before.keys() & now.keys() if before[key] != now[key])

        def watch() -> None:
            while not over.wait(EVERY_S):
                compare()

        def missing() -> set[str]:
            return {sample(family) for family in FAMILIES if family.moved_by in names} - moved

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield lambda: wait_until(lambda: not missing(), SETTLE_S, lambda: f"{names}: {missing()} did not move")
        finally:
            over.set()
            thread.join(20)
        compare()
        for name in names:
            self._moved[name] = self._moved.get(name, set()) | moved
