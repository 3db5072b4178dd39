"""Load tests against real deployments: every scenario on simulated workers, the smoke set, and nothing left."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving import Served, environment, marked, serving, wait_until

RUN_S = 170
CLOSED = {"chat": "ChatUser", "turns": "TurnsUser", "rag": "RagUser", "code": "CodeUser", "soak": "SoakUser"}
ARRIVING = {"burst": "BurstUser", "square": "SquareUser", "diurnal": "DiurnalUser", "trace": "TraceUser"}
SMALL = ("--length", "0.1", "--extra", '{"ignore_eos": true}', "--vocab", "500")
SIM_MS = "3,0.02,0"
ANY_SPEED = "[every]\nfailed = 0\nlate_share = 1\n"  # other tests run at the same time


@pytest.fixture(scope="module")
def simulated(tiny: Path) -> Iterator[Served]:
    with serving(str(tiny), "--runner", "sim", TANDEM_SIM_MS=SIM_MS, TANDEM_THREADS="1") as served:
        yield served


@pytest.fixture(scope="module")
def slo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    path = tmp_path_factory.mktemp("slo") / "slo.toml"
    path.write_text(ANY_SPEED)
    return ("--slo", str(path))


def run(served: Served, out: Path, *arguments: str) -> dict[str, Any]:
    """Locust's scenarios -> figures."""
    command = [sys.executable, "-m", "locust", "-f", "loadtests/locustfile.py", "--headless", "--only-summary", *SMALL]
    done = subprocess.run(
        [*command, "--host", served.url, "--out", str(out), "--label", "run", *arguments],
        env=environment(served.mark), capture_output=True, text=True, timeout=RUN_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    scenarios: dict[str, Any] = json.loads((out / "run.json").read_text())["scenarios"]
    return scenarios


def test_every_closed_loop_is_measured(simulated: Served, slo: tuple[str, str], tmp_path: Path) -> None:
    scenarios = run(simulated, tmp_path, "-u", "10", "-r", "10", "-t", "5s", *slo, *CLOSED.values())
    assert scenarios.keys() == CLOSED.keys()
    for figures in scenarios.values():
        assert figures["requests"] > 0
        assert (figures["failed"], figures["cut"]) == (0, 0)
        assert figures["output_tokens_per_s"] > 0
        assert 0 < figures["ttft_p50_ms"] <= figures["e2e_p50_ms"]
    assert scenarios["chat"]["cached_share"] > 0.1, "system prompts are shared"
    simulated.assert_no_leaks()


def test_every_arrival_leaves_at_its_time(simulated: Served, slo: tuple[str, str], tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    rows = [{"timestamp": 100 * number, "input_length": 1000, "output_length": 60, "hash_ids": [0, number]}
            for number in range(1, 41)]  # fmt: skip
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arrivals = ("--trace", str(trace), "--rate", "3", "--seconds", "4")
    scenarios = run(simulated, tmp_path, *slo, *arrivals, *ARRIVING.values())
    assert scenarios.keys() == ARRIVING.keys()
    for figures in scenarios.values():
        assert figures["requests"] == figures["sent"] > 0
        assert (figures["failed"], figures["cut"]) == (0, 0)
        assert figures["late_p50_ms"] < 50
    replayed = scenarios["trace"]
    assert replayed["requests"] == 40
    assert replayed["prompt_tokens_mean"] == pytest.approx(100, abs=3), "a tenth of the trace's"
    assert replayed["cached_share"] > 0.2, "all begin with the same block"
    simulated.assert_no_leaks()


def smoke(mark: str, out: Path, *arguments: str) -> str:
    """What `make loadtest` runs; its last line."""
    done = subprocess.run(
        [sys.executable, "-m", "loadtests.run", "--length", "0.1", "--out", str(out), *arguments],
        env=environment(mark), capture_output=True, text=True, timeout=RUN_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


def test_the_smoke_set_starts_a_cluster_and_leaves_nothing(tiny: Path, slo: tuple[str, str], tmp_path: Path) -> None:
    mark = "a-load-test-of-its-own"
    options = ("--only", "chat,burst", "--seconds", "2", "--vocab", "500", *slo)
    assert smoke(mark, tmp_path, *options, "--", str(tiny)) == str(tmp_path / "report.html")
    assert "burst" in (tmp_path / "report.html").read_text()
    assert {path.name for path in tmp_path.iterdir()} >= {"chat.json", "chat-locust.html", "burst.html"}
    wait_until(lambda: not marked(mark), 20, lambda: str(marked(mark)))
