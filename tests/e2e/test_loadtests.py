"""Load tests as a user runs them: Locust against a real deployment, its exit code, its files, and nothing left."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving import MARK, Served, environment, marked, serving, wait_until

RUN_S = 150
CLOSED = {"chat": "ChatUser", "turns": "TurnsUser", "rag": "RagUser", "code": "CodeUser", "soak": "SoakUser"}
ARRIVING = {"burst": "BurstUser", "square": "SquareUser", "diurnal": "DiurnalUser", "trace": "TraceUser"}
SMALL = ("--length", "0.1", "--extra", '{"ignore_eos": true}', "--vocab", "500")
SIM_MS = "3,0.02,0"


@pytest.fixture(scope="module")
def simulated(tiny: Path) -> Iterator[Served]:
    with serving(str(tiny), "--runner", "sim", TANDEM_SIM_MS=SIM_MS, TANDEM_THREADS="1") as served:
        yield served


def locust(served: Served, out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "locust", "-f", "loadtests/locustfile.py", "--headless", "--only-summary"]
    return subprocess.run(
        [*command, "--host", served.url, "--out", str(out), *SMALL, *arguments],
        env=environment(served.mark), capture_output=True, text=True, timeout=RUN_S,
    )  # fmt: skip


def result(out: Path) -> dict[str, Any]:
    (path,) = out.glob("*.json")
    run: dict[str, Any] = json.loads(path.read_text())
    return run


def test_every_closed_loop_is_measured_and_the_report_opens_offline(simulated: Served, tmp_path: Path) -> None:
    done = locust(
        simulated, tmp_path, "-u", "10", "-r", "10", "-t", "6s", "--csv", str(tmp_path / "rows"), *CLOSED.values()
    )
    assert done.returncode == 0, done.stderr
    scenarios = result(tmp_path)["scenarios"]
    assert scenarios.keys() == CLOSED.keys()
    for figures in scenarios.values():
        assert figures["requests"] > 0
        assert (figures["failed"], figures["cut"]) == (0, 0), "what is under way at the end is waited for"
        assert figures["output_tokens_per_s"] > 0
        assert 0 < figures["ttft_p50_ms"] <= figures["e2e_p50_ms"]
        assert figures["itl_p50_ms"] > 0
    assert scenarios["chat"]["cached_share"] > 0.1, "system prompts are shared"
    rows = (tmp_path / "rows_stats.csv").read_text()
    assert all(f"{kind},chat," in rows for kind in ("TTFT", "ITL", "E2E"))
    (page,) = tmp_path.glob("*.html")
    assert re.findall(r"""(?:src|href)\s*=\s*["'](?!#)|url\((?!#)|@import|<link|<script""", page.read_text()) == []
    simulated.assert_no_leaks()


def test_arrivals_leave_at_their_times_from_two_processes(simulated: Served, tmp_path: Path) -> None:
    """Each process sends its share, and all of it is in the master's result."""
    trace = tmp_path / "trace.jsonl"
    rows = [{"timestamp": 100 * number, "input_length": 600, "output_length": 60, "hash_ids": [0, number]}
            for number in range(1, 41)]  # fmt: skip
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    ports = ("--master-bind-host", "127.0.0.1", "--master-bind-port", port, "--master-port", port)
    arrivals = ("--trace", str(trace), "--rate", "3", "--seconds", "4")
    done = locust(simulated, tmp_path / "out", "--processes", "2", *ports, *arrivals, *ARRIVING.values())
    assert done.returncode == 0, done.stderr
    run = result(tmp_path / "out")
    assert run["scenarios"].keys() == ARRIVING.keys()
    replayed = run["scenarios"]["trace"]
    assert (replayed["sent"], replayed["requests"], replayed["failed"], replayed["cut"]) == (40, 40, 0, 0)
    assert replayed["prompt_tokens_mean"] == pytest.approx(60, abs=2), "a tenth of the trace's"
    assert replayed["cached_share"] > 0.2, "all begin with the same block"
    assert all(figures["late_share"] <= 0.05 for figures in run["scenarios"].values())


def test_a_broken_slo_is_exit_code_1(simulated: Served, tmp_path: Path) -> None:
    limits = tmp_path / "slo.toml"
    limits.write_text("[every]\nwithin_ttft_ms = 0.5\n[chat]\ngood = 0.5\nttft_p90_ms = 10000\n")
    done = locust(simulated, tmp_path / "out", "-u", "2", "-t", "2s", "--slo", str(limits), "ChatUser")
    assert done.returncode == 1
    assert "MISSED chat: good at least 0.5: 0" in done.stderr
    assert "kept chat: ttft_p90_ms at most 1e+04" in done.stderr
    assert '<p class="missed">1 of 4 limits' in next((tmp_path / "out").glob("*.html")).read_text()


def test_nothing_measured_is_exit_code_1(simulated: Served, tmp_path: Path) -> None:
    done = locust(simulated, tmp_path, "-u", "1", "-t", "2s", "--model", "none", "ChatUser")
    assert done.returncode == 1
    assert "MISSED chat: requests at least 1: 0" in done.stderr
    assert result(tmp_path)["errors"][0][1].startswith("404")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--slo", "/nonexistent.toml", "ChatUser"), "SLO file /nonexistent.toml cannot be read"),
        (("--host", "http://127.0.0.1:9", "ChatUser"), "no server answers"),
        (("--extra", "[", "ChatUser"), "is not JSON"),
        (("TraceUser",), "nothing to replay"),
    ],
)
def test_mistakes_are_one_line(simulated: Served, tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    done = locust(simulated, tmp_path, "-t", "1s", *arguments)
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_the_smoke_set_starts_a_cluster_and_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    mark = "loadtest-of-its-own"
    done = subprocess.run(
        [sys.executable, "-m", "loadtests.run", "--only", "chat,burst", "--seconds", "2", "--length", "0.1",
         "--vocab", "500", "--out", str(tmp_path), "--", str(tiny)],
        env=environment(mark), capture_output=True, text=True, timeout=RUN_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "report.html")
    assert "burst" in (tmp_path / "report.html").read_text()
    assert {path.name for path in tmp_path.iterdir()} >= {"chat.json", "chat-locust.html", "burst.html"}
    wait_until(lambda: not marked(mark), 20, lambda: f"{MARK} is in {marked(mark)}")


def test_the_smoke_set_against_a_real_model(disaggregated: Served, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "loadtests.run", "--url", disaggregated.url, "--only", "chat,code,trace",
         "--seconds", "4", "--users", "2", "--rate", "1", "--length", "0.1", "--out", str(tmp_path)],
        env=environment(disaggregated.mark), capture_output=True, text=True, timeout=RUN_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("chat", "code", "trace"):
        assert json.loads((tmp_path / f"{name}.json").read_text())["scenarios"][name]["requests"] > 0
