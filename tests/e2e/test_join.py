"""`tandem serve` in a Ray cluster that is already there: it joins, serves, and leaves the cluster as it was."""

import json
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.environment import free_range
from tests.e2e.oracle import greedy
from tests.serving import called, command, environment, marked, serving, wait_until

OPEN = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture
def cluster() -> Iterator[tuple[str, str]]:
    """A head node of its own: (its address, the mark of its processes)."""
    mark, port = uuid.uuid4().hex, free_range(1)
    # Ray's sockets need a short path
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="ray-") as folder:
        head = subprocess.Popen(
            [
                *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"),
                *("--include-dashboard=false", "--num-cpus=4", f"--temp-dir={folder}"),
                *(f"--ray-client-server-port={free_range(1)}", "--min-worker-port=0", "--max-worker-port=0"),
            ],
            env=environment(mark, **OPEN), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            wait_until(lambda: any(called(p, "raylet") for p in marked(mark)), 60)
            yield f"127.0.0.1:{port}", mark
        finally:
            head.terminate()
            head.wait(30)
            for straggler in marked(mark):
                straggler.kill()


# run where nothing else uses Ray: the states of all placement groups of a cluster
GROUPS = """
import os, ray
ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level="ERROR")
print(*(group["state"] for group in ray.util.placement_group_table().values()))
"""


def test_it_joins_the_cluster_that_ray_address_names(cluster: tuple[str, str], tiny: Path) -> None:
    address, mark = cluster
    joining = {"RAY_ADDRESS": address, "TANDEM_THREADS": "1", **OPEN}
    with serving(str(tiny), "--dtype", "float32", "--decode-pp", "2", **joining) as served:
        assert served.complete([5, 6, 7], 20, ignore_eos=True).tokens == greedy(tiny, (5, 6, 7), 20)
        own = {p.pid for p in marked(mark)}
        assert {pid for w in served.status()["workers"] for pid in w["shard_pids"]} <= own
        served.assert_no_leaks()
    wait_until(lambda: not [p for p in marked(mark) if called(p, "Actor")], 30)
    assert any(called(p, "raylet") for p in marked(mark))
    groups = run([sys.executable, "-c", GROUPS], joining)
    assert groups.stdout.split() == ["REMOVED", "REMOVED"], groups.stderr
    told = json.loads(run(command("doctor", str(tiny), "--port", "0", "--json"), joining).stdout)
    (ray,) = [finding for finding in told["findings"] if finding["check"] == "Ray"]
    assert (ray["level"], f"1 nodes with 4 CPUs at {address}" in ray["found"]) == ("ok", True), ray
    refused = run(command("serve", str(tiny), "--decode-tp", "4"), {**joining, "TANDEM_THREADS": "2"})
    assert refused.returncode == 1
    assert "need 8 CPUs on one node (--decode-tp 4 x 2 threads) and the largest has 4" in refused.stderr
    assert "use threads 1 or --decode-tp 1 to 2" in refused.stderr


def run(arguments: list[str], settings: dict[str, str], timeout: float = 60) -> subprocess.CompletedProcess[str]:
    mark = uuid.uuid4().hex
    return subprocess.run(arguments, env=environment(mark, **settings), capture_output=True, text=True, timeout=timeout)
