"""Locust as a user runs it, against a server that is not Tandem: exit codes, files, shares of processes, ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.loadtests.peer import MODEL, Peer, serving
from tests.serving import wait_until

RUN_S = 120
SMALL = ("--length", "0.1")
# a background job's children ignore SIGINT; and `preexec_fn` forks, which gRPC's threads do not survive
HEEDING = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
COMMAND = (sys.executable, "-m", "locust", "-f", "loadtests/locustfile.py", "--headless", "--only-summary", *SMALL)


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    with serving() as made:
        yield made


def locust(url: str, out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, "--host", url, "--out", str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=RUN_S)


def result(out: Path) -> dict[str, Any]:
    (path,) = out.glob("*.json")
    run: dict[str, Any] = json.loads(path.read_text())
    return run


def limits(folder: Path, text: str) -> tuple[str, str]:
    path = folder / "slo.toml"
    path.write_text(text)
    return ("--slo", str(path))


def test_any_server_is_measured_and_rows_are_locusts_own(peer: Peer, tmp_path: Path) -> None:
    slo = limits(tmp_path, "[every]\nfailed = 0\n[chat]\nttft_p50_ms = 60000\n")
    files = ("--csv", str(tmp_path / "rows"), "--html", str(tmp_path / "locust.html"), "--label", "a/b")
    done = locust(peer.url, tmp_path / "out", "-u", "4", "-r", "4", "-t", "3s", *slo, *files, "ChatUser", "CodeUser")
    assert done.returncode == 0, done.stderr
    run = result(tmp_path / "out")
    assert (run["name"], run["model"]) == ("a/b", MODEL)
    assert run["scenarios"].keys() == {"chat", "code"}
    chat = run["scenarios"]["chat"]
    assert chat["requests"] > 0
    assert chat["ttft_p50_ms"] >= 10
    assert chat["output_tokens_mean"] >= 3
    assert (tmp_path / "locust.html").is_file()
    rows = (tmp_path / "rows_stats.csv").read_text()
    assert all(f"{kind},{name}," in rows for kind in ("TTFT", "ITL", "E2E") for name in ("chat", "code"))
    page = (tmp_path / "out" / "a-b.html").read_text()
    assert re.findall(r"""(?:src|href)\s*=\s*["'](?!#)|url\((?!#)|@import|<link|<script""", page) == []


def test_a_broken_slo_is_exit_code_1(peer: Peer, tmp_path: Path) -> None:
    slo = limits(tmp_path, "[every]\nwithin_ttft_ms = 0.5\n[chat]\ngood = 0.5\nttft_p90_ms = 60000\n")
    done = locust(peer.url, tmp_path / "out", "-u", "4", "-r", "4", "-t", "3s", *slo, "ChatUser")
    assert done.returncode == 1
    assert "MISSED chat: good at least 0.5: 0\n" in done.stderr
    assert "kept chat: ttft_p90_ms" in done.stderr
    assert '<p class="missed">1 of 4 limits' in (tmp_path / "out" / "chat.html").read_text()


def test_nothing_answered_is_exit_code_1_and_errors_are_in_the_report(peer: Peer, tmp_path: Path) -> None:
    done = locust(peer.url, tmp_path, "-u", "4", "-r", "4", "-t", "3s", "--model", "none", "ChatUser")
    assert done.returncode == 1
    assert "MISSED chat: requests at least 1: 0\n" in done.stderr
    assert result(tmp_path)["errors"][0][:2] == ["chat", "404 model_not_found"]
    assert "404 model_not_found" in (tmp_path / "chat.html").read_text()


def test_only_what_was_asked_for_goes_beyond_openais_fields(peer: Peer, tmp_path: Path) -> None:
    done = locust(peer.url, tmp_path, "-u", "4", "-r", "4", "-t", "3s", "--extra", '{"ignore_eos": true}', "ChatUser")
    assert done.returncode == 1
    assert result(tmp_path)["errors"][0][1] == "400 unknown_field"


def test_two_processes_share_a_trace_and_their_measurements_add_up(tmp_path: Path) -> None:
    """Every request is sent exactly once, and the master knows of all answers, the last ones too."""
    trace = tmp_path / "trace.jsonl"
    rows = [{"timestamp": 50 * number, "input_length": 600, "output_length": 100 + 10 * number, "hash_ids": [0, number]}
            for number in range(1, 41)]  # fmt: skip
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    processes = (
        "--processes",
        "2",
        "--master-bind-host",
        "127.0.0.1",
        "--master-bind-port",
        port,
        "--master-port",
        port,
    )
    slo = limits(tmp_path, "[every]\nlate_share = 1\n")
    arrivals = ("--trace", str(trace), "--rate", "5", "--seconds", "2", "TraceUser", "BurstUser")
    with serving() as peer:
        done = locust(peer.url, tmp_path / "out", *processes, *slo, *arrivals)
        assert done.returncode == 0, done.stderr
        run = result(tmp_path / "out")
        assert sum(figures["requests"] for figures in run["scenarios"].values()) == len(peer.bodies) == peer.finished
    replayed = run["scenarios"]["trace"]
    assert (replayed["sent"], replayed["requests"], replayed["cut"]) == (40, 40, 0)
    lengths = sorted(body["max_tokens"] for body in peer.bodies if len(body["prompt"]) in (59, 60, 61))
    assert set(range(11, 51)) <= set(lengths)
    prompts = [tuple(body["prompt"]) for body in peer.bodies]
    assert len(set(prompts)) == len(prompts)
    assert len({prompt[:51] for prompt in prompts if len(prompt) == 60}) == 1, "all of the trace begin with block 0"


def test_answers_under_way_at_the_end_are_waited_for(tmp_path: Path) -> None:
    """Locust alone would cut them, and the slowest requests would be in no figure."""
    with serving(first_s=4.0) as peer:
        done = locust(peer.url, tmp_path, "-u", "3", "-r", "3", "-t", "3s", "TurnsUser")
        assert done.returncode == 0, done.stderr
        turns = result(tmp_path)["scenarios"]["turns"]
        assert turns["requests"] == turns["sent"] == peer.finished == 3
    assert turns["ttft_p50_ms"] >= 3900
    assert turns["cut"] == 0


def test_an_interrupted_run_has_a_report(tmp_path: Path) -> None:
    with serving() as peer:
        process = subprocess.Popen(
            [sys.executable, "-c", HEEDING, *COMMAND, "--host", peer.url, "--out", str(tmp_path), "-u", "4", "-r", "4",
             "TurnsUser"],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            wait_until(lambda: peer.finished >= 3, 60)
            os.kill(process.pid, signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0, errors
    assert result(tmp_path)["scenarios"]["turns"]["requests"] >= 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--slo", "/nonexistent.toml", "ChatUser"), "SLO file /nonexistent.toml cannot be read"),
        (("ChatUser",), "no server answers at http://127.0.0.1:9"),
        (("--extra", "[", "ChatUser"), "is not JSON"),
        (("TraceUser",), "nothing to replay"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    done = locust("http://127.0.0.1:9", tmp_path, "-t", "1s", *arguments)
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr
