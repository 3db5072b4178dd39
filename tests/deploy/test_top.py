"""`tandem top`: one frame of a running router, of a large deployment, and of nothing."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from deploy.cli import app
from deploy.top import LEAST_WORKERS, frame, spark
from tests.router.dashboards import answer
from tests.router.harness import Api


@pytest.fixture(scope="module")
def guarded(model_directory: Path) -> Iterator[Api]:
    with Api(model_directory).serving("pd", api_keys=("tenant-key",), operator_key="operator-key") as one:
        yield one


def printed(data: dict[str, Any], height: int | None, width: int = 200) -> list[str]:
    console = Console(width=width, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(frame(data, height))
    return capture.get().splitlines()


def run(api: Api, key: str) -> Any:
    environment = {"TANDEM_OPERATOR_KEY": key, "COLUMNS": "200"}
    return CliRunner().invoke(app, ["top", "--once", "--url", api.url], env=environment)


def test_one_frame_of_a_running_router(guarded: Api) -> None:
    body = {"prompt": "hello there", "max_tokens": 4}
    assert guarded.http.post("/v1/completions", json=body, headers={"authorization": "Bearer tenant-key"}).is_success
    result = run(guarded, "operator-key")
    assert result.exit_code == 0, result.output
    for words in ("org/test-model", "2 of 2 workers serve", "p1 → d1", "finished", "last two minutes"):
        assert words in result.stdout


def test_on_a_terminal_it_goes_on_until_ctrl_c(guarded: Api) -> None:
    ours, its = pty.openpty()
    environment = {
        **os.environ,
        "TANDEM_OPERATOR_KEY": "operator-key",
        "TERM": "xterm",
        "COLUMNS": "160",
        "LINES": "40",
    }
    command = [sys.executable, "-m", "deploy.cli", "top", "--url", guarded.url]
    process = subprocess.Popen(command, stdin=its, stdout=its, stderr=its, env=environment, start_new_session=True)
    os.close(its)
    try:
        shown = read_until(ours, b"workers serve", 2)
        assert b"\x1b[?1049h" in shown  # a screen of its own, so that what was there comes back
        process.send_signal(signal.SIGINT)
        read_to_the_end(ours, process)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait(20)
        os.close(ours)


def read_to_the_end(terminal: int, process: subprocess.Popen[bytes]) -> None:
    """A terminal that nobody reads fills up, and then who writes to it waits for ever."""
    deadline = time.monotonic() + 20
    while process.poll() is None and time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.1)[0]:
            with contextlib.suppress(OSError):  # the other side is closed
                os.read(terminal, 65_536)


def read_until(terminal: int, words: bytes, times: int) -> bytes:
    """What a terminal is told until it has been told that as often."""
    shown, deadline = b"", time.monotonic() + 60
    while shown.count(words) < times:
        assert time.monotonic() < deadline, shown
        if select.select([terminal], [], [], 1.0)[0]:
            shown += os.read(terminal, 65_536)
    return shown


def test_without_the_key_it_says_what_to_do(guarded: Api) -> None:
    result = run(guarded, "wrong")
    assert result.exit_code == 1
    assert "send the operator key" in result.stderr
    assert "wrong" not in result.output


def test_nobody_there_is_one_line_and_exit_1() -> None:
    result = CliRunner().invoke(app, ["top", "--once", "--url", "http://127.0.0.1:9"])
    assert result.exit_code == 1
    assert "is `tandem serve` running?" in result.stderr


def test_a_frame_has_what_the_dashboard_has() -> None:
    lines = "\n".join(printed(answer(8), None))
    for words in (
        *("98.6%", "43.8%", "318 ms / 642 ms (SLO 2,000 ms)", "26.4 ms / 37.9 ms", "3 (4,210", "1 role changes"),
        *("prefill-3", "decode-3", "serving", "decode-3 turns to prefill", "prefill-1 → decode-1", "3fa2c81b"),
    ):
        assert words in lines, words


def test_a_frame_fits_its_terminal() -> None:
    lines = printed(answer(64), 50)
    shown = [line for line in lines if line.startswith(("prefill-", "decode-"))]
    assert LEAST_WORKERS <= len(shown) < 20
    assert any(line.startswith(f"and {64 - len(shown)} more") for line in lines)
    assert len(lines) <= 50
    assert len([line for line in printed(answer(64), None) if line.startswith(("prefill-", "decode-"))]) == 64


def test_a_frame_of_a_deployment_of_which_nothing_is_known() -> None:
    bare = answer(0) | {"requests": [], "events": [], "controller": None, "redis": "unreachable"}
    bare["history"] = bare["history"] | {"samples": []}
    bare["minute"] = bare["minute"] | {"ttft_ms": None, "itl_ms": None, "slo_kept": None, "hit_ratio": None}
    lines = "\n".join(printed(bare, 40))
    assert "0 of 0 workers serve" in lines
    assert "Redis unreachable" in lines
    assert "no word from a controller" in lines


@pytest.mark.parametrize(
    ("values", "drawn"),
    [([], ""), ([0, 0], "▁▁"), ([0.0, 7.0], "▁█"), ([None, 1.0, None], " █ "), ([None], " ")],
)
def test_lines_are_as_high_as_their_values(values: list[float | None], drawn: str) -> None:
    assert spark(values) == drawn
