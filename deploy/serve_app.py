"""A deployment as one Ray Serve application, for `serve deploy deploy/serve.yaml` and KubeRay's RayService.

    serve deploy ─► build (a task) ─► router    one replica, HTTP: as under `tandem serve`
                                      keeper    one replica: starts workers and stores, runs the controller

Under `tandem serve` all but the router lives and dies with a terminal; here it does with the keeper, which Serve
starts, starts again when it has died, and stops when the application is deleted. Ray ends actors and placement groups
with the actor that made them, so nothing survives a keeper that was killed. What a terminal can look after and Serve
cannot is refused: an embedded Redis.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray import serve

from cluster import logs
from cluster.config import Config, load, resolved
from cluster.controller import Controller, running
from cluster.errors import ConfigError
from deploy import front_door, placement
from deploy.blueprint import Blueprint, blueprint
from deploy.managed_cluster import ManagedCluster
from deploy.models import resolve
from deploy.node_roles import Node
from deploy.workforce import Workforce
from kvstore.redis_server import ping

CONFIG = "config"  # the one argument that is no setting: a TOML file
OF_SERVE = ("host", "port")
REDIS_S = 5.0
STOP_S = 60.0  # of the keeper: workers and stores are asked to end, and killed after 20 s
log = logging.getLogger(__name__)


def build(args: dict[str, Any]) -> Any:
    """The application. `args`: settings by name, which win over the environment and over `config`, a TOML file.

    Serve calls it in a task on any node, so the model and the file have to be at the same path on every node. Raises
    StartupError, which `serve status` shows.
    """
    config = configuration(args, os.environ)
    ping(config.redis_url, REDIS_S)
    made = blueprint(config, resolve(config.model, lambda _: None), config.redis_url, host="")
    return front_door.application(config, made.router, keeper(made))


def configuration(args: Mapping[str, Any], environment: Mapping[str, str]) -> Config:
    """Resolved. Raises ConfigError for what has no meaning or no keeper here."""
    settings = {name: value for name, value in args.items() if name != CONFIG}
    for name in OF_SERVE:
        if name in settings:
            raise ConfigError(f"args: {name} is Serve's here; set it under http_options")
    path = args.get(CONFIG)
    config = resolved(load(Path(path).expanduser() if path else None, environment, settings))
    if not config.redis_url:
        raise ConfigError(
            "redis_url: an application of Ray Serve needs a Redis that outlives it; deploy/head-redis.sh starts one, "
            "and TANDEM_REDIS_URL in the environment of Ray's nodes says where it is"
        )
    return config


def keeper(made: Blueprint) -> Any:
    """On the head, as the router: the node that outlives all others. It computes nothing."""
    return serve.deployment(
        name="keeper",
        num_replicas=1,
        graceful_shutdown_timeout_s=STOP_S,
        ray_actor_options=front_door.ON_THE_HEAD,
    )(Keeper).bind(made)


class Keeper:
    """Everything of a deployment but its router, for as long as this object is kept."""

    def __init__(self, made: Blueprint) -> None:
        """Returns when the first workers serve. Raises StartupError, having stopped what it had started."""
        logs.configure()
        logs.follow(made.identity.redis_url, made.identity.deployment)
        with contextlib.ExitStack() as stack:
            self._start(made, stack)
            self._stack = stack.pop_all()

    def __del__(self) -> None:
        """Serve calls it when the application is deleted."""
        stack: contextlib.ExitStack | None = getattr(self, "_stack", None)
        if stack is not None:
            stack.close()

    def _start(self, made: Blueprint, stack: contextlib.ExitStack) -> None:
        nodes = [Node.of(node) for node in ray.nodes() if node["Alive"]]
        places = placement.places(made.config, made.needs, nodes)
        workforce = Workforce(made.template, made.model, made.stores, places)
        stack.callback(workforce.close)
        workforce.start_first()
        workers, stores = workforce.await_ready(_report)
        log.info("%d workers and %d stores serve", len(workers), len(stores))
        cluster = ManagedCluster(workforce, made.identity, made.config)
        controller = Controller(cluster, placement.spec(made.config), made.identity.namespace)
        stack.enter_context(running(controller))


def _report(what: str, fraction: float) -> None:
    log.debug("%s: %.0f %%", what, 100 * fraction)
