"""The head node of a Ray cluster of a test's own, as `ray start --head` makes it; it ends with all its processes."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from deploy.environment import free_range
from tests.serving import environment, marked, wait_until

OPEN = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}


@contextmanager
def ray_head(
    mark: str, port: int, options: tuple[str, ...], up: Callable[[], bool], start_s: float, **more: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Its cluster is on `port` and has no node left afterwards. `more`: environment of all nodes."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="ray-") as folder:  # Ray's sockets need a short path
        head = subprocess.Popen(
            [
                *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"),
                *("--node-ip-address=127.0.0.1", f"--temp-dir={folder}", *options),
                *(f"--ray-client-server-port={free_range(1)}", "--min-worker-port=0", "--max-worker-port=0"),
            ],
            env=environment(mark, **{**OPEN, **more}), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            wait_until(up, start_s)
            yield head
        finally:
            head.terminate()
            try:
                head.wait(60)
            finally:
                for straggler in marked(mark):
                    straggler.kill()
