"""`serve deploy` in a Ray cluster of its own: what `deploy/serve.yaml` describes starts, answers, comes back, and goes.

Only what is a machine's is changed in the file: ports, and simulated workers.
"""

from __future__ import annotations

import contextlib
import functools
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from deploy.environment import free_range
from kvstore.arena import SHARED_MEMORY
from kvstore.redis_server import EmbeddedRedis
from tests.e2e.ray_head import OPEN, ray_head
from tests.serving import Served, called, environment, marked, wait_until

ROOT = Path(__file__).resolve().parents[2]
START_S = 120.0
MODULE = (sys.executable, "-m")


@dataclass(frozen=True, slots=True)
class Ray:
    dashboard: str
    process: subprocess.Popen[bytes]
    mark: str

    def serve(self, *arguments: str) -> None:
        """Ray's own command."""
        command = [*MODULE, "ray.serve.scripts", *arguments, "--address", self.dashboard]
        run = subprocess.run(
            command,
            env=environment(self.mark, PYTHONPATH=str(ROOT), **OPEN),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert run.returncode == 0, run.stdout + run.stderr

    def state(self) -> str:
        """Of the application, in Serve's words; with its message when it is not well."""
        with urllib.request.urlopen(f"{self.dashboard}/api/serve/applications/", timeout=10) as response:
            application = json.load(response)["applications"]["tandem"]
        return str(application["status"]) + str(application["message"])

    def actors(self, name: str = "") -> set[int]:
        """Processes of ours in this cluster: Serve's replicas, workers, stores."""
        names = [name] if name else ["ServeReplica", "WorkerActor", "StoreActor"]
        return {process.pid for process in marked(self.mark) for name in names if called(process, name)}


@contextlib.contextmanager
def ray_cluster(**more: str) -> Iterator[Ray]:
    """A head node with Ray's dashboard, which is what `serve deploy` talks to."""
    mark, port, dashboard = uuid.uuid4().hex, free_range(1), free_range(1)
    url = f"http://127.0.0.1:{dashboard}"
    options = (
        *("--num-cpus=4", "--include-dashboard=true", "--dashboard-host=127.0.0.1"),
        *(f"--dashboard-port={dashboard}", "--dashboard-agent-listen-port=0"),
    )
    up = functools.partial(answers, f"{url}/api/version")
    with ray_head(mark, port, options, up, START_S, PYTHONPATH=str(ROOT), **more) as head:
        yield Ray(url, head, mark)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


def configured(path: Path, port: int, **args: Any) -> Path:
    """`deploy/serve.yaml` for this machine."""
    config = yaml.safe_load((ROOT / "deploy" / "serve.yaml").read_text())
    config["http_options"]["port"] = port
    config["applications"][0]["args"] |= {"threads": 1, "runner": "sim", "store_memory": 64 * 2**20, **args}
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.timeout(300)
def test_an_application_starts_answers_comes_back_and_goes(tiny: Path, tmp_path: Path) -> None:
    port = free_range(1)
    file = configured(tmp_path / "serve.yaml", port, model=str(tiny))
    with (
        contextlib.closing(EmbeddedRedis()) as redis,
        ray_cluster(TANDEM_REDIS_URL=redis.url) as ray,
    ):
        began = time.monotonic()
        ray.serve("deploy", str(file))
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: answers(f"{url}/ready"), START_S, ray.state)
        served = Served(url, ray.process, ray.mark, file, time.monotonic() - began)
        wait_until(lambda: len(alive(served)) == 2, START_S, ray.state)
        assert {worker["id"] for worker in served.status()["workers"]} == {"prefill-0", "decode-0"}
        first = served.complete([5, 6, 7], 20, ignore_eos=True).tokens
        assert len(first) == 20
        served.assert_no_leaks()
        wait_until(lambda: ray.state() == "RUNNING", 60)

        (keeper,) = ray.actors("ServeReplica:tandem:keeper")
        wait_until(lambda: len(served.status()["stores"]) == 1, 30, lambda: str(served.status()))
        workers, (store,) = alive(served), [store["id"] for store in served.status()["stores"]]
        psutil.Process(keeper).kill()
        wait_until(lambda: not workers & ray.actors("WorkerActor"), 60)  # Ray ends them with the one that made them
        wait_until(lambda: len(alive(served) - workers) == 2, START_S, ray.state)
        assert served.complete([5, 6, 7], 20, ignore_eos=True).tokens == first

        assert arenas(store)
        ray.serve("shutdown", "--yes")
        wait_until(lambda: not ray.actors(), 60, lambda: str(ray.actors()))
        assert not arenas(store)


def alive(served: Served) -> set[int]:
    """The processes of the workers that the router can use."""
    return {worker["pid"] for worker in served.status()["workers"] if worker["connected"]}


def arenas(store: str) -> list[Path]:
    """The shared memory of a node's store."""
    return list(SHARED_MEMORY.glob(f"tandem-{store}-*"))
