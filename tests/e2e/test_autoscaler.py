"""Scaling in a cluster whose nodes Ray's autoscaler brings and takes away."""

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvstore.redis_server import EmbeddedRedis
from tests.e2e.elastic_ray import elastic_ray
from tests.e2e.policies import WANTED
from tests.e2e.ray_head import OPEN
from tests.e2e.sim_oracle import Oracle
from tests.serving import serving, wait_until
from workers.architecture import load_architecture

NODES_S = 90.0


def test_the_pool_gets_its_nodes_and_gives_them_back(
    tiny: Path, tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    """The head has room for one worker; two more need a node each, and one of them at least is not needed later."""
    wanted = tmp_path / "workers"
    wanted.write_text("1")
    oracle = Oracle(load_architecture(tiny).vocab_size)
    prompt = list(range(20, 90))
    with contextlib.closing(EmbeddedRedis()) as redis, elastic_ray(2) as ray:
        settings = {
            **OPEN,
            "RAY_ADDRESS": ray.address,
            "TANDEM_REDIS_URL": redis.url,
            "TANDEM_THREADS": "1",
            "PYTHONPATH": os.getcwd(),
            WANTED: str(wanted),
        }
        policy = ("--scale", "1..3", "--autoscaling", "tests.e2e.policies:as_the_file_says")
        with serving(str(tiny), "--runner", "sim", "--prefill", "0", *policy, **settings) as served:

            def settle(what: str, condition: Callable[[], bool]) -> None:
                begun = time.monotonic()
                wait_until(condition, NODES_S, lambda: json.dumps(served.status(), indent=1))
                record_property(what, time.monotonic() - begun)

            def connected() -> int:
                return sum(worker["connected"] for worker in served.status()["workers"])

            assert served.complete(prompt, 8, ignore_eos=True).tokens == oracle(prompt, 8)
            wanted.write_text("3")
            settle("seconds until there were three nodes", lambda: ray.nodes() == 3)
            settle("more until there were three workers", lambda: connected() == 3)
            settle("more until there were three stores", lambda: len(served.status()["stores"]) == 3)
            assert served.complete(prompt, 8, ignore_eos=True).tokens == oracle(prompt, 8)
            wanted.write_text("1")
            settle("seconds until there was one worker", lambda: connected() == 1)
            # whose worker stays is the plan's choice: the head's, or one more node's
            settle("more until nodes were given back", lambda: ray.nodes() <= 2)
            settle("more until their stores were forgotten", lambda: len(served.status()["stores"]) == ray.nodes())
            assert served.complete(prompt, 8, ignore_eos=True).tokens == oracle(prompt, 8)
            served.assert_no_leaks()
