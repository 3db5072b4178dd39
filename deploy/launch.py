"""The composition root: starts what one deployment needs, in order, and stops all of it again.

    model files ─► Redis ─► Ray ─► stores and workers (actors, loading in parallel) ─► router (Ray Serve) ─► ready

The only file that creates Ray actors. Whatever fails on the way is a StartupError with one line to act on, and
everything that was started before it is stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import math
import os
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from cluster.config import Config
from cluster.errors import StartupError, TandemError
from cluster.identity import Identity
from cluster.messages import StoreInfo, WorkerInfo
from deploy import disk_tier, front_door, placement
from deploy.actors import StoreActor, WorkerActor, runtime_environment
from deploy.environment import LOOPBACK, free_range, starts_ray
from deploy.models import ResolvedModel
from deploy.served_model import block_layout, max_context, model_key, model_sizes
from deploy.store_sets import StoreSet, store_sets
from kvstore.redis_server import EmbeddedRedis, ping
from router.settings import RouterSettings
from workers.architecture import load_architecture
from workers.worker import WorkerSettings

READY_S = 600.0  # weights of a large model from a slow disk
PLACE_S = 60.0  # what Ray has not placed by then has no node to run on
STOP_S = 20.0
POLL_S = 0.1
WATCH_S = 1.0

Report = Callable[[str, float], None]  # (what is going on, how much of it is done 0..1)


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
    architecture = load_architecture(model.directory)
    context = max_context(config, architecture)
    placement.check_model(config, model_sizes(config, architecture))
    port = check_port(config.host, config.port)
    disk = disk_tier.folder(config)
    secret = disk_tier.cluster_secret(config, disk)
    with contextlib.ExitStack() as stack:
        redis = None
        if config.redis_url:
            ping(config.redis_url, timeout_s=5.0)
        else:
            report("starting Redis", 0.0)
            redis = stack.enter_context(contextlib.closing(EmbeddedRedis()))
        redis_url = redis.url if redis else config.redis_url
        report("starting Ray", 0.0)
        stack.enter_context(_ray(config))
        nodes = [node for node in ray.nodes() if node["Alive"]]
        if len(nodes) > 1 and not config.redis_url:
            raise StartupError("several nodes need a Redis that all of them reach; give one with --redis-url")
        placement.check_nodes(config, [node["Resources"].get("CPU", 0.0) for node in nodes])
        key = model_key(config, model.directory)
        # deployments with different secrets cannot talk, so they must not find each other in a shared Redis either
        namespace = hashlib.sha256(f"{key.namespace}/{secret}".encode()).hexdigest()[:16]
        identity = Identity(namespace, redis_url, secret, LOOPBACK if starts_ray() else "")
        layout = block_layout(config, architecture)
        sets = store_sets(config, layout, identity, disk)
        places = [(node["NodeID"], index) for node in nodes for index in range(config.stores)]
        stores = [_store(stack, config, *place, kind) for place in places for kind in sets]
        workers = []
        for role, count in config.roles:
            for index in range(count):
                duty = WorkerSettings(f"{role}-{index}", role, key, context, identity, config)
                workers.append(_worker(stack, duty, model.directory))
        report("starting the HTTP front door", 0.0)
        stack.callback(_stop_serve)
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        serve.start(http_options={"host": config.host, "port": port})
        store_infos = [_await(actor, f"block store {index}", report) for index, actor in enumerate(stores)]
        worker_infos = [_await(actor, f"worker {index}", report) for index, actor in enumerate(workers)]
        settings = RouterSettings(
            model_directory=str(model.directory),
            served_model_name=config.served_model_name or model.name,
            namespace=namespace,
            cluster_secret=secret,
            redis_url=redis_url,
            max_context=context,
            vocab_size=architecture.vocab_size,
            eos_token_ids=architecture.eos_token_ids,
            model_key=key,
            store_namespaces=tuple(kind.identity.namespace for kind in sets),
        )
        report("starting the router", 0.0)
        serve.run(front_door.application(config, settings), name="tandem", route_prefix="/")
        url = f"http://{config.host}:{port}"
        _await_health(url)
        yield Running(url, settings.served_model_name, worker_infos, store_infos, redis)


@contextlib.contextmanager
def _ray(config: Config) -> Iterator[None]:
    """Join the cluster that RAY_ADDRESS names, or start one on this machine that nobody else can reach."""
    options: dict[str, Any] = {}
    if starts_ray():
        needed = config.shards * config.threads
        options = {
            "include_dashboard": False,
            "num_cpus": max(os.cpu_count() or 1, needed),
            "object_store_memory": 80 * 2**20,  # Ray's minimum: no KV and no tokens ever pass through it
            "_node_ip_address": LOOPBACK,
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


def _store(stack: contextlib.ExitStack, config: Config, node_id: str, index: int, kind: StoreSet) -> Any:
    """One of that node's block stores, with its part of the node's memory and disk."""
    name, disk = f"{kind.name}-{node_id[:8]}-{index}", kind.disk_folders[index]
    on_that_node = NodeAffinitySchedulingStrategy(node_id, soft=False)  # soft affinity could move it
    actor = (
        ray.remote(StoreActor)
        .options(num_cpus=0, max_restarts=-1, max_concurrency=4, scheduling_strategy=on_that_node)
        .remote(name, kind.layout, kind.memory, kind.identity, disk, kind.disk_memory, config.tenant_share)
    )
    stack.callback(_stop_actor, actor)
    return actor


def _worker(stack: contextlib.ExitStack, settings: WorkerSettings, model: Path) -> Any:
    """The rank of a worker that leads it. It starts the others itself, next to it in its placement group."""
    strategy: Any = "DEFAULT"
    if math.prod(settings.config.grid(settings.role)) > 1:
        strategy = PlacementGroupSchedulingStrategy(_room(stack, settings), placement_group_bundle_index=0)
    actor = (
        ray.remote(WorkerActor)
        .options(
            num_cpus=settings.config.threads,
            max_restarts=-1,
            max_concurrency=4,
            runtime_env=runtime_environment(settings.config),
            scheduling_strategy=strategy,
        )
        .remote(settings, model)
    )
    stack.callback(_stop_actor, actor)
    return actor


def _room(stack: contextlib.ExitStack, settings: WorkerSettings) -> PlacementGroup:
    """Room for all shards of a worker: each stage's tensor group on one node, the stages as close as may be."""
    group: PlacementGroup = placement_group(
        placement.bundles(settings.config, settings.role), strategy="PACK", name=settings.id
    )
    stack.callback(remove_placement_group, group)
    if not group.wait(PLACE_S):
        tp, pp = settings.config.grid(settings.role)
        raise StartupError(
            f"{settings.id}: Ray found no room for {pp} stages of {tp * settings.config.threads} CPUs each; see "
            "`ray status`"
        )
    return group


def _await(actor: Any, name: str, report: Report) -> Any:
    """Wait until the actor serves, reporting how far its weights are. Raises what it reports, or StartupError."""
    started = time.monotonic()
    while time.monotonic() - started < READY_S:
        try:
            result = ray.get(actor.ready.remote(POLL_S), timeout=PLACE_S)
        except ray.exceptions.GetTimeoutError:
            raise StartupError(f"{name}: Ray found no node with room for it; see `ray status`") from None
        except ray.exceptions.RayActorError as error:
            raise StartupError(f"{name} died while starting: {str(error).splitlines()[0]}") from None
        if isinstance(result, StartupError):
            raise result
        if isinstance(result, TandemError):
            raise StartupError(f"{name}: {result.message}")
        if result is not None:
            return result
        if hasattr(actor, "progress"):
            report(f"loading {name}", ray.get(actor.progress.remote(), timeout=PLACE_S))
    raise StartupError(f"{name} was not ready after {READY_S:.0f} s; its log is in {ray_logs()}")


def ray_logs() -> str:
    return "/tmp/ray/session_latest/logs"


def _await_health(url: str) -> None:
    deadline = time.monotonic() + PLACE_S
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=2.0):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(POLL_S)
    raise StartupError(f"{url} did not become ready; the router's log is in {ray_logs()}")


def _stop_serve() -> None:
    # Ray prints, from a thread of its own, that the controller it is told to end has ended
    with contextlib.redirect_stdout(io.StringIO()):
        serve.shutdown()


def _stop_actor(actor: Any) -> None:
    """Ask it to stop, then make sure."""
    with contextlib.suppress(ray.exceptions.RayError, TimeoutError):  # dead or stuck: killed next
        ray.get(actor.stop.remote(), timeout=STOP_S)
    ray.kill(actor)
