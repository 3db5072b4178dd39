"""A head and two nodes, one for each role, as `deploy/cluster-aws.yaml` describes them: processes for machines.

The model is the real one, and so is the loss of a node: every process of it is killed while it generates.
"""

import contextlib
import json
import os
import secrets
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import yaml

from deploy.node_roles import ROLE_LABEL
from kvstore.redis_server import EmbeddedRedis
from tests.e2e.elastic_ray import MEMORY, ElasticRay, elastic_ray
from tests.e2e.oracle import greedy, prompts
from tests.e2e.test_join import run
from tests.serving import Served, command, serving, wait_until

ROOT = Path(__file__).resolve().parents[2]
NODES_S = 150.0  # Ray ends a node that is not there in 15 s, and the autoscaler then asks for another
CLOSED = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
LABELS = "RAY_OVERRIDE_LABELS"  # where an autoscaled node is told its labels
# in a process of its own: this one does not join the cluster
AWAIT_NODES = """
import os, sys, time, ray
ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level="ERROR")
deadline = time.monotonic() + int(sys.argv[2])
while len([node for node in ray.nodes() if node["Alive"]]) < int(sys.argv[1]):
    assert time.monotonic() < deadline, ray.nodes()
    time.sleep(0.2)
"""


def small_nodes() -> dict[str, Any]:
    """The worker node types of the file, one CPU each and one node of each."""
    types = yaml.safe_load((ROOT / "deploy" / "cluster-aws.yaml").read_text())["available_node_types"]
    return {
        name: {**kind, "node_config": {}, "resources": {"CPU": 1, "object_store_memory": MEMORY}, "max_workers": 1}
        for name, kind in types.items()
        if kind.get("labels")
    }


def closed_ray(redis_url: str) -> AbstractContextManager[ElasticRay]:
    """As the file starts it: with a token, and with its own state in the Redis that Tandem uses."""
    url = urlsplit(redis_url)
    address = f"{url.hostname}:{url.port}"
    return elastic_ray(2, small_nodes(), (f"--redis-password={url.password}",), RAY_REDIS_ADDRESS=address, **CLOSED)


def raylet(worker_pid: int) -> psutil.Process:
    """The root of all processes of the node that a worker is on."""
    parents = psutil.Process(worker_pid).parents()
    return next(process for process in parents if "raylet" in process.name())


def role_of_node(node: psutil.Process) -> str:
    return str(json.loads(node.environ()[LABELS])[ROLE_LABEL])


def kill(node: psutil.Process) -> None:
    """All at once, as when a machine loses its power."""
    for process in [node, *node.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.mark.timeout(600)  # processes take long to start when others use the cores
def test_roles_have_nodes_of_their_own_and_a_lost_node_costs_no_token(
    smollm2: Path, record_property: Callable[[str, Any], None]
) -> None:
    prompt, new = tuple(prompts(smollm2)[15]), 60
    expected = greedy(smollm2, prompt, new)
    with contextlib.closing(EmbeddedRedis()) as redis, closed_ray(redis.url) as ray:
        settings = {
            **CLOSED,
            "RAY_ADDRESS": ray.address,
            "TANDEM_REDIS_URL": redis.url,
            "TANDEM_THREADS": "1",
            "TANDEM_STORE_MEMORY": str(256 * 2**20),
            "TANDEM_KV_MEMORY": str(512 * 2**20),
            "PYTHONPATH": os.getcwd(),
        }
        joined = run([sys.executable, "-c", AWAIT_NODES, "3", str(int(NODES_S))], settings, NODES_S + 30)
        assert joined.returncode == 0, joined.stderr
        refused = run(command("serve", str(smollm2), "--decode", "2"), settings)
        assert refused.returncode == 1
        assert "1 node(s) labelled tandem.role=decode have 1" in refused.stderr
        with serving(str(smollm2), "--dtype", "float32", "--placement", "least_loaded", **settings) as served:
            nodes = {name: raylet(served.pid(name)) for name in ("prefill-0", "decode-0")}
            assert {name: role_of_node(node) for name, node in nodes.items()} == {
                "prefill-0": "prefill",
                "decode-0": "decode",
            }
            assert served.complete(list(prompt), new, ignore_eos=True).tokens == expected
            assert served.metric("tandem_handoff_bytes_total") > 0
            lost_s = lose_the_decode_node(served, nodes["decode-0"], list(prompt), expected)
            record_property("seconds from the loss of the node to the end of the answer", time.monotonic() - lost_s)
            wait_until(lambda: decoding_elsewhere(served, nodes["decode-0"].pid), NODES_S, lambda: str(served.status()))
            record_property("seconds until a new node did its work", time.monotonic() - lost_s)
            assert ray.nodes() == 3
            assert served.complete(list(prompt), new, ignore_eos=True).tokens == expected
            served.assert_no_leaks()


def lose_the_decode_node(served: Served, node: psutil.Process, prompt: list[int], expected: list[int]) -> float:
    """In the middle of an answer, which comes all the same. Returns when, by the monotonic clock."""
    before = served.metric("tandem_output_tokens_total")
    with ThreadPoolExecutor(1) as client:
        answer = client.submit(served.complete, prompt, len(expected), ignore_eos=True)
        wait_until(lambda: served.metric("tandem_output_tokens_total") >= before + 20, 60)
        assert not answer.done()
        kill(node)
        lost_s = time.monotonic()
        assert answer.result(120).tokens == expected
    return lost_s


def decoding_elsewhere(served: Served, lost: int) -> bool:
    """Whether all workers serve and the one for decode is on another node of its role than the one that was lost."""
    workers = {worker["id"]: worker for worker in served.status()["workers"]}
    if "decode-0" not in workers or not all(worker["connected"] for worker in workers.values()):
        return False
    with contextlib.suppress(psutil.NoSuchProcess, StopIteration):
        node = raylet(workers["decode-0"]["pid"])
        return node.pid != lost and role_of_node(node) == "decode"
    return False
