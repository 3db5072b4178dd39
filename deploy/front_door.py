"""The router as a Ray Serve application; HAProxy in front of it is switched on by `deploy.environment`."""

from __future__ import annotations

from typing import Any

from ray import serve

from cluster import logs, telemetry
from cluster.config import Config
from router.app import create_app
from router.settings import RouterSettings

HEAD_NODE = "node:__internal_head__"  # a resource that Ray gives to the head and to no other node
ON_THE_HEAD = {"num_cpus": 0, "resources": {HEAD_NODE: 0.001}}


def application(config: Config, settings: RouterSettings, *beside: Any) -> Any:
    """Admission is ours (OpenAI-shaped 429s), so Serve's own queue limit must never be hit. On the head, which outlives
    all other nodes. `beside`: further deployments, bound, that start and end with the router; it does not call them."""

    def build() -> Any:
        logs.configure()
        logs.follow(settings.redis_url, settings.namespace)
        telemetry.configure("router")
        return create_app(config, settings)

    ingress = serve.ingress(build)()
    return serve.deployment(
        name="router",
        num_replicas=1,
        max_ongoing_requests=100_000,
        graceful_shutdown_timeout_s=5.0,
        ray_actor_options=ON_THE_HEAD,
    )(ingress).bind(*beside)
