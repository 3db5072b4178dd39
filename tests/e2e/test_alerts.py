"""Every alert fires when what it is for is caused, and not before: a real Prometheus, a real deployment, real faults.
The dashboard asks the same Prometheus.

The rules are those of deploy/monitoring/alerts.yaml with their patience cut short: `for` and the windows of rates, or
each alert would take minutes. Thresholds stay.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from deploy.environment import free_range
from deploy.monitoring.dashboards import dashboard
from kvstore.redis_server import EmbeddedRedis
from tests.e2e.fake_driver import pynvml
from tests.serving import Served, serving, wait_until

PROMETHEUS = shutil.which("prometheus")
RULES = Path(__file__).parents[2] / "deploy" / "monitoring"
EVERY = "2s"  # above the second that a page may take when Redis has just been lost
WINDOW = "20s"
FIRES_S = 60.0
SETTINGS = {
    "TANDEM_SIM_MS": "10,0.2,0.01",  # a step over much context is slow
    "TANDEM_THREADS": "1", "TANDEM_MAX_SEQUENCES": "32", "TANDEM_MAX_QUEUE": "8", "TANDEM_TTFT_SLO": "0.5",
    "TANDEM_ITL_SLO": "0.1", "TANDEM_STORE_MEMORY": str(2**20),
}  # fmt: skip

pytestmark = pytest.mark.skipif(PROMETHEUS is None, reason="there is no prometheus here; apt-get install prometheus")


@dataclass
class Alerts:
    """What Prometheus says."""

    url: str

    def firing(self) -> set[str]:
        found = httpx.get(f"{self.url}/api/v1/alerts", timeout=10).json()["data"]["alerts"]
        return {alert["labels"]["alertname"] for alert in found if alert["state"] == "firing"}

    def all(self) -> set[str]:
        groups = httpx.get(f"{self.url}/api/v1/rules", timeout=10).json()["data"]["groups"]
        return {rule["name"] for group in groups for rule in group["rules"]}

    def scrapes(self) -> float:
        found = self.ask('sum_over_time(up{job="tandem"}[1h])')
        return float(found[0]["value"][1]) if found else 0.0

    def ask(self, query: str) -> list[dict[str, Any]]:
        """Fails when that is no PromQL."""
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": query}, timeout=10)
        assert answer.is_success, (query, answer.text)
        found: list[dict[str, Any]] = answer.json()["data"]["result"]
        return found

    def await_firing(self, *names: str) -> None:
        wait_until(lambda: set(names) <= self.firing(), FIRES_S, lambda: f"{names}, but {self.firing()}")

    def assert_quiet(self, *names: str) -> None:
        """Before its cause an alert says nothing."""
        assert not set(names) & self.firing()

    def await_quiet(self, *names: str) -> None:
        wait_until(lambda: not set(names) & self.firing(), FIRES_S, lambda: f"{self.firing()}")


@contextmanager
def prometheus(folder: Path, target: str) -> Iterator[Alerts]:
    """It scrapes the target by our own configuration, only sooner."""
    config: dict[str, Any] = yaml.safe_load((RULES / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": EVERY, "evaluation_interval": "1s"}
    (job,) = config["scrape_configs"]
    job["scrape_timeout"] = EVERY
    job["static_configs"] = [{"targets": [target]}]
    rules = yaml.safe_load((RULES / "alerts.yaml").read_text())
    for rule in rules["groups"][0]["rules"]:
        rule["for"] = "0s"
        rule["expr"] = re.sub(r"\[5m\]", f"[{WINDOW}]", rule["expr"])
    (folder / "alerts.yaml").write_text(yaml.safe_dump(rules))
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    port = free_range(1)
    command = [
        str(PROMETHEUS), f"--config.file={folder / 'prometheus.yaml'}", f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}", "--log.level=error",
    ]  # fmt: skip
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    alerts = Alerts(f"http://127.0.0.1:{port}")

    def ready() -> bool:
        assert process.poll() is None, (folder / "log").read_text()
        try:
            return httpx.get(f"{alerts.url}/-/ready", timeout=1).is_success
        except httpx.TransportError:
            return False

    try:
        wait_until(ready, 30)
        yield alerts
    finally:
        process.terminate()
        process.wait(20)


@contextmanager
def traffic(served: Served, users: int, length: int, new: int) -> Iterator[None]:
    """Users who ask one thing after the other, whatever the answer, and leave when it is over."""
    over = threading.Event()

    def user(seed: int) -> None:
        rng = random.Random(seed)
        while not over.is_set():
            prompt = [rng.randrange(10, 400) for _ in range(length)]
            body = {"prompt": prompt, "max_tokens": new, "ignore_eos": True, "stream": True}
            with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=60) as response:
                for _ in response.iter_lines():
                    if over.is_set():
                        return
            over.wait(0.3)

    with ThreadPoolExecutor(users) as pool:
        asking = [pool.submit(user, random.randrange(2**32)) for _ in range(users)]
        try:
            yield
        finally:
            over.set()
    for one in asking:
        one.result()


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.timeout(480)
def test_every_alert_fires_when_it_is_caused(tiny: Path, tmp_path: Path) -> None:
    seen: set[str] = set()
    disk = tmp_path / "disk"
    with ExitStack() as stack:
        index = stack.enter_context(closing(EmbeddedRedis()))
        settings = {**SETTINGS, "TANDEM_REDIS_URL": index.url, "TANDEM_DISK": str(disk)}
        settings |= pynvml.environment(tmp_path / "gpus")
        pynvml.write(tmp_path / "gpus", [pynvml.H200])
        deployment = stack.enter_context(ExitStack())
        arguments = ("--runner", "sim", "--placement", "least_loaded")
        served = deployment.enter_context(serving(str(tiny), *arguments, **settings))
        alerts = stack.enter_context(prometheus(tmp_path, served.url.removeprefix("http://")))

        def caused(*names: str) -> None:
            alerts.await_firing(*names)
            seen.update(names)

        with traffic(served, users=1, length=50, new=60):  # so many that handoffs are a small part of the gaps
            wait_until(lambda: alerts.scrapes() >= 5 and not alerts.firing(), FIRES_S, lambda: f"{alerts.firing()}")
        too_much(served, caused)
        panels_have_something_to_show(alerts)
        dead_workers(served, caused, alerts)
        bad_blocks(served, disk, caused, alerts)
        alerts.assert_quiet("TandemIndexLost", "TandemControllerGone")
        with stopped(index.pid):
            caused("TandemIndexLost")
            assert "TandemControllerGone" not in alerts.firing(), "without Redis nobody knows"
        alerts.await_quiet("TandemIndexLost")
        with stopped(served.process.pid):
            caused("TandemControllerGone")
        alerts.await_quiet("TandemControllerGone")
        alerts.assert_quiet("TandemDown")
        deployment.close()
        caused("TandemDown")
        assert seen == alerts.all()


def too_much(served: Served, caused: Any) -> None:
    """More requests than may wait, with more context than the KV cache holds."""
    with traffic(served, users=48, length=200, new=400):
        caused("TandemRefusing", "TandemKvCacheFull", "TandemPreempting", "TandemTtftOverSlo", "TandemItlOverSlo")


def panels_have_something_to_show(alerts: Alerts) -> None:
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            query = target["expr"].replace("$__rate_interval", "1m").replace("$gpu_hour_price", "2.50")
            assert alerts.ask(query), (panel["title"], query)


def dead_workers(served: Served, caused: Any, alerts: Alerts) -> None:
    alerts.assert_quiet("TandemNoWorkers", "TandemErrors")
    # until there are few other handoffs in the window; and who leaves in the middle of one lets it fail
    alerts.await_quiet("TandemRefusing", "TandemPreempting", "TandemHandoffFailures")
    before = served.metric("tandem_handoffs_total")
    with traffic(served, users=4, length=1_500, new=2):  # so many that some prompt is always being computed
        wait_until(lambda: served.metric("tandem_handoffs_total") > before, FIRES_S)
        os.kill(served.pid("prefill-0"), signal.SIGKILL)
        caused("TandemHandoffFailures")
    alerts.await_quiet("TandemNoWorkers")
    with traffic(served, users=2, length=50, new=2):
        for worker in ("prefill-0", "decode-0"):
            os.kill(served.pid(worker), signal.SIGKILL)
        caused("TandemNoWorkers", "TandemErrors")
    alerts.await_quiet("TandemNoWorkers")


def bad_blocks(served: Served, disk: Path, caused: Any, alerts: Alerts) -> None:
    with traffic(served, users=1, length=500, new=2):
        wait_until(lambda: served.metric("tandem_store_disk_blocks") > 0, FIRES_S)
    alerts.assert_quiet("TandemStoreCorruption")
    for file in disk.rglob("*"):
        if file.is_file() and file.stat().st_size > 512:
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data)
    assert served.post("/kv/verify", {}).is_success
    caused("TandemStoreCorruption")
