"""`tandem serve` in a Ray cluster that is already there: it joins, serves, and leaves the cluster as it was."""

import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.environment import free_port
from tests.e2e.oracle import greedy
from tests.serving import environment, marked, serving, wait_until

OPEN = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture
def cluster() -> Iterator[tuple[str, str]]:
    """A head node of its own: (its address, the mark of its processes)."""
    mark, port = uuid.uuid4().hex, free_port()
    # Ray's sockets need a short path
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="ray-") as folder:
        head = subprocess.Popen(
            [
                *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"),
                *("--include-dashboard=false", "--num-cpus=4", f"--temp-dir={folder}"),
                *(f"--ray-client-server-port={free_port()}", "--min-worker-port=0", "--max-worker-port=0"),
            ],
            env=environment(mark, **OPEN), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            wait_until(lambda: any(p.name() == "raylet" for p in marked(mark)), 60)
            yield f"127.0.0.1:{port}", mark
        finally:
            head.terminate()
            head.wait(30)
            for straggler in marked(mark):
                straggler.kill()


def test_it_joins_the_cluster_that_ray_address_names(cluster: tuple[str, str], tiny: Path) -> None:
    address, mark = cluster
    with serving(str(tiny), "--dtype", "float32", RAY_ADDRESS=address, **OPEN) as served:
        assert served.complete([5, 6, 7], 20, ignore_eos=True).tokens == greedy(tiny, (5, 6, 7), 20)
        own = {p.pid for p in marked(mark)}
        assert {w["pid"] for w in served.status()["workers"]} <= own
        served.assert_no_leaks()
    wait_until(lambda: not [p for p in marked(mark) if "Actor" in p.name()], 30)
    assert any(p.name() == "raylet" for p in marked(mark))
