"""The composition root: starts what one deployment needs, in order, and stops all of it again.

    model files ─► Redis ─► Ray ─► stores, workers (actors, loading in parallel) ─► router (Ray Serve) ─► controller

Actors are created by `deploy/workforce.py`, for the first workers as for later ones; what becomes of them then is the
controller's, on a thread of this process. Whatever fails on the way is a StartupError with one line to act on, and
everything that was started before it is stopped.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve

from cluster.config import Config
from cluster.controller import Controller, running
from cluster.errors import StartupError
from cluster.messages import StoreInfo, WorkerInfo
from deploy import front_door, gpu_labels, placement
from deploy.blueprint import blueprint
from deploy.environment import LOOPBACK, free_range, starts_ray
from deploy.managed_cluster import ManagedCluster
from deploy.models import ResolvedModel
from deploy.node_roles import Node
from deploy.process import LOGS
from deploy.workforce import Report, Workforce
from kvstore.redis_server import EmbeddedRedis, ping

HEALTH_S = 60.0
POLL_S = 0.1
WATCH_S = 1.0


@dataclass(frozen=True, slots=True)
class Running:
    """A deployment that serves."""

    url: str
    model_name: str
    workers: list[WorkerInfo]
    stores: list[StoreInfo]
    redis: EmbeddedRedis | None

    def watch(self) -> None:
        """Until interrupted. Ray looks after its actors; the embedded Redis has nobody else."""
        while True:
            time.sleep(WATCH_S)
            if self.redis is not None:
                self.redis.revive()


def check_port(host: str, port: int) -> int:
    """The port, or a free one for 0. Raises StartupError when it is taken."""
    port = port or free_range(1)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = f"{host}:{port} cannot be listened on ({error.strerror})"
            raise StartupError(f"{reason}; choose another with --port") from None
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def deployment(config: Config, model: ResolvedModel, report: Report) -> Iterator[Running]:
    """Everything up on entry, everything down on exit. `config` is resolved. Raises StartupError."""
    port = check_port(config.host, config.port)
    with contextlib.ExitStack() as stack:
        redis = None
        if config.redis_url:
            ping(config.redis_url, timeout_s=5.0)
        else:
            report("starting Redis", 0.0)
            redis = stack.enter_context(contextlib.closing(EmbeddedRedis()))
        redis_url = redis.url if redis else config.redis_url
        made = blueprint(config, model, redis_url, LOOPBACK if starts_ray() else "")
        report("starting Ray", 0.0)
        stack.enter_context(_ray(config))
        nodes = [node for node in ray.nodes() if node["Alive"]]
        grows = config.budget[1] > config.shards and not starts_ray()
        if (len(nodes) > 1 or grows) and not config.redis_url:
            raise StartupError("several nodes need a Redis that all of them reach; give one with --redis-url")
        _check_head(nodes)
        places = placement.places(config, made.needs, [Node.of(node) for node in nodes])
        workforce = Workforce(made.template, made.model, made.stores, places)
        stack.callback(workforce.close)
        workforce.start_first()
        report("starting the HTTP front door", 0.0)
        stack.callback(_stop_serve)
        _start_serve(config.host, port)
        workers, stores = workforce.await_ready(report)
        report("starting the router", 0.0)
        serve.run(front_door.application(config, made.router), name="tandem", route_prefix="/")
        url = f"http://{config.host}:{port}"
        _await_health(url)
        cluster = ManagedCluster(workforce, made.identity, config)
        stack.enter_context(running(Controller(cluster, placement.spec(config), made.identity.namespace)))
        yield Running(url, made.router.served_model_name, workers, stores, redis)


@contextlib.contextmanager
def _ray(config: Config) -> Iterator[None]:
    """Join the cluster that RAY_ADDRESS names, or start one on this machine that nobody else can reach."""
    options: dict[str, Any] = {}
    if starts_ray():
        needed = config.budget[1] * config.threads
        options = {
            "include_dashboard": False,
            "num_cpus": max(os.cpu_count() or 1, needed),
            "object_store_memory": 80 * 2**20,  # Ray's minimum: no KV and no tokens ever pass through it
            "_node_ip_address": LOOPBACK,
            "labels": gpu_labels.labels() or None,
        }
    address = os.environ.get("RAY_ADDRESS", "local")
    try:
        try:
            with _uninterrupted():
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
        except (ConnectionError, RuntimeError, TimeoutError, ValueError) as error:
            raise StartupError(f"cannot start or join Ray ({address}): {str(error).splitlines()[0]}") from None
        yield
    finally:
        ray.shutdown()


def _check_head(nodes: list[dict[str, Any]]) -> None:
    """Raises StartupError unless this is the head node: the front door is there, and asked from here."""
    here = ray.get_runtime_context().get_node_id()
    head = next((node for node in nodes if front_door.HEAD_NODE in node["Resources"]), None)
    if head is not None and head["NodeID"] != here:
        raise StartupError(
            f"run this on the head of the Ray cluster, {head['NodeManagerAddress']}: HTTP is served there"
        )


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Signals that arrive inside are delivered afterwards: Ray can only stop what it has finished starting."""
    pending: list[int] = []
    handlers = {n: signal.signal(n, lambda n, _: pending.append(n)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if pending:
            signal.raise_signal(pending[0])


def _await_health(url: str) -> None:
    deadline = time.monotonic() + HEALTH_S
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=2.0):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(POLL_S)
    raise StartupError(f"{url} did not become ready; the router's log is in {LOGS}")


def _start_serve(host: str, port: int) -> None:
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        # one front door, on the head: the one replica of the router is there, too
        serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
    except (ray.exceptions.RayError, TimeoutError) as error:
        reason = str(error).splitlines()[0]
        raise StartupError(f"the HTTP front door did not start ({reason}); its log is in {LOGS}") from None


def _stop_serve() -> None:
    # Ray prints, from a thread of its own, that the controller it is told to end has ended
    with contextlib.redirect_stdout(io.StringIO()):
        serve.shutdown()
