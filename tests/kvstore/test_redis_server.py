"""The embedded server: private, alone, and gone when its parent is."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import redis

from cluster.errors import StartupError
from kvstore.redis_server import EmbeddedRedis, ping


def test_it_answers_those_who_know_the_password_and_ends_when_closed() -> None:
    server = EmbeddedRedis()
    try:
        ping(server.url, 5.0)
        password = server.url.split(":")[2].partition("@")[0]
        stranger = redis.Redis.from_url(server.url.replace(f":{password}@", ""))
        with stranger, pytest.raises(redis.AuthenticationError):
            stranger.set("k", "v")
        child = psutil.Process(server.pid)
        assert password not in " ".join(child.cmdline())
        assert {c.laddr.ip for c in child.net_connections("inet") if c.status == psutil.CONN_LISTEN} == {"127.0.0.1"}
        folder = Path(child.cwd())
        assert folder.stat().st_mode & 0o077 == 0
    finally:
        server.close()
    assert not psutil.pid_exists(server.pid)
    assert not folder.exists()
    with pytest.raises(StartupError, match="cannot reach Redis") as caught:
        ping(server.url, 1.0)
    assert password not in caught.value.message


def test_one_that_died_comes_back_at_the_same_url() -> None:
    server = EmbeddedRedis()
    try:
        first = server.pid
        server.revive()
        assert server.pid == first
        os.kill(first, signal.SIGKILL)
        os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
        server.revive()
        assert server.pid != first
        deadline = time.monotonic() + 10
        while True:
            try:
                ping(server.url, 1.0)
                break
            except StartupError:
                assert time.monotonic() < deadline
    finally:
        server.close()


def test_two_do_not_collide() -> None:
    servers = [EmbeddedRedis() for _ in range(2)]
    try:
        assert servers[0].url != servers[1].url
        assert all(":6379" not in server.url for server in servers)
    finally:
        for server in servers:
            server.close()


@pytest.mark.parametrize("url", ["redis://127.0.0.1:1/0", "redis://:secret@127.0.0.1:1", "nonsense", "redis://h:port"])
def test_a_redis_that_is_not_there_is_one_line_to_act_on(url: str) -> None:
    with pytest.raises(StartupError, match="correct redis_url") as caught:
        ping(url, 1.0)
    assert "secret" not in caught.value.message
    assert "\n" not in caught.value.message


def test_it_dies_with_its_parent() -> None:
    code = (
        "import sys; from kvstore.redis_server import EmbeddedRedis; s = EmbeddedRedis(); print(s.pid, flush=True); "
        "sys.stdin.read()"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait(20)
    psutil.wait_procs([child], timeout=20)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
