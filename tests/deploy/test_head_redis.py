"""`deploy/head-redis.sh` as a head node runs it: a real server, twice, and a stranger."""

import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from cluster.errors import StartupError
from deploy.environment import free_range
from kvstore.redis_server import ping

SCRIPT = Path(__file__).resolve().parents[2] / "deploy" / "head-redis.sh"


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    pid = tmp_path / ".tandem" / "redis" / "pid"
    if pid.exists():
        os.kill(int(pid.read_text()), signal.SIGTERM)


def start(home: Path, port: int) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HOME": str(home), "PYTHON": sys.executable}
    command = ["bash", str(SCRIPT), "127.0.0.1", str(port)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_it_starts_once_asks_for_a_password_and_keeps_what_it_is_told(home: Path) -> None:
    port, folder = free_range(1), home / ".tandem"
    assert start(home, port).returncode == 0
    url = (folder / "redis-url").read_text().strip()
    ping(url, timeout_s=5)
    with redis.Redis.from_url(url) as client:
        client.set("kept", "yes")
        assert client.info("persistence")["aof_enabled"] == 1
    with pytest.raises(StartupError, match="cannot reach Redis"):
        ping(f"redis://127.0.0.1:{port}/0", timeout_s=5)
    first = (folder / "redis" / "pid").read_text()
    again = start(home, port)
    assert again.returncode == 0, again.stderr
    assert f"answers at 127.0.0.1:{port}" in again.stdout
    assert (folder / "redis-url").read_text().strip() == url
    assert (folder / "redis" / "pid").read_text() == first
    for name in ("redis-password", "redis-url"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
    password = (folder / "redis-password").read_text().strip()
    assert password not in Path(f"/proc/{first.strip()}/cmdline").read_text()


def test_it_says_why_it_cannot_start(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = start(home, port)
    assert refused.returncode == 1
    assert "Address already in use" in refused.stderr
    assert f"Redis does not answer at 127.0.0.1:{port}" in refused.stderr
