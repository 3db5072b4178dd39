"""Runs `tandem serve` as a user would: a real process, a real port, a real end, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx
import psutil

MARK = "SERVED_FOR_TEST"  # inherited by every process of a deployment, so that its processes can be found
START_S = 120.0
STOP_S = 60.0


@dataclass
class Served:
    url: str
    process: subprocess.Popen[bytes]
    mark: str
    output: Path
    started_s: float  # command to banner

    def status(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.url}/status", timeout=10) as response:
            return json.load(response)

    def metrics(self) -> dict[str, float]:
        """Sample name with labels -> value."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as response:
            text = response.read().decode()
        samples = (line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
        return {name: float(value) for name, value in samples}

    def metric(self, name: str) -> float:
        """Sum over all labels."""
        return sum(value for sample, value in self.metrics().items() if sample.split("{")[0] == name)

    def processes(self, name: str) -> list[psutil.Process]:
        """Those that contain that in their names; Ray's actors are called ray::CLASS."""
        return [process for process in marked(self.mark) if called(process, name)]

    def workers(self) -> dict[str, dict[str, Any]]:
        """By id. One that was lost is in it until its registration has run out, and again when it has come back."""
        return {worker["id"]: worker for worker in self.status()["workers"]}

    def pid(self, worker: str) -> int:
        known = self.workers()
        assert worker in known, f"{worker} is not among {sorted(known)}"
        return int(known[worker]["pid"])

    def connected(self, *wanted: str) -> bool:
        """Whether these are, and nobody else is expected."""
        known = self.workers()
        return {*wanted} == {*known} and all(worker["connected"] for worker in known.values())

    def post(self, path: str, body: dict[str, Any], **options: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=300, **options)

    def complete(self, prompt: str | list[int], new: int, stream: bool = False, **more: Any) -> Completion:
        """Greedy, by token ids: what the oracle compares."""
        body = {
            "prompt": prompt,
            "max_tokens": new,
            "temperature": 0,
            "stream": stream,
            "return_token_ids": True,
            **more,
        }
        if not stream:
            response = self.post("/v1/completions", body)
            assert response.status_code == 200, response.text
            data = response.json()
            choice = data["choices"][0]
            return Completion(choice["text"], choice["token_ids"], choice["finish_reason"], data["usage"])
        return self._stream(body)

    def _stream(self, body: dict[str, Any]) -> Completion:
        body["stream_options"] = {"include_usage": True}
        text, tokens, finish, usage, done = "", [], None, {}, False
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=300) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    done = True
                    continue
                chunk = json.loads(line[6:])
                assert "error" not in chunk, chunk
                usage = chunk.get("usage") or usage
                for choice in chunk["choices"]:
                    text += choice["text"]
                    tokens += choice.get("token_ids", [])
                    finish = choice["finish_reason"] or finish
        assert done
        return Completion(text, tokens, finish, usage)

    def assert_no_leaks(self, within: float = 40) -> None:
        """Every pool and arena gives back what it lent: free + used = total with nothing used."""

        def quiet() -> bool:
            state = self.status()
            workers = all(w["connected"] and w["kv_blocks_used"] == w["running"] == 0 for w in state["workers"])
            slabs = [s["slabs"] for s in state["stores"]]
            stores = all(s is not None and s["free"] + s["cached"] == s["slabs"] for s in slabs)
            return workers and stores

        wait_until(quiet, within, lambda: json.dumps(self.status(), indent=1))


@dataclass
class Completion:
    text: str
    tokens: list[int]
    finish: str | None
    usage: dict[str, Any]


def wait_until(condition: Callable[[], bool], seconds: float, describe: Callable[[], str] = lambda: "") -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {describe()}")
        time.sleep(0.05)


def marked(mark: str) -> list[psutil.Process]:
    """Every live process of one deployment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def called(process: psutil.Process, name: str) -> bool:
    """Whether its name contains that; one that has ended has none."""
    try:
        return name in process.name()
    except psutil.NoSuchProcess:
        return False


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "deploy.cli", *arguments]


def environment(mark: str, **more: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("TANDEM_", "RAY_", "OMP_", "OTEL_"))}
    return {**clean, MARK: mark, "COLUMNS": "120", **more}


@contextmanager
def serving(*arguments: str, start_s: float = START_S, **more: str) -> Iterator[Served]:
    """A deployment on a free port, up on entry, stopped by SIGINT on exit with nothing left."""
    mark = uuid.uuid4().hex
    with tempfile.NamedTemporaryFile("w+b", prefix="tandem-test-", suffix=".log") as output:
        start = time.monotonic()
        process = subprocess.Popen(
            command("serve", *arguments, "--port", "0"),
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(mark, **more),
            start_new_session=True,
        )
        try:
            url = _await_banner(process, output, start_s)
            yield Served(url, process, mark, Path(output.name), time.monotonic() - start)
        finally:
            _stop(process, mark)


def _await_banner(process: subprocess.Popen[bytes], output: IO[bytes], start_s: float) -> str:
    path = Path(output.name)

    def ready() -> bool:
        assert process.poll() is None, f"tandem serve ended with {process.returncode}:\n{path.read_text()}"
        return "curl http" in path.read_text()

    wait_until(ready, start_s, path.read_text)
    match = re.search(r"curl (http://[\d.:]+)/v1", path.read_text())
    assert match
    return match[1]


def _stop(process: subprocess.Popen[bytes], mark: str) -> None:
    # Redis overwrites its environment with its title, so it is known only as a child
    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []

    def left() -> list[psutil.Process]:
        return marked(mark) + [child for child in children if child.is_running()]

    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)  # what a terminal's Ctrl-C does: Ray's processes get it too
    try:
        process.wait(STOP_S)
        wait_until(lambda: not left(), 20, lambda: f"left behind: {left()}")
    finally:
        for straggler in left():
            straggler.kill()
