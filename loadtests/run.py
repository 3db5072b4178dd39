"""The smoke set: every scenario for a few seconds, against a simulated cluster that is started for it or a server.

    python -m loadtests.run [--url http://...] [--only chat,rag] [--seconds 8] [--out FOLDER] [-- flags of tandem serve]

Each scenario is a Locust run of its own, so that one does not slow another. Exit code 1 when an SLO was missed, a run
failed, or the server still has requests or blocks in use afterwards. The last line is the report's path. Whatever was
started is ended, also after Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, NoReturn

from cluster.errors import ConfigError
from loadtests import page, quiet

HERE = Path(__file__).resolve().parent
CLASSES = {
    "chat": "ChatUser",
    "turns": "TurnsUser",
    "rag": "RagUser",
    "code": "CodeUser",
    "soak": "SoakUser",
    "burst": "BurstUser",
    "square": "SquareUser",
    "diurnal": "DiurnalUser",
    "trace": "TraceUser",
}
ARRIVE = ("burst", "square", "diurnal", "trace")
SERVE = ("serve", "--runner", "sim", "--prefill", "1", "--decode", "1", "--port", "0")
SIM_MS = "5,0.05,0"  # of a step, of a token, of a token of context: a small model on a GPU
TRACE = "agents:rate={rate},seconds={seconds}"
TRACE_LENGTH = 0.05  # its prompts have thousands of tokens
START_S, STOP_S = 150.0, 60.0
QUIET_S = 40.0  # holds on handoffs that nobody fetched run out after 30 s
RUN_S = 150.0  # what a run may take beyond its seconds: starting, and waiting for the last answers
IGNORE_EOS = '{"ignore_eos": true}'


def scenario(name: str, url: str, given: argparse.Namespace) -> int:
    """Run one; returns Locust's exit code. Raises ConfigError when it does not end."""
    length = given.length * (TRACE_LENGTH if name == "trace" and not given.trace else 1.0)
    trace = given.trace or TRACE.format(rate=given.rate, seconds=given.seconds)
    command = [
        *(sys.executable, "-m", "locust", "-f", str(HERE / "locustfile.py"), "--headless", "--only-summary"),
        *("--host", url, "--label", name, "--out", str(given.out), "--slo", str(given.slo), "--extra", given.extra),
        *("--html", str(given.out / f"{name}-locust.html"), "--seed", str(given.seed), "--length", str(length)),
        *("--vocab", str(given.vocab), "--skip-log-setup"),
        *("--rate", str(given.rate), "--seconds", str(given.seconds), "--trace", trace),
        *(() if name in ARRIVE else ("-t", f"{given.seconds}s", "-u", str(given.users), "-r", str(given.users))),
        *(("--processes", str(given.processes)) if given.processes > 1 else ()),
        CLASSES[name],
    ]
    try:
        return subprocess.run(command, stdout=subprocess.DEVNULL, timeout=given.seconds + RUN_S, check=False).returncode
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"the scenario {name} did not end within {error.timeout:.0f} s; is the server stuck?"
        ) from None


@contextmanager
def serving(arguments: Sequence[str]) -> Iterator[str]:
    """The address of a simulated cluster, which is ended afterwards. Raises ConfigError when it does not start."""
    environment = {"TANDEM_SIM_MS": SIM_MS, "TANDEM_THREADS": "1", **os.environ}
    with tempfile.NamedTemporaryFile("w+b", prefix="tandem-loadtest-", suffix=".log") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "deploy.cli", *SERVE, *arguments],
            stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
        )  # fmt: skip
        try:
            yield _address(server, output)
        finally:
            _end(server)


def _address(server: subprocess.Popen[bytes], output: IO[bytes]) -> str:
    """What the line to paste says."""
    path, deadline = Path(output.name), time.monotonic() + START_S
    while not (found := re.search(r"curl (http://\S+)/v1", text := path.read_text(errors="replace"))):
        if server.poll() is not None or time.monotonic() > deadline:
            raise ConfigError(f"tandem serve did not start:\n{text}")
        time.sleep(0.2)
    return found[1]


def _end(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(STOP_S)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait(STOP_S)


def smoke(url: str, given: argparse.Namespace) -> bool:
    """All scenarios one after the other, and one report. Returns whether everything was kept. Raises ConfigError."""
    kept = True
    for name in given.only:
        begun_s = time.monotonic()
        code = scenario(name, url, given)
        _say(f"{name}: {'kept' if code == 0 else f'exit code {code}'}, {time.monotonic() - begun_s:.0f} s")
        kept = kept and code == 0
    written = [path for name in given.only if (path := given.out / f"{name}.json").is_file()]
    page.write([json.loads(path.read_text()) | {"name": "run"} for path in written], given.out / "report.html")
    left = quiet.leaks(url, QUIET_S)
    if left:
        _say(f"the server is not idle {QUIET_S:.0f} s after the test: {', '.join(left)}")
    return kept and not left


def arguments(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Every scenario for a few seconds.")
    parser.add_argument("--url", default="", help="a server that runs [default: start a simulated cluster]")
    parser.add_argument("--only", type=_names, default=list(CLASSES), help=f"some of {','.join(CLASSES)}")
    parser.add_argument("--seconds", type=int, default=8, help="of each scenario")
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument("--rate", type=float, default=3.0, help="requests a second of those that arrive by the clock")
    parser.add_argument("--length", type=float, default=0.25, help="times the length of prompts and answers")
    parser.add_argument("--trace", default="", help="to replay [default: agents]")
    parser.add_argument("--vocab", type=int, default=30_000, help="token ids of replays are below that")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="Locust workers")
    parser.add_argument("--extra", default=IGNORE_EOS, help="fields for every request, as JSON")
    parser.add_argument("--slo", type=Path, default=HERE / "slos" / "smoke.toml")
    parser.add_argument("--out", type=Path, default=Path("results/loadtest"))
    parser.add_argument("serve", nargs="*", help="further arguments of tandem serve, after --")
    return parser.parse_args(given)


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - CLASSES.keys():
        raise argparse.ArgumentTypeError(f"{unknown.pop()!r} is none of {','.join(CLASSES)}")
    return names


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _stop(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def main() -> None:
    given = arguments(sys.argv[1:])
    signal.signal(signal.SIGTERM, _stop)  # so that it ends what was started
    given.out.mkdir(parents=True, exist_ok=True)
    for name in CLASSES:  # of an earlier test: what fails now must not stand in the report with them
        (given.out / f"{name}.json").unlink(missing_ok=True)
    try:
        if given.url:
            kept = smoke(given.url, given)
        else:
            with serving(given.serve) as url:
                kept = smoke(url, given)
    except ConfigError as error:
        sys.exit(f"load test: {error.message}")
    except KeyboardInterrupt:
        sys.exit(130)
    _say(str(given.out / "report.html"))
    sys.exit(0 if kept else 1)


if __name__ == "__main__":
    main()
