"""What the benchmarks that replay a trace share: a deployment with given settings, and what it says of itself."""

from __future__ import annotations

import json
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from cluster.errors import StartupError
from cluster.messages import Rates
from deploy.bench.serve import Server

STATUS_S = 10.0


@contextmanager
def deployed(model: Path, dtype: str, settings: Mapping[str, Any]) -> Iterator[Server]:
    """`tandem serve` with these fields of the configuration; stopped on exit. Raises StartupError."""
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as folder:
        file = Path(folder, "settings.toml")
        # numbers, strings and lists of them are written alike in JSON and TOML
        file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))
        server = Server(model, dtype, "--config", str(file))
        try:
            yield server
        finally:
            server.stop()


def status(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{url}/status", timeout=STATUS_S) as response:
        state: dict[str, Any] = json.load(response)
    return state


def rates(url: str) -> dict[str, Rates]:
    """Worker id -> what it says its steps take. Raises StartupError when one has not said yet."""
    said = {worker["id"]: worker["rates"] for worker in status(url)["workers"]}
    if silent := [worker for worker, value in said.items() if value is None]:
        raise StartupError(f"{silent[0]} has not reported its rates; is it connected?")
    return {worker: _rates(value) for worker, value in said.items()}


def _rates(value: dict[str, Any]) -> Rates:
    """JSON knows no tuples."""
    fields: dict[str, Any] = {name: tuple(part) if isinstance(part, list) else part for name, part in value.items()}
    return Rates(**fields)


def router_pid(server: Server) -> int:
    """The process of the only router. Raises StartupError when there is none, or several."""
    found = [p for p in psutil.Process(server.pid).children(recursive=True) if "ServeReplica" in _name(p)]
    if len(found) != 1:
        raise StartupError(f"{len(found)} processes of this deployment are routers, not one")
    return int(found[0].pid)


def _name(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.NoSuchProcess:
        return ""
