"""Facts about what Tandem needs from others: a Redis that the configuration names, the installed Ray, its cluster.

Every question has a deadline. Nothing of a URL's secrets gets into a fact. Judges nothing.
"""

from __future__ import annotations

import importlib.metadata
import ipaddress
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from cluster.redis import NO_URL, redacted

REDIS_S = 5.0
RAY_S = 60.0
CONNECT_S = 5.0


@dataclass(frozen=True, slots=True)
class Redis:
    url: str  # without secrets
    error: str = ""  # why it does not answer
    version: str = ""  # empty: its user may not ask (INFO)
    role: str = ""  # master, slave
    maxmemory: int = 0  # bytes; 0: no limit
    policy: str = ""  # what it evicts at that limit
    password: bool = False  # whether the URL has one
    local: bool = False  # whether only this machine reaches it under that address
    skew_s: float = 0.0  # its clock minus this machine's, as far as the way there and back leaves no doubt


@dataclass(frozen=True, slots=True)
class Ray:
    version: str  # installed; empty: it is not
    address: str = ""  # of the cluster to join; empty: `tandem serve` starts its own
    error: str = ""  # why that cluster does not take us
    nodes: int = 0
    cpus: float = 0.0


def redis_facts(url: str) -> Redis:
    shown = redacted(url)
    try:
        client = redis.Redis.from_url(
            url,
            socket_timeout=REDIS_S,
            socket_connect_timeout=REDIS_S,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
            driver_info=None,
        )
    except ValueError:  # its text would quote parts of the URL
        return Redis(shown, NO_URL)
    options = client.connection_pool.connection_kwargs
    try:
        with client:
            client.ping()
            info, skew_s = _info(client), _skew_s(client)
    except (redis.RedisError, OSError) as error:
        return Redis(shown, str(error) or type(error).__name__)
    return Redis(
        shown,
        version=str(info.get("redis_version", "")),
        role=str(info.get("role", "")),
        maxmemory=int(info.get("maxmemory", 0)),
        policy=str(info.get("maxmemory_policy", "")),
        password=bool(options.get("password")),
        local="path" in options or _is_loopback(str(options.get("host", "localhost"))),
        skew_s=skew_s,
    )


def _info(client: Any) -> dict[str, Any]:
    try:
        found: dict[str, Any] = client.info()
    except redis.exceptions.ResponseError:  # a user with just the rights that Tandem needs
        return {}
    return found


def _skew_s(client: Any) -> float:
    before_s = time.time()
    seconds, microseconds = client.time()
    after_s = time.time()
    theirs_s = seconds + microseconds / 1e6
    return float(max(0.0, theirs_s - after_s) + min(0.0, theirs_s - before_s))


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def ray_facts() -> Ray:
    try:
        version = importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        return Ray("")
    address = os.environ.get("RAY_ADDRESS", "local")
    if address == "local":
        return Ray(version)
    if refusal := _refusal(address):
        return Ray(version, address, refusal)
    try:
        # a process of its own: joining takes seconds, may print and cannot be undone within one
        done = subprocess.run(
            [sys.executable, "-m", "deploy.doctor.ray_probe", address], capture_output=True, text=True, timeout=RAY_S
        )
        said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return Ray(version, address, f"it does not answer within {RAY_S:.0f} s")
    except (IndexError, ValueError):
        return Ray(version, address, (done.stderr.strip().splitlines() or ["it says nothing"])[-1])
    return Ray(version, address, str(said.get("error", "")), int(said.get("nodes", 0)), float(said.get("cpus", 0.0)))


def _refusal(address: str) -> str:
    """Why nobody answers at host:port, which Ray takes minutes to say; empty for other ways to name a cluster."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        return ""
    try:
        socket.create_connection((host, int(port)), CONNECT_S).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""
